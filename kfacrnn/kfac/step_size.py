"""How far to go along the preconditioned direction, and how much to trust the curvature.

The quadratic model of the training loss h around the current parameters is M(δ) = ∇hᵀδ + ½ δᵀF̂δ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


def kl_bounded(lr: float, kl_clip: float, curvature: float) -> float:
    """min(η_max, √(c / ΔᵀF̂Δ)): the model's predicted KL change, ½η²·ΔᵀF̂Δ, is at most c/2 nats per unit of the loss.

    `lr` is η_max, `kl_clip` is c, `curvature` is ΔᵀF̂Δ = Δᵀ∇h. Ba, Grosse & Martens (2017), section 5.
    """
    return min(lr, math.sqrt(kl_clip / curvature)) if curvature > 0 else lr


@dataclass(frozen=True)
class LevenbergMarquardt:
    """Adaptive damping: λ grows while the quadratic model promises more than the loss keeps, and shrinks while it keeps
    its promises. Martens & Grosse (2015), section 6.5.

    Every `every` updates, ρ = (h(θ+δ) − h(θ)) / M(δ) is measured on one batch; λ is divided by `rate`^every if
    ρ < 1/4 and multiplied by it if ρ > 3/4, within `[minimum, maximum]`.
    """

    every: int = 5
    rate: float = 19 / 20
    minimum: float = 1e-8
    maximum: float = 1e2

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")
        if not 0 < self.rate < 1:
            raise ValueError(f"rate must be in (0, 1), got {self.rate}")
        if not 0 < self.minimum <= self.maximum < math.inf:
            raise ValueError(f"minimum must be > 0 and at most maximum, got {self.minimum} and {self.maximum}")

    def adapted(self, damping: float, ratio: float) -> float:
        if not math.isfinite(ratio) or ratio < 0.25:
            damping /= self.rate**self.every
        elif ratio > 0.75:
            damping *= self.rate**self.every
        return min(max(damping, self.minimum), self.maximum)
