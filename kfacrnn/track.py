"""Weights & Biases as a mirror of the result store: never its only copy, never a reason for a run to fail.

A run's W&B counterpart has its identity, so that a resumed run goes on where it was, and everything that the store has
of it: the configuration with `run_id` and `meta`, which is meta.json; the rows of metrics.csv, an update being a step;
and in the summary `state`, `reason` and `stopped_at`, the last update, as in status.json. `kfacrnn.sources` reads that
back. This module knows no sources and no other runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from kfacrnn.errors import UserError, first_line
from kfacrnn.run import Run
from kfacrnn.store import RunFolder

INIT_TIMEOUT = 20.0  # seconds; W&B itself would wait for 90 and then fail
FINISH_TIMEOUT = 60.0
INSTALL = "wandb is not installed; pip install 'kfacrnn[wandb]'"


class Mirror(Protocol):
    def log(self, row: dict[str, Any]) -> None: ...

    def finish(self, state: str) -> None: ...


class Nobody:
    def log(self, row: dict[str, Any]) -> None:
        pass

    def finish(self, state: str) -> None:
        pass


class Session:
    """A W&B run that is open for writing, of the run whose folder and configuration these are. Whatever W&B raises
    passes."""

    def __init__(self, config: Mapping[str, Any], folder: RunFolder, *, mode: str, place: Path):
        """`mode` is online or offline; `place` is the folder where W&B may put its files."""
        wandb = client()
        tracker = config["tracker"]
        self._folder = folder
        self._described = False
        self._run = wandb.init(
            mode=mode,
            dir=place,
            id=folder.run_id,
            resume="allow",
            project=tracker["project"],
            entity=tracker["entity"],
            group=tracker["group"],
            job_type=tracker.get("job_type"),
            tags=tracker["tags"],
            name=f"{config['task']['name']}-{config['optimizer']['name']}-{folder.run_id}",
            config={**config, "run_id": folder.run_id},
            allow_val_change=True,
            settings=wandb.Settings(
                init_timeout=INIT_TIMEOUT,
                finish_timeout=FINISH_TIMEOUT,
                finish_timeout_raises=True,
                x_disable_stats=True,
                console="off",
            ),
        )
        self._next = self._run.starting_step  # what W&B has of a resumed run ends before it

    def log(self, row: Mapping[str, Any]) -> None:
        if not self._described:
            self._describe()
        if int(row["update"]) >= self._next:
            self._run.log({key: value for key, value in row.items() if value is not None}, step=int(row["update"]))

    def _describe(self) -> None:
        self._described = True
        self._run.config.update({"meta": self._folder.meta()}, allow_val_change=True)

    def finish(self, state: str) -> None:
        self._describe()  # again: by now the session has an end
        status = self._folder.status()
        self._run.summary.update(
            {"state": state, "reason": status.get("reason", ""), "stopped_at": status.get("update", 0)}
        )
        self._run.finish(exit_code=1 if state == "failed" else 0)


class WandB:
    """One W&B run per training run. Whatever W&B raises ends the mirror with one line, not the run: hence the broad
    `except`."""

    def __init__(self, run: Run, folder: Path):
        config, store = dataclasses.asdict(run), RunFolder(folder)
        wandb = client()
        self._session: Session | None = None
        if run.tracker.mode == "online":
            try:
                self._session = Session(config, store, mode="online", place=folder)
            except Exception as error:
                print(f"W&B cannot be reached ({first_line(error)}); going on offline", file=sys.stderr)
                wandb.teardown()  # its service would otherwise hold the run's identity
        if self._session is None:
            with self._giving_up():
                self._session = Session(config, store, mode="offline", place=folder)

    def log(self, row: dict[str, Any]) -> None:
        if self._session is not None:
            with self._giving_up():
                self._session.log(row)

    def finish(self, state: str) -> None:
        if self._session is not None:
            with self._giving_up():
                self._session.finish(state)

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._session = None
            print(f"W&B has stopped ({first_line(error)}); the run goes on without it", file=sys.stderr)


def client() -> Any:
    """The module wandb, silent and without telemetry unless the environment says otherwise. Raises `UserError` without
    it."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb
    except ImportError as error:
        raise UserError(INSTALL) from error
    return wandb


def check(run: Run) -> None:
    """Raises `UserError` for a mirror that cannot be had here."""
    if run.tracker.name == "wandb":
        try:
            client()
        except UserError as error:
            raise UserError(f"tracker=wandb: {error}") from error


def open_mirror(run: Run, folder: Path) -> Mirror:
    return WandB(run, folder) if run.tracker.name == "wandb" else Nobody()
