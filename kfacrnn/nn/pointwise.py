"""The point-wise part of an LSTM or GRU step in C, given a C compiler; knows nothing of layers or Fisher blocks."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from kfacrnn.nn import compiler

SOURCE = Path(__file__).with_name("pointwise.c")
SIZES = ("steps", "cases", "hidden", "threads", "narrow")
POINTERS = (
    *("inputs", "gates", "cells", "squashed", "output", "product", "d_output", "rounded", "d_gates", "d_cell"),
    *("recurrent", "norms", "gain_hh", "gain_c", "bias_c", "d_recurrent", "d_normed", "initial", "bias_hn"),
)


class _Steps(ctypes.Structure):
    """`Steps` of pointwise.c."""

    _fields_ = (*((name, ctypes.c_int64) for name in SIZES), *((name, ctypes.c_void_p) for name in POINTERS))


class CompiledSteps:
    """Steps t of one recurrence, forward (`advance`) or backward (`retreat`), on CPU tensors named as in pointwise.c.

    All must be contiguous and float32, but `output`, `initial`, `product`, `d_output` and `rounded` may be bfloat16
    together, and `inputs` always is. `kernel` is "lstm" or "gru".
    """

    def __init__(self, library: ctypes.CDLL, of: dict[str, Tensor | None], kernel: str):
        given = {name: tensor for name, tensor in of.items() if tensor is not None}
        output, narrow = given["output"], given["product"].dtype == torch.bfloat16
        sizes = dict(zip(SIZES, (*output.shape, torch.get_num_threads(), narrow), strict=True))
        self._tensors = given  # keeps the memory
        self._steps = ctypes.byref(_Steps(**sizes, **{name: tensor.data_ptr() for name, tensor in given.items()}))
        self._advance, self._retreat = (getattr(library, f"{kernel}_{way}") for way in ("advance", "retreat"))
        for function in (self._advance, self._retreat):
            function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_int64), None

    def advance(self, t: int) -> None:
        self._advance(self._steps, t)

    def retreat(self, t: int) -> None:
        self._retreat(self._steps, t)


def status() -> str:
    """ "compiled", or "plain torch: " and the reason. Compiles if that has not been tried yet."""
    return compiler.status(SOURCE)


def kernel_for(state: torch.dtype, product: torch.dtype, device: torch.device) -> ctypes.CDLL | None:
    """The compiled kernel, if there is one and it can do this. Raises RuntimeError if it is missing though
    KFACRNN_POINTWISE=compiled."""
    fits = device.type == "cpu" and state == torch.float32 and product in (torch.float32, torch.bfloat16)
    return compiler.load(SOURCE) if fits else None
