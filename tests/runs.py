"""Stored runs: made by their overrides, with rows of a test's choosing, and read back without what clocks say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kfacrnn import config
from kfacrnn.experiment import Point
from kfacrnn.plan import PlannedRun
from kfacrnn.store import RunFolder, Store
from tests import synthetic

CLOCKS = {"time_train_s", "time_eval_s", "time_wall_s", "cpu_s", "updates_per_s", "memory_mb"}
TASK = {"unit": "sequence", "metric": "nats per sequence", "chance": 1.386}


def stored(results: Path, nats: Sequence[float], *overrides: str, **more: Any) -> RunFolder:
    """A run of the tiny task in the store at `results`; `more` is for `tests.synthetic.store`."""
    every = (*synthetic.TINY, f"budget.updates={len(nats) or 1}", *overrides)
    run = config.compose(every)
    planned = PlannedRun(Point("line", "confirm", {}, run.seed, every), every, run, Store(results).folder(run))
    synthetic.store(planned, nats, task=more.pop("task", TASK), **more)
    return planned.folder


def curve(folder: RunFolder) -> list[dict[str, str]]:
    """A run's rows without what a clock or a meter says."""
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in folder.metrics.rows()]


def numbers(results: Path) -> dict[str, list[dict[str, str]]]:
    """The curve of every run, all of which must be done."""
    assert {folder.state() for folder in Store(results)} == {"done"}
    return {folder.run_id: curve(folder) for folder in Store(results)}
