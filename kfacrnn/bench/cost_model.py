"""What an update costs on N ranks, in seconds by item: volumes times a machine's rates.

    item         when                          how much
    train        every update                  6 operations a weight and token of the rank's part of the batch
    gradients    every update, all-reduced     the parameters, less what hides behind the training pass
    statistics   every k updates               4 operations a weight and token, and the moments of a and g
    moments      every k updates, all-reduced  upper triangles of A0, G0; A1, G1; what each rank saw, as an object
    refresh      every r updates               the busiest rank's decompositions, and Y of all blocks it holds
    sides        every r updates, broadcast    decomposed sides, within a team; what they are like, as objects
    products     every update                  F⁻¹∇h of the team that has most to do
    directions   every update, broadcast       between teams; ΔᵀF̂Δ, all-reduced
    update       every update                  the parameters

Seconds are those of the rank that has most to do; nothing but gradients overlaps. Volumes: `kfacrnn.bench.sharing`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kfacrnn.bench.sharing import DIVIDEND, FLOAT, Block, Settings, Shared, Sizes, shared

COMPUTE = ("train", "statistics", "refresh", "products", "update")
TALK = {"train": "gradients", "statistics": "moments", "refresh": "sides", "products": "directions"}
BUCKETS = (2**20, 25 * 2**20)  # bytes of DDP's first bucket of gradients, and of the others


class Link(NamedTuple):
    """Bytes a second, each way, in sums and in broadcasts; seconds of a message."""

    summed: float
    sent: float
    latency: float


def ring_all_reduce(size: float, ranks: int, link: Link) -> float:
    """As gloo's, in seconds."""
    return 2 * (ranks - 1) * (link.latency + size / ranks / link.summed)


def tree_broadcast(size: float, ranks: int, link: Link) -> float:
    """As gloo's: the whole message at each of log N steps."""
    return math.ceil(math.log2(ranks)) * (link.latency + size / link.sent)


def tree_all_reduce(size: float, ranks: int, link: Link) -> float:
    """As NCCL's, whose double trees use the bandwidth of a ring."""
    return 2 * (math.ceil(math.log2(ranks)) * link.latency + (ranks - 1) / ranks * size / link.summed)


def piped_broadcast(size: float, ranks: int, link: Link) -> float:
    """As NCCL's: in pieces, so that the steps overlap."""
    return math.ceil(math.log2(ranks)) * link.latency + (size / link.sent if ranks > 1 else 0.0)


Collective = Callable[[float, int, Link], float]


class Pace(NamedTuple):
    """Seconds of each piece, a time-step of a layer or a block, and of an operation."""

    piece: float
    operation: float


@dataclass(frozen=True)
class Machine:
    """Rates of one rank, and what joins ranks: `inside` a node of so many and `between` nodes."""

    node: int
    inside: Link
    between: Link
    all_reduce: Collective
    broadcast: Collective
    overlap: float  # share of the training pass that gradients can hide behind
    gather: float  # seconds a rank, of objects
    train: Pace
    statistics: Pace
    decompose: Mapping[str, Mapping[int, float]]  # approximation → rows of a side → seconds
    assemble: Mapping[str, float]  # approximation → seconds a weight
    products: Pace
    update_sgd: float  # seconds a parameter
    update_kfac: float

    def link(self, span: int) -> Link:
        """Of ranks that are among `span` neighbours."""
        return self.inside if span <= self.node else self.between

    def seconds_to_decompose(self, block: Block, side: int) -> float:
        known = self.decompose[block.approximation]
        return interpolated(known, block.rows[side]) if block.dense[side] else 0.0


def interpolated(known: Mapping[int, float], size: int) -> float:
    """On a line between logarithms; as the cube beyond the largest, as the smallest below it."""
    sizes = sorted(known)
    if size >= sizes[-1]:
        return known[sizes[-1]] * (size / sizes[-1]) ** 3
    return float(np.exp(np.interp(np.log(size), np.log(sizes), np.log([known[n] for n in sizes]))))


# ---------------------------------------------------------------------------------------------------------------- costs


def sgd(sizes: Sizes, ranks: int, machine: Machine) -> dict[str, float]:
    """Seconds of an update by item."""
    return _training(sizes, ranks, machine) | {"update": machine.update_sgd * sizes.parameters}


