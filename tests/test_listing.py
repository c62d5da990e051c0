"""What `kfacrnn list` shows, and that it shows it without importing what it lists."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kfacrnn import discovery, experiment, listing
from kfacrnn.errors import UserError
from kfacrnn.plan import Plan
from tests.synthetic import store, write_experiment


def test_without_a_kind_everything_is_listed_with_what_it_says_of_itself(capsys: pytest.CaptureFixture[str]) -> None:
    listing.show(None)
    shown = capsys.readouterr().out
    for section in ("tasks:", "optimizers:", "budgets:", "trackers:", "experiments:"):
        assert f"{section}\n" in shown
    assert "  adam  " in shown
    assert "Adam (Kingma & Ba, 2015)" in shown
    assert "incomplete" not in shown


def test_half_of_an_optimiser_is_listed_with_the_half_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(discovery.resource("configs"), tmp_path / "configs")
    (tmp_path / "configs/optimizer/newton.yaml").write_text("# Newton's method\n")
    (tmp_path / "configs/optimizer/sgd.yaml").unlink()
    monkeypatch.setattr(discovery, "resource", lambda folder: tmp_path / folder)
    listing.show("optimizers")
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["newton"].endswith("incomplete: kfacrnn/optimizers/newton.py is missing")
    assert lines["sgd"].endswith("incomplete: configs/optimizer/sgd.yaml is missing")


def test_runs_are_listed_with_their_state_and_last_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listing.show("runs", results=str(tmp_path))
    assert capsys.readouterr().out == f"no runs in {tmp_path}/runs\n"
    path = write_experiment(tmp_path / "tiny.yaml", "{Adam: {optimizer: adam}}", seeds="[1, 2]")
    first, second = Plan(experiment.load(path), str(tmp_path)).confirmation("Adam")
    store(first, [2.0, 1.0, 0.5, 0.25])
    store(second, [2.0], state="running")
    listing.show("runs", results=str(tmp_path))
    rows = {line.split()[2]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert rows[first.run.run_id][:6] == ["repeat_copy", "adam", first.run.run_id, "done", "4/4", "0.25"]
    assert rows[second.run.run_id][3:6] == ["interrupted", "1/4", "2"]


def test_an_unknown_kind_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(UserError, match="did you mean 'optimizers'"):
        listing.show("optimizer")


def test_listing_imports_neither_torch_nor_hydra() -> None:
    code = "import sys; from kfacrnn import cli; cli.main(['list']); assert not {'torch', 'hydra'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
