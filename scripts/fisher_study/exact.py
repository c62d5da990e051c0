"""The exact Fisher block of a weight matrix and its factors at all pairs of steps, by enumeration.

With a root R_u of the Fisher of step u's log-loss with respect to y_u, and the scaled scores
g_t^q = (∂y_u/∂s_t)ᵀ R_u e_k, q = (u, k), every expectation over targets is a sum over q; nothing is sampled.

    F    = E_x Σ_q vec(DW^q) vec(DW^q)ᵀ,  DW^q = Σ_t g_t^q a_tᵀ        [n·m, n·m], column-stacking vec
    G_ts = E_x Σ_q g_t^q g_s^qᵀ,          A_ts = E_x a_t a_sᵀ          [T, m, T, m] and [T, n, T, n]

E_x is the mean over fixed batches of B sequences. This module knows nothing of approximations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisher_study.problems import Problem
from kfacrnn.kfac.capture import LinearMap, Recorder
from kfacrnn.kfac.factors import with_homogeneous_coordinate


class Scores(NamedTuple):
    """One block: a `[T, B, n]`, g `[Q, T, B, m]`, and the step `[Q]` at which each of the Q scores begins."""

    name: str
    a: Tensor
    g: Tensor
    begins: Tensor

    def prefix(self, steps: int) -> Scores:
        """The same for the first steps of every sequence alone, whose losses know nothing of what follows."""
        chosen = self.begins < steps
        return Scores(self.name, self.a[:steps], self.g[chosen][:, :steps], self.begins[chosen])


class Block(NamedTuple):
    """The exact Fisher `[n·m, n·m]`, A_ts `[T, n, T, n]` and G_ts `[T, m, T, m]`. `noise` is the relative standard
    error of that Fisher as an estimate of the one over all inputs: 0 if these are all, NaN if it is not known."""

    name: str
    fisher: Tensor
    A: Tensor
    G: Tensor
    noise: float = 0.0


def exact_blocks(problem: Problem, batches: int) -> Iterator[tuple[int, Block]]:
    """Every T and block of the problem as it is now."""
    parts: dict[tuple[int, str], list[Block]] = {}
    for longest, fixed in problem.fixed(batches).items():
        for scores in (scores for batch in fixed for scores in enumerate_scores(problem, batch)):
            for steps in problem.lengths if problem.prefixes else (longest,):
                parts.setdefault((steps, scores.name), []).append(enumerated_block(scores.prefix(steps)))
    for (steps, _), of_batches in parts.items():
        block = mean_block(of_batches)
        unknown = len(of_batches) == 1 and not problem.exhaustive
        yield steps, block._replace(noise=math.nan) if unknown else block


def enumerate_scores(problem: Problem, batch: Any, joint: bool = False) -> Iterator[Scores]:
    """For every split of the recurrent maps that has more rows than one, or with their splits `joint`."""
    inputs = problem.inputs(batch)
    with Recorder(problem.model).recording() as tape:
        y = problem.readout(*inputs)
    taps = [tap for tap in tape if isinstance(tap.map, LinearMap) and tap.map.splits]
    roots = problem.roots(y.detach(), batch)
    scores, begins = [], []
    for u, root in enumerate(roots):
        for seed in root.unbind(-1):
            if seed.any():  # nothing is predicted at this step otherwise
                scores.append(torch.autograd.grad(y[u], [tap.s for tap in taps], seed, retain_graph=True))
                begins.append(u)
    for tap, of_map in zip(taps, zip(*scores, strict=True), strict=True):
        assert isinstance(tap.map, LinearMap)
        a, g = with_homogeneous_coordinate(tap.a), torch.stack(of_map)
        splits = {tap.map.name: g.shape[-1]} if joint else tap.map.splits
        for (name, rows), part in zip(splits.items(), g.split([*splits.values()], -1), strict=True):
            if rows > 1:
                yield Scores(name, a, part, torch.tensor(begins))


def second_moments(x: Tensor) -> Tensor:
    """E_x Σ_q x_t x_sᵀ for all pairs of steps, `[T, n, T, n]`, from `[Q, T, B, n]`."""
    Q, T, B, n = x.shape
    flat = x.transpose(1, 2).reshape(Q * B, T * n)
    return (flat.mT @ flat / B).view(T, n, T, n)


def enumerated_block(scores: Scores) -> Block:
    gradients = torch.einsum("qtbm,tbn->qbnm", scores.g, scores.a).flatten(2).flatten(0, 1)
    fisher = gradients.mT @ gradients / scores.a.shape[1]
    return Block(scores.name, fisher, second_moments(scores.a.unsqueeze(0)), second_moments(scores.g))


def mean_block(parts: list[Block]) -> Block:
    """Of batches of equally many sequences."""
    fishers, A, G = (torch.stack([part[i] for part in parts]) for i in (1, 2, 3))
    fisher, noise = fishers.mean(0), 0.0
    if len(parts) > 1:
        squares = (fishers - fisher).square().sum() / (len(parts) * (len(parts) - 1))
        noise = (squares.sqrt() / fisher.norm()).item()
    return Block(parts[0].name, fisher, A.mean(0), G.mean(0), noise)
