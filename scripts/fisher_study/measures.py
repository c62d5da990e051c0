"""How far one Fisher is from another, and how the assumptions about time hold lag by lag.

frobenius    ‖F̂ − F‖ / ‖F‖
scaled       ‖αF̂ − F‖ / ‖F‖ at the best α: what no step size makes up for
step         ‖F̂ − F̂'‖ / ‖F‖, F̂' the approximation with one assumption less: what that assumption moves
μ            spectrum of F̂^{-1/2} F F̂^{-1/2}: along that direction F̂⁻¹ takes a step μ times that of F⁻¹
spread       μ at its 95 % quantile by μ at 5 %: likewise
KL           of zero-mean Gaussians with covariances F̂⁻¹ and F⁻¹, nats per weight: functions of μ alone
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fisher_study.approximations import (
    PREVIOUS,
    Chain,
    approximations,
    damping_amounts,
    factor,
    library_inverse,
    mean,
    mean_eigenvalue,
)
from fisher_study.exact import Block

Rows = list[dict[str, Any]]

INDEFINITE = ("homogeneous", "one_divisor")  # no process need have such moments: F̂ may have negative eigenvalues
QUANTILES = {"mu_min": 0.0, "mu_05": 0.05, "mu_50": 0.5, "mu_95": 0.95, "mu_max": 1.0}
LAGS = (0, 1, 2, 3, 5, 10)


def relative_spectrum(exact: Tensor, approximate: Tensor) -> Tensor:
    """μ, ascending; both matrices are positive definite."""
    L = torch.linalg.cholesky(approximate)
    half = torch.linalg.solve_triangular(L, exact, upper=False)
    whitened = torch.linalg.solve_triangular(L, half.mT, upper=False)
    return torch.linalg.eigvalsh((whitened + whitened.mT) / 2)


def kl_divergences(mu: Tensor) -> tuple[float, float]:
    """KL(F̂⁻¹ ‖ F⁻¹), which grows with steps that are too long, and KL(F⁻¹ ‖ F̂⁻¹), with steps that are too short."""
    forward, backward = (mu - 1 - mu.log()).mean() / 2, (1 / mu - 1 + mu.log()).mean() / 2
    return forward.item(), backward.item()


def sine(F0: Tensor, F1: Tensor) -> float:
    """Of the angle between two matrices."""
    cosine = (F0 * F1).sum() / (F0.norm() * F1.norm())
    return math.sqrt(max(0.0, 1 - cosine.item() ** 2))


def distances(block: Block, damping: float) -> Rows:
    """One row per approximation; `damping` in units of V0's mean eigenvalue. F gets T times what V0 gets."""
    scale = mean_eigenvalue(block)
    fishers = approximations(block, damping * scale)
    exact, psi = fishers["exact"], library_inverse("option1", block, damping * scale).diagnostics
    rows = []
    for name, previous in PREVIOUS.items():
        row = {
            "damping": damping,
            "unit": scale,
            "noise": block.noise,
            "psi_min": psi.psi_min,
            "psi_max": psi.psi_max,
            "approximation": name,
            "frobenius": ((fishers[name] - exact).norm() / exact.norm()).item(),
            "scaled": sine(fishers[name], exact),
            "step": ((fishers[name] - fishers[previous]).norm() / exact.norm()).item(),
        }
        measured = dict.fromkeys(("kl_approximate_exact", "kl_exact_approximate", *QUANTILES), math.nan)
        if name not in INDEFINITE:
            mu = relative_spectrum(exact, fishers[name])
            quantiles = torch.quantile(mu, torch.tensor([*QUANTILES.values()]).to(mu)).tolist()
            measured = dict(zip(measured, (*kl_divergences(mu), *quantiles), strict=True))
        rows.append(row | measured)
    return rows


def lags(block: Block, damping: float) -> Iterator[dict[str, Any]]:
    """Per lag and relative to the moment at that lag: what homogeneity and the chain get wrong of A_d and G_d.

    `size` is ‖M_d‖/‖M_0‖; `homogeneity` the root mean square over t of ‖M_{t+d,t} − M̄_d‖; `chain` ‖Ψ^d M_0 − M_d‖ with
    Ψ of factors that are damped as in `distances`.
    """
    amounts = damping_amounts(block, damping * mean_eigenvalue(block))
    for side, M, amount in zip("ag", (block.A, block.G), amounts, strict=True):
        predicted = dict(enumerate(Chain(M, amount).lags(len(M)), 1))
        for d in (lag for lag in LAGS if lag <= len(M) // 2):
            pairs, centre, estimated = M.diagonal(-d, 0, 2), mean(M, d), factor(M, d)
            spread = (pairs - centre.unsqueeze(-1)).square().sum((0, 1)).mean().sqrt()
            yield {
                "side": side,
                "lag": d,
                "size": (estimated.norm() / factor(M, 0).norm()).item(),
                "homogeneity": (spread / centre.norm()).item(),
                "chain": ((predicted[d] - estimated).norm() / estimated.norm()).item() if d else 0.0,
            }
