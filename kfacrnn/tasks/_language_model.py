"""Recurrent language models on contiguous text: what the word-level and the character-level task share.

The model is that of Zaremba et al. (2014): embedding, LSTM, softmax. Training is truncated back-propagation through
time over `batch_size` parallel streams of the text, the state carried over from batch to batch and zero at the start of
an epoch; evaluation scores every token of a split once. This module does not know what the tokens are.

    symbol  meaning
    T, B    steps of a batch (`bptt`) and its sequences, one from each stream (`batch_size`)
    V       size of the vocabulary
    state   (h, c), each [layers, B, hidden]; None is zero
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kfacrnn import ranks
from kfacrnn.data.ptb import Corpus
from kfacrnn.errors import UserError
from kfacrnn.nn import LSTM, LayerNormLSTM, Linear
from kfacrnn.predictive import Categorical
from kfacrnn.settings import setting
from kfacrnn.units import from_nats

State = tuple[Tensor, Tensor]


@dataclass
class Config:
    """Settings of a language-model task."""

    name: str = setting("module in kfacrnn/tasks")
    hidden: int = setting("units of a layer and width of the embedding", at_least=1)
    layers: int = setting("LSTM layers", at_least=1)
    layer_norm: bool = setting("layer-norm inside the cell (Ba et al., 2016)")
    dropout: float = setting("dropped share of non-recurrent connections (Zaremba et al., 2014)", at_least=0, below=1)
    init_scale: float = setting("weights and biases start uniform in ± this", above=0)
    batch_size: int = setting("parallel streams of the training text", at_least=1)
    bptt: int = setting("steps of truncated back-propagation through time", at_least=1)
    eval_batch_size: int = setting("parallel streams of the text in evaluation, each from a zero state", at_least=1)


class Sizes(Protocol):
    """What a model is made of; every task's `Config` that has these."""

    hidden: int
    layers: int
    dropout: float
    init_scale: float


