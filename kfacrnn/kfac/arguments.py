"""Errors for arguments that are out of range: they name the argument, what it may be and what it was."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from kfacrnn.kfac.fisher import APPROXIMATIONS

_COMPUTE_DTYPES = (None, torch.float32, torch.float64)
_PRODUCT_DTYPES = (None, torch.bfloat16, torch.float32)


def check(name: str, value: Any, holds: bool, what: str) -> None:
    """Raises ValueError unless it `holds` that the value is `what` it must be."""
    if not holds:
        raise ValueError(f"{name} must be {what}, got {value!r}")


def check_settings(**settings: Any) -> None:
    """Those arguments of `KFAC` that can be judged without the model."""

    def holds(name: str, condition: bool, what: str) -> None:
        check(name, settings[name], condition, what)

    value = settings.__getitem__
    holds("approximation", value("approximation") in APPROXIMATIONS, f"one of {', '.join(APPROXIMATIONS)}")
    holds("fisher", value("fisher") in ("sampled", "empirical"), "'sampled' or 'empirical'")
    holds("fallback", value("fallback") in (None, "gradient"), "None or 'gradient'")
    for name in ("damping", "kl_clip", "loss_scale", "gamma_max"):
        holds(name, math.isfinite(value(name)) and value(name) > 0, "finite and > 0")
    first = value("first_damping")
    holds("first_damping", first is None or (math.isfinite(first) and first > 0), "None, or finite and > 0")
    for name in ("statistics_fraction", "inverse_share"):
        holds(name, 0 < value(name) <= 1, "in (0, 1]")
    holds("statistics_decay", 0 <= value("statistics_decay") < 1, "in [0, 1)")
    for name in ("statistics_every", "refresh_every", "max_dense"):
        holds(name, isinstance(value(name), int) and value(name) >= 1, "an integer of at least 1")
    holds("refresh_delay", 0 <= value("refresh_delay") < value("refresh_every"), "in [0, refresh_every)")
    for name, valid in (("compute_dtype", _COMPUTE_DTYPES), ("product_dtype", _PRODUCT_DTYPES)):
        holds(name, value(name) in valid, "one of " + ", ".join(map(str, valid)))


def check_group(group: dict[str, Any]) -> None:
    """The options of a parameter group."""
    lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
    check("lr", lr, math.isfinite(lr) and lr > 0, "finite and > 0")
    check("momentum", momentum, 0 <= momentum < 1, "in [0, 1)")
    check("weight_decay", decay, math.isfinite(decay) and decay >= 0, "finite and >= 0")


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
        remedy = "use kfacrnn.nn layers, freeze them, or choose fallback='gradient'"
        raise ValueError(f"no Fisher block covers {names}: {remedy}")
