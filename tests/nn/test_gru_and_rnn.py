"""`kfacrnn.nn.GRU` and `RNN` against torch's, and their taps against a plain loop differentiated case by case."""

from __future__ import annotations

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from kfacrnn.kfac.capture import Tape
from kfacrnn.nn import GRU, RNN, gru, recurrence, rnn

T, B, INPUTS, H = 5, 3, 4, 6
KINDS = {
    "GRU": (nn.GRU, GRU),
    "RNN": (nn.RNN, RNN),
    "rectified RNN": (partial(nn.RNN, nonlinearity="relu"), partial(RNN, nonlinearity="relu")),
}

each_kind = pytest.mark.parametrize("kind", KINDS)
each_dtype = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])


def twins(kind, dtype=torch.float64, **options):
    """torch's layer and ours with the same weights, ours with a tape."""
    torch.manual_seed(0)
    theirs, ours = (layer(INPUTS, H, dtype=dtype, **options) for layer in KINDS[kind])
    ours.load_state_dict(theirs.state_dict())
    ours.tape = Tape()
    return theirs, ours


def run(layer, x, state=None, weight_of_final_state=0.0):
    """Outputs, and gradients of a generic function of them, with respect to input, initial state and parameters."""
    x = x.clone().requires_grad_()
    state = None if state is None else state.clone().requires_grad_()
    output, h_n = layer(x, state)
    loss = output.square().sum() + weight_of_final_state * h_n.sin().sum()
    leaves = [x, *([] if state is None else [state]), *layer.parameters()]
    return [output, h_n, *torch.autograd.grad(loss, leaves)]


def assert_same(ours, theirs, tolerance):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@each_kind
@each_dtype
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_captured_values_and_gradients_equal_those_of_torch(kind, layers, bias, dtype, tolerance, path):
    theirs, ours = twins(kind, dtype, num_layers=layers, bias=bias)
    x, state = torch.randn(T, B, INPUTS, dtype=dtype), torch.randn(layers, B, H, dtype=dtype)
    assert_same(run(ours, x, state, 0.7), run(theirs, x, state, 0.7), tolerance)
    assert [tap.map for tap in ours.tape] == list(ours.maps())


@each_kind
def test_the_output_may_be_changed_in_place_where_torchs_may(kind, path):
    layers, x = twins(kind), torch.randn(T, B, INPUTS, dtype=torch.float64)
    found = []
    for layer in layers:
        output, _ = layer(x)
        output += 1
        found.append(torch.autograd.grad(output.square().sum(), list(layer.parameters())))
    assert_same(*found, 1e-12)


@each_kind
@each_dtype
@pytest.mark.parametrize("lengths", [None, (5, 3, 2), (3, 1, 4)], ids=str)
def test_both_directions_and_packed_sequences_equal_torchs(kind, lengths, dtype, tolerance, path):
    theirs, ours = twins(kind, dtype, num_layers=2, bidirectional=True)
    x, state = torch.randn(T, B, INPUTS, dtype=dtype), torch.randn(4, B, H, dtype=dtype)

    def packed(layer):
        def forward(x, state):
            if lengths is None:
                return layer(x, state)
            output, h_n = layer(pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False), state)
            return output.data, h_n

        forward.parameters = layer.parameters
        return forward

    assert_same(run(packed(ours), x, state, 0.7), run(packed(theirs), x, state, 0.7), tolerance)


@each_kind
@pytest.mark.parametrize("batch_first", [False, True])
def test_without_tape_results_are_torchs_bit_for_bit(kind, batch_first):
    theirs, ours = twins(kind, torch.float32, num_layers=2, batch_first=batch_first)
    ours.tape = None
    x, state = torch.randn(*((B, T) if batch_first else (T, B)), INPUTS), torch.randn(2, B, H)
    assert_same(run(ours, x, state, 0.7), run(theirs, x, state, 0.7), 0.0)
    assert_same(run(ours, x), run(theirs, x), 0.0)


@each_kind
def test_dropout_draws_the_same_mask_as_torch(kind, path):
    theirs, ours = twins(kind, torch.float32, num_layers=3, dropout=0.4)
    x, results = torch.randn(T, B, INPUTS), []
    for layer in (ours, theirs):
        torch.manual_seed(1)
        results.append(run(layer, x))
    assert_same(*results, 1e-5)
    ours.eval()
    assert not torch.allclose(run(ours, x)[0], results[0][0])
    assert_same(run(ours, x), run(theirs.eval(), x), 1e-5)


