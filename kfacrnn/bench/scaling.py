"""Costs over sizes: one size at a time is changed from the paper's models, and all optimisers take steps side by side.

The text is made up, so that there is as much of it and as many different tokens as a point asks for: what an update
costs depends on how often tokens come, which follows Zipf's law here, but not on what they say. Every point has a
process of its own, so that its memory is its own, and one that is too large takes nothing with it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from kfacrnn.bench.request import BASELINE, Request
from kfacrnn.errors import UserError
from kfacrnn.run import Run

OPTIMIZERS = ("kfac_option1", "kfac_option2")
VOCABULARY = {"ptb_char": 50, "ptb_word": 10_000}
FACTORS: dict[str, tuple[int, ...]] = {
    "hidden": (64, 128, 256, 512, 1024, 2048),
    "bptt": (10, 25, 50, 100, 200, 400),
    "batch_size": (20, 50, 100, 200, 400, 800),
    "vocabulary": (50, 1_000, 10_000, 50_000),
}
ROUNDS = 5
BATCHES = 8  # of text, before it is read again
GB = 1e9


@dataclass(frozen=True)
class Limits:
    """Of a point: seconds of a step and gigabytes of its process."""

    seconds: float
    gigabytes: float


@dataclass(frozen=True)
class Point:
    """`factor` "base" is the model as it is."""

    task: str
    factor: str
    value: int
    vocabulary: int
    runs: Mapping[str, Run]

    @property
    def sizes(self) -> dict[str, int]:
        task = next(iter(self.runs.values())).task
        names = ("hidden", "layers", "bptt", "batch_size")
        return {name: getattr(task, name) for name in names} | {"vocabulary": self.vocabulary}

    @property
    def tokens(self) -> int:
        return self.sizes["bptt"] * self.sizes["batch_size"]

    @property
    def operations(self) -> float:
        """Floating-point operations of the products of a forward and a backward pass."""
        hidden, layers = self.sizes["hidden"], self.sizes["layers"]
        return 6.0 * self.tokens * (8 * layers * hidden**2 + hidden * self.vocabulary)

    @property
    def gigabytes(self) -> float:
        """A guess at a process that holds all optimisers: logits and gates in a few copies; parameters, gradients and
        a running sum of each model; factors and inverses."""
        hidden, layers = self.sizes["hidden"], self.sizes["layers"]
        activations = self.tokens * (4 * self.vocabulary + 16 * layers * hidden)
        parameters = 3 * len(self.runs) * (2 * hidden * self.vocabulary + 8 * layers * hidden**2)
        curvature = (len(self.runs) - 1) * layers * 48 * hidden**2
        return 0.4 + 4 * (activations + parameters + curvature) / GB


def bench(request: Request, seconds: float, gigabytes: float) -> None:
    """Raises `UserError` for a task that is no language model."""
    request.check()
    limits = Limits(seconds, gigabytes)
    planned = {task: points(request, task) for task in request.tasks}
    from kfacrnn.bench.cycle import METHOD
    from kfacrnn.bench.report import write
    from kfacrnn.bench.scaling_picture import draw
    from kfacrnn.drawing import write_files
    from kfacrnn.neighbours import Machine

    machine = Machine()
    rows, skipped = measure(planned, limits, request.rounds or ROUNDS)
    path = request.file("scaling")
    bounds = {"seconds": seconds, "gigabytes": gigabytes}
    write(path, "scaling", request, machine, rows, method=METHOD, limits=bounds, skipped=skipped)
    for one in skipped:
        print(f"skipped: {one['task']} {one['factor']}={one['value']}: {one['reason']}")
    files = {"csv": to_csv(rows)} | (draw(rows) if rows else {})
    for file in write_files(files, path.with_suffix("")):
        print(file)


def points(request: Request, task: str) -> list[Point]:
    """The model as it is, then every other value of every factor, smaller ones first."""
    if task not in VOCABULARY:
        raise UserError(f"--task {task}: scaling has sizes for {' and '.join(VOCABULARY)} only")
    runs = request.runs(task, BASELINE, OPTIMIZERS)
    base = Point(task, "base", 0, VOCABULARY[task], runs)
    found = [base]
    for factor, values in FACTORS.items():
        for value in sorted(set(values) - {base.sizes[factor]}):
            if factor == "vocabulary":
                found.append(Point(task, factor, value, value, runs))
            else:
                of_value = request.runs(task, BASELINE, OPTIMIZERS, [f"task.{factor}={value}"])
                found.append(Point(task, factor, value, base.vocabulary, of_value))
    return found


def measure(
    planned: Mapping[str, Sequence[Point]], limits: Limits, rounds: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows, and what was skipped and why. The seconds of a point are predicted from the best rate seen so far."""
    from kfacrnn.bench.memory import Ended, in_fresh_process
    from kfacrnn.progress import Progress

    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    with Progress("scaling", sum(map(len, planned.values()))) as progress:
        for points_of_task in planned.values():
            rate = 0.0  # operations a second
            for point in points_of_task:
                reason, found = predicted(point, limits, rate), []
                if not reason:
                    try:
                        found, reason = in_fresh_process(measured, point, limits, rounds)
                    except Ended:
                        reason = "seen: the process was ended, as for want of memory"
                if reason:
                    about = {"task": point.task, "factor": point.factor, "value": point.value}
                    skipped.append(about | point.sizes | {"reason": reason})
                else:
                    rate = max(rate, 1000 * point.operations / found[0]["ms_mean_cycle"])
                rows += found
                progress.show(len(rows) // len(point.runs) + len(skipped), "points")
    return rows, skipped


def predicted(point: Point, limits: Limits, rate: float) -> str:
    """Why a point would be too much, or nothing."""
    if point.gigabytes > limits.gigabytes:
        return f"predicted: {point.gigabytes:.1f} GB"
    if rate and point.operations / rate > limits.seconds:
        return f"predicted: {point.operations / rate:.1f} s a step"
    return ""


def measured(point: Point, limits: Limits, rounds: int) -> tuple[list[dict[str, Any]], str]:
    """A row for every optimiser; or none and a reason, if a step or the memory exceed the limits."""
    from kfacrnn.bench.subjects import TrainingRun, interleave
    from kfacrnn.memory import peak_rss_mb

    subjects = {}
    with made_up_text(point.vocabulary, point.tokens * BATCHES + point.sizes["batch_size"]):
        for name, run in point.runs.items():
            subject = subjects[name] = TrainingRun(run)
            for kind in subject.weights:
                seconds = sum(subject.step(kind).wall.values())
                gigabytes = peak_rss_mb() * 2**20 / GB
                if seconds > limits.seconds:
                    return [], f"seen: {seconds:.1f} s for a step of {name} ({kind.label})"
                if gigabytes > limits.gigabytes:
                    return [], f"seen: {gigabytes:.1f} GB with {name}"
    records = interleave(None, subjects, rounds)
    basics = {"task": point.task, "factor": point.factor, "value": point.value, **point.sizes}
    peak = {"peak_rss_mb": peak_rss_mb()}  # with all optimisers in the process
    return [
        basics
        | {"optimizer": name, "dtype": run.precision, "threads": run.threads}
        | records[name].row(records[BASELINE], BASELINE)
        | peak
        for name, run in point.runs.items()
    ], ""


@contextmanager
def made_up_text(vocabulary: int, length: int) -> Iterator[None]:
    """Inside, tasks read random tokens instead of the Penn Treebank. Rank r is as frequent as 1 / (r + 2.7)."""
    import torch

    from kfacrnn.data import ptb

    generator = torch.Generator().manual_seed(0)
    frequency = 1 / (torch.arange(vocabulary) + 2.7)
    train = torch.multinomial(frequency, length, replacement=True, generator=generator)
    words = [ptb.EOS, *map(str, range(1, vocabulary))]
    corpus = ptb.Corpus(train, train[:1000], train[:1000], words, {})
    with mock.patch.object(ptb, "load", return_value=corpus):
        yield


def to_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The numbers of the picture: one line for each row, the parts of the split as columns in milliseconds."""
    flat = [{key: value for key, value in row.items() if not isinstance(value, Mapping)} | row["split"] for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(flat[0]) if flat else ["task"], lineterminator="\n")
    writer.writeheader()
    for line in flat:
        writer.writerow({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in line.items()})
    return text.getvalue().encode()
