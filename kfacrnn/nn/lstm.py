"""`torch.nn.LSTM` whose pre-activation gradients can be had cheaply.

A recurrence with a hand-written backward: one GEMM for the inputs of all steps, one small GEMM per step, and the
gradients g_t of all steps and gates in one `[T, B, 4·hidden]` buffer. It runs while a tape is set, its point-wise part
compiled where that can be had (`kfacrnn.nn.pointwise`); otherwise torch's fused kernel does. Knows nothing of Fisher
blocks.

    a_t = [x_t; h_{t−1}]     s_t = [W_ih | W_hh] a_t + b_ih + b_hh, in torch's gate order i, f, g, o
    c_t = σ(f) c_{t−1} + σ(i) tanh(g)     h_t = σ(o) tanh(c_t)
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kfacrnn.kfac.capture import LinearMap, Tape
from kfacrnn.nn.capturable import Capturable
from kfacrnn.nn.linear import linear
from kfacrnn.nn.recurrence import (
    Postponed,
    State,
    TorchSteps,
    at_lengths,
    forward_tensors,
    gate_splits,
    kernels_for,
    never_compiled,
    previous_hidden,
    recurrent_weight_gradient,
    rounded_like,
    run_backward,
    run_forward,
    zero_leaf,
)
from kfacrnn.nn.stack import Order, names_of_layers, run_captured


class _Recurrence(torch.autograd.Function):
    """`(inputs [T, B, 4H], probe, W_hh, h_0, c_0, …) → (h [T, B, H], c_n)` with s_t = inputs_t + W_hh h_{t−1} and the
    c_n of every sequence's last step, as `lengths` say.

    `probe` stands for zeros added to s_t; its gradient, and that of `inputs`, is g_t. Products are taken in the
    dtype of `W_hh` and `h_0`, everything else in that of `inputs`, whose memory is taken over: the caller must have no
    further use for its values. The gradient of `W_hh` goes through `postponed` and its probe.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        probe: Tensor,
        weight_hh: Tensor,
        h0: Tensor,
        c0: Tensor,
        lengths: Tensor | None,
        postponed: Postponed,
        weight_probe: Tensor,
    ) -> State:
        of = forward_tensors(inputs, h0, c0)
        run_forward(TorchSteps, of, weight_hh, h0)
        ctx.save_for_backward(weight_hh, h0, *of.values())
        ctx.names, ctx.postponed, ctx.dtype, ctx.lengths = tuple(of), postponed, inputs.dtype, lengths
        return of["output"], at_lengths(of["cells"][1:], lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor, d_cell: Tensor) -> tuple[Tensor | None, ...]:
        weight_hh, h0, *saved = ctx.saved_tensors
        of = dict(zip(ctx.names, saved, strict=True))
        gates, output = of["gates"], of["output"].detach()  # else output would hold on to its own graph
        d_gates = torch.empty_like(gates)
        rounded = rounded_like(d_gates, h0.dtype)
        of |= {"d_output": d_output.contiguous(), "d_gates": d_gates, "rounded": rounded}
        of |= {"d_cell": d_cell.clone(memory_format=torch.contiguous_format)}
        dh0 = run_backward(TorchSteps, of, weight_hh, h0, ctx.lengths)
        ctx.postponed.compute = lambda: (recurrent_weight_gradient(rounded, h0, output),)
        d_inputs = d_gates if ctx.dtype == d_gates.dtype else rounded
        return d_inputs, d_gates, None, dh0, of["d_cell"], None, None, h0.new_zeros(())


def recur(
    inputs: Tensor, probe: Tensor, weight_hh: Tensor, h0: Tensor, c0: Tensor, lengths: Tensor | None = None
) -> State:
    """See `_Recurrence`; products in the dtype of `h0`."""
    postponed = Postponed()
    weight, weight_probe = weight_hh.detach().to(h0.dtype), postponed.probe(weight_hh)
    return cast(State, _Recurrence.apply(inputs, probe, weight, h0, c0, lengths, postponed, weight_probe))


class LSTM(Capturable, nn.LSTM):
    """`torch.nn.LSTM` with the same arguments, `state_dict` and results, whose maps can be captured.

    One `LinearMap` per layer and direction, named `l0`, `l0_reverse`, `l1`, …, split into the gates i, f, g, o.
    `proj_size` and unbatched input work as in torch but cannot be captured: ValueError. A captured pass has no second
    derivatives.
    """

    @never_compiled
    def forward(self, input: Any, hx: State | None = None) -> tuple[Any, State]:
        if self.tape is None:
            with kernels_for(cast(Tensor, self.weight_hh_l0)):
                return super().forward(input, hx)
        layers = [partial(_captured_layer, map, self.tape) for map in cast(tuple[LinearMap, ...], self.maps())]
        output, state = run_captured(self, layers, input, hx, states=2)
        return output, cast(State, state)

    def _build_maps(self) -> tuple[LinearMap, ...]:
        if self.proj_size:
            raise ValueError("kfacrnn.nn.LSTM cannot be captured with proj_size > 0: use a smaller hidden_size instead")
        return tuple(
            LinearMap(name, tuple(parameters[:2]), tuple(parameters[2:]), gate_splits(self.hidden_size))
            for name, parameters in zip(names_of_layers(self), self.all_weights, strict=True)
        )


def _captured_layer(map: LinearMap, tape: Tape, order: Order, x: Tensor, h0: Tensor, c0: Tensor) -> State:
    weight_ih, weight_hh = map.weights
    projected = linear(x, weight_ih, map.biases[0] + map.biases[1] if map.biases else None)
    state = torch.promote_types(projected.dtype, torch.float32)
    probe = zero_leaf(projected, state)
    h0, c0 = h0.to(projected.dtype), c0.to(state)
    output, c = recur(order(projected), order(probe), weight_hh, h0, c0, order.lengths)
    with torch.no_grad():
        tape.record(map, torch.cat([x, order(previous_hidden(h0, output))], -1), probe, lengths=order.packed)
    return order(output), c
