"""Two runs, or two sources, side by side: for a regression between commits or machines. `kfacrnn compare A B --diff`.

Runs are paired by what decides their curves: equal task, optimiser, budget, seed, precision and threads. Equal settings
should give equal curves, bit for bit on one machine; so the first update at which they part is the thing to look at.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kfacrnn.compare import Group, Question, grouped, unit_of, value_at
from kfacrnn.curves import Curve
from kfacrnn.errors import UserError
from kfacrnn.selection import StoredRun, named, select
from kfacrnn.summary_cells import significant
from kfacrnn.units import from_nats
from kfacrnn.where import text_of

SCIENCE = r"(task|optimizer(?!\.inverse_share$)|budget)\..*|seed|precision|threads"  # as `Run.scientific`
PATHS = r"results|data\.root|tracker\..*|run_id|source"
SIDES = ("A", "B")


@dataclass(frozen=True)
class Difference:
    """`settings`: key, value in A, value in B, of what differs. `pairs`: the table of curves. `groups`, for a plot."""

    settings: list[tuple[str, str, str]]
    header: list[str]
    cells: list[list[str]]
    records: list[dict[str, Any]]
    groups: list[Group]
    said: list[str]


def difference(
    a: str, b: str, where: Sequence[str], question: Question, *, by: Sequence[str] = (), **reading: Any
) -> Difference:
    """Compares two sides, each `SOURCE`, `SOURCE@RUN` or `RUN` of the result store. Runs are paired by the keys `by`,
    or by everything that decides their curves; two single runs are paired whatever they are.

    Raises `UserError` for a run that there is not, and when nothing can be paired.
    """
    said: list[str] = []
    sides = [_side(name, where, said, letter, reading) for name, letter in zip((a, b), SIDES, strict=True)]
    pairs = _paired(sides, by, said)
    every = [run for pair in pairs for side in pair for run in side]
    keys = (*(by or ("task.name", "optimizer.name")), "side")
    groups = grouped(every, replace(question, group_by=keys), said)
    curves = {run: curve for group in groups for run, curve in group.curves.items()}
    records = [_record(pair, curves, question) for pair in pairs]
    header, cells = _cells(records, question)
    settings = _settings([[run for pair in pairs for run in pair[place]] for place in (0, 1)])
    return Difference(settings, header, cells, records, groups, said)


def _side(name: str, where: Sequence[str], said: list[str], letter: str, reading: dict[str, Any]) -> list[StoredRun]:
    source, at, run_id = name.rpartition("@")
    if not at and re.fullmatch(r"[0-9a-f]{4,12}", name):
        source, run_id = "results", name
    elif not at:
        source, run_id = name, ""
    conditions = [*where, f"run_id={run_id}*", "state=*"] if run_id else where
    selection = select([source], conditions, **reading)
    if run_id and len(selection.runs) > 1:
        raise UserError(f"{name}: is the beginning of {named(selection.runs)}")
    said += [f"{letter}: {line}" for line in selection.said]
    return [replace(run, values=run.values | {"side": letter}) for run in selection.runs]


def _key(run: StoredRun, by: Sequence[str]) -> tuple[str, ...]:
    keys = by or [key for key in sorted(run.values) if re.fullmatch(SCIENCE, key) and run.values[key] is not None]
    for key in keys:
        if key not in run.values:
            raise UserError(f"--group-by {key}: run {run.run_id} has no such key")
    return tuple(f"{key}={text_of(run.values[key])}" for key in keys)


Pair = tuple[list[StoredRun], list[StoredRun]]


def _paired(sides: Sequence[Sequence[StoredRun]], by: Sequence[str], said: list[str]) -> list[Pair]:
    if not by and all(len(side) == 1 for side in sides):
        return [(list(sides[0]), list(sides[1]))]
    found: dict[tuple[str, ...], Pair] = {}
    for place, side in enumerate(sides):
        for run in side:
            found.setdefault(_key(run, by), ([], []))[place].append(run)
    for place, letter in enumerate(SIDES):
        alone = [run for pair in found.values() if not pair[1 - place] for run in pair[place]]
        if alone:
            said.append(f"only in {letter}: {named(alone)}")
    pairs = [pair for pair in found.values() if all(pair)]
    if not pairs:
        raise UserError(f"nothing to pair: {'; '.join(said)}; --group-by KEY,… pairs runs with equal values of these")
    return pairs


def _record(pair: Pair, curves: Mapping[StoredRun, Curve], question: Question) -> dict[str, Any]:
    """One row: medians over the runs of each side; where single runs part, and by how much at most."""
    there = [[curves[run] for run in side if run in curves] for side in pair]
    values = [[value for curve in side if (value := value_at(curve, question)) is not None] for side in there]
    shown = [from_nats(unit_of(pair[0][0], question))(statistics.median(side)) if side else None for side in values]
    record: dict[str, Any] = {
        "task": pair[0][0].values.get("task.name"),
        "optimizer": pair[0][0].values.get("optimizer.name"),
        "seed": " ".join(sorted({text_of(run.values.get("seed")) for side in pair for run in side})),
        **{f"run {letter}": " ".join(run.run_id for run in side) for letter, side in zip(SIDES, pair, strict=True)},
        **{f"state {letter}": " ".join(run.state for run in side) for letter, side in zip(SIDES, pair, strict=True)},
        **{f"value {letter}": value for letter, value in zip(SIDES, shown, strict=True)},
        "value B/A": _quotient(*shown),
        "parts at update": None,
        "largest gap": None,
    }
    if all(len(side) == 1 for side in there):
        record["parts at update"], record["largest gap"] = _parting(there[0][0], there[1][0])
    seconds = [_pace(side) for side in pair]
    record |= {f"seconds per update {letter}": value for letter, value in zip(SIDES, seconds, strict=True)}
    return record | {"seconds B/A": _quotient(*seconds)}


def _quotient(a: float | None, b: float | None) -> float | None:
    return b / a if a and b is not None and math.isfinite(a) else None


def _pace(runs: Sequence[StoredRun]) -> float | None:
    """Median over the runs that had the machine to themselves of training seconds per update."""
    paces = []
    for run in (run for run in runs if run.undisturbed):
        columns = run.folder.metrics.columns(["update", "time_train_s"])
        if columns["update"]:
            paces.append(columns["time_train_s"][-1] / columns["update"][-1])
    return statistics.median(paces) if paces else None


def _parting(a: Curve, b: Curve) -> tuple[int | None, float]:
    """The first common update with different values, None if there is none, and the largest difference."""
    other = dict(zip(b.updates, b.nats, strict=True))
    common = ((update, nats) for update, nats in zip(a.updates, a.nats, strict=True) if update in other)
    gaps = [(update, abs(nats - other[update])) for update, nats in common]
    return next((update for update, gap in gaps if gap), None), max((gap for _, gap in gaps), default=0.0)


def _settings(sides: Sequence[Sequence[StoredRun]]) -> list[tuple[str, str, str]]:
    """Settings and provenance whose values are not the same on both sides."""
    values = [[_described(run) for run in side] for side in sides]
    rows = []
    for key in sorted({key for side in values for run in side for key in run}):
        a, b = (sorted({run[key] for run in side if key in run}) for side in values)
        if a != b:
            rows.append((key, ", ".join(a) or "–", ", ".join(b) or "–"))
    return rows


def _described(run: StoredRun) -> dict[str, str]:
    sessions = run.meta.get("sessions") or [{}]
    versions = {f"version of {key}": value for key, value in sessions[-1].get("versions", {}).items()}
    kept = {key: value for key, value in run.values.items() if not re.fullmatch(PATHS, key) and key != "side"}
    dirty = {"uncommitted changes": sessions[-1].get("dirty")}
    return {key: text_of(value) for key, value in (kept | versions | dirty).items()}


def _cells(records: Sequence[dict[str, Any]], question: Question) -> tuple[list[str], list[list[str]]]:
    at = f"update {question.at}" if isinstance(question.at, int) else question.at
    columns: dict[str, list[str]] = {}
    for key in records[0]:
        heading = key.replace("value", f"{question.metric} at {at}", 1) if key != "value B/A" else "B/A"
        columns[heading] = [_cell(key, record[key]) for record in records]
    kept = {heading: column for heading, column in columns.items() if any(column)}
    return [*kept], [list(line) for line in zip(*kept.values(), strict=True)]


def _cell(key: str, value: Any) -> str:
    if key == "parts at update":
        return "never" if value is None else str(value)
    if isinstance(value, float):
        return f"{value:.3f}" if key.endswith("B/A") else significant(value)
    return "" if value is None else str(value)
