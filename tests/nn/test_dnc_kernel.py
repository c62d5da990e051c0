"""What the DNC's compiled steps add to the plain ones; test_dnc.py holds the numbers of both against its oracle."""

from __future__ import annotations

import pytest
import torch

from kfacrnn.kfac.capture import Tape
from kfacrnn.nn import DNC, compiler, dnc, dnc_kernel, pointwise

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def available():
    if dnc_kernel.kernel_for(torch.float32, CPU) is None:
        pytest.skip(pointwise.status())


def make(**sizes):
    torch.manual_seed(0)
    model = DNC(6, 5, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, torch.randint(2, (22, 16, 6)).float(), torch.randn(22, 16, 5)


def evaluate(model, x, weights):
    """Logits, and the gradients of input and parameters."""
    x = x.clone().requires_grad_()
    logits = model(x)
    return [logits, *torch.autograd.grad((weights * logits).sum(), [x, *model.parameters()])]


@pytest.mark.parametrize("write_heads", [1, 2])
def test_float32_agrees_with_plain_steps_in_float64_to_its_rounding(monkeypatch, write_heads):
    model, x, weights = make(write_heads=write_heads)
    found = evaluate(model, x, weights)
    monkeypatch.setattr(dnc, "kernel_for", lambda *_: None)
    for single, double in zip(found, evaluate(model.double(), x.double(), weights.double()), strict=True):
        assert (single - double).abs().max() < 1e-5 * double.abs().max()


def test_without_gradients_the_logits_are_the_same():
    model, x, _ = make()
    logits = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), logits)


def test_cases_may_be_shared_among_threads():
    model, x, weights = make(slots=7, word=5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = evaluate(model, x, weights)
        torch.set_num_threads(3)
        together = evaluate(model, x, weights)
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(alone, together, strict=True):
        assert (one - three).abs().max() < 1e-5 * one.abs().max()


def test_one_forward_pass_can_have_two_backward_passes():
    model, x, weights = make()
    loss = (weights * model(x)).sum()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_a_pass_for_the_statistics_computes_no_gradients_of_weights(monkeypatch):
    model, x, weights = make()
    model.tape = Tape()
    loss = (weights * model(x)).sum()
    monkeypatch.setattr(dnc_kernel._Products, "backward", None)
    assert all(g.any() for g in torch.autograd.grad(loss, [tap.s for tap in model.tape]))


def test_a_second_derivative_is_refused():
    model, x, weights = make()
    gradient, *_ = torch.autograd.grad((weights * model(x)).sum(), list(model.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_nan_reaches_logits_and_gradients():
    model, x, weights = make()
    x[3, 2, 0] = float("nan")
    logits, _, gradient, *_ = evaluate(model, x, weights)
    assert logits[3:, 2].isnan().all()
    assert logits[:3].isfinite().all()
    assert logits[:, 3:].isfinite().all()
    assert gradient.isnan().any()


def test_other_dtypes_and_devices_are_left_to_torch():
    assert dnc_kernel.kernel_for(torch.bfloat16, CPU) is None
    assert dnc_kernel.kernel_for(torch.float32, torch.device("meta")) is None


def test_torch_compile_takes_the_plain_steps():
    model, x, _ = make(hidden=4, slots=2, word=2, read_heads=1)
    found = torch.compile(model, backend="eager", fullgraph=True)(x[:2])
    torch.testing.assert_close(found, model(x[:2]))


def test_without_a_compiler_the_steps_are_torchs(tmp_path, monkeypatch):
    model, x, weights = make()
    expected = evaluate(model, x, weights)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler._decide.cache_clear()
    try:
        assert dnc_kernel.kernel_for(torch.float32, CPU) is None
        found = evaluate(model, x, weights)
    finally:
        compiler._decide.cache_clear()
    for plain, compiled in zip(found, expected, strict=True):
        assert (plain - compiled).abs().max() < 1e-5 * compiled.abs().max()
