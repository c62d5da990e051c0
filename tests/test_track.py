"""The W&B mirror with the real client, offline; nothing here reaches a network."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kfacrnn import config, track
from kfacrnn.errors import UserError
from kfacrnn.store import RunFolder, Store
from tests import processes
from tests.synthetic import TINY

pytest.importorskip("wandb")

MIRRORED = [*TINY, "budget.updates=6", "budget.log_every=2", "budget.checkpoint_every=2", "tracker=wandb"]


@pytest.fixture(autouse=True)
def private_and_quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B neither reads a user's settings nor reports anything, and its server is a port where nobody listens."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    environment = {"WANDB_ERROR_REPORTING": "false", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    folders = {f"WANDB_{kind}_DIR": str(tmp_path / "private") for kind in ("CONFIG", "CACHE", "DATA")}
    for name, value in (environment | folders).items():
        monkeypatch.setenv(name, value)


def environ(values: dict[str, str]) -> None:
    """The fork server is older than a test's environment."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    os.environ.update(values)


def settings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}


def folder_of(results: Path) -> RunFolder:
    return Store(results).folder(config.compose([*MIRRORED, f"results={results}"]))


def records(folder: RunFolder) -> list[dict[str, Any]]:
    """What the files of offline runs hold, oldest first, as W&B's own tool reads them."""
    found = []
    for file in sorted((folder.path / "wandb").glob("offline-run-*/*.wandb")):
        command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", file]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found.append([json.loads(line) for line in said.splitlines()])
    return [record for file_records in found for record in file_records]


def of_type(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record[kind] for record in records if record["type"] == kind]


def is_running(pid: int) -> bool:
    """Whether a W&B service of that process is left."""
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = command.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"wandb-core" in words[0] and str(pid).encode() in words:
            return True
    return False


def test_an_offline_run_holds_identity_configuration_and_every_row(tmp_path: Path) -> None:
    process = processes.start(["train", *MIRRORED, f"results={tmp_path}"], tmp_path / "output.txt", environ, settings())
    process.join(120)
    assert process.exitcode == 0
    folder = folder_of(tmp_path)
    found = records(folder)
    (begun,) = of_type(found, "run")
    assert begun["run_id"] == folder.run_id
    assert begun["project"] == "kfacrnn"
    assert begun["config"]["update"]["optimizer"]["lr"] == 0.003
    assert begun["config"]["update"]["run_id"] == folder.run_id
    rows, logged = folder.metrics.rows(), [record["item"] for record in of_type(found, "history")]
    assert [int(row["update"]) for row in rows] == [2, 4, 6]
    assert len(logged) == 3
    for row, item in zip(rows, logged, strict=True):
        assert {name: float(value) for name, value in row.items() if value} == {
            name: value for name, value in item.items() if not name.startswith("_")
        }
        assert item["_step"] == int(row["update"])
    assert process.pid is not None
    assert not is_running(process.pid)
    assert (tmp_path / "output.txt").read_text().count("\n") == 2  # progress and end: W&B keeps silent


def test_a_resumed_run_goes_on_under_the_same_identity_and_has_every_row(tmp_path: Path) -> None:
    command = ["train", *MIRRORED, "budget.updates=300", "budget.checkpoint_every=20", f"results={tmp_path}"]
    folder = Store(tmp_path).folder(config.compose(command[1:]))
    process = processes.start(command, None, environ, settings())
    processes.wait_for(lambda: len(folder.metrics.rows()) > 15)
    process.kill()
    process.join()
    assert processes.run(command, tmp_path / "output.txt", environ, settings())[0] == 0
    found = records(folder)
    assert {run["run_id"] for run in of_type(found, "run")} == {folder.run_id}
    resumed_from = folder.meta()["sessions"][-1]["from_update"]
    assert resumed_from >= 20
    updates = [record["item"]["update"] for record in of_type(found, "history")]
    everything = [int(row["update"]) for row in folder.metrics.rows()]
    assert updates[-len(everything) :] == everything  # also what the killed process had not yet written


def impatient(values: dict[str, str]) -> None:
    environ(values)
    track.INIT_TIMEOUT = 2.0


@pytest.mark.parametrize("key", ["0" * 40, None], ids=["with a key", "without a key"])
def test_online_without_a_network_says_so_once_and_goes_on_offline(
    key: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if key is None:
        monkeypatch.delenv("WANDB_API_KEY")
        monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    command = ["train", *MIRRORED, "tracker.mode=online", f"results={tmp_path}"]
    code, said = processes.run(command, tmp_path / "output.txt", impatient, settings())
    assert code == 0
    assert [line for line in said if "W&B" in line and line.endswith("; going on offline")] == said[:1]
    assert len(said) == 3
    folder = folder_of(tmp_path)
    assert folder.state() == "done"
    assert len(of_type(records(folder), "history")) == 3


def without_service(values: dict[str, str]) -> None:
    """Kills the W&B service after the first row."""
    environ(values)
    log = track.WandB.log

    def log_and_kill(mirror: track.WandB, row: dict[str, Any]) -> None:
        log(mirror, row)
        if row["update"] == 2:
            for command in Path("/proc").glob("[0-9]*/cmdline"):
                words = command.read_bytes().split(b"\0")
                if b"wandb-core" in words[0] and str(os.getpid()).encode() in words:
                    os.kill(int(command.parent.name), 9)

    track.WandB.log = log_and_kill  # type: ignore[method-assign]


def test_a_service_that_dies_does_not_take_the_run_with_it(tmp_path: Path) -> None:
    command = ["train", *MIRRORED, "budget.updates=40", f"results={tmp_path}"]
    code, said = processes.run(command, tmp_path / "output.txt", without_service, settings())
    assert code == 0
    assert sum("W&B has stopped" in line and "the run goes on without it" in line for line in said) == 1
    assert [folder.state() for folder in Store(tmp_path)] == ["done"]


def test_without_wandb_it_is_one_line_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def without_wandb(name: str, *arguments: Any, **options: Any) -> Any:
        if name.split(".")[0] == "wandb":
            raise ModuleNotFoundError("No module named 'wandb'", name="wandb")
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_wandb)
    run = config.compose([*MIRRORED, f"results={tmp_path}"])
    with pytest.raises(UserError, match=r"^tracker=wandb: .* pip install 'kfacrnn\[wandb\]'$"):
        track.check(run)
    assert type(track.open_mirror(config.compose(TINY), tmp_path)) is track.Nobody


def test_a_mirror_that_cannot_be_opened_leaves_a_run_that_the_next_sweep_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kfacrnn import train

    def refuse(*_: Any) -> None:
        raise UserError("tracker=wandb: not installed")

    monkeypatch.setattr(train, "open_mirror", refuse)
    run = config.compose([*MIRRORED, f"results={tmp_path}"])
    with pytest.raises(UserError):
        train.train(run, "test")
    assert Store(tmp_path).folder(run).state() == "interrupted"
