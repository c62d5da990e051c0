"""What a statistics pass saw, as far as it decides what is made of it, and what there is to complain of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfacrnn.kfac.block import Block
from kfacrnn.kfac.capture import ElementwiseMap
from kfacrnn.kfac.factors import Sequences
from kfacrnn.kfac.layout import Pass


@dataclass(frozen=True)
class Finding:
    """That of a process, or of all of them."""

    sequences: dict[str, Sequences]  # by block, without padding
    logits: set[str]  # blocks that compute them
    not_finite: str | None  # a map
    incomplete: str | None  # what to complain of

    @classmethod
    def of_all(cls, findings: Sequence[Finding]) -> Finding:
        first, *_ = findings
        sequences = {name: Sequences.together([f.sequences[name] for f in findings]) for name in first.sequences}
        not_finite = next((f.not_finite for f in findings if f.not_finite), None)
        incomplete = next((f.incomplete for f in findings if f.incomplete), None)
        steps = sorted({max((seen.steps for seen in f.sequences.values()), default=0) for f in findings})
        if len(steps) > 1:
            incomplete = f"the processes have sequences of {steps} steps: pad all to as many, as by total_length"
        return cls(sequences, set.intersection(*(f.logits for f in findings)), not_finite, incomplete)


def first_not_finite(passes: dict[str, Pass]) -> str | None:
    """The first map whose a or g has an infinite or undefined second moment."""
    norms = [g.norm() + (a.norm() if a.is_floating_point() else 0) for a, g, _ in passes.values()]
    finite = torch.stack([norm.square() for norm in norms]).isfinite().tolist() if norms else []
    return next((name for name, is_finite in zip(passes, finite, strict=True) if not is_finite), None)


def beyond_the_end(passes: dict[str, Pass]) -> str | None:
    """A complaint if the loss depends on a map's steps behind a sequence's end, which the factors leave out."""
    padded = {name: (g, p) for name, (_, g, seen) in passes.items() if (p := seen.padding) is not None}
    beyond = torch.stack([g[padding].any() for g, padding in padded.values()]).tolist() if padded else []
    name = next((name for name, is_beyond in zip(padded, beyond, strict=True) if is_beyond), None)
    return name and (
        f"{name}: the predictions depend on steps behind the end that `lengths` gives; padding comes last, so that a "
        "sequence is reversed within its length, and what sums it up leaves padding out"
    )


def incomplete(block: Block, passes: Mapping[str, Pass], whole: list[Tensor]) -> str | None:
    """A complaint unless Σ g_t a_tᵀ, or Σ g_t ⊙ a_t, is the gradient of the log-loss: a parameter that acts elsewhere
    too, as in F.linear(h, embedding.weight), would get a curvature that knows nothing of it.

    What is compared may be in bf16; Σ may cancel to its rounding, hence the term that does not.
    """
    a, g, _ = passes[block.name]
    found = block.whole_gradients_of(passes)
    difference = sum((x - y).square().sum() for x, y in zip(found, whole, strict=True))
    total, inputs = sum(x.square().sum() for x in whole), a.square().sum() if a.is_floating_point() else 0
    if difference <= 0.05**2 * total + 0.001**2 * g.square().sum() * (inputs + g[..., 0].numel()):
        return None
    names = ", ".join(block.parameter_names)
    remedy = "to predict with an embedding's weight, make it that of an nn.Linear"
    if isinstance(block.map, ElementwiseMap):
        remedy = "leave it out of `params`, for another optimiser"
    return f"{names}: the loss depends on it in other ways than through {block.name}; {remedy}"
