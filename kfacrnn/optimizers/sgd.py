"""Stochastic gradient descent with momentum, gradient-norm clipping and a decaying learning rate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kfacrnn.optimizers import clip_gradients
from kfacrnn.schedules import Schedule
from kfacrnn.settings import setting

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from kfacrnn.tasks import Task


@dataclass
class Config:
    name: str = setting("sgd")
    lr: float = setting("learning rate", above=0)
    momentum: float = setting("momentum", at_least=0, below=1)
    nesterov: bool = setting("Nesterov's form of the momentum")
    weight_decay: float = setting("L2 penalty", at_least=0)
    clip: float | None = setting("largest global gradient norm; null: no clipping", above=0)
    schedule: Schedule = setting("learning-rate schedule")

    def check(self) -> Iterator[str]:
        if self.nesterov and self.momentum == 0:
            yield "nesterov=true: needs a momentum above 0"


def build(model: nn.Module, config: Config, *, task: Task, seed: int) -> Optimizer:
    import torch

    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    )
    return clip_gradients(optimizer, config.clip)
