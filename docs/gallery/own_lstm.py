"""K-FAC on your own LSTM in ten minutes.

A character model as you may have it, on a text that every Python has: the source of its argparse module. It is trained
with Adam and with K-FAC. What K-FAC needs beyond Adam is marked 1 to 4.

    python docs/gallery/own_lstm.py [PICTURE]
"""

import argparse
import copy
import inspect
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

from kfacrnn import KFAC
from kfacrnn.nn import convert
from kfacrnn.predictive import Categorical

TEXT = inspect.getsource(argparse)
SYMBOLS = sorted(set(TEXT))
CORPUS = torch.tensor([SYMBOLS.index(symbol) for symbol in TEXT])
STEPS, CASES, UPDATES = 50, 64, 120


class CharacterModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(SYMBOLS), 32)
        self.lstm = nn.LSTM(32, 128)
        self.decoder = nn.Linear(128, len(SYMBOLS))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # [T, B] → logits [T, B, V]
        return self.decoder(self.lstm(self.embedding(tokens))[0])


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets `[T, B]`, the same for every optimiser."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(len(CORPUS) - STEPS - 1, (UPDATES, 1, CASES), generator=generator)
    windows = CORPUS[starts + torch.arange(STEPS + 1)[:, None]]
    return [(window[:-1], window[1:]) for window in windows]


def bits(losses: list[float]) -> float:
    """Bits per character, mean over the last 20 updates."""
    return sum(losses[-20:]) / 20 / math.log(2)


def train_adam(model: nn.Module, lr: float) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    scheduler = CosineAnnealingLR(optimizer, UPDATES)
    losses = []
    for inputs, targets in batches():
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def train_kfac(
    model: nn.Module, approximation: str, after_step: Callable[..., None] = lambda *_: None, **settings: Any
) -> tuple[list[float], KFAC]:
    # 1. The same weights, in an LSTM whose pre-activations can be seen.
    model = convert(model)
    # 2. How the loss is scaled: the Fisher is that of a sequence's log-loss, summed over its steps. A mean over steps
    #    is that sum divided by T; for a loss that sums over steps and averages over sequences it would be 1.
    optimizer = KFAC(model, approximation, loss_scale=STEPS, **settings)
    # 3. A schedule, as Adam has: it scales the whole step, whichever bound decides it.
    scheduler = CosineAnnealingLR(optimizer, UPDATES)
    losses = []
    for inputs, targets in batches():
        # 4. Every few updates, curvature from some of the sequences. `forward` returns the predictive distribution;
        #    targets are sampled from it inside, so the data's own are not asked for.
        if optimizer.statistics_due:
            part = inputs[:, optimizer.statistics_cases(CASES)]
            optimizer.update_statistics(lambda part=part: Categorical(logits=model(part)))
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        after_step(optimizer, model, inputs, targets, loss)  # nothing, here; damping.py looks at what happened
        scheduler.step()
        losses.append(loss.item())
    return losses, optimizer


def fresh_model() -> nn.Module:
    torch.manual_seed(0)
    return CharacterModel()


def main() -> None:
    curves = {f"Adam, lr {lr}": train_adam(fresh_model(), lr) for lr in (0.003, 0.01, 0.03, 0.1)}
    curves["K-FAC option 1"], optimizer = train_kfac(fresh_model(), "option1")
    for name, losses in curves.items():
        print(f"{name:16} {bits(losses):5.2f} bits per character after {UPDATES} updates")

    # Continuing later: the state holds averages, inverses and generators, and loads with weights_only=True.
    state = copy.deepcopy(optimizer.state_dict())
    print(f"\nthe state of K-FAC: {', '.join(state)}")

    # What to look at when it does not train; damping.py says how.
    print("its last step:", ", ".join(f"{name} {value:.3g}" for name, value in optimizer.stats().items()))
    if len(sys.argv) > 1:
        draw(curves, sys.argv[1])


def draw(curves: dict[str, list[float]], path: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for name, losses in curves.items():
        axes.plot([loss / math.log(2) for loss in losses], label=name)
    axes.set(xlabel="updates", ylabel="bits per character", ylim=(0.8, 6))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
