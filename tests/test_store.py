"""The results folder when processes die, files are cut, disks are full and two write at once."""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kfacrnn.drawing import write_files
from kfacrnn.errors import UserError
from kfacrnn.files import write_atomic
from kfacrnn.run import Budget
from kfacrnn.store import RunFolder, Store
from tests import processes


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, nothing more gets onto the disk."""

    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda: monkeypatch.setattr(os, "fsync", refuse)


def row(update: int, **values: Any) -> dict[str, Any]:
    return {"update": update, "train/nats": 0.1 * update, "memory_mb": 12.5, **values}


def checkpoint(update: int) -> dict[str, Any]:
    return {"update": update, "weights": torch.full((50,), float(update))}


def loaded(folder: RunFolder) -> int | None:
    state = folder.load_checkpoint()
    return None if state is None else state["update"]


# ---- atomic files ------------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_content_and_no_litter(tmp_path: Path, full_disk: Callable[[], None]) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    full_disk()
    with pytest.raises(UserError, match=f"cannot write {path}: No space left on device"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_process_killed_while_writing_leaves_the_old_content_and_the_next_writer_sweeps_up(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: Any) -> None:
        raise Killed

    folder.set_status("running", update=1, updates=9)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", die)
        with pytest.raises(Killed):
            folder.set_status("done", update=9, updates=9)
    assert folder.status()["state"] == "running"
    assert list(folder.path.glob("*.tmp"))
    with folder.writing():
        assert not list(folder.path.glob("*.tmp"))


@pytest.mark.parametrize("content", [b"", b"{", b"nu", b"null", b"[]", b"\xff", b'{"state": "done"}', b'{"update": 1}'])
def test_an_unreadable_status_reads_as_none_at_all(folder: RunFolder, content: bytes) -> None:
    (folder.path / "status.json").write_bytes(content)
    assert folder.status() == {}
    assert folder.state() is None


@pytest.mark.parametrize("rows", [[3, 5, 6, 7], [3, 5, 6], [3, 6, 7], [5, 6, 7], [3, 5, 5, 6, 7], [3, 6, 5, 7], []])
def test_a_run_that_is_done_and_has_other_rows_than_its_budget_makes_is_cut(folder: RunFolder, rows: list[int]) -> None:
    budget = Budget(name="", updates=7, log_every=3, eval_every=5, checkpoint_every=1)
    for update in rows:
        folder.metrics.append(row(update))
    folder.set_status("running", update=7, updates=7)
    assert not folder.is_cut(budget)
    folder.set_status("done", update=7, updates=7)
    assert folder.is_cut(budget) is (rows != [3, 5, 6, 7])


# ---- checkpoints -------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, halve, empty, Path.unlink])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_then_to_the_start(
    folder: RunFolder, damage: Callable[[Path], None]
) -> None:
    assert loaded(folder) is None
    for update in (10, 20, 30):
        folder.save_checkpoint(checkpoint(update))
    assert loaded(folder) == 30
    damage(folder.path / "checkpoint.pt")
    assert loaded(folder) == 20
    damage(folder.path / "checkpoint.old.pt")
    assert loaded(folder) is None


def test_a_full_disk_keeps_the_last_checkpoint(folder: RunFolder, full_disk: Callable[[], None]) -> None:
    folder.save_checkpoint(checkpoint(10))
    folder.save_checkpoint(checkpoint(20))
    full_disk()
    for _ in range(3):  # however often it is tried
        with pytest.raises(UserError, match="No space left on device"):
            folder.save_checkpoint(checkpoint(30))
    assert loaded(folder) == 20


def test_a_damaged_checkpoint_never_replaces_a_whole_one(folder: RunFolder, full_disk: Callable[[], None]) -> None:
    folder.save_checkpoint(checkpoint(10))
    folder.save_checkpoint(checkpoint(20))
    halve(folder.path / "checkpoint.pt")
    assert loaded(folder) == 10  # the run goes on from here
    full_disk()
    with pytest.raises(UserError):
        folder.save_checkpoint(checkpoint(15))
    assert loaded(folder) == 10


def test_a_checkpoint_whose_rows_are_lost_is_not_used(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.metrics.truncate(0)
    for update in (10, 20):
        folder.metrics.append(row(update))
        folder.save_checkpoint(checkpoint(update))
    path = folder.path / "metrics.csv"
    path.write_bytes(path.read_bytes()[:-1])
    assert loaded(folder) == 10
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"kfacrnn: {folder.path / 'checkpoint.pt'} has lost rows of metrics.csv and is not used"
    path.unlink()
    assert loaded(folder) is None


def test_the_rows_are_on_the_disk_before_the_checkpoint_that_counts_them(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(Path(f"/proc/self/fd/{number}").resolve().name))
    folder.save_checkpoint(checkpoint(0))  # before there are any
    folder.metrics.append(row(1))
    folder.save_checkpoint(checkpoint(1))
    temporary = f"checkpoint.pt.{os.getpid()}.tmp"
    assert synced == [temporary, "metrics.csv", temporary]


class Bomb:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("owned"),)


@pytest.mark.parametrize("content", [{"update": 1, "model": Bomb()}, [1, 2], {"updates": 1}, {"update": "1"}])
def test_a_made_up_checkpoint_with_a_sum_to_match_is_not_used_and_runs_nothing(
    folder: RunFolder, content: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.path)
    folder.save_checkpoint(checkpoint(10))
    folder.save_checkpoint(checkpoint(20))
    buffer = io.BytesIO()
    torch.save(content, buffer)
    made_up = hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue()
    (folder.path / "checkpoint.pt").write_bytes(made_up)
    assert loaded(folder) == 10
    assert not (folder.path / "owned").exists()


def test_a_disk_that_has_become_read_only_is_one_line(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.save_checkpoint(checkpoint(10))

    def refuse(*_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(UserError, match=r"cannot write .*checkpoint\.pt: Read-only file system"):
        folder.save_checkpoint(checkpoint(20))
    assert loaded(folder) == 10


# ---- one writer --------------------------------------------------------------------------------------------------


def hold(path: Path) -> None:
    """Writes as a run does, until it is killed."""
    folder = RunFolder(path)
    with folder.writing():
        folder.set_status("running", update=3, updates=9)
        processes.wait_for(lambda: False, 60)


def test_a_second_writer_is_refused_and_a_dead_one_reads_as_interrupted(folder: RunFolder) -> None:
    other = processes.CONTEXT.Process(target=hold, args=(folder.path,))
    other.start()
    processes.wait_for(lambda: folder.status())
    assert folder.state() == "running"
    with (
        pytest.raises(UserError, match=f"^run {folder.run_id} is being written by process {other.pid}$"),
        folder.writing(),
    ):
        pytest.fail("two writers")
    other.kill()
    other.join()
    assert folder.status()["state"] == "running"
    assert folder.state() == "interrupted"
    with folder.writing():
        pass


@pytest.mark.parametrize("state", ["done", "diverged", "failed", "interrupted"])
def test_states_that_were_written_are_read_back(folder: RunFolder, state: str) -> None:
    assert folder.state() is None
    folder.set_status(state, update=1, updates=2, reason="why")
    assert (folder.state(), folder.status()["reason"]) == (state, "why")


@pytest.mark.parametrize("results", ["/proc/x", "a_file", "n" * 300])
def test_a_folder_that_cannot_be_made_is_one_line_with_a_remedy(results: str, tmp_path: Path) -> None:
    (tmp_path / "a_file").write_text("")
    expected = pytest.raises(UserError, match=r"^cannot write results=.*; choose another with results=DIR$")
    with expected, RunFolder(tmp_path / results / "run").writing():
        pytest.fail("made")


def test_the_store_finds_the_runs_that_have_begun(tmp_path: Path) -> None:
    for name in ("b", "a"):
        path = tmp_path / "runs" / "task" / "optimizer" / name
        path.mkdir(parents=True)
        (path / "config.yaml").write_text("{}")
    (tmp_path / "runs" / "task" / "optimizer" / "not-begun").mkdir()
    assert [found.run_id for found in Store(tmp_path)] == ["a", "b"]


def test_what_is_drawn_into_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a_file").write_text("")
    with pytest.raises(UserError, match=r"^cannot write .*a_file/page: File exists$"):
        write_files({"md": b""}, tmp_path / "a_file" / "page")
