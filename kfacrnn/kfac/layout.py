"""Which axis of what a map saw is time, and how many steps it has: a and g as `[T, B, …]`, whatever the model's layout.

Knows nothing of Fisher blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kfacrnn.kfac.capture import Tap
from kfacrnn.kfac.factors import Sequences
from kfacrnn.predictive import Distribution


class Pass(NamedTuple):
    """What one map contributes to a statistics pass: a `[T, B, …]`, g `[T, B, out]` and the time axis of both."""

    a: Tensor
    g: Tensor
    sequences: Sequences


def over_time(name: str, uses: Sequence[Tap], gradients: Sequence[Tensor | None]) -> tuple[Tap, Tensor | None]:
    """One tap and its g for a map that was used once for all steps, or at each of them, in their order. Raises
    ValueError for anything else."""
    first, g = uses[0], gradients[0]
    if len(uses) == 1:
        return first, g
    if any(tap.s.dim() != 2 for tap in uses):
        raise ValueError(
            f"{name} was used {len(uses)} times in one forward pass: use it once for all time-steps, or once at each "
            "of them, on [B, …]"
        )
    if all(gradient is None for gradient in gradients):
        return first, None
    steps = [tap.s.new_zeros(tap.s.shape) if g is None else g for tap, g in zip(uses, gradients, strict=True)]
    return replace(first, a=torch.stack([tap.a for tap in uses]), time_first=True), torch.stack(steps)


def time_first(name: str, tap: Tap, g: Tensor, distribution: Distribution, sequences: Sequences) -> Pass:
    """a and g of a tap, and their time axis: T = 1 for a map that is used once per sequence. Steps that are padding in
    every sequence, as a PackedSequence leaves them out, come and go. Raises ValueError for a layout that hides the time
    axis: lag products of folded data would be silently wrong."""
    a, steps, cases = tap.a, sequences.steps, sequences.cases
    if tap.lengths is not None:
        _require_lengths(name, tap.lengths, distribution.lengths)
    lead = tuple(g.shape[:-1])
    if tap.time_first is None and lead == (cases,):
        return Pass(a.unsqueeze(0), g.unsqueeze(0), sequences.once())
    if tap.time_first is None and distribution.batch_first and len(lead) == 2:
        a, g, lead = a.transpose(0, 1), g.transpose(0, 1), lead[::-1]
    if lead == (steps, cases):
        return Pass(a, g, sequences)
    covers_all = distribution.lengths is not None and lead[1:] == (cases,) and lead[0] >= max(sequences.lengths)
    if covers_all and not g[steps:].any():
        return Pass(_of_steps(a, steps), _of_steps(g, steps), sequences)
    if lead == (steps * cases,):
        raise ValueError(f"{name} was given time and batch folded into one axis of {lead[0]}: give it [T, B, …]")
    found = f"{name} was given leading axes {list(lead)}, but the predictions have T = {steps} and B = {cases}"
    if lead == (cases, steps):
        raise ValueError(
            f"{found}; a model whose batch comes first says so in its predictive distribution: batch_first=True"
        )
    raise ValueError(
        f"{found}, and all maps share the predictions' steps; where only some are predicted, such as the last, give "
        "logits for all, as by expand, and a mask that is True there"
    )


def _of_steps(x: Tensor, steps: int) -> Tensor:
    """The first of them, and zeros for those that are not there."""
    return F.pad(x[:steps], (0, 0) * (x.dim() - 1) + (0, max(0, steps - len(x))))


def _require_lengths(name: str, packed: Tensor, predicted: Tensor | None) -> None:
    known = None if predicted is None else predicted.tolist()
    if known != packed.tolist():
        raise ValueError(
            f"{name} was given a PackedSequence of lengths {packed.tolist()}, the predictive distribution has "
            f"{'none' if known is None else known}: it is to be told the same `lengths`"
        )
