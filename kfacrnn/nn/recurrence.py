"""What the recurrent layers share: steps in torch operations or compiled, the two loops over them, gradients on demand.

A recurrence runs one GEMM per step and, between two of them, the point-wise part, which exists twice: `TorchSteps` and
`kfacrnn.nn.pointwise.CompiledSteps`. Knows nothing of maps, tapes or Fisher blocks.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.backends import mkldnn

from kfacrnn.kfac import aligned
from kfacrnn.kfac.precision import has_half_precision_kernels
from kfacrnn.nn import pointwise

aten = torch.ops.aten

Function = TypeVar("Function", bound=Callable[..., Any])
State = tuple[Tensor, Tensor]
Tensors = dict[str, Any]  # by the names in `Steps`


def never_compiled(function: Function) -> Function:
    """`torch.compiler.disable`, but without the two seconds of importing Dynamo where nothing is compiled."""
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not disabled and "torch._dynamo" in sys.modules:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs) if disabled else function(*args, **kwargs)

    return cast(Function, call)


def gate_splits(hidden_size: int) -> dict[str, int]:
    """Rows of each gate, in torch's order."""
    return dict.fromkeys("ifgo", hidden_size)


def kernels_for(weight: Tensor) -> AbstractContextManager[Any]:
    """Where torch's LSTM would take oneDNN's kernels and oneDNN has none for the processor: those of torch itself."""
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    if has_half_precision_kernels(dtype, weight.device):
        return nullcontext()
    return mkldnn.flags(enabled=False, deterministic=None, allow_tf32=None, fp32_precision=None)


def at_least_float32(x: Tensor) -> Tensor:
    """Under bf16 or fp16 autocast only the products are in that precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def zero_leaf(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros that take up no memory and collect a gradient."""
    return like.new_zeros((), dtype=dtype).expand(like.shape).requires_grad_()


def previous_hidden(h0: Tensor, output: Tensor) -> Tensor:
    """h_0 … h_{T−1}: `[T, B, hidden]`."""
    return torch.cat([h0.unsqueeze(0), output[:-1]])


def recurrent_weight_gradient(ds: Tensor, h0: Tensor, output: Tensor) -> Tensor:
    """Σ_t ds_tᵀ h_{t−1}, summed over cases: `[gates·hidden, hidden]`."""
    with torch.autocast(ds.device.type, enabled=False):  # a backward pass may run inside autocast
        later = aligned.product(ds[1:].flatten(0, 1).mT, output[:-1].flatten(0, 1))
        return later.addmm_(ds[0].mT, h0)


class Postponed:
    """Gradients of parameters that a recurrence takes detached. `compute`, set by the recurrence's backward, is called
    only if autograd is asked for them: a statistics pass does not."""

    compute: Callable[[], tuple[Tensor | None, ...]]

    def probe(self, *parameters: Tensor | None) -> Tensor:
        """Zero, to be an input of the recurrence that leads from it to `parameters`."""
        return cast(Tensor, _Postpone.apply(self, *parameters))


class _Postpone(torch.autograd.Function):
    """`(postponed, *parameters) → 0`. The gradient that the probe is given is zero and says no more than that it is
    time to `compute`."""

    @staticmethod
    def forward(ctx: Any, postponed: Postponed, *parameters: Tensor | None) -> Tensor:
        ctx.postponed = postponed
        return cast(Tensor, parameters[0]).new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.postponed.compute()
        del ctx.postponed.compute  # and with it the memory
        return None, *gradients


class Steps(Protocol):
    """The point-wise part of a recurrence, on tensors that are known by these names, if it is an LSTM's:

    product           [B, 4H] forward, [B, H] backward     what step t gets from its neighbour through W_hh
    inputs            [T, B, 4H]       what step t gets from x_t; None if `gates` hold it
    gates, d_gates    [T, B, 4H]       gates, before and after their non-linearities; g_t
    cells             [T + 1, B, H]    c_0 … c_T
    squashed          [T, B, H]        tanh(c_t)
    output, d_output  [T, B, H]        h_1 … h_T, in the dtype of `product`; their gradients but for `product`
    d_cell            [B, H]           gradient of the newest c_t
    rounded           [T, B, 4H]       g_t in the dtype of `product`, which may be `d_gates` itself
    """

    def advance(self, t: int) -> None:
        """From inputs[t], product and cells[t] to gates[t], cells[t + 1], squashed[t] and output[t]."""

    def retreat(self, t: int) -> None:
        """From these, d_output[t], product and d_cell to d_gates[t], rounded[t] and the d_cell of step t − 1."""


