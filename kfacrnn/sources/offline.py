"""Offline W&B runs: the `.wandb` files below a folder, through W&B's own reader, `wandb leet inspect --json`.

A file is one session. A session that went on from a checkpoint (`from_update` in the mirrored meta.json) continues the
one before it, whose later rows were made again; any other session is a run of its own, and of those with the same
identity the one that got furthest counts. What a file lacks at its end or in its middle is said, never guessed.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kfacrnn import track
from kfacrnn.errors import UserError
from kfacrnn.provenance import cores
from kfacrnn.sources import Source
from kfacrnn.sources.copies import Copy, NotOurs, cache, remove, stamp_of
from kfacrnn.store import FINISHED, RunFolder

TORN = "reached the end of an incomplete .wandb file"
NO_END = "the file has no end: its writer was killed, or still writes"


@dataclass
class Session:
    """What one file holds. `started` is W&B's own time; `ended` whether the writer said goodbye."""

    file: Path
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    started: str = ""
    ended: bool = False
    complaint: str = ""

    @property
    def from_update(self) -> int:
        """Where it went on from; 0 for a session that began at the beginning, or does not say."""
        sessions = self.config.get("meta", {}).get("sessions") or [{}]
        return int(sessions[-1].get("from_update", 0))


def read(name: str, folder: Path, *, refresh: bool = False) -> Source:
    """The runs whose files are anywhere below `folder`; files that have not changed are not read again."""
    if not folder.is_dir():
        raise UserError(f"{name}: {folder} is no folder")
    files: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*.wandb")):
        files.setdefault(file.stem.removeprefix("run-"), []).append(file)
    if not files:
        raise UserError(f"{name}: there is no .wandb file below {folder}")
    store = cache("offline", hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16])
    known: dict[str, list[RunFolder]] = {}
    for found in store:
        known.setdefault(found.run_id, []).append(found)
    notes: list[str] = []
    changed: dict[str, list[Path]] = {}
    sizes = {run_id: _sizes(of_run) for run_id, of_run in files.items()}  # before reading: a file may grow meanwhile
    for run_id, of_run in files.items():
        stamp = stamp_of(known[run_id][0]) if run_id in known else {}
        if refresh or stamp.get("files") != sizes[run_id]:
            changed[run_id] = of_run
        else:
            notes += stamp["notes"]
    for run_id, copies in known.items():
        if run_id not in files or run_id in changed:
            for old in copies:
                remove(old)
    track.client()
    with ThreadPoolExecutor(cores()) as pool:
        every = [file for of_run in changed.values() for file in of_run]
        sessions = dict(zip(every, pool.map(_session, every), strict=True))
    for run_id, of_run in changed.items():
        copy, said = _merged(run_id, [sessions[file] for file in of_run])
        notes += said
        if copy is not None:
            copy.write(store, {"files": sizes[run_id], "notes": said})
    return Source(name, store, notes, copied=True)


def _sizes(files: Sequence[Path]) -> dict[str, list[int]]:
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def _session(file: Path) -> Session:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"wandb leet inspect cannot read {file}: {said[-1]}")
    session = Session(file)
    for record in map(json.loads, done.stdout.splitlines()):
        _take(session, record)
    complaint = " ".join(done.stderr.split()).removeprefix("wandb leet inspect: ")
    session.complaint = NO_END if TORN in complaint else complaint
    return session


def _take(session: Session, record: Mapping[str, Any]) -> None:
    content = record.get(record["type"], {})
    match record["type"]:
        case "run":
            session.started = session.started or content.get("start_time", "")
            session.config.update(content.get("config", {}).get("update", {}))
        case "config":
            session.config.update(content.get("update", {}))
        case "summary":
            session.summary.update(content.get("update", {}))
        case "history":
            session.rows.append(content["item"])
        case "exit":
            session.ended = True


def _merged(run_id: str, sessions: Sequence[Session]) -> tuple[Copy | None, list[str]]:
    """The run that its sessions make up, and what there is to say of them."""
    notes = [f"{run_id}: {session.complaint} ({session.file})" for session in sessions if session.complaint]
    attempts: list[tuple[Copy, Session]] = []
    for session in sorted(sessions, key=lambda session: (session.started, str(session.file))):
        try:
            copy = Copy.of(session.config, session.summary if session.ended else {}, session.rows)
        except NotOurs as reason:
            notes.append(f"{run_id}: skipped {session.file}: {reason}")
            continue
        if session.from_update and attempts:
            before, _ = attempts.pop()
            kept = {update: row for update, row in before.rows.items() if update <= session.from_update}
            copy.rows = kept | copy.rows
        attempts.append((copy, session))
    if not attempts:
        return None, notes
    best, chosen = max(reversed(attempts), key=lambda attempt: _progress(attempt[0]))
    for _, session in attempts:
        if session is not chosen:
            notes.append(f"{run_id}: skipped {session.file}: {chosen.file} has the same run, as far or further")
    return best, notes


def _progress(copy: Copy) -> tuple[bool, int]:
    return copy.summary.get("state") in FINISHED, len(copy.rows)
