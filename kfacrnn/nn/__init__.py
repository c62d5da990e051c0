"""Recurrent layers and cells whose linear maps can be captured: drop-ins for `torch.nn`."""

from kfacrnn.nn.cells import GRUCell, LSTMCell, RNNCell
from kfacrnn.nn.convert import convert
from kfacrnn.nn.dnc import DNC
from kfacrnn.nn.gru import GRU
from kfacrnn.nn.layer_norm_lstm import LayerNormLSTM
from kfacrnn.nn.linear import Linear
from kfacrnn.nn.lstm import LSTM
from kfacrnn.nn.rnn import RNN

__all__ = ["DNC", "GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "LayerNormLSTM", "Linear", "RNNCell", "convert"]
