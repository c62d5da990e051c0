"""Runs in groups, side by side: `kfacrnn compare`. Targets, ratios and intervals are those of the figures' tables.

A group is a line of `kfacrnn.summary`, compared with the baselines of the same task. What a group mixes, what it lacks
and what cannot be compared is said in `Comparison.said`.
"""

from __future__ import annotations

import fnmatch
import math
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kfacrnn.curves import Curve, columns_for, nats_of, of_run, quantile
from kfacrnn.discovery import unknown
from kfacrnn.errors import UserError
from kfacrnn.metrics import COLUMNS
from kfacrnn.provenance import machine
from kfacrnn.selection import EXTRA, Selection, StoredRun, named
from kfacrnn.summary import Entry, Line, Run, smoothed, summarise
from kfacrnn.summary_cells import COLUMNS as CELLS
from kfacrnn.summary_table import record
from kfacrnn.units import from_nats, to_nats
from kfacrnn.where import Condition, text_of

METRICS = [name for name in COLUMNS if name not in ("update", "epoch", "tokens", "time_train_s")]
AXES = {"update": "updates", "time": "seconds"}
APART = ("seed", "results", "device", "tracker.*", "data.*", *EXTRA)
"""Keys in which the runs of a group may differ without a word."""


@dataclass(frozen=True)
class Question:
    """What is asked of the runs. `at` is end, best or an update; a value is the mean over the `last` updates."""

    metric: str = "train/metric"
    x: str = "update"
    at: str | int = "end"
    last: int = 50
    group_by: tuple[str, ...] = ("task.name", "optimizer.name")
    baseline: str | None = None
    target: float | None = None
    mix_hardware: bool = False

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise UserError(f"--metric {self.metric}: {unknown('column of metrics.csv', self.metric, METRICS)}")
        if self.x not in AXES:
            raise UserError(f"--x {self.x}: must be one of {', '.join(AXES)}")
        if self.last < 1:
            raise UserError(f"--last {self.last}: must be at least 1 (updates)")

    @property
    def in_nats(self) -> bool:
        """Whether the metric is one that comes from nats."""
        return nats_of(self.metric) is not None


def parse_at(text: str) -> str | int:
    """`end`, `best` or `update=N`. Raises `UserError` for anything else."""
    key, _, number = text.partition("=")
    if key == "update" and number.isdigit():
        return int(number)
    if text not in ("end", "best"):
        raise UserError(f"--at {text}: must be end, best or update=N")
    return text


@dataclass(frozen=True, eq=False)
class Group:
    """Runs with equal values of the keys `group_by`, and their `curves`, in nats where the metric comes from nats."""

    values: tuple[str, ...]
    task: str
    unit: str  # what the task calls its metric, or nothing for other columns
    curves: dict[StoredRun, Curve]

    @property
    def name(self) -> str:
        return " ".join(self.values)

    @property
    def convert(self) -> Callable[[float], float]:
        return from_nats(self.unit)


@dataclass(frozen=True)
class Comparison:
    """The table in `cells`, the same with all digits in `records`, what there is to say of it in `said`."""

    groups: list[Group]
    header: list[str]
    cells: list[list[str]]
    records: list[dict[str, Any]]
    said: list[str]


def compare(selection: Selection, question: Question) -> Comparison:
    """Raises `UserError` for an unknown key or baseline, for runs that have nothing of the metric, for a group that
    mixes tasks, and for a time axis that would mix hardware."""
    said = list(selection.said)
    groups = grouped(selection.runs, question, said)
    timed = _timed(groups, question, said)
    lines = [_line(group, question, timed) for group in groups]
    baselines = _baselines(groups, question)
    entries: dict[str, Entry] = {}
    for unit in dict.fromkeys(group.unit for group in groups):
        of_unit = [line for group, line in zip(groups, lines, strict=True) if group.unit == unit]
        target = None if question.target is None else to_nats(unit, question.target)
        entries |= {e.line.name: e for e in summarise(of_unit, baselines, from_nats(unit), named=target)}
    shown = [_at(group, entries[group.name], question, said) for group in groups]
    header, cells = _cells(groups, shown, question)
    records = [_record(group, entry, question) for group, entry in zip(groups, shown, strict=True)]
    return Comparison(groups, header, cells, records, [*said, *_remarks(shown, question)])


