"""What a sweep starts and what it leaves alone, whom it tells, and what is left when processes die: with real ones."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kfacrnn import discovery, experiment, ranks, sweep
from kfacrnn.errors import UserError
from kfacrnn.launchers import local
from kfacrnn.plan import Plan, PlannedRun
from tests import processes
from tests.synthetic import store, write_experiment

TUNED = "{SGD: {optimizer: sgd, grid: {optimizer.lr: [1e-6, 0.05]}}, Adam: {optimizer: adam}}"


def plan(path: str, results: Path, *overrides: str) -> Plan:
    return Plan(experiment.load(path), str(results), overrides)


def all_runs(path: str, results: Path) -> list[PlannedRun]:
    return list(plan(path, results).known())


def chosen(path: str, results: Path) -> str | None:
    winner = plan(path, results).winner("SGD")
    return winner.run.run_id if winner else None


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, str]:
    """An experiment with a grid and a plain method, swept with real processes: its file, its store, what was said."""
    folder = tmp_path_factory.mktemp("tuned")
    path = write_experiment(folder / "tuned.yaml", TUNED, tune="{seed: 0, overrides: [budget.updates=2]}")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert sweep.sweep(path, results=str(folder / "results"), jobs=2) == 0
    return path, folder / "results", said.getvalue()


def test_a_grid_is_tuned_and_only_its_winner_confirmed(tuned: tuple[str, Path, str]) -> None:
    path, results, _ = tuned
    slow, fast = plan(path, results).tuning["SGD"]
    losses = [float(run.folder.metrics.rows()[-1]["train/nats"]) for run in (slow, fast)]
    best = (slow, fast)[losses.index(min(losses))]
    (confirmed,) = plan(path, results).confirmation("SGD")
    assert confirmed.point.choice == best.point.choice
    assert confirmed.folder.status()["updates"] == 4
    assert len(list(plan(path, results).store)) == 4  # two trials, one confirmation, one run of Adam


def test_a_missing_package_is_reported_before_the_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_processes: None
) -> None:
    path = write_experiment(tmp_path / "two.yaml", "{SGD: {optimizer: sgd}, SOAP: {optimizer: soap}}")
    monkeypatch.setattr(discovery, "missing", lambda package, name: "opt_einsum" if name == "soap" else None)
    assert sweep.sweep(path, results=str(tmp_path), dry_run=True) == 0
    with pytest.raises(ModuleNotFoundError, match="soap needs opt_einsum"):
        sweep.sweep(path, results=str(tmp_path))


def test_a_precision_that_this_machine_lacks_is_reported_before_the_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_processes: None
) -> None:
    path = write_experiment(tmp_path / "one.yaml", "{SGD: {optimizer: sgd, overrides: [precision=bf16]}}")
    monkeypatch.setattr(ranks, "has_half_precision_kernels", lambda dtype, device: False)
    with pytest.raises(UserError, match="precision=bf16"):
        sweep.sweep(path, results=str(tmp_path))


def test_every_run_has_a_process_of_its_own_and_a_log(tuned: tuple[str, Path, str]) -> None:
    path, results, said = tuned
    runs = all_runs(path, results)
    assert len({run.folder.status()["pid"] for run in runs} - {os.getpid()}) == len(runs)
    for run in runs:
        assert "done" in (run.folder.path / "log.txt").read_text()
        assert f"run {run.run.run_id}" in said


def test_runs_of_a_parallel_sweep_are_marked_as_having_shared_the_machine(tuned: tuple[str, Path, str]) -> None:
    path, results, _ = tuned
    assert {run.folder.meta()["sessions"][0]["jobs"] for run in all_runs(path, results)} == {2}


@pytest.mark.usefixtures("no_processes")
def test_a_second_sweep_starts_nothing(tuned: tuple[str, Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    path, results, _ = tuned
    assert sweep.sweep(path, results=str(results)) == 0
    assert "4/4 done" in capsys.readouterr().out


def test_status_tells_the_choice_and_how_far_each_method_is(
    tuned: tuple[str, Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    path, results, _ = tuned
    sweep.status(path, results=str(results))
    first, _, sgd, adam, edge = capsys.readouterr().out.splitlines()
    assert first == "4/4 done"
    assert sgd.split()[:2] == ["SGD", "2/2"]
    assert "optimizer.lr=" in sgd
    assert adam.split()[:2] == ["Adam", "1/1"]
    assert edge == "SGD: the winner is on an edge of what was tried: optimizer.lr"


@pytest.mark.usefixtures("no_processes")
def test_a_dry_run_shows_every_run_and_leaves_no_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_experiment(tmp_path / "dry.yaml", TUNED, tune="{seed: 0}", seeds="[1, 2]")
    assert sweep.sweep(path, results=str(tmp_path / "results"), dry_run=True) == 0
    said = capsys.readouterr().out
    assert said.count("tune") == 2
    assert said.count("the winner, seed=") == 2
    assert "0/6 done" in said
    assert not (tmp_path / "results").exists()


@pytest.mark.usefixtures("no_processes")
@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (
            "{A: {optimizer: adam}, S: {optimizer: sgd, grid: {optimizer.lr: [1, -1]}}}",
            "method S, tune optimizer.lr=-1",
        ),
        ("{A: {optimizer: adam}, S: {optimizer: sgd, grid: {optimizer.lrr: [1, 2]}}}", "did you mean 'optimizer.lr'"),
        ("{A: {optimizer: adam}, S: {optimizer: sdg}}", "did you mean 'sgd'"),
        (
            "{A: {optimizer: adam}, S: {optimizer: sgd, overrides: [task.hidden=0]}}",
            "method S, confirm seed=1: task.hid",
        ),
    ],
)
def test_a_bad_point_is_refused_before_the_first_run(tmp_path: Path, methods: str, message: str) -> None:
    path = write_experiment(tmp_path / "bad.yaml", methods, tune="{seed: 0}")
    with pytest.raises(UserError, match=message):
        sweep.sweep(path, results=str(tmp_path / "results"))
    assert not (tmp_path / "results").exists()


@pytest.mark.usefixtures("no_processes")
def test_what_only_the_confirmation_would_stumble_over_is_refused_before_tuning(tmp_path: Path) -> None:
    methods = "{S: {optimizer: sgd, grid: {optimizer.lr: [1, 2]}}}"
    path = write_experiment(
        tmp_path / "late.yaml", methods, tune="{seed: 0, overrides: [budget.updates=1]}", common=["budget.updates=0"]
    )
    with pytest.raises(UserError, match=r"method S, confirm .*budget\.updates=0"):
        sweep.sweep(path, results=str(tmp_path / "results"))


def test_unknown_names_and_overrides_that_the_sweep_sets_itself_are_refused(tmp_path: Path) -> None:
    path = write_experiment(tmp_path / "plain.yaml", "{Adam: {optimizer: adam}}")
    with pytest.raises(UserError, match="no such method or line in plain: 'adam'; did you mean 'Adam'"):
        sweep.sweep(path, results=str(tmp_path), only=["adam"])
    with pytest.raises(UserError, match="results=x: is set by --results"):
        sweep.sweep(path, results=str(tmp_path), overrides=["results=x"])
    with pytest.raises(UserError, match="--jobs 0: must be at least 1"):
        sweep.sweep(path, results=str(tmp_path), jobs=0)


def test_two_grids_share_their_common_points_and_nothing_else(tmp_path: Path) -> None:
    grids = "[0.1, 0.2]", "[0.2, 0.3]"
    paths = [
        write_experiment(
            tmp_path / f"grid{i}.yaml", f"{{S: {{optimizer: sgd, grid: {{optimizer.lr: {grid}}}}}}}", tune="{seed: 0}"
        )
        for i, grid in enumerate(grids)
    ]
    first, second = ([run.folder.path for run in plan(path, tmp_path).tuning["S"]] for path in paths)
    assert first[1] == second[0]
    assert len({*first, *second}) == 3


@pytest.mark.parametrize(("last", "of_trials", "winner"), [(50, None, 1), (100, None, 0), (50, 100, 0), (100, 50, 1)])
def test_the_winner_has_the_least_mean_training_loss_over_the_last_updates(
    tmp_path: Path, last: int, of_trials: int | None, winner: int
) -> None:
    path = write_experiment(
        tmp_path / "select.yaml",
        TUNED,
        tune=f"{{seed: 0, last: {of_trials or 'null'}, overrides: [budget.updates=100]}}",
        select=f"{{last: {last}}}",
    )
    first, second = plan(path, tmp_path).tuning["SGD"]
    store(first, [5, 1, 2, 3], every=25)  # means: last two 2.5, all 2.75
    assert chosen(path, tmp_path) is None
    store(second, [9, 9, 2, 2], every=25)  # means: last two 2.0, all 5.5
    assert chosen(path, tmp_path) == (first, second)[winner].run.run_id


@pytest.mark.usefixtures("no_processes")
def test_a_diverged_trial_is_never_chosen_and_a_grid_of_them_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_experiment(tmp_path / "diverged.yaml", TUNED, tune="{seed: 0}")
    first, second = plan(path, tmp_path).tuning["SGD"]
    store(first, [0.1], state="diverged")
    store(second, [3.0, 3.0, 3.0, 3.0])
    assert chosen(path, tmp_path) == second.run.run_id
    second.folder.set_status("diverged", update=4, updates=4)
    assert chosen(path, tmp_path) is None
    assert sweep.sweep(path, results=str(tmp_path), only=["SGD"]) == 1
    captured = capsys.readouterr()
    assert "0/3 done, 2 diverged" in captured.out
    assert "method SGD: no tuning run can be chosen" in captured.err


def test_a_failed_run_is_run_again_only_when_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_experiment(tmp_path / "failed.yaml", "{Adam: {optimizer: adam}}")
    (run,) = all_runs(path, tmp_path)
    store(run, [], state="failed")
    started, popen = [], subprocess.Popen

    def start_something_short(command: list[str], **more: Any) -> subprocess.Popen[bytes]:
        started.append(command)
        return popen([sys.executable, "-c", ""], **more)

    monkeypatch.setattr(subprocess, "Popen", start_something_short)
    assert sweep.sweep(path, results=str(tmp_path)) == 1
    assert "1 failed; --retry-failed" in capsys.readouterr().err
    assert started == []
    sweep.sweep(path, results=str(tmp_path), retry_failed=True)
    assert len(started) == 1


@pytest.mark.usefixtures("no_processes")
def test_a_run_that_another_process_is_writing_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "LOOK", 0.3)
    path = write_experiment(tmp_path / "shared.yaml", "{Adam: {optimizer: adam}}")
    (run,) = all_runs(path, tmp_path)
    with run.folder.writing():
        run.folder.set_status("running", update=1, updates=4)
        ending = threading.Timer(1.5, lambda: run.folder.set_status("done", update=4, updates=4))
        ending.start()
        assert sweep.sweep(path, results=str(tmp_path)) == 0
        assert not ending.is_alive()
    assert "1/1 done" in capsys.readouterr().out.splitlines()


def test_a_sweep_goes_on_when_the_terminal_closes_if_it_was_started_with_nohup(tmp_path: Path) -> None:
    path, output = write_experiment(tmp_path / "nohup.yaml", "{Adam: {optimizer: adam}}"), tmp_path / "output.txt"
    (run,) = all_runs(path, tmp_path)
    with run.folder.writing():
        run.folder.set_status("running", update=1, updates=4)
        command = ["sweep", path, "--results", str(tmp_path)]
        process = processes.start(command, output, signal.signal, signal.SIGHUP, signal.SIG_IGN)
        wait_for(lambda: output.exists() and "1 elsewhere" in output.read_text())
        os.kill(process.pid or 0, signal.SIGHUP)
        time.sleep(1)
        run.folder.set_status("done", update=4, updates=4)
        process.join(60)
    assert process.exitcode == 0


@pytest.mark.slow
def test_two_launchers_share_an_experiment_and_both_see_its_end(tmp_path: Path) -> None:
    path = write_experiment(tmp_path / "shared.yaml", TUNED, tune="{seed: 0, extend: 2}")
    command = [sys.executable, "-m", "kfacrnn", "sweep", path, "--results", str(tmp_path / "results")]
    launchers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [launcher.communicate(timeout=240)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0]
    assert all("6/6 done" in text.splitlines() for text in said)
    sessions = [len(run.folder.meta()["sessions"]) for run in all_runs(path, tmp_path / "results")]
    assert sessions == [1] * len(sessions)


def test_an_estimate_comes_from_the_seconds_of_stored_runs(tmp_path: Path) -> None:
    path = write_experiment(tmp_path / "eta.yaml", "{A: {optimizer: adam}, B: {optimizer: sgd}}", seeds="[1, 2]")
    assert plan(path, tmp_path).seconds_left() is None
    store(plan(path, tmp_path).confirmation("A")[0], [3, 2, 1, 1], seconds=[1, 2, 3, 4])  # 8 s of wall clock
    assert plan(path, tmp_path).seconds_left() == pytest.approx(3 * 8)  # B has no run yet: as slow as A


def test_when_one_process_is_killed_the_others_finish_and_a_relaunch_runs_only_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = (
        "{Victim: {optimizer: adam, overrides: [budget.updates=150, budget.log_every=50]}, Good: {optimizer: sgd}, "
        "Broken: {optimizer: sgd, overrides: [task.slots=1000000000000, task.word_size=1000000]}}"
    )
    path = write_experiment(tmp_path / "killed.yaml", methods)
    results = tmp_path / "results with a space"
    victim, good, broken = all_runs(path, results)

    def kill() -> None:
        wait_for(lambda: "sessions" in victim.folder.meta())
        os.kill(victim.folder.status()["pid"], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    assert sweep.sweep(path, results=str(results), jobs=3) == 1
    killer.join()
    said = capsys.readouterr().out
    assert (victim.folder.state(), good.folder.state()) == ("interrupted", "done")
    assert f"FAILED: Victim, confirm seed=1 (run {victim.run.run_id}): killed by SIGKILL" in said
    assert f"FAILED: Broken, confirm seed=1 (run {broken.run.run_id}): exit code 2" in said
    assert f"{broken.folder.path}/log.txt ends: kfacrnn: not enough memory" in said

    assert sweep.sweep(path, results=str(results), only=["Victim", "Good"]) == 0
    assert len(victim.folder.meta()["sessions"]) == 2
    assert len(good.folder.meta()["sessions"]) == 1


def test_a_stopped_or_killed_launcher_leaves_no_process_behind_and_status_sees_the_running_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_experiment(tmp_path / "endless.yaml", "{Adam: {optimizer: adam, overrides: [budget.updates=1000000]}}")
    (run,) = all_runs(path, tmp_path)
    command = [sys.executable, "-m", "kfacrnn", "sweep", path, "--retry-failed", "--results", str(tmp_path)]

    def launch() -> subprocess.Popen[str]:
        launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        wait_for(lambda: run.folder.state() == "running")
        return launcher

    with launch() as launcher:
        sweep.status(path, results=str(tmp_path))
        assert capsys.readouterr().out.startswith("0/1 done, 1 running, ETA ")
        launcher.kill()
    wait_for(lambda: run.folder.status()["state"] == "interrupted")

    with launch() as launcher:
        launcher.send_signal(signal.SIGINT)
        said, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 130
    assert run.folder.state() == "interrupted"
    assert (run.folder.path / "checkpoint.pt").exists()
    assert f"Continue with: kfacrnn sweep {path} --retry-failed --results {tmp_path}" in said
