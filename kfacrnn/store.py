"""The results folder: the source of truth for every run.

    results/runs/<task>/<optimizer>/<run_id>/
        config.yaml     resolved configuration
        meta.json       commit, versions, hardware, command, data checksums
        metrics.csv     one row per log point; a torn last line is dropped on reading
        status.json     running | done | diverged | failed | interrupted, with a heartbeat
        checkpoint.pt   everything needed to continue as if never stopped; checkpoint.old.pt is the one before
        model.pt        final parameters

What is replaced is replaced atomically, what grows is flushed line by line, and one process at a time may write.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kfacrnn.errors import UserError

SCHEMA_VERSION = 1
STATES = ("running", "done", "diverged", "failed", "interrupted")
FINISHED = ("done", "diverged")
COLUMNS = (
    "update", "epoch", "tokens",
    "time_train_s", "time_eval_s", "time_wall_s", "cpu_s",
    "train/nats", "train/metric", "valid/nats", "valid/metric",
    "lr", "step_size", "grad_norm", "damping", "staleness", "updates_per_s", "memory_mb",
)  # fmt: skip


def write_atomic(path: Path, content: bytes) -> None:
    """Either the old content or the new one is there, whatever happens."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def write_json(path: Path, content: Any) -> None:
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path):
        self.path = path

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
        except (Timeout, OSError):
            return True

    def status(self) -> dict[str, Any]:
        return self._read_json("status.json")

    def meta(self) -> dict[str, Any]:
        return self._read_json("meta.json")

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self.path / name).read_text())
        except (OSError, json.JSONDecodeError):
            return {}

    def set_status(self, state: str, *, update: int, updates: int, reason: str = "") -> None:
        assert state in STATES
        here = {"pid": os.getpid(), "host": socket.gethostname(), "heartbeat": time.time()}
        write_json(
            self.path / "status.json", {"state": state, "update": update, "updates": updates, "reason": reason, **here}
        )

    def describe(self, config: str, meta: dict[str, Any]) -> None:
        """Writes config.yaml and, at the start of a session, meta.json."""
        write_atomic(self.path / "config.yaml", config.encode())
        write_json(self.path / "meta.json", meta)

    def end_session(self, end: str, ledger: dict[str, Any]) -> None:
        meta = self.meta()
        meta["sessions"][-1]["end"] = end
        write_json(self.path / "meta.json", {**meta, "ledger": ledger})

    def append(self, row: dict[str, Any]) -> None:
        """Adds one row to metrics.csv; floats are written so that they read back exactly."""
        line = io.StringIO()
        writer = csv.writer(line, lineterminator="\n")
        path = self.path / "metrics.csv"
        if not path.exists():
            writer.writerow(COLUMNS)
        writer.writerow(["" if row.get(name) is None else row[name] for name in COLUMNS])
        try:
            with path.open("a", newline="") as file:
                file.write(line.getvalue())
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error

    def rows(self) -> list[dict[str, str]]:
        """The complete rows of metrics.csv as text."""
        try:
            text = (self.path / "metrics.csv").read_text()
        except OSError:
            return []
        whole = text[: text.rfind("\n") + 1]
        return [row for row in csv.DictReader(io.StringIO(whole)) if row["memory_mb"] is not None]

    def truncate(self, update: int) -> None:
        """Drops the rows after `update`: they will be made again."""
        kept = [row for row in self.rows() if int(row["update"]) <= update]
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(kept)
        write_atomic(self.path / "metrics.csv", text.getvalue().encode())

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Writes a checkpoint with its SHA-256 and keeps the one before it."""
        import torch

        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getbuffer()
        newest, older = self.path / "checkpoint.pt", self.path / "checkpoint.old.pt"
        if newest.exists():
            newest.replace(older)
        write_atomic(newest, hashlib.sha256(content).digest() + content)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The newest checkpoint that is whole, or None. Removes damaged ones, lest they replace a whole one."""
        import torch

        for name in ("checkpoint.pt", "checkpoint.old.pt"):
            path = self.path / name
            if path.exists():
                content = path.read_bytes()
                if hashlib.sha256(content[32:]).digest() == content[:32]:
                    return torch.load(io.BytesIO(content[32:]), map_location="cpu", weights_only=True)
                path.unlink()
        return None

    def save_model(self, parameters: dict[str, Any]) -> None:
        import torch

        buffer = io.BytesIO()
        torch.save(parameters, buffer)
        write_atomic(self.path / "model.pt", buffer.getvalue())

    def drop_checkpoints(self) -> None:
        """After the end: what was only needed to continue."""
        for name in ("checkpoint.pt", "checkpoint.old.pt"):
            (self.path / name).unlink(missing_ok=True)


class Store:
    """All runs below a results folder."""

    def __init__(self, results: str | Path):
        self.root = Path(results).expanduser()

    def folder(self, run: Any) -> RunFolder:
        """Where a `kfacrnn.config.Run` lives, whether or not it has been started."""
        return RunFolder(self.root / "runs" / run.task.name / run.optimizer.name / run.run_id)

    def __iter__(self) -> Iterator[RunFolder]:
        for path in sorted((self.root / "runs").glob("*/*/*/config.yaml")):
            yield RunFolder(path.parent)
