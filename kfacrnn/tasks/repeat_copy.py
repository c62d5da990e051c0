"""Repeated copy with a DNC (section 4.2, figure 3): show random bit sequences, then ask for them several times over.

One episode, with L patterns to a sequence and r repeats; inputs have `bits` + 2 channels, targets `bits` + 1:

    steps            input                               target                          predicted
    1, then L        start flag, then the patterns       0                               no          for every sequence
    1                r / norm_max in the last channel    0                               no
    sequences·L·r    0                                   the patterns shown, r times     yes
    1                0                                   end flag in the last channel    yes

The paper says only "a series of two random binary sequences" and "22 time-steps", which the layout of the DNC's authors
(one sequence, L(r + 1) + 3 steps) gives for L = 1, r = 18 alone. How 22 comes about here is therefore a guess, and
`configs/task/repeat_copy.yaml` lists the others: compare curves with figure 3 by their shape, not by their level.

The loss is summed over the predicted steps and bits and averaged over the sequences, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kfacrnn import ranks
from kfacrnn.nn import DNC
from kfacrnn.predictive import Bernoulli
from kfacrnn.settings import setting
from kfacrnn.tasks import DataSource
from kfacrnn.tasks._generators import private_generator

Count = TypeVar("Count", int, Tensor)


@dataclass
class Config:
    """The DNC's sizes, the batch and the layout of an episode."""

    name: str = setting("module in kfacrnn/tasks")
    hidden: int = setting("LSTM units of the controller", at_least=1)
    slots: int = setting("words in the memory", at_least=1)
    word_size: int = setting("numbers in a word", at_least=1)
    read_heads: int = setting("read heads", at_least=1)
    write_heads: int = setting("write heads", at_least=1)
    clip: float = setting("bound on hidden state, cell and logits", above=0)
    batch_size: int = setting("sequences per update", at_least=1)
    eval_sequences: int = setting("sequences in each held-out set", at_least=1)
    bits: int = setting("bits of a pattern", at_least=1)
    episodes: int = setting("episodes one after another", at_least=1)
    sequences: int = setting("sequences shown before any is asked for", at_least=1)
    min_length: int = setting("fewest patterns in a sequence", at_least=1)
    max_length: int = setting("most patterns in a sequence", at_least=1)
    min_repeats: int = setting("fewest repeats", at_least=1)
    max_repeats: int = setting("most repeats", at_least=1)
    norm_max: float = setting("the repeat channel shows repeats / norm_max", above=0)
    start_flag_each: bool = setting("a start flag before every sequence of an episode, not only before the first")
    end_step: bool = setting("a last step at which the end flag is to be predicted")
    pad_to: int | None = setting("steps up to which a batch is padded; null: its longest", at_least=1)

    def steps(self, length: Count, repeats: Count) -> Count:
        """Time-steps of one episode."""
        starts = self.sequences if self.start_flag_each else 1
        return starts + self.sequences * length * (1 + repeats) + 1 + self.end_step

    def check(self) -> Iterator[str]:
        for what in ("length", "repeats"):
            low, high = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if low > high:
                yield f"min_{what}={low}: must be at most max_{what}={high}"
        longest = self.episodes * self.steps(self.max_length, self.max_repeats)
        if self.pad_to is not None and self.pad_to < longest:
            yield f"pad_to={self.pad_to}: must be at least {longest}, the steps of the longest sequence"


@dataclass(frozen=True, eq=False)
class Batch:
    """B sequences: `inputs` `[T, B, bits + 2]`, `targets` `[T, B, bits + 1]`, `mask` `[T, B]`, True where predicted;
    `lengths` `[B]`, None if all are T."""

    inputs: Tensor
    targets: Tensor
    mask: Tensor
    lengths: Tensor | None
    tokens: int

    def to(self, device: torch.device) -> Batch:
        lengths = None if self.lengths is None else self.lengths.to(device)
        return Batch(self.inputs.to(device), self.targets.to(device), self.mask.to(device), lengths, self.tokens)

    def mine(self) -> Batch:
        """Those of the sequences that this process holds."""
        inputs, targets, mask = (ranks.mine(part, dim=1) for part in (self.inputs, self.targets, self.mask))
        lengths = None if self.lengths is None else ranks.mine(self.lengths, dim=0)
        tokens = inputs.shape[0] * inputs.shape[1] if lengths is None else int(lengths.sum())
        return Batch(inputs, targets, mask, lengths, tokens)

    @property
    def cases(self) -> int:
        return self.inputs.shape[1]

    @property
    def units(self) -> int:
        return self.cases


