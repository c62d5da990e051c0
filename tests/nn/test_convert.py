from functools import partial

import pytest
import torch
from torch import nn

from kfacrnn.kfac.capture import Tape
from kfacrnn.nn import GRU, LSTM, RNN, GRUCell, LayerNormLSTM, LSTMCell, RNNCell, convert


class LanguageModel(nn.Module):
    def __init__(self, recurrent):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.stack = nn.ModuleDict({"recurrent": recurrent})

    def forward(self, tokens):
        return self.stack["recurrent"](self.embedding(tokens))[0]


@pytest.mark.parametrize(
    ("layer", "ours", "maps"),
    [
        (nn.LSTM, LSTM, ["l0", "l1"]),
        (nn.GRU, GRU, ["l0", "l0.ih", "l0.hh", "l1", "l1.ih", "l1.hh"]),
        (nn.RNN, RNN, ["l0", "l1"]),
        (partial(nn.LSTM, bidirectional=True), LSTM, ["l0", "l0_reverse", "l1", "l1_reverse"]),
        (partial(nn.RNN, nonlinearity="relu"), RNN, ["l0", "l1"]),
    ],
    ids=["LSTM", "GRU", "RNN", "both directions", "rectified RNN"],
)
def test_every_recurrent_layer_is_swapped_and_results_do_not_change(layer, ours, maps):
    torch.manual_seed(0)
    model = LanguageModel(layer(4, 5, num_layers=2, dropout=0.5)).eval()
    tokens = torch.randint(7, (6, 3))
    before = model(tokens)
    assert convert(model) is model
    recurrent = model.stack["recurrent"]
    assert type(recurrent) is ours
    assert not recurrent.training
    assert torch.equal(model(tokens), before)
    assert [map.name for map in recurrent.maps()] == maps
    recurrent.tape = Tape()
    torch.testing.assert_close(model(tokens), before)


def test_an_optimizer_made_before_moves_the_parameters_after():
    model = LanguageModel(nn.LSTM(4, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model)
    before = model.stack["recurrent"].weight_hh_l0.clone()
    model(torch.randint(7, (6, 3))).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.stack["recurrent"].weight_hh_l0, before)


def test_a_shared_layer_stays_shared_and_hooks_stay_in_place():
    lstm, calls = nn.LSTM(4, 4), []
    lstm.register_forward_hook(lambda *_: calls.append(1))
    model = convert(nn.ModuleList([lstm, lstm]))
    assert model[0] is model[1]
    model[0](torch.randn(2, 1, 4))
    assert calls == [1]


def test_a_bare_lstm_is_returned_converted():
    lstm = nn.LSTM(4, 5)
    assert type(convert(lstm)) is LSTM


def test_what_is_capturable_already_is_left_alone():
    model = nn.ModuleList([LSTM(4, 5), LayerNormLSTM(4, 5), GRU(4, 5), RNN(4, 5)])
    assert [type(layer) for layer in convert(model)] == [LSTM, LayerNormLSTM, GRU, RNN]


class Subclass(nn.LSTM):
    pass


@pytest.mark.parametrize(("cell", "ours"), [(nn.LSTMCell, LSTMCell), (nn.GRUCell, GRUCell), (nn.RNNCell, RNNCell)])
def test_cells_are_swapped_too(cell, ours):
    model = nn.ModuleDict({"decoder": cell(4, 5)})
    x = torch.randn(3, 4)
    before = model["decoder"](x)
    assert type(convert(model)["decoder"]) is ours
    torch.testing.assert_close(model["decoder"](x), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Subclass(4, 5), "Subclass"),
        (nn.LSTM(4, 5, proj_size=2), "proj_size=2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_captured_is_named_and_nothing_is_changed(layer, reason):
    model = nn.ModuleList([nn.LSTM(4, 5), LanguageModel(layer)])
    with pytest.raises(ValueError, match=rf"1\.stack\.recurrent.*{reason}"):
        convert(model)
    assert type(model[0]) is nn.LSTM
