"""What `kfacrnn bench step-cost` says an update of a run costs: for a seconds axis, and for an estimate of hours."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfacrnn import config
from kfacrnn.config import Run


@dataclass(frozen=True)
class Cost:
    """Seconds of an update, over a whole cycle of an optimiser's kinds of step, and where they come from."""

    seconds: float
    file: str
    commit: str
    hardware: dict[str, Any]


def cost(run: Run, results: Path) -> Cost | None:
    """What was measured of just this: optimiser, precision, number of threads, and the task at its default sizes, on a
    machine that did nothing else. None where nothing was."""
    path = results / "bench" / f"step-cost-{run.task.name}-{run.precision}.json"
    bench = _read(path)
    if not bench or bench["machine"]["busy"] or bench["overrides"] or run.task != _default_task(run.task.name):
        return None
    for row in bench["rows"]:
        measured = (row["task"], row["optimizer"], row["dtype"], row["threads"])
        if measured == (run.task.name, run.optimizer.name, run.precision, run.threads):
            where = f"bench/{path.name}"
            return Cost(row["ms_mean_cycle"] / 1000, where, bench["commit"], bench["hardware"])
    return None


def estimate(run: Run, results: Path) -> float | None:
    """Roughly the seconds of an update: of its optimiser, or else the fastest one, in proportion to the batch and with
    the power 3/2 of the width, between the recurrence's 2 and the softmax's 1. None without a benchmark of the task."""
    bench = _read(results / "bench" / f"step-cost-{run.task.name}-{run.precision}.json")
    if not bench:
        return None
    times = {row["optimizer"]: row["ms_mean_cycle"] / 1000 for row in bench["rows"]}
    default = _default_task(run.task.name)
    batch, width = (getattr(run.task, key, 1) / getattr(default, key, 1) for key in ("batch_size", "hidden"))
    return times.get(run.optimizer.name, min(times.values())) * batch * width**1.5


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}


@functools.cache
def _default_task(name: str) -> Any:
    return config.compose([f"task={name}"]).task
