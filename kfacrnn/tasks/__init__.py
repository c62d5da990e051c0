"""Tasks: a model, its data and its loss. Every module here that does not begin with an underscore is a task and is
found by its name: it defines `Config`, a dataclass of settings, and `build(config, seed=…, device=…, data=…)`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kfacrnn.predictive import Distribution


class Batch(Protocol):
    targets: Tensor  # what the predictive distribution scores
    units: float  # what the loss averages over: words, characters or sequences
    tokens: int  # time-steps of all cases
    cases: int  # sequences


class Task(Protocol):
    """What the training loop, the optimisers and the figures know of a task. Losses are in nats per unit."""

    unit: str  # "word", "character", "sequence"
    metric: str  # "perplexity", "bits per …" or "nats per …": `kfacrnn.units` says it so
    chance: float  # metric of a model that knows nothing
    loss_scale: float  # N = loss summed over a case's steps / training loss
    updates_per_epoch: int | None  # None: fresh data at every update
    checksums: dict[str, str]  # SHA-256 of the files read; empty for generated data

    def build_model(self) -> nn.Module:
        """A new model on the task's device. The caller has seeded torch: same seed, same weights."""

    def next_batch(self) -> Any:
        """The next batch on the task's device; same seed, same batches in the same order. Of a run on several processes
        this process's sequences, `ranks.mine`; a task that gives everyone the whole batch is right, but no faster."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The training loss h, mean nats per unit, as a scalar with gradient. Carries the recurrent state, if any, over
        to the next batch."""

    def predict(self, model: nn.Module, batch: Any, cases: slice | Tensor) -> Distribution:
        """The predictive distribution for some of the batch's sequences, from the same initial state as `loss`. Changes
        no state. Call it before `loss`."""

    def evaluate(self, model: nn.Module, split: str) -> float:
        """Mean nats per unit on "valid" or "test". Changes no training state."""

    def state_dict(self) -> dict[str, Any]:
        """Data cursor, carried state, generators: plain containers and tensors. Of the whole batch: `ranks.whole`."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class DataSource(Protocol):
    """Where corpora come from: the `data` group of the configuration."""

    root: str | None
    source: str


class Builder(Protocol):
    def __call__(self, config: Any, *, seed: int, device: torch.device, data: DataSource) -> Task: ...
