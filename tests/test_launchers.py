"""A sweep through Hydra's launchers ends with the same store as one in processes of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kfacrnn import experiment, sweep
from kfacrnn.errors import UserError
from kfacrnn.launchers.hydra import run
from kfacrnn.launchers.pending import Pending
from kfacrnn.plan import Plan
from kfacrnn.store import Store
from tests import processes
from tests.runs import numbers
from tests.synthetic import write_experiment

TUNED = "{SGD: {optimizer: sgd, grid: {optimizer.lr: [1e-6, 0.05]}}, K-FAC: {optimizer: kfac_option1}}"
PLUGINS = {"joblib": "hydra_joblib_launcher", "submitit_local": "hydra_submitit_launcher", "ray": "hydra_ray_launcher"}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An experiment that tunes a grid and confirms."""
    folder = tmp_path_factory.mktemp("tuned")
    return write_experiment(folder / "tuned.yaml", TUNED, tune="{seed: 0, overrides: [budget.updates=2]}")


@pytest.fixture(scope="module")
def here(path: str) -> Path:
    """The store of its sweep on this machine."""
    results = Path(path).parent / "here"
    assert processes.run(["sweep", path, "--jobs", "2", "--results", str(results)], results.with_suffix(".txt"))[0] == 0
    return results


def kfacrnn(arguments: list[str]) -> str:
    """What the command says. Not a child of a fork server: joblib's workers would keep it from ending."""
    command = [sys.executable, "-m", "kfacrnn", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120, check=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["basic", "joblib", "submitit_local", "ray"])
def test_a_launcher_of_hydras_leaves_the_same_store(name: str, path: str, here: Path, tmp_path: Path) -> None:
    if name in PLUGINS:
        pytest.importorskip(f"hydra_plugins.{PLUGINS[name]}")
    command = ["sweep", path, "--results", str(tmp_path / "there"), f"hydra/launcher={name}"]
    assert "\n4/4 done\n" in kfacrnn(command)
    assert numbers(tmp_path / "there") == numbers(here)
    shared = {session["jobs"] for folder in Store(tmp_path / "there") for session in folder.meta()["sessions"]}
    assert shared == {1 if name == "basic" else 0}  # 0: not known to have had the machine to itself
    kfacrnn(command)
    assert all(len(folder.meta()["sessions"]) == 1 for folder in Store(tmp_path / "there"))


def test_mistakes_are_one_line_before_the_first_run(path: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hydra/launcher/nope"):
        sweep.sweep(path, results=str(tmp_path / "results"), overrides=["hydra/launcher=nope"])
    with pytest.raises(UserError, match="--jobs 2: Hydra's launchers have a setting of their own"):
        sweep.sweep(path, results=str(tmp_path / "results"), overrides=["hydra/launcher=basic"], jobs=2)
    assert not (tmp_path / "results").exists()


class Fragile:
    """A launcher that dies after the first run of every batch, as joblib does when a worker is killed."""

    def __init__(self, plan: Plan, begins: bool):
        self._plan, self._begins = plan, begins
        self.batches: list[int] = []

    def launch(self, jobs: list[list[str]], initial_job_idx: int) -> None:
        self.batches.append(len(jobs))
        if self._begins:
            first = next(run for run in self._plan.known() if f"seed={run.run.seed}" in jobs[0])
            first.folder.path.mkdir(parents=True)
            first.folder.set_status("done", update=4, updates=4)
        raise RuntimeError("a worker was killed\nby a signal")


@pytest.mark.parametrize(("begins", "batches"), [(True, [3, 2, 1]), (False, [3])])
def test_what_a_broken_batch_never_began_is_started_again_unless_nothing_began(
    begins: bool, batches: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = write_experiment(tmp_path / "three.yaml", "{Adam: {optimizer: adam}}", seeds="[1, 2, 3]")
    plan = Plan(experiment.load(path), str(tmp_path))
    fragile = Fragile(plan, begins)
    monkeypatch.setattr("kfacrnn.launchers.hydra._launcher", lambda _: fragile)
    assert run(plan, Pending(plan, retry_failed=False), ["hydra/launcher=fragile"]) is False
    assert fragile.batches == batches
    assert "kfacrnn: Fragile: a worker was killed\n" in capsys.readouterr().err
