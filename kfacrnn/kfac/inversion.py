"""From the factors of one weight matrix to F⁻¹, as work that can be done later, elsewhere and in parts.

The parts are the sides: A, and the G of every split. Their decompositions, O(n³), are independent of one another; what
puts them together is elementwise. Which formulas are worked out is for `kfacrnn.kfac.fisher` to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kfacrnn.kfac.fisher import FORMS, Few, FisherInverse, Indep, Modes, Side, Time
from kfacrnn.kfac.maths import (
    GAMMA_MAX,
    Lengths,
    damped,
    length_distribution,
    pi,
    require_nonsingular,
    safe_cholesky,
)


@dataclass(frozen=True)
class Inversion:
    """Work still to be done: `sides`, A and then every split's G, in any order and place, and what makes F⁻¹ of them.
    Calling it does all of it."""

    sides: Sequence[Callable[[], Modes]]
    assemble: Callable[[Sequence[Modes]], Any]

    def __call__(self) -> Any:
        return self.assemble([decompose_side() for decompose_side in self.sides])


@torch.no_grad()
def inversion(
    approximation: str,
    A0: Tensor,
    A1: Tensor | None,
    G0: Sequence[Tensor] | Tensor,
    G1: Sequence[Tensor] | Tensor | None,
    *,
    lengths: Lengths,
    damping: float,
    gamma_max: float = GAMMA_MAX,
    compute_dtype: torch.dtype = torch.float64,
    product_dtype: torch.dtype | None = None,
    lag_tolerance: float = 0.0,
) -> Inversion:
    """F⁻¹ of a matrix whose row splits are blocks of their own with one A side in common, decomposed once; as work.

    `G0` and `G1` hold one factor per split, of any size: a sequence, or one tensor `[k, m, m]`. The splits share one π,
    √((tr A0/dim A0) / mean of (tr G0/dim G0)), where separate blocks would have one each: a π per split would cost a
    decomposition of A0 per split. λI is added to every V0 alike; what changes are the cross terms of the factored form.

    Without lag factors V1 = 0, and every approximation is indep. With a `lag_tolerance` above 0, modes whose |ψ̂| is at
    most that are taken to be uncorrelated over time, see `kfacrnn.kfac.fisher.Few`. "two uses" is given the lag-0
    factors of a second use for A1 and G1, which are not damped, and no tolerance, see `Option1.of_two_uses` there.

    Decompositions run in `compute_dtype`, the products of `multiply` in `product_dtype`; None: in the factors' dtype,
    which the result has in any case. Shapes and options are taken to be valid; a factor that is not finite, not
    positive definite, or singular with zero damping raises a DecompositionError that names it when its side is
    decomposed.
    """
    balance, root_damping = pi(A0, *G0), math.sqrt(damping)
    if A1 is None or G1 is None:
        approximation, A1, G1 = "indep", torch.zeros_like(A0), [torch.zeros_like(M0) for M0 in G0]
    modes, of = FORMS[approximation]
    is_dense = all(M0.dim() == 2 for M0 in (A0, *G0))  # the modes of a diagonal side are its coordinates
    has_few_lags = lag_tolerance > 0 and approximation != "indep" and is_dense
    time, dtype = Time(length_distribution(lengths), gamma_max), A0.dtype

    @torch.no_grad()
    def side(name: str, M0: Tensor, M1: Tensor, amount: float) -> Modes:
        eps = max(torch.finfo(dtype).eps, torch.finfo(compute_dtype).eps)
        M0 = M0.to(compute_dtype)
        if damping == 0:
            require_nonsingular(M0, f"{name}0", eps)
        root = safe_cholesky(damped(M0, amount), f"{name}0")
        this = Side(name, root, M1.to(compute_dtype))
        found = modes(this, time)
        if has_few_lags:
            found = found.first(lag_tolerance, Indep.modes(this, time).P)
        return found.stored_in((dtype, product_dtype or dtype))

    @torch.no_grad()
    def assemble(sides: Sequence[Modes]) -> FisherInverse:
        A, *G = sides
        inverse = Few.of(of, A, G, time, lag_tolerance) if has_few_lags else of(A, G, time)
        return inverse.with_scales_in(dtype)

    sides = [partial(side, "A", A0, A1, balance * root_damping)]
    sides += [partial(side, "G", M0, M1, root_damping / balance) for M0, M1 in zip(G0, G1, strict=True)]
    return Inversion(sides, assemble)
