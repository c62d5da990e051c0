"""The Fisher inverse of one weight matrix from its factors, for use without a model: everything it is given is checked.

This module knows what a factor must look like, and leaves the mathematics to `kfacrnn.kfac.fisher`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kfacrnn.kfac.arguments import check, check_positive, is_finite
from kfacrnn.kfac.fisher import APPROXIMATIONS, FisherInverse
from kfacrnn.kfac.inversion import inversion
from kfacrnn.kfac.maths import GAMMA_MAX, Lengths, length_distribution


def fisher_inverse(
    approximation: str,
    A0: Tensor,
    A1: Tensor | None,
    G0: Tensor,
    G1: Tensor | None,
    *,
    lengths: Lengths,
    damping: float = 0.0,
    gamma_max: float = GAMMA_MAX,
    compute_dtype: torch.dtype = torch.float64,
    lag_tolerance: float = 0.0,
) -> FisherInverse:
    """F⁻¹ of one weight matrix `[m, n]` from its factors: `fisher_inverse(…).multiply(Z)`.

    `approximation` is "indep" (eqn 6), "option1" (eqn 8) or "option2" (eqn 9); "option1_abs" is option 1 with |ψ̂|, as
    in the authors' archived TensorFlow code, for comparison only. Factors are float32 or float64, `[n, n]`, or `[n]` if
    diagonal; without lag factors (None) every approximation is indep. `lengths` maps each T to its weight, or is
    the one T there is. `damping` is λ: A0 + π√λ I and G0 + √λ/π I, with the lag factors left as they are. `gamma_max`
    bounds γ and 1/(1 − m_G m_A), in units of 1/E[T]. Modes whose |ψ̂| is at most `lag_tolerance` are taken to be
    uncorrelated over time: the fewer there are above it, the nearer products are to the price of indep's.

    Raises ValueError naming the argument that is wrong; a singular A0 or G0 needs damping > 0.
    """
    known = isinstance(approximation, str) and approximation in APPROXIMATIONS
    check("approximation", approximation, known, f"one of {', '.join(APPROXIMATIONS)}")
    check("damping", damping, is_finite(damping) and damping >= 0, "finite and >= 0")
    check_positive("gamma_max", gamma_max)
    check("lag_tolerance", lag_tolerance, is_finite(lag_tolerance) and 0 <= lag_tolerance < 1, "in [0, 1)")
    if compute_dtype not in (torch.float32, torch.float64):
        raise ValueError(f"compute_dtype must be torch.float32 or torch.float64, got {compute_dtype}")
    if (A1 is None) != (G1 is None):
        raise ValueError(
            f"{'A1' if A1 is None else 'G1'} is None and the other lag factor is not: give both or neither"
        )
    for name, M, like in (("A0", A0, A0), ("G0", G0, A0), ("A1", A1, A0), ("G1", G1, G0)):
        if M is not None:
            _check_factor(name, M, like)
    lags = None if G1 is None else [G1]
    return inversion(
        approximation,
        A0,
        A1,
        [G0],
        lags,
        lengths=length_distribution(lengths),
        damping=damping,
        gamma_max=gamma_max,
        compute_dtype=compute_dtype,
        lag_tolerance=lag_tolerance,
    )()


def _check_factor(name: str, M: Tensor, like: Tensor) -> None:
    """Raises ValueError unless M is a finite square matrix or a diagonal with the dtype of `like`; if it is a lag-1
    factor also with its shape, if a lag-0 factor symmetric."""
    check(name, M, isinstance(M, Tensor), "a tensor")
    if M.dim() not in (1, 2) or M.shape[0] != M.shape[-1] or M.numel() == 0:
        raise ValueError(f"{name} must be a square matrix or the 1-D diagonal of one, got shape {list(M.shape)}")
    if M.dtype not in (torch.float32, torch.float64) or M.dtype != like.dtype:
        raise ValueError(f"{name} must be float32 or float64 like the other factors, got {M.dtype}")
    if not M.isfinite().all():
        raise ValueError(f"{name} must be finite")
    if name.endswith("1"):
        if M.shape != like.shape:
            raise ValueError(f"{name} must have the shape {list(like.shape)} of {name[0]}0, got {list(M.shape)}")
    elif M.dim() == 2 and (M - M.mT).abs().max() > math.sqrt(torch.finfo(M.dtype).eps) * M.abs().max():
        raise ValueError(f"{name} must be symmetric")
