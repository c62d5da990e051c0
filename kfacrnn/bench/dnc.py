"""The DNC's update on repeated copy: with Adam, with every K-FAC, and that of the package `dnc` from PyPI with Adam.

The package needs an old environment of its own, so it runs in a process that waits while it is not its turn. It does
not feed what it reads back to the controller within a sequence, and makes its memory's interface with one matrix for
each part where ours has one for all; sizes, batch and steps are the same.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any

from kfacrnn import discovery
from kfacrnn.bench.request import Request
from kfacrnn.errors import UserError
from kfacrnn.run import Run

if TYPE_CHECKING:
    from kfacrnn.bench.cycle import Kind, Weights
    from kfacrnn.bench.subjects import Step

BASELINE = "adam"
REFERENCE = "dnc 1.1.0 (PyPI) with adam"
BLOCK = 5  # updates of a turn of the reference; the first does not count
HOW_TO = (
    "the package dnc was not measured: python3 -m venv ref; ref/bin/pip install torch numpy; "
    "ref/bin/pip install --no-deps dnc==1.1.0; then add --reference-python ref/bin/python"
)


def bench(request: Request, reference_python: str | None = None) -> None:
    request.check()
    (task,) = request.tasks
    methods = [name for name in discovery.modules("optimizers") if name.startswith("kfac_")]
    runs = request.runs(task, BASELINE, methods)
    with reference(reference_python, runs[BASELINE]) as other:
        from kfacrnn.bench.cycle import METHOD
        from kfacrnn.bench.report import show, write
        from kfacrnn.bench.subjects import Subject, TrainingRun, interleave, table
        from kfacrnn.neighbours import Machine

        machine = Machine()
        subjects: dict[str, Subject] = {f"DNC with {name}": TrainingRun(run) for name, run in runs.items()}
        if other:
            subjects[REFERENCE] = other
        records = interleave("dnc", subjects, request.rounds)
        ours, rows = records[f"DNC with {BASELINE}"], []
        for name, record in records.items():
            row = {"task": task, "model": name, "dtype": request.precision, "threads": request.threads}
            row |= record.row(ours, BASELINE)
            if other:
                compared = record.row(records[REFERENCE], "reference")
                row |= {"ratio_to_reference": compared["ratio_to_reference"]}
                row |= {f"reference_{side}": compared[side] for side in ("low", "high")}
            rows.append(row)
    header, cells = table(rows, "model", BASELINE)
    if other:
        header.append("/ reference")
        for line, row in zip(cells, rows, strict=True):
            line.append(f"{row['ratio_to_reference']:.3f}")
    show(f"{task}, {request.precision}, {request.threads} threads, {rows[0]['rounds']} rounds", header, cells)
    print("" if other else f"{HOW_TO}\n")
    about = other.about if other else None
    write(request.file("dnc"), "dnc", request, machine, rows, method=METHOD, reference=about)


class Reference:
    """The other package's updates, as a subject of one kind of step."""

    def __init__(self, process: subprocess.Popen[str], said: IO[str], python: str):
        from kfacrnn.bench.cycle import PLAIN

        self.weights: Weights = {PLAIN: 1.0}
        self._process = process
        self._said = said
        self._python = python
        self.about = self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._said.seek(0)
            said = self._said.read().strip().rpartition("\n")[2] or "it ended"
            raise UserError(f"--reference-python {self._python}: {said}; it must be able to import torch and dnc")
        return json.loads(line)

    def step(self, kind: Kind) -> Step:
        """The median of a block, so that the other process has warmed up again."""
        from kfacrnn.bench.subjects import PARTS, Step

        assert self._process.stdin is not None
        self._process.stdin.write(f"{BLOCK}\n")
        self._process.stdin.flush()
        wall, cpu = (statistics.median(column) for column in zip(*self._read()[1:], strict=True))
        nothing = dict.fromkeys(PARTS, 0.0)
        return Step(nothing | {"train": wall}, nothing | {"train": cpu})


@contextmanager
def reference(python: str | None, run: Run) -> Iterator[Reference | None]:
    """The other package in a process, at the sizes of `run`; None without a Python that has it. Raises `UserError` if
    it cannot be started or lacks a package, and for sizes that it does not have."""
    if python is None:
        yield None
        return
    config = run.task
    if config.write_heads != 1 or run.precision != "fp32" or run.device != "cpu":
        raise UserError("--reference-python: the package dnc has one write head, and is measured in fp32 on a CPU")
    steps = config.pad_to or config.episodes * config.steps(config.max_length, config.max_repeats)
    names = ("bits", "hidden", "slots", "word_size", "read_heads", "batch_size", "clip")
    sizes = {name: getattr(config, name) for name in names} | {"steps": steps, "threads": run.threads}
    script = Path(__file__).with_name("_reference_dnc.py").read_text()  # run by its path it would import this very file
    pipe, command = subprocess.PIPE, [python, "-c", script, json.dumps(sizes)]
    with TemporaryFile("w+") as said:  # not a pipe, which warnings could fill
        try:
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=said, text=True)
        except OSError as error:
            raise UserError(f"--reference-python {python}: {error.strerror}") from error
        with process:
            try:
                yield Reference(process, said, python)
            finally:
                process.kill()
