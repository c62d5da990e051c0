"""The precision of what the user leaves open: by size, by processor, never less than exact for float64."""

from __future__ import annotations

import pytest
import torch

from kfacrnn.kfac import precision
from kfacrnn.kfac.block import Curvature

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
    said = Curvature("option1", 100, 1e10, torch.float32, torch.bfloat16, 0.25)
    single, double = (
        [torch.ones(3, dtype=dtype), torch.eye(2, dtype=dtype)] for dtype in (torch.float32, torch.float64)
    )
    expected = {"compute_dtype": torch.float32, "product_dtype": torch.bfloat16, "lag_tolerance": 0.25}
    assert said.exactness(single) == expected
    assert said.exactness(double) == expected | {"product_dtype": torch.float64}


def test_modes_are_left_out_of_large_float32_maps_only_unless_the_user_says_otherwise():
    large = precision.LARGE
    assert precision.lag_tolerance(torch.float32, large) == precision.FEW
    assert precision.lag_tolerance(torch.float32, large - 1) == precision.lag_tolerance(torch.float64, large) == 0
    exact = Curvature("option1", 4096, 1e10, lag_tolerance=0.0)
    assert exact.exactness([torch.empty(1301, 1301), *[torch.empty(650, 650)] * 4])["lag_tolerance"] == 0
