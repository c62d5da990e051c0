"""The results folder: the source of truth for every run.

    results/runs/<task>/<optimizer>/<run_id>/
        config.yaml     resolved configuration
        meta.json       commit, versions, hardware, command, data checksums
        metrics.csv     one row per log point; a torn last line is dropped on reading
        status.json     running | done | diverged | failed | interrupted, with a heartbeat
        checkpoint.pt   everything needed to continue as if never stopped; checkpoint.old.pt is the one before
        model.pt        final parameters; best.pt, those of the least validation loss, if that was before the end

What is replaced is replaced atomically, what grows is flushed line by line, and one process at a time may write. What
somebody else has cut, deleted or filled with garbage is noticed, said, and never taken for a result.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfacrnn.discovery import command, place
from kfacrnn.errors import UserError, first_line
from kfacrnn.files import explained, write_atomic, write_json
from kfacrnn.metrics import Metrics

if TYPE_CHECKING:
    from kfacrnn.run import Budget

SCHEMA_VERSION = 1
STATES = ("running", "done", "diverged", "failed", "interrupted")
FINISHED = ("done", "diverged")
FINAL, BEST = "model.pt", "best.pt"
CHECKPOINTS = ("checkpoint.pt", "checkpoint.old.pt")  # newest first
CUT = "metrics.csv lacks rows or repeats some"


def _unpacked(content: bytes) -> dict[str, Any] | None:
    """The state in a checkpoint; None where it is not what was written. Nothing in it is ever run: `weights_only`."""
    import torch

    if hashlib.sha256(content[32:]).digest() != content[:32]:
        return None
    try:
        state = torch.load(io.BytesIO(content[32:]), map_location="cpu", weights_only=True)
    except Exception:  # a file that was made up, with a sum to match: torch's errors have no common ancestor but this
        return None
    return state if isinstance(state, dict) and isinstance(state.get("update"), int) else None


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path):
        self.path = path
        self.metrics = Metrics(path)

    @property
    def run_id(self) -> str:
        return self.path.name

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Makes the folder and keeps other writers out. The lock is the process's own: it ends with the process."""
        from filelock import FileLock, Timeout

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / "run.lock")
            lock.acquire(timeout=1)  # who asks for the state of a run holds its lock for a moment
        except OSError as error:
            if isinstance(error, Timeout):
                raise UserError(f"run {self.run_id} is being written by process {self.status().get('pid')}") from error
            raise UserError(
                f"cannot write results={self.path}: {error.strerror}; choose another with results=DIR"
            ) from error
        try:
            with explained(self.path):
                for leftover in self.path.glob("*.tmp"):
                    leftover.unlink()
            yield
        finally:
            lock.release()

    def state(self) -> str | None:
        """One of `STATES`, None if nothing has happened; a run whose process died without a word is `interrupted`."""
        state = self.status().get("state")
        return "interrupted" if state == "running" and not self._is_locked() else state

    def _is_locked(self) -> bool:
        from filelock import FileLock, Timeout

        try:
            with FileLock(self.path / "run.lock", timeout=0):
                return False
        except Timeout:
            return True
        except OSError:  # nobody is to wait for what cannot be known; whoever wants to write is told so
            return False

    def status(self) -> dict[str, Any]:
        """status.json; nothing where it is not there, or not whole."""
        status = self.read_json("status.json")
        counts = all(isinstance(status.get(key), int) for key in ("update", "updates"))
        return status if counts and status.get("state") in STATES else {}

    def meta(self) -> dict[str, Any]:
        return self.read_json("meta.json")

    def read_json(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.path / name).read_text())
        except (OSError, ValueError):  # of JSON, and of UTF-8
            return {}
        return content if isinstance(content, dict) else {}

    def set_status(self, state: str, *, update: int, updates: int, reason: str = "") -> None:
        assert state in STATES
        here = {"pid": os.getpid(), "host": socket.gethostname(), "heartbeat": time.time()}
        write_json(
            self.path / "status.json", {"state": state, "update": update, "updates": updates, "reason": reason, **here}
        )

    def describe(self, config: str, meta: dict[str, Any]) -> None:
        """Writes config.yaml and meta.json: as a session starts and, lest they were lost meanwhile, as it ends."""
        write_atomic(self.path / "config.yaml", config.encode())
        write_json(self.path / "meta.json", meta)

    def task(self) -> dict[str, Any]:
        """What meta.json says of the task. Raises `UserError` where it says nothing."""
        meta = self.meta()
        if "task" not in meta:
            raise UserError(f"run {self.run_id}: meta.json lacks its task; delete {self.path} to have it made again")
        return meta["task"]

    def is_cut(self, budget: Budget) -> bool:
        """Whether a run that is done has not the rows that its budget makes: somebody has changed metrics.csv since."""
        status = self.status()
        if status.get("state") != "done":
            return False
        return status["update"] != budget.updates or self.metrics.updates() != budget.log_points

    @property
    def _checkpoints(self) -> list[Path]:
        return [self.path / name for name in CHECKPOINTS]

    @property
    def checkpoint(self) -> Path:
        """The newest that there is: after `load_checkpoint`, the one that was loaded."""
        return next((path for path in self._checkpoints if path.exists()), self._checkpoints[0])

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Writes a checkpoint with its SHA-256 and keeps the one before it. The rows that it counts are on the disk
        before it is: a power cut must not take them alone."""
        import torch

        buffer = io.BytesIO()
        torch.save(state | {"rows": self.metrics.sync()}, buffer)
        content = buffer.getbuffer()
        newest, older = self._checkpoints
        with explained(newest):
            if newest.exists():
                newest.replace(older)
        write_atomic(newest, hashlib.sha256(content).digest() + content)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The newest checkpoint that is whole and whose rows are all in metrics.csv, or None. Removes the others, lest
        they replace a whole one, and says so."""
        updates = self.metrics.updates()
        for path in self._checkpoints:
            with explained(path):
                if path.exists():
                    state = _unpacked(path.read_bytes())
                    if state is None:
                        problem = "is damaged"
                    elif state.get("rows") not in (None, sum(update <= state["update"] for update in updates)):
                        problem = "has lost rows of metrics.csv"
                    else:
                        return state
                    print(f"kfacrnn: {path} {problem} and is not used", file=sys.stderr)
                    path.unlink()
        return None

    def save_model(self, parameters: dict[str, Any], name: str = FINAL) -> None:
        import torch

        buffer = io.BytesIO()
        torch.save(parameters, buffer)
        write_atomic(self.path / name, buffer.getvalue())

    def load_model(self, name: str) -> dict[str, Any]:
        """Raises `UserError` where there is none, or what is there holds no parameters."""
        import torch

        path = self.path / name
        try:
            parameters = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise UserError(f"there is no {path}") from error
        except Exception as error:  # as for a checkpoint
            raise UserError(f"{path}: holds no parameters ({first_line(error)})") from error
        if not isinstance(parameters, dict):
            raise UserError(f"{path}: holds no parameters")
        return parameters

    def drop_model(self, name: str) -> None:
        with explained(self.path / name):
            (self.path / name).unlink(missing_ok=True)

    def drop_checkpoints(self) -> None:
        """After the end: what was only needed to continue."""
        for path in self._checkpoints:
            with explained(path):
                if path.exists():  # else a finished run in a folder that cannot be written would be an error
                    path.unlink(missing_ok=True)


class Store:
    """All runs below a results folder."""

    def __init__(self, results: str | Path):
        self.root = place(results)

    def folder(self, run: Any) -> RunFolder:
        """Where a `kfacrnn.run.Run` lives, whether or not it has been started."""
        return RunFolder(self.root / "runs" / run.task.name / run.optimizer.name / run.run_id)

    def find(self, name: str) -> RunFolder:
        """The run whose identity begins with `name`. Raises `UserError` unless there is one."""
        found = [folder for folder in self if folder.run_id.startswith(name)]
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"{name}: {len(found)} runs in {self.root} begin so, such as {found[0].run_id}")
        shown = command("list", "runs", results=self.root)
        raise UserError(f"{name}: no run in {self.root} begins so; {shown} shows what there is")

    def __iter__(self) -> Iterator[RunFolder]:
        for path in sorted((self.root / "runs").glob("*/*/*/config.yaml")):
            yield RunFolder(path.parent)
