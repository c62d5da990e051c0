"""Errors for arguments that are out of range: they name the argument, what it may be and what it was."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Self, overload

import torch

from kfacrnn.kfac.fisher import APPROXIMATIONS

_COMPUTE_DTYPES = (None, torch.float32, torch.float64)
_PRODUCT_DTYPES = (None, torch.bfloat16, torch.float32)


def is_finite(value: Any) -> bool:
    """Not so for what is no number."""
    try:
        return math.isfinite(value)
    except TypeError:
        return False


def check_positive(name: str, value: Any) -> None:
    check(name, value, is_finite(value) and value > 0, "finite and > 0")


def check(name: str, value: Any, holds: bool, what: str) -> None:
    """Raises ValueError unless it `holds` that the value is `what` it must be."""
    if not holds:
        raise ValueError(f"{name} must be {what}, got {value!r}")


class Positive:
    """An attribute that is checked whenever it is set."""

    def __init__(self, doc: str):
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, owner: None, kind: type) -> Self: ...
    @overload
    def __get__(self, owner: object, kind: type) -> float: ...
    def __get__(self, owner: object | None, kind: type) -> Self | float:
        return self if owner is None else owner.__dict__[self._name]

    def __set__(self, owner: object, value: float) -> None:
        check_positive(self._name, value)
        owner.__dict__[self._name] = float(value)  # of NumPy's kind it could be saved, but not loaded


def check_settings(**settings: Any) -> None:
    """Those arguments of `KFAC` that can be judged one by one and are no `Positive`."""

    def holds(name: str, condition: bool, what: str) -> None:
        check(name, settings[name], condition, what)

    value = settings.__getitem__
    holds(
        "model", isinstance(value("model"), torch.nn.Module), "a torch.nn.Module, whose layers say what the blocks are"
    )
    holds("approximation", value("approximation") in APPROXIMATIONS, f"one of {', '.join(APPROXIMATIONS)}")
    holds("fisher", value("fisher") in ("sampled", "empirical"), "'sampled' or 'empirical'")
    holds("gates", value("gates") in ("separate", "joint"), "'separate' or 'joint'")
    holds("fallback", value("fallback") in (None, "gradient"), "None or 'gradient'")
    for name in ("damping", "gamma_max"):
        check_positive(name, value(name))
    first = value("first_damping")
    holds("first_damping", first is None or (is_finite(first) and first > 0), "None, or finite and > 0")
    for name in ("statistics_fraction", "inverse_share", "early_interval"):
        holds(name, is_finite(value(name)) and 0 < value(name) <= 1, "in (0, 1]")
    holds("statistics_decay", is_finite(value("statistics_decay")) and 0 <= value("statistics_decay") < 1, "in [0, 1)")
    tolerance = value("lag_tolerance")
    holds("lag_tolerance", tolerance is None or (is_finite(tolerance) and 0 <= tolerance < 1), "None, or in [0, 1)")
    for name in ("statistics_every", "refresh_every", "max_dense"):
        holds(name, isinstance(value(name), int) and value(name) >= 1, "an integer of at least 1")
    delay = value("refresh_delay")
    holds(
        "refresh_delay",
        isinstance(delay, int) and 0 <= delay < value("refresh_every"),
        "an integer in [0, refresh_every)",
    )
    for name, valid in (("compute_dtype", _COMPUTE_DTYPES), ("product_dtype", _PRODUCT_DTYPES)):
        holds(name, value(name) in valid, "one of " + ", ".join(map(str, valid)))


def check_group(group: dict[str, Any]) -> None:
    """The options of a parameter group."""
    lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
    check_positive("lr", lr)
    check("momentum", momentum, is_finite(momentum) and 0 <= momentum < 1, "in [0, 1)")
    check("weight_decay", decay, is_finite(decay) and decay >= 0, "finite and >= 0")


def plain_numbers(group: dict[str, Any]) -> dict[str, float]:
    """Those options of a parameter group that are no tensors: of NumPy's kind they could be saved, but not loaded."""
    options = {name: group[name] for name in ("lr", "momentum", "weight_decay")}
    return {name: float(value) for name, value in options.items() if not isinstance(value, torch.Tensor)}


def check_forward(given: bool, needed: bool) -> None:
    """That of `KFAC.step`."""
    if given != needed:
        raise ValueError(
            "KFAC(quadratic_model=…) takes steps by step(forward=…), which returns the predictive distribution of "
            "quadratic_cases; without a quadratic model there is no forward"
        )


def check_covered(uncovered: Iterable[str], fallback: str | None) -> None:
    """Nothing is left untrained in silence."""
    if fallback is None and (names := ", ".join(uncovered)):
        remedy = "use kfacrnn.nn layers, LSTMs without proj_size, freeze them, or choose fallback='gradient'"
        raise ValueError(f"no Fisher block covers {names}: {remedy}")
