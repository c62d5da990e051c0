"""From the exact Fisher to each approximation, one assumption at a time, as dense matrices.

    independent    Σ_ts A_ts ⊗ G_ts                     a and g are independent (3.2.3)
    homogeneous    Σ_d (T − |d|) Ā_d ⊗ Ḡ_d              and their moments depend on the lag alone (3.2.2)
    one_divisor    Σ_d (T − |d|) A_d ⊗ G_d              and are estimated with the divisor T for every lag (3.5.4)
    lggm           Σ_d (T − |d|) Ψ^d V0                 and lag d follows from lag 1: eqn 7
    option1        eqn 8                                and V1 is symmetric
    option1_abs                                         and its eigenvalues ψ̂ are not negative
    option2        eqn 9                                or, after lggm, sequences are endless
    indep          T · V0, eqn 6                        or, after lggm, there is no correlation over time

The homogeneity of w_t = vec(g_t a_tᵀ) would cost nothing: Σ_ts V_ts is the same as its sum over mean lags. It is the
product of separate means that costs. Damping is the library's: π√λ on A_tt and √λ/π on G_tt.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fisher_study.exact import Block
from kfacrnn.kfac import fisher_inverse
from kfacrnn.kfac.fisher import FisherInverse
from kfacrnn.kfac.maths import damped, pi

PREVIOUS = {  # of every approximation, the one with an assumption less
    "independent": "exact",
    "homogeneous": "independent",
    "one_divisor": "homogeneous",
    "lggm": "one_divisor",
    "option1": "lggm",
    "option1_abs": "option1",
    "option2": "lggm",
    "indep": "lggm",
}
OF_LIBRARY = ("indep", "option1", "option1_abs", "option2")


def factor(M: Tensor, lag: int) -> Tensor:
    """(1/T) Σ_t M_{t+lag,t}: A0, A1, G0, G1, all with one divisor (section 3.5.4)."""
    return M.diagonal(-lag, 0, 2).sum(-1) / len(M)


def mean(M: Tensor, lag: int) -> Tensor:
    """The mean of M_{t+lag,t} over the T − lag pairs there are."""
    return M.diagonal(-lag, 0, 2).mean(-1)


def mean_eigenvalue(block: Block) -> float:
    """Of V0: the unit of the damping."""
    return (factor(block.A, 0).diagonal().mean() * factor(block.G, 0).diagonal().mean()).item()


def approximations(block: Block, damping: float) -> dict[str, Tensor]:
    """F̂ `[n·m, n·m]` of each name in `PREVIOUS`, and the exact F + T·λ·I."""
    fishers = {
        "exact": damped(block.fisher, len(block.A) * damping),
        "independent": independent(block, damping),
        "homogeneous": sum_over_lags(block, damping, mean),
        "one_divisor": sum_over_lags(block, damping, factor),
        "lggm": lggm(block, damping),
    }
    return fishers | {name: of_library(name, block, damping) for name in OF_LIBRARY}


def damping_amounts(block: Block, damping: float) -> tuple[float, float]:
    """π√λ and √λ/π."""
    balance = pi(factor(block.A, 0), factor(block.G, 0))
    return balance * math.sqrt(damping), math.sqrt(damping) / balance


def independent(block: Block, damping: float) -> Tensor:
    A, G = (
        damped(M.flatten(2).flatten(0, 1), amount).view_as(M)
        for M, amount in zip((block.A, block.G), damping_amounts(block, damping), strict=True)
    )
    T, n, _, _ = A.shape
    m = G.shape[1]
    pairs = A.permute(1, 3, 0, 2).reshape(n * n, T * T) @ G.permute(0, 2, 1, 3).reshape(T * T, m * m)
    return pairs.view(n, n, m, m).transpose(1, 2).reshape(n * m, n * m)


def sum_over_lags(block: Block, damping: float, of_lag: Callable[[Tensor, int], Tensor]) -> Tensor:
    steps, amounts = len(block.A), damping_amounts(block, damping)
    A0, G0 = (damped(of_lag(M, 0), amount) for M, amount in zip((block.A, block.G), amounts, strict=True))
    total = steps * torch.kron(A0, G0)
    for d in range(1, steps):
        V = torch.kron(of_lag(block.A, d), of_lag(block.G, d))
        total += (steps - d) * (V + V.mT)
    return total


def lggm(block: Block, damping: float) -> Tensor:
    """Eqn 7 as it stands; (Ψ_A ⊗ Ψ_G)^d V0 = Ψ_A^d A0 ⊗ Ψ_G^d G0."""
    A, G = (Chain(M, amount) for M, amount in zip((block.A, block.G), damping_amounts(block, damping), strict=True))
    total = len(block.A) * torch.kron(A.M0, G.M0)
    for d, (A_d, G_d) in enumerate(zip(A.lags(len(block.A)), G.lags(len(block.A)), strict=True), 1):
        V = torch.kron(A_d, G_d)
        total += (len(block.A) - d) * (V + V.mT)
    return total


class Chain:
    """One factor of the graphical model: M0 damped, Ψ = M1 M0⁻¹."""

    def __init__(self, M: Tensor, amount: float):
        self.M0 = damped(factor(M, 0), amount)
        self.Psi = torch.linalg.solve(self.M0, factor(M, 1), left=False)

    def lags(self, steps: int) -> list[Tensor]:
        """Ψ^d M0 for d = 1, …, steps − 1."""
        powers = [self.Psi @ self.M0]
        for _ in range(2, steps):
            powers.append(self.Psi @ powers[-1])
        return powers


def library_inverse(approximation: str, block: Block, damping: float) -> FisherInverse:
    A0, A1, G0, G1 = (factor(M, lag) for M in (block.A, block.G) for lag in (0, 1))
    return fisher_inverse(approximation, A0, A1, G0, G1, lengths=len(block.A), damping=damping)


def of_library(approximation: str, block: Block, damping: float) -> Tensor:
    return written_out(library_inverse(approximation, block, damping), block)


def written_out(inverse: FisherInverse, block: Block) -> Tensor:
    """F̂ as the library has it: the inverse of `multiply`, column by column."""
    size = len(block.fisher)
    basis = torch.eye(size).to(block.fisher).view(size, block.A.shape[1], block.G.shape[1]).mT  # [n·m, m, n]
    fisher = torch.linalg.inv(torch.stack([inverse.multiply(Z).mT.flatten() for Z in basis], 1))
    return (fisher + fisher.mT) / 2
