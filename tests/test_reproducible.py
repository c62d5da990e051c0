"""What a run's numbers depend on. That launchers, jobs and resumes do not count: test_launchers, test_interruptions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kfacrnn import config
from kfacrnn.store import RunFolder
from kfacrnn.train import train
from tests.runs import curve

OVERRIDES = [
    *("task=repeat_copy", "optimizer=kfac_option1", "precision=fp32", "task.batch_size=32", "task.eval_sequences=2"),
    *("budget.updates=3", "budget.log_every=1", "budget.eval_every=0"),
]


@pytest.fixture
def results(tmp_path: Path) -> Iterator[Path]:
    before = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(before)


def trained(results: Path, threads: int) -> RunFolder:
    return train(config.compose([*OVERRIDES, f"threads={threads}", f"results={results}"]), "test")


def test_the_same_run_again_is_the_same_bit_for_bit_with_several_threads(results: Path) -> None:
    once, again = (trained(results / name, 2) for name in ("once", "again"))
    assert once.run_id == again.run_id
    assert curve(once) == curve(again)


def test_runs_of_one_thread_and_of_two_are_two_runs_and_begin_alike(results: Path) -> None:
    one, two = (trained(results, threads) for threads in (1, 2))
    assert one.run_id != two.run_id
    losses = [[float(row["train/nats"]) for row in folder.metrics.rows()] for folder in (one, two)]
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