@each_kind
def test_batch_first_changes_inputs_and_outputs_but_not_the_layout_of_the_taps(kind):
    theirs, ours = twins(kind, num_layers=2, batch_first=True)
    x, state = torch.randn(B, T, INPUTS, dtype=torch.float64), torch.randn(2, B, H, dtype=torch.float64)
    assert_same(run(ours, x, state, 0.7), run(theirs, x, state, 0.7), 1e-12)
    torch.testing.assert_close(ours.tape[0].a[..., :INPUTS], x.transpose(0, 1))
    assert {tuple(tap.s.shape[:2]) for tap in ours.tape} == {(T, B)}


@each_kind
@pytest.mark.parametrize("steps", [1, 2])
def test_short_sequences_have_torchs_gradients(kind, steps):
    theirs, ours = twins(kind)
    x, state = torch.randn(steps, B, INPUTS, dtype=torch.float64), torch.randn(1, B, H, dtype=torch.float64)
    assert_same(run(ours, x, state, 0.7), run(theirs, x, state, 0.7), 1e-12)


@each_kind
def test_an_initial_state_of_any_strides_is_taken_as_it_is(kind, path):
    theirs, ours = twins(kind, torch.float32)
    x, state = torch.randn(T, B, INPUTS), torch.randn(1, H, B).transpose(1, 2)
    assert_same(run(ours, x, state), run(theirs, x, state), 1e-5)


@each_kind
def test_an_exploding_run_shows(kind, path):
    _, ours = twins(kind, torch.float32)
    x = torch.randn(T, B, INPUTS)
    x[2, 0, 0] = float("nan")
    output, _ = ours(x)
    assert output[:2].isfinite().all()
    assert output[2:, 0].isnan().all()
    assert output[:, 1:].isfinite().all()


# ---- taps ------------------------------------------------------------------------------------------------------------


def gru_loop(layer, x):
    """One case, one step at a time, straight from torch's documentation: outputs, and (a_t, s_t) per layer and map."""
    maps = []
    for W_x, W_h, *biases in layer.all_weights:
        (W_ir, W_iz, W_in), (W_hr, W_hz, W_hn) = W_x.chunk(3), W_h.chunk(3)
        b_ir, b_iz, b_in, b_hr, b_hz, b_hn = torch.cat(biases).chunk(6) if biases else [0.0] * 6
        h, outputs, seen = x[0].new_zeros(H), [], ([], [], [])
        for x_t in x:
            s_r, s_z = W_ir @ x_t + b_ir + W_hr @ h + b_hr, W_iz @ x_t + b_iz + W_hz @ h + b_hz
            s_n, u = W_in @ x_t + b_in, W_hn @ h + b_hn
            for where, a, s in zip(seen, (torch.cat([x_t, h]), x_t, h), ((s_r, s_z), (s_n,), (u,)), strict=True):
                where.append((a.detach(), s))
            r, z = s_r.sigmoid(), s_z.sigmoid()
            n = (s_n + r * u).tanh()
            h = (1 - z) * n + z * h
            outputs.append(h)
        x = outputs
        maps += seen
    return torch.stack(x), maps


def rnn_loop(activation, layer, x):
    maps = []
    for W_x, W_h, *biases in layer.all_weights:
        h, outputs, seen = x[0].new_zeros(H), [], []
        for x_t in x:
            s = sum(biases, W_x @ x_t + W_h @ h)
            seen.append((torch.cat([x_t, h]).detach(), (s,)))
            h = activation(s)
            outputs.append(h)
        x = outputs
        maps.append(seen)
    return torch.stack(x), maps


LOOPS = {"GRU": gru_loop, "RNN": partial(rnn_loop, torch.tanh), "rectified RNN": partial(rnn_loop, torch.relu)}


