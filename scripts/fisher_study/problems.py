"""Models so small that their Fisher can be enumerated: LSTM language models and a DNC on repeated copy.

A problem trains its model, and says where on its tape the log-loss begins: `readout` is a tensor y `[T, B, K]`, and
`roots` holds R `[T, B, K, Q]` with R Rᵀ the Fisher of a step's log-loss with respect to y_t. Given the inputs, targets
of different steps are independent, so the rest of the model sees nothing else of the targets. This module knows nothing
of Kronecker factors.

The language models start a sequence from the state that the 20 symbols before it leave, as truncated back-propagation
does; a DNC starts from zeros.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfacrnn.data import ptb
from kfacrnn.nn import DNC, LSTM
from kfacrnn.tasks import repeat_copy

BURN_IN = 20
CASES, BATCH = 64, 32  # sequences of a fixed batch, of a training batch
NOISE = 0.2  # probability that a chain's symbol is drawn anew, at random: the past is then worth remembering
CHAINS = {  # transition probabilities of the chain behind the symbols
    "sticky": [[0.85 if j == i else 0.05 for j in range(4)] for i in range(4)],
    "alternating": [[0.05 if i // 2 == j // 2 else 0.45 for j in range(4)] for i in range(4)],
    "rotating": [[0.85 if j == (i + 1) % 4 else 0.05 for j in range(4)] for i in range(4)],
}
COPY = {"hidden": 12, "slots": 6, "word_size": 4, "read_heads": 1, "write_heads": 1, "clip": 20.0, "bits": 2}
LAYOUT = {"episodes": 1, "sequences": 1, "min_length": 3, "max_length": 3, "norm_max": 10.0, "pad_to": None}
FLAGS = {"start_flag_each": True, "end_step": True, "eval_sequences": 1, "batch_size": BATCH, "name": "repeat_copy"}
REPEATS = (1, 2, 5)


class Problem(Protocol):
    model: nn.Module
    updates: tuple[int, ...]  # of training, before each stage
    lengths: tuple[int, ...]  # T of the sequences that can be had, ascending
    prefixes: bool  # shorter sequences are the beginnings of the longest ones
    exhaustive: bool  # the fixed inputs are all there are

    def train(self, updates: int) -> None: ...

    def fixed(self, batches: int) -> dict[int, list[Any]]:
        """T → the inputs that the expectation runs over, the same at every call; only the longest T if `prefixes`."""

    def nats(self, batch: Any) -> float:
        """Log-loss per predicted step."""

    def inputs(self, batch: Any) -> tuple[Any, ...]:
        """What `readout` needs; nothing that happens here belongs to the sequence."""

    def readout(self, *inputs: Any) -> Tensor: ...

    def roots(self, y: Tensor, batch: Any) -> Tensor: ...


def problem(name: str, seed: int) -> Problem:
    """In float64, untrained. Raises UserError for "characters" without the Penn Treebank."""
    if name == "copy":
        return RepeatedCopy(seed)
    return Language(name, seed)


NAMES = (*CHAINS, "characters", "copy")

# ------------------------------------------------------------------------------------------------------ language models


class LanguageModel(nn.Module):
    """Embedding, LSTM, softmax. The hidden states are what the softmax reads."""

    def __init__(self, vocabulary: int, embedding: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.lstm = LSTM(embedding, hidden)
        self.softmax = nn.Linear(hidden, vocabulary)

    def hidden(self, tokens: Tensor, state: Any = None) -> Tensor:
        return self.lstm(self.embedding(tokens), state)[0]

    @torch.no_grad()
    def state(self, tokens: Tensor) -> Any:
        return self.lstm(self.embedding(tokens))[1]


class Language:
    """Symbols `[burn-in + T + 1, B]`: those before the window, the window, and one more to predict."""

    lengths, prefixes, exhaustive = (6, 12, 35), True, False

    def __init__(self, source: str, seed: int):
        torch.manual_seed(seed)
        self.source, self.generator = source, torch.Generator().manual_seed(seed)
        characters = source == "characters"
        self.text = ptb.load("char").train[:500_000] if characters else None
        self.updates = (0, 50, 1000) if characters else (0, 30, 300)
        vocabulary = int(self.text.max()) + 1 if self.text is not None else len(CHAINS[source])
        self.model = LanguageModel(vocabulary, *((6, 10) if characters else (3, 6))).double()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=2e-2)

    def draw(self, steps: int, cases: int, generator: torch.Generator) -> Tensor:
        total = BURN_IN + steps + 1
        if self.text is None:
            return chain(self.source, total, cases, generator)
        starts = torch.randint(len(self.text) - total, (cases,), generator=generator)
        return self.text[torch.arange(total)[:, None] + starts]

    def fixed(self, batches: int) -> dict[int, list[Tensor]]:
        steps = max(self.lengths)
        return {steps: [*self.draw(steps, batches * CASES, torch.Generator().manual_seed(0)).split(CASES, 1)]}

    def loss(self, tokens: Tensor) -> Tensor:
        logits = self.model.softmax(self.readout(*self.inputs(tokens)))
        return F.cross_entropy(logits.flatten(0, 1), tokens[BURN_IN + 1 :].flatten())

    def nats(self, batch: Tensor) -> float:
        return self.loss(batch).item()

    def train(self, updates: int) -> None:
        for _ in range(updates):
            self.optimizer.zero_grad()
            self.loss(self.draw(max(self.lengths), BATCH, self.generator)).backward()
            self.optimizer.step()

    def inputs(self, batch: Tensor) -> tuple[Tensor, Any]:
        return batch[BURN_IN:-1], self.model.state(batch[:BURN_IN])

    def readout(self, tokens: Tensor, state: Any = None) -> Tensor:
        return self.model.hidden(tokens, state)

    @torch.no_grad()
    def roots(self, y: Tensor, batch: Any = None) -> Tensor:
        """Of Wᵀ(diag p − p pᵀ)W, the Fisher of a softmax with respect to what it reads: [K, Q] with Q ≤ K."""
        p, W = self.model.softmax(y).softmax(-1), self.model.softmax.weight
        wide = p.sqrt().unsqueeze(-2) * (W.mT - (p @ W).unsqueeze(-1))  # Wᵀ(diag √p − p √pᵀ), [T, B, K, V]
        return torch.linalg.qr(wide.mT, mode="r").R.mT


def chain(source: str, steps: int, cases: int, generator: torch.Generator) -> Tensor:
    """Symbols `[steps, cases]` of a Markov chain seen through noise."""
    transition = torch.tensor(CHAINS[source])
    state, symbols = torch.randint(len(transition), (cases,), generator=generator), []
    for _ in range(steps):
        noisy = torch.rand(cases, generator=generator) < NOISE
        symbols.append(torch.where(noisy, torch.randint(len(transition), (cases,), generator=generator), state))
        state = torch.multinomial(transition[state], 1, generator=generator).squeeze(-1)
    return torch.stack(symbols)


# -------------------------------------------------------------------------------------------------------- repeated copy


class RepeatedCopy:
    """Three patterns of two bits, asked for up to five times over; every T is a layout of its own."""

    updates, prefixes, exhaustive = (0, 250, 1000), False, True

    def __init__(self, seed: int):
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.layouts = [layout(repeats, repeats) for repeats in REPEATS]
        self.lengths = tuple(config.steps(config.max_length, config.max_repeats) for config in self.layouts)
        self.drawn = layout(min(REPEATS), max(REPEATS))
        sizes = {name: COPY[name] for name in ("hidden", "slots", "read_heads", "write_heads", "clip")}
        self.model = DNC(self.drawn.bits + 2, self.drawn.bits + 1, word=self.drawn.word_size, **sizes).double()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=3e-2)

    def fixed(self, batches: int) -> dict[int, list[repeat_copy.Batch]]:
        """All patterns there are, in one batch."""
        return dict(zip(self.lengths, ([every_pattern(config)] for config in self.layouts), strict=True))

    def losses(self, batch: repeat_copy.Batch) -> Tensor:
        """Summed over steps, bits and cases."""
        logits = self.model(batch.inputs)
        losses = F.binary_cross_entropy_with_logits(logits, batch.targets, reduction="none")
        return losses[batch.mask].sum()

    def nats(self, batch: repeat_copy.Batch) -> float:
        return self.losses(batch).item() / int(batch.mask.sum())

    def train(self, updates: int) -> None:
        for _ in range(updates):
            self.optimizer.zero_grad()
            batch = double(repeat_copy.draw(self.drawn, BATCH, self.generator))
            (self.losses(batch) / BATCH).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
            self.optimizer.step()

    def inputs(self, batch: repeat_copy.Batch) -> tuple[Tensor]:
        return (batch.inputs,)

    def readout(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)

    @torch.no_grad()
    def roots(self, y: Tensor, batch: repeat_copy.Batch) -> Tensor:
        """Of p(1 − p) for every bit that is to be predicted, 0 for the others."""
        p = y.sigmoid()
        return torch.diag_embed((p * (1 - p)).sqrt() * batch.mask.unsqueeze(-1))


def layout(least: int, most: int) -> repeat_copy.Config:
    return repeat_copy.Config(**COPY, **LAYOUT, **FLAGS, min_repeats=least, max_repeats=most)  # type: ignore[arg-type]


def every_pattern(config: repeat_copy.Config) -> repeat_copy.Batch:
    """One sequence of each; the layout is of one length and one number of repeats."""
    numbers = torch.arange(2 ** (config.max_length * config.bits))
    bits = (numbers[:, None] >> torch.arange(config.max_length * config.bits)) & 1
    patterns = bits.double().view(1, len(numbers), config.max_length, config.bits).transpose(1, 2)
    parts = repeat_copy.episode(config, patterns, config.max_repeats)
    return repeat_copy.Batch(*parts, None, parts[2].numel())


def double(batch: repeat_copy.Batch) -> repeat_copy.Batch:
    return repeat_copy.Batch(batch.inputs.double(), batch.targets.double(), batch.mask, batch.lengths, batch.tokens)
