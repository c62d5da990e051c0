"""Early stopping in selection, tables and `scripts/generalisation.py`, on runs whose validation comes and goes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from kfacrnn import experiment, figures
from kfacrnn.evaluate import best_update
from kfacrnn.plan import Plan
from kfacrnn.train import train
from tests import scripts
from tests.synthetic import TINY, write_experiment

METHODS = "{Adam: {optimizer: adam, grid: {optimizer.lr: [0.01, 1.0]}}, SGD: {optimizer: sgd}}"
RULE = {"tune": "{seed: 0}", "select": "{metric: valid/nats, early_stopping: true}", "target": "{baselines: [SGD]}"}
VALIDATION = "{title: Words, y: {metric: valid/metric, label: validation, scale: linear}}"
OFTEN = ["budget.updates=40", "budget.eval_every=4"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return scripts.script("generalisation")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An experiment and the store of its runs."""
    results = tmp_path_factory.mktemp("results")
    name = write_experiment(results / "words.yaml", METHODS, common=[*TINY, *OFTEN], figure=VALIDATION, **RULE)
    for planned in (run for runs in Plan(experiment.load(name), str(results)).tuning.values() for run in runs):
        train(replace(planned.run, results=str(results)), "test")
    plan = Plan(experiment.load(name), str(results))
    for planned in (run for line in plan.lines for run in plan.confirmation(line)):
        train(replace(planned.run, results=str(results)), "test")
    return name, results


def least(run: object) -> float:
    return min(float(row["valid/nats"]) for row in run.folder.metrics.rows() if row["valid/nats"])  # type: ignore[attr-defined]


def test_a_run_is_judged_by_the_least_it_ever_had(swept: tuple[str, Path]) -> None:
    name, results = swept
    plan = Plan(experiment.load(name), str(results))
    trials = plan.tuning["Adam"]
    rows = [float(row["valid/nats"]) for row in trials[1].folder.metrics.rows() if row["valid/nats"]]
    assert min(rows) < rows[-1], "the last validation is the best: this test shows nothing"
    assert [trial.score(plan.experiment.select) for trial in trials] == [least(trial) for trial in trials]
    assert plan.winner("Adam") == min(trials, key=least)
    figures.figure(name, results=str(results))
    table = (results / "figures" / "words.table.md").read_text()
    assert "of every run the least so far, then the median" in table
    (adam,) = plan.confirmation("Adam")
    assert f"| Adam | 1 | {least(adam):.3f}" in table


def test_the_page_has_the_test_set_at_the_best_validation(
    script: ModuleType, swept: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, results = swept
    monkeypatch.setattr(script, "NAME", name)
    assert script.main(["--results", str(results)]) == 0
    first = capsys.readouterr().out
    page = (results / "words.md").read_text()
    plan = Plan(experiment.load(name), str(results))
    for line in ("Adam", "SGD"):
        (run,) = plan.confirmation(line)
        known = run.folder.read_json("evaluation.json")["best"]
        update = best_update(run.folder)
        assert known["update"] == update
        values = " | ".join(f"{value:.1f} ({value:.1f})" for value in (least(run), known["test/metric"]))
        assert f"{values} | {update} |" in page
        assert run.run.run_id in first
    assert script.main(["--results", str(results)]) == 0
    assert "best parameters" not in capsys.readouterr().out  # which are not evaluated twice


def test_the_gap_to_what_is_published_is_that_of_the_best_line(script: ModuleType) -> None:
    results = {"A": [script.Result(5, 96.2, 92.7)] * 3, "B": [script.Result(5, 99.0, 80.0)]}
    assert script.gap(results) == "from which A is +10.0 and +10.0 away"
    assert script.each([3.0, 1.0]) == "2.0 (1.0, 3.0)"


def test_without_runs_there_is_one_line(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--results", str(tmp_path)]) == 2
    assert "generalisation has no finished run" in capsys.readouterr().err
