"""Training that is killed, stopped, repeated, diverges, fails or fills the disk: real processes where it matters."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kfacrnn import KFAC, config, provenance, ranks, store, track
from kfacrnn import train as training
from kfacrnn.data import ptb
from kfacrnn.errors import UserError
from kfacrnn.metrics import Metrics
from kfacrnn.run import Run
from kfacrnn.session import Session
from kfacrnn.store import RunFolder, Store
from kfacrnn.train import train
from tests import processes
from tests.runs import curve
from tests.synthetic import TINY

LONG = ["budget.updates=200", "budget.log_every=3", "budget.eval_every=40", "budget.checkpoint_every=7"]


def tiny(results: Path, *overrides: str) -> Run:
    return config.compose([*TINY, f"results={results}", *overrides])


def final(folder: RunFolder) -> dict[str, torch.Tensor]:
    return torch.load(folder.path / "model.pt", weights_only=True)


def same(one: RunFolder, other: RunFolder) -> bool:
    """Bitwise: rows, final parameters, and those of the best validation."""
    files = sorted(path.name for path in one.path.glob("*.pt"))
    if curve(one) != curve(other) or files != sorted(path.name for path in other.path.glob("*.pt")):
        return False
    pairs = [(torch.load(each.path / name, weights_only=True) for each in (one, other)) for name in files]
    return all(torch.equal(a[name], b[name]) for a, b in pairs for name in a | b)


# ---- killed, stopped, repeated -------------------------------------------------------------------------------------


def kill_until_done(
    overrides: list[str], results: Path, kills: int, seed: int, prepare: Any = None, *rest: Any
) -> RunFolder:
    """The same command again and again; each of the first is killed, at a random moment after a random row."""
    moments = random.Random(seed)
    folder = Store(results).folder(config.compose([*overrides, f"results={results}"]))
    command = ["train", *overrides, f"results={results}"]
    for _ in range(kills):
        update = last_update(folder) + moments.randint(1, 15)  # also before the first checkpoint and the next row
        process = processes.start(command, None, prepare, *rest)
        processes.wait_for(lambda update=update: last_update(folder) >= update)
        time.sleep(moments.uniform(0, 0.02))
        process.kill()
        process.join()
        assert folder.state() == "interrupted"
    code, _ = processes.run(command, results / "output.txt", prepare, *rest)
    assert code == 0
    assert folder.state() == "done"
    return folder


def last_update(folder: RunFolder) -> int:
    rows = folder.metrics.rows()
    return int(rows[-1]["update"]) if rows else 0


def test_killed_at_random_moments_and_started_again_it_ends_where_an_undisturbed_run_ends(tmp_path: Path) -> None:
    overrides = [*TINY, *LONG]
    undisturbed = train(config.compose([*overrides, f"results={tmp_path / 'undisturbed'}"]), "test")
    killed = kill_until_done(overrides, tmp_path / "killed", kills=4, seed=3)
    assert len(killed.meta()["sessions"]) == 5
    assert same(undisturbed, killed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_makes_a_checkpoint_and_the_same_command_continues(number: signal.Signals, tmp_path: Path) -> None:
    overrides = [*TINY, *LONG, "budget.checkpoint_every=1000"]
    undisturbed = train(config.compose([*overrides, f"results={tmp_path / 'undisturbed'}"]), "test")
    run = config.compose([*overrides, f"results={tmp_path / 'stopped'}"])
    folder = Store(run.results).folder(run)
    command, output = ["train", *overrides, f"results={tmp_path / 'stopped'}"], tmp_path / "output.txt"
    process = processes.start(command, output)
    processes.wait_for(folder.metrics.rows)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 130
    status = folder.status()
    assert (status["state"], status["reason"]) == ("interrupted", f"by {number.name}")
    assert f"interrupted (by {number.name}) at update {status['update']}" in output.read_text()
    assert 0 < status["update"] < 200
    assert processes.run(command, output)[0] == 0
    assert folder.meta()["sessions"][-1]["from_update"] == status["update"]
    assert same(undisturbed, folder)


@pytest.mark.parametrize("changed", ["optimizer", "seconds_at_last_row", "units", "tokens"])
def test_a_checkpoint_with_a_state_of_another_kind_is_refused(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny(tmp_path, "optimizer=adam", "budget.checkpoint_every=1")
    with monkeypatch.context() as patch:
        patch.setattr(training, "_end", lambda *_: None)  # as if killed before its end
        train(run, "test")
    folder = Store(run.results).folder(run)
    checkpoint = folder.load_checkpoint()
    assert checkpoint
    for state in checkpoint["optimizer"]["state"].values():
        del state["exp_avg_sq"]
    other = {"optimizer": checkpoint["optimizer"], "seconds_at_last_row": [], "units": "x", "tokens": torch.zeros(3)}
    folder.save_checkpoint(folder.load_checkpoint() | {"update": 2, changed: other[changed]})  # type: ignore[operator]
    with pytest.raises(UserError, match=r"checkpoint\.pt: not of this run"):
        train(run, "test")
    folder.checkpoint.rename(folder.path / "checkpoint.old.pt")
    with pytest.raises(UserError, match=r"checkpoint\.old\.pt: not of this run"):
        train(run, "test")


def test_a_signal_during_the_last_update_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Session.step

    def step_with_signal(session: Session) -> Any:
        batch = step(session)
        if session.update == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    with monkeypatch.context() as patch:
        patch.setattr(Session, "step", step_with_signal)
        folder = train(tiny(tmp_path / "signal"), "test")
    assert (folder.state(), folder.status()["update"]) == ("interrupted", 4)
    train(tiny(tmp_path / "signal"), "test")
    assert folder.state() == "done"
    assert same(folder, train(tiny(tmp_path / "undisturbed"), "test"))


def test_a_run_that_is_done_returns_at_once_and_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train(tiny(tmp_path), "test")

    def snapshot() -> dict[str, tuple[int, bytes]]:
        return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.path.iterdir()}

    before = snapshot()
    assert set(before) >= {"config.yaml", "meta.json", "metrics.csv", "model.pt", "status.json"}
    assert not [name for name in before if name.startswith("checkpoint")]
    monkeypatch.setattr(training, "Session", None)  # nothing is built
    assert train(tiny(tmp_path, "device=cuda:99", "tracker=wandb"), "again").path == folder.path
    assert {name: content for name, content in snapshot().items() if name != "run.lock"} == {
        name: content for name, content in before.items() if name != "run.lock"
    }


def test_checkpoints_that_a_killed_process_left_beside_its_results_are_removed(tmp_path: Path) -> None:
    folder = train(tiny(tmp_path), "test")
    for name in ("checkpoint.pt", "checkpoint.old.pt"):
        (folder.path / name).write_bytes(b"killed between the status and the end")
    train(tiny(tmp_path), "again")
    assert not list(folder.path.glob("checkpoint*"))


def use_tiny_corpus(folder: Path, published: Any) -> None:
    ptb.PUBLISHED = published


@pytest.mark.slow
@pytest.mark.parametrize("task", ["repeat_copy", "ptb_word", "ptb_char"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "kfac_option2"])
def test_every_task_survives_being_killed_at_random_moments(
    task: str, optimizer: str, tiny_ptb: Path, tmp_path: Path
) -> None:
    text = ["task.hidden=16", "task.batch_size=4", "task.bptt=5", "task.eval_batch_size=2", "task.dropout=0.3"]
    small = [f"task={task}", "threads=1", f"data.root={tiny_ptb}", *(text if task != "repeat_copy" else TINY[1:12])]
    overrides = [*small, f"optimizer={optimizer}", *LONG, "budget.updates=400"]
    undisturbed = train(config.compose([*overrides, f"results={tmp_path / 'undisturbed'}"]), "test")
    killed = kill_until_done(overrides, tmp_path / "killed", 8, 1, use_tiny_corpus, tiny_ptb, ptb.PUBLISHED)
    assert len(killed.meta()["sessions"]) == 9
    assert same(undisturbed, killed)


# ---- how a run ends ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_every", [1, 7])
def test_divergence_is_a_result_with_its_update(log_every: int, tmp_path: Path) -> None:
    """The first update, of norm 1e38, leaves weights whose loss is not finite: found at the next row, dated exactly."""
    huge = ["optimizer=sgd", "optimizer.lr=1e38", "optimizer.clip=null", "budget.updates=20"]
    overrides = [*TINY, *huge, f"budget.log_every={log_every}", f"results={tmp_path}"]
    code, said = processes.run(["train", *overrides], tmp_path / "output.txt")
    folder = next(iter(Store(tmp_path)))
    status = folder.status()
    assert (code, status["state"]) == (0, "diverged")
    assert status["reason"] == "loss not finite at update 2"
    assert status["update"] == max(2, log_every)
    assert said[-1].startswith(f"diverged (loss not finite at update 2) at update {status['update']}")
    assert all(row["train/nats"] not in ("nan", "inf") for row in folder.metrics.rows())
    assert processes.run(["train", *overrides], tmp_path / "output.txt")[0] == 0
    assert len(folder.meta()["sessions"]) == 1  # not tried again


def test_parameters_that_the_last_update_blows_up_are_a_divergence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses of all updates are finite: what the last one has done, no other sees."""
    step = Session.step

    def blow_up(session: Session) -> Any:
        batch = step(session)
        if session.update == 4:
            with torch.no_grad():
                next(session.model.parameters()).view(-1)[0] = float("inf")
        return batch

    monkeypatch.setattr(Session, "step", blow_up)
    folder = train(tiny(tmp_path), "test")
    assert (folder.state(), folder.status()["reason"]) == ("diverged", "parameters not finite after update 4")


