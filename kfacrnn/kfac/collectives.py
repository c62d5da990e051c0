"""What `torch.distributed` does with one tensor or one object, for many tensors in one buffer.

Sums of symmetric matrices travel as their upper triangles. This module knows nothing of blocks or inverses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

Anything = TypeVar("Anything")


def gathered(item: Anything, group: dist.ProcessGroup) -> list[Anything]:
    """What every rank gives, in their order; for small things, which are pickled."""
    items: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(items, item, group=group)
    return items


def broadcast(tensors: Sequence[Tensor], source: int, group: dist.ProcessGroup) -> None:
    """In place, from the rank `source` of the group, in one buffer per dtype."""
    for flat, pieces in _flattened(tensors):
        dist.broadcast(flat, group=group, group_src=source)
        if dist.get_rank(group) != source:
            _restore(flat, pieces)


def sum_over_ranks(symmetric: Sequence[Tensor], others: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """In place; of `symmetric`, matrices and diagonals, only the upper triangles are read and sent."""
    triangles = [_upper(M) for M in symmetric]
    packed = [M.masked_select(triangle) for M, triangle in zip(symmetric, triangles, strict=True)]
    for flat, pieces in _flattened([*packed, *others]):
        dist.all_reduce(flat, group=group)
        _restore(flat, pieces)
    for M, triangle, values in zip(symmetric, triangles, packed, strict=True):
        M.masked_scatter_(triangle, values)
        if M.dim() == 2:
            M.copy_(M.triu() + M.triu(1).mT)


def _upper(M: Tensor) -> Tensor:
    """True in the upper triangle, or everywhere in a diagonal."""
    mask = torch.ones_like(M, dtype=torch.bool)
    return mask.triu_() if M.dim() == 2 else mask


def _flattened(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, list[Tensor]]]:
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        pieces = [tensor for tensor in tensors if tensor.dtype == dtype]
        yield torch.cat([piece.flatten() for piece in pieces]), pieces


def _restore(flat: Tensor, pieces: Sequence[Tensor]) -> None:
    for piece, values in zip(pieces, flat.split([piece.numel() for piece in pieces]), strict=True):
        piece.copy_(values.view_as(piece))
