"""Which axis of what a map saw is time, and how many steps it has: a and g as `[T, B, …]`, whatever the model's layout.

Knows nothing of Fisher blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kfacrnn.kfac.capture import Tap
from kfacrnn.kfac.factors import Sequences


class Pass(NamedTuple):
    """What one map contributes to a statistics pass: a `[T, B, …]`, g `[T, B, out]` and the time axis of both."""

    a: Tensor
    g: Tensor
    sequences: Sequences


def seen_by(
    name: str, uses: Sequence[Tap], gradients: Sequence[Tensor | None], batch_first: bool, sequences: Sequences
) -> Pass:
    """What a map saw that was used once for all time-steps, or at each of them, or once per sequence: then T = 1. Steps
    that are padding in every sequence may be there or not, as with a PackedSequence: they are cut off, or are zeros.
    Raises ValueError for a layout that hides the time axis: lag products of folded data would be silently wrong."""
    if all(g is None for g in gradients):
        raise ValueError(f"{name} was used, but the predictions do not depend on it")
    found = [tap.s.new_zeros(tap.s.shape) if g is None else g for tap, g in zip(uses, gradients, strict=True)]
    a, g, time_first = uses[0].a, found[0], uses[0].time_first
    if len(uses) > 1 or uses[0].is_step:
        a, g = _over_time(name, uses, found, batch_first)
        time_first = True
    steps, cases, given = sequences.steps, sequences.cases, tuple(g.shape[:-1])
    lead = given
    if time_first is None and lead == (cases,):
        return Pass(a.unsqueeze(0), g.unsqueeze(0), sequences.once())
    can_be_time = steps == 1 or (batch_first and steps == cases)
    if time_first is None and lead == (1, cases) and not can_be_time:  # as an RNN's last state
        return Pass(a, g, sequences.once())
    if time_first is None and batch_first and len(lead) == 2:
        a, g, lead = a.transpose(0, 1), g.transpose(0, 1), lead[::-1]
    if lead == (steps, cases):
        return Pass(a, g, sequences)
    has_every_step = sequences.padding is not None and lead[1:] == (cases,) and lead[0] >= max(sequences.lengths)
    if has_every_step and not g[steps:].nan_to_num(0).any():  # what is not finite is another's complaint
        return Pass(_of_steps(a, steps), _of_steps(g, steps), sequences)
    raise ValueError(f"{name} {_misfit(given, sequences, len(uses), batch_first)}")


def _misfit(lead: tuple[int, ...], sequences: Sequences, uses: int, batch_first: bool) -> str:
    steps, cases = sequences.steps, sequences.cases
    if lead == (steps * cases,):
        return f"was given time and batch folded into one axis of {lead[0]}: give it [T, B, …]"
    if lead == (sequences.observed,):
        return "was given the data of a PackedSequence: unpack it first, as by pad_packed_sequence"
    predicted = f"but the predictions have T = {steps} and B = {cases}"
    if uses > 1:
        return f"was used {uses} times on {lead[1]} sequences, {predicted}: use it at every step"
    found = f"was given leading axes {list(lead)}, {predicted}"
    if batch_first and sorted(lead) == sorted((cases, steps)):
        return f"{found}, batch first: all maps are to have one layout, so transpose before it"
    if lead == (cases, steps):
        return f"{found}; a model whose batch comes first says so in its predictive distribution: batch_first=True"
    return (
        f"{found}, and all maps share the predictions' steps; where only some are predicted, such as the last, give "
        "logits for all, as by expand, and a mask that is True there; what has other steps, such as an encoder, is for "
        "another optimiser: leave its parameters out of `params`"
    )


def _over_time(name: str, uses: Sequence[Tap], gradients: Sequence[Tensor], batch_first: bool) -> tuple[Tensor, Tensor]:
    """a and g of uses at every step, on `[B, …]` or with a time axis of length 1."""
    axis = 1 if batch_first and uses[0].time_first is None else 0
    a, g = [tap.a for tap in uses], list(gradients)
    if all(tap.s.dim() == 3 and tap.s.shape[axis] == 1 for tap in uses):
        a, g = ([x.squeeze(axis) for x in each] for each in (a, g))
    if any(x.dim() != 2 for x in g):
        raise ValueError(
            f"{name} was used {len(uses)} times in one forward pass: use it once for all time-steps, or once at each "
            "of them, on [B, …], or leave its parameters out of `params`, for another optimiser"
        )
    if len(sizes := {len(x) for x in g}) > 1:
        raise ValueError(
            f"{name} was given {max(sizes)} sequences at one step and {min(sizes)} at another: give it all of them at "
            "every step, and `lengths` to the predictive distribution"
        )
    return torch.stack(a), torch.stack(g)


def _of_steps(x: Tensor, steps: int) -> Tensor:
    """The first of them, and zeros for those that are not there."""
    return F.pad(x[:steps], (0, 0) * (x.dim() - 1) + (0, max(0, steps - len(x))))


def require_lengths(name: str, packed: Tensor, predicted: Sequence[int]) -> None:
    """Raises ValueError unless a PackedSequence has the lengths that the predictions have."""
    if packed.tolist() != predicted:
        raise ValueError(
            f"{name} was given a PackedSequence of lengths {packed.tolist()}, the predictions have {list(predicted)}: "
            "give their distribution the same `lengths`"
        )
