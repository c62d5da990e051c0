"""The gates of a layer as blocks of their own and as one, against the exact Fisher of all of them together.

The direction of a step is F̂⁻¹∇h. Along an eigenvector of F̂^{-1/2} F F̂^{-1/2} with eigenvalue μ it is μ times as long as
F⁻¹ would have it: the largest μ says by how much a step is too long at worst.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor

from fisher_study.approximations import factor, mean_eigenvalue, of_library, written_out
from fisher_study.exact import Block, enumerate_scores, enumerated_block, mean_block
from fisher_study.measures import kl_divergences, relative_spectrum
from fisher_study.problems import Problem
from kfacrnn.kfac.inversion import inversion
from kfacrnn.kfac.maths import damped

APPROXIMATIONS = ("indep", "option1", "option2")


def layer(problem: Problem, batches: int) -> tuple[Block, list[Block]]:
    """Of the problem's one layer at its longest T: all gates together, and each."""
    longest = max(problem.lengths)
    fixed = problem.fixed(batches)[longest]
    whole = mean_block([enumerated_block(*enumerate_scores(problem, batch, joint=True)) for batch in fixed])
    of_batches = zip(*(map(enumerated_block, enumerate_scores(problem, batch)) for batch in fixed), strict=True)
    return whole, [mean_block([*parts]) for parts in of_batches]


def within(whole: Block, gates: list[Block]) -> Tensor:
    """The exact Fisher `[n·M, n·M]` of all gates, with zeros between them."""
    n, M = whole.A.shape[1], whole.G.shape[1]
    total = whole.fisher.new_zeros(n, M, n, M)
    ends = accumulate((gate.G.shape[1] for gate in gates), initial=0)
    for (first, last), gate in zip(pairwise(ends), gates, strict=True):
        total[:, first:last, :, first:last] = gate.fisher.view(n, last - first, n, last - first)
    return total.view(n * M, n * M)


def separate(approximation: str, whole: Block, gates: list[Block], damping: float) -> Tensor:
    """F̂ of a layer whose gates are blocks of their own: they have one A side, and one π."""
    A0, A1 = (factor(whole.A, lag) for lag in (0, 1))
    G0, G1 = ([factor(gate.G, lag) for gate in gates] for lag in (0, 1))
    inverse = inversion(approximation, A0, A1, G0, G1, lengths=len(whole.A), damping=damping)()
    return written_out(inverse, whole)


def distances(whole: Block, gates: list[Block], damping: float) -> Iterator[dict[str, Any]]:
    """A row for every approximation, with separate gates and with joint ones; `damping` in units of the mean eigenvalue
    of V0, of all gates. `between` is ‖F between gates‖ / ‖F‖."""
    amount = damping * mean_eigenvalue(whole)
    exact = damped(whole.fisher, len(whole.A) * amount)
    between = ((whole.fisher - within(whole, gates)).norm() / whole.fisher.norm()).item()
    for name in APPROXIMATIONS:
        found = {
            "separate": separate(name, whole, gates, amount),
            "joint": of_library(name, whole, amount),
        }
        for how, fisher in found.items():
            mu = relative_spectrum(exact, fisher)
            yield {
                "noise": whole.noise,
                "between": between,
                "approximation": name,
                "gates": how,
                "frobenius": ((fisher - exact).norm() / exact.norm()).item(),
                "kl_approximate_exact": kl_divergences(mu)[0],
                "mu_max": mu[-1].item(),
            }
