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
    """What `function(*arguments)` returns on every rank: tensors and plain values. An error on one of them is raised."""
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
            return [_result(end) for end, _ in ends]
        finally:
            for process in processes:
                process.kill()
                process.join()


def _result(end: Connection) -> Any:
    assert end.poll(SECONDS), "a rank does not answer"
    result, error = torch.load(io.BytesIO(end.recv_bytes()), weights_only=False)
    assert not error, error
    return result


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
