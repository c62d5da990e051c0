"""`kfacrnn.nn.Linear` against `torch.nn.Linear`, where its backward pass is its own and where it is torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kfacrnn import nn as own
from kfacrnn.kfac.aligned import LINE
from kfacrnn.kfac.capture import Recorder
from kfacrnn.nn import linear as module

LARGE = (4, 150, 450), 640
SIZES = [
    LARGE,
    ((600, 450), 640),
    ((4, 150, 448), 640),
    ((2, 3, 5), 7),
    ((700, 451), 3),
    ((3, 450), 640),
    ((450,), 640),
    ((0, 450), 640),
]


def twins(dtype, inputs, outputs, **options):
    torch.manual_seed(5)
    theirs, ours = (layer(inputs, outputs, dtype=dtype, **options) for layer in (nn.Linear, own.Linear))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def gradients(layer, x):
    x = x.clone().requires_grad_()
    weights = torch.linspace(-1, 1, layer.out_features, dtype=x.dtype)
    output = layer(x)
    loss = (output.square() * weights).sum()
    loss.backward()
    return output, x.grad, *(parameter.grad for parameter in layer.parameters())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "outputs"), SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-3)])
def test_results_and_gradients_are_those_of_torch(dtype, tolerance, shape, outputs, bias):
    theirs, ours = twins(dtype, shape[-1], outputs, bias=bias)
    x = torch.randn(shape, dtype=dtype)
    for expected, found in zip(gradients(theirs, x), gradients(ours, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert all(parameter.grad.is_contiguous() for parameter in ours.parameters())


def test_rows_of_large_gradients_begin_at_cache_lines():
    shape, outputs = LARGE
    _, layer = twins(torch.float32, shape[-1], outputs)
    x = torch.randn(shape, requires_grad=True)
    for gradient in torch.autograd.grad(layer(x).square().sum(), [x, layer.weight]):
        assert gradient.stride(-2) * gradient.element_size() % LINE == 0


def test_gradients_add_up_over_passes_and_a_graph_survives_several():
    shape, outputs = LARGE
    theirs, ours = twins(torch.float64, shape[-1], outputs)
    x = torch.randn(shape, dtype=torch.float64)
    for layer in (theirs, ours):
        loss = layer(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)


def test_a_gradient_is_computed_only_if_it_is_asked_for(monkeypatch):
    shape, outputs = LARGE
    _, layer = twins(torch.float32, shape[-1], outputs)
    made = []
    monkeypatch.setattr(module, "product", lambda X, Y: (made.append((*X.shape[:-1], Y.shape[-1])), X @ Y)[1])
    of_x, of_weight = (600, 450), (640, 450)

    x = torch.randn(shape, requires_grad=True)
    torch.autograd.grad(layer(x).sum(), x)
    assert made == [of_x]
    made.clear()
    layer(x.detach()).sum().backward()
    assert made == [of_weight]
    made.clear()
    layer.requires_grad_(False)
    layer(x).sum().backward()
    assert made == [of_x]


def test_autocast_leaves_it_to_torch():
    shape, outputs = LARGE
    theirs, ours = twins(torch.float32, shape[-1], outputs)
    x = torch.randn(shape)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = gradients(theirs, x), gradients(ours, x)
    assert found[0].dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_it_can_be_captured():
    shape, outputs = LARGE
    _, layer = twins(torch.float32, shape[-1], outputs)
    recorder = Recorder(layer)
    with recorder.recording() as tape:
        output = layer(torch.randn(shape))
    (g,) = torch.autograd.grad(output.square().sum(), tape[0].s)
    torch.testing.assert_close(g, 2 * output)


def test_a_compiled_model_has_torchs():
    shape, outputs = LARGE
    theirs, ours = twins(torch.float32, shape[-1], outputs)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    x = torch.randn(shape)
    with torch.no_grad():
        assert torch.equal(compiled(x), theirs(x))
