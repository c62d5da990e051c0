"""`torch.nn.RNN` whose pre-activation gradients can be had cheaply; see `kfacrnn.nn.lstm`, whose ways these are.

    a_t = [x_t; h_{t−1}]     s_t = [W_ih | W_hh] a_t + b_ih + b_hh     h_t = tanh(s_t) or max(s_t, 0)

Knows nothing of Fisher blocks.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kfacrnn.kfac.capture import LinearMap, Tape
from kfacrnn.nn.capturable import Capturable
from kfacrnn.nn.linear import linear
from kfacrnn.nn.recurrence import (
    Postponed,
    Tensors,
    gates_and_output,
    never_compiled,
    previous_hidden,
    recurrent_weight_gradient,
    rounded_like,
    run_backward,
    run_forward,
    zero_leaf,
)
from kfacrnn.nn.stack import Order, names_of_layers, run_captured

aten = torch.ops.aten


class _Tanh:
    """`kfacrnn.nn.recurrence.Steps` of a vanilla RNN: `gates` are h_t, H wide and not rounded."""

    kernel: ClassVar[str | None] = None

    def __init__(self, of: Tensors):
        self.y, self.h, self.product = of["gates"].unbind(0), of["output"].unbind(0), of["product"]
        self.inputs: Any = of.get("inputs")
        if "d_gates" in of:
            names = ("d_output", "d_gates", "rounded")
            self.d_output, self.ds, self.rounded = (of[name].unbind(0) for name in names)

    def advance(self, t: int) -> None:
        if self.inputs is not None:
            self.y[t].copy_(self.inputs[t])
        self.h[t].copy_(self.activate(self.y[t].add_(self.product)))

    def retreat(self, t: int) -> None:
        self.backward(torch.add(self.d_output[t], self.product, out=self.ds[t]), self.y[t])
        if self.rounded[t].dtype != self.ds[t].dtype:
            self.rounded[t].copy_(self.ds[t])

    @staticmethod
    def activate(s: Tensor) -> Tensor:
        return s.tanh_()

    @staticmethod
    def backward(d: Tensor, y: Tensor) -> None:
        """From the gradient of y to that of s, in place."""
        aten.tanh_backward(d, y, grad_input=d)


class _Relu(_Tanh):
    @staticmethod
    def activate(s: Tensor) -> Tensor:
        return s.relu_()

    @staticmethod
    def backward(d: Tensor, y: Tensor) -> None:
        aten.threshold_backward(d, y, 0, grad_input=d)


class _Recurrence(torch.autograd.Function):
    """`(inputs [T, B, H], probe, W_hh, h_0, steps, …) → h [T, B, H]` with s_t = inputs_t + W_hh h_{t−1}.

    `probe` and the memory of `inputs` as in `kfacrnn.nn.lstm`; `steps` is `_Tanh` or `_Relu`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        probe: Tensor,
        weight_hh: Tensor,
        h0: Tensor,
        steps: type[_Tanh],
        postponed: Postponed,
        weight_probe: Tensor,
    ) -> Tensor:
        of = gates_and_output(inputs, h0)
        run_forward(steps, of, weight_hh, h0)
        ctx.save_for_backward(weight_hh, h0, of["gates"], of["output"])
        ctx.steps, ctx.postponed, ctx.dtype = steps, postponed, inputs.dtype
        return cast(Tensor, of["output"])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        weight_hh, h0, gates, output = ctx.saved_tensors
        output = output.detach()  # else it would hold on to its own graph
        d_gates = torch.empty_like(gates)
        rounded = rounded_like(d_gates, h0.dtype)
        of = {"gates": gates, "output": output, "d_output": d_output, "d_gates": d_gates, "rounded": rounded}
        dh0 = run_backward(ctx.steps, of, weight_hh, h0)
        ctx.postponed.compute = lambda: (recurrent_weight_gradient(rounded, h0, output),)
        d_inputs = d_gates if ctx.dtype == d_gates.dtype else rounded
        return d_inputs, d_gates, None, dh0, None, None, h0.new_zeros(())


class RNN(Capturable, nn.RNN):
    """`torch.nn.RNN` with the same arguments, `state_dict` and results, whose maps can be captured.

    One `LinearMap` per layer and direction, named `l0`, `l0_reverse`, `l1`, …. Unbatched input works as in torch but
    cannot be captured: ValueError. A captured pass has no second derivatives.
    """

    @never_compiled
    def forward(self, input: Any, hx: Tensor | None = None) -> tuple[Any, Tensor]:
        if self.tape is None:
            return super().forward(input, hx)
        steps = _Relu if self.nonlinearity == "relu" else _Tanh
        layers = [partial(_captured_layer, map, self.tape, steps) for map in cast(tuple[LinearMap, ...], self.maps())]
        output, (h_n,) = run_captured(self, layers, input, hx, states=1)
        return output, h_n

    def _build_maps(self) -> tuple[LinearMap, ...]:
        return tuple(
            LinearMap(name, tuple(parameters[:2]), tuple(parameters[2:]))
            for name, parameters in zip(names_of_layers(self), self.all_weights, strict=True)
        )


def _captured_layer(
    map: LinearMap, tape: Tape, steps: type[_Tanh], order: Order, x: Tensor, h0: Tensor
) -> tuple[Tensor]:
    weight_ih, weight_hh = map.weights
    projected = linear(x, weight_ih, map.biases[0] + map.biases[1] if map.biases else None)
    probe = zero_leaf(projected, torch.promote_types(projected.dtype, torch.float32))
    h0, postponed = h0.to(projected.dtype), Postponed()
    weight = weight_hh.detach().to(h0.dtype)
    of_weight = postponed.probe(weight_hh)
    output = _Recurrence.apply(order(projected), order(probe), weight, h0, steps, postponed, of_weight)
    with torch.no_grad():
        tape.record(map, torch.cat([x, order(previous_hidden(h0, output))], -1), probe, lengths=order.packed)
    return (order(output),)
