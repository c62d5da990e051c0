"""Swap torch's recurrent layers for capturable ones in a model that exists already."""

from __future__ import annotations

from typing import TypeVar, cast

from torch import nn

from kfacrnn.nn.capturable import Capturable
from kfacrnn.nn.cells import GRUCell, LSTMCell, RNNCell
from kfacrnn.nn.gru import GRU
from kfacrnn.nn.lstm import LSTM
from kfacrnn.nn.rnn import RNN

Model = TypeVar("Model", bound=nn.Module)

_CAPTURABLE: dict[type, type[Capturable]] = {
    nn.LSTM: LSTM,
    nn.GRU: GRU,
    nn.RNN: RNN,
    nn.LSTMCell: LSTMCell,
    nn.GRUCell: GRUCell,
    nn.RNNCell: RNNCell,
}


def convert(model: Model) -> Model:
    """Turn every `torch.nn.LSTM`, `GRU` and `RNN`, and every cell, in `model` into that of `kfacrnn.nn`, in place, and
    return the model.

    The layers stay the same objects with the same parameters, hooks and training flags, so optimisers and other
    references to them remain valid. Raises ValueError, naming the submodule and changing nothing, for recurrent layers
    that cannot be captured: subclasses and `proj_size`.
    """
    recurrent = {
        name or "model": module
        for name, module in model.named_modules()
        if isinstance(module, nn.RNNBase | nn.RNNCellBase) and not isinstance(module, Capturable)
    }
    for name, module in recurrent.items():
        if type(module) not in _CAPTURABLE:
            kinds = "torch.nn.LSTM, GRU, RNN and their cells are"
            raise ValueError(f"cannot convert {name}: {type(module).__name__} is not supported yet, {kinds}")
        if getattr(module, "proj_size", 0):
            raise ValueError(f"cannot convert {name}: proj_size={module.proj_size} is not supported yet")
    for module in recurrent.values():
        # Keeps every reference alive; the capturable classes add methods, and no state of their own.
        module.__class__ = cast(type[nn.RNNBase], _CAPTURABLE[type(module)])
    return model