def test_a_validation_that_is_not_finite_at_the_end_is_a_divergence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = type(Session(tiny(tmp_path)).task)
    monkeypatch.setattr(task, "evaluate", lambda *_: float("nan"))
    folder = train(tiny(tmp_path, "budget.eval_every=2"), "test")
    assert (folder.state(), folder.status()["reason"]) == ("diverged", "validation loss not finite after update 4")
    assert [row["update"] for row in folder.metrics.rows()] == ["1", "2", "3"]


def test_a_decomposition_that_cannot_be_saved_is_a_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "cholesky", fail)
    folder = train(tiny(tmp_path, "optimizer=kfac_option1"), "test")
    assert folder.state() == "diverged"
    assert folder.status()["reason"].endswith("at update 1")


@pytest.mark.parametrize("name", ["meta.json", "config.yaml", "status.json"])
def test_what_was_deleted_under_a_run_is_there_again_at_its_end(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, run = Session.step, tiny(tmp_path)

    def step_and_delete(session: Session) -> Any:
        if session.update == 3:
            (Store(tmp_path).folder(run).path / name).unlink()
        return step(session)

    monkeypatch.setattr(Session, "step", step_and_delete)
    folder = train(run, "test")
    assert [found.run_id for found in Store(tmp_path)] == [run.run_id]
    assert (folder.state(), len(folder.meta()["sessions"])) == ("done", 1)
    assert folder.meta()["sessions"][0]["end"]


def test_an_exception_ends_as_failed_with_the_reason_and_the_next_start_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Session.step

    def fail(session: Session) -> Any:
        if session.update == 3:
            raise RuntimeError("a bug in a task")
        return step(session)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "step", fail)
        with pytest.raises(RuntimeError, match="a bug in a task"):
            train(tiny(tmp_path / "failed"), "test")
    folder = Store(tmp_path / "failed").folder(tiny(tmp_path / "failed"))
    status = folder.status()
    assert (status["state"], status["update"], status["reason"]) == ("failed", 3, "a bug in a task")
    train(tiny(tmp_path / "failed"), "test")
    assert (folder.state(), folder.status()["reason"]) == ("done", "")
    assert folder.meta()["sessions"][-1]["from_update"] == 2  # the checkpoint before
    assert same(folder, train(tiny(tmp_path / "undisturbed"), "test"))


