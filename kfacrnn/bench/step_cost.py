"""Every optimiser on one task: what an update costs, and where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kfacrnn import settings
from kfacrnn.bench.request import BASELINE, Request
from kfacrnn.run import Run


def bench(request: Request) -> None:
    """A table for every task, and its rows in a file: one for each task, or the one that was asked for."""
    request.check()
    planned = {task: request.runs(task) for task in request.tasks}
    from kfacrnn.bench import memory
    from kfacrnn.bench.cycle import METHOD
    from kfacrnn.bench.report import show, write
    from kfacrnn.bench.subjects import table
    from kfacrnn.neighbours import Machine

    rows: list[dict[str, Any]] = []
    machine = Machine()
    for task, runs in planned.items():
        found = measured(f"step-cost {task}", runs, request.rounds)
        for row, run in zip(found, runs.values(), strict=True):
            row |= memory.in_fresh_process(memory.measured, run)
        header, cells = table(found, "optimizer", BASELINE)
        peaks = [f"{row['peak_rss_mb']:.0f}" for row in found]
        title = f"{task}, {request.precision}, {request.threads} threads, {found[0]['rounds']} rounds"
        show(title, [*header, "peak MB"], [[*line, peak] for line, peak in zip(cells, peaks, strict=True)])
        rows += found
        if request.json is None:
            path = request.file("step-cost", task)
            write(path, "step-cost", request, machine, found, method=METHOD, memory=memory.METHOD)
            machine = Machine()
    if request.json is not None:
        write(request.file(), "step-cost", request, machine, rows, method=METHOD, memory=memory.METHOD)


def measured(title: str, runs: Mapping[str, Run], rounds: int | None, baseline: str = BASELINE) -> list[dict[str, Any]]:
    """A row for every run, by the ratio to that named `baseline`."""
    from kfacrnn.bench.subjects import TrainingRun, interleave

    records = interleave(title, {name: TrainingRun(run) for name, run in runs.items()}, rounds)
    return [
        {"task": run.task.name, "optimizer": name, "dtype": run.precision, "threads": run.threads}
        | {"settings": settings.costly(run.optimizer)}
        | records[name].row(records[baseline], baseline)
        for name, run in runs.items()
    ]
