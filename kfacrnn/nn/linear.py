"""`torch.nn.Linear` whose large gradients are computed at the processor's rate, as `kfacrnn.kfac.aligned` says."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kfacrnn.kfac.aligned import is_worth_it, product
from kfacrnn.nn.recurrence import Postponed


class _Linear(torch.autograd.Function):
    """`(x [..., in], W [out, in], b, …) → x Wᵀ + b`. The gradients of W and b go through `postponed` and its probe."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, postponed: Postponed, _: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.postponed, ctx.has_bias = postponed, bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ds: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        has_bias, (out, width) = ctx.has_bias, weight.shape
        ds = ds.reshape(-1, out)
        ctx.postponed.compute = lambda: (product(ds.mT, x.reshape(-1, width)), ds.sum(0) if has_bias else None)
        dx = product(ds, weight).view_as(x) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, ds.new_zeros(())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, without second derivatives where its gradients are large and unaligned."""
    is_torchs = torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling()
    if is_torchs or not any(is_worth_it(of, of.shape) for of in (x, weight)):
        return F.linear(x, weight, bias)
    postponed = Postponed()
    probe = postponed.probe(weight, bias)
    return cast(Tensor, _Linear.apply(x, weight.detach(), None if bias is None else bias.detach(), postponed, probe))


class Linear(nn.Linear):
    """`torch.nn.Linear` with the same arguments, `state_dict` and results; on a CPU its backward pass takes three
    quarters of the time for, say, 650 inputs and 10,000 outputs. It then has no second derivatives and does not go
    through `torch.func`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
