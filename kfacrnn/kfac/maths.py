"""The scalar functions and the matrix decompositions behind the Fisher approximations.

Pure functions on tensors; nothing here knows of modules, parameters, time axes or optimisers. A factor is a matrix
`[n, n]`, or `[n]` for a diagonal one, which stands for the matrix throughout: its square root and its eigenvectors are
`[n]` too.

    eta      E_T[η_T(x)],  η_T(x) = Σ_{|d|<T} (T − |d|) x^|d|             section 3.5.2
    gamma    1 / E_T[η_T(x)], bounded                                     eqn 8
    pi       how damping is shared by the two factors                     Martens & Grosse (2015), section 6.3
    safe_*   decompositions that retry before they fail                   appendix C.3
    whiten   Ψ̂ = L⁻¹ M1 L⁻ᵀ,  M0 = L Lᵀ                                   section 3.5.4

The paper whitens with the symmetric root `M0^{1/2}`. Every other root L gives an orthogonally similar Ψ̂, hence the same
F⁻¹; Cholesky's is cheaper than an eigendecomposition and loses fewer digits.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, SupportsIndex

import torch
from torch import Tensor

Lengths = Mapping[int, float] | SupportsIndex

# Bound on γ and on 1/(1 − m_G m_A), in units of 1/E[T]. Both grow without limit as ψ̂ → −1 (T even), |ψ̂| → 1. Float64
# resolves 1 − |ψ̂| to about 1e-13 where the factors are well conditioned: no value it can resolve is cut off here.
GAMMA_MAX = 1e10

_JITTERS = (1e-10, 1e-8, 1e-6)  # relative to the largest entry
_CHUNK = 1 << 15  # elements; the working set of `eta` then stays in the cache: 3 times faster on a large matrix


class DecompositionError(ValueError):
    """A factor is not finite, not positive definite, or no retry could decompose it. The message names it."""


# ----------------------------------------------------------------------------------------------------- sequence lengths


def length_distribution(lengths: Lengths) -> dict[int, float]:
    """The distribution of T as {T_i: ω_i}, ascending, Σ ω_i = 1, from weights of any scale or from one fixed length.

    Raises ValueError for lengths that are not positive integers and weights that are negative, not finite or all zero.
    """
    try:
        weights = lengths if isinstance(lengths, Mapping) else {operator.index(lengths): 1.0}
    except TypeError:
        raise ValueError(f"lengths must be a mapping from length to weight, or one length, got {lengths!r}") from None
    distribution: dict[int, float] = {}
    for length, weight in weights.items():
        try:
            steps, omega = operator.index(length), float(weight)
        except (TypeError, ValueError):
            raise ValueError(f"lengths must map integers to numbers, got {length!r}: {weight!r}") from None
        if steps < 1 or not math.isfinite(omega) or omega < 0:
            raise ValueError(f"lengths must map positive integers to finite weights >= 0, got {length!r}: {weight!r}")
        if omega > 0:
            distribution[steps] = distribution.get(steps, 0.0) + omega  # keys may be tensors, equal and not the same
    total = sum(distribution.values())
    if not 0 < total < math.inf:
        raise ValueError(f"lengths must have a positive, finite total weight, got {lengths!r}")
    return {steps: distribution[steps] / total for steps in sorted(distribution)}


def mean_length(lengths: Lengths) -> float:
    """E[T], in time-steps."""
    return sum(omega * steps for steps, omega in length_distribution(lengths).items())


# -------------------------------------------------------------------------------------------------------------- η and γ


class _Sums(NamedTuple):
    """After n terms: η_n(x), S_n(x) = Σ_{k<n} x^k and x^n."""

    eta: Tensor
    S: Tensor
    power: Tensor


def _sums(x: Tensor, n: int) -> _Sums:
    """The sums for n ≥ 1 by doubling (m, m → 2m) and adding one term (m, 1 → m+1), O(log n). See `_join`."""
    eta, S, power = torch.ones_like(x), torch.ones_like(x), x.clone()
    for bit in f"{n:b}"[1:]:
        eta.mul_(2).addcmul_(x * S, S, value=2)
        S.addcmul_(power, S)
        power.mul_(power)
        if bit == "1":
            eta.addcmul_(x, S, value=2).add_(1)
            S.mul_(x).add_(1)
            power.mul_(x)
    return _Sums(eta, S, power)


def _join(x: Tensor, m: _Sums, n: _Sums) -> _Sums:
    """η_{m+n} = η_m + η_n + 2x·S_m·S_n and S_{m+n} = S_m + x^m·S_n: unlike the closed form, exact at x = 1."""
    return _Sums(m.eta + n.eta + 2 * x * m.S * n.S, m.S + m.power * n.S, m.power * n.power)


def _eta(x: Tensor, distribution: Mapping[int, float]) -> Tensor:
    """E_T[η_T(x)] for ascending lengths, each reached from the one before."""
    (reached, omega), *longer = distribution.items()
    sums = _sums(x, reached)
    expectation = omega * sums.eta
    for steps, omega in longer:
        sums, reached = _join(x, sums, _sums(x, steps - reached)), steps
        expectation.add_(sums.eta, alpha=omega)
    return expectation


def eta(x: Tensor, lengths: Lengths) -> Tensor:
    """E_T[η_T(x)], the factor by which correlation ψ̂ = x over time scales a mode of the Fisher (section 3.5.2).

    Elementwise; computed in float64, returned in x's dtype. 1 at T = 1, T at x = 0, T² at x = 1. For even T it tends to
    0 as x → −1, where its absolute error stays at rounding but its relative error cannot.
    `lengths` maps each T to its weight, or is the one T there is. Raises ValueError naming `lengths`.
    """
    distribution = length_distribution(lengths)
    chunks = x.detach().reshape(-1).split(_CHUNK)
    return torch.cat([_eta(chunk.double(), distribution) for chunk in chunks]).reshape(x.shape).to(x.dtype)


def gamma(x: Tensor, lengths: Lengths, gamma_max: float = GAMMA_MAX) -> Tensor:
    """γ(x) = 1 / E_T[η_T(x)] of eqn 8, at most gamma_max / E[T]; computed in float64, returned in x's dtype.

    The bound acts only where η is 0 or lost in rounding: next to ψ̂ = −1, for even T.
    """
    return eta(x.double(), lengths).clamp_(min=mean_length(lengths) / gamma_max).reciprocal_().to(x.dtype)


# -------------------------------------------------------------------------------------------------------------- damping


def diagonal(M: Tensor) -> Tensor:
    """The diagonal `[n]` of a factor (a view of it)."""
    return M if M.dim() == 1 else M.diagonal()


def pi(A0: Tensor, *G0: Tensor) -> float:
    """π = √((tr A0 / dim A0) / (tr G0 / dim G0)): factored damping adds π√λ I to A0 and √λ/π I to G0.

    The traces are those of the undamped factors; 1 if either is zero (a dead unit). Several G0 that share one A0 share
    one π, from the mean over them of tr G0 / dim G0: see `inversion.inversion`.
    """
    scale_A = diagonal(A0).double().mean().item()
    scale_G = sum(diagonal(G).double().mean().item() for G in G0) / len(G0)
    ratio = scale_A / scale_G if scale_G > 0 else 0.0
    return math.sqrt(ratio) if 0 < ratio < math.inf else 1.0


def damped(M: Tensor, amount: float) -> Tensor:
    """M + amount · I."""
    result = M.clone()
    diagonal(result).add_(amount)
    return result


# ------------------------------------------------------------------------------------------------------- decompositions


class Root(NamedTuple):
    """L with M = L Lᵀ, lower triangular `[n, n]`, or `[n]`; `retries` says how many attempts failed before."""

    L: Tensor
    retries: int

    @property
    def condition(self) -> float:
        """A lower bound of the condition number of M, from the pivots; exact for a diagonal M."""
        pivots = diagonal(self.L).square()
        return (pivots.max() / pivots.min()).item()


class Eigen(NamedTuple):
    """M = U diag(values) Uᵀ."""

    values: Tensor
    U: Tensor
    retries: int


class Singular(NamedTuple):
    """M = U diag(values) Eᵀ, values ≥ 0."""

    U: Tensor
    values: Tensor
    E: Tensor
    retries: int


def _attempts(M: Tensor) -> Iterator[Tensor]:
    yield M
    if M.dtype != torch.float64:
        yield M.double()
    scale = M.abs().max().double().item()
    for jitter in _JITTERS:
        yield damped(M.double(), jitter * scale)


def _first_success(decompose: Callable[[Tensor], tuple[Tensor, ...]], M: Tensor, name: str) -> tuple[list[Tensor], int]:
    """`decompose(M)` as it is, in float64, with growing jitter; in M's dtype, with the number of retries."""
    if not M.isfinite().all():
        raise DecompositionError(f"{name} is not finite")
    for retries, attempt in enumerate(_attempts(M)):
        try:
            parts = [part.to(M.dtype) for part in decompose(attempt)]
        except torch.linalg.LinAlgError:
            continue
        if all(part.isfinite().all() for part in parts):  # LAPACK may return NaN instead of failing
            return parts, retries
    raise DecompositionError(f"{name} could not be decomposed, neither in float64 nor with jitter {_JITTERS[-1]:g}")