def grouped(runs: Sequence[StoredRun], question: Question, said: list[str]) -> list[Group]:
    """The runs by their values of `group_by`, in the order of these; without those that lack the metric."""
    there_are = {key for run in runs for key in run.values}
    for key in question.group_by:
        if key not in there_are:
            raise UserError(f"--group-by {key}: {unknown('key of a configuration', key, sorted(there_are))}")
    curves = {run: read(run, question) for run in runs}
    empty = {run: None for run, curve in curves.items() if not curve.updates and not curve.diverged}
    if empty:
        said.append(f"skipped {named([*empty])}: nothing of {question.metric}")
    found: dict[tuple[str, ...], list[StoredRun]] = {}
    for run in (run for run in runs if run not in empty):
        found.setdefault(tuple(text_of(run.values.get(key)) for key in question.group_by), []).append(run)
    if not found:
        raise UserError(f"no run has anything of {question.metric}")
    groups = []
    for values, members in sorted(found.items()):
        tasks = sorted({text_of(run.values.get("task.name")) for run in members})
        units = sorted({unit_of(run, question) for run in members})
        if len(units) > 1 or len(tasks) > 1:
            name = " ".join(values)
            raise UserError(f"{name}: mixes the tasks {', '.join(tasks)}; --group-by task.name,… parts them")
        groups.append(Group(values, tasks[0], units[0], {run: curves[run] for run in members}))
        said += _mixture(groups[-1], question)
    return groups


def unit_of(run: StoredRun, question: Question) -> str:
    """What its task calls the metric; nothing for other columns. Raises `UserError` where the run has lost its task."""
    return run.folder.task()["metric"] if question.in_nats else ""


def read(run: StoredRun, question: Question) -> Curve:
    return of_run(run.folder.metrics.columns(columns_for(question.metric)), question.metric, run.state == "diverged")


def _mixture(group: Group, question: Question) -> list[str]:
    """What there is to say of a group whose runs differ in more than the seed, or in length."""
    lines, runs = [], list(group.curves)
    keys = {key for run in runs for key in run.values}
    silent = {key for pattern in APART for key in fnmatch.filter(keys, pattern)}
    mixed = []
    for key in sorted(keys - silent - set(question.group_by)):
        values = sorted({text_of(run.values.get(key)) for run in runs})
        if len(values) > 1:
            mixed.append(f"{key} ({', '.join(values[:6])}{', …' if len(values) > 6 else ''})")
    if mixed:
        lines.append(f"{group.name}: its runs differ in {', '.join(mixed)}")
    ends = sorted({curve.updates[-1] for curve in group.curves.values() if curve.updates and not curve.diverged})
    if len(ends) > 1 and question.at == "end":
        length = f"{ends[0]} to {ends[-1]} updates"
        lines.append(f"{group.name}: runs of unequal length, {length}, each taken at its own end")
    return lines


def _timed(groups: Sequence[Group], question: Question, said: list[str]) -> set[StoredRun]:
    """The runs whose seconds count: those that had the machine to themselves, unless the machines differ."""
    timed = {run for group in groups for run in group.curves if run.undisturbed}
    machines = sorted({machine(session["hardware"]) for run in timed for session in run.meta["sessions"]})
    if len(machines) <= 1 or question.mix_hardware:
        return timed
    if question.x == "time":
        raise UserError(f"a time axis would mix hardware: {'; '.join(machines)}; --mix-hardware allows it")
    said.append(f"no seconds, for they would mix hardware: {'; '.join(machines)}; --mix-hardware allows it")
    return set()


def _line(group: Group, question: Question, timed: Collection[StoredRun]) -> Line:
    """Seeds pair the runs of two lines, so a seed that comes twice in one is none: such runs have numbers that no other
    line has."""
    seeds = [run.values.get("seed", 0) for run in group.curves]
    distinct = seeds if len(set(seeds)) == len(seeds) else [-1 - int(run.run_id, 16) for run in group.curves]
    runs = tuple(
        Run(seed, smoothed(curve, question.last), curve.paces if run in timed else ())
        for seed, (run, curve) in zip(distinct, group.curves.items(), strict=True)
    )
    optimizer = next(iter(group.curves)).values.get("optimizer.name", "")
    return Line(group.name, group.name, optimizer, group.name, runs, model=group.task)


