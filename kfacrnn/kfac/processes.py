"""What the processes of a data-parallel run do for one another; for a process that is alone, nothing.

Every rank has the parameters, the averages and, of a batch, the sequences numbered rank, rank + ranks, …, in the order
of `torch.utils.data.DistributedSampler`. KFAC is given the plain model and the user trains it wrapped in DDP, which
averages the gradients. Sequences of a pass have the same number of steps, padding included, on all ranks. What passes
between them, beside gradients:

    every statistics pass    what each of them saw, in a few numbers, from which all decide alike; the moments' sums
    every refresh            decomposed sides, within a team (see `kfacrnn.kfac.placement`)
    every update             directions, between teams; ΔᵀF̂Δ, lest rounding lead two ranks to different decisions

Collectives run on the thread that calls the optimiser, in the same order on every rank: every rank calls `state_dict`,
too, and that of rank 0 is the whole state. Decompositions may run in the background.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from kfacrnn.kfac.block import Block
from kfacrnn.kfac.collectives import broadcast, gathered, sum_over_ranks
from kfacrnn.kfac.fisher import Diagnostics, FisherInverse, Modes
from kfacrnn.kfac.inversion import Inversion
from kfacrnn.kfac.maths import DecompositionError
from kfacrnn.kfac.placement import Placement, Unit, members, placement
from kfacrnn.predictive import Part

Anything = TypeVar("Anything")
Direction = tuple[list[Tensor], Tensor]


class Alone:
    """One process, which has everything."""

    rank, ranks = 0, 1
    is_idle = False  # whether this process has no sequence in the present pass, and repeats one that does not count

    def place(self, blocks: Mapping[str, Block]) -> None:
        """Settles once who decomposes and who holds what."""

    # ------------------------------------------------------------------------------------------------- statistics

    def own(self, cases: slice) -> slice:
        """Of the sequences `cases` of a batch, those that this process holds, by their numbers here."""
        return cases

    def part(self, cases: int) -> Part | None:
        """How this process's `cases` sequences lie among those of the pass; None: they are all there are."""
        return None

    def gathered(self, finding: Anything) -> list[Anything]:
        """What every process found."""
        return [finding]

    @contextmanager
    def summing(self, blocks: Sequence[Block]) -> Iterator[None]:
        """What is added to the blocks' averages inside is added by all processes together."""
        yield

    # --------------------------------------------------------------------------------------------------- inverses

    def work(self, inversions: Mapping[str, Inversion]) -> Mapping[Any, Callable[[], Any]]:
        """What this process has to do; `collected` makes inverses of the results."""
        return inversions

    def collected(
        self, inversions: Mapping[str, Inversion], results: Mapping[Any, Any], is_first: bool
    ) -> dict[str, Any]:
        """By block: its inverse, or None if it failed. If they are the first there are, raises DecompositionError."""
        return dict(results)

    def directions(self, blocks: Sequence[Block], loss_scale: float) -> list[Direction]:
        return [block.direction(loss_scale) for block in blocks]

    def mean(self, value: Tensor) -> Tensor:
        """Over the processes; not finite if it is not on one of them."""
        return value

    # ------------------------------------------------------------------------------------------------------ state

    def whole(self, inverses: Mapping[str, Any]) -> dict[str, Any]:
        """With those that other processes hold: rank 0 is given all of them."""
        return dict(inverses)

    def kept(self, name: str, inverse: Any) -> Any:
        """What this process is to keep of a block's inverse."""
        return inverse


@dataclass(frozen=True)
class Elsewhere:
    """Stands for an inverse that other ranks hold."""

    diagnostics: Diagnostics | None


class _Outline(NamedTuple):
    """A `Modes` without its tensors' content."""

    tensors: list[tuple[torch.Size, torch.dtype] | None]  # as `Modes.tensors`
    condition: float
    retries: int

    @classmethod
    def of(cls, modes: Modes) -> _Outline:
        tensors = [None if M is None else (M.shape, M.dtype) for M in modes.tensors]
        return cls(tensors, modes.condition, modes.retries)

    def room(self, device: torch.device) -> Modes:
        P, *others = (None if M is None else torch.empty(M[0], dtype=M[1], device=device) for M in self.tensors)
        assert P is not None
        return Modes(P, self.condition, self.retries, *others)


