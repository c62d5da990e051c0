"""Stored runs for the tests of comparisons: a run by its overrides, with rows of a test's choosing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kfacrnn import config
from kfacrnn.experiment import Point
from kfacrnn.plan import PlannedRun
from kfacrnn.store import RunFolder, Store
from tests import synthetic

TASK = {"unit": "sequence", "metric": "nats per sequence", "chance": 1.386}


def stored(results: Path, nats: Sequence[float], *overrides: str, **more: Any) -> RunFolder:
    """A run of the tiny task in the store at `results`; `more` is for `tests.synthetic.store`."""
    every = (*synthetic.TINY, *overrides)
    run = config.compose(every)
    planned = PlannedRun(Point("line", "confirm", {}, run.seed, every), every, run, Store(results).folder(run))
    synthetic.store(planned, nats, task=more.pop("task", TASK), **more)
    return planned.folder
