"""Recurrent layers on top of each other: forwards and backwards in time, on padded batches and on packed sequences.

Stands in for what torch's modules do around their kernels. Knows nothing of what a layer computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from kfacrnn.nn.recurrence import at_lengths

Layer = Callable[..., tuple[Tensor, ...]]  # (x [T, B, in], h_0, c_0) → (h [T, B, hidden], c_n); a GRU has no c


class Order:
    """The order in which a layer takes the steps of `[T, B, …]`: as they come, or `backwards`, each sequence within its
    length. Calling it puts steps into that order, or out of it."""

    def __init__(self, backwards: bool = False, packed: Tensor | None = None, device: torch.device | None = None):
        """`packed` are the lengths of a PackedSequence, on the CPU."""
        self.backwards, self.packed = backwards, packed
        self.lengths = None if packed is None else packed.to(device)

    def __call__(self, x: Tensor) -> Tensor:
        if not self.backwards:
            return x
        if self.lengths is None:
            return x.flip(0)
        t = torch.arange(len(x), device=x.device)[:, None]
        mirrored = torch.where(t < self.lengths, self.lengths - 1 - t, t)
        return x.take_along_dim(mirrored.reshape(*mirrored.shape, *[1] * (x.dim() - 2)), 0)

    def last(self, h: Tensor) -> Tensor:
        """What sequences end with, `[B, …]` of h as it came."""
        return h[0] if self.backwards else at_lengths(h, self.lengths)


def names_of_layers(module: nn.RNNBase) -> list[str]:
    """As torch's parameters end, in the order of `all_weights`: l0, l0_reverse, l1, …"""
    directions = ("", "_reverse") if module.bidirectional else ("",)
    return [f"l{layer}{direction}" for layer in range(module.num_layers) for direction in directions]


def run_stack(
    layers: Sequence[Layer],
    x: Tensor,
    state: tuple[Tensor, ...],
    dropout: float,
    directions: Sequence[Order] = (Order(),),
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Layers on top of each other, one for each of the `directions` side by side, with dropout in between, time first;
    `state` and the state returned are `[layers, B, hidden]` each."""
    last = []
    for first in range(0, len(layers), len(directions)):
        x, outputs = F.dropout(x, dropout) if first else x, []
        for index, order in enumerate(directions, first):
            h, *rest = layers[index](x, *(initial[index] for initial in state))
            outputs.append(h)
            last.append((order.last(h), *(s.to(h.dtype) for s in rest)))
        x = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
    return x, tuple(torch.stack(each) for each in zip(*last, strict=True))


def run_captured(
    module: nn.RNNBase, layers: Sequence[Layer], input: Any, hx: Any, states: int
) -> tuple[Any, tuple[Tensor, ...]]:
    """`layers`, which take an `Order` before all else, in place of those of torch's `module`, with the arguments of its
    forward. `states` is 1, or 2 with c."""
    lengths = None
    if isinstance(input, PackedSequence):
        x, lengths = pad_packed_sequence(input)
    elif input.dim() == 2:
        name = f"kfacrnn.nn.{type(module).__name__}"
        raise ValueError(f"{name} cannot be captured on unbatched input: pass [T, 1, input_size]")
    else:
        x = input.transpose(0, 1) if module.batch_first else input
    ways = (False, True) if module.bidirectional else (False,)
    directions = [Order(backwards, lengths, x.device) for backwards in ways]
    if hx is None:
        zeros = x.new_zeros(len(layers), x.shape[1], module.hidden_size)
        hx = zeros if states == 1 else (zeros,) * states
    module.check_forward_args(*((input, hx, None) if lengths is None else (input.data, hx, input.batch_sizes)))
    ordered = [partial(layer, order) for layer, order in zip(layers, cycle(directions), strict=False)]
    state = (hx,) if states == 1 else hx
    output, state = run_stack(ordered, x, state, module.dropout if module.training else 0.0, directions)
    if lengths is not None:
        return _packed_like(input, output, lengths), state
    output = (
        output.clone()
    )  # the recurrence keeps the other; this one may be changed in place, as a GRU's or RNN's of torch may
    return output.transpose(0, 1) if module.batch_first else output, state


def _packed_like(given: PackedSequence, output: Tensor, lengths: Tensor) -> PackedSequence:
    if given.sorted_indices is not None:
        output, lengths = output.index_select(1, given.sorted_indices), lengths[given.sorted_indices.cpu()]
    packed = pack_padded_sequence(output, lengths)
    return PackedSequence(packed.data, given.batch_sizes, given.sorted_indices, given.unsorted_indices)
