"""The oracle of the statistics: one case at a time, one step at a time, in float64, with plain autograd.

Small models stand beside their literal evaluation. A case is run to its own length, so that the oracle has no notion of
a batch, of padding or of a layout; nothing but the parameters is shared with the product.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from kfacrnn.nn import GRU, LSTM, RNN, LayerNormLSTM
from kfacrnn.predictive import Bernoulli, Categorical

E, H = 2, 3  # dimension of embeddings, hidden units


class Given(Categorical):
    """A categorical that "samples" the targets it was given."""

    def __init__(self, targets: Tensor, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.targets = targets.transpose(0, 1) if self.batch_first else targets

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return self.targets


class GivenBits(Bernoulli):
    def __init__(self, targets: Tensor, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.targets = targets

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return self.targets


class LanguageModel(nn.Module):
    """Embedding, recurrent layers, norm, softmax: one of every kind of map."""

    def __init__(self, layer: type = LSTM, vocabulary: int = 5, layers: int = 2, **options: Any):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, E)
        self.rnn = layer(E, H, layers, **options)
        width = 2 * H if options.get("bidirectional") else H
        self.norm = nn.LayerNorm(width)
        self.softmax = nn.Linear(width, vocabulary)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn_like(parameter))

    def forward(self, tokens: Tensor, packed: Tensor | None = None) -> Tensor:
        """`packed` are the lengths of the PackedSequence that the recurrent layers are given, if it is one."""
        x, layout = self.embedding(tokens), {"batch_first": self.rnn.batch_first}
        if packed is None:
            return self.softmax(self.norm(self.rnn(x)[0]))
        h = self.rnn(pack_padded_sequence(x, packed, **layout, enforce_sorted=False))[0]
        return self.softmax(self.norm(pad_packed_sequence(h, **layout)[0]))


class Case:
    """What every map saw in one case: `a[name][t]` and `s[name][t]`."""

    def __init__(self, model: nn.Module):
        self.parameters = dict(model.named_parameters())
        self.a: dict[str, list[Tensor]] = defaultdict(list)
        self.s: dict[str, list[Tensor]] = defaultdict(list)

    def see(self, name: str, a: Tensor, s: Tensor) -> Tensor:
        self.a[name].append(a.detach())
        self.s[name].append(s)
        return s

    def affine(self, name: str, a: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        s = W @ a
        return self.see(name, a, s) if b is None else self.see(name, torch.cat([a, torch.ones(1).to(a)]), s + b)

    def gradients(self, loss: Tensor) -> dict[str, list[Tensor]]:
        sources = [s for steps in self.s.values() for s in steps]
        found = iter(torch.autograd.grad(loss, sources, materialize_grads=True, allow_unused=True))
        return {name: [next(found) for _ in steps] for name, steps in self.s.items()}


def standardise(z: Tensor) -> Tensor:
    return (z - z.mean()) / torch.sqrt(((z - z.mean()) ** 2).mean() + 1e-5)


def cell(s: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """c_t and the output gate."""
    i, f, g, o = s.split(H)
    return f.sigmoid() * c + i.sigmoid() * g.tanh(), o.sigmoid()


def lstm(case: Case, name: str, layer: str, x: Sequence[Tensor]) -> list[Tensor]:
    keys = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    W_x, W_h, b_x, b_h = (case.parameters[f"{name}.{key}_l{layer}"] for key in keys)
    h, c, outputs = torch.zeros(H).to(W_x), torch.zeros(H).to(W_x), []
    for x_t in x:
        s = case.affine(f"{name}.l{layer}", torch.cat([x_t, h]), torch.cat([W_x, W_h], 1), b_x + b_h)
        c, o = cell(s, c)
        h = o * c.tanh()
        outputs.append(h)
    return outputs


def layer_norm_lstm(case: Case, name: str, layer: str, x: Sequence[Tensor]) -> list[Tensor]:
    keys = ("weight_ih", "weight_hh", "gain_ih", "gain_hh", "gain_c", "bias", "bias_c")
    W_x, W_h, gain_x, gain_h, gain_c, b, b_c = (case.parameters[f"{name}.{key}_l{layer}"] for key in keys)
    prefix = f"{name}.l{layer}"
    h, c, outputs = torch.zeros(H).to(W_x), torch.zeros(H).to(W_x), []
    for x_t in x:
        from_x = standardise(case.affine(f"{prefix}.ih", x_t, W_x))
        from_h = standardise(case.affine(f"{prefix}.hh", h, W_h))
        s = case.see(f"{prefix}.norm_ih", from_x, gain_x * from_x) + gain_h * from_h + b
        case.see(f"{prefix}.norm_hh", from_h, s)
        case.see(f"{prefix}.bias", from_x, s)
        c, o = cell(s, c)
        h = o * case.see(f"{prefix}.norm_c", standardise(c), gain_c * standardise(c) + b_c).tanh()
        outputs.append(h)
    return outputs


def gru(case: Case, name: str, layer: str, x: Sequence[Tensor]) -> list[Tensor]:
    keys = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    W_x, W_h, b_x, b_h = (case.parameters[f"{name}.{key}_l{layer}"] for key in keys)
    W_xr, W_xz, W_xn = W_x.split(H)
    W_hr, W_hz, W_hn = W_h.split(H)
    W = torch.cat([torch.cat([W_xr, W_hr], 1), torch.cat([W_xz, W_hz], 1)])
    b = torch.cat([b_x[:H] + b_h[:H], b_x[H : 2 * H] + b_h[H : 2 * H]])
    h, outputs = torch.zeros(H).to(W_x), []
    for x_t in x:
        s = case.affine(f"{name}.l{layer}", torch.cat([x_t, h]), W, b)
        r, z = s[:H].sigmoid(), s[H:].sigmoid()
        from_x = case.affine(f"{name}.l{layer}.ih", x_t, W_xn, b_x[2 * H :])
        from_h = case.affine(f"{name}.l{layer}.hh", h, W_hn, b_h[2 * H :])
        h = (1 - z) * (from_x + r * from_h).tanh() + z * h
        outputs.append(h)
    return outputs


def rnn(activation: Callable[[Tensor], Tensor], case: Case, name: str, layer: str, x: Sequence[Tensor]) -> list[Tensor]:
    keys = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    W_x, W_h, b_x, b_h = (case.parameters[f"{name}.{key}_l{layer}"] for key in keys)
    h, outputs = torch.zeros(H).to(W_x), []
    for x_t in x:
        h = activation(case.affine(f"{name}.l{layer}", torch.cat([x_t, h]), torch.cat([W_x, W_h], 1), b_x + b_h))
        outputs.append(h)
    return outputs


def recurrence(module: nn.Module) -> Callable[[Case, str, str, Sequence[Tensor]], list[Tensor]]:
    if isinstance(module, RNN):
        return partial(rnn, {"tanh": torch.tanh, "relu": torch.relu}[module.nonlinearity])
    return {LSTM: lstm, LayerNormLSTM: layer_norm_lstm, GRU: gru}[type(module)]


def backwards(module: nn.Module, case: Case, layer: str, x: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a layer that begins at the end; what its maps saw is left in the order of time."""
    outputs = recurrence(module)(case, "rnn", layer, x[::-1])
    for seen in (case.a, case.s):
        for name in seen:
            if name.startswith(f"rnn.l{layer}"):
                seen[name].reverse()
    return outputs[::-1]


