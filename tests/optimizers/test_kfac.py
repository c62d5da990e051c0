"""K-FAC as the framework builds it: settings that came later, and the exact quadratic model in a training run."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from kfacrnn import config
from kfacrnn.run import Run
from kfacrnn.session import Session

QUADRATIC = ["optimizer.quadratic_fraction=0.5", "optimizer.adapt_damping_every=2", "optimizer.damping=0.1"]
SMALL = {
    "repeat_copy": ["batch_size=6", "hidden=6", "slots=4", "word_size=3", "eval_sequences=2"],
    "ptb_char": ["batch_size=6", "hidden=6", "bptt=5", "eval_batch_size=2", "dropout=0.4"],
}
each_task = pytest.mark.parametrize("task", SMALL)


@pytest.fixture
def compose(tiny_ptb: Path, tmp_path: Path) -> Any:
    def small(task: str, *overrides: str) -> Run:
        sizes = [f"task.{setting}" for setting in SMALL[task]]
        there = [f"data.root={tiny_ptb}", f"results={tmp_path}", "threads=1", "budget.updates=10"]
        return config.compose([f"task={task}", "optimizer=kfac_option1", *sizes, *there, *overrides])

    return small


def test_settings_that_came_later_leave_the_identity_of_runs_without_them_alone() -> None:
    run = config.compose(["task=repeat_copy", "optimizer=kfac_option1"])
    later = {"first_damping": "0.1", "quadratic_fraction": "0.25", "adapt_damping_every": "5"}
    assert not later.keys() & run.scientific["optimizer"].keys()
    for key, value in later.items():
        other = config.compose(["task=repeat_copy", "optimizer=kfac_option1", f"optimizer.{key}={value}"])
        assert key in other.scientific["optimizer"]
        assert other.run_id != run.run_id


@each_task
def test_a_run_with_the_quadratic_model_continues_from_its_state_as_if_never_stopped(task: str, compose: Any) -> None:
    first, second = Session(compose(task, *QUADRATIC)), Session(compose(task, *QUADRATIC))
    for _ in range(3):
        first.step()
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    for session in (first, second):
        torch.manual_seed(3)  # of dropout, which two sessions of one process share
        session.step()
    weights = zip(first.model.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)
    stats = first.optimizer.stats()
    assert stats == second.optimizer.stats()
    assert stats["damping"] != 0.1
    assert stats["momentum"] != 0
    assert math.isfinite(stats["reduction_ratio"])


@each_task
def test_damping_is_adapted_by_losses_of_the_same_batch_and_noise(task: str, compose: Any) -> None:
    """Heavily damped steps change so little that the loss after one is the loss before it, unless it were another's."""
    session, seen = Session(compose(task, *QUADRATIC, "optimizer.damping=1e9")), []
    session.optimizer.adapt_damping = lambda before, after: seen.append((float(before), float(after)))
    for _ in range(4):
        session.step()
    assert len(seen) == 2
    assert all(after == pytest.approx(before, rel=1e-5) for before, after in seen)
