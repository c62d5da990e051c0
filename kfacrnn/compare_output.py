"""What `kfacrnn compare` says and draws: a table as text, CSV, Markdown, LaTeX or JSON, and a picture of its groups."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kfacrnn import tables
from kfacrnn.compare import AXES, Comparison, Group, Question, compare, parse_at
from kfacrnn.curves import Row, over_seconds, over_updates
from kfacrnn.difference import SIDES, Difference, difference
from kfacrnn.discovery import place
from kfacrnn.errors import UserError
from kfacrnn.experiment import Experiment, Method
from kfacrnn.files import make_folder_of, write_atomic
from kfacrnn.picture import MARKERS, STYLES, Axis, Picture
from kfacrnn.selection import select

FORMATS = ("text", "csv", "md", "tex", "json")
PICTURES = ("png", "svg", "pdf")
WIDE = 10  # times the least value: from there on the axis is logarithmic


def run(options: argparse.Namespace) -> None:
    """The command: the table to standard output, what there is to say of it to standard error."""
    if options.out not in FORMATS:
        raise UserError(f"--out {options.out}: must be one of {', '.join(FORMATS[1:])}")
    if options.plot and Path(options.plot).suffix.removeprefix(".") not in PICTURES:
        raise UserError(f"--plot {options.plot}: must end in .{', .'.join(PICTURES)}")
    by = tuple(key.strip() for key in (options.group_by or "").split(",") if key.strip())
    question = Question(
        metric=options.metric,
        x=options.x,
        at=parse_at(options.at),
        last=options.last,
        baseline=options.baseline,
        target=options.target,
        mix_hardware=options.mix_hardware,
        **({"group_by": by} if by else {}),
    )
    reading = {name: getattr(options, name) for name in ("results", "refresh", "offline")}
    sources, shown = options.sources or ["results"], ""
    found: Comparison | Difference
    if options.diff:
        if len(sources) != 2:
            raise UserError(f"--diff: needs two sides, runs or sources; there are {len(sources)}")
        found = difference(sources[0], sources[1], options.where, question, by=by, **reading)
        shown = table_of_settings(options.out, found)
    else:
        found = compare(select(sources, options.where, **reading, each_source="source" in by), question)
    print(shown + table(options.out, found.header, found.cells, found.records, found.said))
    for line in found.said:
        print(line, file=sys.stderr)
    if options.plot:
        plot(found.groups, question, place(options.plot), " and ".join(sources))
        print(options.plot, file=sys.stderr)


def table_of_settings(form: str, found: Difference) -> str:
    """What differs, before the table of curves; nothing in csv and json, whose tables are for programs."""
    if form in ("csv", "json"):
        return ""
    write = {"text": tables.plain, "md": tables.markdown, "tex": tables.latex}[form]
    if not found.settings:
        return "no setting and no provenance differs\n\n"
    return write(["differs", *SIDES], found.settings) + "\n\n"


def table(
    form: str,
    header: Sequence[str],
    cells: Sequence[Sequence[str]],
    records: Sequence[dict[str, Any]],
    said: Sequence[str],
) -> str:
    """The table in one of `FORMATS`: csv and json with all digits, where `inf` is never, the others for reading."""
    if form == "json":
        return json.dumps({"rows": [_json(row) for row in records], "said": list(said)}, indent=2)
    if form == "csv":
        return tables.as_csv(records).rstrip("\n")
    return {"text": tables.plain, "md": tables.markdown, "tex": tables.latex}[form](header, cells)


def _json(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: what is never reached is the text "Infinity"."""
    return {key: "Infinity" if isinstance(value, float) and math.isinf(value) else value for key, value in row.items()}


def plot(groups: Sequence[Group], question: Question, path: Path, title: str) -> None:
    """A line with a band for every group, as in the figures, to a file that ends in one of `PICTURES`. Against seconds
    only runs that had the machine to themselves. Raises `UserError` for another ending, and for several metrics."""
    suffix = path.suffix.removeprefix(".")
    if suffix not in PICTURES:
        raise UserError(f"--plot {path}: must end in .{', .'.join(PICTURES)}")
    units = sorted({group.unit or question.metric for group in groups})
    if len(units) > 1:
        raise UserError(f"--plot {path}: {' and '.join(units)} have no axis in common; --where task.name=… takes one")
    from kfacrnn.drawing import draw

    rows = [row for group in groups for row in _rows(group, question)]
    content = draw(_described(groups, question, title, rows), rows)[suffix]
    make_folder_of(path)
    write_atomic(path, content)


def _rows(group: Group, question: Question) -> list[Row]:
    if question.x == "time":
        alone = [curve for run, curve in group.curves.items() if run.undisturbed]
        rows = over_seconds(group.name, alone, group.convert)
    else:
        rows = over_updates(group.name, list(group.curves.values()), group.convert)
    ends = [run.status.get("update", 0) for run, curve in group.curves.items() if curve.diverged]
    return rows + [Row("diverged", group.name, update, None, None, None, 1) for update in ends]


def _described(groups: Sequence[Group], question: Question, title: str, rows: Sequence[Row]) -> Experiment:
    """The groups as the methods of an experiment: colour by optimiser; what shares one differs in style or marker."""
    methods: dict[str, Method] = {}
    looks = [(style, marker) for marker in (None, *MARKERS) for style in STYLES]
    for group in groups:
        optimizer = str(next(iter(group.curves)).values.get("optimizer.name", ""))
        style, marker = looks[sum(m.optimizer == optimizer for m in methods.values()) % len(looks)]
        methods[group.name] = Method(optimizer=optimizer, style=style, marker=marker)
    finite = [v for row in rows for v in (row.low, row.high) if v is not None and math.isfinite(v)]
    wide = bool(finite) and min(finite) > 0 and max(finite) > WIDE * min(finite)
    label = f"{question.metric} ({groups[0].unit})" if groups[0].unit else question.metric
    axis = Axis(label=label, metric=question.metric, scale="log" if wide else "linear")
    picture = Picture(title=title, y=axis, panels=[AXES[question.x]])
    return Experiment(name="…", description=title, common=[], seeds=[0], methods=methods, figure=picture)
