"""Sentences of the Penn Treebank, each a case of its own: characters, lengths from a handful to hundreds, a GRU.

A sentence is predicted symbol by symbol from a zero state, its line end included; the input before its first symbol is
a line end. Every epoch has the sentences in an order of its own, as many at a time as fill a batch, padded to the
longest. The objective is that of the paper, the mean over cases of a case's log-loss, divided by the mean length of the
training sentences: nats per symbol. Not in the paper, whose sequences are all of one length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kfacrnn import ranks
from kfacrnn.data import ptb
from kfacrnn.errors import UserError
from kfacrnn.nn import GRU, LSTM, RNN
from kfacrnn.predictive import Categorical
from kfacrnn.settings import setting
from kfacrnn.tasks import DataSource
from kfacrnn.tasks._generators import private_generator
from kfacrnn.tasks._language_model import LanguageModel
from kfacrnn.units import from_nats

CELLS = {"gru": GRU, "lstm": LSTM, "rnn": RNN}


@dataclass
class Config:
    """The model's sizes and the batch."""

    name: str = setting("module in kfacrnn/tasks")
    cell: str = setting("recurrent layer", choices=tuple(CELLS))
    hidden: int = setting("units of a layer and width of the embedding", at_least=1)
    layers: int = setting("recurrent layers", at_least=1)
    dropout: float = setting("dropped share of non-recurrent connections (Zaremba et al., 2014)", at_least=0, below=1)
    init_scale: float = setting("weights and biases start uniform in ± this", above=0)
    batch_size: int = setting("sentences per update", at_least=1)
    eval_batch_size: int = setting("sentences at a time in evaluation", at_least=1)


@dataclass(frozen=True, eq=False)
class Batch:
    """B sentences: `inputs` and, one symbol ahead, `targets`, `[T, B]`; behind `lengths` `[B]` all is padding. `units`
    are the symbols that B sentences of the corpus have on average."""

    inputs: Tensor
    targets: Tensor
    lengths: Tensor
    units: float

    def mine(self) -> Batch:
        """Those of the sentences that this process holds."""
        inputs, targets = (ranks.mine(part, dim=1) for part in (self.inputs, self.targets))
        return Batch(inputs, targets, ranks.mine(self.lengths, dim=0), self.units / ranks.count())

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def cases(self) -> int:
        return len(self.lengths)


class Sentences:
    """The sentences of one split of a corpus; a line end ends each."""

    def __init__(self, tokens: Tensor, line_end: int):
        self.line_end = line_end
        self.stream = torch.cat([tokens.new_tensor([line_end]), tokens])
        ends = (self.stream == line_end).nonzero().squeeze(1)
        self.starts, self.lengths = ends[:-1], ends.diff()
        self.mean_length = self.lengths.double().mean().item()

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, chosen: Tensor, device: torch.device) -> Batch:
        """Those sentences, side by side; padding is line ends."""
        lengths = self.lengths[chosen]
        steps = torch.arange(int(lengths.max()))[:, None]
        places = (self.starts[chosen] + steps).clamp(max=len(self.stream) - 2)
        inside = steps < lengths
        inputs, targets = (self.stream[places + ahead].where(inside, self.line_end) for ahead in (0, 1))
        return Batch(inputs.to(device), targets.to(device), lengths, units=len(chosen) * self.mean_length)


class PTBSentence:
    unit: str = "character"
    metric: str = "bits per character"

    def __init__(self, config: Config, corpus: ptb.Corpus, seed: int, device: torch.device):
        self.config, self.seed, self.device = config, seed, device
        self.checksums = corpus.checksums
        self.vocabulary = len(corpus.vocabulary)
        self.chance = from_nats(self.metric)(math.log(self.vocabulary))
        self.sentences = Sentences(corpus.train, corpus.line_end)
        self._held_out = {
            split: Sentences(tokens, corpus.line_end)
            for split, tokens in (("valid", corpus.valid), ("test", corpus.test))
        }
        self._batches = len(self.sentences) // config.batch_size
        if self._batches < 1:
            raise UserError(
                f"task.batch_size={config.batch_size}: the corpus has {len(self.sentences):,} sentences; lower it"
            )
        self.updates_per_epoch: int | None = self._batches
        self.loss_scale = self.sentences.mean_length
        self._updates = 0

    def build_model(self) -> LanguageModel:
        model = LanguageModel(self.vocabulary, self.config, CELLS[self.config.cell])
        return model.to(self.device)

    def next_batch(self) -> Batch:
        epoch, position = divmod(self._updates, self._batches)
        order = torch.randperm(len(self.sentences), generator=private_generator("sentences", self.seed, epoch))
        start = position * self.config.batch_size
        self._updates += 1
        return self.sentences.batch(order[start : start + self.config.batch_size], self.device).mine()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.predict(model, batch).log_loss(batch.targets).sum() / batch.units

    def predict(self, model: nn.Module, batch: Batch, cases: slice | Tensor = slice(None)) -> Categorical:
        logits, _ = model(batch.inputs[:, cases])
        return Categorical(logits, lengths=batch.lengths[cases])

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> float:
        sentences = self._held_out[split]
        by_length = sentences.lengths.argsort(stable=True)  # a batch of like ones has little padding
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        training = model.training
        model.eval()
        for chosen in by_length.split(self.config.eval_batch_size):
            batch = sentences.batch(chosen, self.device)
            total += self.predict(model, batch).log_loss(batch.targets).double().sum()
        model.train(training)
        return total.item() / int(sentences.lengths.sum())

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._updates = state["updates"]


def build(config: Config, *, seed: int, device: torch.device, data: DataSource) -> PTBSentence:
    return PTBSentence(config, ptb.load("char", root=data.root, source=data.source), seed, device)
