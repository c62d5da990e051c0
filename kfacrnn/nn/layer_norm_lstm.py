"""LSTM with layer normalisation inside the cell (Ba, Kiros & Hinton 2016, eqns 20–22), with hand-written backward.

    gates = LN(W_ih x_t; gain_ih) + LN(W_hh h_{t−1}; gain_hh) + bias        in the order i, f, g, o
    c_t = σ(f) c_{t−1} + σ(i) tanh(g)     h_t = σ(o) tanh(LN(c_t; gain_c, bias_c))

LN(z; gain, shift) = gain ⊙ (z − mean) / √(variance + ε) + shift over the whole vector. The paper gives each of the two
gate terms a shift of its own; only their sum matters, so one is kept. What depends on x_t alone is done for all steps
at once, outside the loop. Knows nothing of Fisher blocks.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from kfacrnn.kfac.capture import ElementwiseMap, LinearMap, Map
from kfacrnn.nn.capturable import Capturable
from kfacrnn.nn.linear import linear
from kfacrnn.nn.recurrence import (
    Postponed,
    State,
    Tensors,
    TorchSteps,
    at_least_float32,
    forward_tensors,
    gate_splits,
    never_compiled,
    previous_hidden,
    recurrent_weight_gradient,
    rounded_like,
    run_backward,
    run_forward,
    zero_leaf,
)
from kfacrnn.nn.stack import run_stack

aten = torch.ops.aten

EPSILON = 1e-5  # torch.nn.LayerNorm's
NAMES = ("weight_ih", "weight_hh", "gain_ih", "gain_hh", "gain_c", "bias", "bias_c")


class _TorchSteps(TorchSteps):
    """`Steps` with the norms of W_hh h_{t−1} and c_t inside; the names of what they need besides:

    recurrent, d_recurrent    [T, B, 4H]    W_hh h_{t−1}; its gradient, which is `rounded` instead of `d_gates`
    norms                     [4, T, B]     mean and 1/√(variance + ε) of W_hh h_{t−1}, then those of c_t
    gain_hh, gain_c, bias_c   [4H], [H], [H] or None
    squashed, d_normed        [T, B, H]     tanh(LN(c_t)); gradient of LN(c_t)
    """

    def __init__(self, of: Tensors):
        super().__init__(of)
        self.r = of["recurrent"].unbind(0)
        self.mean_r, self.scale_r, self.mean_c, self.scale_c = (norm.unsqueeze(-1).unbind(0) for norm in of["norms"])
        self.gain_hh, self.gain_c, self.bias_c = (of[name] for name in ("gain_hh", "gain_c", "bias_c"))
        if self.dc is not None:
            self.dr, self.dn = of["d_recurrent"].unbind(0), of["d_normed"].unbind(0)

    def advance(self, t: int) -> None:
        r, c = self.r[t].copy_(self.product), self.c[t + 1]
        normed = _norm_forward(r, self.gain_hh, None, self.mean_r[t], self.scale_r[t])
        self.gates.all[t].add_(normed)
        self.gates.advance(t, self.c[t], c)
        normed = _norm_forward(c, self.gain_c, self.bias_c, self.mean_c[t], self.scale_c[t])
        torch.tanh(normed, out=self.y[t])
        torch.mul(self.gates.o[t], self.y[t], out=self.h[t])

    def retreat(self, t: int) -> None:
        dc, dh, dn, only_input = self.dc, self.dh[t] + self.product, self.dn[t], [True, False, False]
        aten.tanh_backward(dh * self.gates.o[t], self.y[t], grad_input=dn)
        of_c = self.c[t + 1], self.mean_c[t], self.scale_c[t], self.gain_c, self.bias_c
        dc.add_(_norm_backward(dn, *of_c, only_input)[0])
        self.gates.retreat(t, self.c[t], self.y[t], dc, dh, self.ds)
        of_r = self.r[t], self.mean_r[t], self.scale_r[t], self.gain_hh, None
        self.dr[t].copy_(_norm_backward(self.ds.all[t], *of_r, only_input)[0])
        if self.rounded[t].dtype != dh.dtype:
            self.rounded[t].copy_(self.dr[t])


class _Recurrence(torch.autograd.Function):
    """`(inputs, W_hh, gain_hh, gain_c, bias_c or None, h_0, c_0, …, *probes) → (h [T, B, H], c_T, r, c)`.

    `inputs` `[T, B, 4H]` is LN(W_ih x_t) + bias, r_t is W_hh h_{t−1} `[T, B, 4H]`, c holds c_0 … c_T; r and c carry no
    gradient. The probes are zero and collect the gradients of the gates' pre-activations, of r_t and of LN(c_t).
    Products are in the dtype of `W_hh` and `h_0`, everything else in that of `inputs`, whose memory is taken over: the
    caller must have no further use for its values. The gradients of `W_hh`, gains and shift go through `postponed`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight_hh: Tensor,
        gain_hh: Tensor,
        gain_c: Tensor,
        bias_c: Tensor | None,
        h0: Tensor,
        c0: Tensor,
        postponed: Postponed,
        parameter_probe: Tensor,
        *probes: Tensor,
    ) -> tuple[Tensor, ...]:
        of = forward_tensors(inputs, h0, c0)
        of |= {"recurrent": torch.empty_like(of["gates"]), "norms": of["gates"].new_empty(4, *inputs.shape[:2])}
        of |= {"gain_hh": gain_hh, "gain_c": gain_c, "bias_c": bias_c}
        run_forward(_TorchSteps, of, weight_hh, h0)
        ctx.save_for_backward(weight_hh, h0, *of.values())
        ctx.names, ctx.postponed = tuple(of), postponed
        ctx.mark_non_differentiable(of["recurrent"], of["cells"])
        ctx.set_materialize_grads(False)  # else zeros for r and c
        return of["output"], of["cells"][-1].clone(), of["recurrent"], of["cells"]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor | None, d_cell: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        weight_hh, h0, *saved = ctx.saved_tensors
        of = dict(zip(ctx.names, saved, strict=True))
        for name, other in (("d_gates", "gates"), ("d_recurrent", "recurrent"), ("d_normed", "squashed")):
            of[name] = torch.empty_like(of[other])
        zeros, c0 = torch.zeros_like, of["cells"][0]
        of["d_output"] = zeros(of["output"]) if d_output is None else d_output.contiguous()
        of["d_cell"] = zeros(c0) if d_cell is None else d_cell.clone(memory_format=torch.contiguous_format)
        of["rounded"] = rounded_like(of["d_recurrent"], h0.dtype)
        dh0 = run_backward(_TorchSteps, of, weight_hh, h0)
        of["output"] = of["output"].detach()  # else it would hold on to its own graph
        ctx.postponed.compute = partial(_parameter_gradients, of, h0)
        probes = of["d_gates"], of["d_recurrent"], of["d_normed"]
        return of["d_gates"], None, None, None, None, dh0, of["d_cell"], None, h0.new_zeros(()), *probes


