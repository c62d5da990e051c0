"""What an update of every line of an experiment costs, by SGD's on the same model: for studies of settings."""

from __future__ import annotations

from dataclasses import replace

from kfacrnn import config
from kfacrnn.bench.request import BASELINE, ENDLESS, Request
from kfacrnn.bench.step_cost import measured
from kfacrnn.errors import UserError
from kfacrnn.experiment import load
from kfacrnn.run import Run


def bench(request: Request, experiment: str) -> None:
    """A table, and its rows in a file, with the experiment's own precision and threads. A line that is
    tuned is taken at the first of its choices.

    Raises `UserError` for an experiment with a line named as the baseline.
    """
    described = load(experiment)
    if BASELINE in described.lines:
        raise UserError(f"{described.name}: a line is named {BASELINE}, as is what all are compared to")
    common = [*described.common, *request.overrides, *ENDLESS]
    runs: dict[str, Run] = {BASELINE: config.compose([f"optimizer={BASELINE}", *common])}
    for line in described.lines:
        point = described.confirmation(line, described.choices(line)[0])[0]
        runs[line] = config.compose([*point.overrides, *request.overrides, *ENDLESS])
    from kfacrnn.bench.cycle import METHOD
    from kfacrnn.bench.report import show, write
    from kfacrnn.bench.subjects import table
    from kfacrnn.neighbours import Machine

    machine = Machine()
    found = measured(described.name, runs, request.rounds)
    rows = [
        row | {"line": line, "optimizer": run.optimizer.name}
        for (line, run), row in zip(runs.items(), found, strict=True)
    ]
    show(f"{described.name}, {rows[0]['rounds']} rounds", *table(rows, "line", BASELINE))
    request = replace(request, precision=runs[BASELINE].precision, threads=runs[BASELINE].threads)
    write(request.file("experiment", described.name), "experiment", request, machine, rows, method=METHOD)