def _baselines(groups: Sequence[Group], question: Question) -> list[str]:
    """The groups that `--baseline` means: a value of theirs, or `KEY=PATTERN` that all of their runs meet."""
    if question.baseline is None:
        return []
    if "=" in question.baseline:
        condition = Condition.parse(question.baseline)
        keys = condition.keys({key for group in groups for run in group.curves for key in run.values})
        meant = [g.name for g in groups if all(condition.holds(run.values, keys) for run in g.curves)]
    else:
        meant = [group.name for group in groups if question.baseline in (group.name, *group.values)]
    if not meant:
        values = sorted({value for group in groups for value in group.values})
        raise UserError(f"--baseline {question.baseline}: {unknown('group', question.baseline, values)}")
    return meant


def _at(group: Group, entry: Entry, question: Question, said: list[str]) -> Entry:
    """The entry with the values that `--at` asks for."""
    if question.at == "end":
        return entry
    values = {run: value_at(curve, question) for run, curve in group.curves.items()}
    missing = [run for run, value in values.items() if value is None]
    if missing:
        said.append(f"{group.name}: {named(missing)} without a row at update {question.at}")
    there = sorted(value for value in values.values() if value is not None)
    if not there:
        return replace(entry, final=None, final_low=None, final_high=None)
    low, median, high = (group.convert(quantile(there, q)) for q in (0.0, 0.5, 1.0))
    return replace(entry, final=median, final_low=low, final_high=high)


def value_at(curve: Curve, question: Question) -> float | None:
    """The mean over the rows of the `last` updates at the end, where it is least, or up to an update that has a row;
    infinite from where a run diverged."""
    if isinstance(question.at, int):
        here = curve.at_update(question.at)
        rows = zip(curve.updates, curve.nats, strict=True)
        near = [nats for update, nats in rows if question.at - question.last < update <= question.at]
        return statistics.fmean(near) if here is not None and math.isfinite(here) else here
    means = smoothed(curve, question.last).nats
    if curve.diverged or not means:
        return math.inf
    return min(means) if question.at == "best" else means[-1]


def _cells(groups: Sequence[Group], shown: Sequence[Entry], question: Question) -> tuple[list[str], list[list[str]]]:
    at = f"at update {question.at}" if isinstance(question.at, int) else f"at {question.at}"
    axis = AXES[question.x]
    diverged = [sum(curve.diverged for curve in group.curves.values()) for group in groups]
    columns = {key: [group.values[place] for group in groups] for place, key in enumerate(question.group_by)}
    columns["runs"] = [str(len(group.curves)) for group in groups]
    columns["diverged"] = [str(count) if any(diverged) else "" for count in diverged]
    columns[f"{question.metric} {at}"] = [CELLS["final value"](entry) for entry in shown]
    for heading in ("reached", f"{axis} to target", f"ratio of {axis}", "seconds per update (p95)"):
        columns[heading] = [CELLS[heading](entry) for entry in shown]
    filled = {heading: column for heading, column in columns.items() if any(column)}
    return [*filled], [[text or "–" for text in line] for line in zip(*filled.values(), strict=True)]


def _record(group: Group, entry: Entry, question: Question) -> dict[str, Any]:
    everything = record(entry)
    keys = dict(zip(question.group_by, group.values, strict=True))
    counts = {"runs": len(group.curves), "diverged": sum(curve.diverged for curve in group.curves.values())}
    asked = {"metric": question.metric, "unit": group.unit or None, "at": question.at}
    rest = {key: value for key, value in everything.items() if key not in ("line", "method", "model", "runs")}
    renamed = {key.replace("final", "value"): value for key, value in rest.items()}
    return keys | counts | asked | renamed | {"run_ids": " ".join(run.run_id for run in group.curves)}


def _remarks(shown: Sequence[Entry], question: Question) -> list[str]:
    lines = [
        f"values: of every run the mean over {question.last} updates, then the median over runs, least and greatest in "
        "brackets"
    ]
    for entry in shown:
        if entry.baseline == entry.line.name:
            lines.append(f"baseline {entry.baseline}; target {entry.target:.6g}")
    if any(entry.target is not None for entry in shown) and len(lines) == 1:
        lines.append(f"target {question.target:.6g}, no baseline")
    return lines
