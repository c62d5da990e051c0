"""How much the curvature is trusted: λ, at first, later on, and as the quadratic model keeps its promises.

The model of the training loss h around the current parameters is M(δ) = ∇hᵀδ + ½ δᵀF̂δ.

J. Martens, R. Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML 2015
(arXiv:1503.05671), section 6.5
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LevenbergMarquardt:
    """Adaptive damping: λ grows while the quadratic model promises more than the loss keeps, and shrinks while it keeps
    its promises.

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


class Damping:
    """λ of every update: `lasting`, or what is left of `first`, ×0.7 with every update, as long as that is more.

    With a `rule`, the lasting one is adapted; without, only its owner changes it.
    """

    def __init__(self, lasting: float, first: float | None, rule: LevenbergMarquardt | None):
        self.lasting = float(lasting)
        self._first = float(first or 0.0)
        self._rule = rule

    def before(self, update: int) -> float:
        return max(self.lasting, self._first * 0.7**update)

    @property
    def is_adaptive(self) -> bool:
        return self._rule is not None

    def is_due(self, updates: int) -> bool:
        """Whether to adapt it after so many updates."""
        return self._rule is not None and updates % self._rule.every == 0

    def adapt(self, change: float, predicted: float) -> float:
        """Returns ρ of a `change` of h where M(δ) `predicted` another; NaN where it predicted none. Raises RuntimeError
        without a rule."""
        if self._rule is None:
            raise RuntimeError("adapt_damping needs KFAC(adaptive_damping=LevenbergMarquardt())")
        ratio = change / predicted if predicted else math.nan
        if predicted or not math.isfinite(change):  # nothing moved: nothing to be learnt
            self.lasting = float(self._rule.adapted(self.lasting, ratio))
        return ratio
