"""Muon (Jordan et al., 2024) for hidden matrices, AdamW for everything else, both torch's.

Hidden are all matrices but embeddings and the model's last one, which is taken for its output layer. The matrix of a
recurrent layer's gates is orthogonalised as a whole.
"""

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
    name: str = setting("muon")
    lr: float = setting("learning rate of hidden matrices", above=0)
    momentum: float = setting("decay of the mean of their gradient, in Nesterov's form", at_least=0, below=1)
    scale: str = setting("of an m × n update: √max(1, m/n) or 0.2 √max(m, n)", choices=["original", "match_rms_adamw"])
    adam_lr: float = setting("learning rate of everything else", above=0)
    beta1: float = setting("AdamW's decay of the mean of the gradient", at_least=0, below=1)
    beta2: float = setting("AdamW's decay of the mean of its square", at_least=0, below=1)
    eps: float = setting("added to the root of AdamW's mean square", above=0)
    weight_decay: float = setting("decoupled weight decay of all, multiplied by the learning rate", at_least=0)
    clip: float | None = setting("largest global gradient norm; null: no clipping", above=0)
    schedule: Schedule = setting("schedule of both learning rates")


def build(model: nn.Module, config: Config, *, task: Task, seed: int) -> Optimizer:
    import torch

    from kfacrnn.optimizers._joined import Joined

    hidden = list(hidden_matrices(model))
    among = {id(parameter) for parameter in hidden}
    muon = torch.optim.Muon(
        hidden,
        lr=config.lr,
        momentum=config.momentum,
        adjust_lr_fn=config.scale,
        weight_decay=config.weight_decay,
    )
    adamw = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if id(parameter) not in among],
        lr=config.adam_lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    return clip_gradients(Joined(muon, adamw), config.clip)


def hidden_matrices(model: nn.Module) -> Iterator[nn.Parameter]:
    """Neither embeddings nor the last matrix of the model."""
    from torch import nn

    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    matrices = [p for p in model.parameters() if p.dim() == 2]
    yield from (p for p in matrices[:-1] if id(p) not in embeddings)
