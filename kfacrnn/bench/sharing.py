"""What a language model's K-FAC is made of on N ranks: operations, bytes that travel, bytes that a rank holds.

Counted from sizes and settings alone, for the model of `kfacrnn.tasks._language_model`, with every mode of Ψ̂: which of
them a large map may leave out, no size tells. Who decomposes and holds what is for `kfacrnn.kfac.placement` to say, so
that sides which cannot be divided show. Seconds: `kfacrnn.bench.cost_model`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kfacrnn.kfac import precision
from kfacrnn.kfac.placement import Placement, members, placement

FLOAT, DOUBLE, HALF = 4, 8, 2  # bytes
SANDWICHES = {"indep": 1, "option1": 2, "option2": 4}
DIVIDEND = DOUBLE  # of ΔᵀF̂Δ


@dataclass(frozen=True)
class Sizes:
    """Of the model and of a batch, all ranks together."""

    hidden: int
    layers: int
    vocabulary: int
    steps: int  # T
    sequences: int  # B

    @property
    def weights(self) -> int:
        """That every token is multiplied by."""
        return 8 * self.layers * self.hidden**2 + self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        return sum(block.parameters for block in blocks(self, Settings("indep")))

    def seen(self) -> float:
        """Different tokens of a batch, if rank r is as frequent as 1 / (r + 2.7); the expectation."""
        frequency = 1 / (np.arange(self.vocabulary) + 2.7)
        absent = np.log1p(-frequency / frequency.sum()) * self.steps * self.sequences
        return float(-np.expm1(absent).sum())


@dataclass(frozen=True)
class Settings:
    """Of K-FAC, named as in `kfacrnn.kfac.optimizer.KFAC`."""

    approximation: str
    statistics_every: int = 10
    statistics_fraction: float = 1 / 8
    refresh_every: int = 20
    inverse_share: float = 1.0
    max_dense: int = 4096
    bf16_products: bool = True  # where the processor multiplies in bfloat16, products of large maps are


class Block(NamedTuple):
    """`rows` of A and of every split's G, and whether these are matrices."""

    name: str
    rows: tuple[int, ...]
    dense: tuple[bool, ...]
    approximation: str  # indep where there are no lag factors
    parameters: int
    half: bool  # whether products are in bfloat16

    @property
    def weights(self) -> int:
        return self.rows[0] * sum(self.rows[1:])

    @property
    def costs(self) -> list[int]:
        """As `kfacrnn.kfac.blocks.KroneckerBlock.costs`."""
        return [n**3 if dense else n for n, dense in zip(self.rows, self.dense, strict=True)]

    @property
    def moments(self) -> int:
        """Numbers that are summed over the ranks."""
        lags = self.approximation != "indep"
        sizes = zip(self.rows, self.dense, strict=True)
        return sum((n * (n + 1) // 2 + lags * n * n) if dense else n for n, dense in sizes)

    @property
    def factor_bytes(self) -> int:
        copies = 1 if self.approximation == "indep" else 2
        return FLOAT * copies * sum(n * n if dense else n for n, dense in zip(self.rows, self.dense, strict=True))

    def matrices(self, side: int) -> int:
        """Bytes of a decomposed side's P, and N."""
        n, dense = self.rows[side], self.dense[side]
        size = n * n * (HALF if self.half else FLOAT) if dense else n * FLOAT
        return size * (2 if self.approximation == "option2" else 1)

    def side_bytes(self, side: int) -> int:
        """Of what is broadcast: with ψ̂, in the precision of the decomposition."""
        widest = max((n for n, dense in zip(self.rows, self.dense, strict=True) if dense), default=0)
        psi = 0 if self.approximation == "indep" else self.rows[side] * (FLOAT if widest >= precision.WIDE else DOUBLE)
        return self.matrices(side) + psi

    def messages(self, side: int) -> set[str]:
        """The dtypes among them, each a broadcast of its own together with those of other sides."""
        widest = max((n for n, dense in zip(self.rows, self.dense, strict=True) if dense), default=0)
        psi = set() if self.approximation == "indep" else {"float" if widest >= precision.WIDE else "double"}
        return {"half" if self.half and self.dense[side] else "float"} | psi

    @property
    def inverse_bytes(self) -> int:
        Y = 0 if self.approximation == "indep" else FLOAT * self.weights
        return Y + sum(self.matrices(side) for side in range(len(self.rows)))

    def operations(self, columns: float) -> float:
        """Of F⁻¹∇h on that many columns of the gradient."""
        A, *G = ((n if dense else 0) for n, dense in zip(self.rows, self.dense, strict=True))
        return SANDWICHES[self.approximation] * 2.0 * columns * (A * sum(self.rows[1:]) + sum(m * m for m in G))


def blocks(sizes: Sizes, settings: Settings) -> list[Block]:
    """Embedding, layers and softmax. The recurrent maps alone have lag factors."""
    H, V = sizes.hidden, sizes.vocabulary

    def block(name: str, rows: tuple[int, ...], parameters: int, lags: bool, diagonal: tuple[int, ...] = ()) -> Block:
        dense = tuple(n <= settings.max_dense and side not in diagonal for side, n in enumerate(rows))
        half = settings.bf16_products and rows[0] * sum(rows[1:]) >= precision.LARGE
        return Block(name, rows, dense, settings.approximation if lags and all(dense) else "indep", parameters, half)

    return [
        block("embedding", (V, H), V * H, False, diagonal=(0,)),
        *(block(f"lstm.l{i}", (2 * H + 1, H, H, H, H), 8 * H * H + 8 * H, True) for i in range(sizes.layers)),
        block("softmax", (H + 1, V), V * H + V, False),
    ]


# ------------------------------------------------------------------------------------------------- memory and messages


@dataclass(frozen=True)
class Shared:
    """A model's blocks on so many ranks."""

    blocks: Sequence[Block]
    ranks: int
    placed: Placement

    @property
    def teams(self) -> int:
        return self.ranks // self.placed.members

    def of_team(self, number: int) -> list[Block]:
        return [block for block in self.blocks if self.placed.team[block.name] == number]

    def busy_teams(self) -> list[list[Block]]:
        return [self.of_team(number) for number in sorted(set(self.placed.team.values()))]

    def of_worker(self, rank: int) -> list[tuple[Block, int]]:
        by_name = {block.name: block for block in self.blocks}
        return [(by_name[name], side) for (name, side), worker in self.placed.worker.items() if worker == rank]

    @property
    def workers(self) -> list[int]:
        return sorted(set(self.placed.worker.values()))

    # Bytes of the buffers that collectives are given, on one rank.

    def moment_bytes(self) -> int:
        return FLOAT * sum(block.moments for block in self.blocks)

    def side_bytes(self, team: int) -> int:
        sides = [block.side_bytes(side) for block in self.of_team(team) for side in range(len(block.rows))]
        return sum(sides) if self.placed.members > 1 else 0

    def direction_bytes(self) -> int:
        sizes = sum(FLOAT * (block.parameters + 1) for block in self.blocks) if self.teams > 1 else 0
        return sizes + (DIVIDEND if self.ranks > 1 else 0)

    # Bytes that a rank holds.

    def factor_bytes(self) -> int:
        return sum(block.factor_bytes for block in self.blocks)

    def inverse_bytes(self, team: int) -> int:
        return sum(block.inverse_bytes for block in self.of_team(team))

    def memory(self) -> int:
        """Of the fullest rank: parameters, gradients, momentum, factors, inverses; without activations."""
        state = 3 * FLOAT * sum(block.parameters for block in self.blocks)
        return state + self.factor_bytes() + max(sum(b.inverse_bytes for b in team) for team in self.busy_teams())


def shared(sizes: Sizes, settings: Settings, ranks: int) -> Shared:
    found = blocks(sizes, settings)
    costs = {block.name: block.costs for block in found}
    return Shared(found, ranks, placement(costs, ranks, members(ranks, settings.inverse_share)))
