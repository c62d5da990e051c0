"""A task on sequences of different lengths from end to end: a converted torch model, padded batches, `lengths`.

The task is to say at every step which token the sequence began with, whatever came since: chance is ln 4 = 1.39 nats.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfacrnn import KFAC
from kfacrnn.nn import convert
from kfacrnn.predictive import Categorical

V, LONGEST, B = 4, 12, 32
MEAN_LENGTH = (2 + LONGEST) / 2


class Recall(nn.Module):
    def __init__(self, layer: type[nn.RNNBase], batch_first: bool = False):
        super().__init__()
        self.embedding, self.softmax = nn.Embedding(V, 8), nn.Linear(16, V)
        self.recurrent = layer(8, 16, batch_first=batch_first)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.softmax(self.recurrent(self.embedding(tokens))[0])


def batch(seed: int, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and targets `[T, B]`, with `padding` behind the ends, and lengths between 2 and 12."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, LONGEST + 1, (B,), generator=generator)
    tokens = torch.randint(V, (LONGEST, B), generator=generator)
    behind = torch.arange(LONGEST)[:, None] >= lengths
    return tokens.masked_fill(behind, padding), tokens[:1].repeat(LONGEST, 1).masked_fill(behind, -100), lengths


def mean_loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Per step that exists."""
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=-100)


def trained(
    layer: type[nn.RNNBase], approximation: str, updates: int, *, padding: int = 0, batch_first: bool = False
) -> tuple[nn.Module, KFAC]:
    torch.manual_seed(0)
    model = convert(Recall(layer, batch_first))
    optimizer = KFAC(model, approximation, loss_scale=MEAN_LENGTH, statistics_every=2, statistics_fraction=0.5)
    for update in range(updates):
        tokens, targets, lengths = batch(update, padding)
        if batch_first:
            tokens, targets = tokens.mT, targets.mT
        if optimizer.statistics_due:
            cases = optimizer.statistics_cases(B)
            part = tokens[cases] if batch_first else tokens[:, cases]
            optimizer.update_statistics(
                lambda part=part, lengths=lengths[cases]: Categorical(
                    model(part), lengths=lengths, batch_first=batch_first
                )
            )
        optimizer.zero_grad()
        mean_loss(model, tokens, targets).backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize(
    ("layer", "approximation"),
    [(nn.GRU, "indep"), (nn.GRU, "option1"), (nn.GRU, "option2"), (nn.RNN, "option2"), (nn.LSTM, "option2")],
)
def test_the_task_is_learnt(layer, approximation):
    model, optimizer = trained(layer, approximation, 40)
    losses = [mean_loss(model, *batch(seed, padding=0)[:2]).item() for seed in range(1000, 1004)]
    assert max(losses) < 0.05
    assert optimizer.stats()["skipped_updates"] == 0


@pytest.mark.parametrize("layer", [nn.GRU, nn.RNN])
def test_what_stands_in_the_padding_changes_no_update(layer):
    first, second = (trained(layer, "option2", 6, padding=padding)[0] for padding in (0, 3))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("layer", [nn.GRU, nn.RNN])
def test_a_model_whose_batch_comes_first_takes_the_same_updates(layer):
    first, second = (trained(layer, "option2", 6, batch_first=batch_first)[0] for batch_first in (False, True))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_coverage_table_of_a_gru_names_every_row_of_every_parameter():
    _, optimizer = trained(nn.GRU, "option1", 1)
    gates = [
        f"recurrent.l0.{gate} recurrent.weight_ih_l0[{rows}], recurrent.weight_hh_l0[{rows}], "
        f"recurrent.bias_ih_l0[{rows}], recurrent.bias_hh_l0[{rows}] option1 A 25 · G 16"
        for gate, rows in (("r", "0:16"), ("z", "16:32"))
    ]
    assert [" ".join(line.split()) for line in str(optimizer.coverage()).splitlines()[1:]] == [
        "embedding embedding.weight indep A 4 diagonal · G 8",
        "softmax softmax.weight, softmax.bias indep A 17 · G 4",
        *gates,
        "recurrent.l0.ih.n recurrent.weight_ih_l0[32:48], recurrent.bias_ih_l0[32:48] option1 A 9 · G 16",
        "recurrent.l0.hh.n recurrent.weight_hh_l0[32:48], recurrent.bias_hh_l0[32:48] option1 A 17 · G 16",
    ]
