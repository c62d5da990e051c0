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

import csv
import hashlib
import io
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kfacrnn.discovery import command, place
from kfacrnn.errors import UserError, first_line

if TYPE_CHECKING:
    from kfacrnn.config import Budget

SCHEMA_VERSION = 1
STATES = ("running", "done", "diverged", "failed", "interrupted")
FINISHED = ("done", "diverged")
FINAL, BEST = "model.pt", "best.pt"
COLUMNS = (
    "update", "epoch", "tokens",
    "time_train_s", "time_eval_s", "time_wall_s", "cpu_s",
    "train/nats", "train/metric", "valid/nats", "valid/metric",
    "lr", "step_size", "grad_norm", "damping", "staleness", "updates_per_s", "memory_mb",
)  # fmt: skip
CUT = "metrics.csv lacks rows or repeats some"
TAIL = 4096  # bytes; several rows
DIGITS = 10  # of the greatest number of updates


@contextmanager
def _explained(path: Path, hint: str = "") -> Iterator[None]:
    """What the file system refuses becomes one line, which may end in a hint."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}{hint and f'; {hint}'}") from error


def make_folder_of(path: Path, hint: str = "") -> None:
    """Makes the folder that a file is to be in, if there is none. Raises `UserError`."""
    with _explained(path, hint):
        path.parent.mkdir(parents=True, exist_ok=True)


def write_atomic(path: Path, content: bytes) -> None:
    """Either the old content or the new one is there, whatever happens."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with _explained(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, content: Any) -> None:
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())


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


class Stamp(NamedTuple):
    """What tells that a file was changed."""

    size: int = 0
    modified: int = 0  # ns