def language_model(model: LanguageModel, tokens: Tensor) -> tuple[Case, list[Tensor]]:
    """The case and its logits, for the tokens `[T]` of one sequence."""
    case = Case(model)
    weight = case.parameters["embedding.weight"]
    one_hot = F.one_hot(tokens, len(weight)).to(weight.dtype)
    x = [case.see("embedding", a, a @ weight) for a in one_hot]
    for layer in map(str, range(model.rnn.num_layers)):
        h = recurrence(model.rnn)(case, "rnn", layer, x)
        if getattr(model.rnn, "bidirectional", False):
            h = [torch.cat(both) for both in zip(h, backwards(model.rnn, case, f"{layer}_reverse", x), strict=True)]
        x = h
    gain, shift = case.parameters["norm.weight"], case.parameters["norm.bias"]
    x = [case.see("norm", standardise(h), gain * standardise(h) + shift) for h in x]
    W, b = case.parameters["softmax.weight"], case.parameters["softmax.bias"]
    return case, [case.affine("softmax", h, W, b) for h in x]


def categorical_loss(logits: Sequence[Tensor], targets: Tensor) -> Tensor:
    """Log-loss summed over the steps of one case."""
    return sum((z.logsumexp(0) - z[y] for z, y in zip(logits, targets, strict=True)), torch.zeros(()))


def bernoulli_loss(logits: Sequence[Tensor], targets: Tensor, mask: Tensor) -> Tensor:
    losses = [(F.softplus(z) - y * z).sum() for z, y, m in zip(logits, targets, mask, strict=True) if m]
    return sum(losses, torch.zeros(()))


class Series(NamedTuple):
    """a_t and g_t of one map in one case."""

    a: list[Tensor]
    g: list[Tensor]


def series(cases: Sequence[tuple[Case, Tensor]]) -> dict[str, list[Series]]:
    """By map, one per case, from cases and their losses."""
    by_map: dict[str, list[Series]] = defaultdict(list)
    for case, loss in cases:
        for name, g in case.gradients(loss).items():
            by_map[name].append(Series(case.a[name], g))
    return by_map


def language_model_series(
    model: LanguageModel, tokens: Tensor, targets: Tensor, lengths: Sequence[int]
) -> dict[str, list[Series]]:
    """`tokens` and `targets` are `[T, B]`."""
    cases = []
    for index, length in enumerate(lengths):
        case, logits = language_model(model, tokens[:length, index])
        cases.append((case, categorical_loss(logits, targets[:length, index])))
    return series(cases)


def moment(sequences: Sequence[Sequence[Tensor]], lag: int) -> Tensor:
    """(1/ΣT) Σ_cases Σ_t x_{t+lag} x_tᵀ."""
    total = torch.zeros(len(sequences[0][0]), len(sequences[0][0]), dtype=torch.float64)
    for x in sequences:
        for t in range(len(x) - lag):
            total += torch.outer(x[t + lag], x[t])
    return total / sum(len(x) for x in sequences)


def A(cases: Sequence[Series], lag: int) -> Tensor:
    return moment([case.a for case in cases], lag)


def G(cases: Sequence[Series], lag: int, rows: slice = slice(None)) -> Tensor:
    return moment([[g[rows] for g in case.g] for case in cases], lag)


def gain_moment(cases: Sequence[Series]) -> Tensor:
    """The diagonal of E[(g ⊙ a)(g ⊙ a)ᵀ]."""
    return moment([[g * a for a, g in zip(*case, strict=True)] for case in cases], 0).diagonal()


def gate(number: int) -> slice:
    return slice(number * H, (number + 1) * H)