class LanguageModel(nn.Module):
    """Embedding, recurrent layers and softmax over `vocabulary` tokens; dropout on whatever enters a layer or the
    softmax. `layer` is one of `kfacrnn.nn`; the state is as it has it."""

    def __init__(self, vocabulary: int, config: Sizes, layer: Callable[..., nn.Module]):
        super().__init__()
        between = config.dropout if config.layers > 1 else 0.0  # torch warns of it where there is one layer
        self.embedding = nn.Embedding(vocabulary, config.hidden)
        self.recurrent = layer(config.hidden, config.hidden, config.layers, dropout=between)
        self.softmax = Linear(config.hidden, vocabulary)
        self.dropout = nn.Dropout(config.dropout)
        self._initialize(config.init_scale)

    @torch.no_grad()
    def _initialize(self, scale: float) -> None:
        """Weights and biases uniform in ±scale (Zaremba et al., 2014); gains and shifts of layer-norm stay 1 and 0."""
        drawn = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        recurrent = (p for name, p in self.recurrent.named_parameters() if name.startswith(drawn))
        for parameter in (*self.embedding.parameters(), *recurrent, *self.softmax.parameters()):
            parameter.uniform_(-scale, scale)

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Logits `[T, B, V]` for the token after each of `tokens` `[T, B]`, and the state after the last."""
        output, state = self.recurrent(self.dropout(self.embedding(tokens)), state)
        return self.softmax(self.dropout(output)), state


@dataclass(frozen=True, eq=False)
class Batch:
    """The next T tokens of every stream: `inputs`, and one step ahead `targets`, `[T, B]`; `state` before them."""

    inputs: Tensor
    targets: Tensor
    state: State | None

    @property
    def units(self) -> int:
        return self.targets.numel()

    @property
    def tokens(self) -> int:
        return self.inputs.numel()

    @property
    def cases(self) -> int:
        return self.inputs.shape[1]


class LanguageModelTask:
    """A `kfacrnn.tasks.Task` over one corpus. The text is read in order, so batches do not depend on a seed.

    Raises `UserError` when the training text is too short for a single batch.
    """

    unit: str
    metric: str

    def __init__(self, config: Config, corpus: Corpus, device: torch.device):
        self.config = config
        self.device = device
        self.vocabulary = len(corpus.vocabulary)
        self.checksums = corpus.checksums
        self.chance = from_nats(self.metric)(math.log(self.vocabulary))
        self.loss_scale = float(config.bptt)
        self._streams = ranks.mine(training_streams(corpus.train, config.batch_size), dim=1).to(device)
        self._batches = (len(self._streams) - 1) // config.bptt
        if self._batches < 1:
            raise UserError(
                f"task.batch_size={config.batch_size}: each stream has {len(self._streams):,} of {len(corpus.train):,} "
                f"tokens, task.bptt={config.bptt} needs {config.bptt + 1:,}; lower one of them"
            )
        self.updates_per_epoch: int | None = self._batches
        self._held_out = {
            split: evaluation_streams(tokens.to(device), corpus.line_end, config.eval_batch_size)
            for split, tokens in (("valid", corpus.valid), ("test", corpus.test))
        }
        self._updates = 0
        self._carried: State | None = None

    def build_model(self) -> LanguageModel:
        layer = LayerNormLSTM if self.config.layer_norm else LSTM
        model = LanguageModel(self.vocabulary, self.config, layer)  # drawn on the CPU: the same on any device
        return model.to(self.device)

    def next_batch(self) -> Batch:
        position = self._updates % self._batches
        if position == 0:
            self._carried = None
        start = position * self.config.bptt
        window = self._streams[start : start + self.config.bptt + 1]
        self._updates += 1
        return Batch(window[:-1], window[1:], self._carried)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits, (h, c) = model(batch.inputs, batch.state)
        self._carried = h.detach(), c.detach()
        return Categorical(logits).log_loss(batch.targets).sum() / batch.units

    def predict(self, model: nn.Module, batch: Batch, cases: slice | Tensor) -> Categorical:
        state = batch.state
        if state is not None:
            state = state[0][:, cases].contiguous(), state[1][:, cases].contiguous()
        logits, _ = model(batch.inputs[:, cases], state)
        return Categorical(logits)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> float:
        inputs, targets, scored = self._held_out[split]
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        state: State | None = None
        training = model.training
        model.eval()
        for start in range(0, len(inputs), self.config.bptt):  # in pieces, for the memory of the logits
            piece = slice(start, start + self.config.bptt)
            logits, state = model(inputs[piece], state)
            total += Categorical(logits, scored[piece]).log_loss(targets[piece]).double().sum()
        model.train(training)
        return total.item() / int(scored.sum())

    def state_dict(self) -> dict[str, Any]:
        carried = None if self._carried is None else tuple(ranks.whole(part, dim=1) for part in self._carried)
        return {"updates": self._updates, "carried": carried}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._updates = state["updates"]
        self._carried = None
        if state["carried"] is not None:
            h, c = (ranks.mine(part, dim=1).to(self.device) for part in state["carried"])
            self._carried = h, c


def training_streams(tokens: Tensor, count: int) -> Tensor:
    """`count` contiguous pieces of equal length side by side, `[steps, count]`; the remainder of `tokens` is left."""
    return tokens[: len(tokens) // count * count].view(count, -1).t().contiguous()


def evaluation_streams(tokens: Tensor, line_end: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """`inputs`, `targets` and `scored`, each `[steps, count]`; every one of `tokens` is a scored target once.

    The input of a target is the token before it, also at the start of a stream; a line end comes before the first.
    """
    padded = tokens.new_full((math.ceil(len(tokens) / count) * count,), line_end)
    padded[: len(tokens)] = tokens
    inputs = torch.cat([tokens.new_tensor([line_end]), padded[:-1]])
    scored = torch.arange(len(padded), device=tokens.device) < len(tokens)
    columns = [flat.view(count, -1).t().contiguous() for flat in (inputs, padded, scored)]
    return columns[0], columns[1], columns[2]
