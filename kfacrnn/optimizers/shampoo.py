"""Shampoo (Gupta et al., 2018; Anil et al., 2020, arXiv:2002.09018) in blocks, of pytorch_optimizer.

L^{-1/4} G R^{-1/4} with the decaying means L of G Gᵀ and R of Gᵀ G, as long as RMSProp's step (grafting). Vectors, and
matrices with a dimension above `max_dim`, follow RMSProp. This is the package's ScalableShampoo; its Shampoo sums for
ever, feeds preconditioned momentum through the preconditioner again, and takes a dense root even for a vector.
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
    name: str = setting("shampoo")
    lr: float = setting("learning rate", above=0)
    beta1: float = setting("decay of the mean of the updates", at_least=0, below=1)
    beta2: float = setting("decay of L, R and the mean of the gradient's square", above=0, below=1)
    eps: float = setting("added to L and R, as a share of their largest eigenvalue", above=0)
    weight_decay: float = setting("decoupled weight decay, multiplied by the learning rate", at_least=0)
    refresh_every: int = setting(
        "updates between inverse roots; before the first there is RMSProp", at_least=1, costly=True
    )
    block: int = setting("larger matrices are cut into blocks of this size", at_least=1, costly=True)
    max_dim: int = setting("a matrix with a larger dimension follows RMSProp", at_least=1, costly=True)
    clip: float | None = setting("largest global gradient norm; null: no clipping", above=0)
    schedule: Schedule = setting("learning-rate schedule")


def build(model: nn.Module, config: Config, *, task: Task, seed: int) -> Optimizer:
    from kfacrnn.optimizers._modern import Shampoo

    optimizer = Shampoo(
        model.parameters(),
        seed,
        config.refresh_every,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        matrix_eps=config.eps,
        weight_decay=config.weight_decay,
        block_size=config.block,
        no_preconditioning_for_layers_with_dim_gt=config.max_dim,
    )
    return clip_gradients(optimizer, config.clip)