def test_a_run_says_that_it_is_running_before_it_opens_the_mirror_and_was_interrupted_if_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Store(tmp_path).folder(tiny(tmp_path))
    seen: list[tuple[str | None, int, int]] = []

    def fail(*_: Any) -> None:
        seen.append((folder.state(), folder.status()["update"], folder.status()["pid"]))
        raise RuntimeError("a bug in the mirror")

    folder.path.mkdir(parents=True)
    folder.set_status("interrupted", update=3, updates=4)
    with monkeypatch.context() as patch:
        patch.setattr(training, "open_mirror", fail)
        with pytest.raises(RuntimeError, match="a bug in the mirror"):
            train(tiny(tmp_path), "test")
    assert seen == [("running", 3, os.getpid())]
    assert (folder.state(), folder.status()["update"]) == ("interrupted", 3)


def test_a_full_disk_is_one_line_and_the_run_continues_from_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = RunFolder.save_checkpoint

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save_until_full(folder: RunFolder, state: dict[str, Any]) -> None:
        if state["update"] == 4:
            patch.setattr(os, "fsync", full)
        save(folder, state)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_checkpoint", save_until_full)
        with pytest.raises(UserError, match=r"cannot write .*: No space left on device"):
            train(tiny(tmp_path / "full"), "test")
    folder = train(tiny(tmp_path / "full"), "test")
    assert folder.meta()["sessions"][-1]["from_update"] == 2
    assert same(folder, train(tiny(tmp_path / "undisturbed"), "test"))