def kfac(sizes: Sizes, settings: Settings, ranks: int, machine: Machine) -> dict[str, float]:
    """Seconds of an update by item, means over a cycle in the steady state."""
    parts = shared(sizes, settings, ranks)
    passes, refreshes = 1 / settings.statistics_every, 1 / max(settings.refresh_every, settings.statistics_every)
    return _training(sizes, ranks, machine) | {
        "statistics": passes * _statistics(sizes, settings, parts, machine),
        "moments": passes * (_sum(parts.moment_bytes(), ranks, machine) + _objects(ranks, machine)),
        "refresh": refreshes * _refresh(parts, machine),
        "sides": refreshes * _sides(parts, machine),
        "products": _products(sizes, parts, machine),
        "directions": _directions(parts, machine),
        "update": machine.update_kfac * sizes.parameters,
    }


def _training(sizes: Sizes, ranks: int, machine: Machine) -> dict[str, float]:
    pace, tokens = machine.train, sizes.steps * math.ceil(sizes.sequences / ranks)
    train = pace.piece * sizes.steps * sizes.layers + pace.operation * training_operations(sizes, tokens)
    first, others = BUCKETS
    size = float(FLOAT * sizes.parameters)
    buckets = [min(size, first)] + [others] * int(max(0.0, size - first) // others)
    buckets.append(size - sum(buckets))
    talk = sum(_sum(bucket, ranks, machine) for bucket in buckets if bucket)
    return {"train": train, "gradients": max(talk - machine.overlap * train, 0.0)}


def training_operations(sizes: Sizes, tokens: int) -> float:
    return 6.0 * tokens * sizes.weights


def statistics_cases(sizes: Sizes, settings: Settings, ranks: int) -> int:
    """Sequences of a pass on the rank that has most of them."""
    return math.ceil(max(1, round(sizes.sequences * settings.statistics_fraction)) / ranks)


def statistics_operations(sizes: Sizes, parts: Shared, tokens: int) -> float:
    """Forward pass, backward pass without weight gradients, moments."""
    squares = sum(block.factor_bytes / FLOAT for block in parts.blocks)
    return tokens * (4.0 * sizes.weights + 2.0 * squares)


def product_operations(sizes: Sizes, team: Sequence[Block]) -> float:
    """Of F⁻¹∇h for these blocks; of an embedding only the rows of tokens in the batch have a gradient."""
    return sum(b.operations(sizes.seen() if b.name == "embedding" else b.rows[0]) for b in team)


def _statistics(sizes: Sizes, settings: Settings, parts: Shared, machine: Machine) -> float:
    tokens = sizes.steps * statistics_cases(sizes, settings, parts.ranks)
    pace = machine.statistics
    return pace.piece * sizes.steps * sizes.layers + pace.operation * statistics_operations(sizes, parts, tokens)


def _refresh(parts: Shared, machine: Machine) -> float:
    """All wait for the busiest; then every holder makes Y of its own blocks."""
    work = [sum(machine.seconds_to_decompose(*unit) for unit in parts.of_worker(rank)) for rank in parts.workers]
    holders = [sum(machine.assemble[b.approximation] * b.weights for b in team) for team in parts.busy_teams()]
    return max(work) + max(holders)


def _sides(parts: Shared, machine: Machine) -> float:
    size, teams = parts.placed.members, defaultdict[int, float](float)
    for worker in parts.workers:
        units = parts.of_worker(worker)
        sent = sum(block.side_bytes(side) for block, side in units)
        messages = len(set[str]().union(*(block.messages(side) for block, side in units)))
        teams[worker // size] += messages * machine.broadcast(sent / messages, size, machine.link(size))
    columns = _objects(parts.teams, machine) if parts.teams > 1 else 0.0
    return max(teams.values()) + _objects(parts.ranks, machine) + columns


def _products(sizes: Sizes, parts: Shared, machine: Machine) -> float:
    pace = machine.products
    return max(pace.piece * len(team) + pace.operation * product_operations(sizes, team) for team in parts.busy_teams())


def _directions(parts: Shared, machine: Machine) -> float:
    link = machine.link(parts.ranks)
    sent = [FLOAT * sum(block.parameters + 1 for block in team) for team in parts.busy_teams()]
    between = sum(machine.broadcast(size, parts.teams, link) for size in sent) if parts.teams > 1 else 0.0
    return between + _sum(DIVIDEND, parts.ranks, machine)


def _sum(size: float, ranks: int, machine: Machine) -> float:
    return machine.all_reduce(size, ranks, machine.link(ranks)) if ranks > 1 else 0.0


def _objects(ranks: int, machine: Machine) -> float:
    return machine.gather * ranks if ranks > 1 else 0.0
