"""What can be timed, and the rounds that time several of them side by side.

A subject has kinds of steps, with the frequency of each, and runs one step of a kind at a time, booking every moment of
it to one part: `train` is batch, forward and backward pass and all else that the other parts do not name.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import wraps
from typing import Any, NamedTuple, Protocol, cast

import torch

from kfacrnn import ranks
from kfacrnn.bench.cycle import PLAIN, Kind, Rounds, Weights, cost, frequencies, quantile, ratio
from kfacrnn.clock import Ledger
from kfacrnn.errors import UserError
from kfacrnn.kfac.optimizer import KFAC
from kfacrnn.progress import Progress
from kfacrnn.run import Run
from kfacrnn.session import Session

REFRESH = Kind(refresh=True)
PARTS = ("train", "statistics", "refresh", "products", "update")
SECONDS = 90.0  # that rounds may take, if nobody says how many
FEWEST, MOST = 5, 40  # rounds, likewise
SHORT = 0.1  # seconds; shorter steps are preceded by one that nobody counts, as caches are somebody else's


class Step(NamedTuple):
    """Seconds of one step by part."""

    wall: dict[str, float]
    cpu: dict[str, float]


class Subject(Protocol):
    weights: Weights

    def step(self, kind: Kind) -> Step: ...


class Phases(Ledger):
    """A ledger with accounts of any name. Every moment belongs to the innermost one that is open."""

    def __init__(self, synchronise: Callable[[], None]):
        super().__init__(synchronise)
        self.clear()

    def clear(self) -> None:
        self.wall, self.cpu = defaultdict(float), defaultdict(float)

    def step(self) -> Step:
        """What was booked since `clear`."""
        wall, cpu = ({part: account[part] for part in PARTS} for account in (self.wall, self.cpu))
        return Step(wall, cpu)

    def time(self, owner: Any, method: str, account: str) -> None:
        """From now on this one object's method books to `account`."""
        call = getattr(owner, method)

        @wraps(call)
        def timed(*arguments: Any, **named: Any) -> Any:
            with self(account):
                return call(*arguments, **named)

        setattr(owner, method, timed)


class Prompted(KFAC):
    """K-FAC whose statistics come when the bench says. Any other thing that it does is K-FAC's."""

    kind: Kind

    @property
    def statistics_due(self) -> bool:
        return self.kind.statistics


class TrainingRun:
    """A session of `kfacrnn train`, after its first step. Raises `UserError` for inverses made in the background: they
    belong to no step."""

    def __init__(self, run: Run):
        if getattr(run.optimizer, "refresh_delay", 0):
            raise UserError(
                f"optimizer.refresh_delay={run.optimizer.refresh_delay}: work in the background belongs to no step; "
                "measure with optimizer.refresh_delay=0"
            )
        self.session = Session(run)
        self.weights: Weights = {PLAIN: 1.0}
        self._phases = Phases(torch.cuda.synchronize if self.session.device.type == "cuda" else lambda: None)
        with self.session.training():
            self.session.step()
        optimizer = self.session.optimizer
        if isinstance(optimizer, KFAC):
            self.weights = frequencies(run.optimizer.statistics_every, run.optimizer.refresh_every)
            optimizer.__class__ = Prompted
            self._prompt_refreshes(cast(Prompted, optimizer))
            self._phases.time(optimizer, "update_statistics", "statistics")
            self._phases.time(optimizer, "_directions", "products")
        elif hasattr(optimizer, "prompt"):
            share = optimizer.refresh_share
            self.weights = {kind: part for kind, part in ((PLAIN, 1 - share), (REFRESH, share)) if part}
        self._phases.time(optimizer, "step", "update")

    def _prompt_refreshes(self, optimizer: Prompted) -> None:
        inverses = optimizer._inverses
        advance = inverses.advance

        def prompted(update: int, newest_statistics: int, damping: float) -> None:
            if optimizer.kind.refresh:
                inverses._started = -1  # due, as if there had been none
                with self._phases("refresh"):
                    advance(update, newest_statistics, damping)

        setattr(inverses, "advance", prompted)  # noqa: B010 - mypy allows no assignment to a method

    def step(self, kind: Kind) -> Step:
        optimizer = self.session.optimizer
        if isinstance(optimizer, Prompted):
            optimizer.kind = kind
        elif hasattr(optimizer, "prompt"):
            optimizer.prompt(kind.refresh)
        with self.session.training(), self._phases("train"):
            self._phases.clear()
            self.session.step()
        self.session.losses.clear()
        self.session.units.clear()
        return self._phases.step()