def _parameter_gradients(of: Tensors, h0: Tensor) -> tuple[Tensor | None, ...]:
    """Of W_hh, gain_hh, gain_c and bias_c."""
    mean_r, scale_r, mean_c, scale_c = of["norms"].unsqueeze(-1)
    gain_hh, gain_c, bias_c = of["gain_hh"], of["gain_c"], of["bias_c"]
    only_gain, gain_and_shift = [False, True, False], [False, True, bias_c is not None]
    d_gain_hh = _norm_backward(of["d_gates"], of["recurrent"], mean_r, scale_r, gain_hh, None, only_gain)[1]
    d_gain_c, d_bias_c = _norm_backward(
        of["d_normed"], of["cells"][1:], mean_c, scale_c, gain_c, bias_c, gain_and_shift
    )[1:]
    return recurrent_weight_gradient(of["rounded"], h0, of["output"]), d_gain_hh, d_gain_c, d_bias_c


def _norm_forward(z: Tensor, gain: Tensor, shift: Tensor | None, mean: Tensor, scale: Tensor) -> Tensor:
    """LN(z), and into `mean` and `scale` what its backward needs."""
    normed, *found = torch.native_layer_norm(z, gain.shape, gain, shift, EPSILON)
    mean.copy_(found[0])
    scale.copy_(found[1])
    return normed


