"""How the inputs `a_t` and the pre-activation gradients `g_t` of every linear map leave a model.

A layer that can be captured says which linear maps it holds (`maps()`) and, while its `tape` is set, records one
`Tap` per map and forward pass. `torch.nn.Linear`, `Embedding` and `LayerNorm` are covered by forward hooks. This
module knows nothing of Fisher blocks or of how the numbers are used.

    symbol  shape          meaning
    a_t     [T, B, in]     input of the map at step t, without the homogeneous coordinate;
            [T, B]         token ids, for an embedding
    s_t     [T, B, out]    pre-activation s_t = W a_t + b
    g_t     [T, B, out]    gradient of a case's log-loss, summed over its steps, with respect to s_t
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import Parameter


@dataclass(frozen=True, eq=False)
class LinearMap:
    """One affine map `s_t = W a_t + b` that a layer applies at every step.

    `weights` are `[out, in_i]` and stand side by side along the input, W = [W_1 | W_2 | …]; every one of `biases`,
    `[out]`, is added to s_t (an LSTM has two). `splits` names consecutive row ranges of W, e.g. the four gates
    `{"i": H, …}`: each is a Fisher block of its own and all share the same inputs.
    """

    name: str
    weights: tuple[Parameter, ...]
    biases: tuple[Parameter, ...] = ()
    splits: Mapping[str, int] = field(default_factory=dict)
    is_output: bool = False  # feeds the predictive distribution and nothing else, so its g_t are uncorrelated over time


@dataclass(frozen=True, eq=False)
class ElementwiseMap:
    """A gain and a shift, `s_t = gain ⊙ a_t + shift`, as after a normalisation. Either may be absent."""

    name: str
    gain: Parameter | None = None
    shift: Parameter | None = None


@dataclass(frozen=True, eq=False)
class Tap:
    """What one map saw in one forward pass. `s` is the tensor whose gradient is g: the pre-activation itself, or a zero
    leaf that was added to it."""

    map: LinearMap | ElementwiseMap
    a: Tensor
    s: Tensor


class Tape(list[Tap]):
    """The taps of one forward pass, in the order in which the maps were applied."""

    def record(self, map: LinearMap | ElementwiseMap, a: Tensor, s: Tensor) -> None:
        self.append(Tap(map, a.detach(), s))
