"""`kfacrnn.nn.LSTM` against `torch.nn.LSTM`, and its taps against a plain loop differentiated case by case."""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from kfacrnn.kfac.capture import Tape
from kfacrnn.nn import LSTM
from kfacrnn.nn import lstm as own
from kfacrnn.nn import recurrence as shared

T, B, INPUTS, H = 5, 3, 4, 6


def twins(dtype=torch.float64, **options):
    """torch's layer and ours with the same weights, ours with a tape."""
    torch.manual_seed(0)
    theirs = nn.LSTM(INPUTS, H, dtype=dtype, **options)
    ours = LSTM(INPUTS, H, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    ours.tape = Tape()
    return theirs, ours


def run(layer, x, state=None, weight_of_final_state=0.0):
    """Outputs, and gradients of a generic function of them, with respect to input, initial state and parameters."""
    x = x.clone().requires_grad_()
    state = None if state is None else tuple(s.clone().requires_grad_() for s in state)
    output, (h_n, c_n) = layer(x, state)
    loss = output.square().sum() + weight_of_final_state * (h_n.sin().sum() + c_n.cos().sum())
    leaves = [x, *(state or ()), *layer.parameters()]
    return [output, h_n, c_n], torch.autograd.grad(loss, leaves)


def assert_same(ours, theirs, tolerance):
    for mine, reference in zip((*ours[0], *ours[1]), (*theirs[0], *theirs[1]), strict=True):
        torch.testing.assert_close(mine, reference, rtol=tolerance, atol=tolerance)


def initial_state(layers, dtype=torch.float64):
    return torch.randn(layers, B, H, dtype=dtype), torch.randn(layers, B, H, dtype=dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_captured_values_and_gradients_equal_those_of_torch(layers, bias, dtype, tolerance, path):
    theirs, ours = twins(dtype, num_layers=layers, bias=bias)
    x, state = torch.randn(T, B, INPUTS, dtype=dtype), initial_state(layers, dtype)
    assert_same(run(ours, x, state, 0.7), run(theirs, x, state, 0.7), tolerance)
    assert len(ours.tape) == layers


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("layers", [1, 2])
def test_both_directions_equal_torchs(layers, dtype, tolerance, path):
    theirs, ours = twins(dtype, num_layers=layers, bidirectional=True)
    x, state = torch.randn(T, B, INPUTS, dtype=dtype), initial_state(2 * layers, dtype)
    assert_same(run(ours, x, state, 0.7), run(theirs, x, state, 0.7), tolerance)
    assert [tap.map.name for tap in ours.tape] == [f"l{k}{way}" for k in range(layers) for way in ("", "_reverse")]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("lengths", [(5, 3, 2), (2, 5, 2), (3, 1, 4)], ids=str)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_packed_sequence_is_taken_as_torch_takes_it(bidirectional, lengths, dtype, tolerance, path):
    theirs, ours = twins(dtype, num_layers=2, bidirectional=bidirectional, batch_first=True)
    x, state = torch.randn(T, B, INPUTS, dtype=dtype), initial_state(4 if bidirectional else 2, dtype)

    def packed(layer):
        def forward(x, state):
            given = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=lengths == (5, 3, 2))
            output, state = layer(given, state)
            for mine, reference in zip(output[1:], given[1:], strict=True):
                assert mine is reference
            return output.data, state

        forward.parameters = layer.parameters
        return forward

    assert_same(run(packed(ours), x, state, 0.7), run(packed(theirs), x, state, 0.7), tolerance)
    assert_same(run(packed(ours), x), run(packed(theirs), x), tolerance)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_tape_results_are_torchs_bit_for_bit(dtype, batch_first, path):
    theirs, ours = twins(dtype, num_layers=2, batch_first=batch_first)
    ours.tape = None
    x, state = torch.randn(*((B, T) if batch_first else (T, B)), INPUTS, dtype=dtype), initial_state(2, dtype)
    assert_same(run(ours, x, state, 0.7), run(theirs, x, state, 0.7), 0.0)
    assert_same(run(ours, x), run(theirs, x), 0.0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_dropout_draws_the_same_mask_as_torch(dtype, tolerance, path):
    theirs, ours = twins(dtype, num_layers=3, dropout=0.4)
    x = torch.randn(T, B, INPUTS, dtype=dtype)
    results = []
    for layer in (ours, theirs):
        torch.manual_seed(1)
        results.append(run(layer, x))
    assert_same(*results, tolerance)
    ours.eval()
    assert not torch.allclose(run(ours, x)[0][0], results[0][0][0])
    assert_same(run(ours, x), run(theirs.eval(), x), tolerance)


def test_batch_first_changes_inputs_and_outputs_but_not_the_layout_of_the_taps():
    theirs, ours = twins(num_layers=2, batch_first=True)
    x, state = torch.randn(B, T, INPUTS, dtype=torch.float64), initial_state(2)
    assert_same(run(ours, x, state, 0.7), run(theirs, x, state, 0.7), 1e-12)
    first, second = ours.tape
    torch.testing.assert_close(first.a[..., :INPUTS], x.transpose(0, 1))
    assert first.s.shape == second.s.shape == (T, B, 4 * H)


@pytest.mark.parametrize("steps", [1, 2])
def test_short_sequences_have_torchs_gradients(steps):
    theirs, ours = twins()
    x, state = torch.randn(steps, B, INPUTS, dtype=torch.float64), initial_state(1)
    assert_same(run(ours, x, state, 0.7), run(theirs, x, state, 0.7), 1e-12)


def test_an_exploding_run_shows(path):
    _, ours = twins(torch.float32)
    x = torch.randn(T, B, INPUTS)
    x[1, 0, 0] = float("inf")
    output, _ = ours(x)
    assert output[0].isfinite().all()
    assert output[:, 1:].isfinite().all()
    x[2, 0, 0] = float("nan")
    output, _ = ours(x)
    assert output[2:, 0].isnan().all()
    assert output[:, 1:].isfinite().all()


def plain_loop(layer, x, case):
    """One case, one step at a time, straight from the LSTM equations: outputs, and a_t and s_t per layer and step."""
    inputs, inputs_seen, pre_activations = list(x[:, case]), [], []
    for weight_ih, weight_hh, *biases in layer.all_weights:
        h, c = x.new_zeros(H), x.new_zeros(H)
        outputs, a, s = [], [], []
        for x_t in inputs:
            a.append(torch.cat([x_t, h]))
            s.append(sum(biases, weight_ih @ x_t + weight_hh @ h))
            i, f, g, o = s[-1].chunk(4)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        inputs, inputs_seen, pre_activations = outputs, [*inputs_seen, a], [*pre_activations, s]
    return torch.stack(inputs), inputs_seen, pre_activations


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_taps_equal_the_gradients_of_every_case_and_step(bias, frozen):
    _, ours = twins(num_layers=2, bias=bias)
    x, target = torch.randn(T, B, INPUTS, dtype=torch.float64), torch.randn(T, B, H, dtype=torch.float64)
    for parameter in ours.parameters():
        parameter.requires_grad_(not frozen)
    output, _ = ours(x)
    captured = torch.autograd.grad((output - target).square().sum(), [tap.s for tap in ours.tape])
    assert [tap.map for tap in ours.tape] == list(ours.maps())
    for parameter in ours.parameters():
        parameter.requires_grad_()
    for case in range(B):
        output, inputs_seen, pre_activations = plain_loop(ours, x, case)
        loss = (output - target[:, case]).square().sum()
        for tap, g, a, s in zip(ours.tape, captured, inputs_seen, pre_activations, strict=True):
            expected = torch.stack(torch.autograd.grad(loss, s, retain_graph=True))
            torch.testing.assert_close(tap.a[:, case], torch.stack(a), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(g[:, case], expected, rtol=1e-12, atol=1e-12)


def test_the_graph_survives_several_backward_passes(path):
    _, ours = twins(torch.float32, num_layers=2)
    output, _ = ours(torch.randn(T, B, INPUTS))
    leaves = [*ours.parameters(), *(tap.s for tap in ours.tape)]
    first = torch.autograd.grad(output.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(output.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_gradient_of_weight_hh_is_computed_only_if_it_is_asked_for(monkeypatch, path):
    _, ours = twins(torch.float32, num_layers=2)
    computed = []
    real = own.recurrent_weight_gradient
    monkeypatch.setattr(own, "recurrent_weight_gradient", lambda *a: (computed.append(1), real(*a))[1])
    output, _ = ours(torch.randn(T, B, INPUTS))
    torch.autograd.grad(output.sum(), [tap.s for tap in ours.tape], retain_graph=True)
    assert computed == []
    torch.autograd.grad(output.sum(), ours.weight_hh_l1)
    assert computed == [1]


def test_a_pass_is_freed_without_the_garbage_collector(monkeypatch, path):
    passes = []

    class Watched(shared.Postponed):
        def __init__(self):
            passes.append(weakref.ref(self))

    monkeypatch.setattr(own, "Postponed", Watched)
    _, ours = twins(torch.float32)
    gc.disable()
    try:
        loss = ours(torch.randn(T, B, INPUTS))[0].sum()
        torch.autograd.grad(loss, ours.tape[0].s, retain_graph=True)
        assert passes[0]() is not None
        del loss
        assert passes[0]() is None
    finally:
        gc.enable()


def test_second_derivatives_are_refused_not_wrong(path):
    _, ours = twins(torch.float32)
    loss = ours(torch.randn(T, B, INPUTS))[0].square().sum()
    (gradient,) = torch.autograd.grad(loss, ours.weight_hh_l0, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_torch_func_works_without_tape():
    theirs, ours = twins(torch.float32)
    ours.tape = None
    x = torch.randn(T, B, INPUTS)

    def gradients(layer):
        parameters = dict(layer.named_parameters())
        return torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,))[0].square().sum())(parameters)

    torch.testing.assert_close(gradients(ours), gradients(theirs))


def test_the_recurrence_passes_gradcheck():
    torch.manual_seed(0)
    shapes = [(3, 2, 8), (3, 2, 8), (8, 2), (2, 2), (2, 2)]
    arguments = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    with torch.no_grad():
        arguments[1].zero_()

    def recurrence(inputs, probe, *rest):
        return own.recur(inputs + probe, torch.zeros_like(probe), *rest)

    assert torch.autograd.gradcheck(recurrence, arguments)


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("state_given", [False, True])
def test_under_bfloat16_autocast_results_are_close_to_torchs_and_taps_are_float32(state_given, path):
    theirs, ours = twins(torch.float32, num_layers=2)
    x, state = torch.randn(T, B, INPUTS), initial_state(2, torch.float32) if state_given else None
    with torch.autocast("cpu", torch.bfloat16):
        mine, reference = run(ours, x, state), run(theirs, x, state)
        probes = [tap.s for tap in ours.tape[-2:]]
        ours(x, state)[0].float().sum().backward()
    assert all(
        a.dtype == b.dtype for a, b in zip(mine[0] + list(mine[1]), reference[0] + list(reference[1]), strict=True)
    )
    assert_same(mine, reference, 0.05)
    assert all(probe.dtype == torch.float32 for probe in probes)
    assert ours.tape[-1].s.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_runs_where_onednn_has_no_kernels_for_the_processor(dtype, monkeypatch):
    monkeypatch.setattr("kfacrnn.nn.recurrence.has_half_precision_kernels", lambda dtype, device: dtype.itemsize == 4)
    _, ours = twins(torch.float32)
    ours.tape = None
    x = torch.randn(T, B, INPUTS)
    exact = run(ours, x)
    with torch.autocast("cpu", dtype):
        rounded = run(ours, x)
    assert_same(rounded, exact, 0.05)
    assert torch.backends.mkldnn.enabled


def test_a_bfloat16_model_has_float32_taps(path):
    _, ours = twins(torch.bfloat16)
    output, _ = ours(torch.randn(T, B, INPUTS, dtype=torch.bfloat16))
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert ours.tape[0].s.grad.dtype == torch.float32


def test_probes_take_up_no_memory():
    _, ours = twins()
    ours(torch.randn(T, B, INPUTS, dtype=torch.float64))
    assert ours.tape[0].s.untyped_storage().nbytes() == 8


def test_state_dicts_are_interchangeable_with_torchs():
    theirs, ours = twins(num_layers=2)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    nn.init.ones_(ours.weight_hh_l1)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs.weight_hh_l1, torch.ones(4 * H, H, dtype=torch.float64))


def test_maps_name_the_gates_and_the_parameters_of_each_layer():
    layer = LSTM(INPUTS, H, num_layers=2)
    first, second = layer.maps()
    assert (first.name, second.name) == ("l0", "l1")
    assert [*first.splits.items()] == [("i", H), ("f", H), ("g", H), ("o", H)]
    assert first.weights[0] is layer.weight_ih_l0
    assert second.weights[1] is layer.weight_hh_l1
    assert second.biases[0] is layer.bias_ih_l1
    assert second.biases[1] is layer.bias_hh_l1
    assert LSTM(INPUTS, H, bias=False).maps()[0].biases == ()


def test_maps_stay_the_same_objects_until_a_parameter_is_replaced():
    layer = LSTM(INPUTS, H)
    before = layer.maps()
    layer.to(torch.float64)
    assert layer.maps() == before
    layer.weight_hh_l0 = nn.Parameter(torch.zeros(4 * H, H, dtype=torch.float64))
    assert layer.maps()[0].weights[1] is layer.weight_hh_l0


def test_a_copy_has_maps_of_its_own_parameters_and_no_tape():
    _, ours = twins()
    x = torch.randn(T, B, INPUTS, dtype=torch.float64)
    ours(x)
    twin = copy.deepcopy(ours)
    assert twin.tape is None
    assert twin.maps()[0].weights[0] is twin.weight_ih_l0
    torch.testing.assert_close(twin(x)[0], ours(x)[0])
    torch.save(ours, io.BytesIO())


def test_what_cannot_be_captured_is_refused_by_name_and_works_without_tape(path):
    layer = LSTM(INPUTS, H, proj_size=2)
    x = torch.randn(T, B, INPUTS)
    torch.testing.assert_close(layer(x)[0], nn.LSTM.forward(layer, x)[0])
    with pytest.raises(ValueError, match="proj_size"):
        layer.maps()
    layer.tape = Tape()
    with pytest.raises(ValueError, match="proj_size"):
        layer(x)
    layer = LSTM(INPUTS, H)
    assert layer(torch.randn(T, INPUTS))[0].shape == (T, H)
    layer.tape = Tape()
    with pytest.raises(ValueError, match="unbatched"):
        layer(torch.randn(T, INPUTS))


def test_wrong_shapes_raise_torchs_own_errors():
    _, ours = twins(torch.float32)
    with pytest.raises(RuntimeError, match="input_size"):
        ours(torch.randn(T, B, INPUTS + 1))
    with pytest.raises(RuntimeError, match="hidden"):
        ours(torch.randn(T, B, INPUTS), (torch.zeros(1, B, H + 1), torch.zeros(1, B, H)))
    with pytest.raises(RuntimeError, match="input_size"):
        ours(pack_padded_sequence(torch.randn(T, B, INPUTS + 1), torch.tensor([5, 3, 2])))


def test_a_compiled_model_gives_the_same_results_without_complaint(path, recwarn):
    _, ours = twins(torch.float32)
    ours.tape = None
    model = nn.Sequential(nn.Linear(INPUTS, INPUTS), ours)
    x = torch.randn(T, B, INPUTS)
    expected = model(x)[0]
    found = torch.compile(model, backend="eager")(x)[0]
    torch.testing.assert_close(found, expected)
    assert not [warning for warning in recwarn if "Dynamo" in str(warning.message)]
