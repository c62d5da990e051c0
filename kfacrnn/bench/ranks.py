"""One process and two: what an update costs, what is sent for it, what a process holds; and a machine's rates.

Points are one process with the whole batch and with half of it, from which `kfacrnn.bench.calibration` takes the rates
of the cost model, and two processes with the whole batch, on which it is tested. Processes are started as by torchrun,
in a gloo group, one thread each. The text is made up, as in `kfacrnn.bench.scaling`.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from kfacrnn import ranks
from kfacrnn.bench.request import BASELINE, Request
from kfacrnn.bench.scaling import BATCHES, VOCABULARY, made_up_text
from kfacrnn.errors import UserError
from kfacrnn.run import Run

OPTIMIZERS = ("kfac_option1", "kfac_option2")
SHARES = (1.0, 0.5)
ROUNDS = 5
KFACS = ("kfac_indep", "kfac_option1", "kfac_option2")
SETTINGS = ("statistics_every", "statistics_fraction", "refresh_every", "inverse_share", "max_dense")
PROCESSES = (
    "wall time and split of rank 0, which ends a step together with the others; bytes: of buffers that rank 0 gives to "
    "collectives in one step of each kind, objects pickled; inverses: of the rank that holds most"
)


@dataclass(frozen=True)
class Point:
    """Runs, by what the table calls them, on so many processes."""

    task: str
    ranks: int
    runs: Mapping[str, Run]
    is_whole: bool = True  # not half a batch

    @property
    def sizes(self) -> dict[str, int]:
        task = self.runs[BASELINE].task
        names = ("hidden", "layers", "bptt", "batch_size")
        return {name: getattr(task, name) for name in names} | {"vocabulary": VOCABULARY[self.task]}


def bench(request: Request) -> None:
    """A table and a file for every task. Raises `UserError` for a task that is no language model."""
    request.check()
    planned = {task: points(request, task) for task in request.tasks}
    from kfacrnn.bench.cycle import METHOD
    from kfacrnn.bench.report import show, write
    from kfacrnn.bench.subjects import table
    from kfacrnn.neighbours import Machine
    from kfacrnn.progress import Progress

    for task, of_task in planned.items():
        machine = Machine()
        rows: list[dict[str, Any]] = []
        primitives: dict[str, Any] = {}
        with Progress(f"ranks {task}", len(of_task)) as progress:
            for done, point in enumerate(of_task):
                found, rates = launched(point.ranks, measured, point, request.rounds or ROUNDS)[0]
                rows += found
                primitives |= rates
                progress.show(done + 1, "points")
        header, cells = table(rows, "line", BASELINE)
        sent = [f"{row['bytes_per_update'] / 1e6:.2f}" for row in rows]
        held = [f"{row['inverse_bytes'] / 1e6:.2f}" for row in rows]
        columns = [[*line, *more] for line, *more in zip(cells, sent, held, strict=True)]
        show(
            f"{task}, {request.precision}, {rows[0]['rounds']} rounds", [*header, "MB sent", "MB of inverses"], columns
        )
        path = request.file("ranks", task)
        write(path, "ranks", request, machine, rows, method=METHOD, processes=PROCESSES, primitives=primitives)


def points(request: Request, task: str) -> list[Point]:
    if task not in VOCABULARY:
        raise UserError(f"--task {task}: ranks has sizes for {' and '.join(VOCABULARY)} only")
    runs = request.runs(task, BASELINE, OPTIMIZERS)
    batch: int = runs[BASELINE].task.batch_size
    if batch % 2:
        raise UserError(f"task.batch_size={batch}: must be even, for two processes")
    shared = {
        f"{name}, share {share:g}": replace(run, optimizer=replace(run.optimizer, inverse_share=share))
        for name, run in runs.items()
        for share in SHARES
        if hasattr(run.optimizer, "inverse_share")
    }
    others = {name: run for name, run in runs.items() if not hasattr(run.optimizer, "inverse_share")}
    halves = {name: replace(run, task=replace(run.task, batch_size=batch // 2)) for name, run in runs.items()}
    return [Point(task, 1, runs), Point(task, 1, halves, False), Point(task, 2, others | shared)]


def launched(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function` returns on each of `count` new processes."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    settings = LaunchConfig(
        1, 1, count, run_id="bench", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0
    )
    results = elastic_launch(settings, function)(*arguments)
    return [results[rank] for rank in range(count)]


def measured(point: Point, rounds: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """On every process: a row for every run, and the primitives that this number of processes can say."""
    import torch

    from kfacrnn.bench import primitives
    from kfacrnn.bench.subjects import TrainingRun, interleave
    from kfacrnn.kfac.precision import multiplies_bfloat16

    ranks.join(point.sizes["batch_size"], "cpu")
    length = point.sizes["batch_size"] * (point.sizes["bptt"] * BATCHES + 1)
    with made_up_text(point.sizes["vocabulary"], length):
        subjects = {name: TrainingRun(run) for name, run in point.runs.items()}
    records = interleave(None, subjects, rounds)
    rows = []
    for name, run in point.runs.items():
        basics: dict[str, Any] = {
            "task": point.task,
            "line": f"{name}, {point.ranks}×{point.sizes['batch_size'] // point.ranks}",
        }
        basics |= {"optimizer": run.optimizer.name, "ranks": point.ranks, **point.sizes}
        basics |= {key: value for key in SETTINGS if (value := getattr(run.optimizer, key, None)) is not None}
        if run.optimizer.name in KFACS:
            basics["bf16_products"] = run.optimizer.products == "auto" and multiplies_bfloat16(torch.device("cpu"))
        basics |= {"dtype": run.precision, "threads": run.threads}
        rows.append(basics | records[name].row(records[BASELINE], BASELINE) | volumes(subjects[name]))
    if point.ranks > 1:
        return rows, {"link": primitives.link()}
    names = {run.optimizer.name.removeprefix("kfac_") for run in point.runs.values() if run.optimizer.name in KFACS}
    if not point.is_whole:
        return rows, {}
    return rows, primitives.arithmetic(point.sizes["hidden"], sorted({"indep", *names}), point.sizes["bptt"])


# ------------------------------------------------------------------------------------------------------------- volumes


def volumes(subject: Any) -> dict[str, Any]:
    """Bytes that are sent in steps of each kind, and that are held."""
    from kfacrnn.bench.memory import tensors
    from kfacrnn.kfac.fisher import FisherInverse
    from kfacrnn.kfac.optimizer import KFAC

    def size(found: Any) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors(found))

    sent: dict[str, dict[str, int]] = {}
    for kind in subject.weights:
        with counted() as tally:
            subject.step(kind)
        gradients = size([p.grad for p in subject.session.model.parameters()]) if ranks.count() > 1 else 0
        sent[kind.label] = {"gradients": gradients, **tally}
    mean = sum(weight * sum(sent[kind.label].values()) for kind, weight in subject.weights.items())
    optimizer = subject.session.optimizer
    blocks = list(optimizer._estimator.blocks.values()) if isinstance(optimizer, KFAC) else []
    held = size([block.inverse.state() for block in blocks if isinstance(block.inverse, FisherInverse)])
    factors = size([block.average.sums for block in blocks])
    return {
        "bytes": sent,
        "bytes_per_update": float(mean),
        "inverse_bytes": ranks.largest(held),
        "factor_bytes": factors,
    }


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Inside, bytes of what is given to collectives, gradients of DDP excepted, which are no call of Python's."""
    from torch import distributed as dist

    tally: Counter[str] = Counter()

    def counting(name: str, size: Callable[..., int]) -> Any:
        call = getattr(dist, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            tally[name] += size(*arguments)
            return call(*arguments, **named)

        return mock.patch.object(dist, name, counted)

    with (
        counting("all_reduce", lambda tensor, *_: tensor.numel() * tensor.element_size()),
        counting("broadcast", lambda tensor, *_: tensor.numel() * tensor.element_size()),
        counting("all_gather_object", lambda _, item: len(pickle.dumps(item))),
    ):
        yield tally