class StepsInTorch(Steps, Protocol):
    """`kernel` names the functions of pointwise.c that do the same, if there are any."""

    kernel: ClassVar[str | None]

    def __init__(self, of: Tensors): ...


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


class TorchSteps:
    """`Steps` in torch operations, of any dtype and on any device."""

    kernel: ClassVar[str | None] = "lstm"

    def __init__(self, of: Tensors):
        self.gates, self.product = Gates(of["gates"]), of["product"]
        self.inputs: Any = of.get("inputs")
        self.dc: Any = of.get("d_cell")
        self.c, self.y, self.h = (of[name].unbind(0) for name in ("cells", "squashed", "output"))
        if self.dc is not None:
            self.ds, self.dh = Gates(of["d_gates"]), of["d_output"].to(self.dc.dtype).unbind(0)
            self.rounded = of["rounded"].unbind(0)

    def advance(self, t: int) -> None:
        if self.inputs is not None:
            self.gates.all[t].copy_(self.inputs[t])
        self.gates.all[t].add_(self.product)
        self.gates.advance(t, self.c[t], self.c[t + 1])
        torch.tanh(self.c[t + 1], out=self.y[t])
        torch.mul(self.gates.o[t], self.y[t], out=self.h[t])

    def retreat(self, t: int) -> None:
        dh = self.dh[t] + self.product
        self.dc.add_(aten.tanh_backward(dh * self.gates.o[t], self.y[t]))
        self.gates.retreat(t, self.c[t], self.y[t], self.dc, dh, self.ds)
        if self.rounded[t].dtype != dh.dtype:
            self.rounded[t].copy_(self.ds.all[t])


def run_forward(in_torch: type[StepsInTorch], of: Tensors, weight_hh: Tensor, h0: Tensor) -> None:
    """All steps; `of` holds all that goes forward but `product`, and is left with what the backward needs."""
    product = h0.new_empty(h0.shape[0], len(weight_hh))
    steps, weight = _steps(in_torch, {**of, "product": product}), weight_hh.t().contiguous()
    for t, h in enumerate((h0, *of["output"].unbind(0)[:-1])):
        torch.mm(h, weight, out=product)
        steps.advance(t)
    of.pop("inputs", None)


def run_backward(
    in_torch: type[StepsInTorch], of: Tensors, weight_hh: Tensor, h0: Tensor, lengths: Tensor | None = None
) -> Tensor:
    """All steps in reverse; `of` holds all but `product`. Returns what reaches h_0 through W_hh of its gradient. With
    `lengths`, the d_cell that is given is that of every sequence's own last step."""
    product = torch.zeros_like(h0, memory_format=torch.contiguous_format)
    steps = _steps(in_torch, {**of, "product": product})
    if lengths is not None:
        d_last = of["d_cell"].clone()
        of["d_cell"].zero_()
    for t, ds in reversed([*enumerate(of["rounded"].unbind(0))]):
        if lengths is not None:
            of["d_cell"].addcmul_(d_last, (lengths == t + 1).unsqueeze(1))
        steps.retreat(t)
        torch.mm(ds, weight_hh, out=product)
    return product


def _steps(in_torch: type[StepsInTorch], of: Tensors) -> Steps:
    kernel, gates = in_torch.kernel, of["gates"]
    if kernel is None or (library := pointwise.kernel_for(gates.dtype, of["product"].dtype, gates.device)) is None:
        return in_torch(of)
    return pointwise.CompiledSteps(library, of, kernel)


def gates_and_output(inputs: Tensor, h0: Tensor) -> Tensors:
    """What every recurrence fills on its way; `gates` take the memory of `inputs` if those are float32 or float64."""
    inputs = inputs.detach().contiguous()
    gates = rounded_like(inputs, torch.promote_types(inputs.dtype, torch.float32))
    of = {"gates": gates, "output": h0.new_empty(*gates.shape[:2], h0.shape[-1])}
    return of if gates is inputs else {"inputs": inputs, **of}


def forward_tensors(inputs: Tensor, h0: Tensor, c0: Tensor) -> Tensors:
    """`gates_and_output`, and what an LSTM fills besides."""
    of = gates_and_output(inputs, h0)
    steps, cases, hidden = of["output"].shape
    cells, squashed = (of["gates"].new_empty(length, cases, hidden) for length in (steps + 1, steps))
    cells[0] = c0
    return {**of, "cells": cells, "squashed": squashed}


def rounded_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` itself, or room for it in `dtype`."""
    return x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)


def at_lengths(x: Tensor, lengths: Tensor | None) -> Tensor:
    """`x[lengths − 1]` of every sequence, a copy."""
    return x[-1].clone() if lengths is None else x[lengths - 1, torch.arange(len(lengths), device=x.device)]
