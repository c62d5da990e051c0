"""Which runs of a plan can be started, and how one ended: what every way of launching them asks.

Several launchers may work at one plan. Each starts what nobody writes; one that has nothing to start looks, every few
seconds, whether a run that decides on more of them has ended elsewhere, or has been given up.
"""

from __future__ import annotations

from collections.abc import Iterable

from kfacrnn.plan import Plan, PlannedRun

LOOK = 5.0  # seconds between looks at what other launchers have done


class Pending:
    """The runs that are neither finished nor under way nor have been taken before; failed ones if asked for. More of
    them become known as results decide on them."""

    def __init__(self, plan: Plan, retry_failed: bool):
        self._plan = plan
        self._startable = {None, "interrupted", "failed"} if retry_failed else {None, "interrupted"}
        self._taken: set[str] = set()

    def runs(self) -> list[PlannedRun]:
        fresh = [planned for run_id, planned in self._known().items() if run_id not in self._taken]
        return [planned for planned in fresh if planned.folder.state() in self._startable]

    def elsewhere(self, own: Iterable[PlannedRun] = ()) -> int:
        """How many runs are under way that are not this launcher's `own`."""
        ours = {planned.run.run_id for planned in own}
        others = [planned for run_id, planned in self._known().items() if run_id not in ours]
        return sum(planned.folder.state() == "running" for planned in others)

    def _known(self) -> dict[str, PlannedRun]:
        """By run_id: several lines may share a run."""
        return {planned.run.run_id: planned for planned in self._plan.known()}

    def take(self, runs: Iterable[PlannedRun]) -> None:
        self._taken.update(planned.run.run_id for planned in runs)

    def put_back(self, runs: Iterable[PlannedRun]) -> None:
        self._taken.difference_update(planned.run.run_id for planned in runs)


def title(planned: PlannedRun) -> str:
    return f"{planned.point.line}, {planned.point.role} {planned.point} (run {planned.run.run_id})"


def ending(planned: PlannedRun) -> str:
    """One line on a run that was started, from what it left in the store."""
    status, last = planned.folder.status(), planned.folder.metrics.last_row()
    value = f", train/metric {last['train/metric']:.4g}" if last else ""
    reason = f" ({status['reason']})" if status.get("reason") else ""
    state = planned.folder.state() or "not started"
    return f"{state}{reason}: {title(planned)} at update {status.get('update', 0)}{value}"
