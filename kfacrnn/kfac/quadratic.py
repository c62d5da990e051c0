"""Step size and momentum from the local quadratic model of the training loss h, with the exact Fisher.

The next update lies in the plane of the preconditioned direction Δ = N·F̂⁻¹∇h and the update before it, v, where

    M(δ) = ∇hᵀδ + ½ δᵀ(F + λ_h I)δ,    δ = −αΔ + μv

is least. F is no approximation here, but the Fisher of some of the batch's sequences, in units of h:

    uᵀFv = 1/N · mean over cases of Σ_t (J_t u)ᵀ F_t (J_t v)

with J_t the derivative of the logits of step t and F_t the Fisher of its predictive distribution. λ damps V0, which is
that of a time-step; λ_h = λ·E[T]/N damps F to match.

J u comes from central differences, (z(θ + εu) − z(θ − εu)) / 2ε, as neither the layers' kernels nor a compiled model
know forward-mode differentiation: two forward passes for each of Δ and v, and one for the predictions themselves. It is
the derivative of what the model computes, also where its gradient leaves something out, as the DNC's does.

J. Martens, R. Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML 2015
(arXiv:1503.05671), sections 6.4 and 7
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfacrnn.kfac.arguments import check
from kfacrnn.kfac.randomness import kept
from kfacrnn.kfac.step_size import schedule_factor
from kfacrnn.kfac.update import gradients
from kfacrnn.predictive import Distribution

PARALLEL = 1e-6
"""sin² of the angle between Δ and v, in the norm of F + λ_h I, below which v offers nothing that Δ has not: what is
left of it would be the error of J u in float32."""

Vector = list[Tensor]  # one tensor for each of the parameters


@dataclass(frozen=True)
class QuadraticModel:
    """Has α and μ chosen at every update, by the exact Fisher of `fraction` of the batch's sequences."""

    fraction: float = 1 / 4

    def __post_init__(self) -> None:
        check("fraction", self.fraction, 0 < self.fraction <= 1, "in (0, 1]")

    def cases(self, update: int, cases: int) -> slice:
        """The sequences of a batch of `cases` that the model of this update is made of, in rotation over updates."""
        count = max(1, round(cases * self.fraction))
        start = min(update * count % cases, cases - count)
        return slice(start, start + count)


class Chosen(NamedTuple):
    """The least of M in the plane, and what M says of the update that is taken, which a schedule may have scaled."""

    alpha: float
    mu: float
    kl: float  # ½ δᵀFδ
    curvature: float  # δᵀ(F + λ_h I)δ
    change: float  # M(δ)

    def step(self, group: Mapping[str, Any]) -> tuple[float, float]:
        """η and μ of a parameter group."""
        s = schedule_factor(group)
        return s * self.alpha, s * self.mu


STAY = Chosen(0.0, 0.0, 0.0, 0.0, 0.0)
"""Without a gradient this is where M is least."""


class Plane(NamedTuple):
    """M in the plane of the vectors u_1, u_2 (or on the line of u_1), without its damping; float64."""

    slopes: Tensor  # [k]     ∇hᵀu_i
    fisher: Tensor  # [k, k]  u_iᵀ F u_j
    gram: Tensor  # [k, k]  u_iᵀ u_j
    length: float  # E[T], in time-steps
    loss_scale: float  # N

    def averaged(self, mean: Callable[[Tensor], Tensor]) -> Plane:
        """The same of all processes' sequences, by their `mean`."""
        slopes, fisher, gram = (mean(tensor).cpu() for tensor in (self.slopes, self.fisher, self.gram))
        return Plane(slopes, fisher, gram, float(mean(torch.tensor(self.length))), self.loss_scale)

    def chosen(self, damping: float, s: float) -> Chosen | None:
        """For u_1 = Δ and u_2 = v. `damping` is λ, s what a schedule leaves of the update. None if anything is not
        finite."""
        B = self.fisher + damping * self.length / self.loss_scale * self.gram
        if not (B.isfinite().all() and self.slopes.isfinite().all()):
            return None
        least = minimum(self.slopes, B)
        delta = s * least
        curvature = float(delta @ B @ delta)
        return Chosen(
            alpha=-float(least[0]),
            mu=float(least[1]) if len(least) > 1 else 0.0,
            kl=float(delta @ self.fisher @ delta) / 2,
            curvature=curvature,
            change=float(self.slopes @ delta) + curvature / 2,
        )


def minimum(slopes: Tensor, B: Tensor) -> Tensor:
    """The x for which slopesᵀx + ½ xᵀBx is least, `[k]`, for k = 1 or 2 and B positive semi-definite. Where B is
    singular the first component does all of it; where even that one has no curvature, nothing is done."""
    x = torch.zeros_like(slopes)
    if len(x) == 2 and B.det() > PARALLEL * B[0, 0] * B[1, 1]:
        scale = B.diagonal().rsqrt()  # Δ and v differ in length by orders of magnitude
        return -scale * torch.linalg.solve(scale * B * scale.unsqueeze(1), scale * slopes)
    if B[0, 0] > 0:
        x[0] = -slopes[0] / B[0, 0]
    return x


