"""Bytes: of parameters, of what an optimiser keeps for them, and the peak of a process that does nothing else."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from kfacrnn.bench.report import show, write
from kfacrnn.bench.request import Request
from kfacrnn.memory import peak_rss_mb
from kfacrnn.neighbours import Machine
from kfacrnn.progress import Progress
from kfacrnn.run import Run

MB = 2**20
COLUMNS = ("parameter_mb", "state_mb", "state_per_parameter", "peak_rss_mb")
METHOD = (
    "state: the tensors of the optimiser's state_dict; peak: resident memory of a fresh process that took one step of "
    "every kind after its first"
)


class Ended(Exception):
    """A process ended without a result, as when the kernel takes back its memory."""


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns or raises in a new process of its own. Raises `Ended` if that was killed."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise Ended from error


def measured(run: Run) -> dict[str, float]:
    """Trains for a few steps; megabytes of 2²⁰ bytes."""
    from kfacrnn.bench.subjects import TrainingRun

    subject = TrainingRun(run)
    for kind in subject.weights:
        subject.step(kind)
    parameters = sum(p.numel() * p.element_size() for p in subject.session.model.parameters())
    state = sum(t.numel() * t.element_size() for t in tensors(subject.session.optimizer.state_dict()))
    return {
        "parameter_mb": parameters / MB,
        "state_mb": state / MB,
        "state_per_parameter": state / parameters,
        "peak_rss_mb": peak_rss_mb(),
    }


def tensors(state: Any) -> Iterator[Any]:
    """Every tensor in nested containers, once."""
    import torch

    seen: set[int] = set()

    def walk(node: Any) -> Iterator[Any]:
        if isinstance(node, torch.Tensor):
            if id(node) not in seen:
                seen.add(id(node))
                yield node
        elif isinstance(node, dict):
            for value in node.values():
                yield from walk(value)
        elif isinstance(node, list | tuple):
            for value in node:
                yield from walk(value)

    return walk(state)


def bench(request: Request) -> None:
    request.check()
    planned = {task: request.runs(task) for task in request.tasks}
    machine, rows, done = Machine(), [], 0
    with Progress("memory", sum(map(len, planned.values()))) as progress:
        for task, runs in planned.items():
            for name, run in runs.items():
                basics = {"task": task, "optimizer": name, "dtype": request.precision}
                rows.append(basics | in_fresh_process(measured, run))
                done += 1
                progress.show(done, "processes")
    for task in planned:
        of_task = [row for row in rows if row["task"] == task]
        cells = [[row["optimizer"], *(f"{row[column]:.1f}" for column in COLUMNS)] for row in of_task]
        show(task, ["optimizer", *COLUMNS], cells)
    write(request.file("memory"), "memory", request, machine, rows, method=METHOD)
