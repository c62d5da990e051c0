"""Which rank decomposes what, and which ranks hold which inverse: arithmetic that every rank does alike.

    ranks        teams × members, the ranks of a team next to one another
    a block      belongs to one team, all members of which hold its inverse
    a side       of a block (A, or the G of a split) is decomposed by one member of the block's team

One team means that every rank holds every inverse; teams of one, that every inverse is held once.

J. G. Pauloski et al., "KAISA: An Adaptive Second-Order Optimizer Framework for Deep Neural Networks", SC 2021.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)
Unit = tuple[str, int]
"""A side to decompose: the name of its block, and 0 for A, 1, 2, … for the splits' G."""


@dataclass(frozen=True)
class Placement:
    members: int  # ranks that hold an inverse
    team: Mapping[str, int]  # of a block
    worker: Mapping[Unit, int]  # rank that decomposes a side


def members(ranks: int, share: float) -> int:
    """Size of a team: the largest divisor of `ranks` that is no more than `share` of them, and at least 1."""
    most = max(1, int(share * ranks + 1e-9))
    return next(size for size in range(most, 0, -1) if ranks % size == 0)


def placement(costs: Mapping[str, Sequence[int]], ranks: int, members: int) -> Placement:
    """Blocks to teams, then the sides of a team's blocks to its members: the dearest first, to whoever has least to do
    (R. L. Graham, 1969). `costs` are those of every block's sides, in any unit."""
    team = longest_first({name: sum(sides) for name, sides in costs.items()}, ranks // members)
    worker: dict[Unit, int] = {}
    for number in range(ranks // members):
        units = {(name, i): cost for name in costs if team[name] == number for i, cost in enumerate(costs[name])}
        worker |= {unit: number * members + place for unit, place in longest_first(units, members).items()}
    return Placement(members, team, worker)


def longest_first(costs: Mapping[Key, int], bins: int) -> dict[Key, int]:
    """The bin of each: in order of falling cost into the one that is least full, the first of equals."""
    filled = [(0, number) for number in range(bins)]
    place: dict[Key, int] = {}
    for key in sorted(costs, key=lambda key: -costs[key]):
        load, place[key] = heapq.heappop(filled)
        heapq.heappush(filled, (load + costs[key], place[key]))
    return place
