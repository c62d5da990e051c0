"""PSGD-Kron (Li, 2018 and 2022, arXiv:1512.04202, 2211.04422): a Kronecker-factored preconditioner Qᵀ Q that is itself
trained by gradient descent, of pytorch_optimizer. Vectors, and dimensions above `max_dim`, have diagonal factors.
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

NEEDS = ("pytorch_optimizer", "opt_einsum")


@dataclass
class Config:
    name: str = setting("psgd_kron")
    lr: float = setting("learning rate", above=0)
    momentum: float = setting("decay of the mean of the gradient", at_least=0, below=1)
    weight_decay: float = setting("decoupled, of matrices, multiplied by the learning rate", at_least=0)
    refresh_every: int | None = setting(
        "updates between steps of Q; null: the authors' schedule", at_least=1, costly=True
    )
    max_dim: int = setting("larger dimensions have diagonal factors", at_least=1, costly=True)
    clip: float | None = setting("largest global gradient norm; null: no clipping", above=0)
    schedule: Schedule = setting("learning-rate schedule")


def build(model: nn.Module, config: Config, *, task: Task, seed: int) -> Optimizer:
    import opt_einsum  # noqa: F401 - without it torch.einsum forms outer products of all of Q, many gigabytes

    from kfacrnn.optimizers._modern import Kron

    optimizer = Kron(
        model.parameters(),
        seed,
        config.refresh_every,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        max_size_triangular=config.max_dim,
    )
    return clip_gradients(optimizer, config.clip)
