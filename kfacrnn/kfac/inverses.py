"""When inverses are recomputed, and by whom: between two steps, or in a thread beside them.

In the background mode an inverse that is computed from the averages at update k comes into use at update k + delay
exactly, finished or waited for, so that a run does not depend on how fast the thread was. Inverses are stale by design
and say by how much.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from threading import Event, Thread
from typing import Any

import torch

from kfacrnn.kfac.block import Block, plain
from kfacrnn.kfac.cadence import EARLY_INTERVAL, is_due
from kfacrnn.kfac.maths import DecompositionError
from kfacrnn.kfac.processes import Alone

Work = Mapping[Any, Callable[[], Any]]  # block by block, or side by side where processes share it


@dataclass
class _Pending:
    due: int  # update at which it comes into use
    results: Future[dict[Any, Any]]
    collect: Callable[[dict[Any, Any]], dict[str, Any]]

    @cached_property
    def inverses(self) -> dict[str, Any]:
        """Waits for them."""
        return self.collect(self.results.result())


class Inverses:
    """Refreshes the blocks' inverses every `every` updates, more often at first: see `cadence.is_due`.

    `delay` 0 is synchronous. A decomposition that fails leaves the last good inverse in place and is counted; the very
    first one has none to fall back on and raises.
    """

    def __init__(
        self,
        blocks: Mapping[str, Block],
        every: int,
        delay: int,
        processes: Alone | None = None,
        early_interval: float = EARLY_INTERVAL,
    ):
        self._blocks = blocks
        self._processes = processes or Alone()
        self._every = every
        self._delay = delay
        self._early_interval = early_interval
        self._pending: _Pending | None = None
        self._may_run = Event()
        self._may_run.set()
        self._started = -1  # update whose averages the newest refresh, finished or not, is made from
        self.made_from = -1  # the same of the inverses in use
        self.failures = 0

    def advance(self, update: int, newest_statistics: int, damping: float) -> None:
        """Called before step `update`: swaps in what is due; starts a refresh if one is due and anything is new."""
        if self._pending is not None and update >= self._pending.due:
            self._swap_in()
        is_new = newest_statistics > self._started
        due = is_due(update, self._started, self._every, self._early_interval)
        if not is_new or not due or self._pending is not None:
            return
        inversions = {name: block.inversion(damping) for name, block in self._blocks.items()}
        work = self._processes.work(inversions)
        collect = partial(self._processes.collected, inversions, is_first=self.made_from < 0)
        if self._delay == 0 or self.made_from < 0:
            inverses = collect(self._side_by_side(work))
            self._started = update
            self._put_in_use(inverses)
        else:
            self._started = update
            self._pending = _Pending(update + self._delay, self._beside(work), collect)

    def _side_by_side(self, work: Work) -> dict[Any, Any]:
        """Every block on a thread of its own, as far as they go: one decomposition on several threads is hardly faster,
        and many times slower while another process holds a core."""
        threads = torch.get_num_threads()
        workers = min(threads, len(work))
        if workers < 2:
            return {name: self._inverted(name, invert) for name, invert in work.items()}
        alone = partial(torch.set_num_threads, threads // workers)
        try:
            with ThreadPoolExecutor(workers, "kfac-inverses", initializer=alone) as pool:
                return dict(zip(work, pool.map(self._inverted, work, work.values()), strict=True))
        finally:
            torch.set_num_threads(threads)

    def _beside(self, work: Work) -> Future[dict[Any, Any]]:
        future: Future[dict[Any, Any]] = Future()

        def run() -> None:
            results = {}
            try:
                for name, invert in work.items():
                    self._may_run.wait()
                    results[name] = self._inverted(name, invert)
                future.set_result(results)
            except BaseException as error:
                future.set_exception(error)

        # A daemon, as no pool's threads are: a program may end while it is paused.
        Thread(target=run, name="kfac-inverses", daemon=True).start()
        return future

    def pause(self) -> None:
        """Background work stops at the next block: a clock that does not count must not give it time for free."""
        self._may_run.clear()

    def resume(self) -> None:
        self._may_run.set()

    def _inverted(self, name: str, invert: Callable[[], Any]) -> Any:
        try:
            return invert()
        except DecompositionError as error:
            if self.made_from < 0:
                raise DecompositionError(f"{name}: {error}") from error
            return None

    def _swap_in(self) -> None:
        assert self._pending is not None
        self._put_in_use(self._awaited(self._pending))
        self._pending = None

    def _awaited(self, pending: _Pending) -> dict[str, Any]:
        """Even while background work is paused."""
        is_paused = not self._may_run.is_set()
        self._may_run.set()
        inverses = pending.inverses
        if is_paused:
            self._may_run.clear()
        return inverses

    def _put_in_use(self, inverses: dict[str, Any]) -> None:
        self.made_from = self._started
        for name, inverse in inverses.items():
            if inverse is None:
                self.failures += 1
            else:
                self._blocks[name].inverse = inverse

    def stats(self) -> dict[str, float]:
        """Of the inverses in use: extremes of ψ̂, the worst condition numbers; and counts of what went wrong."""
        seen = [block.diagnostics for block in self._blocks.values() if block.diagnostics is not None]
        return {
            "psi_min": min((d.psi_min for d in seen), default=0.0),
            "psi_max": max((d.psi_max for d in seen), default=0.0),
            "psi_clipped": sum(d.clipped for d in seen),
            "condition_A": max((d.condition_A for d in seen), default=1.0),
            "condition_G": max((d.condition_G for d in seen), default=1.0),
            "retries": sum(d.retries for d in seen),
            "failed_inversions": self.failures,
        }

    def state_dict(self) -> dict[str, Any]:
        """Waits for pending work: what it found belongs to the state."""
        pending = None
        if self._pending is not None:
            whole = self._processes.whole(self._awaited(self._pending))
            pending = {"due": self._pending.due, "inverses": {name: plain(inverse) for name, inverse in whole.items()}}
        return {"started": self._started, "made_from": self.made_from, "failures": self.failures, "pending": pending}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._started, self.made_from, self.failures = state["started"], state["made_from"], state["failures"]
        self._pending = None
        if state["pending"] is not None:
            done: Future[dict[Any, Any]] = Future()
            done.set_result(
                {
                    name: self._processes.kept(name, self._blocks[name].restored(inverse))
                    for name, inverse in state["pending"]["inverses"].items()
                }
            )
            self._pending = _Pending(state["pending"]["due"], done, dict)
