"""The compiled step against float64 arithmetic."""

import pytest
import torch

from kfacrnn.nn import compiler, pointwise


@pytest.fixture
def library(compiled_cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(compiled_cache))
    monkeypatch.delenv("KFACRNN_POINTWISE", raising=False)
    compiler._decide.cache_clear()
    library = pointwise.kernel_for(torch.float32, torch.float32, torch.device("cpu"))
    if library is None:
        pytest.skip(pointwise.status())
    yield library
    compiler._decide.cache_clear()


def forward(library, gates, cell, narrow=False):
    """One step on `gates` [B, 4H] and `cell` [B, H] without recurrent product: gates, c, tanh(c), h."""
    cases, hidden = cell.shape
    dtype = torch.bfloat16 if narrow else torch.float32
    of = {
        "gates": gates.clone()[None],
        "cells": torch.stack([cell, cell]),
        "squashed": torch.empty(1, cases, hidden),
        "output": torch.empty(1, cases, hidden, dtype=dtype),
        "product": torch.zeros(cases, 4 * hidden, dtype=dtype),
    }
    pointwise.CompiledSteps(library, of, "lstm").advance(0)
    return of["gates"][0], of["cells"][1], of["squashed"][0], of["output"][0]


def test_sigmoid_and_tanh_have_float32s_relative_accuracy(library):
    torch.manual_seed(0)
    x = torch.cat([torch.linspace(-85, 120, 20_001), torch.randn(999), 1e-3 * torch.randn(999), 1e-7 * torch.randn(99)])
    gates, *_ = forward(library, x.repeat(4)[None], torch.zeros(1, len(x)))
    i, f, g, o = gates[0].double().chunk(4)
    for found, expected in ((i, x.double().sigmoid()), (g, x.double().tanh())):
        error = (found - expected).abs()
        assert (error <= 3e-7 * expected.abs()).all()
    assert torch.equal(i, f)
    assert torch.equal(i, o)


def test_large_values_saturate_and_nan_stays_nan(library):
    inf = float("inf")
    x = torch.tensor([inf, 1e30, 89.0, -89.0, -1e30, -inf, float("nan")])
    gates, c, y, h = forward(library, x.repeat(4)[None], torch.zeros(1, 7))
    i, _, g, _ = gates[0].chunk(4)
    assert i[:3].tolist() == [1, 1, 1]
    assert g[:6].tolist() == [1, 1, 1, -1, -1, -1]
    assert (i[3:6] < 1e-37).all()
    assert all(z.flatten()[6].isnan() for z in (i, g, c, y, h))
    *_, c, y, h = forward(library, torch.full((1, 4), 100.0), torch.full((1, 1), inf))
    assert (c.item(), y.item(), h.item()) == (inf, 1, 1)


def test_bfloat16_outputs_are_rounded_as_torch_rounds(library):
    torch.manual_seed(0)
    gates, cell = torch.randn(50, 4 * 33), torch.randn(50, 33)
    cell[0, 0] = float("nan")
    exact, rounded = forward(library, gates, cell)[-1], forward(library, gates, cell, narrow=True)[-1]
    torch.testing.assert_close(rounded, exact.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("cases", "hidden"), [(1, 1), (3, 17), (150, 64)])
def test_one_step_and_its_gradients_equal_autograds_in_float64(library, cases, hidden, threads):
    torch.manual_seed(0)
    s, c_previous = torch.randn(cases, 4 * hidden), torch.randn(cases, hidden)
    d_output, product, d_cell = torch.randn(3, cases, hidden)
    leaves = [x.double().requires_grad_() for x in (s, c_previous)]
    i, f, g, o = leaves[0].chunk(4, -1)
    c = f.sigmoid() * leaves[1] + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    expected = torch.autograd.grad((h * (d_output + product)).sum() + (c * d_cell).sum(), leaves)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        gates, c_found, y, h_found = forward(library, s, c_previous)
        d_gates, dc = torch.empty(1, cases, 4 * hidden), d_cell.clone()
        of = {"gates": gates[None], "cells": torch.stack([c_previous, c_found]), "squashed": y[None]}
        of |= {"output": h_found[None], "product": product, "d_output": d_output[None].contiguous()}
        steps = pointwise.CompiledSteps(library, {**of, "d_gates": d_gates, "rounded": d_gates, "d_cell": dc}, "lstm")
        steps.retreat(0)
    finally:
        torch.set_num_threads(before)
    for found, exact in ((h_found, h), (c_found, c), (d_gates[0], expected[0]), (dc, expected[1])):
        torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=2e-6)


def test_other_dtypes_and_devices_are_left_to_torch(library):
    cpu = torch.device("cpu")
    assert pointwise.kernel_for(torch.float64, torch.float64, cpu) is None
    assert pointwise.kernel_for(torch.float32, torch.float16, cpu) is None
    assert pointwise.kernel_for(torch.float32, torch.float32, torch.device("meta")) is None
