"""SOAP (Vyas et al., 2025, arXiv:2409.11321): Adam in the eigenbases of Shampoo's preconditioners.

As pytorch_optimizer has it. Vectors follow Adam; a dimension above `max_dim` keeps its own basis. The first update sets
up the eigenbases and moves nothing.
"""

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

NEEDS = ("pytorch_optimizer",)


@dataclass
class Config:
    name: str = setting("soap")
    lr: float = setting("learning rate", above=0)
    beta1: float = setting("decay of the mean of the gradient", at_least=0, below=1)
    beta2: float = setting("decay of the mean of its square in the eigenbases", at_least=0, below=1)
    preconditioner_beta: float | None = setting("decay of the preconditioners; null: beta2", at_least=0, below=1)
    eps: float = setting("added to the root of the mean square", above=0)
    weight_decay: float = setting("decoupled weight decay, multiplied by the learning rate", at_least=0)
    refresh_every: int = setting("updates between new eigenbases", at_least=1, costly=True)
    max_dim: int = setting("larger dimensions are left in their own basis", at_least=1, costly=True)
    clip: float | None = setting("largest global gradient norm; null: no clipping", above=0)
    schedule: Schedule = setting("learning-rate schedule")


def build(model: nn.Module, config: Config, *, task: Task, seed: int) -> Optimizer:
    from kfacrnn.optimizers._modern import SOAP

    optimizer = SOAP(
        model.parameters(),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        shampoo_beta=config.preconditioner_beta,
        eps=config.eps,
        weight_decay=config.weight_decay,
        precondition_frequency=config.refresh_every,
        max_precondition_dim=config.max_dim,
    )
    return clip_gradients(optimizer, config.clip)
