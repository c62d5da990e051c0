"""One training run: what it is, what its settings may be, and its identity."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kfacrnn import discovery, settings
from kfacrnn.errors import UserError
from kfacrnn.settings import setting

NUMERICS_VERSION = 1
"""Raised whenever a change of code changes training curves, so that old results are not taken for new ones. If they are
those of one optimiser only, its `Config` gets, or raises, a `numerics_version: ClassVar[int]` instead."""


@dataclass
class Budget:
    """How long to train and how often to look."""

    name: str = setting("which budget this is")
    updates: int = setting("parameter updates", at_least=1, at_most=10**9)
    log_every: int = setting("updates between rows of metrics.csv", at_least=1)
    eval_every: int = setting("updates between validations; 0: never", at_least=0)
    checkpoint_every: int = setting("updates between checkpoints", at_least=1)

    @property
    def log_points(self) -> list[int]:
        """The updates that metrics.csv of a run that is done has a row of."""
        return sorted({update for points in self._rows for update in points})

    def row_is_due(self, update: int) -> bool:
        return any(update in points for points in self._rows)

    @property
    def _rows(self) -> tuple[range, ...]:
        end = self.updates + 1
        return tuple(range(every, end, every) for every in (self.log_every, self.eval_every, self.updates) if every)

    def check(self) -> Iterator[str]:
        try:
            discovery.place(discovery.resource("configs") / "budget" / f"{self.name}.yaml")
        except UserError as error:
            yield f"name={self.name}: {str(error).rpartition(': ')[2]}"


@dataclass
class Data:
    """Where corpora come from."""

    root: str | None = setting("folder with ptb.train.txt, ptb.valid.txt and ptb.test.txt")
    source: str = setting("who reads the files", choices=["files", "torchtext"])


@dataclass
class Tracker:
    """Where a mirror of the results goes."""

    name: str = setting("who mirrors the results", choices=["none", "wandb"])
    mode: str = setting("mode of the mirror", choices=["offline", "online"])
    project: str = setting("W&B project")
    entity: str | None = setting("W&B entity: a user or a team")
    group: str | None = setting("W&B group, such as an experiment's name")
    tags: list[str] = setting("W&B tags")
    job_type: str | None = None  # tune | confirm, of an experiment's runs


@dataclass(kw_only=True)
class Run:
    """One training run, completely. `task` and `optimizer` are the `Config` dataclasses of their modules."""

    seed: int = setting("seeds weights, data and sampling", at_least=0, at_most=2**31 - 1)
    precision: str = setting("arithmetic of forward and backward passes", choices=["fp32", "bf16"])
    threads: int = setting("threads of one run", at_least=1, at_most=1024)
    device: str = setting("cpu, cuda or cuda:1")
    results: str = setting("folder of the result store")
    budget: Budget
    tracker: Tracker
    data: Data
    optimizer: Any
    task: Any

    def check(self) -> Iterator[str]:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            yield f"device={self.device}: must be cpu, cuda or cuda:N, such as cuda:1"
        if not self.results:
            yield "results=: must name a folder"

    @property
    def scientific(self) -> dict[str, Any]:
        """What decides the training curve, and nothing else: no paths, trackers or devices."""
        kept = ("task", "optimizer", "budget", "seed", "precision", "threads")
        config = dataclasses.asdict(self)
        groups = {"task": settings.scientific(self.task), "optimizer": settings.scientific(self.optimizer)}
        versions = {"numerics_version": NUMERICS_VERSION}
        if hasattr(self.optimizer, "numerics_version"):
            versions["optimizer_numerics_version"] = self.optimizer.numerics_version
        return {key: config[key] for key in kept} | groups | versions

    @property
    def run_id(self) -> str:
        """Twelve hexadecimal digits: runs with equal scientific configuration have equal identity."""
        return hashlib.sha256(json.dumps(self.scientific, sort_keys=True).encode()).hexdigest()[:12]
