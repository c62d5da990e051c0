"""What the layers of this package share: a tape to record on and the list of maps they hold.

Implements the layer's side of `kfacrnn.kfac.capture`; knows nothing of any particular layer.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from kfacrnn.kfac.capture import Map, Tape


def _identity(map: Map) -> tuple[str | int, ...]:
    return map.name, *(id(parameter) for parameter in map.parameters)


class Capturable(nn.Module):
    """A layer that records one `Tap` per map and forward pass while its `tape` is set. Copies and pickles of it start
    without a tape."""

    tape: Tape | None = None
    _maps: tuple[Map, ...] = ()

    def maps(self) -> tuple[Map, ...]:
        """The maps of this layer: the same objects at every call, each as long as its parameters are the same ones."""
        known = {_identity(map): map for map in self._maps}
        self._maps = tuple(known.get(_identity(map), map) for map in self._build_maps())
        return self._maps

    def _build_maps(self) -> tuple[Map, ...]:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        # Taps hold tensors inside an autograd graph, which can be neither copied nor pickled; maps belong to the
        # original's parameters.
        state = dict(super().__getstate__())
        return {name: value for name, value in state.items() if name not in ("tape", "_maps")}
