"""What the command line asks of a benchmark, checked before anything heavy is imported."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kfacrnn import config, discovery
from kfacrnn.errors import UserError
from kfacrnn.files import make_folder_of
from kfacrnn.run import Run

BASELINE = "sgd"
ENDLESS = ("budget.updates=1000000000", "budget.log_every=1000000000", "budget.eval_every=0")
"""No row is ever due: its gradient norm belongs to no update."""
LONG = 150  # characters of a file's name


@dataclass(frozen=True)
class Request:
    """`rounds` None: as many as fit into a minute or two. `json` is one file for all rows; without it there is one in
    the folder `out` for every task."""

    command: str
    tasks: tuple[str, ...] = ()
    optimizers: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    precision: str = "fp32"
    threads: int = 2
    rounds: int | None = None
    out: str = "results/bench"
    json: str | None = None

    def check(self) -> None:
        """Raises `UserError` for what no benchmark can use."""
        if self.rounds is not None and self.rounds < 3:
            raise UserError(f"--rounds {self.rounds}: must be at least 3, for an interval")
        for task in self.tasks:
            if task not in discovery.modules("tasks"):
                raise UserError(f"--task {task}: {discovery.unknown('task', task, discovery.modules('tasks'))}")
        for name in self.optimizers:
            if name not in discovery.modules("optimizers"):
                known = discovery.modules("optimizers")
                raise UserError(f"--optimizers {name}: {discovery.unknown('optimizer', name, known)}")
        for override in self.overrides:
            flags = {"task": "--task", "optimizer": "--optimizers", "precision": "--precision", "threads": "--threads"}
            key = override.split("=", 1)[0]
            if key in flags:
                raise UserError(f"{override}: here that is the flag {flags[key]}")
        self.file("")

    @property
    def device(self) -> str:
        return next((o.removeprefix("device=") for o in reversed(self.overrides) if o.startswith("device=")), "cpu")

    def file(self, *name: str) -> Path:
        """Where results go; makes the folder. The name says what was asked for, lest one measurement overwrite another
        that it is not comparable with."""
        asked = (self.precision, f"threads={self.threads}", *(o for o in self.overrides if not o.startswith("data.")))
        stem = "-".join(re.sub(r"[^\w.=+-]", "_", part) for part in (*name, *asked))
        if len(stem) > LONG:
            stem = f"{stem[:LONG]}-{hashlib.sha256(stem.encode()).hexdigest()[:8]}"
        path = discovery.place(self.json or f"{self.out}/{stem}.json")
        make_folder_of(path, "choose another with --out DIR")
        if path.is_dir():
            raise UserError(f"cannot write {path}: it is a folder; choose a file with --json FILE")
        return path

    def runs(
        self, task: str, baseline: str = BASELINE, default: Sequence[str] = (), more: Sequence[str] = ()
    ) -> dict[str, Run]:
        """The run of every optimiser on `task`, the baseline first; `default` are those that are taken if none was
        named, all whose packages are installed if it is empty. An override of an optimiser's setting is for those that
        have it; at least one must. `more` overrides the overrides.
        """
        installed = [name for name in discovery.modules("optimizers") if not discovery.missing("optimizers", name)]
        names = list(dict.fromkeys([baseline, *(self.optimizers or default or installed)]))
        return {
            name: self._run(task, name, [*(o for o in self.overrides if self._is_for(o, name, names)), *more])
            for name in names
        }

    def run(self, task: str) -> Run:
        """The task's sizes, whatever the optimiser."""
        return self._run(task, BASELINE, [o for o in self.overrides if not o.startswith("optimizer")])

    def _run(self, task: str, optimizer: str, overrides: Sequence[str]) -> Run:
        basics = (f"task={task}", f"optimizer={optimizer}", f"precision={self.precision}", f"threads={self.threads}")
        return config.compose([*basics, *ENDLESS, *overrides])

    def _is_for(self, override: str, optimizer: str, optimizers: Sequence[str]) -> bool:
        group, _, key = override.split("=", 1)[0].partition(".")
        if group != "optimizer":
            return True
        keys = {name: [f"optimizer.{field}" for field in _settings_of(name)] for name in optimizers}
        own = f"optimizer.{key.split('.', 1)[0]}"
        if not any(own in of_one for of_one in keys.values()):
            known = dict.fromkeys(field for of_one in keys.values() for field in of_one)
            raise UserError(f"{override}: {discovery.unknown('key', own, known)}")
        return own in keys[optimizer]


def _settings_of(optimizer: str) -> list[str]:
    return [field.name for field in dataclasses.fields(discovery.load("optimizers", optimizer).Config)]
