"""Adam with decoupled weight decay (Loshchilov & Hutter, 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kfacrnn.optimizers import adam, clip_gradients
from kfacrnn.settings import setting

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from kfacrnn.tasks import Task


@dataclass
class Config(adam.Config):
    weight_decay: float = setting("decoupled weight decay, multiplied by the learning rate", at_least=0)


def build(model: nn.Module, config: Config, *, task: Task, seed: int) -> Optimizer:
    import torch

    betas = (config.beta1, config.beta2)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )
    return clip_gradients(optimizer, config.clip)
