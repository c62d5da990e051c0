"""The maps of `scripts/sensitivity.py`, from runs with losses of a test's choosing."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import ModuleType

import pytest

from kfacrnn import discovery, experiment
from kfacrnn.errors import UserError
from kfacrnn.plan import Plan
from tests import scripts, synthetic

METHODS = """{
  SGD: {optimizer: sgd, grid: {optimizer.lr: [0.1, 0.2, 0.3], optimizer.momentum: [0.0, 0.5]}},
  K-FAC: {
    optimizer: kfac_option1,
    label: quadratic,
    grid: {optimizer.damping: [0.1, 1.0], optimizer.adapt_damping_every: [null, 5]}
  }
}"""
LOSSES = {"SGD": [0.2, 0.3, 0.4, 0.5, 0.6, 0.7], "K-FAC": [0.1, 0.15, 0.1, 9.0]}


def script() -> ModuleType:
    return scripts.script("sensitivity")


@pytest.fixture
def swept(tmp_path: Path) -> tuple[str, Path]:
    """An experiment and the store of its runs; the last one diverged."""
    name = synthetic.write_experiment(tmp_path / "e.yaml", METHODS.replace("\n", " "), tune="{seed: 0}")
    plan = Plan(experiment.load(name), str(tmp_path / "results"))
    for line, losses in LOSSES.items():
        for trial, loss in zip(plan.tuning[line], losses, strict=True):
            synthetic.store(trial, [loss], every=4, state="diverged" if loss > 2 else "done")
    return name, tmp_path / "results"


def test_every_run_is_at_its_settings(swept: tuple[str, Path]) -> None:
    first, second = script().read(*swept, []).maps
    assert first.names == ("lr", "momentum")
    assert (first.rows, first.columns) == ([0.1, 0.2, 0.3], [0.0, 0.5])
    assert first.finals == [[0.2, 0.3], [0.4, 0.5], [0.6, 0.7]]
    assert (second.title, second.columns) == ("quadratic", [None, 5])
    assert second.finals == [[0.1, 0.15], [0.1, float("inf")]]


def test_the_table_says_which_share_of_a_grid_is_near_the_best_of_all(swept: tuple[str, Path]) -> None:
    lines = script().table(script().read(*swept, [])).splitlines()
    near = [loss <= 0.1 + (1.386 - 0.1) / 10 for loss in itertools.chain(*LOSSES.values())]
    assert (sum(near[:6]), sum(near[6:])) == (1, 3)
    assert lines[-2].split()[-2:] == ["17", "%"]
    assert lines[-1].split()[-2:] == ["75", "%"]


def test_the_picture_has_a_map_for_every_method(swept: tuple[str, Path]) -> None:
    files = script().draw(script().read(*swept, []))
    assert files["png"].startswith(b"\x89PNG")
    assert b"<svg" in files["svg"]


def test_missing_runs_are_named_with_the_command_that_makes_them(swept: tuple[str, Path]) -> None:
    with pytest.raises(UserError, match=r"SGD: 6 runs are missing; kfacrnn sweep .* task\.bits=3"):
        script().read(*swept, ["task.bits=3"])


@pytest.mark.parametrize("name", ["sensitivity_dnc", "sensitivity_char"])
def test_the_studies_have_grids_of_two_settings_each(name: str) -> None:
    studied = experiment.load(name)
    assert all(len(method.grid) == 2 for method in studied.methods.values())
    assert {method.optimizer for method in studied.methods.values()} <= set(discovery.modules("optimizers"))