@each_kind
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_taps_equal_the_gradients_of_every_case_and_step(kind, bias, frozen):
    _, ours = twins(kind, num_layers=2, bias=bias)
    x, target = torch.randn(T, B, INPUTS, dtype=torch.float64), torch.randn(T, B, H, dtype=torch.float64)
    ours.requires_grad_(not frozen)
    output, _ = ours(x)
    captured = torch.autograd.grad((output - target).square().sum(), [tap.s for tap in ours.tape])
    ours.requires_grad_()
    for case in range(B):
        output, maps = LOOPS[kind](ours, list(x[:, case]))
        loss = (output - target[:, case]).square().sum()
        for tap, g, seen in zip(ours.tape, captured, maps, strict=True):
            found = [torch.cat(torch.autograd.grad(loss, s, retain_graph=True)) for _, s in seen]
            torch.testing.assert_close(tap.a[:, case], torch.stack([a for a, _ in seen]), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(g[:, case], torch.stack(found), rtol=1e-12, atol=1e-12)


@each_kind
def test_taps_add_up_to_torchs_weight_gradients(kind, path):
    theirs, ours = twins(kind, torch.float32, num_layers=2)
    x = torch.randn(T, B, INPUTS)
    captured = torch.autograd.grad(ours(x)[0].square().sum(), [tap.s for tap in ours.tape])
    theirs(x)[0].square().sum().backward()
    names = {parameter: name for name, parameter in ours.named_parameters()}
    found = {name: torch.full_like(parameter, torch.nan) for name, parameter in theirs.named_parameters()}
    for tap, g in zip(ours.tape, captured, strict=True):
        gradient = torch.einsum("tbo,tbi->oi", g, tap.a)
        for weight, part in zip(tap.map.weights, gradient.split([w.shape[1] for w in tap.map.weights], 1), strict=True):
            found[names[weight]][tap.map.rows] = part
        for bias in tap.map.biases:
            found[names[bias]][tap.map.rows] = g.sum((0, 1))
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("module", "kind"), [(gru, "GRU"), (rnn, "RNN")])
def test_the_gradient_of_weight_hh_is_computed_only_if_it_is_asked_for(module, kind, monkeypatch, path):
    _, ours = twins(kind, torch.float32, num_layers=2)
    computed, real = [], module.recurrent_weight_gradient
    monkeypatch.setattr(module, "recurrent_weight_gradient", lambda *a: (computed.append(1), real(*a))[1])
    output, _ = ours(torch.randn(T, B, INPUTS))
    torch.autograd.grad(output.sum(), [tap.s for tap in ours.tape], retain_graph=True)
    assert computed == []
    torch.autograd.grad(output.sum(), ours.weight_hh_l1)
    assert computed == [1]


@pytest.mark.parametrize(("module", "kind"), [(gru, "GRU"), (rnn, "RNN")])
def test_a_pass_is_freed_without_the_garbage_collector(module, kind, monkeypatch, path):
    passes = []

    class Watched(recurrence.Postponed):
        def __init__(self):
            passes.append(weakref.ref(self))

    monkeypatch.setattr(module, "Postponed", Watched)
    _, ours = twins(kind, torch.float32)
    gc.disable()
    try:
        loss = ours(torch.randn(T, B, INPUTS), torch.randn(1, B, H, requires_grad=True))[0].sum()
        torch.autograd.grad(loss, ours.tape[0].s, retain_graph=True)
        assert passes[0]() is not None
        del loss
        assert passes[0]() is None
    finally:
        gc.enable()


