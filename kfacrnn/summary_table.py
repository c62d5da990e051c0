"""The table of a figure: `NAME.table.csv` with all digits, `.md` and `.tex` for reading, and what it says in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from kfacrnn import tables
from kfacrnn.benched import Cost
from kfacrnn.curves import SEEDS_FOR_QUARTILES, Curve
from kfacrnn.experiment import Experiment, Select, Target
from kfacrnn.plan import PlannedRun
from kfacrnn.summary import LEVEL, Entry, Line, Run, lowest, smoothed, summarise
from kfacrnn.summary_cells import COLUMNS, quotient, significant

EMPTY = "–"


@dataclass(frozen=True)
class Table:
    """What stands under the picture: cells as people read them, `notes` on how they came about, `findings` in words."""

    entries: Sequence[Entry]
    header: list[str]
    cells: list[list[str]]
    notes: list[str]
    findings: list[str]


def of_runs(
    described: Experiment,
    curves: Mapping[str, Mapping[PlannedRun, Curve]],
    timed: Collection[PlannedRun],
    costs: Mapping[str, Cost | None],
    convert: Callable[[float], float],
) -> Table:
    """The table of the figure that draws `curves`, by name of line. The seconds of `timed` count; without any,
    those of the benched cost of a line's update, if there is one."""
    select, lines = described.select, []
    for name, of_line in curves.items():
        line, cost = described.lines[name], costs.get(name)
        runs = tuple(_run(planned, curve, select, timed) for planned, curve in of_line.items())
        optimizer, model = described.methods[line.method].optimizer, line.model or ""
        lines.append(Line(name, line.method, optimizer, line.label, runs, model, cost))
    target = described.target or Target([])
    solved = -math.inf if target.solved is None else target.solved
    return table(described, summarise(lines, target.baselines, convert, solved))


def _run(planned: PlannedRun, curve: Curve, select: Select, timed: Collection[PlannedRun]) -> Run:
    last = select.updates(planned.run.task.batch_size)
    judged = lowest(curve) if select.early_stopping else smoothed(curve, last)
    return Run(planned.point.seed, judged, curve.paces if planned in timed else ())


def table(described: Experiment, entries: Sequence[Entry]) -> Table:
    """The entries in cells, without the columns that would be empty throughout."""
    columns = {heading: [cell(entry) for entry in entries] for heading, cell in COLUMNS.items()}
    filled = {heading: column for heading, column in columns.items() if any(column)}
    cells = [[text or EMPTY for text in line] for line in zip(*filled.values(), strict=True)]
    return Table(entries, [*filled], cells, list(_notes(described, entries)), list(_findings(described, entries)))


def files(described: Experiment, shown: Table) -> dict[str, str]:
    """The files' contents by suffix."""
    notes = " ".join(shown.notes)
    latex = [
        r"\begin{table}",
        r"\centering",
        tables.latex(shown.header, shown.cells),
        rf"\caption{{{tables.escape_latex(f'{described.figure.title}. {notes}')}}}",
        rf"\label{{tab:{described.name}}}",
        r"\end{table}",
    ]
    return {
        "csv": tables.as_csv([record(entry) for entry in shown.entries]),
        "md": f"{tables.markdown(shown.header, shown.cells)}\n\n{notes}\n",
        "tex": "\n".join(latex) + "\n",
    }


def stored(shown: Table) -> dict[str, object]:
    """What the figure's provenance keeps of its table, for `kfacrnn report`."""
    rows = [
        {"optimizer": entry.line.optimizer, "cells": cells}
        for entry, cells in zip(shown.entries, shown.cells, strict=True)
    ]
    return {"header": shown.header, "rows": rows, "notes": shown.notes, "findings": shown.findings}


def record(entry: Entry) -> dict[str, object]:
    """All digits; None is an empty cell and `inf` is never."""
    line = entry.line
    record: dict[str, object] = {
        **{"line": line.name, "method": line.method, "model": line.model or None, "runs": len(line.runs)},
        **{"final": entry.final, "final_low": entry.final_low, "final_high": entry.final_high},
        **{"target": entry.target, "baseline": entry.baseline, "reached": entry.reached},
    }
    for axis, time, ratio in (
        ("updates", entry.updates, entry.updates_ratio),
        ("seconds", entry.seconds, entry.seconds_ratio),
    ):
        record[f"{axis}_to_target"] = time
        for part in ("value", "low", "high"):
            record[f"{axis}_ratio_{part}".removesuffix("_value")] = getattr(ratio, part, None)
    source = "bench" if line.benched else "runs"
    timed = {"median": entry.seconds_per_update, "p95": entry.seconds_per_update_p95}
    record |= {f"seconds_per_update_{part}": value for part, value in timed.items()}
    return record | {"seconds_from": None if entry.seconds_per_update is None else source}


