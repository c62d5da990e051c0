"""Errors for arguments that are out of range: they name the argument, what it may be and what it was."""

from __future__ import annotations

from typing import Any

import torch

_COMPUTE_DTYPES = (None, torch.float32, torch.float64)
_PRODUCT_DTYPES = (None, torch.bfloat16, torch.float32)


def check(name: str, value: Any, holds: bool, what: str) -> None:
    """Raises ValueError unless it `holds` that the value is `what` it must be."""
    if not holds:
        raise ValueError(f"{name} must be {what}, got {value!r}")


def check_dtypes(compute_dtype: torch.dtype | None, product_dtype: torch.dtype | None) -> None:
    """Of `KFAC`, the arguments of these names."""
    for name, dtype, valid in (
        ("compute_dtype", compute_dtype, _COMPUTE_DTYPES),
        ("product_dtype", product_dtype, _PRODUCT_DTYPES),
    ):
        check(name, dtype, dtype in valid, "one of " + ", ".join(map(str, valid)))
