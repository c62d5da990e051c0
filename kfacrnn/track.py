"""Weights & Biases as a mirror of the result store: never its only copy, never a reason for a run to fail."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Protocol

from kfacrnn.config import Run
from kfacrnn.errors import UserError


class Mirror(Protocol):
    def log(self, row: dict[str, Any]) -> None: ...

    def finish(self, state: str) -> None: ...


class Nobody:
    def log(self, row: dict[str, Any]) -> None:
        pass

    def finish(self, state: str) -> None:
        pass


class WandB:
    """One W&B run per training run, with the run's own identity, so that a resumed run goes on where it was."""

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
        mode = run.tracker.mode
        settings = wandb.Settings(init_timeout=20, x_disable_stats=True, console="off")
        if mode == "online":
            try:
                self._run = wandb.init(mode="online", settings=settings, **options)
            except (wandb.errors.Error, OSError) as error:
                print(f"W&B cannot be reached ({str(error).splitlines()[0]}); going on offline", file=sys.stderr)
                mode = "offline"
        if mode == "offline":
            self._run = wandb.init(mode="offline", settings=settings, **options)

    def log(self, row: dict[str, Any]) -> None:
        self._run.log({key: value for key, value in row.items() if value is not None}, step=int(row["update"]))

    def finish(self, state: str) -> None:
        self._run.summary["state"] = state
        self._run.finish(exit_code=0 if state in ("done", "diverged", "interrupted") else 1)


def open_mirror(run: Run, folder: Path) -> Mirror:
    return WandB(run, folder) if run.tracker.name == "wandb" else Nobody()
