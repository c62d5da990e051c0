"""Predictive distributions: what a model says about its targets, with the mask and the lengths that go with it.

The Fisher is the covariance of the log-loss gradient under the model's *own* predictions (section 2.2), so K-FAC needs
to sample targets and to score them. Leading axes are `[T, B]`, time first; a model that is `batch_first` says so, and
its logits and mask are then given as `[B, T]` and kept as `[T, B]`.

    mask     [T, B] bool, True where a target is predicted (default: everywhere)
    lengths  [B] int, time-steps of each sequence; what lies behind is padding (default: T for all)

The two differ: a step inside a sequence that is not predicted still exists for the recurrent maps, padding does not. A
model with one prediction for a sequence gives its logits T times, as by `expand`, and a mask that is True at one step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Part:
    """Of `cases` sequences that several processes hold together, those that are here: `first`, `first + step`, …"""

    cases: int
    first: int
    step: int


class Distribution(Protocol):
    """`logits` are what the model gives, whatever the distribution calls it."""

    logits: Tensor
    mask: Tensor | None
    lengths: Tensor | None
    batch_first: bool

    def sample(self, generator: torch.Generator | None = None, part: Part | None = None) -> Tensor:
        """Targets drawn from the distribution, as `log_loss` takes them: `[T, B]` of classes, else `[T, B, outputs]`.
        `part` says where these sequences lie among those of all processes: the random numbers of all are drawn
        everywhere and each process uses its own, so that a sequence's do not depend on who holds it."""

    def log_loss(self, targets: Tensor) -> Tensor:
        """Negative log-likelihood in nats, summed over steps (and over independent outputs): `[B]`. Raises ValueError
        for targets of another shape."""

    def output_variance(self) -> Tensor:
        """E[g²] of the gradient g with respect to the logits, exactly, zero where masked: `[T, B, out]`."""

    def fisher_product(self, u: Tensor, v: Tensor) -> Tensor:
        """E[(gᵀu)(gᵀv)] of the same g, exactly, for changes of the logits u and v `[T, B, out]`: the product with the
        logits' own Fisher, summed over a sequence's steps, `[B]`."""


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _random(
    draw: Callable[..., Tensor],
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator | None,
    part: Part | None,
) -> Tensor:
    """`[T, B, …]` as `torch.rand` or `torch.randn` draw them."""
    if part is None:
        return draw(shape, dtype=dtype, device=device, generator=generator)
    steps, _, *rest = shape
    everyones = draw((steps, part.cases, *rest), dtype=dtype, device=device, generator=generator)
    return everyones[:, part.first :: part.step].contiguous()


class _Predictive:
    _what = "logits"

    def __init__(
        self,
        logits: Tensor,
        mask: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        batch_first: bool = False,
    ):
        if logits.dim() != 3:
            raise ValueError(f"{self._what} must be [T, B, outputs], got {list(logits.shape)}")
        if not logits.numel():
            raise ValueError(f"{self._what} must have at least one step, sequence and output, got {list(logits.shape)}")
        if batch_first:
            logits = logits.transpose(0, 1)
            mask = mask if mask is None else mask.transpose(0, 1)
        steps, cases = logits.shape[:2]
        if mask is not None and (mask.shape != (steps, cases) or mask.dtype != torch.bool):
            raise ValueError(f"mask must be bool [T, B] = [{steps}, {cases}], got {mask.dtype} {list(mask.shape)}")
        if lengths is not None:
            lengths = torch.as_tensor(lengths)
            if lengths.shape != (cases,) or lengths.is_floating_point():
                raise ValueError(f"lengths must be integers [B] = [{cases}], got {lengths.dtype} {list(lengths.shape)}")
            if not ((lengths >= 1) & (lengths <= steps)).all():
                raise ValueError(f"lengths must lie between 1 and T = {steps}, got {lengths.tolist()}")
            inside = torch.arange(steps, device=logits.device)[:, None] < lengths.to(logits.device)
            mask = inside if mask is None else mask & inside
        self.logits = logits
        self.mask = mask
        self.lengths = lengths
        self.batch_first = batch_first

    def _checked(self, targets: Tensor, shape: torch.Size) -> Tensor:
        """The targets, with zeros where nothing is predicted: there they may hold any value, one that is no class
        included."""
        if targets.shape != shape:
            beside = f"{self._what} {list(self.logits.shape)}"
            raise ValueError(f"targets must be {list(shape)} beside {beside}, got {list(targets.shape)}")
        return self._masked(targets)

    def _masked(self, values: Tensor) -> Tensor:
        if self.mask is None:
            return values
        mask = self.mask.reshape(self.mask.shape + (1,) * (values.dim() - 2))
        return values.masked_fill(~mask, 0)