def test_the_steps_of_a_gru_are_the_same_on_several_threads(path):
    _, ours = twins("GRU", torch.float32)
    x, found, threads = torch.randn(3, 1500, INPUTS), [], torch.get_num_threads()  # 1500 · H > SMALL of pointwise.c
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            ours.tape = Tape()
            output, _ = ours(x)
            found.append([output, *torch.autograd.grad(output.square().sum(), [tap.s for tap in ours.tape])])
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@each_kind
def test_the_graph_survives_several_backward_passes_but_has_no_second_derivatives(kind, path):
    _, ours = twins(kind, torch.float32, num_layers=2)
    loss = ours(torch.randn(T, B, INPUTS))[0].square().sum()
    leaves = [*ours.parameters(), *(tap.s for tap in ours.tape)]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves, retain_graph=True)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(loss, ours.weight_hh_l0, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


# ---- bfloat16 --------------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("state_given", [False, True])
def test_under_bfloat16_autocast_results_are_close_to_torchs_and_taps_are_float32(kind, state_given, path):
    theirs, ours = twins(kind, torch.float32, num_layers=2)
    x, state = torch.randn(T, B, INPUTS), torch.randn(2, B, H) if state_given else None
    with torch.autocast("cpu", torch.bfloat16):
        mine, reference = run(ours, x, state), run(theirs, x, state)
        probes = [tap.s for tap in ours.tape]
        ours(x, state)[0].float().sum().backward()
    assert [each.dtype for each in mine] == [each.dtype for each in reference]
    assert all((a - b).norm() < 0.03 * b.norm() for a, b in zip(mine, reference, strict=True))
    assert {probe.dtype for probe in probes} == {torch.float32}
    assert ours.tape[-1].s.grad.dtype == torch.float32


@each_kind
def test_taps_under_bfloat16_autocast_are_close_to_those_of_float32(kind, path):
    _, ours = twins(kind, torch.float32, num_layers=2)
    x, found = torch.randn(T, B, INPUTS), []
    for enabled in (False, True):
        ours.tape = Tape()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = ours(x)[0].float().square().sum()
        found.append([*torch.autograd.grad(loss, [tap.s for tap in ours.tape]), *(tap.a for tap in ours.tape)])
    assert all((rounded - exact).norm() < 0.03 * exact.norm() for exact, rounded in zip(*found, strict=True))


@each_kind
def test_a_bfloat16_model_has_float32_taps(kind, path):
    _, ours = twins(kind, torch.bfloat16)
    output, _ = ours(torch.randn(T, B, INPUTS, dtype=torch.bfloat16))
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert {tap.s.grad.dtype for tap in ours.tape} == {torch.float32}


# ---- what they are besides -------------------------------------------------------------------------------------------


def test_a_gru_has_two_gates_with_shared_inputs_and_a_candidate_of_two_maps():
    layer = GRU(INPUTS, H, num_layers=2)
    names = ["l0", "l0.ih", "l0.hh", "l1", "l1.ih", "l1.hh"]
    assert [map.name for map in layer.maps()] == names
    gates, from_x, from_h = layer.maps()[3:]
    assert [*gates.splits.items()] == [("r", H), ("z", H)]
    assert [*from_x.splits.items()] == [*from_h.splits.items()] == [("n", H)]
    W_x, W_h, b_x, b_h = layer.all_weights[1]
    assert all(a is b for a, b in zip(gates.parameters, (W_x, W_h, b_x, b_h), strict=True))
    assert all(a is b for a, b in zip((*from_x.parameters, *from_h.parameters), (W_x, b_x, W_h, b_h), strict=True))
    assert (gates.rows, from_x.rows, from_h.rows) == (slice(2 * H), slice(2 * H, 3 * H), slice(2 * H, 3 * H))


@each_kind
def test_maps_stay_the_same_objects_until_a_parameter_is_replaced(kind):
    _, layer = twins(kind)
    before = layer.maps()
    layer.to(torch.float32)
    assert layer.maps() == before
    layer.weight_hh_l0 = nn.Parameter(torch.zeros_like(layer.weight_hh_l0))
    assert layer.maps()[0].weights[1] is layer.weight_hh_l0


@each_kind
def test_state_dicts_are_torchs_and_a_copy_has_no_tape(kind):
    theirs, ours = twins(kind, num_layers=2)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert copy.deepcopy(ours).tape is None


@each_kind
def test_what_cannot_be_captured_is_refused_by_name_and_works_without_tape(kind):
    name = kind.split()[-1]
    layer, x = KINDS[kind][1](INPUTS, H), torch.randn(T, B, INPUTS)
    assert layer(x[:, 0])[0].shape == (T, H)
    layer.tape = Tape()
    with pytest.raises(ValueError, match=f"kfacrnn.nn.{name} cannot be captured on unbatched input"):
        layer(x[:, 0])
    with pytest.raises(RuntimeError, match="input_size"):
        layer(torch.randn(T, B, INPUTS + 1))
    with pytest.raises(RuntimeError, match="hidden"):
        layer(x, torch.zeros(1, B, H + 1))


@each_kind
def test_a_compiled_model_gives_the_same_results_without_complaint(kind, recwarn):
    _, ours = twins(kind, torch.float32)
    ours.tape = None
    model, x = nn.Sequential(nn.Linear(INPUTS, INPUTS), ours), torch.randn(T, B, INPUTS)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x)[0], model(x)[0])
    assert not [warning for warning in recwarn if "Dynamo" in str(warning.message)]
