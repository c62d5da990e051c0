"""From the runs of an experiment to its figure: `NAME.csv`, its provenance `NAME.json`, its table, then the picture.

The picture is drawn from what the CSV holds and `experiments/NAME.yaml` says, and from nothing else, so that drawing it
again without the runs gives the same bytes.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kfacrnn import benched, experiment, summary_table
from kfacrnn.benched import Cost
from kfacrnn.curves import (
    PANELS,
    Curve,
    Row,
    columns_for,
    of_run,
    over_benched_seconds,
    over_seconds,
    over_updates,
)
from kfacrnn.discovery import command, place, unknown
from kfacrnn.errors import UserError
from kfacrnn.experiment import Experiment
from kfacrnn.files import make_folder_of, write_atomic, write_json
from kfacrnn.plan import Plan, PlannedRun
from kfacrnn.provenance import machine, undisturbed
from kfacrnn.run import NUMERICS_VERSION
from kfacrnn.sources import open_source
from kfacrnn.summary_table import Table
from kfacrnn.units import from_nats

COLUMNS = [field.name for field in dataclasses.fields(Row)]


def figure(
    name: str, *, results: str, source: str = "results", out: str | None = None, overrides: Sequence[str] = ()
) -> list[Path]:
    """Draws an experiment's figure into `out` (default: `results`/figures) and returns the files written.

    `source` is one of `kfacrnn.sources`, or `csv`, the figure's own CSV. Raises `UserError` when there is nothing to
    draw, or when a time axis would mix hardware.
    """
    described = experiment.load(name)
    folder = place(out) if out else place(results) / "figures"
    table, written = folder / f"{described.name}.csv", []
    if source != "csv":
        opened = open_source(source, results=results)
        for note in opened.notes:
            print(f"{source}: {note}", file=sys.stderr)
        plan = Plan(described, str(opened.store.root), overrides)
        rows, shown, provenance = collect(plan, source, benches=place(results))
        make_folder_of(table, "choose another with --out DIR")
        write_atomic(table, _to_csv(rows).encode())
        write_json(table.with_suffix(".json"), provenance)
        written = [table, table.with_suffix(".json")]
        for suffix, text in summary_table.files(described, shown).items():
            written.append(table.with_suffix(f".table.{suffix}"))
            write_atomic(written[-1], text.encode())
    from kfacrnn.drawing import draw, write_files

    maker = command("figure", described.called, *(["--out", out] if out else []), *overrides, results=results)
    return written + write_files(draw(described, _from_csv(table, described, maker)), table.with_suffix(""))


def collect(
    plan: Plan, source: str = "results", benches: Path | None = None
) -> tuple[list[Row], Table, dict[str, Any]]:
    """The figure's rows from the finished runs of a plan, its table, and where each of its lines comes from. `source`
    is what the plan's store is called, `benches` the results folder with the benchmarks (default: that of the plan)."""
    described, picture = plan.experiment, plan.experiment.figure
    lines = {line: [planned for planned in plan.confirmation(line) if planned.finished] for line in plan.lines}
    if not any(lines.values()):
        where = plan.store.root if source == "results" else source
        sweep = command("sweep", described.called, *plan.overrides, results=benches or plan.store.root)
        raise UserError(f"{described.name} has no finished run in {where}; {sweep}")
    for line, finished in lines.items():
        expected = len(described.lines[line].seeds)
        if len(finished) < expected:
            print(f"{line}: {len(finished)} of {expected} runs are finished", file=sys.stderr)
    runs = [planned for finished in lines.values() for planned in finished]
    task = _task(described, runs)
    clock = _clock(plan, lines, benches or plan.store.root)
    convert = from_nats(task["metric"] if picture.y.metric.endswith("/metric") else "nats")
    rows = [Row("trials", line, count, None, None, None, 1) for line, count in plan.unequal_trials().items()]
    every: dict[str, dict[PlannedRun, Curve]] = {}
    for line, finished in lines.items():
        every[line] = curves = {planned: _curve(planned, picture.y.metric) for planned in finished}
        against_updates = over_updates(line, list(curves.values()), convert)
        rows += against_updates
        rows += over_seconds(line, [curve for planned, curve in curves.items() if planned in clock.timed], convert)
        if cost := clock.costs.get(line):
            rows += over_benched_seconds(against_updates, cost.after)
        ends = sorted(planned.folder.status()["update"] for planned, curve in curves.items() if curve.diverged)
        rows += [Row("diverged", line, update, None, None, None, 1) for update in ends]
    rows.sort(key=lambda row: PANELS.index(row.panel))
    shown = summary_table.of_runs(described, every, clock.timed, clock.costs, convert)
    about = {"title": picture.title, "claim": described.claim, "table": summary_table.stored(shown)}
    return rows, shown, _provenance(plan, lines, task, clock.costs, source) | about


class Clock(NamedTuple):
    """Where a figure's seconds come from, the same for all lines: the runs that had the machine to themselves, or what
    updates of each line cost by `kfacrnn bench`, as far as it has measured them."""

    timed: set[PlannedRun]
    costs: dict[str, Cost | None]


def _clock(plan: Plan, lines: Mapping[str, Sequence[PlannedRun]], benches: Path) -> Clock:
    """Raises `UserError` where seconds of different machines would be drawn side by side."""
    picture = plan.experiment.figure
    drawn = {line: finished for line, finished in lines.items() if finished}
    timed = {planned for finished in drawn.values() for planned in finished if undisturbed(planned.folder.meta())}
    costs = {line: _cost(plan, line, finished, benches) for line, finished in drawn.items() if picture.benched_seconds}
    are_all_timed = all(timed.intersection(finished) for finished in drawn.values())
    if picture.benched_seconds and (all(costs.values()) or not are_all_timed):
        timed = set()
    else:
        costs = {}
    if "seconds" not in picture.panels:
        return Clock(set(), costs)
    if not picture.mix_hardware:
        _check_hardware(timed, [cost for cost in costs.values() if cost])
    return Clock(timed, costs)


