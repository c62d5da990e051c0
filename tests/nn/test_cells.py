"""`kfacrnn.nn.LSTMCell`, `GRUCell` and `RNNCell` against torch's. Their taps: `tests/kfac/test_estimator.py`."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from kfacrnn.kfac.capture import Tape
from kfacrnn.nn import GRUCell, LSTMCell, RNNCell

T, B, INPUTS, H = 5, 3, 4, 6
KINDS = {
    "LSTM": (nn.LSTMCell, LSTMCell, ["cell"]),
    "GRU": (nn.GRUCell, GRUCell, ["cell", "cell.ih", "cell.hh"]),
    "RNN": (nn.RNNCell, RNNCell, ["cell"]),
    "rectified RNN": (partial(nn.RNNCell, nonlinearity="relu"), partial(RNNCell, nonlinearity="relu"), ["cell"]),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def twins(kind, dtype=torch.float64, **options):
    """torch's cell and ours with the same weights, ours with a tape."""
    torch.manual_seed(0)
    theirs, ours = (cell(INPUTS, H, dtype=dtype, **options) for cell in KINDS[kind][:2])
    ours.load_state_dict(theirs.state_dict())
    ours.tape = Tape()
    return theirs, ours


def run(cell, x, state=None):
    """All outputs, and gradients of a generic function of them, with respect to input and parameters."""
    x, outputs = x.clone().requires_grad_(), []
    for x_t in x:
        state = cell(x_t, state)
        outputs += state if isinstance(state, tuple) else [state]
    loss = sum(h.sin().sum() for h in outputs)
    return [*outputs, *torch.autograd.grad(loss, [x, *cell.parameters()])]


@each_kind
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("bias", [True, False])
def test_captured_values_and_gradients_equal_those_of_torch(kind, bias, dtype, tolerance):
    theirs, ours = twins(kind, dtype, bias=bias)
    x, h = torch.randn(T, B, INPUTS, dtype=dtype), torch.randn(B, H, dtype=dtype)
    for state in (None, (h, h.sin()) if kind == "LSTM" else h):
        torch.testing.assert_close(run(ours, x, state), run(theirs, x, state), rtol=tolerance, atol=tolerance)
    assert len(ours.tape) == 2 * T * len(KINDS[kind][2])


@each_kind
def test_without_tape_results_are_torchs_bit_for_bit(kind):
    theirs, ours = twins(kind, torch.float32)
    ours.tape = None
    x = torch.randn(T, B, INPUTS)
    torch.testing.assert_close(run(ours, x), run(theirs, x), rtol=0, atol=0)


@each_kind
def test_under_bfloat16_autocast_taps_are_float32_and_results_close(kind):
    theirs, ours = twins(kind, torch.float32)
    x = torch.randn(T, B, INPUTS)
    with torch.autocast("cpu", torch.bfloat16):
        results, reference = run(ours, x), run(theirs, x)
    torch.testing.assert_close(results, reference, rtol=0.1, atol=0.1)
    assert {tap.s.dtype for tap in ours.tape} == {torch.float32}


@each_kind
def test_a_captured_loop_keeps_one_copy_of_the_weights(kind):
    _, ours = twins(kind)
    kept = {}

    def pack(tensor):
        if tensor.shape[-1] in (INPUTS, H, INPUTS + H) and tensor.shape[0] != B:
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(ours, torch.randn(T, B, INPUTS, dtype=torch.float64))
    assert sum(kept.values()) <= sum(p.numel() for p in ours.parameters()) + T * B * INPUTS


@each_kind
def test_maps_stay_the_same_objects_and_a_copy_has_its_own(kind):
    _, ours = twins(kind)
    assert [map.name for map in ours.maps()] == KINDS[kind][2]
    assert ours.maps() == ours.maps()
    twin = copy.deepcopy(ours)
    assert twin.tape is None
    assert twin.maps()[0].weights[0] is twin.weight_ih


@each_kind
def test_unbatched_input_is_refused_by_name_and_works_without_tape(kind):
    _, ours = twins(kind)
    x = torch.randn(INPUTS, dtype=torch.float64)
    name = type(ours).__name__
    with pytest.raises(ValueError, match=rf"kfacrnn\.nn\.{name} can be captured on \[B, input_size\] only, got \[4\]"):
        ours(x)
    ours.tape = None
    ours(x)
