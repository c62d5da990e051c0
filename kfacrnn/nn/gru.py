"""`torch.nn.GRU` whose pre-activation gradients can be had cheaply; see `kfacrnn.nn.lstm`, whose ways these are.

    (r, z)_t = σ([W_ih | W_hh] [x_t; h_{t−1}] + b_ih + b_hh)     rows r and z of each
    n_t = tanh(W_in x_t + b_in + r_t ⊙ u_t)     u_t = W_hn h_{t−1} + b_hn     h_t = (1 − z_t) n_t + z_t h_{t−1}

The reset gate stands between W_hn and the candidate n, as in torch and cuDNN (and not in Cho et al. 2014). So the
candidate has two pre-activations with different gradients, g of s_n = W_in x_t + b_in + r_t ⊙ u_t and r_t ⊙ g of u_t,
and no single matrix [W_in | W_hn] with one Kronecker product. Knows nothing of Fisher blocks.
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


class _TorchSteps:
    """`kfacrnn.nn.recurrence.Steps` of a GRU. Its names are those of the LSTM, with 3H for 4H, but

    gates, d_gates    [T, B, 3H]    r, z and n; the gradients of their pre-activations
    recurrent         [T, B, H]     u_t
    d_recurrent       [T, B, 3H]    gradient of W_hh h_{t−1} + b_hh, which `rounded` is or rounds
    initial, bias_hn  [B, H], [H]   h_0, in the dtype of `product`; b_hn
    d_cell            [B, H]        what of the gradient of h_t comes from h_{t+1} directly
    """

    kernel: ClassVar[str | None] = "gru"

    def __init__(self, of: Tensors):
        hidden = of["output"].shape[-1]
        self.r_z = of["gates"][..., : 2 * hidden].unbind(0)
        self.r, self.z, self.n = (gate.unbind(0) for gate in of["gates"].chunk(3, -1))
        self.u, self.h, self.bias = of["recurrent"].unbind(0), of["output"].unbind(0), of["bias_hn"]
        self.h_previous = (of["initial"], *self.h[:-1])
        self.gates, self.inputs, self.product = of["gates"].unbind(0), of.get("inputs"), of["product"]
        if "d_gates" in of:
            self.ds_r_z = of["d_gates"][..., : 2 * hidden].unbind(0)
            self.ds_r, self.ds_z, self.ds_n = (gate.unbind(0) for gate in of["d_gates"].chunk(3, -1))
            self.d_r_z, self.du = (d.unbind(0) for d in of["d_recurrent"].split([2 * hidden, hidden], -1))
            self.d_recurrent, self.rounded = of["d_recurrent"].unbind(0), of["rounded"].unbind(0)
            self.d_output, self.dh = of["d_output"].unbind(0), of["d_cell"]
        else:
            self.product_r_z, self.product_u = self.product.split([2 * hidden, hidden], -1)

    def advance(self, t: int) -> None:
        if self.inputs is not None:
            self.gates[t].copy_(self.inputs[t])
        self.r_z[t].add_(self.product_r_z).sigmoid_()
        torch.add(self.product_u, self.bias, out=self.u[t])
        n = self.n[t].addcmul_(self.r[t], self.u[t]).tanh_()
        torch.addcmul(n, self.z[t], self.h_previous[t] - n, out=self.h[t])

    def retreat(self, t: int) -> None:
        r, z, n, ds_r, ds_z, ds_n = (each[t] for each in (self.r, self.z, self.n, self.ds_r, self.ds_z, self.ds_n))
        dh = self.dh.add_(self.d_output[t]).add_(self.product)
        aten.sigmoid_backward((self.h_previous[t] - n).mul_(dh), z, grad_input=ds_z)
        aten.tanh_backward(torch.addcmul(dh, dh, z, value=-1), n, grad_input=ds_n)
        aten.sigmoid_backward(ds_n * self.u[t], r, grad_input=ds_r)
        self.d_r_z[t].copy_(self.ds_r_z[t])
        torch.mul(ds_n, r, out=self.du[t])
        if self.rounded[t].dtype != dh.dtype:
            self.rounded[t].copy_(self.d_recurrent[t])
        dh.mul_(z)


class _Recurrence(torch.autograd.Function):
    """`(inputs [T, B, 3H], W_hh, b_hn, h_0, …, *probes) → h [T, B, H]`, with inputs_t = W_ih x_t + b_ih and, of r and
    z, b_hh.

    The probes are zero and collect the gradients of the pre-activations of r and z `[T, B, 2H]`, of s_n and of u
    `[T, B, H]`. Products are in the dtype of `W_hh` and `h_0`, everything else in that of `b_hn`. The memory of
    `inputs` is taken over: the caller must have no further use for its values. The gradients of `W_hh` and `b_hn` go
    through `postponed`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight_hh: Tensor,
        bias_hn: Tensor,
        h0: Tensor,
        postponed: Postponed,
        parameter_probe: Tensor,
        *probes: Tensor,
    ) -> Tensor:
        of = gates_and_output(inputs, h0)
        of |= {"recurrent": torch.empty_like(of["output"], dtype=bias_hn.dtype)}
        of |= {"initial": h0.contiguous(), "bias_hn": bias_hn}
        run_forward(_TorchSteps, of, weight_hh, h0)
        ctx.save_for_backward(weight_hh, *of.values())
        ctx.names, ctx.postponed, ctx.dtype = tuple(of), postponed, inputs.dtype
        return cast(Tensor, of["output"])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        weight_hh, *saved = ctx.saved_tensors
        of = dict(zip(ctx.names, saved, strict=True))
        of["output"] = of["output"].detach()  # else it would hold on to its own graph
        h0, d_gates, d_recurrent = of["initial"], torch.empty_like(of["gates"]), torch.empty_like(of["gates"])
        rounded, d_cell = rounded_like(d_recurrent, h0.dtype), torch.zeros_like(h0, dtype=d_gates.dtype)
        of |= {"d_output": d_output.contiguous(), "d_gates": d_gates, "d_recurrent": d_recurrent}
        of |= {"d_cell": d_cell, "rounded": rounded}
        dh0 = run_backward(_TorchSteps, of, weight_hh, h0) + d_cell
        ds_r_z, ds_n = d_gates.split([2 * h0.shape[-1], h0.shape[-1]], -1)
        du, output = d_recurrent[..., -h0.shape[-1] :], of["output"]
        ctx.postponed.compute = lambda: (recurrent_weight_gradient(rounded, h0, output), du.sum((0, 1)))
        d_inputs = d_gates.to(ctx.dtype)
        return d_inputs, None, None, dh0.to(h0.dtype), None, h0.new_zeros(()), ds_r_z, ds_n, du


