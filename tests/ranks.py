"""A function on several ranks at once: processes in a gloo group, without torchrun and without a port."""

from __future__ import annotations

import io
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from tests.processes import CONTEXT

SECONDS = 100


def together(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returns on every rank: tensors and plain values. Raises the first error of any."""
    with tempfile.TemporaryDirectory() as folder:
        ends = [CONTEXT.Pipe(duplex=False) for _ in range(ranks)]
        processes = [
            CONTEXT.Process(target=_rank, args=(rank, ranks, Path(folder) / "store", ours, function, arguments))
            for rank, (_, ours) in enumerate(ends)
        ]
        for process, (_, ours) in zip(processes, ends, strict=True):
            process.start()
            ours.close()
        try:
            answers = [_answer(end) for end, _ in ends]
        finally:
            for process in processes:
                process.kill()
                process.join()
    errors = sorted((error for _, error in answers if error), key=lambda error: "Connection closed" in error)
    assert not errors, errors[0]  # a connection closes because of an error elsewhere
    return [result for result, _ in answers]


def _answer(end: Connection) -> tuple[Any, str]:
    assert end.poll(SECONDS), "a rank does not answer"
    return torch.load(io.BytesIO(end.recv_bytes()), weights_only=True)


def _rank(rank: int, ranks: int, store: Path, end: Connection, function: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    result, error = None, ""
    try:
        result = function(*arguments)
    except Exception:
        error = traceback.format_exc()
    buffer = io.BytesIO()
    torch.save((result, error), buffer)
    end.send_bytes(buffer.getvalue())
    if not error:
        dist.barrier()
