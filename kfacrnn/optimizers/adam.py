"""Adam (Kingma & Ba, 2015)."""

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
    name: str = setting("adam")
    lr: float = setting("learning rate", above=0)
    beta1: float = setting("decay of the mean of the gradient", at_least=0, below=1)
    beta2: float = setting("decay of the mean of its square", at_least=0, below=1)
    eps: float = setting("added to the root of the mean square", above=0)
    clip: float | None = setting("largest global gradient norm; null: no clipping", above=0)
    schedule: Schedule = setting("learning-rate schedule")


def build(model: nn.Module, config: Config, *, task: Task, seed: int) -> Optimizer:
    import torch

    betas = (config.beta1, config.beta2)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, betas=betas, eps=config.eps, fused=True)
    return clip_gradients(optimizer, config.clip)
