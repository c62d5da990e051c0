"""Weights & Biases as a mirror of the result store: never its only copy, never a reason for a run to fail."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Protocol

from kfacrnn.config import Run
from kfacrnn.errors import UserError, first_line

INIT_TIMEOUT = 20.0  # seconds; W&B itself would wait for 90 and then fail
FINISH_TIMEOUT = 60.0


class Mirror(Protocol):
    def log(self, row: dict[str, Any]) -> None: ...

    def finish(self, state: str) -> None: ...


class Nobody:
    def log(self, row: dict[str, Any]) -> None:
        pass

    def finish(self, state: str) -> None:
        pass


class WandB:
    """One W&B run per training run, with the run's own identity, so that a resumed run goes on where it was.

    Whatever W&B raises ends the mirror with one line, not the run: hence the broad `except`.
    """

    def __init__(self, run: Run, folder: Path):
        import dataclasses

        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            import wandb
        except ImportError as error:
            raise UserError("tracker=wandb: wandb is not installed; pip install 'kfacrnn[wandb]'") from error
        options: dict[str, Any] = {
            "id": run.run_id,
            "resume": "allow",
            "project": run.tracker.project,
            "entity": run.tracker.entity,
            "group": run.tracker.group,
            "tags": run.tracker.tags,
            "name": f"{run.task.name}-{run.optimizer.name}-{run.run_id}",
            "dir": folder,
            "config": {**dataclasses.asdict(run), "run_id": run.run_id},
        }
        options["settings"] = wandb.Settings(
            init_timeout=INIT_TIMEOUT, finish_timeout=FINISH_TIMEOUT, x_disable_stats=True, console="off"
        )
        self._run: Any = None
        if run.tracker.mode == "online":
            try:
                self._run = wandb.init(mode="online", **options)
            except Exception as error:
                print(f"W&B cannot be reached ({first_line(error)}); going on offline", file=sys.stderr)
                wandb.teardown()  # its service would otherwise hold the run's identity
        if self._run is None:
            try:
                self._run = wandb.init(mode="offline", **options)
            except Exception as error:
                self._give_up(error)

    def log(self, row: dict[str, Any]) -> None:
        if self._run is None:
            return
        try:
            self._run.log({key: value for key, value in row.items() if value is not None}, step=int(row["update"]))
        except Exception as error:
            self._give_up(error)

    def finish(self, state: str) -> None:
        if self._run is None:
            return
        try:
            self._run.summary["state"] = state
            self._run.finish(exit_code=1 if state == "failed" else 0)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        print(f"W&B has stopped ({first_line(error)}); the run goes on without it", file=sys.stderr)


def open_mirror(run: Run, folder: Path) -> Mirror:
    return WandB(run, folder) if run.tracker.name == "wandb" else Nobody()
