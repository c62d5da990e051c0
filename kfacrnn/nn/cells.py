"""`torch.nn.LSTMCell`, `GRUCell` and `RNNCell` whose pre-activations can be captured, for loops over time in Python.

A cell leaves a tap at every step, and plain autograd does the rest. Knows nothing of Fisher blocks.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfacrnn.kfac.capture import LinearMap
from kfacrnn.nn import gru
from kfacrnn.nn.capturable import Capturable
from kfacrnn.nn.recurrence import State, at_least_float32, gate_splits, never_compiled


class _Cell(Capturable, nn.RNNCellBase):
    """`hx` may be left out, as with torch's cells. Raises ValueError for unbatched input while a tape is set."""

    def _parameters_in_order(self) -> tuple[Tensor, ...]:
        names = ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if self.bias else ()))
        return tuple(getattr(self, name) for name in names)

    def _zeros(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.hidden_size)

    def _require_batch(self, x: Tensor) -> None:
        if x.dim() != 2:
            name = f"kfacrnn.nn.{type(self).__name__}"
            raise ValueError(f"{name} can be captured on [B, input_size] only, got {list(x.shape)}")

    def _recorded(self, map: LinearMap, x: Tensor, h: Tensor) -> Tensor:
        """s = [W_ih | W_hh] [x; h] + b_ih + b_hh."""
        assert self.tape is not None
        a, bias = torch.cat([x, h.to(x.dtype)], -1), map.biases[0] + map.biases[1] if map.biases else None
        s = at_least_float32(F.linear(a, torch.cat(map.weights, 1), bias))
        self.tape.record(map, a, s)
        return s


class LSTMCell(_Cell, nn.LSTMCell):
    """One `LinearMap`, `cell`, split into the gates i, f, g, o."""

    @never_compiled
    def forward(self, input: Tensor, hx: State | None = None) -> State:
        if self.tape is None:
            return super().forward(input, hx)
        self._require_batch(input)
        h, c = (self._zeros(input),) * 2 if hx is None else hx
        (map,) = cast(tuple[LinearMap, ...], self.maps())
        i, f, g, o = self._recorded(map, input, h).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def _build_maps(self) -> tuple[LinearMap, ...]:
        weights, biases = self._parameters_in_order()[:2], self._parameters_in_order()[2:]
        return (LinearMap("cell", weights, biases, gate_splits(self.hidden_size)),)


class GRUCell(_Cell, nn.GRUCell):
    """Three maps, `cell`, `cell.ih` and `cell.hh`: see `kfacrnn.nn.GRU`."""

    @never_compiled
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if self.tape is None:
            return super().forward(input, hx)
        self._require_batch(input)
        h, hidden = self._zeros(input) if hx is None else hx, self.hidden_size
        weight_ih, weight_hh, *biases = self._parameters_in_order()
        bias_ih, bias_hh = biases or (None, None)
        from_x, from_h = (
            at_least_float32(F.linear(x, weight, bias)).split([2 * hidden, hidden], -1)
            for x, weight, bias in ((input, weight_ih, bias_ih), (h, weight_hh, bias_hh))
        )
        gates = from_x[0] + from_h[0]
        taps = ((torch.cat([input, h.to(input.dtype)], -1), gates), (input, from_x[1]), (h, from_h[1]))
        for map, (a, s) in zip(self.maps(), taps, strict=True):
            self.tape.record(map, a, s)
        r, z = gates.sigmoid().chunk(2, -1)
        n = (from_x[1] + r * from_h[1]).tanh()
        return (1 - z) * n + z * h

    def _build_maps(self) -> tuple[LinearMap, ...]:
        return gru.maps_of("cell", *self._parameters_in_order())


class RNNCell(_Cell, nn.RNNCell):
    """One `LinearMap`, `cell`."""

    @never_compiled
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if self.tape is None:
            return super().forward(input, hx)
        self._require_batch(input)
        (map,) = cast(tuple[LinearMap, ...], self.maps())
        s = self._recorded(map, input, self._zeros(input) if hx is None else hx)
        return s.relu() if self.nonlinearity == "relu" else s.tanh()

    def _build_maps(self) -> tuple[LinearMap, ...]:
        return (LinearMap("cell", self._parameters_in_order()[:2], self._parameters_in_order()[2:]),)