class Categorical(_Predictive):
    """One of `V` classes at every step: `logits` `[T, B, V]`, targets `[T, B]`.

    `mask` bool `[T, B]`, `lengths` integers `[B]`, as this module says; with `batch_first` logits and mask are `[B, T]`
    first. Raises ValueError for other shapes, and where there is nothing to predict.
    """

    @cached_property
    def _probabilities(self) -> Tensor:
        return _at_least_float32(self.logits.detach()).softmax(-1)

    @torch.no_grad()
    def sample(self, generator: torch.Generator | None = None, part: Part | None = None) -> Tensor:
        # By the inverse of the distribution function: one random number a step, where Gumbel-max takes V.
        cumulated = self._probabilities.cumsum(-1)
        u = _random(torch.rand, (*cumulated.shape[:-1], 1), cumulated.dtype, cumulated.device, generator, part)
        chosen = torch.searchsorted(cumulated, u * cumulated[..., -1:], right=True)
        return chosen.clamp_(max=cumulated.shape[-1] - 1).squeeze(-1)

    def log_loss(self, targets: Tensor) -> Tensor:
        targets = self._checked(targets, self.logits.shape[:2])
        losses = F.cross_entropy(_at_least_float32(self.logits).flatten(0, 1), targets.flatten(), reduction="none")
        return self._masked(losses.view(targets.shape)).sum(0)

    @torch.no_grad()
    def output_variance(self) -> Tensor:
        p = self._probabilities
        return self._masked(torch.addcmul(p, p, p, value=-1))

    @torch.no_grad()
    def fisher_product(self, u: Tensor, v: Tensor) -> Tensor:
        p = self._probabilities
        u, v = (x.masked_fill(p == 0, 0) for x in (u, v))  # of classes whose logits are −∞, a change is NaN
        u, v = (x - (p * x).sum(-1, keepdim=True) for x in (u, v))  # diag(p) − ppᵀ would cancel
        return self._masked((p * u * v).sum(-1)).sum(0)


class Bernoulli(_Predictive):
    """Independent bits at every step: `logits` and targets `[T, B, bits]`; the rest as for `Categorical`."""

    @torch.no_grad()
    def sample(self, generator: torch.Generator | None = None, part: Part | None = None) -> Tensor:
        p = _at_least_float32(self.logits).sigmoid()
        u = _random(torch.rand, p.shape, torch.get_default_dtype(), p.device, generator, part)
        return (u < p).to(p.dtype)

    def log_loss(self, targets: Tensor) -> Tensor:
        logits, targets = _at_least_float32(self.logits), self._checked(targets, self.logits.shape)
        losses = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
        return self._masked(losses).sum((0, 2))

    @torch.no_grad()
    def output_variance(self) -> Tensor:
        p = _at_least_float32(self.logits).sigmoid()
        return self._masked(p * (1 - p))

    @torch.no_grad()
    def fisher_product(self, u: Tensor, v: Tensor) -> Tensor:
        p = _at_least_float32(self.logits).sigmoid()
        return self._masked(p * (1 - p) * u * v).sum((0, 2))


class Gaussian(_Predictive):
    """Independent real numbers at every step, each normal around what the model says: `mean` and targets
    `[T, B, outputs]`; `variance`, a number or `[outputs]`, is no parameter. The smaller it is, the more nats an error
    counts, and the sooner the KL bound binds: 1 is a good start for targets of unit variance.

    With `F.mse_loss`, the mean squared error over steps, sequences and outputs, and one variance for all outputs,
    `loss_scale` is T·outputs / (2·variance): what that loss is to be multiplied by to become this one, less a constant.
    """

    _what = "mean"

    def __init__(
        self,
        mean: Tensor,
        variance: float | Tensor = 1.0,
        mask: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        batch_first: bool = False,
    ):
        super().__init__(mean, mask, lengths, batch_first)
        mean = _at_least_float32(self.logits)
        self.variance = torch.as_tensor(variance, dtype=mean.dtype, device=mean.device)
        if self.variance.shape not in ((), mean.shape[2:]):
            there = list(self.variance.shape)
            raise ValueError(f"variance must be a number or [outputs] = {list(mean.shape[2:])}, got {there}")
        if not ((self.variance > 0) & self.variance.isfinite()).all():
            raise ValueError(f"variance must be positive, got {self.variance.tolist()}")

    @torch.no_grad()
    def sample(self, generator: torch.Generator | None = None, part: Part | None = None) -> Tensor:
        mean = _at_least_float32(self.logits)
        noise = _random(torch.randn, mean.shape, torch.get_default_dtype(), mean.device, generator, part)
        return torch.addcmul(mean, noise.to(mean.dtype), self.variance.sqrt())

    def log_loss(self, targets: Tensor) -> Tensor:
        mean, targets = _at_least_float32(self.logits), self._checked(targets, self.logits.shape)
        losses = ((mean - targets).square() / self.variance + (2 * math.pi * self.variance).log()) / 2
        return self._masked(losses).sum((0, 2))

    @torch.no_grad()
    def output_variance(self) -> Tensor:
        return self._masked((1 / self.variance).expand(self.logits.shape))

    @torch.no_grad()
    def fisher_product(self, u: Tensor, v: Tensor) -> Tensor:
        return self._masked(u * v / self.variance).sum((0, 2))