def _notes(described: Experiment, entries: Sequence[Entry]) -> Iterator[str]:
    yield (
        f"Values are {described.figure.y.label}: of every run {described.select.value}, then the median over runs, and "
        "the least and the greatest in brackets."
    )
    if described.target:
        yield from _notes_on_target(described, described.target.baselines, entries)
    if "seconds" not in described.figure.panels:
        yield "No seconds: the figure has no panel of seconds."
    elif not any(entry.seconds_per_update for entry in entries):
        yield "No seconds: no run had the machine to itself."
    if any(entry.seconds_per_update is not None and not entry.line.benched for entry in entries):
        yield (
            "Seconds are of training, from runs that had the machine to themselves; per update, median and 95th "
            "percentile over log intervals."
        )
    if any(entry.line.benched for entry in entries):
        yield (
            "†: seconds are what updates cost by kfacrnn bench, side by side, per update the mean in the long run and "
            "the 95th percentile of single ones; K-FAC's first updates cost more."
        )


def _notes_on_target(described: Experiment, baselines: Sequence[str], entries: Sequence[Entry]) -> Iterator[str]:
    with_runs = {entry.line.method for entry in entries if entry.line.runs}
    labels = {method: described.methods[method].label or method for method in baselines}
    compared = [label for method, label in labels.items() if method in with_runs]
    missing = [label for method, label in labels.items() if method not in with_runs]
    targets = [entry for entry in entries if entry.line.name == entry.baseline]
    if not targets:
        yield f"No target: no runs yet of {' or '.join(labels.values())}, or most of them diverged."
        return
    for best in targets:
        yield f"Target: {_target(best, compared)}."
    if missing:
        yield f"There are no runs yet of {', '.join(missing)}."
    yield (
        f"A run reaches it at the first log point where {described.select.value} is no higher; a diverged run never "
        "does. ∞: half of the runs or more did not reach it. "
        f"Ratios are to the best baseline, with a {LEVEL:.0%} bootstrap interval over seeds{_caution(entries)}."
    )


def _caution(entries: Sequence[Entry]) -> str:
    """The interval of a median of n is at most from the least to the greatest, which is 1 − 2^(1−n)."""
    few = min((len(entry.line.runs) for entry in entries if entry.line.runs), default=0)
    if few < 2 or few >= SEEDS_FOR_QUARTILES:
        return ""
    return f", which with {few} seeds covers at most {1 - 0.5 ** (few - 1):.0%}: read it as a range"


def _target(best: Entry, baselines: Sequence[str]) -> str:
    assert best.target is not None
    what = f"{best.line.label}, the best of {', '.join(baselines)}" if len(baselines) > 1 else best.line.label
    if best.solved:
        return f"{significant(best.target)}, with which the task counts as solved; the best baseline is {what}"
    return f"{significant(best.target)}, the final value of {what} (of two middle runs the higher)"


def _findings(described: Experiment, entries: Sequence[Entry]) -> Iterator[str]:
    """A sentence for every line that is measured against the baselines."""
    baselines = described.target.baselines if described.target else ()
    labels = {entry.line.name: entry.line.label for entry in entries}
    for entry in entries:
        if entry.baseline is None or entry.target is None or entry.line.method in baselines:
            continue
        target, reached = significant(entry.target), f"{entry.reached} of {len(entry.line.runs)} runs do"
        if entry.updates_ratio is None or math.isinf(entry.updates_ratio.value):
            yield f"{entry.line.label} does not reach the target, {target}: {reached}."
            continue
        ratios = f"{quotient(entry.updates_ratio)} of the updates of {labels[entry.baseline]}"
        if entry.seconds_ratio:
            ratios += f", {quotient(entry.seconds_ratio)} of its seconds"
        yield f"{entry.line.label} reaches the target, {target}, in {ratios}; {reached}."
