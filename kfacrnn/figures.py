"""From the runs of an experiment to its figure: `NAME.csv` and its provenance `NAME.json`, then the picture.

The picture is drawn from what the CSV holds and `experiments/NAME.yaml` says, and from nothing else, so that drawing it
again without the runs gives the same bytes.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kfacrnn import experiment
from kfacrnn.config import NUMERICS_VERSION
from kfacrnn.curves import Curve, Row, check_conversion, conversion, over_seconds, over_updates
from kfacrnn.discovery import unknown
from kfacrnn.errors import UserError
from kfacrnn.experiment import Experiment
from kfacrnn.plan import Plan, PlannedRun
from kfacrnn.store import write_atomic, write_json

SOURCES = ("results", "csv")
COLUMNS = [field.name for field in dataclasses.fields(Row)]


def figure(
    name: str, *, results: str, source: str = "results", out: str | None = None, overrides: Sequence[str] = ()
) -> list[Path]:
    """Draws an experiment's figure into `out` (default: `results`/figures) and returns the files written.

    `source` is `results`, the store, or `csv`, the figure's own CSV. Raises `UserError` when there is nothing to draw,
    or when a time axis would mix hardware.
    """
    if source not in SOURCES:
        raise UserError(unknown("source of a figure", source, SOURCES))
    described = experiment.load(name)
    folder = Path(out).expanduser() if out else Path(results).expanduser() / "figures"
    table, written = folder / f"{described.name}.csv", []
    if source == "results":
        rows, provenance = collect(Plan(described, results, overrides))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror}; choose another with --out DIR") from error
        write_atomic(table, _to_csv(rows).encode())
        write_json(table.with_suffix(".json"), provenance)
        written = [table, table.with_suffix(".json")]
    from kfacrnn.drawing import draw

    for suffix, content in draw(described, _from_csv(table, described)).items():
        write_atomic(table.with_suffix(f".{suffix}"), content)
        written.append(table.with_suffix(f".{suffix}"))
    return written


def collect(plan: Plan) -> tuple[list[Row], dict[str, Any]]:
    """The figure's rows from the finished runs of a plan, and where each of its lines comes from."""
    described, picture = plan.experiment, plan.experiment.figure
    lines = {method: [planned for planned in plan.confirmation(method) if planned.finished] for method in plan.methods}
    if not any(lines.values()):
        raise UserError(f"{described.name} has no finished run in {plan.store.root}; kfacrnn sweep {described.name}")
    for method, finished in lines.items():
        if len(finished) < len(described.seeds):
            print(f"{method}: {len(finished)} of {len(described.seeds)} runs are finished", file=sys.stderr)
    runs = [planned for finished in lines.values() for planned in finished]
    task = runs[0].folder.meta()["task"]
    _check_chance(described, task)
    if "seconds" in picture.panels and not picture.mix_hardware:
        _check_hardware(planned for planned in runs if _undisturbed(planned))
    convert = conversion(task["metric"] if picture.y.metric.endswith("/metric") else "nats")
    rows: list[Row] = []
    for method, finished in lines.items():
        curves = {planned: _curve(planned, picture.y.metric, task["metric"]) for planned in finished}
        rows += over_updates(method, list(curves.values()), convert)
        rows += over_seconds(method, [curve for planned, curve in curves.items() if _undisturbed(planned)], convert)
        ends = sorted(planned.folder.status()["update"] for planned, curve in curves.items() if curve.diverged)
        rows += [Row("diverged", method, update, None, None, None, 1) for update in ends]
    rows.sort(key=lambda row: (*experiment.PANELS, "diverged").index(row.panel))
    return rows, _provenance(plan, lines, task)


def _curve(planned: PlannedRun, metric: str, name: str) -> Curve:
    split = metric.split("/", 1)[0]
    rows = [row for row in planned.folder.rows() if row[f"{split}/nats"]]
    nats = tuple(float(row[f"{split}/nats"]) for row in rows)
    if metric.endswith("/metric"):
        check_conversion(name, zip(nats, (float(row[metric]) for row in rows), strict=True))
    return Curve(
        updates=tuple(int(row["update"]) for row in rows),
        seconds=tuple(float(row["time_train_s"]) for row in rows),
        nats=nats,
        diverged=planned.folder.status()["state"] == "diverged",
    )


