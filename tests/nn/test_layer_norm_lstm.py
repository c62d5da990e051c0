"""`LayerNormLSTM` against a plain loop over steps and layers, with `torch.nn.functional.layer_norm`, in float64."""

import copy
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from kfacrnn.kfac.capture import Tape
from kfacrnn.nn import LayerNormLSTM
from kfacrnn.nn import layer_norm_lstm as module

T, B, INPUTS, H = 5, 3, 4, 6


def layer_norm_lstm(dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = LayerNormLSTM(INPUTS, H, dtype=dtype, **options)
    for parameter in layer.parameters():  # gains and shifts as different from ones and zeros as a trained model's
        parameter.data += 0.3 * torch.randn_like(parameter)
    return layer


def plain_loop(layer, x, state):
    """Outputs, final states, and per layer and step the input and the pre-activation of every map."""
    h_n, c_n, seen = [], [], {}
    inputs = list(x)
    for k, (h, c) in enumerate(zip(*state, strict=True)):
        own = {name.removesuffix(f"_l{k}"): p for name, p in layer.named_parameters() if name.endswith(f"_l{k}")}
        outputs = []
        for x_t in inputs:
            r_x, r_h = x_t @ own["weight_ih"].t(), h @ own["weight_hh"].t()
            n_x, n_h = F.layer_norm(r_x, (4 * H,)), F.layer_norm(r_h, (4 * H,))
            s_x, s_h = own["gain_ih"] * n_x, own["gain_hh"] * n_h
            s = s_x + s_h + own["bias"] if "bias" in own else s_x + s_h
            i, f, g, o = s.chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            n_c = F.layer_norm(c, (H,))
            s_c = own["gain_c"] * n_c + own["bias_c"] if "bias_c" in own else own["gain_c"] * n_c
            taps = {
                "ih": (x_t, r_x),
                "hh": (h, r_h),
                "norm_ih": (n_x, s_x),
                "norm_hh": (n_h, s_h),
                "norm_c": (n_c, s_c),
            }
            if "bias" in own:
                taps["bias"] = (s_x, s)
            for name, tap in taps.items():
                seen.setdefault(f"l{k}.{name}", []).append(tap)
            h = torch.sigmoid(o) * torch.tanh(s_c)
            outputs.append(h)
        inputs = outputs
        h_n.append(h)
        c_n.append(c)
    return torch.stack(inputs), (torch.stack(h_n), torch.stack(c_n)), seen


def initial_state(layers):
    return tuple(torch.randn(layers, B, H, dtype=torch.float64, requires_grad=True) for _ in range(2))


def a_loss(output, state):
    return output.square().sum() + 0.7 * state[0].sin().sum() + 0.7 * state[1].cos().sum()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("recorded", [False, True], ids=["plain", "recorded"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
def test_values_and_gradients_equal_those_of_a_plain_loop(layers, bias, recorded, dtype, tolerance, path):
    exact = layer_norm_lstm(num_layers=layers, bias=bias)
    layer = copy.deepcopy(exact).to(dtype)
    layer.tape = Tape() if recorded else None
    x, state = torch.randn(T, B, INPUTS, dtype=torch.float64, requires_grad=True), initial_state(layers)
    own_x, *own_state = (z.detach().to(dtype).requires_grad_() for z in (x, *state))
    output, final = layer(own_x, tuple(own_state))
    expected_output, expected_final, _ = plain_loop(exact, x, state)
    taps = [tap.s for tap in layer.tape or ()]
    gradients = torch.autograd.grad(
        a_loss(output, final), [own_x, *own_state, *layer.parameters(), *taps], retain_graph=True
    )
    expected = torch.autograd.grad(a_loss(expected_output, expected_final), [x, *state, *exact.parameters()])
    for mine, reference in zip(
        (output, *final, *gradients[: len(expected)]), (expected_output, *expected_final, *expected), strict=True
    ):
        torch.testing.assert_close(mine.double(), reference, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("used", ["output", "h_n", "c_n"])
def test_any_one_result_can_be_differentiated_alone(used):
    layer = layer_norm_lstm()
    x, state = torch.randn(T, B, INPUTS, dtype=torch.float64, requires_grad=True), initial_state(1)
    gradients = []
    for function in (layer, lambda x, state: plain_loop(layer, x, state)[:2]):
        output, (h_n, c_n) = function(x, state)
        result = {"output": output, "h_n": h_n, "c_n": c_n}[used]
        gradients.append(torch.autograd.grad(result.square().sum(), [x, layer.weight_hh_l0, layer.gain_hh_l0]))
    for mine, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_taps_equal_the_gradients_of_every_case_and_step(bias, frozen):
    layer = layer_norm_lstm(num_layers=2, bias=bias)
    layer.tape = Tape()
    x, state = torch.randn(T, B, INPUTS, dtype=torch.float64), initial_state(2)
    state = tuple(s.detach() for s in state)
    for parameter in layer.parameters():
        parameter.requires_grad_(not frozen)
    captured = torch.autograd.grad(a_loss(*layer(x, state)), [tap.s for tap in layer.tape])
    assert [tap.map for tap in layer.tape] == list(layer.maps())
    for parameter in layer.parameters():
        parameter.requires_grad_()
    for case in range(B):
        one = slice(case, case + 1)
        output, final, seen = plain_loop(layer, x[:, one], tuple(s[:, one] for s in state))
        loss = a_loss(output, final)
        for tap, g in zip(layer.tape, captured, strict=True):
            a, s = zip(*seen[tap.map.name], strict=True)
            expected = torch.autograd.grad(loss, s, retain_graph=True)
            torch.testing.assert_close(tap.a[:, one], torch.stack(a), rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(g[:, one], torch.stack(expected), rtol=1e-10, atol=1e-10)


def test_parameters_inside_the_recurrence_get_gradients_only_if_asked_for(monkeypatch, path):
    layer = layer_norm_lstm(torch.float32)
    layer.tape = Tape()
    output, _ = layer(torch.randn(T, B, INPUTS))
    with monkeypatch.context() as patch:
        patch.setattr(module, "_parameter_gradients", lambda *_: pytest.fail("not asked for"))
        torch.autograd.grad(output.sum(), [tap.s for tap in layer.tape], retain_graph=True)
    assert torch.autograd.grad(output.sum(), layer.gain_c_l0)[0].any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-7)])
def test_gradients_follow_from_the_taps(dtype, tolerance, path):
    layer = layer_norm_lstm(dtype, num_layers=2)
    layer.tape = Tape()
    loss = layer(torch.randn(T, B, INPUTS, dtype=dtype))[0].square().sum()
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    loss.backward(inputs=[*layer.parameters(), *(tap.s for tap in layer.tape)])
    for tap in layer.tape:
        if tap.map.name.endswith(("ih", "hh")) and "norm" not in tap.map.name:
            expected = torch.einsum("tbo,tbi->oi", tap.s.grad, tap.a)
            close(tap.map.weights[0].grad, expected)
        elif tap.map.gain is not None:
            close(tap.map.gain.grad, (tap.s.grad * tap.a).sum((0, 1)))
        if getattr(tap.map, "shift", None) is not None:
            close(tap.map.shift.grad, tap.s.grad.sum((0, 1)))


def test_maps_cover_every_parameter_once_and_stay_the_same_objects():
    layer = layer_norm_lstm(num_layers=2)
    covered = [id(parameter) for map in layer.maps() for parameter in map.parameters]
    assert sorted(covered) == sorted(map(id, layer.parameters()))
    assert layer.maps() == layer.maps()
    assert [*layer.maps()[0].splits.items()] == [("i", H), ("f", H), ("g", H), ("o", H)]
    twin = copy.deepcopy(layer)
    assert twin.maps()[0].weights[0] is twin.weight_ih_l0


def test_batch_first_transposes_input_and_output_only():
    layer, turned = layer_norm_lstm(num_layers=2), layer_norm_lstm(num_layers=2, batch_first=True)
    x = torch.randn(T, B, INPUTS, dtype=torch.float64)
    turned.tape = Tape()
    (output, state), (turned_output, turned_state) = layer(x), turned(x.transpose(0, 1))
    torch.testing.assert_close(turned_output.transpose(0, 1), output)
    torch.testing.assert_close(turned_state, state)
    assert all(tap.s.shape[:2] == tap.a.shape[:2] == (T, B) for tap in turned.tape)


def test_dropout_acts_between_layers_in_training_only():
    layer, without = layer_norm_lstm(num_layers=2, dropout=1.0), layer_norm_lstm(num_layers=2)
    x = torch.randn(T, B, INPUTS, dtype=torch.float64)
    layer.tape = Tape()
    layer(x)
    second = next(tap for tap in layer.tape if tap.map.name == "l1.ih")
    assert not second.a.any()
    torch.testing.assert_close(layer.eval()(x)[0], without(x)[0])


def test_output_does_not_change_when_a_weight_matrix_is_rescaled():
    layer = layer_norm_lstm(torch.float64)
    x = 10 * torch.randn(T, B, INPUTS, dtype=torch.float64)
    before = layer(x)[0]
    layer.weight_ih_l0.data *= 100
    torch.testing.assert_close(layer(x)[0], before, rtol=1e-4, atol=1e-5)


def test_under_bfloat16_autocast_results_are_close_to_float32_and_taps_are_float32(path):
    layer = layer_norm_lstm(torch.float32, num_layers=2)
    x = torch.randn(T, B, INPUTS)
    expected = layer(x)[0]
    expected.square().sum().backward()
    reference = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    layer.tape = Tape()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)[0]
        assert output.dtype == torch.bfloat16
        gradients = torch.autograd.grad(
            output.float().square().sum(), [*layer.parameters(), *(tap.s for tap in layer.tape)]
        )
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)
    # A plain loop under autocast is just as far off: two to seven per cent at this size.
    for mine, exact in zip(gradients, reference, strict=False):
        assert (mine - exact).norm() < 0.1 * exact.norm()
    assert all(g.dtype == torch.float32 for g in gradients)


