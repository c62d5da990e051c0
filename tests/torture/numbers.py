"""NaN and infinity in losses, gradients, statistics and decompositions, at random updates; and runs that explode.

A run may survive that (K-FAC leaves such gradients and statistics out) or end as `diverged` with update and reason. It
may never end as `done` with parameters that are not finite, nor fail, nor show a traceback.
"""

from __future__ import annotations

import math
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from kfacrnn.session import Session
from kfacrnn.store import RunFolder
from tests.torture.runs import Said, combinations, folder_of, say, small, use_tiny_corpus
from tests.torture.tally import Tally

UPDATES = 12
BUDGET = [f"budget.updates={UPDATES}", "budget.log_every=1", "budget.eval_every=6", "budget.checkpoint_every=5"]
POISONS = (math.nan, math.inf, -math.inf)
DECOMPOSITIONS = ("eigh", "eigvalsh", "cholesky", "cholesky_ex", "svd", "qr", "inv", "solve_triangular")


@contextmanager
def poisoned_loss(moment: int, value: float, rng: random.Random) -> Iterator[None]:
    """The loss of one update is not finite, and with it every gradient."""

    def poison(session: Session) -> Any:
        loss, task = session.task.loss, session.task
        return mock.patch.object(task, "loss", lambda model, batch: loss(model, batch) * value)

    with _at(moment, poison):
        yield


@contextmanager
def poisoned_gradient(moment: int, value: float, rng: random.Random) -> Iterator[None]:
    """One number of one gradient."""

    @contextmanager
    def poison(session: Session) -> Iterator[None]:
        parameter = rng.choice([p for p in session.model.parameters() if p.requires_grad])

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            spoilt = gradient.clone()
            spoilt.view(-1)[rng.randrange(spoilt.numel())] = value
            return spoilt

        hook = parameter.register_hook(spoil)
        try:
            yield
        finally:
            hook.remove()

    with _at(moment, poison):
        yield


@contextmanager
def poisoned_parameter(moment: int, value: float, rng: random.Random) -> Iterator[None]:
    """One number of the model, after an update: a step that went wrong."""
    step = Session.step

    def stepped(session: Session) -> Any:
        batch = step(session)
        if session.update == moment:
            parameter = rng.choice(list(session.model.parameters()))
            with torch.no_grad():
                parameter.view(-1)[rng.randrange(parameter.numel())] = value
        return batch

    with mock.patch.object(Session, "step", stepped):
        yield


@contextmanager
def failing_decompositions(moment: int, value: float, rng: random.Random) -> Iterator[None]:
    """From one call on, every decomposition raises or returns NaN, for as long as one update lasts."""
    raises = rng.random() < 0.5

    def failing(function: Callable[..., Any]) -> Callable[..., Any]:
        def fail(*arguments: Any, **options: Any) -> Any:
            if raises:
                raise torch.linalg.LinAlgError("the algorithm failed to converge")
            result = function(*arguments, **options)
            parts = result if isinstance(result, tuple) else (result,)
            for part in parts:
                if part.is_floating_point():
                    part.fill_(value)
            return result

        return fail

    @contextmanager
    def poison(_: Session) -> Iterator[None]:
        with mock.patch.multiple(torch.linalg, **{n: failing(getattr(torch.linalg, n)) for n in DECOMPOSITIONS}):
            yield

    with _at(moment, poison):
        yield


@contextmanager
def poisoned_statistics(moment: int, value: float, rng: random.Random) -> Iterator[None]:
    """What K-FAC's statistics pass sees of the model at one update."""

    def poison(session: Session) -> Any:
        predict, task = session.task.predict, session.task

        def spoilt(*arguments: Any) -> Any:
            distribution = predict(*arguments)
            for name, part in vars(distribution).items():
                if isinstance(part, torch.Tensor) and part.is_floating_point():
                    object.__setattr__(distribution, name, part * value)
            return distribution

        return mock.patch.object(task, "predict", spoilt)

    with _at(moment, poison):
        yield


@contextmanager
def _at(moment: int, poison: Callable[[Session], Any]) -> Iterator[None]:
    """`poison(session)` is entered for the update of that number alone."""
    step = Session.step

    def stepped(session: Session) -> Any:
        if session.update + 1 != moment:
            return step(session)
        with poison(session):
            return step(session)

    with mock.patch.object(Session, "step", stepped):
        yield


POISONED = {
    "loss not finite": poisoned_loss,
    "gradient not finite": poisoned_gradient,
    "parameter not finite after an update": poisoned_parameter,
    "statistics of K-FAC not finite": poisoned_statistics,
    "decomposition raises or returns NaN": failing_decompositions,
}


def _check(folder: RunFolder, updates: int, said: Said) -> str:
    """How the run ended, which must be one of the ways that are allowed."""
    status = folder.status()
    assert said.code == 0, f"exit code {said.code}: {said.err[-1:]}"
    assert status["state"] in ("done", "diverged"), status
    if status["state"] == "diverged":
        assert re.search(r"(at|after) update \d+", status["reason"]), status["reason"]
    else:
        model = torch.load(folder.path / "model.pt", weights_only=True)
        assert all(bool(torch.isfinite(part).all()) for part in model.values()), "done, and not finite"
        assert status["update"] == updates
    for row in folder.metrics.rows():
        assert math.isfinite(float(row["train/nats"])), "a row that is not finite"
    return status["state"]


def of_poison(place: Path, rng: random.Random, times: int) -> Iterator[Tally]:
    """A tally for each kind of poison: any task, any optimiser, any update, any value."""
    use_tiny_corpus(place / "texts")
    for kind, poison in POISONED.items():
        tally, ends = Tally(kind), {"done": 0, "diverged": 0}
        pairs = [pair for pair in combinations(rng) if "kfac" in pair[1] or "K-FAC" not in kind]
        for number in range(times):
            (task, optimizer), moment, value = pairs[number % len(pairs)], rng.randint(1, UPDATES), rng.choice(POISONS)
            overrides = small(task, optimizer, place / "texts", *BUDGET)
            results = place / f"{kind[:4]}{number}"
            with tally.trial(f"{task} {optimizer} {value} at update {moment}"):
                with poison(moment, value, rng):
                    said = say("train", *overrides, f"results={results}")
                ends[_check(folder_of(results, overrides), UPDATES, said)] += 1
            shutil.rmtree(results, ignore_errors=True)
        tally.note = f"{ends['diverged']} diverged, {ends['done']} went on"
        yield tally


def of_explosions(place: Path, rng: random.Random, times: int) -> Tally:
    """Settings that blow a run up: enormous learning rates, initial weights, no clipping, any budget."""
    use_tiny_corpus(place / "texts")
    tally, diverged = Tally("settings that explode"), 0
    pairs = combinations(rng)
    for number in range(times):
        task, optimizer = pairs[number % len(pairs)]
        updates = rng.choice([1, 2, UPDATES])
        wild = [f"optimizer.lr=1e{rng.randint(3, 38)}", f"budget.updates={updates}"]
        wild += ["optimizer.kl_clip=1e30"] if "kfac" in optimizer else []
        overrides = small(task, optimizer, place / "texts", *BUDGET, *wild)
        results = place / f"wild{number}"
        with tally.trial(f"{task} {optimizer} {' '.join(wild)}"):
            said = say("train", *overrides, f"results={results}")
            diverged += _check(folder_of(results, overrides), updates, said) == "diverged"
        shutil.rmtree(results, ignore_errors=True)
    tally.note = f"{diverged} diverged"
    return tally
