"""The global random generators that a model may draw from: torch's, Python's and, where it is there, NumPy's."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable

import torch


def kept(device: torch.device) -> Callable[[], None]:
    """Returns what puts all of them, those of `device` included, back to where they are now."""
    cpu, python, numpy = torch.get_rng_state(), random.getstate(), sys.modules.get("numpy")
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    of_numpy = None if numpy is None else numpy.random.get_state(legacy=False)

    def restore() -> None:
        torch.set_rng_state(cpu)
        random.setstate(python)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        if numpy is not None:
            numpy.random.set_state(of_numpy)

    return restore


def seed(value: int, device: torch.device) -> None:
    """Seeds all of them. torch.manual_seed would seed every CUDA device, those that nobody keeps included."""
    torch.default_generator.manual_seed(value)
    random.seed(value)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(value)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(value % 2**32)