class GRU(Capturable, nn.GRU):
    """`torch.nn.GRU` with the same arguments, `state_dict` and results, whose maps can be captured.

    Layer k has three linear maps, each of some rows of the layer's parameters, and three more, lk_reverse and so on, if
    it is bidirectional:

        lk       rows r and z of [W_ih | W_hh]    a_t = [x_t; h_{t−1}], split into r and z, which share it
        lk.ih    row block n of W_ih and b_ih     a_t = x_t, g_t of s_n
        lk.hh    row block n of W_hh and b_hh     a_t = h_{t−1}, g_t of u, r_t times that of s_n

    Their blocks are taken as independent of each other, as those of different layers are. Unbatched input works as in
    torch but cannot be captured: ValueError. A captured pass has no second derivatives.
    """

    @never_compiled
    def forward(self, input: Any, hx: Tensor | None = None) -> tuple[Any, Tensor]:
        if self.tape is None:
            return super().forward(input, hx)
        maps = cast(tuple[LinearMap, ...], self.maps())
        layers = [partial(_captured_layer, maps[first : first + 3], self.tape) for first in range(0, len(maps), 3)]
        output, (h_n,) = run_captured(self, layers, input, hx, states=1)
        return output, h_n

    def _build_maps(self) -> tuple[LinearMap, ...]:
        layers = zip(names_of_layers(self), self.all_weights, strict=True)
        return tuple(map for name, parameters in layers for map in maps_of(name, *parameters))


def maps_of(name: str, weight_ih: Tensor, weight_hh: Tensor, *biases: Tensor) -> tuple[LinearMap, ...]:
    """The three maps of a layer, or of a cell."""
    hidden = weight_hh.shape[1]
    r_and_z, n = slice(2 * hidden), slice(2 * hidden, 3 * hidden)
    return (
        LinearMap(name, (weight_ih, weight_hh), biases, {"r": hidden, "z": hidden}, r_and_z),
        LinearMap(f"{name}.ih", (weight_ih,), biases[:1], {"n": hidden}, n),
        LinearMap(f"{name}.hh", (weight_hh,), biases[1:], {"n": hidden}, n),
    )


def _captured_layer(maps: tuple[LinearMap, ...], tape: Tape, order: Order, x: Tensor, h0: Tensor) -> tuple[Tensor]:
    gates, *_, from_h = maps
    weight_ih, weight_hh = gates.weights
    projected = linear(x, weight_ih, _bias_of_inputs(gates))
    state = torch.promote_types(projected.dtype, torch.float32)
    probes = [zero_leaf(projected[..., map.rows], state) for map in maps]
    dtype = torch.promote_types(h0.dtype, projected.dtype)  # torch's under autocast, unlike that of an LSTM
    h0, postponed = h0.to(projected.dtype), Postponed()
    bias_hn = h0.new_zeros(h0.shape[-1]) if not gates.biases else gates.biases[1][from_h.rows]
    output = cast(
        Tensor,
        _Recurrence.apply(
            order(projected),
            weight_hh.detach().to(h0.dtype),
            bias_hn.detach().to(state),
            h0,
            postponed,
            postponed.probe(weight_hh, bias_hn),
            *(order(probe) for probe in probes),
        ),
    )
    with torch.no_grad():
        before = order(previous_hidden(h0, output))
        for map, a, probe in zip(maps, (torch.cat([x, before], -1), x, before), probes, strict=True):
            tape.record(map, a, probe, lengths=order.packed)
    return (order(output).to(dtype),)


def _bias_of_inputs(gates: LinearMap) -> Tensor | None:
    """b_ih and, of r and z, b_hh."""
    if not gates.biases:
        return None
    bias_ih, bias_hh = gates.biases
    return torch.cat([bias_ih[gates.rows] + bias_hh[gates.rows], bias_ih[gates.rows.stop :]])
