"""Which parameters form a Fisher block: those of a linear map, of an embedding, or of gains and shifts.

A `LinearBlock` is as many Fisher blocks as its map has splits, unless gates are joint; they share A0, A1 and one
decomposition of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from kfacrnn.kfac import factors
from kfacrnn.kfac.block import Block, Curvature
from kfacrnn.kfac.capture import ElementwiseMap, EmbeddingMap, LinearMap, Map
from kfacrnn.kfac.coverage import Row
from kfacrnn.kfac.factors import Sequences
from kfacrnn.kfac.inversion import Inversion, inversion
from kfacrnn.kfac.maths import mean_length


class KroneckerBlock(Block):
    """Linear maps and embeddings. The averages are A0, A1 and, per split, G0 and G1; those of lag 1 where there are."""

    rows: list[int]  # of W, per split
    columns: int  # of W, the bias included
    dense_A: bool

    @property
    def has_lags(self) -> bool:
        """Lag factors are kept where contributions of different steps can correlate and both sides are dense."""
        can_correlate = self.curvature.empirical or not self.is_output
        wanted = self.curvature.approximation != "indep" and can_correlate
        return wanted and self.dense_A and all(map(self._is_dense, self.rows))

    @property
    def approximation(self) -> str:
        """What the coverage table calls it."""
        return self.curvature.approximation if self.has_lags else "indep"

    def _is_dense(self, size: int) -> bool:
        return size <= self.curvature.max_dense

    def _shapes(self) -> list[tuple[int, ...]]:
        A = (self.columns,) * (2 if self.dense_A else 1)
        G = [(rows,) * (2 if self._is_dense(rows) else 1) for rows in self.rows]
        return [A, A, *G, *G] if self.has_lags else [A, *G]

    def _unpack(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None, list[Tensor], list[Tensor | None]]:
        if not self.has_lags:
            return tensors[0], None, list(tensors[1:]), [None] * len(self.rows)
        A0, A1, *G = tensors
        return A0, A1, G[: len(self.rows)], list(G[len(self.rows) :])

    @property
    def costs(self) -> list[int]:
        A = self.columns**3 if self.dense_A else self.columns
        return [A, *(rows**3 if self._is_dense(rows) else rows for rows in self.rows)]

    def moments(self) -> tuple[list[Tensor], list[Tensor]]:
        A0, A1, G0, G1 = self._unpack(self.average.sums)
        return [A0, *G0], [M1 for M1 in (A1, *G1) if M1 is not None]

    def observe(self, a: Tensor, g: Tensor, variance: Tensor | None, sequences: Sequences) -> None:
        A0, A1, G0, G1 = self._unpack(self.average.sums)
        divisor = self.average.divisor(sequences)
        self._observe_inputs(A0, A1, a, sequences)
        for M0, M1, g_split in zip(G0, G1, g.split(self.rows, -1), strict=True):
            if M0.dim() == 1 and variance is not None:
                M0.add_(variance.sum((0, 1)), alpha=1 / divisor)
            else:
                factors.add_moments(M0, M1, g_split, divisor)

    @abstractmethod
    def _observe_inputs(self, A0: Tensor, A1: Tensor | None, a: Tensor, sequences: Sequences) -> None: ...

    def inversion(self, damping: float) -> Inversion:
        A0, A1, G0, G1 = self._unpack(self.average.values())
        return inversion(
            self.curvature.approximation,
            A0,
            A1,
            G0,
            None if A1 is None else [M1 for M1 in G1 if M1 is not None],
            lengths=dict(self.average.lengths),
            damping=damping,
            gamma_max=self.curvature.gamma_max,
            **self.curvature.exactness([A0, *G0]),
        )

    def coverage(self) -> list[Row]:
        starts = accumulate(self.rows, initial=self.map.rows.start or 0)
        return [self._row(*part) for part in zip(self.split_names(), starts, self.rows, strict=False)]

    def _row(self, split: str, start: int, rows: int) -> Row:
        part = f"[{start}:{start + rows}]" if split or self.map.rows != slice(None) else ""
        return Row(
            f"{self.name}.{split}" if split else self.name,
            ", ".join(f"{name}{part}" for name in self.parameter_names),
            self.approximation,
            f"A {self.columns}{'' if self.dense_A else ' diagonal'}"
            f" · G {rows}{'' if self._is_dense(rows) else ' diagonal'}",
        )

    def split_names(self) -> list[str]:
        return [""]


class LinearBlock(KroneckerBlock):
    """W = [W_1 | W_2 | … | b]: the blocks of a `LinearMap`."""

    map: LinearMap

    def __init__(self, name: str, map: LinearMap, curvature: Curvature, names: Mapping[Tensor, str]):
        super().__init__(name, map, curvature, names)
        self.widths = [weight.shape[1] for weight in map.weights]
        out = map.weights[0][map.rows].shape[0]
        is_joint = curvature.joint_gates and len(map.splits) > 1 and self._is_dense(out)
        self.splits = {} if is_joint else map.splits
        self.rows = list(self.splits.values()) or [out]
        self.columns = sum(self.widths) + bool(map.biases)
        self.dense_A = self._is_dense(self.columns)

    def split_names(self) -> list[str]:
        return list(self.splits) or [""]

    def _observe_inputs(self, A0: Tensor, A1: Tensor | None, a: Tensor, sequences: Sequences) -> None:
        a = factors.with_homogeneous_coordinate(a) if self.map.biases else a
        factors.add_moments(A0, A1, sequences.without_padding(a), self.average.divisor(sequences))

    def gradients_of(self, a: Tensor, g: Tensor) -> list[Tensor]:
        a, g = a.flatten(0, -2), g.flatten(0, -2)
        return [*(g.mT @ a).split(self.widths, 1), *([g.sum(0)] * len(self.map.biases))]

    def direction(self, loss_scale: float) -> tuple[list[Tensor], Tensor]:
        gradients = self.gradients()
        weights, biases = gradients[: len(self.widths)], gradients[len(self.widths) :]
        # All biases are added to the same pre-activation and have the same gradient; the block holds their sum.
        Z = torch.cat([*weights, *(bias.unsqueeze(1) for bias in biases[:1])], 1)
        D = self.inverse.multiply(Z).mul_(loss_scale)
        parts = D.split([*self.widths, *([1] if biases else [])], 1)
        shares = [parts[-1].squeeze(1) / len(biases)] * len(biases)
        return [*parts[: len(self.widths)], *shares], torch.dot(D.flatten(), Z.flatten())


class EmbeddingBlock(KroneckerBlock):
    """W = weightᵀ, with the one-hot inputs' diagonal A0 and no lag factors: A1 would be as sparse as it is large."""

    map: EmbeddingMap
    dense_A = False

    def __init__(self, name: str, map: EmbeddingMap, curvature: Curvature, names: Mapping[Tensor, str]):
        super().__init__(name, map, curvature, names)
        self.columns, out = map.weight.shape
        self.rows = [out]

    def _observe_inputs(self, A0: Tensor, A1: Tensor | None, a: Tensor, sequences: Sequences) -> None:
        factors.add_frequencies(A0, a, sequences, self.average.divisor(sequences))

    def gradients_of(self, a: Tensor, g: Tensor) -> list[Tensor]:
        gradient = torch.zeros_like(self.map.weight).index_add_(0, a.flatten(), g.flatten(0, -2))
        if self.map.padding_idx is not None:
            gradient[self.map.padding_idx] = 0
        return [gradient]

    def direction(self, loss_scale: float) -> tuple[list[Tensor], Tensor]:
        (gradient,) = self.gradients()
        seen = gradient.any(1).nonzero().squeeze(1)  # most tokens are not in the batch
        part = gradient[seen]
        D = self.inverse.for_columns(seen).multiply(part.mT).mul_(loss_scale).mT
        return [torch.zeros_like(gradient).index_copy_(0, seen, D)], torch.dot(D.flatten(), part.flatten())


