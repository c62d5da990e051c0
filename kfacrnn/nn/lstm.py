"""`torch.nn.LSTM` whose pre-activation gradients can be had cheaply.

Training runs torch's fused kernel. While a tape is set, a recurrence with a hand-written backward runs instead: one
GEMM for the inputs of all steps, one small GEMM per step, and the gradients g_t of all steps and gates in one
`[T, B, 4·hidden]` buffer. Knows nothing of Fisher blocks.

    a_t = [x_t; h_{t−1}]     s_t = [W_ih | W_hh] a_t + b_ih + b_hh, in torch's gate order i, f, g, o
    c_t = σ(f) c_{t−1} + σ(i) tanh(g)     h_t = σ(o) tanh(c_t)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from kfacrnn.kfac.capture import LinearMap, Tape
from kfacrnn.nn.capturable import Capturable

aten = torch.ops.aten

State = tuple[Tensor, Tensor]
Layer = Callable[[Tensor, Tensor, Tensor], State]  # (x [T, B, in], h_0, c_0) → (h [T, B, hidden], c_T)


def gate_splits(hidden_size: int) -> dict[str, int]:
    """Rows of each gate, in torch's order."""
    return dict.fromkeys("ifgo", hidden_size)


def at_least_float32(x: Tensor) -> Tensor:
    """Under bf16 or fp16 autocast only the products are in that precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def zero_leaf(like: Tensor) -> Tensor:
    """Zeros that take up no memory and collect a gradient."""
    return like.new_zeros(()).expand(like.shape).requires_grad_()


def add_product(target: Tensor, a: Tensor, weight: Tensor) -> None:
    """`target += a @ weight`, the product in the dtype of `weight`, the sum in that of `target`."""
    if target.dtype == weight.dtype:
        target.addmm_(a, weight)
    else:
        target.add_(a.to(weight.dtype) @ weight)


def write_product(target: Tensor, a: Tensor, weight: Tensor) -> None:
    """`target = a @ weight`, the product in the dtype of `weight`."""
    if target.dtype == weight.dtype:
        torch.mm(a, weight, out=target)
    else:
        target.copy_(a @ weight)


def previous_hidden(h0: Tensor, output: Tensor) -> Tensor:
    """h_0 … h_{T−1}: `[T, B, hidden]`."""
    return torch.cat([h0.unsqueeze(0), output[:-1]])


def hidden_gradients(d_output: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What reaches h_0 … h_T other than through later steps, to be added to in place."""
    return torch.cat([torch.zeros_like(d_output[:1]), d_output]).to(dtype).unbind(0)


def recurrent_weight_gradient(ds: Tensor, h0: Tensor, output: Tensor) -> Tensor:
    """Σ_t ds_tᵀ h_{t−1}, summed over cases: `[4·hidden, hidden]`."""
    ds = ds.to(output.dtype)
    with torch.autocast(ds.device.type, enabled=False):  # a backward pass may run inside autocast
        return (ds[0].t() @ h0).addmm_(ds[1:].flatten(0, 1).t(), output[:-1].flatten(0, 1))


class Gates:
    """The four gates of all steps in one buffer `[T, B, 4·hidden]`, or their gradients.

    The views of each step are made once: making one costs as much as a small operation.
    """

    def __init__(self, buffer: Tensor):
        hidden = buffer.shape[-1] // 4
        self.i, self.f, self.g, self.o = (part.unbind(0) for part in buffer.chunk(4, -1))
        self.i_f = buffer[..., : 2 * hidden].unbind(0)
        self.i_f_g = buffer[..., : 3 * hidden].unflatten(-1, (3, hidden)).unbind(0)
        self.all = buffer.unbind(0)

    def advance(self, t: int, c_previous: Tensor, c: Tensor) -> None:
        """Turn s_t into the gates of step t and write c_t into `c`."""
        self.i_f[t].sigmoid_()
        self.g[t].tanh_()
        self.o[t].sigmoid_()
        torch.mul(self.f[t], c_previous, out=c).addcmul_(self.i[t], self.g[t])

    def retreat(self, t: int, c_previous: Tensor, y: Tensor, dc: Tensor, dh: Tensor, ds: Gates) -> None:
        """Write g_t into `ds` and turn `dc`, the gradient of c_t, into that of c_{t−1}; h_t is o ⊙ `y`."""
        # sigmoid_backward(x, σ) = x σ (1 − σ) and tanh_backward(x, τ) = x (1 − τ²) in one pass, without temporaries.
        aten.sigmoid_backward(self.g[t], self.i[t], grad_input=ds.i[t])
        aten.sigmoid_backward(c_previous, self.f[t], grad_input=ds.f[t])
        aten.tanh_backward(self.i[t], self.g[t], grad_input=ds.g[t])
        aten.sigmoid_backward(y, self.o[t], grad_input=ds.o[t])
        ds.i_f_g[t].mul_(dc.unsqueeze(1))
        ds.o[t].mul_(dh)
        dc.mul_(self.f[t])


