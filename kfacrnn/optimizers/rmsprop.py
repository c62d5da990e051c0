"""RMSProp (Tieleman & Hinton, 2012) with momentum, what the DNC's authors train with."""

from __future__ import annotations

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
    name: str = setting("rmsprop")
    lr: float = setting("learning rate", above=0)
    alpha: float = setting("decay of the mean of the gradient's square", at_least=0, below=1)
    momentum: float = setting("momentum on the scaled gradients", at_least=0, below=1)
    eps: float = setting("added to the root of the mean square", above=0)
    clip: float | None = setting("largest global gradient norm; null: no clipping", above=0)
    schedule: Schedule = setting("learning-rate schedule")


def build(model: nn.Module, config: Config, *, task: Task, seed: int) -> Optimizer:
    import torch

    optimizer = torch.optim.RMSprop(
        model.parameters(), lr=config.lr, alpha=config.alpha, momentum=config.momentum, eps=config.eps
    )
    return clip_gradients(optimizer, config.clip)
