"""How far to go along the preconditioned direction, if the KL divergence is to be bounded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from kfacrnn.kfac.arguments import check, is_finite


def kl_bounded(lr: float, kl_clip: float, curvature: float) -> float:
    """min(η_max, √(c / ΔᵀF̂Δ)): the model's predicted KL change, ½η²·ΔᵀF̂Δ, is at most c/2 nats per unit of the loss.

    `lr` is η_max, `kl_clip` is c, `curvature` is ΔᵀF̂Δ = Δᵀ∇h. Ba, Grosse & Martens (2017), section 5.
    """
    return min(lr, math.sqrt(kl_clip / curvature)) if curvature > 0 else lr


def schedule_factor(group: Mapping[str, Any]) -> float:
    """s, what a learning-rate schedule leaves of the steps of a parameter group."""
    check("lr", group["lr"], is_finite(group["lr"]) and group["lr"] >= 0, "finite and >= 0")
    return float(group["lr"]) / group["first_lr"]


class Bounded(NamedTuple):
    """The step that the KL bound or the learning rate allows, whichever is the shorter one."""

    kl_clip: float  # c
    curvature: float  # ΔᵀF̂Δ

    def step(self, group: Mapping[str, Any]) -> tuple[float, float]:
        """η and μ of a parameter group."""
        return schedule_factor(group) * kl_bounded(group["first_lr"], self.kl_clip, self.curvature), float(
            group["momentum"]
        )
