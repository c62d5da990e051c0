"""The three approximations of the Fisher of a weight matrix that is used at every step, side by side: eqns 6, 8 and 9.

    symbol   shape                 meaning
    A0, A1   [n, n] or [n]         E[a_t a_tᵀ] and E[a_{t+1} a_tᵀ]; `[n]` is the diagonal of a diagonal factor
    G0, G1   [m, m] or [m]         the same of g_t; several may share one A0, as the gates of an LSTM do: "splits"
    Z        [Σm, n]               a gradient, the rows of the splits one below the other
    V0, V1   A0 ⊗ G0 and A1 ⊗ G1   with column-stacking vec and the damped A0, G0
    Ψ̂        Ψ̂_A ⊗ Ψ̂_G             L⁻¹ V1 L⁻ᵀ with L a root of V0
    P, N     as A0, G0             L⁻ᵀE and L⁻ᵀΨ̂E, E the eigenvectors of Ψ̂ (option 1) or of Ψ̂ᵀΨ̂ (option 2)
    Y        [Σm, n]               what is left to multiply by in that basis

F is the Fisher of the loss summed over a sequence's steps (E[T]·V0 for indep); the damping λ is added to V0, not to F.
This module knows nothing of networks or of where the factors come from.

J. Martens, J. Ba, M. Johnson, "Kronecker-factored Curvature Approximations for Recurrent Neural Networks", ICLR 2018.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from kfacrnn.kfac.maths import (
    GAMMA_MAX,
    Lengths,
    Root,
    damped,
    gamma,
    inverse,
    length_distribution,
    mean_length,
    pi,
    require_nonsingular,
    safe_cholesky,
    safe_eigh,
    safe_svd,
    symmetric_part,
    unwhiten,
    whiten,
)


@dataclass(frozen=True)
class Diagnostics:
    """What a decomposition met, for logs."""

    condition_A: float  # of the damped factors, the worst of the splits; lower bounds
    condition_G: float
    psi_min: float = 0.0  # extremes of ψ̂ = ψ̂_A ψ̂_G before any clipping; option 2: of the singular values of Ψ̂
    psi_max: float = 0.0
    clipped: int = 0  # ψ̂_A and ψ̂_G beyond ±1, where only rounding or inconsistent statistics can put them (B.2)
    retries: int = 0  # decompositions that failed before one succeeded


@dataclass(frozen=True, eq=False)
class FisherInverse(ABC):
    """F⁻¹ in pre-computed form: a few products with P, N and Y are all that remains to be done."""

    P_A: Tensor
    P_G: tuple[Tensor, ...]
    diagnostics: Diagnostics

    def multiply(self, Z: Tensor) -> Tensor:
        """F⁻¹ vec(Z) as a matrix `[Σm, n]`; raises ValueError if Z is not of that shape and of the factors' dtype."""
        shape = (sum(map(len, self.P_G)), len(self.P_A))
        dtype = torch.promote_types(self.P_A.dtype, torch.float32)  # P may be bfloat16, factors never are
        if Z.shape != shape or Z.dtype != dtype:
            raise ValueError(f"Z must be {list(shape)} of {dtype}, got {list(Z.shape)} of {Z.dtype}")
        return self._multiply(Z).to(dtype)

    @abstractmethod
    def _multiply(self, Z: Tensor) -> Tensor: ...

    def to(self, *args: Any) -> Self:
        """The same inverse with its tensors moved or cast, as by `torch.Tensor.to`."""
        return self._mapped(lambda name, tensor: tensor.to(*args).contiguous())

    def with_products_in(self, dtype: torch.dtype) -> Self:
        """The same inverse with what `multiply` multiplies by as matrices, P and N, in `dtype`."""
        return self._mapped(lambda name, tensor: tensor.to(dtype) if name != "Y" and tensor.dim() == 2 else tensor)

    def _mapped(self, change: Callable[[str, Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {}
        for name in (field.name for field in dataclasses.fields(self) if field.name != "diagnostics"):
            value = getattr(self, name)
            several = isinstance(value, tuple)
            changed[name] = tuple(change(name, tensor) for tensor in value) if several else change(name, value)
        return dataclasses.replace(self, **changed)

    def state(self) -> dict[str, Any]:
        """The fields as tensors, tuples of tensors and numbers, for a checkpoint; `from_state` is the way back."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"form": type(self).__name__, **fields, "diagnostics": dataclasses.asdict(self.diagnostics)}


# ----------------------------------------------------------------------------------------------- one side, and products


class _Side(NamedTuple):
    """One factor pair: the root of the damped M0, and M1."""

    name: str
    root: Root
    lag: Tensor


class _Modes(NamedTuple):
    psi: Tensor  # eigenvalues or singular values, before clipping
    P: Tensor
    retries: int


class _Time(NamedTuple):
    lengths: Mapping[int, float]
    gamma_max: float


def _symmetric_modes(side: _Side) -> _Modes:
    psi, U, retries = safe_eigh(symmetric_part(whiten(side.root.L, side.lag)), f"Ψ̂_{side.name}")
    return _Modes(psi, unwhiten(side.root.L, U), retries)


def _singular_modes(side: _Side) -> tuple[_Modes, Tensor]:
    """The modes and N = L⁻ᵀΨ̂E = L⁻ᵀU diag(ψ̂), with ψ̂ clipped to 1."""
    U, psi, E, retries = safe_svd(whiten(side.root.L, side.lag), f"Ψ̂_{side.name}")
    return _Modes(psi, unwhiten(side.root.L, E), retries), unwhiten(side.root.L, U * psi.clamp(max=1))


def _diagnostics(A: _Side, G: Sequence[_Side], modes: Sequence[_Modes] = ()) -> Diagnostics:
    """`modes` are those of A and of every split, in this order, or none."""
    seen = Diagnostics(
        condition_A=A.root.condition,
        condition_G=max(split.root.condition for split in G),
        retries=A.root.retries + sum(split.root.retries for split in G) + sum(side.retries for side in modes),
    )
    if not modes:
        return seen
    psi_A, psi_G = modes[0].psi, torch.cat([split.psi for split in modes[1:]])
    extremes = torch.outer(torch.stack(psi_G.aminmax()), torch.stack(psi_A.aminmax()))
    clipped = int((psi_A.abs() > 1).sum() + (psi_G.abs() > 1).sum())
    return dataclasses.replace(seen, psi_min=extremes.min().item(), psi_max=extremes.max().item(), clipped=clipped)


def _into(P_G: tuple[Tensor, ...], Z: Tensor, P_A: Tensor) -> Tensor:
    """P_Gᵀ Z P_A, every split's rows by its own P_G; a product of matrices is in the dtype of P."""
    Z = Z * P_A if P_A.dim() == 1 else Z.to(P_A.dtype) @ P_A
    rows = Z.split([len(P) for P in P_G])
    parts = [P[:, None] * z if P.dim() == 1 else P.mT @ z.to(P.dtype) for P, z in zip(P_G, rows, strict=True)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _back(P_G: tuple[Tensor, ...], Z: Tensor, P_A: Tensor) -> Tensor:
    """P_G Z P_Aᵀ."""
    return _into(tuple(map(_transpose, P_G)), Z, _transpose(P_A))


def _transpose(P: Tensor) -> Tensor:
    return P if P.dim() == 1 else P.mT


# --------------------------------------------------------------------------------------------- the three, on one screen


@dataclass(frozen=True, eq=False)
class Indep(FisherInverse):
    """Eqn 6, no correlation over time: F⁻¹z = vec(G0⁻¹ Z A0⁻¹) / E[T]. P_A is A0⁻¹ and P_G is G0⁻¹ / E[T]."""

    @classmethod
    def of(cls, A: _Side, G: Sequence[_Side], time: _Time) -> Self:
        P_G = tuple(inverse(split.root.L) / mean_length(time.lengths) for split in G)
        return cls(inverse(A.root.L), P_G, _diagnostics(A, G))

    def _multiply(self, Z: Tensor) -> Tensor:
        return _back(self.P_G, Z, self.P_A)

    def for_columns(self, columns: Tensor) -> Self:
        """F⁻¹ of those columns of the weight matrix alone, which a diagonal A0 leaves independent of the others."""
        return dataclasses.replace(self, P_A=self.P_A[columns])


@dataclass(frozen=True, eq=False)
class Option1(FisherInverse):
    """Eqn 8, symmetric V1: F̂⁻¹ = U diag(γ(ψ̂)) Uᵀ with Ψ̂ = U diag(ψ̂) Uᵀ, ψ̂ of either sign.

    V1 is made symmetric as in appendix C.3: sym(A1) ⊗ sym(G1), which lacks the skew(A1) ⊗ skew(G1) of sym(V1).
    """

    Y: Tensor

    @classmethod
    def of(cls, A: _Side, G: Sequence[_Side], time: _Time, spectrum: Callable[[Tensor], Tensor] | None = None) -> Self:
        modes_A, modes_G = _symmetric_modes(A), [_symmetric_modes(split) for split in G]
        psi = torch.outer(torch.cat([modes.psi for modes in modes_G]), modes_A.psi).double().clamp_(-1, 1)
        Y = gamma(psi if spectrum is None else spectrum(psi), time.lengths, time.gamma_max)
        return cls(modes_A.P, tuple(modes.P for modes in modes_G), _diagnostics(A, G, [modes_A, *modes_G]), Y)

    def _multiply(self, Z: Tensor) -> Tensor:
        return _back(self.P_G, _into(self.P_G, Z, self.P_A) * self.Y, self.P_A)


@dataclass(frozen=True, eq=False)
class Option2(FisherInverse):
    """Eqn 9, endless sequences: F̂⁻¹ = (I − Ψ̂)(I − Ψ̂ᵀΨ̂)⁻¹(I − Ψ̂ᵀ) / E[T] with Ψ̂ = U diag(ψ̂) Eᵀ, 0 ≤ ψ̂ ≤ 1."""

    Y: Tensor
    N_A: Tensor
    N_G: tuple[Tensor, ...]

    @classmethod
    def of(cls, A: _Side, G: Sequence[_Side], time: _Time) -> Self:
        (modes_A, N_A), (modes_G, N_G) = _singular_modes(A), zip(*map(_singular_modes, G), strict=True)
        psi = torch.outer(torch.cat([modes.psi for modes in modes_G]).clamp(max=1), modes_A.psi.clamp(max=1)).double()
        one_minus_m = (1 - psi) * (1 + psi)  # 1 − m_G m_A of appendix C.2, m = ψ̂²
        Y = 1 / (mean_length(time.lengths) * one_minus_m.clamp_(min=1 / time.gamma_max))
        return cls(modes_A.P, tuple(modes.P for modes in modes_G), _diagnostics(A, G, [modes_A, *modes_G]), Y, N_A, N_G)

    def _multiply(self, Z: Tensor) -> Tensor:
        z = (_into(self.P_G, Z, self.P_A) - _into(self.N_G, Z, self.N_A)) * self.Y
        return _back(self.P_G, z, self.P_A) - _back(self.N_G, z, self.N_A)


APPROXIMATIONS: Mapping[str, Callable[[_Side, Sequence[_Side], _Time], FisherInverse]] = {
    "indep": Indep.of,
    "option1": Option1.of,
    "option2": Option2.of,
    # What the authors' archived TensorFlow code does for option 1; wrong where modes oscillate. For comparison only.
    "option1_abs": partial(Option1.of, spectrum=torch.abs),
}

# ---------------------------------------------------------------------------------------------------------------- entry


@torch.no_grad()
def decompose(
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
) -> FisherInverse:
    """F⁻¹ of a matrix whose row splits are blocks of their own with one A side in common, decomposed once.

    `G0` and `G1` hold one factor per split, of any size: a sequence, or one tensor `[k, m, m]`. The splits share one π,
    √((tr A0/dim A0) / mean of (tr G0/dim G0)), where separate blocks would have one each: a π per split would cost a
    decomposition of A0 per split. λI is added to every V0 alike; what changes are the cross terms of the factored form.

    Without lag factors V1 = 0, and every approximation is indep. Decompositions run in `compute_dtype`, the products of
    `multiply` in `product_dtype`; None: in the factors' dtype, which the result has in any case. Shapes and options are
    taken to be valid; a factor that is not finite, not positive definite, or singular with zero damping raises a
    DecompositionError that names it.
    """
    balance, root_damping = pi(A0, *G0), math.sqrt(damping)

    def side(name: str, M0: Tensor, M1: Tensor, amount: float) -> _Side:
        eps = max(torch.finfo(M0.dtype).eps, torch.finfo(compute_dtype).eps)
        M0 = M0.to(compute_dtype)
        if damping == 0:
            require_nonsingular(M0, f"{name}0", eps)
        return _Side(name, safe_cholesky(damped(M0, amount), f"{name}0"), M1.to(compute_dtype))

    if A1 is None or G1 is None:
        approximation, A1, G1 = "indep", torch.zeros_like(A0), [torch.zeros_like(M0) for M0 in G0]
    A = side("A", A0, A1, balance * root_damping)
    G = [side("G", M0, M1, root_damping / balance) for M0, M1 in zip(G0, G1, strict=True)]
    found = APPROXIMATIONS[approximation](A, G, _Time(length_distribution(lengths), gamma_max)).to(A0.dtype)
    return found if product_dtype is None else found.with_products_in(product_dtype)


def from_state(state: Mapping[str, Any]) -> FisherInverse:
    """The inverse whose `state()` this was."""
    form = {cls.__name__: cls for cls in (Indep, Option1, Option2)}[state["form"]]
    fields = {name: value for name, value in state.items() if name != "form"}
    return form(**{**fields, "diagnostics": Diagnostics(**state["diagnostics"])})