def _cholesky(M: Tensor) -> tuple[Tensor]:
    L = torch.linalg.cholesky(M)
    pivots = L.diagonal().square()
    if pivots.min() < torch.finfo(M.dtype).eps * pivots.max():
        raise torch.linalg.LinAlgError("a pivot is rounding noise")  # what follows would be finite and meaningless
    return (L,)


def safe_cholesky(M: Tensor, name: str = "M") -> Root:
    """The Cholesky factor of a symmetric positive-definite M (the root of a diagonal one).

    Tries M's own dtype, then float64, then a jitter; raises DecompositionError with `name` if nothing helps.
    """
    if M.dim() == 1:
        if not (M.isfinite() & (M > 0)).all():
            raise DecompositionError(f"{name} must be finite and positive, its smallest entry is {M.min().item():.3g}")
        return Root(M.sqrt(), 0)
    (L,), retries = _first_success(_cholesky, M, name)
    return Root(L, retries)


def safe_eigh(M: Tensor, name: str = "M") -> Eigen:
    """Eigenvalues (ascending) and eigenvectors of a symmetric M; a diagonal M keeps its order. Retries as above."""
    if M.dim() == 1:
        return Eigen(M, torch.ones_like(M), 0)
    (values, U), retries = _first_success(torch.linalg.eigh, M, name)
    return Eigen(values, U, retries)


