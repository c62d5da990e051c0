"""One weight for an embedding and a linear map, as where a language model predicts with its embedding (Press & Wolf,
2017, arXiv:1608.05859).

With the linear map's W = [weight | bias] and column-stacking vec, the Fisher block is the sum of two Kronecker
products, and of what the two uses have in common, which is left out, as is correlation over time:

    F ≈ E[T]·(A ⊗ G + A_e ⊗ G_e)

    symbol   shape         meaning
    A, G     of the linear map's inputs and outputs, damped
    A_e      as A          E[g gᵀ] of the embedding's outputs, 0 for the bias
    G_e      as G          how often each token is looked up in a step of the linear map, a diagonal

Which formula inverts it, `kfacrnn.kfac.fisher` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from kfacrnn.kfac.block import Block, Curvature
from kfacrnn.kfac.blocks import EmbeddingBlock, LinearBlock
from kfacrnn.kfac.capture import EmbeddingMap, LinearMap, Map
from kfacrnn.kfac.inversion import Inversion, inversion
from kfacrnn.kfac.layout import Pass
from kfacrnn.kfac.maths import diagonal, mean_length


class TiedEmbeddingBlock(EmbeddingBlock):
    """Averages alone: the weight is for its `TiedLinearBlock` to move."""

    moves = False
    approximation = "tied"
    costs: ClassVar[list[int]] = []


class TiedLinearBlock(LinearBlock):
    """F⁻¹ of the sum of both uses."""

    approximation = "tied"

    def __init__(
        self,
        name: str,
        map: LinearMap,
        curvature: Curvature,
        names: Mapping[Tensor, str],
        embedding: TiedEmbeddingBlock,
    ):
        super().__init__(name, map, curvature, names)
        self._embedding = embedding

    @property
    def has_lags(self) -> bool:
        return False

    def whole_gradients_of(self, passes: Mapping[str, Pass]) -> list[Tensor]:
        weight, *biases = super().whole_gradients_of(passes)
        (looked_up,) = self._embedding.whole_gradients_of(passes)
        return [weight + looked_up, *biases]

    def inversion(self, damping: float) -> Inversion:
        A0, G0 = self.average.values()
        A_e, G_e = self._of_embedding(A0, G0)
        return inversion(
            "two uses",
            A0,
            A_e,
            [G0],
            [G_e],
            lengths=dict(self.average.lengths),
            damping=damping,
            **(self.curvature.exactness([A0, G0]) | {"lag_tolerance": 0.0}),
        )

    def _of_embedding(self, A0: Tensor, G0: Tensor) -> tuple[Tensor, Tensor]:
        """A_e and G_e, in the form that A0 and G0 have."""
        frequencies, E_gg = self._embedding.average.values()
        A_e = torch.zeros_like(A0)
        if A0.dim() == 2:
            A_e[: len(E_gg), : len(E_gg)] = E_gg
        else:
            A_e[: len(E_gg)] = diagonal(E_gg)
        if (padding := self._embedding.map.padding_idx) is not None:
            frequencies[padding] = 0
        G_e = frequencies * (mean_length(self._embedding.average.lengths) / mean_length(self.average.lengths))
        return A_e, G_e.diag() if G0.dim() == 2 else G_e


def can_be_tied(one: Map, other: Map) -> bool:
    """An embedding, and a linear map of its weight and nothing else but biases."""
    embedding, linear = (one, other) if isinstance(one, EmbeddingMap) else (other, one)
    if not isinstance(embedding, EmbeddingMap) or not isinstance(linear, LinearMap):
        return False
    is_alone = len(linear.weights) == 1 and linear.weights[0] is embedding.weight
    return is_alone and not linear.splits and linear.rows == slice(None)


def tied_blocks(pair: Mapping[str, Map], curvature: Curvature, names: Mapping[Tensor, str]) -> dict[str, Block]:
    """The blocks of two maps that can be tied, by name."""
    embedding = next(
        TiedEmbeddingBlock(name, map, curvature, names) for name, map in pair.items() if isinstance(map, EmbeddingMap)
    )
    linear = next(
        TiedLinearBlock(name, map, curvature, names, embedding)
        for name, map in pair.items()
        if isinstance(map, LinearMap)
    )
    return {embedding.name: embedding, linear.name: linear}