class Record(NamedTuple):
    """The steps of one subject: one of every kind in every round."""

    weights: Weights
    rounds: Sequence[Mapping[Kind, Step]]

    def milliseconds(self, clock: str, part: str | None = None) -> Rounds:
        """Of `part`, or of whole steps; `clock` is `wall` or `cpu`, which counts the seconds of all threads."""

        def of(step: Step) -> float:
            seconds: dict[str, float] = getattr(step, clock)
            return 1000 * (sum(seconds.values()) if part is None else seconds[part])

        return [{kind: of(step) for kind, step in one.items()} for one in self.rounds]

    def split(self, clock: str) -> dict[str, float]:
        """The cost of every part. They add up to the whole: medians need not, so `train` is what the others leave."""
        parts = {part: cost(self.milliseconds(clock, part), self.weights) for part in PARTS[1:]}
        return {"train": cost(self.milliseconds(clock), self.weights) - sum(parts.values()), **parts}

    def row(self, baseline: Record, name: str) -> dict[str, Any]:
        """Numbers for a file. `ratio_to_<name>` is the ratio of costs, low and high the ends of its interval."""
        wall = self.milliseconds("wall")
        found: dict[str, Any] = {
            "ms_mean_cycle": cost(wall, self.weights),
            "ms_median": quantile(wall, self.weights, 0.5),
            "ms_p95": quantile(wall, self.weights, 0.95),
            "cpu_ms_mean_cycle": cost(self.milliseconds("cpu"), self.weights),
        }
        for clock, prefix in (("wall", ""), ("cpu", "cpu_")):
            above, below = self.milliseconds(clock), baseline.milliseconds(clock)
            compared = ratio(above, self.weights, below, baseline.weights)
            found |= zip((f"{prefix}ratio_to_{name}", f"{prefix}low", f"{prefix}high"), compared, strict=True)
        kinds = {
            kind.label: {"frequency": weight, "ms_median": cost(wall, {kind: 1.0})}
            for kind, weight in self.weights.items()
        }
        return found | {
            "rounds": len(self.rounds),
            "split": self.split("wall"),
            "cpu_split": self.split("cpu"),
            "kinds": kinds,
        }


def interleave(title: str | None, subjects: Mapping[str, Subject], rounds: int | None) -> dict[str, Record]:
    """Rounds of one step of every kind of every subject, the first subject another one each time, after one round that
    nobody counts. Says how far it is unless `title` is None."""
    began = time.monotonic()
    warm = {name: {kind: subject.step(kind) for kind in subject.weights} for name, subject in subjects.items()}
    seconds = time.monotonic() - began
    short = max(sum(step.wall.values()) for steps in warm.values() for step in steps.values()) < SHORT
    count = rounds or max(FEWEST, min(MOST, int(SECONDS / seconds)))
    short, count = ranks.of_first((short, count))  # processes that train together take the same steps
    names = list(subjects)
    taken: dict[str, list[dict[Kind, Step]]] = {name: [] for name in names}
    with Progress(title, count) if title else nullcontext() as progress:
        for done in range(count):
            first = done % len(names)
            for name in (*names[first:], *names[:first]):
                subject = subjects[name]
                if short:
                    subject.step(PLAIN if PLAIN in subject.weights else next(iter(subject.weights)))
                taken[name].append({kind: subject.step(kind) for kind in subject.weights})
            if progress:
                progress.show(done + 1, "rounds")
    return {name: Record(subject.weights, taken[name]) for name, subject in subjects.items()}


def table(rows: Sequence[Mapping[str, Any]], label: str, baseline: str) -> tuple[list[str], list[list[str]]]:
    """What the terminal shows of rows: milliseconds, ratios with intervals, and the split where there is one."""
    header = [label, "ms", "median", "p95", "cpu ms", f"/ {baseline}", "interval", f"cpu / {baseline}"]
    split = [part for part in PARTS[1:] if any(row["split"][part] for row in rows)]
    shown = []
    for row in rows:
        numbers = [f"{row[key]:.2f}" for key in ("ms_mean_cycle", "ms_median", "ms_p95", "cpu_ms_mean_cycle")]
        compared = [f"{row[f'ratio_to_{baseline}']:.3f}", f"{row['low']:.3f}–{row['high']:.3f}"]
        compared += [f"{row[f'cpu_ratio_to_{baseline}']:.3f}"]
        parts = [f"{row['split'][part]:.2f}" for part in ("train", *split)] if split else []
        shown.append([row[label], *numbers, *compared, *parts])
    return [*header, *(["train", *split] if split else [])], shown