class Together(Alone):
    """The ranks of a process group. `share` of them, or a little less, hold any one inverse."""

    def __init__(self, group: dist.ProcessGroup, share: float):
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self._group = group
        self._members = members(self.ranks, share)
        self._teams = self.ranks // self._members
        self._number, self._member = divmod(self.rank, self._members)  # of our team, and of us in it
        team = range(self._number * self._members, (self._number + 1) * self._members)
        self._team = self._subgroup(team)
        self._column = self._subgroup(range(self._member, self.ranks, self._members))
        self._announced: Part | None = None
        self._placement = Placement(self._members, {}, {})

    def _subgroup(self, ranks: Sequence[int]) -> dist.ProcessGroup | None:
        """None for a group of one, which has nothing to say."""
        if len(ranks) == self.ranks:
            return self._group
        everywhere = [dist.get_global_rank(self._group, rank) for rank in ranks]
        return dist.new_group(everywhere, use_local_synchronization=True) if len(ranks) > 1 else None

    def place(self, blocks: Mapping[str, Block]) -> None:
        costs = {name: block.costs for name, block in blocks.items() if block.costs}
        self._placement = placement(costs, self.ranks, self._members)
        self._device = next((block.parameters[0].device for block in blocks.values()), torch.device("cpu"))

    def _holds(self, name: str) -> bool:
        """What costs nothing to invert is held by all."""
        return self._placement.team.get(name, self._number) == self._number

    # ------------------------------------------------------------------------------------------------- statistics

    def own(self, cases: slice) -> slice:
        count = cases.stop - cases.start
        first = (self.rank - cases.start) % self.ranks
        self.is_idle = first >= count
        if self.is_idle:  # the others would wait anyway, and the generator must draw here as it does there
            self._announced = Part(count, 0, count)
            return slice(0, 1)
        self._announced = Part(count, first, self.ranks)
        begin = (cases.start + first) // self.ranks
        return slice(begin, begin + len(range(first, count, self.ranks)))

    def part(self, cases: int) -> Part:
        part, self._announced = self._announced, None
        if part is None:
            self.is_idle, part = False, Part(cases * self.ranks, self.rank, self.ranks)
        if (wanted := len(range(part.first, part.cases, part.step))) != cases:
            raise ValueError(f"the pass was to be on the {wanted} sequences of statistics_cases, got {cases}")
        return part

    def gathered(self, finding: Anything) -> list[Anything]:
        return gathered(finding, self._group)

    @contextmanager
    def summing(self, blocks: Sequence[Block]) -> Iterator[None]:
        symmetric = [M for block in blocks for M in block.moments()[0]]
        lagged = [M for block in blocks for M in block.moments()[1]]
        if self.rank > 0:  # the past is the same everywhere, and one rank brings it
            torch._foreach_zero_([*symmetric, *lagged])
        yield
        sum_over_ranks(symmetric, lagged, self._group)

    # --------------------------------------------------------------------------------------------------- inverses

    def work(self, inversions: Mapping[str, Inversion]) -> Mapping[Any, Callable[[], Any]]:
        units = {(name, i): side for name, inversion in inversions.items() for i, side in enumerate(inversion.sides)}
        mine = [unit for unit in units if self._placement.worker[unit] == self.rank]
        return {unit: partial(_attempt, units[unit]) for unit in mine}

    def collected(
        self, inversions: Mapping[str, Inversion], results: Mapping[Any, Any], is_first: bool
    ) -> dict[str, Any]:
        outlines = {unit: _Outline.of(r) if isinstance(r, Modes) else r for unit, r in results.items()}
        reports = self.gathered(outlines)
        failed = {unit[0]: seen for report in reports for unit, seen in report.items() if isinstance(seen, Exception)}
        if is_first and failed:
            raise DecompositionError("; ".join(f"{name}: {failed[name]}" for name in inversions if name in failed))
        sides = self._exchanged_sides(results, reports, failed)
        inverses: dict[str, Any] = dict.fromkeys(inversions)
        for name, inversion in inversions.items():
            if name not in failed and self._holds(name):
                inverses[name] = inversion.assemble([sides[name, i] for i in range(len(inversion.sides))])
        if self._column is not None:
            held = {name: i.diagnostics for name, i in inverses.items() if isinstance(i, FisherInverse)}
            for others in gathered(held, self._column):
                inverses |= {name: Elsewhere(seen) for name, seen in others.items() if name not in held}
        return inverses

    def _exchanged_sides(
        self, results: Mapping[Unit, Any], reports: Sequence[Mapping[Unit, Any]], failed: Mapping[str, Any]
    ) -> dict[Unit, Modes]:
        """Those of all our team's blocks that have not failed."""
        sides: dict[Unit, Modes] = {}
        for member in range(self._members):
            report = reports[self._number * self._members + member]
            outlines = {unit: outline for unit, outline in report.items() if unit[0] not in failed}
            if member == self._member:
                made = {unit: results[unit] for unit in outlines}
            else:
                made = {unit: outline.room(self._device) for unit, outline in outlines.items()}
            if self._team is not None:
                tensors = [M for modes in made.values() for M in modes.tensors if M is not None]
                broadcast(tensors, member, self._team)
            sides |= made
        return sides

    def directions(self, blocks: Sequence[Block], loss_scale: float) -> list[Direction]:
        found = [
            block.direction(loss_scale) if self._holds(block.name) else _room_for_direction(block) for block in blocks
        ]
        if self._column is not None:
            for number in range(self._teams):
                theirs = [d for b, d in zip(blocks, found, strict=True) if self._placement.team.get(b.name) == number]
                broadcast([tensor for parts, product in theirs for tensor in (*parts, product)], number, self._column)
        return found

    def mean(self, value: Tensor) -> Tensor:
        total = value.to(torch.float64, copy=True)
        dist.all_reduce(total, group=self._group)
        return total / self.ranks

    # ------------------------------------------------------------------------------------------------------ state

    def whole(self, inverses: Mapping[str, Any]) -> dict[str, Any]:
        known = {name: inverse for name, inverse in inverses.items() if not isinstance(inverse, Elsewhere)}
        if self._column is not None and self._member == 0:
            sent = {n: i.to("cpu") for n, i in known.items() if isinstance(i, FisherInverse)}
            received: list[Any] | None = [None] * self._teams if self.rank == 0 else None
            dist.gather_object(sent, received, group=self._column, group_dst=0)
            for others in received or []:
                known = others | known
        return {name: known.get(name) for name in inverses}

    def kept(self, name: str, inverse: Any) -> Any:
        return inverse if inverse is None or self._holds(name) else Elsewhere(inverse.diagnostics)


def processes(group: dist.ProcessGroup | None, share: float) -> Alone:
    """Raises ValueError where there are several processes and KFAC was not told which belong together: each would
    precondition the averaged gradient by the statistics of its own sequences, and they would drift apart."""
    if group is None and dist.is_available() and dist.is_initialized() and (ranks := dist.get_world_size()) > 1:
        raise ValueError(
            f"this is one of {ranks} processes: KFAC needs process_group=torch.distributed.group.WORLD, or, where each "
            "trains a model of its own, torch.distributed.new_subgroups(1)[0]"
        )
    return Alone() if group is None or dist.get_world_size(group) == 1 else Together(group, share)


def _attempt(side: Callable[[], Modes]) -> Modes | DecompositionError:
    """A failure is for all ranks to hear of, before any of them raises it."""
    try:
        return side()
    except DecompositionError as error:
        return error


def _room_for_direction(block: Block) -> Direction:
    rows = [torch.empty_like(row, memory_format=torch.contiguous_format) for row in block.own_rows(block.parameters)]
    return rows, rows[0].new_empty(())