def safe_svd(M: Tensor, name: str = "M") -> Singular:
    """The singular value decomposition of a square M; a diagonal M keeps its order. Retries as above."""
    if M.dim() == 1:
        return Singular(torch.where(M < 0, -1.0, 1.0).to(M.dtype), M.abs(), torch.ones_like(M), 0)
    (U, values, Eh), retries = _first_success(torch.linalg.svd, M, name)
    return Singular(U, values, Eh.mT, retries)


def require_nonsingular(M: Tensor, name: str, eps: float) -> None:
    """Raises DecompositionError where the smallest eigenvalue of M is within n · eps of zero, relative to the largest.

    `eps` is that of the precision in which M was measured, which may be less than M's dtype.
    """
    if not M.isfinite().all():
        raise DecompositionError(f"{name} is not finite")
    values = M if M.dim() == 1 else torch.linalg.eigvalsh(M)
    smallest, largest = values.min().item(), values.max().item()
    if smallest <= len(M) * eps * largest:
        raise DecompositionError(f"{name} is singular (eigenvalues {smallest:.3g} to {largest:.3g}): use damping > 0")


def symmetric_part(M: Tensor) -> Tensor:
    return M if M.dim() == 1 else (M + M.mT) / 2


def whiten(L: Tensor, M1: Tensor) -> Tensor:
    """Ψ̂ = L⁻¹ M1 L⁻ᵀ: the lag-1 factor in coordinates in which the lag-0 factor is the identity."""
    if L.dim() == 1:
        return M1 / L.square()
    half = torch.linalg.solve_triangular(L, M1, upper=False)
    return torch.linalg.solve_triangular(L, half.mT, upper=False).mT


def unwhiten(L: Tensor, E: Tensor) -> Tensor:
    """L⁻ᵀ E."""
    return E / L if L.dim() == 1 else torch.linalg.solve_triangular(L.mT, E, upper=True)


def inverse(L: Tensor) -> Tensor:
    """M⁻¹ = L⁻ᵀ L⁻¹."""
    return L.square().reciprocal() if L.dim() == 1 else torch.cholesky_inverse(L)
