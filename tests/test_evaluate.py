"""Trained models on a whole split: which parameters are kept, and what `kfacrnn evaluate` says of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from kfacrnn import cli, config
from kfacrnn.errors import UserError
from kfacrnn.evaluate import best_update, evaluate
from kfacrnn.selection import read_config
from kfacrnn.store import RunFolder
from kfacrnn.train import train
from tests.runs import stored
from tests.synthetic import TINY

UNSTEADY = ["optimizer=adam", "optimizer.lr=1", "budget.updates=40", "budget.eval_every=4"]  # which comes and goes


def trained(results: Path, *overrides: str) -> RunFolder:
    return train(config.compose([*TINY, *UNSTEADY, f"results={results}", *overrides]), "test")


def weights(folder: RunFolder, name: str) -> dict[str, torch.Tensor]:
    return torch.load(folder.path / name, weights_only=True)


def test_the_best_parameters_are_those_of_a_run_that_ends_at_the_best_validation(tmp_path: Path) -> None:
    folder = trained(tmp_path / "long")
    losses = [(float(row["valid/nats"]), int(row["update"])) for row in folder.metrics.rows() if row["valid/nats"]]
    best = min(losses)[1]
    assert best < 40, "the last validation is the best: this test shows nothing"
    ended = trained(tmp_path / "short", f"budget.updates={best}")
    kept, final = weights(folder, "best.pt"), weights(ended, "model.pt")
    assert kept.keys() == final.keys()
    assert all(torch.equal(kept[name], final[name]) for name in kept)
    assert not (ended.path / "best.pt").exists() or best_update(ended) < best


def test_parameters_whose_last_validation_is_the_best_are_kept_once(tmp_path: Path) -> None:
    folder = trained(tmp_path, "optimizer.lr=1e-3", "budget.updates=8")
    assert best_update(folder) == 8, "the last validation is not the best: this test shows nothing"
    assert [path.name for path in sorted(folder.path.glob("*.pt"))] == ["model.pt"]
    assert "best parameters (update 8): valid" in evaluate(folder.run_id, split="valid", results=str(tmp_path))


def test_evaluation_finds_the_loss_that_training_saw(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    seen = {int(row["update"]): float(row["valid/nats"]) for row in folder.metrics.rows() if row["valid/nats"]}
    evaluate(folder.run_id[:6], split="valid", results=str(tmp_path))
    evaluate(folder.run_id, split="valid", final=True, results=str(tmp_path))
    evaluate(folder.run_id, results=str(tmp_path))
    found = json.loads((folder.path / "evaluation.json").read_text())
    best = found["best"]["update"]
    assert found["best"]["valid/nats"] == seen[best] == min(seen.values())
    assert found["final"] == {"update": 40, "valid/nats": seen[40], "valid/metric": seen[40]}
    assert math.isfinite(found["best"]["test/nats"])
    assert found["best"]["test/nats"] != found["best"]["valid/nats"]


def test_the_command_prints_a_line_for_every_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [trained(tmp_path, f"seed={seed}") for seed in (1, 2)]
    capsys.readouterr()
    assert cli.main(["evaluate", *(folder.run_id for folder in folders), "--results", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2].rstrip(",") for line in lines] == [folder.run_id for folder in folders]
    assert all("best parameters" in line and line.endswith("nats per sequence") for line in lines)


def test_a_run_that_was_stored_before_a_setting_came_is_evaluated_without_it(tmp_path: Path) -> None:
    folder = trained(tmp_path, "optimizer=kfac_option1", "optimizer.early_interval=null", "budget.updates=4")
    path = folder.path / "config.yaml"
    older = [line for line in path.read_text().splitlines() if not line.strip().startswith("early_interval")]
    path.write_text("\n".join(older))
    assert config.stored(read_config(folder)).run_id == folder.run_id
    assert evaluate(folder.run_id, results=str(tmp_path)).startswith("repeat_copy kfac_option1")
    path.write_text(path.read_text().replace("  refresh_every", "  refreshed_every"))
    with pytest.raises(UserError, match="refreshed_every"):
        evaluate(folder.run_id, results=str(tmp_path))


def test_what_cannot_be_evaluated_is_said(tmp_path: Path) -> None:
    results = str(tmp_path)
    unvalidated = trained(tmp_path, "budget.eval_every=0", "budget.updates=4")
    with pytest.raises(UserError, match="no validation to be the best: --final"):
        evaluate(unvalidated.run_id, results=results)
    with pytest.raises(UserError, match="f" * 12 + rf": no run in .* kfacrnn list runs --results {tmp_path} shows"):
        evaluate("f" * 12, results=results)
    running = stored(tmp_path, [1.0], "seed=5", state="interrupted")
    with pytest.raises(UserError, match=f"{running.run_id} is interrupted"):
        evaluate(running.run_id, results=results)
    with pytest.raises(UserError, match=r"runs in .* begin so"):
        evaluate("", results=results)
    folder = trained(tmp_path)
    (folder.path / "best.pt").unlink()
    with pytest.raises(UserError, match=r"has no best\.pt, of update \d+: --final"):
        evaluate(folder.run_id, results=results)


@pytest.mark.parametrize(("content", "said"), [(b"PK", "holds no parameters"), (None, "there is no")])
def test_parameters_that_are_none_are_refused(tmp_path: Path, content: bytes | None, said: str) -> None:
    folder = trained(tmp_path, "budget.updates=4")
    (folder.path / "model.pt").write_bytes(content) if content else (folder.path / "model.pt").unlink()
    with pytest.raises(UserError, match=said):
        evaluate(folder.run_id, final=True, results=str(tmp_path))


def test_parameters_of_another_model_are_refused(tmp_path: Path) -> None:
    folder, other = trained(tmp_path, "budget.updates=4"), trained(tmp_path, "budget.updates=4", "task.hidden=5")
    torch.save(weights(other, "model.pt"), folder.path / "model.pt")
    with pytest.raises(UserError, match="not of this run"):
        evaluate(folder.run_id, final=True, results=str(tmp_path))
