"""What a machine can do, a piece at a time: matrix products, decompositions, messages between two processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import torch
from torch import distributed as dist

from kfacrnn.kfac import precision
from kfacrnn.kfac.inversion import inversion

REPEATS = 3
ROWS = 1024  # of the matrices whose product is timed
SCALES = (0.5, 1.0, 1.6)  # hidden sizes, by the model's, whose sides are decomposed
GATES = 4
MESSAGE = 1 << 24  # bytes
SMALL = 100  # messages


def seconds(function: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Median, after one call that is not counted."""
    taken = []
    function()
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        taken.append(time.perf_counter() - began)
    return median(taken)


def arithmetic(hidden: int, approximations: Iterable[str], steps: int) -> dict[str, Any]:
    """Operations a second of products; by approximation, seconds of decomposing a side of so many rows, and of what
    puts sides together, a weight. A side is that of an LSTM layer of `SCALES` times `hidden` units."""
    products = {}
    for dtype in (torch.float32, torch.bfloat16):
        M = torch.randn(ROWS, ROWS).to(dtype)
        products[str(dtype).removeprefix("torch.")] = 2 * ROWS**3 / seconds(lambda M=M: M @ M)  # type: ignore[misc]
    decompose: dict[str, dict[str, float]] = {name: {} for name in approximations}
    assemble = {}
    for name, known in decompose.items():
        for units in (max(2, round(scale * hidden)) for scale in SCALES):
            work = inversion(
                name, *_factors(2 * units + 1), *([M] * GATES for M in _factors(units)), lengths=steps, damping=1e-3,
                compute_dtype=precision.compute_dtype(torch.float32, 2 * units + 1),
            )  # fmt: skip
            A, G = work.sides[:2]
            known[str(2 * units + 1)], known[str(units)] = seconds(A), seconds(G)
            sides = [A(), *[G()] * GATES]
            weights = (2 * units + 1) * GATES * units
            assemble[name] = seconds(lambda work=work, sides=sides: work.assemble(sides)) / weights  # type: ignore[misc]
    return {"operations_per_second": products, "decompose_seconds": decompose, "assemble_seconds_per_weight": assemble}


def _factors(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lag 0 and lag 1 of a random walk that forgets."""
    x = torch.randn(2 * rows, rows)
    for t in range(1, len(x)):
        x[t] += 0.5 * x[t - 1]
    return x.mT @ x / len(x), x[1:].mT @ x[:-1] / len(x)


def link() -> dict[str, float]:
    """Between two processes, both of which call this: bytes a second, seconds of a message and of gathering a small
    object from each, as the formulas of gloo's collectives in `kfacrnn.bench.cost_model` have them."""
    small, large = torch.zeros(1), torch.zeros(MESSAGE // 4)
    latency = seconds(lambda: dist.all_reduce(small), SMALL) / 2
    summed = seconds(lambda: dist.all_reduce(large))
    sent = seconds(lambda: (dist.broadcast(large, 0), dist.all_reduce(small))) - 2 * latency  # a sender does not wait
    objects: list[Any] = [None] * 2
    gather = seconds(lambda: dist.all_gather_object(objects, {"a side": [(ROWS, ROWS)] * 3}), SMALL) / 2
    return {
        "summed_bytes_per_second": MESSAGE / max(summed - 2 * latency, 1e-9),
        "sent_bytes_per_second": MESSAGE / max(sent - latency, 1e-9),
        "latency_seconds": latency,
        "gather_seconds_per_rank": gather,
    }
