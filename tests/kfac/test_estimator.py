"""Statistics passes: captured factors against `brute_force.py`, and what a pass may and may not touch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from kfacrnn.kfac.block import Curvature
from kfacrnn.kfac.estimator import Estimator
from kfacrnn.nn import DNC, GRU, LSTM, RNN, GRUCell, LayerNormLSTM, LSTMCell, RNNCell
from kfacrnn.predictive import Bernoulli, Categorical
from tests.kfac import brute_force
from tests.kfac.brute_force import A, G, Given, GivenBits, LanguageModel, Series, gain_moment, gate
from tests.nn.test_dnc import Reference

T, B, V = 5, 4, 5
LENGTHS = (5, 3, 1, 4)
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def estimator(model: nn.Module, *, decay: float = 0.95, empirical: bool = False, seed: int = 0, max_dense: int = 100):
    trained = {p for p in model.parameters() if p.requires_grad}
    curvature = Curvature("option2", max_dense, 1e10, torch.float64, empirical=empirical)
    return Estimator(model, trained, curvature, decay=decay, seed=seed)


def language_model(seed: int = 0, dtype: torch.dtype = torch.float64, **options):
    torch.manual_seed(seed)
    return LanguageModel(**options).to(dtype)


def tokens(seed: int = 1, steps: int = T, cases: int = B) -> Tensor:
    return torch.randint(V, (steps, cases), generator=torch.Generator().manual_seed(seed))


def values(estimator: Estimator, name: str) -> list[Tensor]:
    return estimator.blocks[name].average.values()


def assert_linear(estimator: Estimator, name: str, cases: list[Series], rows: list[slice], lags: bool = True) -> None:
    expected = [A(cases, 0), *([A(cases, 1)] if lags else []), *(G(cases, 0, r) for r in rows)]
    expected += [G(cases, 1, r) for r in rows] if lags else []
    torch.testing.assert_close(values(estimator, name), expected, **EXACT)


def assert_language_model(
    estimator: Estimator, by_map: dict[str, list[Series]], *, lags_of_softmax: bool = False
) -> None:
    assert set(estimator.blocks) == set(by_map)
    for name, cases in by_map.items():
        match name.rsplit(".")[-1]:
            case "embedding":
                torch.testing.assert_close(values(estimator, name), [A(cases, 0).diagonal(), G(cases, 0)], **EXACT)
            case "softmax":
                assert_linear(estimator, name, cases, [slice(None)], lags=lags_of_softmax)
            case "norm" | "norm_c":
                expected = [gain_moment(cases), G(cases, 0).diagonal()]
                torch.testing.assert_close(values(estimator, name), expected, **EXACT)
            case "norm_ih" | "norm_hh":
                torch.testing.assert_close(values(estimator, name), [gain_moment(cases)], **EXACT)
            case "bias":
                torch.testing.assert_close(values(estimator, name), [G(cases, 0).diagonal()], **EXACT)
            case _:
                gates = len(cases[0].g[0]) // brute_force.H
                assert_linear(estimator, name, cases, [gate(number) for number in range(gates)])


# -------------------------------------------------------------------------------------------- factors equal brute force


LAYERS = [LSTM, LayerNormLSTM, GRU, RNN, partial(RNN, nonlinearity="relu")]


@pytest.mark.parametrize("layer", LAYERS, ids=["LSTM", "LayerNormLSTM", "GRU", "RNN", "rectified RNN"])
@pytest.mark.parametrize("lengths", [(T,) * B, LENGTHS], ids=["full", "padded"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time_first", "batch_first"])
def test_factors_of_a_language_model_equal_brute_force_per_case_and_step(layer, lengths, batch_first):
    model = language_model(layer=layer, batch_first=batch_first)
    x, y = tokens(1), tokens(2)
    estimated = estimator(model)

    def forward():
        given, padding = ((x.mT, y.mT) if batch_first else (x, y)), torch.tensor(lengths)
        return Given(given[1], logits=model(given[0]), lengths=padding, batch_first=batch_first)

    estimated.update(forward)
    assert_language_model(estimated, brute_force.language_model_series(model, x, y, lengths))


@pytest.mark.parametrize("layer", [LSTM, GRU, RNN])
@pytest.mark.parametrize("lengths", [(T,) * B, LENGTHS, (3, 4, 1, 2)], ids=["full", "padded", "shorter"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time_first", "batch_first"])
def test_factors_of_both_directions_of_packed_sequences_equal_brute_force(layer, lengths, batch_first):
    model = language_model(layer=layer, bidirectional=True, batch_first=batch_first)
    x, y, packed = tokens(1), tokens(2), torch.tensor(lengths)
    estimated = estimator(model)

    def forward():
        logits = model(x.mT if batch_first else x, packed)
        targets = y[: max(lengths)]
        return Given(targets.mT if batch_first else targets, logits=logits, lengths=packed, batch_first=batch_first)

    estimated.update(forward)
    assert_language_model(estimated, brute_force.language_model_series(model, x, y, lengths))


class Looped(nn.Module):
    """A language model that takes one step at a time."""

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.embedding, self.norm, self.softmax = model.embedding, model.norm, model.softmax
        self.rnn = {LSTM: LSTMCell, GRU: GRUCell, RNN: RNNCell}[type(model.rnn)](2, 3, dtype=torch.float64)
        for name, parameter in self.rnn.named_parameters():
            parameter.data = getattr(model.rnn, f"{name}_l0").data

    def forward(self, tokens: Tensor) -> Tensor:
        state, logits = None, []
        for token in tokens:
            state = self.rnn(self.embedding(token), state)
            h = state[0] if isinstance(state, tuple) else state
            logits.append(self.softmax(self.norm(h)))
        return torch.stack(logits)


@pytest.mark.parametrize("layer", [LSTM, GRU, RNN])
@pytest.mark.parametrize("lengths", [(T,) * B, LENGTHS], ids=["full", "padded"])
def test_factors_of_a_loop_over_time_equal_brute_force(layer, lengths):
    model = language_model(layer=layer, layers=1)
    looped, x, y = Looped(model), tokens(1), tokens(2)
    estimated = estimator(looped)
    estimated.update(lambda: Given(y, logits=looped(x), lengths=torch.tensor(lengths)))
    expected = brute_force.language_model_series(model, x, y, lengths)
    assert_language_model(estimated, {name.replace(".l0", ".cell"): cases for name, cases in expected.items()})
    assert estimated.blocks["softmax"].is_logits


def test_steps_that_the_loss_does_not_depend_on_have_no_gradient():
    model = Looped(language_model(layers=1))
    x, y = tokens(1), tokens(2)
    estimated, whole = estimator(model), estimator(model)
    mask = torch.arange(T)[:, None].expand(T, B) < 3
    whole.update(lambda: Given(y, logits=model(x), mask=mask))
    estimated.update(lambda: Given(y, logits=F.pad(model(x)[:3], (0, 0, 0, 0, 0, T - 3)), mask=mask))
    torch.testing.assert_close(values(estimated, "rnn.cell"), values(whole, "rnn.cell"), rtol=0, atol=0)


@pytest.mark.parametrize("layer", [LSTM, GRU, RNN])
def test_a_loop_may_have_one_step(layer):
    model = language_model(layer=layer, layers=1)
    looped, x, y = Looped(model), tokens(1)[:1], tokens(2)[:1]
    estimated = estimator(looped)
    estimated.update(lambda: Given(y, logits=looped(x)))
    expected = brute_force.language_model_series(model, x, y, (1,) * B)
    assert_language_model(estimated, {name.replace(".l0", ".cell"): cases for name, cases in expected.items()})


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_step_may_keep_its_time_axis(batch_first):
    model, x, y, axis = language_model(layers=1), tokens(1), tokens(2), int(batch_first)
    looped = LanguageModel(layers=1, batch_first=batch_first).double()
    looped.load_state_dict(model.state_dict())

    def forward():
        state, logits = None, []
        for token in x:
            h, state = looped.rnn(looped.embedding(token.unsqueeze(axis)), state)
            logits.append(looped.softmax(looped.norm(h)))
        return Given(y.mT if batch_first else y, logits=torch.cat(logits, axis), batch_first=batch_first)

    estimated = estimator(looped)
    estimated.update(forward)
    assert_language_model(estimated, brute_force.language_model_series(model, x, y, (T,) * B))


def test_a_loop_that_goes_backwards_over_padding_is_refused_in_any_pass():
    model = Looped(language_model(layers=1))
    estimated, x = estimator(model), tokens(1)
    assert estimated.update(lambda: Categorical(model(x.flip(0)).flip(0)))
    with pytest.raises(ValueError, match="depend on steps behind the end"):
        estimated.update(lambda: Categorical(model(x.flip(0)).flip(0), lengths=LENGTHS))


def test_a_cell_has_no_layout_that_could_contradict_that_of_the_predictions():
    model = Looped(language_model(layers=1))
    x = torch.randint(V, (B, B))
    assert estimator(model).update(lambda: Categorical(model(x).transpose(0, 1), batch_first=True))


def test_packed_sequences_have_no_layout_that_could_contradict_that_of_the_predictions():
    model, packed = BatchFirst(), torch.tensor((4, 2, 1, 3))
    x = torch.randn(4, 4, 3)

    def forward():
        h = model.rnn(pack_padded_sequence(x, packed, enforce_sorted=False))[0]
        return Categorical(model.out(pad_packed_sequence(h)[0]), lengths=packed)

    assert estimator(model).update(forward)


def test_a_pass_that_is_not_finite_is_left_out_though_it_has_more_steps_than_the_predictions():
    model, lengths = language_model(), torch.tensor((3, 4, 1, 2))
    estimated = estimator(model)
    predicted = partial(Categorical, lengths=lengths)
    assert estimated.update(lambda: predicted(model(tokens(1), lengths)))
    with torch.no_grad():
        model.softmax.weight[0, 0] = torch.nan
    assert not estimated.update(lambda: predicted(model(tokens(1), lengths)))


class Deep(nn.Module):
    """Uses one layer `depth` times."""

    def __init__(self, used):
        super().__init__()
        self.rnn, self.mix, self.out, self.used = LSTM(3, 4), nn.Linear(4, 4), nn.Linear(4, V), used

    def forward(self, x):
        return self.used(self, self.rnn(x)[0])


@pytest.mark.parametrize(
    ("used", "message"),
    [
        (lambda m, h: m.out(h + m.mix(m.mix(h[-1])).tanh()), r"mix was used 2 times on 4 sequences, .* T = 5"),
        (
            lambda m, h: torch.stack(
                [m.out(F.pad(m.mix(h_t[:n]), (0, 0, 0, B - n))) for h_t, n in zip(h, (4, 4, 3, 2, 1), strict=True)]
            ),
            "mix was given 4 sequences at one step and 1 at another: give it all of them at every step",
        ),
    ],
    ids=["in depth", "shrinking"],
)
def test_uses_that_are_no_time_steps_are_refused_by_name(used, message):
    model = Deep(used)
    with pytest.raises(ValueError, match=message):
        estimator(model).update(lambda: Categorical(model(torch.randn(T, B, 3))))


def test_without_lengths_both_directions_take_all_steps():
    model = language_model(bidirectional=True)
    x, y = tokens(1), tokens(2)
    estimated = estimator(model)
    estimated.update(lambda: Given(y, logits=model(x)))
    assert_language_model(estimated, brute_force.language_model_series(model, x, y, (T,) * B))


@pytest.mark.parametrize("told", [None, (5, 3, 1, 3)])
def test_lengths_of_a_packed_sequence_that_the_distribution_does_not_share_are_refused(told):
    model, packed = language_model(), torch.tensor(LENGTHS)
    expected = r"rnn\.l0 .* PackedSequence of lengths \[5, 3, 1, 4\], the predictions have \[5, (5, 5, 5|3, 1, 3)\]"
    with pytest.raises(ValueError, match=expected):
        estimator(model).update(lambda: Categorical(model(tokens(), packed), lengths=told))


def test_logits_may_have_more_steps_than_a_packed_sequence():
    model, x, y, lengths = language_model(bidirectional=True), tokens(1), tokens(2), torch.tensor((3, 4, 1, 2))
    estimated = estimator(model)
    estimated.update(lambda: Given(y, logits=F.pad(model(x, lengths), (0, 0, 0, 0, 0, 1)), lengths=lengths))
    assert_language_model(estimated, brute_force.language_model_series(model, x, y, lengths.tolist()))


def test_what_stands_in_the_padding_contributes_nothing():
    model = language_model()
    x, y, lengths = tokens(1), tokens(2), torch.tensor(LENGTHS)
    behind = torch.arange(T)[:, None] >= lengths
    other_x, other_y = torch.where(behind, (x + 1) % V, x), torch.where(behind, -1, y)  # −1 is no class
    first, second = estimator(model), estimator(model)
    first.update(lambda: Given(y, logits=model(x), lengths=lengths))
    second.update(lambda: Given(other_y, logits=model(other_x), lengths=lengths))
    for name in first.blocks:
        torch.testing.assert_close(values(first, name), values(second, name), rtol=0, atol=0)
    assert first.blocks["rnn.l0"].average.lengths == {1: 0.25, 3: 0.25, 4: 0.25, 5: 0.25}


def test_how_sequences_of_different_lengths_are_cut_into_passes_does_not_matter():
    model, x, y = language_model(), tokens(1), tokens(2)
    at_once, one_by_one = estimator(model, decay=1.0), estimator(model, decay=1.0)
    at_once.update(lambda: Given(y, logits=model(x), lengths=torch.tensor(LENGTHS)))
    for case, length in enumerate(LENGTHS):
        part = slice(None, length), slice(case, case + 1)
        one_by_one.update(lambda part=part: Given(y[part], logits=model(x[part])))
    for name, block in at_once.blocks.items():
        lengths = [average.lengths for average in (block.average, one_by_one.blocks[name].average)]
        mean_lengths = [sum(T * mass for T, mass in found.items()) / sum(found.values()) for found in lengths]
        assert mean_lengths[0] == pytest.approx(mean_lengths[1])
        torch.testing.assert_close(values(one_by_one, name), values(at_once, name), **EXACT)


class Residual(nn.Module):
    """With a branch that begins at zero, added in place or not."""

    def __init__(self, in_place: bool):
        super().__init__()
        self.in_place, self.embedding = in_place, nn.Embedding(V, 3)
        self.branch, self.output = nn.Linear(3, 3), nn.Linear(3, V)
        nn.init.zeros_(self.branch.weight)
        nn.init.zeros_(self.branch.bias)

    def forward(self, x):
        h = self.embedding(x) * 1
        if self.in_place:
            h += self.branch(h)
            return self.output(h)
        return self.output(h + self.branch(h))


def test_an_input_that_is_changed_in_place_under_autocast_is_what_it_was():
    averages = []
    for in_place in (False, True):
        torch.manual_seed(0)
        model = Residual(in_place)
        estimated = estimator(model)
        with torch.autocast("cpu", torch.bfloat16):
            estimated.update(lambda model=model: Given(tokens(2), logits=model(tokens())))
            with torch.no_grad():
                model.branch.weight.copy_(2 * torch.eye(3))
            estimated.update(lambda model=model: Given(tokens(2), logits=model(tokens())))
        averages.append(values(estimated, "branch"))
    torch.testing.assert_close(*averages, rtol=0, atol=0)


class Normed(nn.Module):
    def __init__(self, norm: nn.LayerNorm, twice: bool):
        super().__init__()
        self.twice, self.embedding, self.norm, self.output = twice, nn.Embedding(V, 3), norm, nn.Linear(3, V)

    def forward(self, x):
        h = self.norm(self.embedding(x))
        if self.twice:
            h = F.layer_norm(h + 1, (3,), self.norm.weight, self.norm.bias)
        return self.output(h)


class RootMeanSquare(nn.LayerNorm):
    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


def test_a_kind_of_layer_norm_that_is_not_torchs_is_no_map():
    assert set(estimator(Normed(RootMeanSquare(3), twice=False)).uncovered) == {"norm.weight", "norm.bias"}


def test_a_gain_that_acts_otherwise_than_its_map_does_is_refused():
    torch.manual_seed(0)
    model = Normed(nn.LayerNorm(3), twice=True)
    with pytest.raises(ValueError, match=r"norm\.weight.*: the loss depends on it in other ways than through norm"):
        estimator(model).update(lambda: Categorical(model(tokens())))


def test_a_mask_takes_predictions_away_but_not_time_steps():
    model = language_model(layers=1)
    x, y = tokens(1), tokens(2)
    mask = torch.rand(T, B, generator=torch.Generator().manual_seed(3)) < 0.5
    estimated = estimator(model)
    estimated.update(lambda: Given(y, logits=model(x), mask=mask))
    cases = []
    for index in range(B):
        case, logits = brute_force.language_model(model, x[:, index])
        losses = [F.cross_entropy(z, target) for z, target in zip(logits, y[:, index], strict=True)]
        cases.append((case, sum(loss for loss, counts in zip(losses, mask[:, index], strict=True) if counts)))
    assert_language_model(estimated, brute_force.series(cases))
    assert estimated.blocks["rnn.l0"].average.lengths == {T: 1.0}


def test_factors_of_a_dnc_equal_brute_force_per_case_and_step_and_map():
    torch.manual_seed(0)
    sizes = {"inputs": 3, "outputs": 2, "hidden": 3, "slots": 4, "word": 2, "read_heads": 2}
    model, steps, number = DNC(**sizes).double(), 4, 3
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(steps, number, 3, dtype=torch.float64)
    bits = (torch.rand(steps, number, 2) < 0.5).double()
    mask = torch.arange(steps)[:, None] >= torch.tensor([2, 1, 3])
    estimated = estimator(model)
    estimated.update(lambda: GivenBits(bits, logits=model(x), mask=mask))

    reference, by_map = Reference(model), {"controller": [], "interface": [], "output": []}
    for index in range(number):
        loss = brute_force.bernoulli_loss(reference(x[:, index]), bits[:, index], mask[:, index])
        for name, cases in by_map.items():
            g = torch.autograd.grad(loss, reference.preactivations[name], retain_graph=True)
            cases.append(Series([torch.cat([a, torch.ones(1)]).detach() for a in reference.inputs[name]], list(g)))
    ends = np.cumsum([0, *model.interface_rows.values()])
    assert len(ends) == 11
    assert_linear(estimated, "controller", by_map["controller"], [slice(3 * k, 3 * k + 3) for k in range(4)])
    rows = [slice(start, end) for start, end in pairwise(ends)]
    assert_linear(estimated, "interface", by_map["interface"], rows)
    assert_linear(estimated, "output", by_map["output"], [slice(None)], lags=False)


class Conditioned(nn.Module):
    """A map that is used once per sequence beside two that are used at every step."""

    def __init__(self):
        super().__init__()
        self.once, self.every, self.output = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(3, V)

    def forward(self, x, condition):
        return self.output(torch.tanh(self.every(x) + self.once(condition)))


def test_a_map_that_is_used_once_per_sequence_has_one_step_per_case():
    torch.manual_seed(0)
    model = Conditioned().double()
    x, condition = torch.randn(T, B, 2).double(), torch.randn(B, 2).double()
    y, lengths = tokens(2), torch.tensor(LENGTHS)
    estimated = estimator(model)
    estimated.update(lambda: Given(y, logits=model(x, condition), lengths=lengths))
    a, g = [], []
    for index, length in enumerate(LENGTHS):
        s = model.once(condition[index])
        logits = model.output(torch.tanh(model.every(x[:length, index]) + s))
        g += torch.autograd.grad(brute_force.categorical_loss(list(logits), y[:length, index]), s)
        a.append(torch.cat([condition[index], torch.ones(1)]))
    A0, A1, G0, G1 = values(estimated, "once")
    torch.testing.assert_close([A0, G0], [moment / B for moment in (sum(map(outer, a)), sum(map(outer, g)))], **EXACT)
    assert not A1.any()
    assert not G1.any()
    assert estimated.blocks["once"].average.lengths == {1: 1.0}


def test_the_last_state_of_a_layer_with_an_axis_of_layers_counts_once_per_sequence():
    model, x, condition = Conditioned().double(), torch.randn(T, B, 2).double(), torch.randn(B, 2).double()
    averages = []
    for given in (condition, condition.unsqueeze(0)):
        estimated = estimator(model)
        estimated.update(lambda given=given: Given(tokens(2), logits=model(x, given)))
        averages.append(values(estimated, "once"))
    torch.testing.assert_close(*averages, rtol=0, atol=0)


@pytest.mark.parametrize("steps", [T, B])
def test_positions_that_all_sequences_share_are_not_taken_for_sequences(steps):
    class Positioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.positions, self.output = nn.Embedding(V, 3), nn.Embedding(steps, 3), nn.Linear(3, V)

        def forward(self, x):
            return self.output(self.embedding(x) + self.positions(torch.arange(steps).unsqueeze(0)))

    model, x = Positioned(), tokens(steps=steps).mT
    with pytest.raises(ValueError, match=r"^positions was given leading axes \[1, "):
        estimator(model).update(lambda: Categorical(model(x), batch_first=True))


def outer(x: Tensor) -> Tensor:
    return torch.outer(x, x).detach()


def test_averages_weigh_passes_by_their_age_and_steps_and_correct_the_start():
    model, decay = language_model(layers=1), 0.5
    estimated, expected, weight, lengths = estimator(model, decay=decay), 0.0, 0.0, {}
    for number, steps in enumerate((3, 5, 5)):
        x, y = tokens(2 * number, steps), tokens(2 * number + 1, steps)
        estimated.update(lambda x=x, y=y: Given(y, logits=model(x)))
        cases = brute_force.language_model_series(model, x, y, [steps] * B)["rnn.l0"]
        new = torch.stack([A(cases, 0), A(cases, 1)])
        expected, weight = decay * expected + steps * new, decay * weight + steps
        lengths = {T: decay * mass for T, mass in lengths.items()}
        lengths[steps] = lengths.get(steps, 0.0) + 1
    torch.testing.assert_close(values(estimated, "rnn.l0")[:2], list(expected / weight), **EXACT)
    assert estimated.blocks["rnn.l0"].average.lengths == lengths


def test_the_empirical_fisher_uses_the_targets_that_forward_returns_and_its_output_errors_are_correlated_over_time():
    model = language_model(batch_first=True)
    x, y = tokens(1), tokens(2)
    estimated = estimator(model, empirical=True)
    estimated.update(lambda: (Categorical(model(x.mT), batch_first=True), y.mT))
    by_map = brute_force.language_model_series(model, x, y, [T] * B)
    assert_language_model(estimated, by_map, lags_of_softmax=True)


def test_the_empirical_fisher_of_a_large_softmax_knows_the_targets_too():
    model, x, y = language_model(), tokens(1), tokens(2)
    estimated = estimator(model, empirical=True, max_dense=4)
    estimated.update(lambda: (Categorical(model(x)), y))
    errors = model(x).softmax(-1).detach() - F.one_hot(y, V)
    torch.testing.assert_close(values(estimated, "softmax")[1], errors.square().mean((0, 1)), **EXACT)


def test_under_bf16_autocast_factors_are_float32_positive_and_near_those_of_float32():
    model, x, y = language_model(dtype=torch.float32), tokens(1, 12, 16), tokens(2, 12, 16)
    exact, rounded = estimator(model), estimator(model)
    exact.update(lambda: Given(y, logits=model(x)))
    with torch.autocast("cpu", torch.bfloat16):
        rounded.update(lambda: Given(y, logits=model(x)))
    for name in exact.blocks:
        for reference, factor in zip(values(exact, name), values(rounded, name), strict=True):
            assert factor.dtype == torch.float32
            assert (factor - reference).norm() < 0.03 * reference.norm()  # bf16 has 8 bits
    for block in rounded.blocks.values():
        for factor in block.average.values()[:1]:
            smallest = torch.linalg.eigvalsh(factor.double()).min() if factor.dim() == 2 else factor.min()
            assert smallest >= -1e-5 * factor.abs().max()


# ------------------------------------------------------------------------------------------------ what sampling implies


def test_factors_are_accumulated_in_full_precision_under_autocast():
    model, x, y = language_model(dtype=torch.float32), tokens(1), tokens(2)
    exact, inside = estimator(model), estimator(model)
    exact.update(lambda: Given(y, logits=model(x)))

    def forward():
        with torch.autocast("cpu", enabled=False):
            return Given(y, logits=model(x))

    with torch.autocast("cpu", torch.bfloat16):
        inside.update(forward)
    for name in exact.blocks:
        torch.testing.assert_close(values(exact, name), values(inside, name), rtol=0, atol=0)


def test_a_large_softmax_gets_the_exact_diagonal_of_its_G_which_sampling_confirms():
    model, x = language_model(), tokens(1, 6, 30)
    p = model(x).softmax(-1).detach().flatten(0, 1)
    exact = estimator(model, max_dense=4)
    exact.update(lambda: Categorical(model(x)))
    diagonal = values(exact, "softmax")[1]
    torch.testing.assert_close(diagonal, (p * (1 - p)).mean(0), **EXACT)

    sampled = estimator(model, decay=0.0)  # every pass alone
    draws = []
    for _ in range(60):
        sampled.update(lambda: Categorical(model(x)))
        draws.append(values(sampled, "softmax")[1].diagonal().clone())
    assert scores(torch.stack(draws) - diagonal).abs().max() < 4.5


def scores(draws: Tensor) -> Tensor:
    """Means over the first axis, in standard errors."""
    return draws.mean(0) / (draws.std(0) / len(draws) ** 0.5)


def test_output_errors_of_successive_steps_are_uncorrelated_and_those_of_recurrent_maps_are_not(monkeypatch):
    monkeypatch.setattr("kfacrnn.kfac.block.Block.meet_logits", lambda *_: None)  # keep lag factors of the softmax
    model, x = language_model(), tokens(1, 8, 30)
    estimated = estimator(model, decay=0.0)
    softmax, recurrent = [], []
    for _ in range(80):
        estimated.update(lambda: Categorical(model(x)))
        softmax.append(values(estimated, "softmax")[-1])
        recurrent.append(values(estimated, "rnn.l1")[-1])
    assert scores(torch.stack(softmax)).abs().max() < 4.5  # 25 entries: 1 in 6,000 by chance
    assert scores(torch.stack(recurrent)).abs().max() > 10


def whitened(M0: Tensor, M1: Tensor, damping: float) -> float:
    """The largest singular value of Ψ̂, with the symmetric root of the damped M0."""
    M0, M1 = M0.double().numpy(), M1.double().numpy()
    spectrum, Q = np.linalg.eigh(M0 + damping * np.trace(M0) / len(M0) * np.eye(len(M0)))
    root = Q / np.sqrt(spectrum) @ Q.T
    return np.linalg.svd(root @ M1 @ root, compute_uv=False).max()


@pytest.mark.parametrize(("dtype", "damping"), [(torch.float32, 1e-3), (torch.float64, 1e-10)], ids=str)
@pytest.mark.parametrize("layer", [LSTM, LayerNormLSTM, GRU])
def test_no_singular_value_of_psi_exceeds_one_on_padded_averaged_statistics(dtype, damping, layer):
    model = language_model(dtype=dtype, layer=layer, dropout=0.3)
    estimated = estimator(model, decay=0.8)
    for number in range(6):
        lengths = torch.randint(1, 13, (20,), generator=torch.Generator().manual_seed(number))
        x = tokens(number, 12, 20).double().mul(0.4).long()  # tokens 0 and 1: strongly correlated inputs
        estimated.update(lambda x=x, lengths=lengths: Categorical(model(x), lengths=lengths))
    largest = []
    for name, block in estimated.blocks.items():
        if name.startswith("rnn.l") and getattr(block, "has_lags", False):
            A0, A1, *G = block.average.values()
            gates = len(G) // 2
            largest += [whitened(A0, A1, damping), *(whitened(G[k], G[k + gates], damping) for k in range(gates))]
    assert len(largest) == {LSTM: 10, LayerNormLSTM: 20, GRU: 14}[layer]
    assert max(largest) <= 1 + 1e-4
    assert max(largest) > 0.75  # the bound is nearly attained, not trivially kept


# --------------------------------------------------------------------------------------------------- what stays private


def test_a_pass_leaves_gradients_and_the_global_generator_alone():
    model, x = language_model(dropout=0.5), tokens()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    estimator(model).update(lambda: Categorical(model(x)))
    assert torch.equal(torch.get_rng_state(), state)
    assert all((parameter.grad == 7).all() for parameter in model.parameters())


def test_the_same_seed_gives_the_same_samples_and_dropout_whatever_the_global_generator():
    model, x = language_model(dropout=0.5), tokens()
    found = []
    for global_seed, seed in ((0, 1), (99, 1), (0, 2)):
        torch.manual_seed(global_seed)
        estimated = estimator(model, seed=seed)
        estimated.update(lambda: Categorical(model(x)))
        found.append(values(estimated, "rnn.l1"))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert not torch.equal(found[0][0], found[2][0])  # A0: other dropout
    assert not torch.equal(found[0][2], found[2][2])  # G0: other samples


def test_dropout_is_active_in_a_pass_exactly_when_the_model_trains():
    model, x, y = language_model(dropout=0.5), tokens(), tokens(2)
    active, inactive = estimator(model), estimator(model)
    active.update(lambda: Given(y, logits=model(x)))
    model.eval()
    inactive.update(lambda: Given(y, logits=model(x)))
    torch.testing.assert_close(values(active, "rnn.l0")[0], values(inactive, "rnn.l0")[0])
    assert (values(active, "rnn.l1")[0] - values(inactive, "rnn.l1")[0]).abs().max() > 0.01


@pytest.mark.parametrize("made", [partial(LSTM, 3, 4), partial(DNC, 3, 4, hidden=8)])
def test_a_layer_that_is_itself_compiled_is_captured_as_the_plain_one_is(made):
    torch.manual_seed(0)
    layer = made().double()
    averages = []
    for model in (layer, torch.compile(layer, backend="eager"), nn.Sequential(torch.compile(layer, backend="eager"))):
        estimated, x = estimator(model), torch.randn(T, B, 3, generator=torch.Generator().manual_seed(1)).double()

        def forward(model=model, x=x):
            output = model(x)
            return Categorical(output[0] if isinstance(output, tuple) else output)

        estimated.update(forward)
        averages.append([block.average.values() for block in estimated.blocks.values()])
    torch.testing.assert_close(averages[1], averages[0], **EXACT)
    torch.testing.assert_close(averages[2], averages[0], **EXACT)


class Checkpointed(nn.Module):
    def __init__(self, model: LanguageModel):
        super().__init__()
        self.model, self.use_reentrant = model, False

    def forward(self, x):
        return checkpoint(self.model, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("layer", [LSTM, GRU, RNN, LayerNormLSTM])
def test_what_a_checkpoint_computes_again_is_no_second_use(layer):
    model, x, y = language_model(layer=layer), tokens(1), tokens(2)
    averages = []
    for whole in (model, Checkpointed(model)):
        estimated = estimator(whole)
        estimated.update(lambda whole=whole: Given(y, logits=whole(x)))
        averages.append([block.average.values() for block in estimated.blocks.values()])
    torch.testing.assert_close(averages[1], averages[0], rtol=0, atol=0)


def test_a_checkpoint_that_hides_the_graph_is_refused_with_the_remedy():
    model = Checkpointed(nn.Sequential(nn.Linear(3, V)))
    model.use_reentrant = True
    x = torch.randn(T, B, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"model\.0 ran under no_grad, or in .*checkpoint without use_reentrant=False"):
        estimator(model).update(lambda: Categorical(model(x)))


def test_no_random_number_follows_the_default_device():
    model, x, before = language_model(), tokens(1), torch.get_default_device()
    torch.set_default_device("meta")
    try:
        assert estimator(model).update(lambda: Categorical(model(x)))
    finally:
        torch.set_default_device(before)


def test_a_compiled_model_is_captured_as_the_plain_one_is():
    model, x, y = language_model(), tokens(1), tokens(2)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    estimated = estimator(compiled)
    estimated.update(lambda: Given(y, logits=compiled(x)))
    by_map = brute_force.language_model_series(model, x, y, [T] * B)
    assert_language_model(estimated, {f"_orig_mod.{name}": cases for name, cases in by_map.items()})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_factors_on_the_gpu_equal_brute_force_and_its_generators_stay_untouched():
    model, x, y = language_model(), tokens(1), tokens(2)
    by_map = brute_force.language_model_series(model, x, y, LENGTHS)
    model.cuda()
    estimated, state = estimator(model), torch.cuda.get_rng_state()
    estimated.update(lambda: Given(y.cuda(), logits=model(x.cuda()), lengths=torch.tensor(LENGTHS)))
    for name, block in estimated.blocks.items():
        block.average.sums = [total.cpu() for total in block.average.sums]
        assert name in by_map
    assert_language_model(estimated, by_map)
    assert torch.equal(torch.cuda.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_a_weight_that_is_used_beside_its_module_is_refused_by_name_in_the_first_pass():
    class TiedByFunction(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.hidden = nn.Embedding(V, 3), nn.Linear(3, 3)

        def forward(self, x):
            return F.linear(torch.tanh(self.hidden(self.embedding(x))), self.embedding.weight)

    model = TiedByFunction()
    with pytest.raises(ValueError, match=r"embedding\.weight: the loss depends on it in other ways than through embe"):
        estimator(model).update(lambda: Categorical(model(tokens())))


def test_half_precision_does_not_look_like_a_tied_weight():
    model = language_model(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert estimator(model).update(lambda: Categorical(model(tokens(1, 60, 20))))


def test_maps_that_share_rows_of_a_parameter_are_refused_by_name(monkeypatch):
    model = nn.Sequential(GRU(3, 4), nn.Linear(4, V))
    maps = model[0].maps()
    monkeypatch.setattr(model[0], "maps", lambda: (*maps[:2], replace(maps[2], rows=slice(7, 12))))
    with pytest.raises(ValueError, match=r"0\.weight_hh_l0 is shared by 0\.l0 and 0\.l0\.hh"):
        estimator(model)


def test_a_gru_of_which_only_one_weight_is_trained_is_refused_by_name():
    model = nn.Sequential(GRU(3, 4), nn.Linear(4, V))
    model[0].weight_ih_l0.requires_grad_(False)
    with pytest.raises(ValueError, match=r"0\.l0 is trained only in part, 0\.weight_ih_l0 is not"):
        estimator(model)


def test_a_weight_of_a_gru_that_is_used_beside_it_is_refused_by_name_in_the_first_pass():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.softmax = GRU(3, 4), nn.Linear(4, V)

        def forward(self, x):
            return self.softmax(self.gru(x)[0]) * (1 + self.gru.weight_hh_l0[8:].sum())

    model, x = Beside(), torch.randn(T, B, 3)
    with pytest.raises(ValueError, match=r"gru\.weight_hh_l0, .* in other ways than through gru\.l0\.hh"):
        estimator(model).update(lambda: Categorical(model(x)))


class Chain(nn.Sequential):
    """Linear maps, used in order unless told otherwise."""

    def __init__(self):
        super().__init__(nn.Linear(3, 3), nn.Linear(3, V))


REFUSED = {
    "used more than once": (
        lambda m, x: m[1](m[0](m[0](x))),
        "0 was used 2 times .*, or once at each",
    ),
    "never used": (lambda m, x: m[1](x), "never used in the forward pass: 0;"),
    "without effect": (lambda m, x: m[1](x + 0 * m[0](x).detach()), "0 was used, but the predictions do not depend on"),
    "folded": (lambda m, x: m(x.flatten(0, 1)).unflatten(0, x.shape[:2]), "0 was given time and batch folded into one"),
    "unbatched": (lambda m, x: m(x[:, 0]).unsqueeze(1), "0 was given time and batch folded into one axis of 5"),
    "other layout": (lambda m, x: m(x.mT.mT.transpose(0, 1)).transpose(0, 1), r"0 was given leading axes \[4, 5\]"),
    "last step only": (lambda m, x: m[1](m[0](x)[-1:]), r"0 was given leading axes \[5, 4\], .* give logits for all"),
    "detached": (lambda m, x: m(x).detach(), "the predictions have no gradient"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_forward_pass_that_cannot_be_captured_is_refused_by_name(reason):
    forward, message = REFUSED[reason]
    model = Chain()
    with pytest.raises(ValueError, match=message):
        estimator(model).update(lambda: Categorical(forward(model, torch.randn(T, B, 3))))


def test_the_data_of_a_packed_sequence_is_refused_with_the_remedy():
    model, lengths = Chain(), torch.tensor([5, 3, 2, 1])
    packed = pack_padded_sequence(torch.randn(T, B, 3), lengths)

    def forward():
        return Categorical(pad_packed_sequence(packed._replace(data=model(packed.data)))[0], lengths=lengths)

    with pytest.raises(ValueError, match="0 was given the data of a PackedSequence: unpack it first"):
        estimator(model).update(forward)


def test_layouts_that_are_mixed_are_not_told_to_be_batch_first_a_second_time():
    model, x = Chain(), torch.randn(B, T, 3)

    def forward():
        hidden = model[0](x)
        return Categorical(model[1](hidden.transpose(0, 1)).transpose(0, 1), batch_first=True)

    with pytest.raises(ValueError, match=r"1 was given leading axes \[5, 4\], .* one layout, so transpose before it"):
        estimator(model).update(forward)


def test_a_sequence_may_have_one_prediction_at_its_last_step():
    model, x = Chain(), torch.randn(T, B, 3)
    mask = (torch.arange(T) == T - 1)[:, None].expand(T, B)
    assert estimator(model).update(lambda: Categorical(model(x)[-1:].expand(T, -1, -1), mask=mask))


def test_a_distribution_of_another_kind_is_refused_with_the_remedy():
    model = Chain()
    with pytest.raises(ValueError, match=r"forward returned a Categorical: .* one of kfacrnn\.predictive"):
        estimator(model).update(lambda: torch.distributions.Categorical(logits=model(torch.randn(T, B, 3))))


class Backwards(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = LSTM(3, 4), nn.Linear(4, V)

    def forward(self, x, turned):
        return self.out(turned(self.rnn(turned(x))[0]))


def test_padding_that_the_predictions_depend_on_is_refused_by_name():
    def ends(x):
        return zip(x.unbind(1), LENGTHS, strict=True)

    def within(x):
        return torch.stack([torch.cat([case[:n].flip(0), case[n:]]) for case, n in ends(x)], 1)

    model, x = Backwards(), torch.randn(T, B, 3)
    with pytest.raises(
        ValueError, match=r"^rnn.*: the predictions depend on steps behind the end that `lengths` gives"
    ):
        estimator(model).update(lambda: Categorical(model(x, lambda y: y.flip(0)), lengths=LENGTHS))
    assert estimator(model).update(lambda: Categorical(model(x, within), lengths=LENGTHS))


class BatchFirst(nn.Module):
    """A layer that knows its layout, and a map that has whatever layout it is given."""

    def __init__(self):
        super().__init__()
        self.rnn, self.out = LSTM(3, 4, batch_first=True), nn.Linear(4, V)

    def forward(self, x):
        return self.out(self.rnn(x)[0])


@pytest.mark.parametrize("forward", [lambda m, x: m(x), lambda m, x: m(x).transpose(0, 1)], ids=["as is", "turned"])
def test_an_undeclared_layout_is_refused_where_shapes_cannot_tell_it(forward):
    model, x = BatchFirst(), torch.randn(T, T, 3)
    with pytest.raises(ValueError, match="predictions are time first, rnn is batch first, and as T = B"):
        estimator(model).update(lambda: Categorical(forward(model, x)))
    estimator(model).update(lambda: Categorical(model(x), batch_first=True))


def test_a_pass_under_no_grad_is_refused():
    model = Chain()

    def forward():
        with torch.no_grad():
            return Categorical(model(torch.randn(T, B, 3)))

    with pytest.raises(ValueError, match="0 ran under no_grad"):
        estimator(model).update(forward)


def test_a_layer_frozen_after_the_optimiser_was_made_is_refused_by_name():
    model = Chain()
    estimated = estimator(model)
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match="0 was frozen after the optimiser was made"):
        estimated.update(lambda: Categorical(model(torch.randn(T, B, 3))))


@pytest.mark.parametrize(("empirical", "wanted"), [(True, r"\(distribution, targets\)"), (False, "the distribution a")])
def test_forward_must_return_what_the_fisher_needs(empirical, wanted):
    model = Chain()

    def forward():
        distribution = Categorical(model(torch.randn(T, B, 3)))
        return distribution if empirical else (distribution, tokens())

    with pytest.raises(ValueError, match=f"forward must return {wanted}"):
        estimator(model, empirical=empirical).update(forward)


def test_bare_logits_are_refused():
    model = Chain()
    with pytest.raises(ValueError, match=r"forward must return the distribution alone .* got Tensor"):
        estimator(model).update(lambda: model(torch.randn(T, B, 3)))


def test_a_model_without_anything_to_train_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        estimator(Chain().requires_grad_(False))


def test_frozen_layers_get_no_block_and_cost_the_others_nothing():
    model = language_model()
    model.embedding.requires_grad_(False)
    model.rnn.requires_grad_(False)
    x, y = tokens(1), tokens(2)
    estimated = estimator(model)
    estimated.update(lambda: Given(y, logits=model(x)))
    assert set(estimated.blocks) == {"norm", "softmax"}
    cases = brute_force.language_model_series(language_model(), x, y, [T] * B)
    assert_linear(estimated, "softmax", cases["softmax"], [slice(None)], lags=False)


def test_a_frozen_layer_runs_in_a_pass_as_it_runs_in_training():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.out = LSTM(3, 4, batch_first=True).requires_grad_(False), nn.Linear(4, V)

        def forward(self, x):
            features = self.encoder(x.transpose(0, 1))[0]
            assert not features.requires_grad
            return self.out(torch.from_numpy(features.numpy()).transpose(0, 1))

    model = Model()
    assert estimator(model).update(lambda: Categorical(model(torch.randn(T, T, 3))))


def test_a_map_that_is_trained_in_part_is_refused_by_name():
    model = Chain()
    model[1].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"1 is trained only in part, 1\.bias is not"):
        estimator(model)


def test_parameters_behind_a_parametrization_are_uncovered():
    model = Chain()
    nn.utils.parametrizations.weight_norm(model[0])
    assert set(estimator(model).uncovered) == {
        "0.bias", "0.parametrizations.weight.original0", "0.parametrizations.weight.original1",
    }  # fmt: skip


def test_half_precision_parameters_are_refused_by_name():
    with pytest.raises(ValueError, match=r"\.(weight|bias) is torch.bfloat16: train in float32"):
        estimator(Chain().bfloat16())


# ----------------------------------------------------------------------------------------------------------- robustness


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_a_pass_that_is_not_finite_leaves_no_trace_and_is_counted(poison):
    model, x = Chain(), torch.randn(T, B, 3)
    estimated = estimator(model)
    assert estimated.update(lambda: Categorical(model(x)))
    before = [total.clone() for total in estimated.blocks["0"].average.sums]
    assert not estimated.update(lambda: Categorical(model(x * poison)))
    assert estimated.skipped == 1
    torch.testing.assert_close(estimated.blocks["0"].average.sums, before, rtol=0, atol=0)
    assert estimated.update(lambda: Categorical(model(x)))


def test_a_first_pass_that_is_not_finite_is_refused_by_name():
    model = Chain()
    with pytest.raises(ValueError, match="0 met values that are not finite in the first statistics pass"):
        estimator(model).update(lambda: Categorical(model(torch.full((T, B, 3), torch.nan))))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_token_ids_of_any_integer_type_are_counted(dtype):
    model = language_model()
    x = torch.full((T, B), 3).to(dtype)
    estimated = estimator(model)
    estimated.update(lambda: Categorical(model(x)))
    assert values(estimated, "embedding")[0].tolist() == [0, 0, 0, 1, 0]


def test_a_row_that_torch_keeps_from_learning_does_not_look_like_a_tied_weight():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(V, 3, padding_idx=1), nn.Linear(3, V))
    x = torch.tensor([[1, 2], [1, 3], [0, 1]])
    assert estimator(model).update(lambda: Categorical(model(x)))


def test_two_maps_that_add_up_to_the_logits_are_both_output_maps():
    class Skip(Chain):
        def forward(self, x):
            return self[1](torch.tanh(self[0](x))) + self.skip(x)

    model = Skip()
    model.skip = nn.Linear(3, V)
    estimated = estimator(model)
    estimated.update(lambda: Categorical(model(torch.randn(T, B, 3))))
    assert [block.is_output for block in estimated.blocks.values()] == [False, True, True]


def test_a_bernoulli_output_is_recognised_through_its_mask():
    model = Chain()
    estimated = estimator(model, max_dense=3)
    mask = torch.arange(T)[:, None] >= torch.tensor([1, 2, 3, 4])
    logits = model(x := torch.randn(T, B, 3)).detach()
    estimated.update(lambda: Bernoulli(model(x), mask=mask))
    p = logits.sigmoid()
    expected = (p * (1 - p) * mask.unsqueeze(-1)).sum((0, 1)) / (T * B)
    torch.testing.assert_close(values(estimated, "1")[1], expected)
