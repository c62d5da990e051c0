"""How a plan grows with what has been found: extended grids, winners of one model used on another, equal trials."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kfacrnn import experiment, standing
from kfacrnn.errors import UserError
from kfacrnn.plan import Plan, PlannedRun
from tests.synthetic import store, write_experiment

GRID = "{SGD: {optimizer: sgd, grid: {optimizer.lr: [0.1, 1.0, 10.0]}}}"
LR, MOMENTUM = "optimizer.lr", "optimizer.momentum"


def extended(folder: Path, methods: str = GRID, extend: int = 2, **more: str) -> Plan:
    path = write_experiment(folder / "grown.yaml", methods, tune=f"{{seed: 0, extend: {extend}}}", **more)
    return Plan(experiment.load(path), str(folder))


def finish(plan: Plan, line: str, losses: dict[float, float]) -> None:
    """Stores every known trial of the line that has no results, with the loss for its learning rate."""
    for trial in plan.trials(line):
        if not trial.finished:
            store(trial, [losses[trial.point.choice[LR]]])


def rates(plan: Plan, line: str = "SGD") -> list[float]:
    return [trial.point.choice[LR] for trial in plan.trials(line)]


def test_a_grid_grows_one_trial_at_a_time_beside_the_best_so_far(tmp_path: Path) -> None:
    plan = extended(tmp_path)
    assert rates(plan) == [0.1, 1.0, 10.0]
    assert plan.trial_count("SGD") == 5
    finish(plan, "SGD", {0.1: 3, 1.0: 2, 10.0: 1})
    assert rates(plan) == [0.1, 1.0, 10.0, 100.0]  # outward
    assert plan.winner("SGD") is None
    finish(plan, "SGD", {100.0: 4})
    assert rates(plan) == [0.1, 1.0, 10.0, 100.0, 31.6]  # no edge any more: between
    finish(plan, "SGD", {31.6: 0.5})
    winner = plan.winner("SGD")
    assert winner
    assert winner.point.choice == {LR: 31.6}
    assert [run.point.choice for run in plan.confirmation("SGD")] == [{LR: 31.6}]
    assert plan.edges("SGD") == []


def test_means_may_go_over_equally_much_text_whatever_the_size_of_batches(tmp_path: Path) -> None:
    methods = "{small: {optimizer: sgd, overrides: [task.batch_size=1]}, large: {optimizer: sgd}}"  # of 1 and 2
    path = write_experiment(tmp_path / "text.yaml", methods, select="{sequences: 4}")
    plan = Plan(experiment.load(path), str(tmp_path))
    scores = []
    for line in plan.lines:
        (run,) = plan.confirmation(line)
        store(run, [8.0, 4.0, 2.0, 1.0])
        scores.append(run.score(plan.experiment.select))
    assert scores == [(8 + 4 + 2 + 1) / 4, (2 + 1) / 2]


@pytest.mark.parametrize("key", [LR, f"+{LR}"])
def test_what_is_searched_cannot_be_overridden(tmp_path: Path, key: str) -> None:
    path = write_experiment(tmp_path / "grown.yaml", GRID, tune="{seed: 0}")
    with pytest.raises(UserError, match=r"^overrides: .*optimizer\.lr=1: is what grown searches for SGD$"):
        Plan(experiment.load(path), str(tmp_path), [f"{key}=1"])


def test_the_curves_of_finished_trials_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, read = extended(tmp_path, extend=0), []
    finish(plan, "SGD", {0.1: 3, 1.0: 2, 10.0: 1})
    columns = PlannedRun.columns
    monkeypatch.setattr(PlannedRun, "columns", lambda run, names: (read.append(run.run.run_id), columns(run, names))[1])
    for _ in range(2):
        assert plan.winner("SGD")
        assert plan.updates()
    assert len(read) == len(set(read)) == 3


def test_a_winner_that_is_still_on_an_edge_is_said_to_be(tmp_path: Path) -> None:
    plan = extended(tmp_path, extend=1)
    finish(plan, "SGD", {0.1: 1, 1.0: 2, 10.0: 3})
    finish(plan, "SGD", {0.01: 0.5})
    assert list(standing.remarks(plan)) == ["SGD: the winner is on an edge of what was tried: optimizer.lr"]


def test_a_value_that_a_setting_cannot_have_is_passed_over(tmp_path: Path) -> None:
    plan = extended(tmp_path, "{SGD: {optimizer: sgd, grid: {optimizer.momentum: [0.1, 0.4]}}}")
    for trial, loss in zip(plan.trials("SGD"), (2, 1), strict=True):
        store(trial, [loss])
    assert [trial.point.choice[MOMENTUM] for trial in plan.trials("SGD")] == [0.1, 0.4, 0.2]  # not 1.6


def test_a_plan_counts_the_trials_to_come(tmp_path: Path) -> None:
    plan = extended(tmp_path, seeds="[1, 2]")
    assert plan.counts()[1] == 3 + 2 + 2
    finish(plan, "SGD", {0.1: 3, 1.0: 2, 10.0: 1})
    assert plan.counts()[1] == 3 + 2 + 2
    assert [run.point.role for run in plan.unknown()] == ["tune", "confirm", "confirm"]


def test_where_nothing_can_be_added_a_grid_is_finished_as_it_is(tmp_path: Path) -> None:
    plan = extended(tmp_path, "{SGD: {optimizer: sgd, grid: {optimizer.nesterov: [false, true]}}}")
    for trial, loss in zip(plan.trials("SGD"), (2, 1), strict=True):
        store(trial, [loss])
    assert plan.trial_count("SGD") == 2
    assert plan.winner("SGD") is plan.tuning["SGD"][1]


def test_settings_are_transferred_from_the_model_they_were_tuned_on(tmp_path: Path) -> None:
    models = "{small: {}, large: {overrides: [task.hidden=5], seeds: [4], settings: small}}"
    plan = extended(tmp_path, extend=0, models=models)
    assert plan.trials("SGD large") == plan.confirmation("SGD large") == []
    finish(plan, "SGD small", {0.1: 3, 1.0: 1, 10.0: 2})
    (small,), (large,) = plan.confirmation("SGD small"), plan.confirmation("SGD large")
    assert [run.run.optimizer.lr for run in (small, large)] == [1.0, 1.0]
    assert [(run.run.seed, run.run.task.hidden) for run in (small, large)] == [(1, 4), (4, 5)]


def test_a_method_may_have_the_settings_that_won_for_another_which_is_tuned_first(tmp_path: Path) -> None:
    models = "{small: {}, large: {overrides: [task.hidden=5], seeds: [4], settings: small}}"
    methods = f"{GRID[:-1]}, Nesterov: {{optimizer: sgd, settings: SGD, overrides: [optimizer.nesterov=true]}}}}"
    path = write_experiment(tmp_path / "as.yaml", methods, tune="{seed: 0, extend: 1}", models=models)
    plan = Plan(experiment.load(path), str(tmp_path), only=["Nesterov"])
    plan.validate()
    assert plan.lines == ["Nesterov small", "Nesterov large"]
    assert plan.counts()[1] == 3 + 1 + 2
    for loss in (3, 1, 2, 4):
        store(next(run for run in plan.known() if not run.finished), [loss])
    assert plan.seconds_left() is not None
    confirmed = [run.run for line in plan.lines for run in plan.confirmation(line)]
    assert [run.optimizer.lr for run in confirmed] == [1.0, 1.0]
    assert [run.optimizer.nesterov for run in confirmed] == [True, True]
    assert [run.task.hidden for run in confirmed] == [4, 5]
    assert plan.edges("Nesterov small") == []
    assert plan.unequal_trials() == {}
    assert Plan(plan.experiment, str(tmp_path), only=["Nesterov large"]).lines == ["Nesterov large"]
    with pytest.raises(UserError, match=r"optimizer\.lr=2: is what as searches for Nesterov small"):
        Plan(plan.experiment, str(tmp_path), overrides=["optimizer.lr=2"], only=["Nesterov"])


def test_that_no_trial_can_be_chosen_is_said_where_only_what_borrows_its_settings_is_asked_for(tmp_path: Path) -> None:
    methods = f"{GRID[:-1]}, Nesterov: {{optimizer: sgd, settings: SGD, overrides: [optimizer.nesterov=true]}}}}"
    path = write_experiment(tmp_path / "as.yaml", methods, tune="{seed: 0}")
    plan = Plan(experiment.load(path), str(tmp_path), only=["Nesterov"])
    for trial in plan.tuning["SGD"]:
        store(trial, [1], state="diverged")
    assert list(standing.unfinished(plan)) == [
        "method SGD: no tuning run can be chosen, all of them diverged; mend its grid"
    ]


def test_an_edge_of_what_lends_its_settings_is_said_where_only_what_borrows_them_is_asked_for(tmp_path: Path) -> None:
    methods = f"{GRID[:-1]}, Nesterov: {{optimizer: sgd, settings: SGD, overrides: [optimizer.nesterov=true]}}}}"
    path = write_experiment(tmp_path / "as.yaml", methods, tune="{seed: 0}")
    plan = Plan(experiment.load(path), str(tmp_path), only=["Nesterov"])
    finish(plan, "SGD", {0.1: 3, 1.0: 2, 10.0: 1})
    assert list(standing.remarks(plan)) == ["SGD: the winner is on an edge of what was tried: optimizer.lr"]


def test_unequal_numbers_of_trials_are_said_and_methods_as_shipped_do_not_count(tmp_path: Path) -> None:
    adam, shipped = "Adam: {optimizer: adam, grid: {optimizer.lr: [0.1, 0.2]}}", "AdamW: {optimizer: adamw}"
    plan = extended(tmp_path, f"{GRID[:-1]}, {adam}, {shipped}}}", extend=0)
    assert plan.unequal_trials() == {"SGD": 3, "Adam": 2}
    assert list(standing.remarks(plan)) == ["the numbers of trials are not equal: SGD 3, Adam 2"]
    plan = extended(tmp_path, f"{GRID[:-1]}, {shipped}}}", extend=0)
    assert plan.unequal_trials() == {}


def bench(results: Path, rows: list[dict[str, object]], threads: int, *, busy: bool = False) -> None:
    path = results / "bench" / f"step-cost-repeat_copy-fp32-threads={threads}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"threads": threads, "overrides": [], "machine": {"busy": busy}, "rows": rows}))


@pytest.mark.parametrize(
    ("batch", "threads", "seconds"), [(16, 1, 6000 * 0.25), (32, 1, 6000 * 0.5), (16, 2, 6000 * 0.5)]
)
def test_an_estimate_of_runs_that_nothing_is_known_of_comes_from_the_benchmark(
    tmp_path: Path, batch: int, threads: int, seconds: float
) -> None:
    row = {"task": "repeat_copy", "optimizer": "sgd", "dtype": "fp32", "threads": threads, "ms_mean_cycle": 250.0}
    bench(tmp_path, [row], threads)
    common = ["task.hidden=64", f"task.batch_size={batch}", "budget.updates=6000"]
    path = write_experiment(tmp_path / "long.yaml", "{Adam: {optimizer: adam}}", common=common)
    assert Plan(experiment.load(path), str(tmp_path)).seconds_left() == pytest.approx(seconds)  # runs with one thread


def test_an_estimate_prefers_a_quiet_benchmark(tmp_path: Path) -> None:
    row = {"task": "repeat_copy", "optimizer": "adam", "dtype": "fp32"}
    bench(tmp_path, [row | {"ms_mean_cycle": 900.0}], threads=1, busy=True)
    common = ["task.hidden=64", "task.batch_size=16", "budget.updates=100"]
    path = write_experiment(tmp_path / "long.yaml", "{Adam: {optimizer: adam}}", common=common)
    plan = Plan(experiment.load(path), str(tmp_path))
    assert plan.seconds_left() == pytest.approx(100 * 0.9)
    bench(tmp_path, [row | {"ms_mean_cycle": 50.0}], threads=4)
    assert plan.seconds_left() == pytest.approx(100 * 0.05 * 4)
