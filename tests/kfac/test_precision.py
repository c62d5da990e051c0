"""The precision of what the user leaves open: by size, by processor, never less than exact for float64."""

from __future__ import annotations

import pytest
import torch

from kfacrnn.kfac import precision
from kfacrnn.kfac.blocks import Curvature

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("factors", "widest", "expected"),
    [
        (torch.float32, precision.WIDE - 1, torch.float64),
        (torch.float32, precision.WIDE, torch.float32),
        (torch.float64, precision.WIDE, torch.float64),
    ],
)
def test_wide_float32_factors_are_decomposed_in_float32_and_all_others_in_float64(factors, widest, expected):
    assert precision.compute_dtype(factors, widest) == expected


@pytest.mark.parametrize("multiplies", [True, False])
def test_products_are_in_bfloat16_where_that_pays(monkeypatch, multiplies):
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: multiplies)
    large = precision.LARGE
    assert precision.product_dtype(torch.float32, large - 1, CPU) == torch.float32
    assert precision.product_dtype(torch.float64, large, CPU) == torch.float64
    assert precision.product_dtype(torch.float32, large, CPU) == (torch.bfloat16 if multiplies else torch.float32)


def test_a_device_of_another_kind_is_not_taken_to_multiply_bfloat16():
    assert not precision.multiplies_bfloat16(torch.device("meta"))


def test_what_the_user_says_goes_before_size_except_that_float64_is_multiplied_in_float64():
    said = Curvature("option1", 100, 1e10, torch.float32, torch.bfloat16)
    assert said.dtypes([torch.ones(3), torch.eye(2)]) == (torch.float32, torch.bfloat16)
    assert said.dtypes([torch.ones(3).double(), torch.eye(2).double()]) == (torch.float32, torch.float64)