class ElementwiseBlock(Block):
    """Gains and shifts: diagonals E[T]·E[(g_t ⊙ a_t)²] and E[T]·E[g_t²], without correlation over time."""

    map: ElementwiseMap
    inverse: list[Tensor] | None = None

    costs: ClassVar[list[int]] = []

    def moments(self) -> tuple[list[Tensor], list[Tensor]]:
        return self.average.sums, []

    def observe(self, a: Tensor, g: Tensor, variance: Tensor | None, sequences: Sequences) -> None:
        for total, gradient in zip(self.average.sums, self._gradients_of_steps(a, g), strict=True):
            factors.add_moments(total, None, gradient, self.average.divisor(sequences))

    def gradients_of(self, a: Tensor, g: Tensor) -> list[Tensor]:
        return [gradient.sum((0, 1)) for gradient in self._gradients_of_steps(a, g)]

    def _gradients_of_steps(self, a: Tensor, g: Tensor) -> list[Tensor]:
        return ([g * a] if self.map.gain is not None else []) + ([g] if self.map.shift is not None else [])

    def _shapes(self) -> list[tuple[int, ...]]:
        return [tuple(p.shape) for p in self.parameters]

    def inversion(self, damping: float) -> Inversion:
        values, expected = self.average.values(), mean_length(self.average.lengths)
        return Inversion([], lambda _: [1 / (expected * (value + damping)) for value in values])

    def direction(self, loss_scale: float) -> tuple[list[Tensor], Tensor]:
        assert self.inverse is not None
        gradients = self.gradients()
        directions = [loss_scale * inverse * grad for inverse, grad in zip(self.inverse, gradients, strict=True)]
        products = [torch.dot(d, gradient) for d, gradient in zip(directions, gradients, strict=True)]
        return directions, torch.stack(products).sum()

    def coverage(self) -> list[Row]:
        return [Row(self.name, ", ".join(self.parameter_names), "diagonal", str(self.parameters[0].numel()))]


def block_of(name: str, map: Map, curvature: Curvature, names: Mapping[Tensor, str]) -> Block:
    if isinstance(map, LinearMap):
        return LinearBlock(name, map, curvature, names)
    if isinstance(map, EmbeddingMap):
        return EmbeddingBlock(name, map, curvature, names)
    return ElementwiseBlock(name, map, curvature, names)
