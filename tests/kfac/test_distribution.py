"""KFAC on several ranks: the same as on one, to rounding, whoever decomposes, holds and sends what."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from kfacrnn import KFAC
from kfacrnn.nn import LSTM, LayerNormLSTM
from kfacrnn.predictive import Categorical
from tests.ranks import together

THREE = ("indep", "option1", "option2")
T, B, V, H = 5, 12, 6, 4
UPDATES = 7
EXACT = {"rtol": 1e-9, "atol": 1e-12}
SETTINGS = {"statistics_every": 2, "statistics_fraction": 0.4, "refresh_every": 3}


class Model(nn.Module):
    """Every kind of block: diagonal and dense factors, with and without lags, gates, gains and shifts, T = 1."""

    def __init__(self, layer: type = LSTM):
        super().__init__()
        self.embedding, self.start = nn.Embedding(V, H), nn.Linear(2, H)
        self.lstm, self.norm, self.softmax = layer(H, H), nn.LayerNorm(H), nn.Linear(H, V)

    def forward(self, tokens: Tensor, about: Tensor) -> Tensor:
        h = self.start(about).unsqueeze(0)
        return self.softmax(self.norm(self.lstm(self.embedding(tokens), (h, torch.zeros_like(h)))[0]))


def data(update: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens `[T + 1, B]`, something about every sequence `[B, 2]`, and lengths `[B]`."""
    generator = torch.Generator().manual_seed(update)
    tokens = torch.randint(V, (T + 1, B), generator=generator)
    about = torch.randn(B, 2, generator=generator, dtype=torch.float64)
    return tokens, about, torch.randint(1, T + 1, (B,), generator=generator)


def run(approximation: str, settings: dict[str, Any], layer: type = LSTM, updates: int = UPDATES) -> dict[str, Any]:
    """Trains on this rank's part of every batch, on all of it if there is one process; variable lengths in statistics."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    group = dist.group.WORLD if ranks > 1 else None
    torch.manual_seed(0)
    model = Model(layer).double()
    optimizer = KFAC(model, approximation, loss_scale=T, process_group=group, **{**SETTINGS, **settings})
    trained = DistributedDataParallel(model) if ranks > 1 else model
    stats = []
    for update in range(updates):
        tokens, about, lengths = data(update)
        tokens, about, lengths = tokens[:, rank::ranks], about[rank::ranks], lengths[rank::ranks]
        if optimizer.statistics_due:
            c = optimizer.statistics_cases(len(lengths))
            optimizer.update_statistics(
                lambda x=tokens[:-1, c], y=about[c], n=lengths[c]: Categorical(model(x, y), lengths=n)
            )
        optimizer.zero_grad()
        loss = F.cross_entropy(trained(tokens[:-1], about).flatten(0, 1), tokens[1:].flatten())
        loss.backward()
        optimizer.step()
        stats.append(optimizer.stats())
    held = [name for name, block in optimizer._estimator.blocks.items() if hasattr(block.inverse, "multiply")]
    return {"parameters": {n: p.detach() for n, p in model.named_parameters()}, "stats": stats, "held": held}


def assert_same(one: dict[str, Any], many: list[dict[str, Any]]) -> None:
    for each in many:
        torch.testing.assert_close(each["parameters"], one["parameters"], **EXACT)
        for seen, expected in zip(each["stats"], one["stats"], strict=True):
            assert seen == pytest.approx(expected, rel=1e-6, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("approximation", THREE)
def test_two_ranks_are_one_process(approximation: str) -> None:
    assert_same(run(approximation, {}), together(2, run, approximation, {}))
