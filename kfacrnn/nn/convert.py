"""Swap torch's recurrent layers for capturable ones in a model that exists already."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from kfacrnn.nn.capturable import Capturable
from kfacrnn.nn.lstm import LSTM

Model = TypeVar("Model", bound=nn.Module)


def convert(model: Model) -> Model:
    """Turn every `torch.nn.LSTM` in `model` into a `kfacrnn.nn.LSTM`, in place, and return the model.

    The layers stay the same objects with the same parameters, hooks and training flags, so optimisers and other
    references to them remain valid. Raises ValueError, naming the submodule and changing nothing, for recurrent layers
    that cannot be captured: GRU, RNN, single cells, subclasses of them, `bidirectional` and `proj_size`.
    """
    recurrent = {
        name or "model": module
        for name, module in model.named_modules()
        if isinstance(module, nn.RNNBase | nn.RNNCellBase) and not isinstance(module, Capturable)
    }
    for name, module in recurrent.items():
        if type(module) is not nn.LSTM:
            raise ValueError(f"cannot convert {name}: {type(module).__name__} is not supported yet, torch.nn.LSTM is")
        if module.bidirectional:
            raise ValueError(f"cannot convert {name}: bidirectional=True is not supported yet")
        if module.proj_size:
            raise ValueError(f"cannot convert {name}: proj_size={module.proj_size} is not supported yet")
    for module in recurrent.values():
        module.__class__ = LSTM  # keeps every reference alive; LSTM adds methods, and no state of its own
    return model