def test_bad_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match="hidden_size"):
        LayerNormLSTM(4, 0)
    with pytest.raises(ValueError, match=r"dropout=1\.5"):
        LayerNormLSTM(4, 6, dropout=1.5)
    layer = LayerNormLSTM(INPUTS, H)
    with pytest.raises(ValueError, match="PackedSequence"):
        layer(pack_padded_sequence(torch.randn(T, B, INPUTS), torch.tensor([5, 3, 2])))
    with pytest.raises(ValueError, match=r"\[T, B, input_size\] with input_size=4, got \[5, 4\]"):
        layer(torch.randn(T, INPUTS))
    with pytest.raises(ValueError, match=r"c_0 must be .*\[1, 3, 6\], got \[1, 3, 7\]"):
        layer(torch.randn(T, B, INPUTS), (torch.zeros(1, B, H), torch.zeros(1, B, H + 1)))


def test_a_backward_pass_may_run_inside_autocast(path) -> None:
    torch.manual_seed(0)
    layer, x = LayerNormLSTM(3, 4), torch.randn(5, 2, 3)
    layer(x)[0].square().sum().backward()
    outside = [parameter.grad for parameter in layer.parameters()]
    layer.zero_grad()
    loss = layer(x)[0].square().sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss.backward()
    for parameter, gradient in zip(layer.parameters(), outside, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0.02, atol=0.02)
