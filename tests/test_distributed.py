"""Runs on several processes: the same as on one, written by one, stopped and continued together."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from kfacrnn import config, difference, discovery, ranks
from kfacrnn.data import ptb
from kfacrnn.errors import UserError
from kfacrnn.session import Session
from kfacrnn.store import RunFolder, Store
from kfacrnn.train import train
from tests import processes
from tests.ranks import together
from tests.synthetic import TINY

TEXT = ["task.hidden=6", "task.batch_size=6", "task.bptt=5", "task.eval_batch_size=2"]
COPY = ["task.hidden=5", "task.slots=3", "task.word_size=3", "task.batch_size=6", "task.eval_sequences=4"]
COPY += ["task.bits=2", "task.min_length=1", "task.min_repeats=1"]  # sequences of several lengths
KFAC = ["optimizer.statistics_every=2", "optimizer.statistics_fraction=0.5", "optimizer.refresh_every=3"]
UPDATES = 7
CHAOTIC = {"soap"}  # which of the eigenvectors of equal eigenvalues it takes is up to rounding


# --------------------------------------------------------------------------------------------------------- equivalence


def overrides(task: str, optimizer: str, root: Path) -> list[str]:
    small = COPY if task == "repeat_copy" else TEXT
    kfac = KFAC if optimizer.startswith("kfac") else []
    basics = [f"task={task}", f"optimizer={optimizer}", "threads=1", "budget.updates=7", f"data.root={root}"]
    return [*basics, *small, *kfac]


@contextmanager
def double_precision() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@double_precision()
def trained(runs: list[list[str]], published: Any) -> list[Any]:
    """Parameters and the row that every run ends with."""
    ptb.PUBLISHED = published
    found = []
    for run in runs:
        session = Session(config.compose(run))
        for _ in range(UPDATES):
            session.step()
        row = session.row()
        numbers = {name: row[name] for name in ("update", "tokens", "train/nats", "valid/nats", "grad_norm", "lr")}
        found.append((dict(session.model.state_dict()), numbers))
    return found


def assert_equal(one: list[Any], many: list[Any]) -> None:
    for (parameters, numbers), (others, their_numbers) in zip(one, many, strict=True):
        torch.testing.assert_close(others, parameters, rtol=1e-9, atol=1e-11)
        assert their_numbers == pytest.approx(numbers, rel=1e-8)


def test_every_task_and_method_is_the_same_on_two_processes_to_rounding(tiny_ptb: Path) -> None:
    pairs = [("ptb_char", name) for name in ("sgd", "adam", "kfac_indep", "kfac_option1", "kfac_option2")]
    pairs += [("repeat_copy", name) for name in ("adam", "kfac_indep", "kfac_option1", "kfac_option2")]
    pairs += [("ptb_word", name) for name in ("sgd", "kfac_indep", "kfac_option1", "kfac_option2")]
    runs = [overrides(*pair, tiny_ptb) for pair in pairs]
    once = ["optimizer.inverse_share=0.5", "optimizer.refresh_delay=2"]
    runs += [[*overrides("ptb_word", "kfac_option2", tiny_ptb), "task.layer_norm=true", *once]]
    alone = trained(runs, ptb.PUBLISHED)
    for each in together(2, trained, runs, ptb.PUBLISHED):
        assert_equal(alone, each)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", sorted({*discovery.modules("optimizers")} - CHAOTIC))
def test_every_optimizer_is_the_same_on_three_processes_to_rounding(optimizer: str, tiny_ptb: Path) -> None:
    runs = [overrides(task, optimizer, tiny_ptb) for task in discovery.modules("tasks")]
    if optimizer.startswith("kfac"):
        runs += [[*run, "optimizer.inverse_share=0.34", "optimizer.refresh_delay=1"] for run in runs]
    alone = trained(runs, ptb.PUBLISHED)
    for each in together(3, trained, runs, ptb.PUBLISHED):
        assert_equal(alone, each)


def masks() -> torch.Tensor:
    run = config.compose([*TINY, "optimizer=sgd"])
    Session(run)
    return torch.rand(5)


def test_noise_is_different_on_every_process_and_on_the_first_that_of_a_process_alone() -> None:
    first, second = together(2, masks)
    assert torch.equal(first, masks())
    assert not torch.equal(first, second)


def with_dropout(run: list[str], published: Any) -> list[dict[str, torch.Tensor]]:
    """Where six updates lead without a stop and, with new sessions, after a stop in the middle."""
    ptb.PUBLISHED = published
    undisturbed, stopped = (Session(config.compose(run)) for _ in range(2))
    found = []
    for session in (undisturbed, stopped):
        torch.manual_seed(ranks.rank())  # both were made before either took a step
        for _ in range(3):
            session.step()
        if session is stopped:
            state = ranks.of_first(session.state_dict())
            session = Session(config.compose(run))
            session.load_state_dict(state)
        for _ in range(3):
            session.step()
        found.append(dict(session.model.state_dict()))
    return found


def test_a_run_with_dropout_goes_on_bit_for_bit_with_the_same_number_of_processes(tiny_ptb: Path) -> None:
    run = [*overrides("ptb_char", "kfac_option1", tiny_ptb), "task.dropout=0.4", "optimizer.inverse_share=0.5"]
    (undisturbed, stopped), (same, as_well) = together(2, with_dropout, run, ptb.PUBLISHED)
    for each in (stopped, same, as_well):
        torch.testing.assert_close(each, undisturbed, rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------------- real processes


LONG = [*TINY, "task.batch_size=6", "budget.updates=120", "budget.log_every=4", "budget.eval_every=40"]
LONG += ["optimizer=kfac_option1", *KFAC, "optimizer.inverse_share=0.4", "budget.checkpoint_every=7"]
LONG += ["optimizer.momentum=0", "optimizer.kl_clip=0.01"]  # a calm run: rounding grows little


def as_rank(rank: int, count: int, port: int) -> None:
    """What torchrun would set; in double precision."""
    torch.set_default_dtype(torch.float64)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in place.items()}, GLOO_SOCKET_IFNAME="lo")


def start(count: int, command: list[str], output: Path) -> list[BaseProcess]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outputs = [output.with_suffix(f".{rank}") for rank in range(count)]
    return [processes.start(command, outputs[rank], as_rank, rank, count, port) for rank in range(count)]


def finish(started: list[BaseProcess]) -> list[int | None]:
    for process in started:
        process.join(100)
        process.kill()
    return [process.exitcode for process in started]


def rows(folder: RunFolder) -> list[dict[str, float]]:
    names = ("update", "tokens", "train/nats", "valid/nats", "grad_norm", "step_size")
    return [{name: float(row[name] or -1) for name in names} for row in folder.metrics.rows()]


def test_a_killed_process_ends_all_with_one_line_and_the_run_goes_on_with_another_number(tmp_path: Path) -> None:
    command = ["train", *LONG, f"results={tmp_path}"]
    folder = Store(tmp_path).folder(config.compose(command[1:]))
    started = start(2, command, tmp_path / "two")
    processes.wait_for(lambda: len(rows(folder)) >= 3)
    started[1].kill()
    assert finish(started)[0] == 2
    said = "kfacrnn: another process of this run has ended; the same command goes on from its checkpoint"
    assert (tmp_path / "two.0").read_text().splitlines()[-1] == said
    assert folder.status()["state"] == "interrupted"

    started = start(3, command, tmp_path / "three")
    processes.wait_for(lambda: len(rows(folder)) >= 6)
    os.kill(started[2].pid or 0, signal.SIGTERM)  # one of them hears of it, all stop
    assert finish(started) == [130] * 3
    assert folder.status()["reason"] == "by SIGTERM"
    assert [(tmp_path / f"three.{rank}").read_text().count("interrupted") for rank in range(3)] == [1, 0, 0]
    stopped_at = folder.status()["update"]

    assert finish(start(1, command, tmp_path / "one")) == [0]
    sessions = folder.meta()["sessions"]
    assert [session["ranks"] for session in sessions] == [2, 3, 1]
    assert [session["hardware"].get("ranks") for session in sessions] == [2, 3, None]
    assert sessions[1]["from_update"] % 7 == 0
    assert sessions[2]["from_update"] == stopped_at
    with double_precision():
        undisturbed = train(config.compose([*LONG, f"results={tmp_path / 'undisturbed'}"]), "test")
    for row, expected in zip(rows(folder), rows(undisturbed), strict=True):
        assert row == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_torchrun_starts_a_run_and_starts_it_again_when_it_is_done(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "kfacrnn", "train", *TINY]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    for _ in range(2):
        ended = subprocess.run([*command, f"results={tmp_path}"], capture_output=True, text=True, env=environment)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.count("done at update 4") == 1
    (folder,) = Store(tmp_path)
    assert [session["ranks"] for session in folder.meta()["sessions"]] == [2]


# ----------------------------------------------------------------------------------------------------- README's example


def example() -> dict[str, torch.Tensor]:
    page = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    (model,) = re.findall(r"^```python\n(.*?)^optimizer = ", page, re.MULTILINE | re.DOTALL)
    (parallel,) = re.findall(r"^```py\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(model, names)
    rank = ranks.rank()
    names["batches"] = [torch.randint(20, (36, 8), generator=torch.Generator().manual_seed(rank)) for _ in range(3)]
    exec(parallel.replace("dist.init_process_group()\n", ""), names)
    return {name: p.detach() for name, p in names["model"].named_parameters()}


def test_the_example_for_several_processes_keeps_them_in_step() -> None:
    first, second = together(2, example)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.batch_size=4", "task.batch_size=4: cannot be shared equally by 3 processes"),
        ("device=cuda:1", "device=cuda:1: 3 processes need a device each; write device=cuda"),
    ],
)
def test_what_cannot_be_shared_out_is_one_line(
    override: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    run = config.compose([*TINY, "task.batch_size=6", override, f"results={tmp_path}"])
    with pytest.raises(UserError, match=f"^{message}$"):
        train(run, "test")


def test_how_inverses_are_shared_is_no_part_of_a_runs_identity() -> None:
    whole, half = (config.compose([*LONG, f"optimizer.inverse_share={share}"]) for share in (1, 0.5))
    assert whole.run_id == half.run_id
    assert "inverse_share" not in whole.scientific["optimizer"]
    assert not re.fullmatch(difference.SCIENCE, "optimizer.inverse_share")  # compare --diff pairs runs with and without
    assert re.fullmatch(difference.SCIENCE, "optimizer.refresh_delay")


def test_every_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert ranks.device("cuda", "fp32") == torch.device("cuda")
    for name, value in {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert ranks.device("cuda", "fp32") == torch.device("cuda:1") == chosen[-1]
    assert ranks.device("cpu", "fp32") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="device=cuda:2: torch finds 2 CUDA devices here"):
        ranks.device("cuda", "fp32")
