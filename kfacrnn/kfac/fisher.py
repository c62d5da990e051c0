"""The three approximations of the Fisher of a weight matrix that is used at every step, side by side: eqns 6, 8 and 9.

    symbol   shape                 meaning
    A0, A1   [n, n] or [n]         E[a_t a_tᵀ] and E[a_{t+1} a_tᵀ]; `[n]` is the diagonal of a diagonal factor
    G0, G1   [m, m] or [m]         the same of g_t; several may share one A0, as the gates of an LSTM do: "splits"
    Z        [Σm, n]               a gradient, the rows of the splits one below the other
    V0, V1   A0 ⊗ G0 and A1 ⊗ G1   with column-stacking vec and the damped A0, G0
    Ψ̂        Ψ̂_A ⊗ Ψ̂_G             L⁻¹ V1 L⁻ᵀ with L a root of V0
    P, N     as A0, G0             L⁻ᵀE and L⁻ᵀΨ̂E, E the eigenvectors of Ψ̂ (option 1) or of Ψ̂ᵀΨ̂ (option 2)
    Y        [Σm, n]               what is left to multiply by in that basis

Most modes of a large Ψ̂ are next to nothing. `Few` leaves them out: those below a tolerance are taken to be uncorrelated
over time, and F⁻¹ is that of indep but in the modes that remain; P, N and Y then have the columns of these alone.

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
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor

from kfacrnn.kfac.maths import (
    Root,
    gamma,
    inverse,
    mean_length,
    safe_eigh,
    safe_svd,
    symmetric_part,
    unwhiten,
    whiten,
)
from kfacrnn.kfac.products import back, into, rows, together


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
    P_G: tuple[Tensor, ...]  # of the splits, one after the other, or of several `together`
    diagnostics: Diagnostics

    def multiply(self, Z: Tensor) -> Tensor:
        """F⁻¹ vec(Z) as a matrix `[Σm, n]`; raises ValueError if Z is not of that shape and of the factors' dtype."""
        shape = (sum(map(rows, self.P_G)), len(self.P_A))
        dtype = torch.promote_types(self.P_A.dtype, torch.float32)  # P may be bfloat16, factors never are
        if Z.shape != shape or Z.dtype != dtype:
            raise ValueError(f"Z must be {list(shape)} of {dtype}, got {list(Z.shape)} of {Z.dtype}")
        return self._multiply(Z).to(dtype)

    @abstractmethod
    def _multiply(self, Z: Tensor) -> Tensor: ...

    def to(self, *args: Any) -> Self:
        """The same inverse with its tensors moved or cast, as by `torch.Tensor.to`."""
        return self._mapped(lambda name, tensor: tensor.to(*args).contiguous())

    def with_scales_in(self, dtype: torch.dtype) -> Self:
        """The same inverse with Y and m in `dtype`."""
        return self._mapped(lambda name, tensor: tensor.to(dtype).contiguous() if name in ("Y", "m") else tensor)

    def _mapped(self, change: Callable[[str, Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {}
        for name in (each.name for each in dataclasses.fields(self) if each.name != "diagnostics"):
            value = getattr(self, name)
            if isinstance(value, FisherInverse):
                changed[name] = value._mapped(change)
            elif value is not None:
                several = isinstance(value, tuple)
                changed[name] = tuple(change(name, tensor) for tensor in value) if several else change(name, value)
        return dataclasses.replace(self, **changed)

    def state(self) -> dict[str, Any]:
        """The fields as tensors, tuples of tensors and numbers, for a checkpoint; `from_state` is the way back."""
        fields = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        nested = {name: value.state() for name, value in fields.items() if isinstance(value, FisherInverse)}
        return {"form": type(self).__name__, **fields, **nested, "diagnostics": dataclasses.asdict(self.diagnostics)}


# ----------------------------------------------------------------------------------------------- one side, and products


class Side(NamedTuple):
    """One factor pair: the root of the damped M0, and M1."""

    name: str
    root: Root
    lag: Tensor


class Modes(NamedTuple):
    """One side, decomposed: what its inverse multiplies by, and what Y and the diagnostics are made of."""

    P: Tensor
    condition: float  # of the damped M0, a lower bound
    retries: int
    psi: Tensor | None = None  # eigenvalues or singular values, before clipping; indep has none
    N: Tensor | None = None  # option 2
    inverse: Tensor | None = None  # of the damped M0, where P and N have the first of the modes only

    def first(self, tolerance: float, inverse: Tensor | None) -> Modes:
        """The modes in order of falling |ψ̂|, with P and N for those above `tolerance`."""
        assert self.psi is not None
        order = self.psi.abs().argsort(descending=True, stable=True)
        kept = order[: int((self.psi.abs() > tolerance).sum())]
        N = None if self.N is None else self.N[:, kept]
        return self._replace(P=self.P[:, kept], psi=self.psi[order], N=N, inverse=inverse)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.P, self.psi, self.N, self.inverse

    @property
    def kept(self) -> Tensor:
        """The ψ̂ that P and N belong to."""
        assert self.psi is not None
        return self.psi[: self.P.shape[-1]]

    def stored_in(self, dtypes: Sequence[torch.dtype]) -> Modes:
        """With P, N and the inverse in the first of `dtypes` and, if matrices, then in the second; ψ̂ as it is."""

        def stored(M: Tensor) -> Tensor:
            M = M.to(dtypes[0]).contiguous()
            return M.to(dtypes[1]) if M.dim() == 2 else M

        N, inverse = (None if M is None else stored(M) for M in (self.N, self.inverse))
        return self._replace(P=stored(self.P), N=N, inverse=inverse)


class Time(NamedTuple):
    lengths: Mapping[int, float]
    gamma_max: float


def _diagnostics(A: Modes, G: Sequence[Modes]) -> Diagnostics:
    seen = Diagnostics(
        condition_A=A.condition,
        condition_G=max(split.condition for split in G),
        retries=A.retries + sum(split.retries for split in G),
    )
    if A.psi is None:
        return seen
    psi_A, psi_G = A.psi, _psi(G)
    extremes = torch.outer(torch.stack(psi_G.aminmax()), torch.stack(psi_A.aminmax()))
    clipped = int((psi_A.abs() > 1).sum() + (psi_G.abs() > 1).sum())
    return dataclasses.replace(seen, psi_min=extremes.min().item(), psi_max=extremes.max().item(), clipped=clipped)


def _psi(G: Sequence[Modes]) -> Tensor:
    """ψ̂_G of all splits, one after the other."""
    return torch.cat([split.psi for split in G if split.psi is not None])


def _kept(G: Sequence[Modes]) -> Tensor:
    return torch.cat([split.kept for split in G])


def _share(tolerance: float, others: Sequence[Modes]) -> float:
    """What |ψ̂| of one side must exceed for a product with the largest of the other to be above the tolerance."""
    largest = float(_psi(others).abs().max().clamp(max=1))
    return tolerance / largest if largest else math.inf


# --------------------------------------------------------------------------------------------- the three, on one screen


@dataclass(frozen=True, eq=False)
class Indep(FisherInverse):
    """Eqn 6, no correlation over time: F⁻¹z = vec(G0⁻¹ Z A0⁻¹) / E[T]. P_A is A0⁻¹ and P_G is G0⁻¹ / E[T]."""

    @staticmethod
    def modes(side: Side, time: Time) -> Modes:
        P = inverse(side.root.L)
        return Modes(P if side.name == "A" else P / mean_length(time.lengths), side.root.condition, side.root.retries)

    @classmethod
    def of(cls, A: Modes, G: Sequence[Modes], time: Time) -> Self:
        return cls(A.P, together(split.P for split in G), _diagnostics(A, G))

    def _multiply(self, Z: Tensor) -> Tensor:
        return back(self.P_G, Z, self.P_A)

    def for_columns(self, columns: Tensor) -> Self:
        """F⁻¹ of those columns of the weight matrix alone, which a diagonal A0 leaves independent of the others."""
        return dataclasses.replace(self, P_A=self.P_A[columns])


@dataclass(frozen=True, eq=False)
class Option1(FisherInverse):
    """Eqn 8, symmetric V1: F̂⁻¹ = U diag(γ(ψ̂)) Uᵀ with Ψ̂ = U diag(ψ̂) Uᵀ, ψ̂ of either sign.

    V1 is made symmetric as in appendix C.3: sym(A1) ⊗ sym(G1), which lacks the skew(A1) ⊗ skew(G1) of sym(V1).
    """

    Y: Tensor

    @staticmethod
    def modes(side: Side, time: Time) -> Modes:
        psi, U, retries = safe_eigh(symmetric_part(whiten(side.root.L, side.lag)), f"Ψ̂_{side.name}")
        return Modes(unwhiten(side.root.L, U), side.root.condition, side.root.retries + retries, psi)

    @classmethod
    def of(cls, A: Modes, G: Sequence[Modes], time: Time, spectrum: Callable[[Tensor], Tensor] | None = None) -> Self:
        psi = torch.outer(_kept(G), A.kept).double().clamp_(-1, 1)
        Y = gamma(psi if spectrum is None else spectrum(psi), time.lengths, time.gamma_max)
        return cls(A.P, together(split.P for split in G), _diagnostics(A, G), Y)

    @classmethod
    def of_two_uses(cls, A: Modes, G: Sequence[Modes], time: Time) -> Self:
        """Not in the paper: of a matrix that is used at two places, F = E[T]·(A0 ⊗ G0 + A1 ⊗ G1) with the lag-0 factors
        of the second use, of any size, for A1 and G1. The same form, with 1/(E[T](1 + ψ)) for γ(ψ̂)."""
        psi = torch.outer(_kept(G), A.kept).double().clamp_(min=0)  # below 0 by rounding only
        Y = 1 / (mean_length(time.lengths) * (1 + psi))
        return cls(A.P, together(split.P for split in G), _diagnostics(A._replace(psi=None), G), Y)

    def _multiply(self, Z: Tensor) -> Tensor:
        return back(self.P_G, into(self.P_G, Z, self.P_A).mul_(self.Y), self.P_A)

    def beyond(self, indep: float) -> Self:
        """F⁻¹ less `indep` times the identity of the whitened modes."""
        return dataclasses.replace(self, Y=self.Y - indep)


@dataclass(frozen=True, eq=False)
class Option2(FisherInverse):
    """Eqn 9, endless sequences: F̂⁻¹ = (I − Ψ̂)(I − Ψ̂ᵀΨ̂)⁻¹(I − Ψ̂ᵀ) / E[T] with Ψ̂ = U diag(ψ̂) Eᵀ, 0 ≤ ψ̂ ≤ 1."""

    Y: Tensor
    N_A: Tensor
    N_G: tuple[Tensor, ...]
    m: Tensor | None = None  # ψ̂², where indep's part is left out

    @staticmethod
    def modes(side: Side, time: Time) -> Modes:
        U, psi, E, retries = safe_svd(whiten(side.root.L, side.lag), f"Ψ̂_{side.name}")
        N = unwhiten(side.root.L, U * psi.clamp(max=1))  # L⁻ᵀΨ̂E = L⁻ᵀU diag(ψ̂)
        return Modes(unwhiten(side.root.L, E), side.root.condition, side.root.retries + retries, psi, N)

    @classmethod
    def of(cls, A: Modes, G: Sequence[Modes], time: Time) -> Self:
        assert A.N is not None
        psi = torch.outer(_kept(G).clamp(max=1), A.kept.clamp(max=1)).double()
        one_minus_m = (1 - psi) * (1 + psi)  # 1 − m_G m_A of appendix C.2, m = ψ̂²
        Y = 1 / (mean_length(time.lengths) * one_minus_m.clamp_(min=1 / time.gamma_max))
        N_G = together(split.N for split in G if split.N is not None)
        return cls(A.P, together(split.P for split in G), _diagnostics(A, G), Y, A.N, N_G)

    def _multiply(self, Z: Tensor) -> Tensor:
        p, n = into(self.P_G, Z, self.P_A), into(self.N_G, Z, self.N_A)
        y = None if self.m is None else (self.m * p - n) * self.Y
        z = p.sub_(n).mul_(self.Y)
        return back(self.P_G, z if y is None else y, self.P_A).sub_(back(self.N_G, z, self.N_A))

    def beyond(self, indep: float) -> Self:
        """F⁻¹ less `indep` = 1/E[T] times the identity of the whitened modes: 1/(1 − ψ̂²) − 1 = ψ̂²/(1 − ψ̂²)."""
        return dataclasses.replace(self, m=1 - indep / self.Y)


@dataclass(frozen=True, eq=False)
class Few(FisherInverse):
    """Eqn 8 or 9 with ψ̂ = 0 where |ψ̂| is at most a tolerance: indep's F⁻¹, and what `lags` adds in the modes that are
    left. Relative error of F̂⁻¹ in the others: at most 2|ψ̂| / (1 − |ψ̂|)."""

    lags: Option1 | Option2

    @classmethod
    def of(cls, lags_of: Callable[..., Any], A: Modes, G: Sequence[Modes], time: Time, tolerance: float) -> Self:
        """From modes that come with inverses. What is below the tolerance with every mode of the other side goes."""
        few_A = A.first(_share(tolerance, G), A.inverse)
        few_G = [split.first(_share(tolerance, [A]), split.inverse) for split in G]
        lags = lags_of(few_A, few_G, time).beyond(1 / mean_length(time.lengths))
        assert A.inverse is not None
        inverses_G = together(split.inverse for split in G if split.inverse is not None)
        return cls(A.inverse, inverses_G, lags.diagnostics, lags)

    def _multiply(self, Z: Tensor) -> Tensor:
        return back(self.P_G, Z, self.P_A).add_(self.lags._multiply(Z))


class Approximation(NamedTuple):
    modes: Callable[[Side, Time], Modes]
    of: Callable[[Modes, Sequence[Modes], Time], FisherInverse]


APPROXIMATIONS: Mapping[str, Approximation] = {
    "indep": Approximation(Indep.modes, Indep.of),
    "option1": Approximation(Option1.modes, Option1.of),
    "option2": Approximation(Option2.modes, Option2.of),
    # What the authors' archived TensorFlow code does for option 1; wrong where modes oscillate. For comparison only.
    "option1_abs": Approximation(Option1.modes, partial(Option1.of, spectrum=torch.abs)),
}
FORMS: Mapping[str, Approximation] = {**APPROXIMATIONS, "two uses": Approximation(Option1.modes, Option1.of_two_uses)}


def from_state(state: Mapping[str, Any]) -> FisherInverse:
    """The inverse whose `state()` this was."""
    form: Any = {cls.__name__: cls for cls in (Indep, Option1, Option2, Few)}[state["form"]]
    fields = {name: from_state(value) if name == "lags" else value for name, value in state.items() if name != "form"}
    return cast(FisherInverse, form(**{**fields, "diagnostics": Diagnostics(**state["diagnostics"])}))
