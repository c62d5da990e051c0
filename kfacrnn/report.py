"""`kfacrnn report`: every figure of a result store on one HTML page that needs nothing else, neither files nor network.

All of it comes from `results/figures`: `NAME.json` says what there is to say, `NAME.svg` is the picture. The template
escapes whatever it is given; pictures pass `inline_svg`, which lets nothing but shapes through.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from kfacrnn import __version__, discovery
from kfacrnn.drawing import colour
from kfacrnn.errors import UserError
from kfacrnn.files import make_folder_of, write_atomic
from kfacrnn.inline_svg import inline_svg

ROW_OF_A_RUN = ("seed", "run_id", "updates", "state", "commits", "hardware", "jobs")


def report(*, results: str, out: str | None = None) -> Path:
    """Writes the page (default: `results`/report.html) and returns its path.

    Raises `UserError` where a figure's files cannot be read, or the page not written.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    store = discovery.place(results)
    path = discovery.place(out) if out else store / "report.html"
    folder = store / "figures"
    figures = [_figure(file, results) for file in sorted(folder.glob("*.json"), key=_order)]
    studies = [_study(file) for file in sorted(folder.glob("*.svg")) if not file.with_suffix(".json").exists()]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        figures=figures,
        studies=studies,
        missing=_missing({figure["name"] for figure in figures}, results),
        command=discovery.command("report", results=results),
        version=__version__,
    )
    make_folder_of(path, "choose another with --out FILE")
    write_atomic(path, page.encode())
    return path


def _order(path: Path) -> tuple[bool, int, str]:
    """The paper's figures first, by number, then the others by name."""
    number = re.fullmatch(r"figure(\d+)", path.stem)
    return number is None, int(number[1]) if number else 0, path.stem


def _heading(name: str) -> str:
    return re.sub(r"^figure(\d+)$", r"Figure \1", name)


def _missing(drawn: set[str], results: str) -> list[dict[str, Any]]:
    """The experiments without a figure, with what makes it."""
    folder = discovery.resource("experiments")
    names = sorted(set(discovery.yaml_names(folder)) - drawn, key=lambda name: _order(Path(name)))
    return [
        {
            "heading": _heading(name),
            "summary": discovery.summary(folder / f"{name}.yaml"),
            "commands": _makers(name, results),
        }
        for name in names
    ]


def _makers(name: str, results: str) -> list[str]:
    return [discovery.command(verb, name, results=results) for verb in ("sweep", "figure")]


def _figure(path: Path, results: str) -> dict[str, Any]:
    """What the template shows of one figure."""
    name = path.stem
    try:
        stored = json.loads(path.read_text())
        lines = [_line(line) for line in stored["lines"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is no figure's provenance; {_makers(name, results)[1]}") from error
    settings = [line["settings"] for line in lines if line["runs"]]
    common = [setting for setting in settings[0] if all(setting in other for other in settings)] if settings else []
    for line in lines:
        line["settings"] = [setting for setting in line["settings"] if setting not in common]
    runs = [run for line in lines for run in line["runs"]]
    table = stored.get("table")
    return {
        "name": name,
        "heading": _heading(name),
        "anchor": _slug(name),
        "title": stored.get("title") or name,
        "description": stored.get("description", ""),
        "claim": stored.get("claim", ""),
        "table": table and table | {"rows": [row | {"colour": colour(row["optimizer"])} for row in table["rows"]]},
        "lines": lines,
        "common": common,
        "unequal_trials": stored.get("unequal_trials") or {},
        "commits": sorted({commit for run in runs for commit in run["commits"]}),
        "hardware": sorted({machine for run in runs for machine in run["hardware"]}),
        "runs": len(runs),
        "commands": _all_makers(name, lines, results),
        "svg": _picture(path.with_suffix(".svg"), f"{_makers(name, results)[1]} --from csv"),
    }


def _all_makers(name: str, lines: list[dict[str, Any]], results: str) -> list[str]:
    """The runs, the benchmarks that give them seconds, the figure."""
    sweep, figure = _makers(name, results)
    benches = (line["benched"].get("command") for line in lines if line["benched"])
    return [sweep, *dict.fromkeys(filter(None, benches)), figure]


def _study(path: Path) -> dict[str, Any]:
    """A picture that a script draws of more than one experiment; the page of its numbers, if there is one, has its
    title."""
    page = path.parents[1] / f"{path.stem}.md"
    title, *rest = page.read_text().splitlines() if page.exists() else [path.stem.replace("_", " ")]
    made = [line for line in rest if line.startswith("Made by ")]
    command = re.findall("`([^`]+)`", made[0])[0] if made else ""
    return {
        "anchor": _slug(path.stem),
        "title": title.lstrip("# "),
        "command": command,
        "page": page.name if page.exists() else "",
        "svg": _picture(path, command or "draw it again"),
    }


def _line(stored: dict[str, Any]) -> dict[str, Any]:
    trials = sorted(stored["trials"], key=lambda trial: (trial["score"] is None, trial["score"] or 0.0))
    return {
        "label": stored["label"],
        "optimizer": stored["optimizer"],
        "colour": colour(stored["optimizer"]),
        "chosen": _settings(stored["chosen"]),
        "selection": stored["selection"],
        "on_an_edge": stored.get("on_an_edge") or [],
        "chosen_by": stored.get("chosen_by"),
        "is_transferred": stored.get("chosen_by") not in (None, stored["line"]),
        "benched": stored.get("benched"),
        "trials": [trial | {"settings": _settings(trial["choice"])} for trial in trials],
        "runs": [{key: run[key] for key in ROW_OF_A_RUN} for run in stored["runs"]],
        "settings": _own_settings(stored),
    }


def _settings(choice: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in choice.items()]


def _own_settings(stored: dict[str, Any]) -> list[str]:
    """The overrides that all runs of a line have, but for what its grid chose and what the line's name says."""
    every = [run["overrides"] for run in stored["runs"]]
    shared = set(every[0]).intersection(*every[1:]) if every else set()
    said = ("seed=", "optimizer=", "tracker.", *(f"{key}=" for key in stored["chosen"]))
    return [override for override in every[0] if override in shared and not override.startswith(said)] if every else []


def _picture(path: Path, maker: str) -> Any:
    """The SVG as markup for the template; None without a file."""
    from markupsafe import Markup

    try:
        content = path.read_text()
    except OSError:
        return None
    try:
        return Markup(inline_svg(content, f"{_slug(path.stem)}-"))
    except ElementTree.ParseError as error:
        raise UserError(f"{path}: {error}; {maker}") from error


def _slug(name: str) -> str:
    """Fit for an id, and different for different names."""
    return re.sub(r"[^A-Za-z0-9_]", lambda other: f"-{ord(other[0]):x}-", name)