def episode(config: Config, patterns: Tensor, repeats: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and mask, time first, that show `patterns` `[sequences, L, B, bits]` and ask for them."""
    _, length, cases, bits = patterns.shape
    steps = config.steps(length, repeats)
    inputs = patterns.new_zeros(steps, cases, bits + 2)
    targets = patterns.new_zeros(steps, cases, bits + 1)
    step = 0
    for index, sequence in enumerate(patterns):
        if index == 0 or config.start_flag_each:
            inputs[step, :, bits] = 1
            step += 1
        inputs[step : step + length, :, :bits] = sequence
        step += length
    inputs[step, :, bits + 1] = repeats / config.norm_max
    step += 1
    recall = patterns.flatten(0, 1).repeat(repeats, 1, 1)
    targets[step : step + len(recall), :, :bits] = recall
    if config.end_step:
        targets[-1, :, bits] = 1
    mask = (torch.arange(steps) >= step).unsqueeze(1).expand(steps, cases)
    return inputs, targets, mask


def draw(config: Config, cases: int, generator: torch.Generator) -> Batch:
    """Fresh random sequences on the CPU, built together where they share lengths and repeats."""
    layout_shape = (cases, config.episodes)
    lengths = torch.randint(config.min_length, config.max_length + 1, layout_shape, generator=generator)
    repeats = torch.randint(config.min_repeats, config.max_repeats + 1, layout_shape, generator=generator)
    pattern_shape = (config.episodes, config.sequences, config.max_length, cases, config.bits)
    patterns = torch.randint(2, pattern_shape, generator=generator).to(torch.get_default_dtype())

    ends = config.steps(lengths, repeats).sum(1)
    steps = max(config.pad_to or 0, int(ends.max()))
    inputs = patterns.new_zeros(steps, cases, config.bits + 2)
    targets = patterns.new_zeros(steps, cases, config.bits + 1)
    mask = torch.zeros(steps, cases, dtype=torch.bool)
    layouts, layout_of_case = torch.stack([lengths, repeats], 2).unique(dim=0, return_inverse=True)
    for index, layout in enumerate(layouts.tolist()):
        chosen, end = layout_of_case == index, 0
        for shown, (length, times) in zip(patterns[..., chosen, :], layout, strict=True):
            parts = episode(config, shown[:, :length], times)
            start, end = end, end + len(parts[0])
            inputs[start:end, chosen], targets[start:end, chosen], mask[start:end, chosen] = parts
    tokens = int(ends.sum())
    return Batch(inputs, targets, mask, None if tokens == steps * cases else ends, tokens)


class RepeatCopy:
    unit: str = "sequence"
    metric: str = "nats per sequence"
    loss_scale: float = 1.0  # the training loss is already summed over a sequence's steps
    updates_per_epoch: int | None = None

    def __init__(self, config: Config, seed: int, device: torch.device):
        self.config, self.device = config, device
        self.checksums: dict[str, str] = {}
        self.generator = private_generator("train", seed)
        self.held_out = {
            split: draw(config, config.eval_sequences, private_generator(split)).to(device)
            for split in ("valid", "test")
        }
        # A fair coin for every bit that is asked for; the end flag is always 1 at one step and 0 elsewhere.
        length, repeats = config.min_length + config.max_length, config.min_repeats + config.max_repeats
        patterns = config.episodes * config.sequences * (length / 2) * (repeats / 2)
        self.chance = math.log(2) * config.bits * patterns

    def build_model(self) -> nn.Module:
        config = self.config
        model = DNC(
            config.bits + 2,
            config.bits + 1,
            hidden=config.hidden,
            slots=config.slots,
            word=config.word_size,
            read_heads=config.read_heads,
            write_heads=config.write_heads,
            clip=config.clip,
        )
        return model.to(self.device)

    def next_batch(self) -> Batch:
        return draw(self.config, self.config.batch_size, self.generator).mine().to(self.device)

    def predict(self, model: nn.Module, batch: Batch, cases: slice | Tensor = slice(None)) -> Bernoulli:
        lengths = None if batch.lengths is None else batch.lengths[cases]
        return Bernoulli(model(batch.inputs[:, cases]), batch.mask[:, cases], lengths)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.predict(model, batch).log_loss(batch.targets).mean()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> float:
        return self.loss(model, self.held_out[split]).item()

    @torch.no_grad()
    def wrong_bits(self, model: nn.Module, split: str) -> float:
        """The fraction of all predicted bits, end flags included, whose likelier value is wrong."""
        batch = self.held_out[split]
        wrong = (model(batch.inputs) > 0) != (batch.targets > 0)
        return wrong[batch.mask].double().mean().item()

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])


def build(config: Config, *, seed: int, device: torch.device, data: DataSource) -> RepeatCopy:
    return RepeatCopy(config, seed, device)