def _undisturbed(planned: PlannedRun) -> bool:
    """Whether the run had the machine to itself, so that its seconds mean something."""
    return all(session["jobs"] == 1 for session in planned.folder.meta()["sessions"])


def _check_chance(described: Experiment, task: dict[str, Any]) -> None:
    picture, wanted = described.figure, task["chance"]
    if picture.chance is None or picture.y.metric.endswith("/nats"):
        return
    if not math.isclose(picture.chance, wanted, rel_tol=0.01):
        raise UserError(
            f"{described.name}: figure.chance={picture.chance}: the task says {wanted:.4g} {task['metric']}"
        )


def _check_hardware(runs: Iterable[PlannedRun]) -> None:
    machines: dict[str, str] = {}
    for planned in runs:
        for session in planned.folder.meta()["sessions"]:
            machines.setdefault(_machine(session), planned.run.run_id)
    if len(machines) > 1:
        found = "; ".join(f"{machine} (run {run_id})" for machine, run_id in sorted(machines.items()))
        raise UserError(f"a time axis would mix hardware: {found}; figure.mix_hardware: true allows it")


def _machine(session: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in session["hardware"].items())


def _provenance(plan: Plan, lines: dict[str, list[PlannedRun]], task: dict[str, Any]) -> dict[str, Any]:
    described = plan.experiment
    return {
        "experiment": described.name,
        "description": described.description,
        "source": "results",
        "task": task,
        "metric": described.figure.y.metric,
        "numerics_version": NUMERICS_VERSION,
        "lines": [_line(plan, method, finished) for method, finished in lines.items()],
    }


def _line(plan: Plan, method: str, finished: list[PlannedRun]) -> dict[str, Any]:
    described, winner, trials = plan.experiment, plan.winner(method), plan.tuning[method]
    scores = [trial.score(described.select) if trial.finished else math.inf for trial in trials]
    states = {planned.point.seed: planned.folder.state() for planned in plan.confirmation(method)}
    return {
        "line": method,
        "label": described.methods[method].label or method,
        "optimizer": described.methods[method].optimizer,
        "chosen": winner.point.choice if winner else {},
        "selection": str(described.select) if trials else None,
        "trials": [
            _run(trial) | {"choice": trial.point.choice, "score": score if math.isfinite(score) else None}
            for trial, score in zip(trials, scores, strict=True)
        ],
        "runs": [_run(planned) for planned in finished],
        "seeds": {
            "used": [planned.point.seed for planned in finished],
            "diverged": [seed for seed, state in states.items() if state == "diverged"],
            "failed": [seed for seed, state in states.items() if state == "failed"],
            "missing": [seed for seed in described.seeds if states.get(seed) not in ("done", "diverged", "failed")],
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
        "hardware": sorted({_machine(session) for session in sessions}),
        "jobs": max((session["jobs"] for session in sessions), default=None),
    }


def _to_csv(rows: Iterable[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(["" if value is None else value for value in dataclasses.astuple(row)] for row in rows)
    return text.getvalue()


def _from_csv(path: Path, described: Experiment) -> list[Row]:
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; kfacrnn figure {described.name} makes it") from error
    reader = csv.DictReader(io.StringIO(text))
    if reader.fieldnames != COLUMNS:
        raise UserError(f"{path}: the first line must be {','.join(COLUMNS)}")
    rows = []
    for cells in reader:
        if cells["line"] not in described.methods:
            raise UserError(f"{path}: {unknown(f'method in {described.name}', cells['line'], described.methods)}")
        median, low, high = (float(cells[key]) if cells[key] else None for key in ("median", "low", "high"))
        rows.append(Row(cells["panel"], cells["line"], float(cells["x"]), median, low, high, int(cells["n"])))
    return rows
