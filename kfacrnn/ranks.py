"""One training run on several processes, started by `torchrun -m kfacrnn train …`: data-parallel, and in step.

Rank r of N holds the sequences r, r + N, r + 2N, … of every batch. `task.batch_size` is that of all ranks together, so
that a run is the same run, to rounding, on any number of them. Not so with dropout: rank 0 draws the masks of a process
alone, the others masks of their own; what goes on with the same number of ranks goes on with the same masks.

Rank 0 alone writes: the others have an `Onlooker` for a folder. Its clocks and its memory are the run's. Decisions are
made by all ranks alike, from numbers that they have in common.

Everything here is harmless, and free, in a process that is alone.
"""

from __future__ import annotations

import atexit
import gc
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from kfacrnn.errors import UserError
from kfacrnn.kfac.precision import has_half_precision_kernels
from kfacrnn.metrics import Metrics
from kfacrnn.store import RunFolder

Anything = TypeVar("Anything")
GONE = ("Connection closed", "Connection reset", "Broken pipe", "remote process exited", "communicator was aborted")


class Lost(UserError):
    """Another process of the run has ended before its time."""


def count() -> int:
    """Processes of this run, N."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    return rank() == 0


def join(batch_size: int, device: str) -> None:
    """Meets the other processes, once; they stay together until the process ends. Raises `UserError` if the batch or
    the devices cannot be shared out."""
    if batch_size % count():  # DDP takes the mean over the ranks, and that is the batch's if their parts are equal
        raise UserError(f"task.batch_size={batch_size}: cannot be shared equally by {count()} processes")
    if count() > 1 and ":" in device:
        raise UserError(f"device={device}: {count()} processes need a device each; write device=cuda")
    if count() > 1 and not dist.is_initialized():
        # Small things, such as whether a signal came, stay on the CPU and wait for no device.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        atexit.register(_leave)


def _leave() -> None:
    gc.collect()  # DDP in a cycle keeps the group's threads, which abort the process if Python ends before them
    dist.destroy_process_group()


def device(name: str, precision: str) -> torch.device:
    """`cuda` is this rank's own GPU. Raises `UserError` if there is none, or none that computes in that precision."""
    device = torch.device(name)
    if device.type == "cuda":
        if count() > 1:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if (device.index or 0) >= (found := torch.cuda.device_count()):
            raise UserError(f"device={device}: torch finds {found} CUDA devices here; write device=cpu")
        if count() > 1:
            torch.cuda.set_device(device)  # as NCCL expects
    if precision == "bf16" and not has_half_precision_kernels(torch.bfloat16, device):
        raise UserError("precision=bf16: this processor has no bfloat16 arithmetic; write precision=fp32")
    return device


def reseed(seed: int, update: int) -> None:
    """Gives noise, such as dropout, of its own to every rank but the first, which has that of a single process."""
    if not is_first():
        digest = hashlib.sha256(repr((seed, update, rank())).encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:7]))


def hardware() -> dict[str, Any]:
    """What a time axis must not mix, beside `provenance.hardware`."""
    return {"ranks": count()} if count() > 1 else {}


def group() -> dist.ProcessGroup | None:
    return dist.group.WORLD if count() > 1 else None


@contextmanager
def first_goes_ahead() -> Iterator[None]:
    """Rank 0 does what is inside before the others do: what it has downloaded they find."""
    if not is_first():
        dist.barrier()
    yield
    if is_first() and count() > 1:
        dist.barrier()


def parallel(model: nn.Module) -> nn.Module:
    """The model whose gradients are averaged over the ranks. Parameters are those of `model`."""
    return nn.parallel.DistributedDataParallel(model) if count() > 1 else model


# ------------------------------------------------------------------------------------------------------------ sequences


def mine(whole: Tensor, dim: int) -> Tensor:
    """This rank's sequences of a batch that has them along `dim`."""
    if count() == 1:
        return whole
    return whole.index_select(dim, torch.arange(rank(), whole.shape[dim], count(), device=whole.device))


def whole(part: Tensor, dim: int) -> Tensor:
    """The batch of which every rank holds its part: the reverse of `mine`."""
    if count() == 1:
        return part
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(count())]
    dist.all_gather(parts, part.contiguous())
    return torch.stack(parts, dim + 1).flatten(dim, dim + 1)


# -------------------------------------------------------------------------------------------------------------- numbers


def total(number: float) -> float:
    """The sum over the ranks."""
    return sum(each(number))


def largest(number: int) -> int:
    """Over the ranks."""
    if count() == 1:
        return number
    most = torch.tensor(number)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def means(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Over the ranks, elementwise, and the sums of the weights. Not finite where one is not."""
    if count() == 1:
        return values, weights
    sums = torch.stack([values * weights, weights])
    dist.all_reduce(sums)
    return sums[0] / sums[1], sums[1]


def each(item: Anything) -> list[Anything]:
    """What every rank gives."""
    if count() == 1:
        return [item]
    items: list[Any] = [None] * count()
    dist.all_gather_object(items, item)
    return items


def of_first(item: Anything) -> Anything:
    """What rank 0 gives."""
    if count() == 1:
        return item
    items: list[Any] = [item if is_first() else None]
    dist.broadcast_object_list(items, src=0)
    return items[0]


# -------------------------------------------------------------------------------------------------------------- writing


def _nothing(*_: Any, **__: Any) -> None:
    pass


class OthersMetrics(Metrics):
    """The metrics.csv that another process writes."""

    append = truncate = _nothing


class Onlooker(RunFolder):
    """The folder of a run that another process writes."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.metrics = OthersMetrics(path)

    @contextmanager
    def writing(self) -> Iterator[None]:
        yield

    describe = set_status = save_checkpoint = load_checkpoint = drop_checkpoints = save_model = drop_model = _nothing


@contextmanager
def in_step() -> Iterator[None]:
    """Raises `Lost` for what torch says when another rank has gone."""
    try:
        yield
    except RuntimeError as error:
        if count() > 1 and any(sign in str(error) for sign in GONE):
            atexit.unregister(_leave)  # which would talk to the others
            atexit.register(os._exit, 2)
            raise Lost("another process of this run has ended; the same command goes on from its checkpoint") from error
        raise
