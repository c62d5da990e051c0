#!/usr/bin/env python3
"""What K-FAC's settings cost and what they are worth: final training loss against the cost of an update.

For every study, `experiments/cost_*.yaml`, the runs in the store say how well a setting trains (the mean over the last
updates of each seed), and `kfacrnn bench experiment NAME` says what its update costs by SGD's. A setting that lacks
either is left out, with the command that makes it.

    python scripts/cost_study.py            writes results/cost_study.{md,csv} and results/figures/cost_study.{png,svg}
"""

from __future__ import annotations

import argparse
import statistics
import sys
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from kfacrnn import benched, experiment
from kfacrnn.drawing import OTHER_COLOURS, house_style, saved, write_files
from kfacrnn.plan import Plan
from kfacrnn.settings import costly, without_none
from kfacrnn.tables import markdown
from kfacrnn.units import from_nats

STUDIES = ("cost_char", "cost_word")
SHIPPED = "as shipped"
REFERENCE = "nothing spared"


class Setting(NamedTuple):
    """A line of a study: an update's cost by SGD's, over whole runs, with an interval, and every seed's last value."""

    line: str
    cost: float
    low: float
    high: float
    finals: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.finals)


class Study(NamedTuple):
    """`missing` says, for every line that is left out, the command that makes what it lacks."""

    name: str
    title: str
    label: str
    settings: list[Setting]
    missing: dict[str, str]


def read(name: str, results: Path) -> Study:
    described = experiment.load(name)
    plan, settings, missing = Plan(described, str(results)), [], {}
    for line in plan.lines:
        planned = plan.confirmation(line)
        runs, run = [each for each in planned if each.finished], planned[0].run
        bench = benched.nearest(results, f"experiment-{described.name}", run) or {"rows": []}
        row = next((row for row in bench["rows"] if without_none(row["settings"]) == costly(run.optimizer)), None)
        if not runs or row is None:
            missing[line] = f"kfacrnn bench experiment {name}" if runs else f"kfacrnn sweep {name} --only '{line}'"
            continue
        convert = from_nats(runs[0].folder.task()["metric"])
        finals = sorted(convert(each.score(described.select)) for each in runs)
        cost, low, high = (row[key] * benched.first_updates(row, run) for key in ("ratio_to_sgd", "low", "high"))
        settings.append(Setting(line, cost, low, high, finals))
    settings.sort(key=lambda setting: setting.cost)
    return Study(described.name, described.figure.title, described.figure.y.label, settings, missing)


# -------------------------------------------------------------------------------------------------------------- tables


def page(studies: list[Study]) -> str:
    parts = "\n".join(section(study) for study in studies if study.settings)
    left_out = "".join(
        f"- {study.name}, {line}: `{command}`\n" for study in studies for line, command in study.missing.items()
    )
    not_run = f"## Not run yet\n\n{left_out}" if left_out else ""
    return f"""\
# What K-FAC's savings cost and are worth

Made by `python scripts/cost_study.py` from the runs of `experiments/cost_*.yaml` and `kfacrnn bench experiment`.

![final training loss against the cost of an update](figures/cost_study.png)

{parts}
{not_run}"""


def section(study: Study) -> str:
    reference = next((setting.median for setting in study.settings if setting.line == REFERENCE), None)
    rows = [
        (
            setting.line,
            f"{setting.cost:.3f}",
            f"{setting.low:.3f}–{setting.high:.3f}",
            " ".join(f"{final:.4g}" for final in setting.finals),
            "" if reference is None else f"{setting.median - reference:+.2g}",
        )
        for setting in study.settings
    ]
    cost = "an update by SGD's, mean over the run"
    header = ("setting", cost, "interval", f"{study.label}, each seed", f"median above {REFERENCE}")
    return f"""\
## {study.title}

{markdown(header, rows)}

{noise(study)}; {judgement(study)}
"""


def noise(study: Study) -> str:
    apart = spread(study)
    if apart is None:
        return "One seed each, so that nothing can be told apart from noise"
    return f"A setting's seeds lie {apart:.2g} apart (median over settings)"


def spread(study: Study) -> float | None:
    """Between the seeds of a setting that has several."""
    spreads = [setting.finals[-1] - setting.finals[0] for setting in study.settings if len(setting.finals) > 1]
    return statistics.median(spreads) if spreads else None


def judgement(study: Study) -> str:
    """Which settings are cheaper than those that ship, and whether that can be told apart from noise."""
    shipped = next((setting for setting in study.settings if setting.line == SHIPPED), None)
    if shipped is None:
        return f"the line {SHIPPED} is not run yet."
    cheaper = [setting for setting in study.settings if setting.cost < shipped.cost]
    if not cheaper:
        return "nothing is cheaper than what ships."
    apart = spread(study) or 0.0
    said = [
        f"{setting.line} (cost {setting.cost - shipped.cost:+.3f}, "
        + ("told apart from" if setting.low > shipped.high or setting.high < shipped.low else "within the intervals of")
        + f" the shipped; loss {setting.median - shipped.median:+.2g}, "
        + ("within" if setting.median - shipped.median <= apart else "beyond")
        + " that spread)"
        for setting in cheaper
    ]
    return f"cheaper than what ships: {'; '.join(said)}."


def to_csv(studies: list[Study]) -> bytes:
    rows = [
        {"study": study.name, **setting._asdict(), "finals": " ".join(map(repr, setting.finals))}
        for study in studies
        for setting in study.settings
    ]
    return pd.DataFrame(rows).to_csv(index=False, lineterminator="\n").encode()


# ------------------------------------------------------------------------------------------------------------- picture


def draw(studies: list[Study]) -> dict[str, bytes]:
    """The files' contents by suffix. Costs on a logarithmic axis: nothing spared is several times as dear."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    others = dict.fromkeys(setting.line for study in studies for setting in study.settings if setting.line != SHIPPED)
    colours = {SHIPPED: "#0072B2", **dict(zip(others, cycle(OTHER_COLOURS), strict=False))}
    with house_style():
        page = Figure(figsize=(4.6 * len(studies), 3.6))
        for ax, study in zip(page.subplots(1, len(studies), squeeze=False)[0], studies, strict=True):
            for setting in study.settings:
                colour = colours[setting.line]
                ax.plot([100 * (setting.cost - 1)] * 2, [min(setting.finals), max(setting.finals)], color=colour)
                ax.plot(100 * (setting.cost - 1), setting.median, "o", color=colour, label=setting.line)
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
            ax.set_xscale("log")
            ax.margins(x=0.1, y=0.2)
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
            ax.set_xlabel("cost of an update above SGD's (%)")
            ax.set_ylabel(study.label)
            ax.set_title(study.title, fontsize=9)
        return {suffix: saved(page, suffix) for suffix in ("png", "svg")}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default="results", metavar="DIR", help="the result store (default results)")
    results = Path(parser.parse_args(arguments).results)
    studies = [read(name, results) for name in STUDIES]
    for study in studies:
        for line, command in study.missing.items():
            print(f"left out: {study.name}, {line}: {command}", file=sys.stderr)
    run = [study for study in studies if study.settings]
    if not run:
        return 2
    print(*map(section, run), sep="\n")
    written = {"md": page(studies).encode(), "csv": to_csv(run)}
    print(*write_files(written, results / "cost_study"), sep="\n")
    print(*write_files(draw(run), results / "figures" / "cost_study"), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
