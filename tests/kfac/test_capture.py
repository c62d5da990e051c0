"""How a_t and g_t leave modules that know nothing of it, and which models cannot be captured."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kfacrnn.kfac.capture import Recorder
from kfacrnn.nn import LSTM, convert

T, B = 3, 2


def captured(model: nn.Module, x: torch.Tensor, **options):
    """The taps by the names of their maps, and g for a loss that uses every output differently."""
    recorder = Recorder(model)
    names = {id(map): name for name, map in recorder.maps.items()}
    with recorder.recording() as tape:
        output = model(x, **options)
    torch.manual_seed(9)
    loss = (output * torch.randn_like(output)).sum()
    gradients = torch.autograd.grad(loss, [tap.s for tap in tape])
    return {names[id(tap.map)]: (tap.a, g) for tap, g in zip(tape, gradients, strict=True)}


def test_maps_carry_the_names_of_their_modules():
    model = nn.ModuleDict({"in": nn.Linear(2, 3), "body": nn.Sequential(nn.LayerNorm(3), LSTM(3, 4, 2))})
    assert list(Recorder(model).maps) == ["in", "body.0", "body.1.l0", "body.1.l1"]
    assert list(Recorder(LSTM(3, 4)).maps) == ["l0"]
    assert list(Recorder(nn.Linear(3, 4)).maps) == [""]


def test_an_activation_that_works_in_place_leaves_g_at_the_preactivation():
    torch.manual_seed(0)
    apart = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(T, B, 4)
    plain = captured(apart, x)
    apart[1] = nn.ReLU(inplace=True)
    in_place = captured(apart, x)
    for name in ("0", "2"):
        torch.testing.assert_close(in_place[name], plain[name], rtol=0, atol=0)
    assert (plain["0"][1] == 0).any()  # the rectifier acts


def test_an_in_place_scaling_behind_a_map_scales_its_g():
    class Model(nn.Sequential):
        def forward(self, x):
            return self[0](x).mul_(3)

    x = torch.randn(T, B, 4)
    _, g = captured(Model(nn.Linear(4, 5)), x)["0"]
    torch.manual_seed(9)
    torch.testing.assert_close(g, 3 * torch.randn(T, B, 5))


def test_an_argument_given_by_keyword_is_captured_too():
    linear, x = nn.Linear(4, 5), torch.randn(T, B, 4)
    recorder = Recorder(linear)
    with recorder.recording() as tape:
        linear(input=x)
    assert torch.equal(tape[0].a, x)


def test_a_norm_records_its_input_normalised():
    norm, x = nn.LayerNorm(5), torch.randn(T, B, 5)
    a, g = captured(norm, x)[""]
    expected = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    torch.testing.assert_close(a, expected)
    torch.manual_seed(9)
    torch.testing.assert_close(g, torch.randn(T, B, 5))


def test_recording_changes_no_output_and_leaves_no_trace():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2)), torch.randn(T, B, 3)
    expected, recorder = model(x), Recorder(model)
    with recorder.recording() as tape:
        assert torch.equal(model(x), expected)
    with pytest.raises(RuntimeError, match="inside"), recorder.recording():
        raise RuntimeError("inside")
    assert len(tape) == 3
    model(x)
    assert len(tape) == 3
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_stops_recording_when_the_pass_fails():
    model = LSTM(3, 4)
    with pytest.raises(RuntimeError, match="input_size"), Recorder(model).recording():
        model(torch.randn(T, B, 7))
    assert model.tape is None


@pytest.mark.parametrize("layer", [nn.LSTM(2, 3), nn.GRU(2, 3), nn.RNN(2, 3), nn.LSTMCell(2, 3), nn.GRUCell(2, 3)])
def test_torchs_recurrent_layers_are_refused_by_name_with_the_remedy(layer):
    kind = f"torch.nn.{type(layer).__name__}"
    with pytest.raises(ValueError, match=rf"encoder\.0 is a {kind}, .*: use kfacrnn\.nn\.convert\(model\)"):
        Recorder(nn.ModuleDict({"encoder": nn.Sequential(layer)}))
    with pytest.raises(ValueError, match=f"the model is a {kind}"):
        Recorder(layer)


def test_a_converted_layer_is_captured():
    assert list(Recorder(convert(nn.Sequential(nn.LSTM(2, 3)))).maps) == ["0.l0"]


class Subclass(nn.LSTM):
    pass


@pytest.mark.parametrize("layer", [LSTM(2, 3, proj_size=2), nn.LSTM(2, 3, proj_size=2), Subclass(2, 3)])
def test_recurrent_layers_that_cannot_be_converted_hold_no_map(layer):
    assert not Recorder(layer).maps


def test_what_is_not_trained_is_not_looked_at():
    model = nn.ModuleDict({"unconverted": nn.LSTM(2, 3), "lstm": LSTM(2, 3, 2), "out": nn.Linear(3, 2)})
    trained = {*model["out"].parameters(), *model["lstm"].all_weights[1]}
    assert list(Recorder(model, trained).maps) == ["lstm.l1", "out"]


@pytest.mark.parametrize(
    "module",
    [
        nn.Embedding(5, 2, max_norm=1.0),
        nn.Embedding(5, 2, scale_grad_by_freq=True),
        nn.Embedding(5, 2, sparse=True),
        nn.LayerNorm([3, 2]),
        nn.BatchNorm1d(3),
        nn.Conv1d(2, 3, 1),
    ],
    ids=lambda module: type(module).__name__,
)
def test_modules_that_are_no_map_over_time_hold_no_map(module):
    assert not Recorder(module).maps
