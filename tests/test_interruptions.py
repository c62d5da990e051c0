"""A sweep that is killed at random, launcher and runs, ends as an undisturbed one, and nothing has run twice."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kfacrnn import experiment
from kfacrnn.plan import Plan
from kfacrnn.store import Store
from tests.processes import wait_for
from tests.runs import numbers
from tests.synthetic import write_experiment

METHODS = "{SGD: {optimizer: sgd, grid: {optimizer.lr: [0.01, 0.1]}}, K-FAC: {optimizer: kfac_option1}}"
KILLS, CHECKPOINT = 3, 30


def launch(path: str, results: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "kfacrnn", "sweep", path, "--results", str(results)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)


def writing(results: Path) -> list[int]:
    """The processes of runs that are under way."""
    return [folder.status()["pid"] for folder in Store(results) if folder.state() == "running"]


def rows_in(results: Path) -> int:
    """How far the runs are together."""
    return sum(len(folder.metrics.rows()) for folder in Store(results))


def kill_all(launcher: subprocess.Popen[bytes], results: Path) -> None:
    runs = writing(results)
    launcher.kill()
    launcher.wait()
    for pid in runs:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself in the meantime
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not writing(results))


def parameters(results: Path) -> dict[str, bytes]:
    """The bytes of every run's parameters."""
    import torch

    models = {folder.run_id: torch.load(folder.path / "model.pt", weights_only=True) for folder in Store(results)}
    return {run: b"".join(t.numpy().tobytes() for t in model.values()) for run, model in models.items()}


@pytest.mark.slow
@pytest.mark.timeout(900)  # for a machine that is busy with something else
def test_a_figure_whose_launcher_and_runs_are_killed_three_times_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    path = write_experiment(
        tmp_path / "small.yaml",
        METHODS,
        seeds="[1]",
        tune="{seed: 0, extend: 1, overrides: [budget.updates=200]}",
        common=["budget.updates=300", f"budget.checkpoint_every={CHECKPOINT}", "budget.log_every=5"],
    )
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert launch(path, undisturbed).wait(300) == 0

    for moment in sorted(random.Random(0).sample(range(1, rows_in(undisturbed)), KILLS)):
        with launch(path, killed) as launcher:
            wait_for(lambda least=moment: rows_in(killed) >= least and writing(killed), seconds=120)
            kill_all(launcher, killed)
    assert launch(path, killed).wait(300) == 0

    assert numbers(killed) == numbers(undisturbed)
    assert parameters(killed) == parameters(undisturbed)
    for results in (undisturbed, killed):
        plan = Plan(experiment.load(path), str(results))
        assert {run.run.run_id for run in plan.known()} == {folder.run_id for folder in Store(results)}
    sessions = [folder.meta()["sessions"] for folder in Store(killed)]
    assert len(sessions) < sum(map(len, sessions)) <= len(sessions) + KILLS  # a kill costs one run one session at most
    for each in sessions:
        assert ["end" in session for session in each] == [False] * (len(each) - 1) + [True]
        assert all(session["from_update"] % CHECKPOINT == 0 for session in each)