def _stamp(path: Path) -> Stamp:
    """Of no file, zeros."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return Stamp()
    return Stamp(found.st_size, found.st_mtime_ns)


def _update(line: str) -> int | None:
    """Of a row of metrics.csv; None for a line that is none."""
    first = line.partition(",")[0]
    is_row = line.count(",") == len(COLUMNS) - 1 and len(first) <= DIGITS and first.isascii() and first.isdigit()
    return int(first) if is_row else None


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path):
        self.path = path
        self._rows: int | None = None  # in metrics.csv, and what the file was like then: known to who writes it
        self._stamp = Stamp()

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
            with _explained(self.path):
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

    def append(self, row: dict[str, Any]) -> None:
        """Adds one row to metrics.csv; floats are written so that they read back exactly. Raises `UserError` if
        somebody else has changed the file since this process wrote it."""
        line = io.StringIO()
        writer = csv.writer(line, lineterminator="\n")
        path = self.path / "metrics.csv"
        with _explained(path):
            found = _stamp(path)
            if self._rows is not None and found != self._stamp:
                raise UserError(f"{path} was changed by somebody else; the same command continues the run")
            if not found.size:
                writer.writerow(COLUMNS)
            writer.writerow(["" if row.get(name) is None else row[name] for name in COLUMNS])
            with path.open("a", newline="") as file:
                file.write(line.getvalue())
            self._stamp = _stamp(path)
        self._rows = None if self._rows is None else self._rows + 1

    def _lines(self) -> Iterator[tuple[int, str]]:
        """The complete rows of metrics.csv as they are written there, each with its update. A torn last line is none;
        no cell has quotes."""
        try:
            file = (self.path / "metrics.csv").open(errors="replace", newline="\n")
        except OSError:
            return
        with file:
            for line in file:
                update = _update(line) if line.endswith("\n") else None
                if update is not None:
                    yield update, line[:-1]

    def rows(self) -> list[dict[str, str]]:
        """The complete rows of metrics.csv as text."""
        return [dict(zip(COLUMNS, line.split(","), strict=True)) for _, line in self._lines()]

    def numbers(self) -> Iterator[dict[str, float]]:
        """The rows as numbers, without their empty cells. Raises `UserError` for a cell that is no number."""
        for row in self.rows():
            yield self._numbers(row)

    def _numbers(self, row: dict[str, str]) -> dict[str, float]:
        return {name: self._number(row["update"], name, cell) for name, cell in row.items() if cell}

    def _number(self, update: int | str, name: str, cell: str) -> float:
        try:
            return float(cell)
        except ValueError as error:
            where = f"{self.path / 'metrics.csv'}, update {update}: {name}"
            raise UserError(f"{where} is no number: {cell!r}; delete {self.path} to have it made again") from error

    def columns(self, names: Sequence[str]) -> dict[str, list[float]]:
        """Columns of metrics.csv as numbers, NaN for an empty cell. Raises `UserError` for a cell that is no number."""
        places = {name: COLUMNS.index(name) for name in names}
        last = max(places.values(), default=0) + 1  # there is no need to split further
        rows = [line.split(",", last) for _, line in self._lines()]
        try:
            return {name: [float(cells[place] or "nan") for cells in rows] for name, place in places.items()}
        except ValueError:
            for cells in rows:
                for name, place in places.items():
                    self._number(cells[0], name, cells[place] or "nan")
            raise

    def last_row(self) -> dict[str, float] | None:
        """The last of `numbers`, without reading the others."""
        try:
            with (self.path / "metrics.csv").open("rb") as file:
                begin = max(0, file.seek(0, os.SEEK_END) - TAIL)
                file.seek(begin)
                *whole, _ = file.read().decode(errors="replace").split("\n")
        except OSError:
            return None
        lines = reversed(whole[1 if begin else 0 :])
        found = next((line for line in lines if _update(line) is not None), None)
        if found is None:  # nothing yet, or more garbage than that
            *_, found = [None, *(line for _, line in self._lines())]
        return None if found is None else self._numbers(dict(zip(COLUMNS, found.split(","), strict=True)))

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
        return status["update"] != budget.updates or [update for update, _ in self._lines()] != budget.log_points

    def truncate(self, update: int) -> None:
        """Drops the rows after `update`: they will be made again."""
        kept = [line for made, line in self._lines() if made <= update]
        content = "".join(f"{line}\n" for line in (",".join(COLUMNS), *kept))
        write_atomic(self.path / "metrics.csv", content.encode())
        self._rows, self._stamp = len(kept), _stamp(self.path / "metrics.csv")

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Writes a checkpoint with its SHA-256 and keeps the one before it. The rows that it counts are on the disk
        before it is: a power cut must not take them alone."""
        import torch

        buffer = io.BytesIO()
        torch.save(state | {"rows": self._rows}, buffer)
        content = buffer.getbuffer()
        newest, older = self.path / "checkpoint.pt", self.path / "checkpoint.old.pt"
        rows = self.path / "metrics.csv"
        with _explained(rows):
            if rows.exists():
                with rows.open("rb+") as file:
                    os.fsync(file.fileno())
        with _explained(newest):
            if newest.exists():
                newest.replace(older)
        write_atomic(newest, hashlib.sha256(content).digest() + content)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The newest checkpoint that is whole and whose rows are all in metrics.csv, or None. Removes the others, lest
        they replace a whole one, and says so."""
        updates = [update for update, _ in self._lines()]
        for name in ("checkpoint.pt", "checkpoint.old.pt"):
            path = self.path / name
            with _explained(path):
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
        with _explained(self.path / name):
            (self.path / name).unlink(missing_ok=True)

    def drop_checkpoints(self) -> None:
        """After the end: what was only needed to continue."""
        for path in (self.path / "checkpoint.pt", self.path / "checkpoint.old.pt"):
            with _explained(path):
                if path.exists():  # else a finished run in a folder that cannot be written would be an error
                    path.unlink(missing_ok=True)


class Store:
    """All runs below a results folder."""

    def __init__(self, results: str | Path):
        self.root = place(results)

    def folder(self, run: Any) -> RunFolder:
        """Where a `kfacrnn.config.Run` lives, whether or not it has been started."""
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