def _norm_backward(
    d: Tensor, z: Tensor, mean: Tensor, scale: Tensor, gain: Tensor, shift: Tensor | None, which: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of z, gain and shift, those of them that are wanted."""
    return aten.native_layer_norm_backward(d, z, gain.shape, mean, scale, gain, shift, which)


class LayerNormLSTM(Capturable):
    """LSTM with layer normalisation inside the cell, called as `torch.nn.LSTM` and returning what it returns.

    Layer k has `weight_ih_lk`, `weight_hh_lk`, `gain_ih_lk`, `gain_hh_lk`, `gain_c_lk` and, with `bias`, the shifts
    `bias_lk` and `bias_c_lk`. Weights start uniform in ±1/√hidden_size, gains at one, shifts at zero.

    W_ih and W_hh have different pre-activation gradients, because each has its norm. So the maps of layer k are the
    linear `lk.ih`, `lk.hh` and the elementwise `lk.norm_ih`, `lk.norm_hh`, `lk.norm_c`, `lk.bias`. PackedSequence and
    unbatched input are refused with ValueError. No second derivatives.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if min(input_size, hidden_size, num_layers) < 1:
            raise ValueError("input_size, hidden_size and num_layers must be at least 1")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout={dropout} must be a probability")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = dropout
        gates = 4 * hidden_size
        for layer in range(num_layers):
            weight_ih, weight_hh = (gates, hidden_size if layer else input_size), (gates, hidden_size)
            shifts = ((gates,), (hidden_size,)) if bias else (None, None)
            shapes = (weight_ih, weight_hh, (gates,), (gates,), (hidden_size,), *shifts)
            for name, shape in zip(NAMES, shapes, strict=True):
                parameter = None if shape is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                self.register_parameter(f"{name}_l{layer}", parameter)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.hidden_size)
        for name, parameter in self.named_parameters():
            if name.startswith("weight"):
                parameter.uniform_(-bound, bound)
            else:
                parameter.fill_(name.startswith("gain"))

    def extra_repr(self) -> str:
        options = ("num_layers", "bias", "batch_first", "dropout")
        return ", ".join([f"{self.input_size}, {self.hidden_size}", *(f"{o}={getattr(self, o)}" for o in options)])

    @never_compiled
    def forward(self, input: Tensor, hx: State | None = None) -> tuple[Tensor, State]:
        """`input` is `[T, B, input_size]`, or `[B, T, input_size]` with `batch_first`; `hx` = (h_0, c_0), each
        `[layers, B, hidden_size]`, zero by default. Returns the last layer's h and (h_T, c_T) of all layers."""
        self._check(input, hx)
        x = input.transpose(0, 1) if self.batch_first else input
        if hx is None:
            zeros = x.new_zeros(self.num_layers, x.shape[1], self.hidden_size)
            hx = (zeros, zeros)
        layers = [partial(self._layer, layer) for layer in range(self.num_layers)]
        output, state = run_stack(layers, x, hx, self.dropout if self.training else 0.0)
        return output.transpose(0, 1) if self.batch_first else output, cast(State, state)

    def _check(self, input: Tensor, hx: State | None) -> None:
        if isinstance(input, PackedSequence):
            raise ValueError(
                "kfacrnn.nn.LayerNormLSTM takes no PackedSequence: pass the padded batch [T, B, input_size]"
            )
        axes = "[B, T, input_size]" if self.batch_first else "[T, B, input_size]"
        if input.dim() != 3 or input.shape[-1] != self.input_size:
            raise ValueError(
                f"kfacrnn.nn.LayerNormLSTM needs {axes} with input_size={self.input_size}, got {list(input.shape)}"
            )
        shape = (self.num_layers, input.shape[0 if self.batch_first else 1], self.hidden_size)
        for name, state in zip(("h_0", "c_0"), hx or (), strict=False):
            if state.shape != shape:
                raise ValueError(f"{name} must be [layers, B, hidden_size] = {list(shape)}, got {list(state.shape)}")

    def _parameters_of(self, layer: int) -> list[Any]:
        return [getattr(self, f"{name}_l{layer}") for name in NAMES]

    def _layer(self, layer: int, x: Tensor, h0: Tensor, c0: Tensor) -> State:
        weight_ih, weight_hh, *vectors = self._parameters_of(layer)
        projected = linear(x, weight_ih)
        dtype, z = projected.dtype, at_least_float32(projected)
        vectors = [None if vector is None else vector.to(z.dtype) for vector in vectors]
        gain_ih, gain_hh, gain_c, bias, bias_c = vectors
        recording = self.tape is not None
        if recording and not z.requires_grad:  # neither weight_ih nor x does
            z.requires_grad_()
        probes = [zero_leaf(like).requires_grad_(recording) for like in (z, z, z[..., : self.hidden_size])]
        inputs = F.layer_norm(z, z.shape[-1:], gain_ih, bias, EPSILON)
        postponed, inside = Postponed(), (gain_hh, gain_c, bias_c)
        detached = [None if parameter is None else parameter.detach() for parameter in inside]
        output, c, r, cells = _Recurrence.apply(
            inputs,
            weight_hh.detach().to(dtype),
            *detached,
            h0.to(dtype),
            c0.to(z.dtype),
            postponed,
            postponed.probe(weight_hh, *inside),
            *probes,
        )
        if recording:
            with torch.no_grad():
                s, s_r, s_c = probes
                normed = _normalise(z)
                taps = {
                    "ih": (x, z),
                    "hh": (previous_hidden(h0, output), s_r),
                    "norm_ih": (normed, s),
                    "norm_hh": (_normalise(r), s),
                    "norm_c": (_normalise(cells[1:]), s_c),
                    "bias": (normed * gain_ih, s),
                }
            self._record(layer, taps)
        return output, c

    def _record(self, layer: int, taps: dict[str, tuple[Tensor, Tensor]]) -> None:
        assert self.tape is not None
        for map in self.maps():
            of_layer, _, name = map.name.partition(".")
            if of_layer == f"l{layer}":
                self.tape.record(map, *taps[name])

    def _build_maps(self) -> tuple[Map, ...]:
        maps: list[Map] = []
        for layer in range(self.num_layers):
            weight_ih, weight_hh, gain_ih, gain_hh, gain_c, bias, bias_c = self._parameters_of(layer)
            splits = gate_splits(self.hidden_size)
            maps += [
                LinearMap(f"l{layer}.ih", (weight_ih,), (), splits),
                LinearMap(f"l{layer}.hh", (weight_hh,), (), splits),
                ElementwiseMap(f"l{layer}.norm_ih", gain_ih),
                ElementwiseMap(f"l{layer}.norm_hh", gain_hh),
                ElementwiseMap(f"l{layer}.norm_c", gain_c, bias_c),
            ]
            if bias is not None:
                maps.append(ElementwiseMap(f"l{layer}.bias", None, bias))
        return tuple(maps)


def _normalise(z: Tensor) -> Tensor:
    return F.layer_norm(z, z.shape[-1:], eps=EPSILON)
