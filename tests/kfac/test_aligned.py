"""What products cost shows in benchmarks; here, that their numbers and their layout are right."""

from __future__ import annotations

import pytest
import torch

from kfacrnn.kfac import aligned


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("shape", [(), (3,)], ids=["one", "a stack"])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_rows_of_a_large_product_begin_at_cache_lines_and_its_numbers_are_those_of_any_other(
    dtype, tolerance, shape, is_transposed
):
    generator = torch.Generator().manual_seed(4)
    X = torch.randn(*shape, 700, 90, generator=generator, dtype=dtype)
    Y = torch.randn(*shape, 451, 90, generator=generator, dtype=dtype).mT
    Y = Y if is_transposed else Y.contiguous()
    found = aligned.product(X, Y)
    torch.testing.assert_close(found.double(), X.double() @ Y.double(), rtol=tolerance, atol=tolerance)
    assert found.stride(-2) * found.element_size() % 64 == 0
    assert found.stride(-2) > 451


def test_a_large_product_can_be_differentiated():
    X = torch.ones(600, 3, requires_grad=True)
    aligned.product(X, torch.ones(3, 500)).sum().backward()
    assert X.grad.eq(500).all()