def _cost(plan: Plan, line: str, finished: Sequence[PlannedRun], benches: Path) -> Cost | None:
    return benched.cost(finished[0].run, benches, plan.experiment.runs or plan.experiment.name, line)


def _curve(planned: PlannedRun, metric: str) -> Curve:
    diverged = planned.folder.status()["state"] == "diverged"
    return of_run(planned.columns(columns_for(metric)), metric, diverged)


def _task(described: Experiment, runs: Sequence[PlannedRun]) -> dict[str, Any]:
    """What the runs measure, all of them the same. Raises `UserError` where they do not, or where another level is
    drawn as that of chance."""
    picture, first = described.figure, runs[0].folder.task()
    if picture.y.metric.endswith("/nats"):
        return first
    for metric in (planned.folder.task()["metric"] for planned in runs):
        if metric != first["metric"]:
            both = f"lines measure {first['metric']} and {metric}"
            raise UserError(f"{described.name}: {both}; draw nats instead: figure.y.metric: train/nats")
    if picture.chance is not None and not math.isclose(picture.chance, first["chance"], rel_tol=0.01):
        wanted = f"{first['chance']:.4g} {first['metric']}"
        raise UserError(f"{described.name}: figure.chance={picture.chance}: the task says {wanted}")
    return first


def _check_hardware(runs: Iterable[PlannedRun], costs: Iterable[Cost]) -> None:
    machines = {machine(cost.hardware): cost.file for cost in costs}
    for planned in runs:
        for session in planned.folder.meta()["sessions"]:
            machines.setdefault(machine(session["hardware"]), f"run {planned.run.run_id}")
    if len(machines) > 1:
        found = "; ".join(f"{name} ({where})" for name, where in sorted(machines.items()))
        raise UserError(f"a time axis would mix hardware: {found}; figure.mix_hardware: true allows it")


def _provenance(
    plan: Plan, lines: dict[str, list[PlannedRun]], task: dict[str, Any], costs: dict[str, Cost | None], source: str
) -> dict[str, Any]:
    described = plan.experiment
    return {
        "experiment": described.name,
        "description": described.description,
        "source": source,
        "task": task,
        "metric": described.figure.y.metric,
        "numerics_version": NUMERICS_VERSION,
        "unequal_trials": plan.unequal_trials(),
        "lines": [_line(plan, line, finished, costs.get(line)) for line, finished in lines.items()],
    }


def _line(plan: Plan, name: str, finished: list[PlannedRun], cost: Cost | None) -> dict[str, Any]:
    described, line = plan.experiment, plan.experiment.lines[name]
    winner, trials = plan.winner(name), plan.trials(name)
    scores = [trial.score(described.judgement) if trial.finished else math.inf for trial in trials]
    states = {planned.point.seed: planned.folder.state() for planned in plan.confirmation(name)}
    return {
        "line": name,
        "label": line.label,
        "method": line.method,
        "model": line.model,
        "optimizer": described.methods[line.method].optimizer,
        "chosen": winner.point.choice if winner else {},
        "chosen_by": line.tuned_as if winner else None,
        "on_an_edge": plan.edges(name),
        "selection": str(described.judgement) if winner else None,
        "trials": [
            _run(trial) | {"choice": trial.point.choice, "score": score if math.isfinite(score) else None}
            for trial, score in zip(trials, scores, strict=True)
        ],
        "runs": [_run(planned) for planned in finished],
        "benched": dataclasses.asdict(cost) if cost else None,
        "seeds": {
            "used": [planned.point.seed for planned in finished],
            "diverged": [seed for seed, state in states.items() if state == "diverged"],
            "failed": [seed for seed, state in states.items() if state == "failed"],
            "missing": [seed for seed in line.seeds if states.get(seed) not in ("done", "diverged", "failed")],
        },
    }


def _run(planned: PlannedRun) -> dict[str, Any]:
    sessions = planned.folder.meta().get("sessions", [])
    return {
        "run_id": planned.run.run_id,
        "state": planned.folder.state(),
        "seed": planned.point.seed,
        "updates": planned.run.budget.updates,
        "overrides": list(planned.overrides),
        "commits": sorted({f"{s['commit']}{' and changes' if s['dirty'] else ''}" for s in sessions}),
        "hardware": sorted({machine(session["hardware"]) for session in sessions}),
        "jobs": max((session["jobs"] for session in sessions), default=None),
    }


def _to_csv(rows: Iterable[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(["" if value is None else value for value in dataclasses.astuple(row)] for row in rows)
    return text.getvalue()


def _from_csv(path: Path, described: Experiment, maker: str) -> list[Row]:
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {maker} makes it") from error
    reader = csv.DictReader(io.StringIO(text))
    if reader.fieldnames != COLUMNS:
        raise UserError(f"{path}: the first line must be {','.join(COLUMNS)}")
    rows = []
    for cells in reader:
        if cells["line"] not in described.lines:
            raise UserError(f"{path}: {unknown(f'line in {described.name}', cells['line'], described.lines)}")
        try:
            median, low, high = (float(cells[key]) if cells[key] else None for key in ("median", "low", "high"))
            rows.append(Row(cells["panel"], cells["line"], float(cells["x"]), median, low, high, int(cells["n"])))
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}, line {reader.line_num}: {error}") from error
    return rows
