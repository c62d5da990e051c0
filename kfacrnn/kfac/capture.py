"""How the inputs `a_t` and the pre-activation gradients `g_t` of every linear map leave a model.

A layer that can be captured says which maps it holds (`maps()`) and, while its `tape` is set, records one `Tap` per map
and forward pass. `torch.nn.Linear`, `Embedding` and `LayerNorm` are covered by forward hooks. This module knows nothing
of Fisher blocks or of how the numbers are used.

    symbol  shape          meaning
    a_t     [T, B, in]     input of the map at step t, without the homogeneous coordinate;
            [T, B]         token ids, for an embedding
    s_t     [T, B, out]    pre-activation s_t = W a_t + b
    g_t     [T, B, out]    gradient of a case's log-loss, summed over its steps, with respect to s_t
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear


@dataclass(frozen=True, eq=False)
class LinearMap:
    """One affine map `s_t = W a_t + b` that a layer applies at every step.

    `weights` are `[out, in_i]` and stand side by side along the input, W = [W_1 | W_2 | …]; every one of `biases`,
    `[out]`, is added to s_t (an LSTM has two). `splits` names consecutive row ranges of W, e.g. the four gates
    `{"i": H, …}`: each is a Fisher block of its own, unless gates are joint, and all share the same inputs. A map may
    consist of some `rows` of its parameters alone; other maps then hold the others.
    """

    name: str
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...] = ()
    splits: Mapping[str, int] = field(default_factory=dict)
    rows: slice = field(default_factory=lambda: slice(None))
    is_output: bool = False  # feeds the predictive distribution and nothing else

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (*self.weights, *self.biases)


@dataclass(frozen=True, eq=False)
class EmbeddingMap:
    """`s_t` = the row of `weight` `[vocabulary, out]` that token a_t names: a linear map of one-hot inputs."""

    name: str
    weight: Tensor
    padding_idx: int | None = None  # a row that torch keeps from learning
    rows: ClassVar[slice] = slice(None)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.weight,)


@dataclass(frozen=True, eq=False)
class ElementwiseMap:
    """A gain and a shift, `s_t = gain ⊙ a_t + shift`, as after a normalisation. Either may be absent."""

    name: str
    gain: Tensor | None = None
    shift: Tensor | None = None
    rows: ClassVar[slice] = slice(None)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return tuple(p for p in (self.gain, self.shift) if p is not None)


Map = LinearMap | EmbeddingMap | ElementwiseMap

TORCHS_RECURRENT = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)


@dataclass(frozen=True, eq=False)
class Tap:
    """What one map saw in one forward pass. `s` is the tensor whose gradient is g: the pre-activation itself, or a zero
    leaf that was added to it. `time_first` is unknown (None) for modules that see whatever layout the model has.
    `lengths` `[B]`, on the CPU, are those of a PackedSequence, if the map was given one. With `is_step`, a and s are
    `[B, …]`, those of one step; steps are recorded in the order of time."""

    map: Map
    a: Tensor
    s: Tensor
    time_first: bool | None = True
    lengths: Tensor | None = None
    is_step: bool = False


class Tape(list[Tap]):
    """The taps of one forward pass, in the order in which the maps were applied, until it is `closed`: what a backward
    pass computes again, as with checkpointing, is no second use."""

    closed = False

    def record(self, map: Map, a: Tensor, s: Tensor, time_first: bool | None = True, **more: Any) -> None:
        if not self.closed:
            # Under autocast a may be changed in place afterwards: autograd has kept a copy in half precision.
            a = a.detach().clone() if torch.is_autocast_enabled(a.device.type) else a.detach()
            self.append(Tap(map, a, s, time_first, **more))


class Recorder:
    """The maps of a model that hold any of the `trained` parameters (None: all), by their full names, and the means to
    record them. Other modules run as ever.

    Raises ValueError, naming the module, for recurrent layers of torch's that can be converted, and are not.
    """

    def __init__(self, model: nn.Module, trained: Set[Tensor] | None = None):
        self.maps: dict[str, Map] = {}
        self._capturable: dict[str, Any] = {}
        self._hooked: list[tuple[nn.Module, Map]] = []
        trained = set(model.parameters()) if trained is None else trained
        for name, module in model.named_modules():
            if trained.isdisjoint(module.parameters(recurse=False)) or _has_projection(module):
                continue
            if _is_capturable(module):
                self._capturable[name] = module
                for map in self._capturable[name].maps():
                    if not trained.isdisjoint(map.parameters):
                        self.maps[f"{name}.{map.name}".lstrip(".")] = map
            elif type(module) in TORCHS_RECURRENT:
                kind = f"torch.nn.{type(module).__name__}"
                raise ValueError(
                    f"{name or 'the model'} is a {kind}, whose pre-activations cannot be seen: "
                    "use kfacrnn.nn.convert(model), which keeps the weights"
                )
            elif (map := _hooked_map(name, module)) is not None:
                self._hooked.append((module, map))
                self.maps[name or map.name] = map

    def other_layout(self, batch_first: bool, packed: Set[Map]) -> str | None:
        """The first recurrent layer that is not so, by name. Cells have no layout, nor have layers whose maps are
        `packed`, that is, were given a PackedSequence."""
        for name, layer in self._capturable.items():
            if packed.isdisjoint(layer.maps()) and getattr(layer, "batch_first", batch_first) != batch_first:
                return name
        return None

    @contextmanager
    def recording(self) -> Iterator[Tape]:
        """Every map that is applied inside leaves a tap on the tape, until the tape is closed."""
        tape = Tape()
        with ExitStack() as stack:
            for module, map in self._hooked:
                stack.callback(module.register_forward_hook(_hook(map, tape), with_kwargs=True).remove)
            for module in self._capturable.values():
                module.tape = tape
                stack.callback(setattr, module, "tape", None)
            yield tape


def _is_capturable(module: nn.Module) -> bool:
    """By its class: what torch.compile wraps a module in has the attributes of the module, too."""
    return all(hasattr(type(module), name) for name in ("tape", "maps"))


def _has_projection(module: nn.Module) -> bool:
    return isinstance(module, nn.LSTM) and module.proj_size > 0


def _hooked_map(name: str, module: nn.Module) -> Map | None:
    if isinstance(module, NonDynamicallyQuantizableLinear):  # MultiheadAttention's, which it never calls
        return None
    if isinstance(module, nn.Linear):
        return LinearMap(name, (module.weight,), () if module.bias is None else (module.bias,))
    if isinstance(module, nn.Embedding) and not (module.max_norm or module.scale_grad_by_freq or module.sparse):
        return EmbeddingMap(name, module.weight, module.padding_idx)
    if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1 and module.elementwise_affine:
        return ElementwiseMap(name, module.weight, module.bias)
    return None


def _hook(map: Map, tape: Tape) -> Callable[[Any, tuple[Tensor, ...], dict[str, Tensor], Tensor], Tensor]:
    def record(module: Any, inputs: tuple[Tensor, ...], named: dict[str, Tensor], s: Tensor) -> Tensor:
        a = inputs[0] if inputs else named["input"]
        if isinstance(map, ElementwiseMap):
            a = F.layer_norm(a, module.normalized_shape, eps=module.eps)
        tape.record(map, a, s, time_first=None)
        return s.clone()  # for an activation that works in place, which would make s its own output

    return record