class _Recurrence(torch.autograd.Function):
    """`(inputs [T, B, 4H], probe, W_hh, h_0, c_0) → (h [T, B, H], c_T)` with s_t = inputs_t + probe_t + W_hh h_{t−1}.

    `probe` is zero; its gradient, and that of `inputs`, is g_t. Products are taken in the dtype of `W_hh`, everything
    else in that of `inputs`, whose memory is taken over: the caller must have no further use for its values.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, probe: Tensor, weight_hh: Tensor, h0: Tensor, c0: Tensor) -> State:
        steps, cases, hidden = *inputs.shape[:2], h0.shape[-1]
        buffer = inputs.detach()
        cells = buffer.new_empty(steps + 1, cases, hidden)
        tanh_cells = buffer.new_empty(steps, cases, hidden)
        output = h0.new_empty(steps, cases, hidden)
        cells[0] = c0
        gates = Gates(buffer)
        c, y, h = cells.unbind(0), tanh_cells.unbind(0), (h0, *output.unbind(0))
        for t in range(steps):
            add_product(gates.all[t], h[t], weight_hh.t())
            gates.advance(t, c[t], c[t + 1])
            torch.tanh(c[t + 1], out=y[t])
            torch.mul(gates.o[t], y[t], out=h[t + 1])
        ctx.save_for_backward(buffer, cells, tanh_cells, output, weight_hh, h0)
        return output, cells[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor, d_cell: Tensor) -> tuple[Tensor | None, ...]:
        buffer, cells, tanh_cells, output, weight_hh, h0 = ctx.saved_tensors
        d_buffer = torch.empty_like(buffer)
        gates, ds = Gates(buffer), Gates(d_buffer)
        c, y = cells.unbind(0), tanh_cells.unbind(0)
        dc, dh = d_cell.clone(), hidden_gradients(d_output, buffer.dtype)
        for t in reversed(range(len(output))):
            dc.add_(aten.tanh_backward(dh[t + 1] * gates.o[t], y[t]))
            gates.retreat(t, c[t], y[t], dc, dh[t + 1], ds)
            add_product(dh[t], ds.all[t], weight_hh)
        d_weight = recurrent_weight_gradient(d_buffer, h0, output) if ctx.needs_input_grad[2] else None
        return d_buffer, d_buffer, d_weight, dh[0].to(h0.dtype), dc


def run_stack(layers: Sequence[Layer], x: Tensor, state: State, dropout: float) -> tuple[Tensor, State]:
    """Layers on top of each other with dropout between them, time first; `state` and the state returned are
    `[layers, B, hidden]` each."""
    h_n, c_n = [], []
    for index, (layer, h0, c0) in enumerate(zip(layers, *state, strict=True)):
        x, c = layer(F.dropout(x, dropout) if index else x, h0, c0)
        h_n.append(x[-1])
        c_n.append(c.to(x.dtype))
    return x, (torch.stack(h_n), torch.stack(c_n))


class LSTM(Capturable, nn.LSTM):
    """`torch.nn.LSTM` with the same arguments, `state_dict` and results, whose maps can be captured.

    One `LinearMap` per layer, named `l0`, `l1`, …, split into the gates i, f, g, o. `bidirectional`, `proj_size`,
    PackedSequence and unbatched input work as in torch but cannot be captured: ValueError. A captured pass has no
    second derivatives, and takes the gradient of `weight_hh` whenever that requires one.
    """

    def forward(self, input: Tensor, hx: State | None = None) -> tuple[Tensor, State]:  # type: ignore[override]
        if self.tape is None:
            return super().forward(input, hx)
        if isinstance(input, PackedSequence):
            raise ValueError(
                "kfacrnn.nn.LSTM cannot be captured on a PackedSequence: pass the padded batch [T, B, input_size] and "
                "give `lengths` to the predictive distribution"
            )
        if input.dim() == 2:
            raise ValueError("kfacrnn.nn.LSTM cannot be captured on unbatched input: pass [T, 1, input_size]")
        layers = [partial(_captured_layer, map, self.tape) for map in cast(tuple[LinearMap, ...], self.maps())]
        x = input.transpose(0, 1) if self.batch_first else input
        if hx is None:
            zeros = x.new_zeros(self.num_layers, x.shape[1], self.hidden_size)
            hx = (zeros, zeros)
        self.check_forward_args(input, hx, None)
        output, state = run_stack(layers, x, hx, self.dropout if self.training else 0.0)
        return output.transpose(0, 1) if self.batch_first else output, state

    def _build_maps(self) -> tuple[LinearMap, ...]:
        if self.bidirectional:
            raise ValueError(
                "kfacrnn.nn.LSTM cannot be captured with bidirectional=True: use two, one on the reversed sequence"
            )
        if self.proj_size:
            raise ValueError("kfacrnn.nn.LSTM cannot be captured with proj_size > 0: use a smaller hidden_size instead")
        return tuple(
            LinearMap(f"l{layer}", tuple(parameters[:2]), tuple(parameters[2:]), gate_splits(self.hidden_size))
            for layer, parameters in enumerate(self.all_weights)
        )


def _captured_layer(map: LinearMap, tape: Tape, x: Tensor, h0: Tensor, c0: Tensor) -> State:
    weight_ih, weight_hh = map.weights
    projected = F.linear(x, weight_ih, map.biases[0] + map.biases[1] if map.biases else None)
    dtype, inputs = projected.dtype, at_least_float32(projected)
    probe = zero_leaf(inputs)
    output, c = _Recurrence.apply(inputs, probe, weight_hh.to(dtype), h0.to(dtype), c0.to(inputs.dtype))
    with torch.no_grad():
        tape.record(map, torch.cat([x, previous_hidden(h0, output)], -1), probe)
    return output, c