def plane(
    forward: Callable[[], Distribution],
    parameters: Vector,
    foretold: Sequence[tuple[Vector, float]],
    loss_scale: float,
) -> Plane:
    """M in the plane of the vectors u, for each of which a rough value of uᵀ(F + λ_h I)u is `foretold`, > 0. `forward`
    is called several times, with noise that must be the same in all of them. The parameters, whose gradients are ∇h,
    are moved, and restored bit for bit.

    Raises ValueError for predictions in half precision.
    """
    gradient, vectors = gradients(parameters), [u for u, _ in foretold]
    distribution, changes = logit_changes(forward, parameters, vectors, [value * loss_scale for _, value in foretold])
    fisher = [[distribution.fisher_product(u, v).double().mean() / loss_scale for v in changes] for u in changes]
    return Plane(
        slopes=torch.stack([_dot(gradient, u) for u in vectors]),
        fisher=torch.stack([torch.stack(row) for row in fisher]),
        gram=torch.stack([torch.stack([_dot(u, v) for v in vectors]) for u in vectors]),
        length=mean_length(distribution),
        loss_scale=loss_scale,
    )


def logit_changes(
    forward: Callable[[], Distribution],
    parameters: Vector,
    vectors: Sequence[Vector],
    foretold: Sequence[float],
) -> tuple[Distribution, list[Tensor]]:
    """The predictions at the parameters, and J u `[T, B, out]` for every one of `vectors`.

    With e the rounding unit of the parameters, εu is as long as it takes to change the predictions of a time-step by a
    KL of ½ e^(2/3) nats, by what is `foretold` of uᵀFu (nats per sequence): the error from curvature, relative O(ε²),
    and that from rounding, O(e/ε), are then both about e^(2/3), and grow slowly where the foretold is wrong. In float32
    the logits move by some 0.005.
    """
    distribution = _in_full(forward())
    before = [p.clone() for p in parameters]
    unit = torch.finfo(parameters[0].dtype).eps ** (1 / 3)
    changes = []

    def logits(vector: Vector, size: float) -> Tensor:
        torch._foreach_copy_(parameters, before)
        torch._foreach_add_(parameters, vector, alpha=size)
        return _in_full(forward()).logits

    try:
        for vector, value in zip(vectors, foretold, strict=True):
            size = unit * math.sqrt(mean_length(distribution) / value)
            changes.append((logits(vector, size) - logits(vector, -size)) / (2 * size))
    finally:
        torch._foreach_copy_(parameters, before)
    return distribution, changes


def mean_length(distribution: Distribution) -> float:
    """E[T] over the sequences."""
    if distribution.lengths is None:
        return float(distribution.logits.shape[0])
    return distribution.lengths.double().mean().item()


def repeatable(forward: Callable[[], Distribution], device: torch.device) -> Callable[[], Distribution]:
    """`forward` in full precision and with the same noise whenever it is called: that of the global generators as they
    are now. Compiled models run as they were written, for differences of what one code computes."""
    restore = kept(device)

    def again() -> Distribution:
        restore()
        with torch.autocast(device.type, enabled=False), torch.compiler.set_stance("force_eager"):
            return forward()

    return again


def require_repeatable(forward: Callable[[], Distribution], mean: Callable[[Tensor], Tensor]) -> None:
    """Raises ValueError where two calls predict differently, beyond rounding: differences between calls say nothing of
    the parameters then. By the `mean` over all processes it does so on all of them if it is so on one."""
    one, other = forward().logits, forward().logits
    is_alike = one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-5, equal_nan=True)
    if mean(torch.tensor(float(not is_alike))).item() > 0:
        raise ValueError(
            "forward for the quadratic model predicts otherwise when it is called again: it is to begin with the same "
            "state every time, and its noise must be that of torch's, random's or NumPy's global generator"
        )


def common_schedule_factor(groups: Sequence[Mapping[str, Any]]) -> float:
    """s, what a schedule leaves of the update. Raises ValueError unless all parameter groups agree: M is that of one
    scale for all."""
    factors = [schedule_factor(group) for group in groups]
    if max(factors) - min(factors) > 1e-6 * max(factors):
        raise ValueError(f"a quadratic model needs one schedule for all parameter groups, got factors {factors}")
    return factors[0]


def _in_full(distribution: Distribution) -> Distribution:
    """Differences of half-precision logits would be rounding."""
    if distribution.logits.dtype in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"forward for the quadratic model must predict in float32 or float64, got {distribution.logits.dtype}: "
            "autocast is off in it, and must not be turned on inside"
        )
    return distribution


def _dot(u: Vector, v: Vector) -> Tensor:
    return torch.stack([(x * y).sum(dtype=torch.float64) for x, y in zip(u, v, strict=True)]).sum()