def test_what_cannot_start_leaves_no_state_behind(tmp_path: Path) -> None:
    run = tiny(tmp_path, "device=cuda:99")
    with pytest.raises(UserError, match=r"^device=cuda:99: torch finds . CUDA devices here; write device=cpu$"):
        train(run, "test")
    assert list(tmp_path.iterdir()) == []


def test_bf16_is_refused_where_the_processor_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "has_half_precision_kernels", lambda dtype, device: False)
    with pytest.raises(UserError, match=r"^precision=bf16: this processor has no bfloat16 .* write precision=fp32$"):
        train(tiny(tmp_path, "precision=bf16"), "test")
    assert list(tmp_path.iterdir()) == []


def test_sizes_for_which_there_is_no_memory_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^not enough memory for repeat_copy of these sizes: "):
        train(tiny(tmp_path, "task.slots=1000000000000", "task.word_size=1000000"), "test")
    assert list(tmp_path.iterdir()) == []


# ---- rows ----------------------------------------------------------------------------------------------------------


def test_rows_come_at_log_points_evaluations_and_the_last_update(tmp_path: Path) -> None:
    budget = ["budget.updates=11", "budget.log_every=4", "budget.eval_every=5"]
    rows = train(tiny(tmp_path, *budget), "test").metrics.rows()
    assert [row["update"] for row in rows] == ["4", "5", "8", "10", "11"]
    assert [bool(row["valid/nats"]) for row in rows] == [False, True, False, True, True]
    assert [row["tokens"] for row in rows] == [str(int(row["update"]) * int(rows[0]["tokens"]) // 4) for row in rows]


def test_eval_every_zero_never_evaluates(tmp_path: Path) -> None:
    assert not [row for row in train(tiny(tmp_path, "budget.eval_every=0"), "test").metrics.rows() if row["valid/nats"]]


def test_a_training_value_is_the_mean_over_units_since_the_last_row(tmp_path: Path) -> None:
    session = Session(tiny(tmp_path))
    session.losses, session.units = [torch.tensor(1.0), torch.tensor(4.0)], [3, 1]
    session.update = 4
    row = session.row()
    assert row is not None
    assert row["train/nats"] == (3 * 1 + 1 * 4) / 4
    assert (session.losses, session.units) == ([], [])


def test_a_row_averages_the_losses_that_single_rows_show(tmp_path: Path) -> None:
    single = train(tiny(tmp_path / "single", "budget.log_every=1"), "test").metrics.rows()
    double = train(tiny(tmp_path / "double", "budget.log_every=2"), "test").metrics.rows()
    losses = [float(row["train/nats"]) for row in single]
    assert [float(row["train/nats"]) for row in double] == pytest.approx(
        [(losses[0] + losses[1]) / 2, (losses[2] + losses[3]) / 2], rel=1e-12
    )


def test_the_logged_gradient_norm_is_that_before_clipping(tmp_path: Path) -> None:
    session = Session(tiny(tmp_path))
    batch = session.task.next_batch()
    session.task.loss(session.model, batch).backward()
    squares = sum(p.grad.double().square().sum() for p in session.model.parameters() if p.grad is not None)
    clipped = train(tiny(tmp_path, "optimizer.clip=1e-6", "budget.log_every=1"), "test").metrics.rows()
    assert float(clipped[0]["grad_norm"]) == pytest.approx(float(squares) ** 0.5, rel=1e-5)


def test_the_logged_learning_rate_is_that_of_the_update(tmp_path: Path) -> None:
    schedule = ["optimizer/schedule=exponential", "optimizer.schedule.rate=0.5", "optimizer.lr=0.8"]
    rows = train(tiny(tmp_path, "budget.log_every=1", *schedule), "test").metrics.rows()
    assert [float(row["lr"]) for row in rows] == pytest.approx([0.8, 0.4, 0.2, 0.1])


def test_same_seed_same_weights_and_batches_whatever_the_optimizer_and_the_results_folder(tmp_path: Path) -> None:
    one = Session(tiny(tmp_path / "a", "optimizer=adam"))
    other = Session(tiny(tmp_path / "b", "optimizer=kfac_option1", "optimizer.lr=0.5"))
    weights, others = one.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    for _ in range(3):
        assert torch.equal(one.step().inputs, other.step().inputs)


@pytest.mark.usefixtures("bfloat16")
def test_bf16_trains_close_to_fp32_but_not_the_same(tiny_ptb: Path) -> None:
    small = ["task.hidden=8", "task.batch_size=4", "task.bptt=5", "budget.updates=4", "threads=1"]
    where = ["task=ptb_char", f"data.root={tiny_ptb}", f"results={tiny_ptb}"]
    runs = {p: config.compose([*small, *where, f"precision={p}"]) for p in ("fp32", "bf16")}
    rows = {p: train(run, "test").metrics.rows() for p, run in runs.items()}
    full, half = (float(rows[p][-1]["train/nats"]) for p in ("fp32", "bf16"))
    assert half != full
    assert half == pytest.approx(full, rel=0.02)  # bf16 keeps 8 bits


# ---- time ----------------------------------------------------------------------------------------------------------


def test_accounts_sum_to_the_wall_clock_and_only_training_is_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluation, logging and checkpoints are made slow, each by an amount of its own."""
    seconds = {"eval": 0.15, "log": 0.1, "checkpoint": 0.05}
    moments: list[float] = []

    def slowed(function: Callable[..., Any], account: str) -> Callable[..., Any]:
        def slow(*arguments: Any) -> Any:
            time.sleep(seconds[account])
            return function(*arguments)

        return slow

    def append(metrics: Metrics, row: dict[str, Any]) -> None:
        moments.append(time.monotonic())
        original(metrics, row)

    original, task = Metrics.append, type(Session(tiny(tmp_path)).task)
    monkeypatch.setattr(Metrics, "append", append)
    monkeypatch.setattr(track.Nobody, "log", slowed(track.Nobody.log, "log"))
    monkeypatch.setattr(RunFolder, "save_checkpoint", slowed(RunFolder.save_checkpoint, "checkpoint"))
    monkeypatch.setattr(task, "evaluate", slowed(task.evaluate, "eval"))
    folder = train(tiny(tmp_path, "budget.log_every=1", "budget.eval_every=1"), "test")
    rows, wall = folder.metrics.rows(), folder.meta()["ledger"]["wall"]
    booked = float(rows[-1]["time_wall_s"]) - float(rows[0]["time_wall_s"])
    assert booked == pytest.approx(moments[-1] - moments[0], rel=0.02)
    assert wall["eval"] == pytest.approx(4 * seconds["eval"], rel=0.3)
    assert wall["log"] == pytest.approx(4 * seconds["log"], rel=0.3)
    assert wall["checkpoint"] >= 2 * seconds["checkpoint"]
    assert wall["train"] < 0.15
    assert float(rows[-1]["time_train_s"]) <= wall["train"]


def test_background_work_of_an_optimizer_stands_still_outside_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def noted(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def note(*arguments: Any) -> Any:
            events.append(name)
            return original(*arguments)

        monkeypatch.setattr(owner, name, note)

    noted(KFAC, "resume")
    noted(KFAC, "step")
    noted(KFAC, "pause")
    noted(Metrics, "append")
    background = ["optimizer.refresh_every=2", "optimizer.refresh_delay=1"]
    train(tiny(tmp_path, "optimizer=kfac_option1", *background, "budget.log_every=1"), "test")
    assert events == ["resume", "step", "pause", "append"] * 4


def test_the_heartbeat_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[dict[str, Any]] = []
    monkeypatch.setattr(training, "HEARTBEAT", 0.0)
    write = store.write_json

    def noted(path: Path, content: dict[str, Any]) -> None:
        written.extend([content] if path.name == "status.json" else [])
        write(path, content)

    monkeypatch.setattr(store, "write_json", noted)
    train(tiny(tmp_path), "test")
    assert [(status["state"], status["update"]) for status in written] == [
        ("running", 0), ("running", 0), ("running", 1), ("running", 2), ("running", 3), ("running", 4), ("done", 4)
    ]  # fmt: skip
    beats = [status["heartbeat"] for status in written]
    assert beats == sorted(beats)
    assert beats[-1] > beats[0]


# ---- provenance ----------------------------------------------------------------------------------------------------


def test_a_run_says_where_it_comes_from(tmp_path: Path) -> None:
    run = tiny(tmp_path)
    folder = train(run, "kfacrnn train and so on")
    meta = json.loads((folder.path / "meta.json").read_text())
    (session,) = meta["sessions"]
    assert meta["run_id"] == run.run_id == folder.path.name
    assert session["command"] == "kfacrnn train and so on"
    assert session["start"] <= session["end"]
    assert session["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert session["hardware"]["cores"] >= 1
    assert (session["threads"], session["jobs"]) == (1, 1)
    assert session["others_cores"] is None or session["others_cores"] >= 0
    from omegaconf import OmegaConf

    stored = OmegaConf.to_container(OmegaConf.load(folder.path / "config.yaml"))
    assert isinstance(stored, dict)
    assert stored["task"]["hidden"] == 4
    assert stored["optimizer"]["schedule"]["kind"] == "constant"


def test_a_changed_source_or_setting_makes_the_commit_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    for folder in ("kfacrnn", "configs", "results"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "kfacrnn" / "provenance.py"))
    assert len(provenance.commit()["commit"]) == 40
    (tmp_path / "results" / "file").write_text("2")
    assert provenance.commit()["dirty"] is False
    for folder in ("kfacrnn", "configs"):
        (tmp_path / folder / "file").write_text("2")
        assert provenance.commit()["dirty"] is True
        git("commit", "-am", folder)
        assert provenance.commit()["dirty"] is False
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "elsewhere" / "kfacrnn" / "provenance.py"))
    assert provenance.commit() == {"commit": None, "dirty": None}  # an installed wheel
