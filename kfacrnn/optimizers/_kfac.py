"""What the three K-FAC optimisers share: they differ in the approximation only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kfacrnn.schedules import Schedule
from kfacrnn.settings import setting

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from kfacrnn.tasks import Task


@dataclass
class Config:
    name: str = setting("kfac_indep, kfac_option1 or kfac_option2")
    lr: float = setting("η_max, the largest step size", above=0)
    kl_clip: float = setting("c, bound on twice the predicted KL change of an update", above=0)
    momentum: float = setting("momentum on the preconditioned updates", at_least=0, below=1)
    damping: float = setting("λ, factored Tikhonov damping", above=0)
    weight_decay: float = setting("decoupled weight decay, multiplied by the step size", at_least=0)
    statistics_every: int = setting("updates between statistics passes", at_least=1, costly=True)
    statistics_fraction: float = setting(
        "share of a batch's sequences in a statistics pass", above=0, at_most=1, costly=True
    )
    statistics_decay: float = setting("decay of the averages per statistics pass", at_least=0, below=1)
    refresh_every: int = setting("updates between inverses", at_least=1, costly=True)
    refresh_delay: int = setting(
        "0: inverses at once; d: in the background, in use d updates later", at_least=0, costly=True
    )
    inverse_share: float = setting(
        "largest share of the processes that hold any one inverse", above=0, at_most=1, scientific=False
    )
    gates: str | None = setting(
        "joint: the gates that one map computes are one Fisher block; null: blocks of their own",
        choices=["joint"], later=True, costly=True,
    )  # fmt: skip
    max_dense: int = setting("factors of a larger dimension are diagonal", at_least=1, costly=True)
    decompositions: str = setting("precision of decompositions", choices=["auto", "fp32", "fp64"], costly=True)
    products: str = setting(
        "precision of the products with decomposed factors", choices=["auto", "fp32", "bf16"], costly=True
    )
    lag_tolerance: float | None = setting(
        "modes with |ψ̂| no larger count as uncorrelated over time; 0: exact; null: by size",
        at_least=0, below=1, later=True, costly=True,
    )  # fmt: skip
    early_interval: float | None = setting(
        "updates between statistics and between inverses at first, as a share of those made before; null: 0.25",
        above=0, at_most=1, later=True,
    )  # fmt: skip
    first_damping: float | None = setting(
        "λ before the first update, ×0.7 with every update until it is `damping`; null: `damping` throughout",
        above=0, later=True,
    )  # fmt: skip
    quadratic_fraction: float | None = setting(
        "share of a batch's sequences in the exact quadratic model that chooses step size and momentum; null: none",
        above=0, at_most=1, later=True, costly=True,
    )  # fmt: skip
    adapt_damping_every: int | None = setting(
        "updates between adaptations of the damping, by Levenberg and Marquardt's rule; null: it is fixed",
        at_least=1, later=True, costly=True,
    )  # fmt: skip
    clip: float | None = setting("largest global gradient norm; null: no clipping", above=0)
    schedule: Schedule = setting("schedule of the step size, whichever bound it is at")

    @property
    def intervals(self) -> tuple[int, int, float]:
        """Of statistics, of inverses, and early ones."""
        return self.statistics_every, self.refresh_every, self.early_interval or 0.25

    def check(self) -> Iterator[str]:
        if self.refresh_delay >= self.refresh_every:
            yield f"refresh_delay={self.refresh_delay}: must be below refresh_every={self.refresh_every}"


def build(approximation: str, model: nn.Module, config: Config, task: Task, seed: int) -> Optimizer:
    import torch

    from kfacrnn import ranks
    from kfacrnn.kfac import LevenbergMarquardt, QuadraticModel
    from kfacrnn.kfac.optimizer import KFAC
    from kfacrnn.optimizers import clip_gradients

    dtypes = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
    optimizer = KFAC(
        model,
        approximation,
        loss_scale=task.loss_scale,
        lr=config.lr,
        kl_clip=config.kl_clip,
        momentum=config.momentum,
        damping=config.damping,
        first_damping=config.first_damping,
        weight_decay=config.weight_decay,
        statistics_every=config.statistics_every,
        statistics_fraction=config.statistics_fraction,
        statistics_decay=config.statistics_decay,
        refresh_every=config.refresh_every,
        refresh_delay=config.refresh_delay,
        early_interval=config.intervals[2],
        quadratic_model=QuadraticModel(config.quadratic_fraction) if config.quadratic_fraction else None,
        adaptive_damping=LevenbergMarquardt(config.adapt_damping_every) if config.adapt_damping_every else None,
        gates=config.gates or "separate",
        max_dense=config.max_dense,
        compute_dtype=dtypes[config.decompositions],
        product_dtype=dtypes[config.products],
        lag_tolerance=config.lag_tolerance,
        seed=seed,
        process_group=ranks.group(),
        inverse_share=config.inverse_share,
    )
    return clip_gradients(optimizer, config.clip)
