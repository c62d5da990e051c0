"""`torch.nn.LSTMCell`, `GRUCell` and `RNNCell` whose pre-activations can be captured, for loops over time in Python.

A cell leaves a tap at every step, and plain autograd does the rest. Knows nothing of Fisher blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfacrnn.kfac.capture import LinearMap, Map
from kfacrnn.nn import gru
from kfacrnn.nn.capturable import Capturable
from kfacrnn.nn.recurrence import State, at_least_float32, gate_splits


class _Cell(Capturable, nn.RNNCellBase):
    """What the cells share. Unbatched input works as in torch but cannot be captured: ValueError."""

    def _parts(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
        """Weights and biases, those of the input first."""
        return (self.weight_ih, self.weight_hh), (self.bias_ih, self.bias_hh) if self.bias else ()

    def _zeros(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.hidden_size)

    def _products(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """What x and h bring, biases included. Raises ValueError for unbatched input."""
        if x.dim() != 2:
            name = f"kfacrnn.nn.{type(self).__name__}"
            raise ValueError(f"{name} can be captured on [B, input_size] only, got {list(x.shape)}")
        (weight_ih, weight_hh), biases = self._parts()
        bias_ih, bias_hh = biases or (None, None)
        return F.linear(x, weight_ih, bias_ih), F.linear(h, weight_hh, bias_hh)

    def _record(self, map: Map, s: Tensor, *inputs: Tensor) -> None:
        assert self.tape is not None
        self.tape.record(map, torch.cat([a.detach().to(inputs[0].dtype) for a in inputs], -1), s, is_step=True)


class LSTMCell(_Cell, nn.LSTMCell):
    """One `LinearMap`, `cell`, split into the gates i, f, g, o."""

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        if self.tape is None:
            return super().forward(input, hx)
        h, c = (self._zeros(input),) * 2 if hx is None else hx
        from_x, from_h = self._products(input, h)
        s = at_least_float32(from_x + from_h)
        self._record(self.maps()[0], s, input, h)
        i, f, g, o = s.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def _build_maps(self) -> tuple[LinearMap, ...]:
        return (LinearMap("cell", *self._parts(), gate_splits(self.hidden_size)),)


class GRUCell(_Cell, nn.GRUCell):
    """Three maps, `cell`, `cell.ih` and `cell.hh`: see `kfacrnn.nn.GRU`."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if self.tape is None:
            return super().forward(input, hx)
        h, hidden = self._zeros(input) if hx is None else hx, self.hidden_size
        from_x, from_h = (at_least_float32(s).split([2 * hidden, hidden], -1) for s in self._products(input, h))
        gates, of_both, of_x, of_h = from_x[0] + from_h[0], *self.maps()
        self._record(of_both, gates, input, h)
        self._record(of_x, from_x[1], input)
        self._record(of_h, from_h[1], h)
        r, z = gates.sigmoid().chunk(2, -1)
        n = (from_x[1] + r * from_h[1]).tanh()
        return (1 - z) * n + z * h

    def _build_maps(self) -> tuple[LinearMap, ...]:
        weights, biases = self._parts()
        return gru.maps_of("cell", *weights, *biases)


class RNNCell(_Cell, nn.RNNCell):
    """One `LinearMap`, `cell`."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if self.tape is None:
            return super().forward(input, hx)
        h = self._zeros(input) if hx is None else hx
        from_x, from_h = self._products(input, h)
        s = at_least_float32(from_x + from_h)
        self._record(self.maps()[0], s, input, h)
        return (s.relu() if self.nonlinearity == "relu" else s.tanh()).to(from_x.dtype)

    def _build_maps(self) -> tuple[LinearMap, ...]:
        return (LinearMap("cell", *self._parts()),)
