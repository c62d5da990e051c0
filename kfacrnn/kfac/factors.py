"""Kronecker factors, estimated from what the maps saw (section 3.5.4) and averaged over updates.

    A0 = (1/ΣT) Σ_cases Σ_t a_t a_tᵀ          A1 = (1/ΣT) Σ_cases Σ_{t<T} a_{t+1} a_tᵀ          G0, G1 likewise

with one divisor for both, ΣT = B·E[T]. `A0, A1` and `G0, G1` are averaged together, from the
same data with the same weights, or the bound ρ(Ψ̂) ≤ 1 of appendix B.2 is lost. An average is a weighted sum and its
weight, so that its bias correction is no separate step. Passes are weighted by their time-steps, so that it does not
matter how sequences of different lengths are cut into passes. This module knows tensors, not modules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kfacrnn.predictive import Distribution


@dataclass(frozen=True)
class Sequences:
    """The time axis of one pass: its shape, the lengths of the sequences and where they are padded."""

    steps: int
    cases: int
    lengths: dict[int, float]  # T → number of sequences of that length
    padding: Tensor | None = None  # [T, B] bool, True behind a sequence's end

    @classmethod
    def of(cls, distribution: Distribution) -> Sequences:
        steps, cases = distribution.logits.shape[:2]
        if distribution.lengths is None:
            return cls(steps, cases, {steps: float(cases)})
        lengths = distribution.lengths
        padding = torch.arange(steps, device=lengths.device)[:, None] >= lengths
        counts = {length: float(count) for length, count in sorted(Counter(lengths.tolist()).items())}
        return cls(steps, cases, counts, padding.to(distribution.logits.device))

    @classmethod
    def together(cls, parts: Sequence[Sequences]) -> Sequences:
        """Those of several processes, without their padding."""
        every = sorted({length for part in parts for length in part.lengths})
        lengths = {length: sum(part.lengths.get(length, 0.0) for part in parts) for length in every}
        return cls(parts[0].steps, sum(part.cases for part in parts), lengths)

    def counted(self, times: int) -> Sequences:
        """Without padding, each as `times` sequences; 0: none."""
        counts = {length: times * count for length, count in self.lengths.items()} if times else {}
        return Sequences(self.steps, times * self.cases, counts)

    def once(self) -> Sequences:
        """The view of a map that is used once per sequence: T = 1."""
        return Sequences(1, self.cases, {1: float(self.cases)})

    @property
    def observed(self) -> float:
        """ΣT, in time-steps."""
        return sum(length * count for length, count in self.lengths.items())

    def without_padding(self, x: Tensor) -> Tensor:
        """`x` `[T, B, …]` with zeros behind the ends, which then contribute to no product."""
        return x if self.padding is None else x.masked_fill(self.padding.unsqueeze(-1), 0)


class Average:
    """Of several tensors, over passes that each add the sum of some products over all steps of B sequences:

        sums     Σ decay · (sum of products / B) / L
        weight   Σ decay · E[T] / L
        lengths  Σ decay · distribution of T

    L, the mean length of the first pass, is there for rounding alone: with one length, weights are powers of decay.
    """

    def __init__(self) -> None:
        self.sums: list[Tensor] = []
        self.lengths: dict[int, float] = {}
        self.weight = 0.0
        self.first_length = 0.0  # L, in time-steps

    def begin(self, sequences: Sequences, rate: float, shapes: Sequence[tuple[int, ...]], like: Tensor) -> None:
        """Makes room for one more pass, whose products the caller adds to `sums`, divided by `divisor`."""
        mean_length = sequences.observed / sequences.cases
        if not self.sums:
            self.sums = [like.new_zeros(shape) for shape in shapes]
            self.first_length = mean_length
        torch._foreach_mul_(self.sums, rate)
        self.weight = rate * self.weight + mean_length / self.first_length
        self.lengths = {length: rate * mass for length, mass in self.lengths.items()}
        for length, count in sequences.lengths.items():
            self.lengths[length] = self.lengths.get(length, 0.0) + count / sequences.cases

    def divisor(self, sequences: Sequences) -> float:
        """B·L, by which a sum of products over all steps of `sequences` is divided."""
        return sequences.cases * self.first_length

    def values(self) -> list[Tensor]:
        return [total / self.weight for total in self.sums]

    def state_dict(self) -> dict[str, Any]:
        numbers = {"weight": self.weight, "first_length": self.first_length}
        return {"sums": list(self.sums), "lengths": dict(self.lengths), **numbers}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.sums = [total.to(device) for total in state["sums"]]
        self.lengths, self.weight = dict(state["lengths"]), state["weight"]
        mean = sum(length * mass for length, mass in self.lengths.items()) / (sum(self.lengths.values()) or 1)
        self.first_length = state.get("first_length", mean)  # which older states lack


def with_homogeneous_coordinate(a: Tensor) -> Tensor:
    """`[a_t; 1]`: the bias as a last column of W."""
    return F.pad(a, (0, 1), value=1.0)


def add_moments(M0: Tensor, M1: Tensor | None, x: Tensor, divisor: float) -> None:
    """Adds the lag-0 and lag-1 moments of `x` `[T, B, n]`; a 1-D `M0` takes the diagonal."""
    flat = x.flatten(0, 1)
    if M0.dim() == 1:
        M0.add_(flat.square().sum(0), alpha=1 / divisor)
        return
    M0.addmm_(flat.mT, flat, alpha=1 / divisor)
    if M1 is not None and len(x) > 1:
        M1.addmm_(x[1:].flatten(0, 1).mT, x[:-1].flatten(0, 1), alpha=1 / divisor)


def add_frequencies(A0: Tensor, tokens: Tensor, sequences: Sequences, divisor: float) -> None:
    """Adds the diagonal of a one-hot input's A0: how often each token occurs."""
    if sequences.padding is not None:
        tokens = tokens[~sequences.padding]
    A0.add_(torch.bincount(tokens.flatten(), minlength=len(A0)), alpha=1 / divisor)
