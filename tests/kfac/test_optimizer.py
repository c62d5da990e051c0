"""KFAC as a whole: against the same recipe on dense matrices, as an optimiser among others, and abused."""

from __future__ import annotations

import copy
import io
import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR

from kfacrnn import KFAC
from kfacrnn.kfac import LevenbergMarquardt
from kfacrnn.nn import DNC, GRU, LSTM, LayerNormLSTM
from kfacrnn.predictive import Bernoulli, Categorical, Gaussian
from tests.kfac import brute_force, dense
from tests.kfac.brute_force import A, G, Given, GivenBits, LanguageModel, gain_moment, gate

THREE = ("indep", "option1", "option2")
T, B, V = 4, 5, 5


def language_model(seed: int = 0, dtype: torch.dtype = torch.float32, **options) -> LanguageModel:
    torch.manual_seed(seed)
    return LanguageModel(**options).to(dtype)


def tokens(seed: int, steps: int = T, cases: int = B) -> Tensor:
    return torch.randint(V, (steps, cases), generator=torch.Generator().manual_seed(seed))


def mean_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def train(model, optimizer, updates, *, sampled=None, scale=1.0, steps=T):
    """`updates` numbers the updates, each with data of its own; `sampled(update)` are the targets of its statistics."""
    losses = []
    for update in updates:
        x, y = tokens(2 * update, steps), tokens(2 * update + 1, steps)
        if optimizer.statistics_due:
            if sampled is None:
                cases = optimizer.statistics_cases(B)
                optimizer.update_statistics(lambda x=x[:, cases]: Categorical(model(x)))
            else:
                targets = sampled(update)
                optimizer.update_statistics(lambda x=x, y=targets: Given(y, model(x)))
        optimizer.zero_grad()
        loss = scale * mean_loss(model, x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def parameters(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_same(model: nn.Module, other: nn.Module) -> None:
    """Bit for bit."""
    torch.testing.assert_close(parameters(model), parameters(other), rtol=0, atol=0)


# --------------------------------------------------------------------------------- the recipe again, on dense matrices


OPTIONS = {"lr": 0.12, "damping": 1e-2, "kl_clip": 3e-2, "momentum": 0.8, "weight_decay": 0.1}


def gates(count: int, first: int = 0) -> slice:
    return slice(first * brute_force.H, (first + count) * brute_force.H)


# Map → weights side by side, biases, their rows, gates.
WEIGHTS, BIASES = ("weight_ih", "weight_hh"), ("bias_ih", "bias_hh")
MAPS = {
    LSTM: {"rnn.l0": (WEIGHTS, BIASES, gates(4), 4)},
    GRU: {
        "rnn.l0": (WEIGHTS, BIASES, gates(2), 2),
        "rnn.l0.ih": (WEIGHTS[:1], BIASES[:1], gates(1, 2), 1),
        "rnn.l0.hh": (WEIGHTS[1:], BIASES[1:], gates(1, 2), 1),
    },
}


class Dense:
    """KFAC with OPTIONS for a one-layer `LanguageModel`, from `brute_force` and `dense`, with N = T."""

    decay = 0.7  # of the statistics
    schedule = 0.95  # on the step size, per update

    def __init__(self, model: LanguageModel, approximation: str):
        self.model, self.approximation = copy.deepcopy(model), approximation
        self.parameters = dict(self.model.named_parameters())
        self.velocity = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.share = 1.0
        self.passes, self.factors, self.steps, self.bounded = [], None, [], 0

    def observe(self, x: Tensor, y: Tensor) -> None:
        by_map = brute_force.language_model_series(self.model, x, y, [T] * B)
        recurrent = {}
        for name, (*_, count) in MAPS[type(self.model.rnn)].items():
            cases, rows = by_map[name], [gate(number) for number in range(count)]
            G0, G1 = ([G(cases, lag, r) for r in rows] for lag in (0, 1))
            recurrent[name] = (A(cases, 0), A(cases, 1), G0, G1)
        self.passes.append({
            **recurrent,
            "softmax": (A(by_map["softmax"], 0), G(by_map["softmax"], 0)),
            "embedding": (A(by_map["embedding"], 0), G(by_map["embedding"], 0)),
            "norm": (gain_moment(by_map["norm"]), G(by_map["norm"], 0).diagonal()),
        })  # fmt: skip

    def average(self):
        """The factors as they are now."""
        weights = [self.decay**age for age in reversed(range(len(self.passes)))]

        def mean(*values):
            if isinstance(values[0], Tensor):
                return sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)
            return [mean(*each) for each in zip(*values, strict=True)]

        return {name: mean(*(seen[name] for seen in self.passes)) for name in self.passes[0]}

    def multiply(self, Z, A0, G0, A1=None, G1=None, pi=None):
        kind = "indep" if A1 is None else self.approximation
        A1, G1 = (torch.zeros_like(A0), torch.zeros_like(G0)) if A1 is None else (A1, G1)
        options = {"lengths": {T: 1.0}, "damping": OPTIONS["damping"], "pi": pi}
        return T * dense.multiply(kind, A0, A1, G0, G1, Z, **options)

    def directions(self, gradient):
        f, found = self.factors, {}
        found["embedding.weight"] = self.multiply(gradient["embedding.weight"].T, *f["embedding"]).T
        Z = torch.cat([gradient["softmax.weight"], gradient["softmax.bias"].unsqueeze(1)], 1)
        found["softmax.weight"], bias = self.multiply(Z, *f["softmax"]).split([brute_force.H, 1], 1)
        found["softmax.bias"] = bias.squeeze(1)
        for name, value in zip(("norm.weight", "norm.bias"), f["norm"], strict=True):
            found[name] = gradient[name] / (value + OPTIONS["damping"])
        for name, (weights, biases, rows, count) in MAPS[type(self.model.rnn)].items():
            weights, biases = ([f"rnn.{key}_l0" for key in keys] for keys in (weights, biases))
            A0, A1, G0, G1 = f[name]
            Z = torch.cat([*(gradient[key][rows] for key in weights), gradient[biases[0]][rows].unsqueeze(1)], 1)
            pi = (A0.trace() / len(A0) / (sum(M.trace() / len(M) for M in G0) / count)).sqrt().item()
            D = torch.cat([self.multiply(Z[gate(k)], A0, G0[k], A1, G1[k], pi=pi) for k in range(count)])
            *parts, bias = D.split([*(gradient[key].shape[1] for key in weights), 1], 1)
            for key, part in zip((*weights, *biases), (*parts, *[bias.squeeze(1) / len(biases)] * 2), strict=False):
                found.setdefault(key, torch.full_like(gradient[key], math.nan))[rows] = part
        return found

    def step(self, x: Tensor, y: Tensor) -> None:
        losses = []
        for index in range(B):
            _, logits = brute_force.language_model(self.model, x[:, index])
            losses.append(brute_force.categorical_loss(logits, y[:, index]))
        names = list(self.parameters)
        found = torch.autograd.grad(sum(losses) / (T * B), [self.parameters[name] for name in names])
        gradient = dict(zip(names, found, strict=True))
        direction = self.directions(gradient)
        curvature = sum((direction[name] * gradient[name]).sum().item() for name in names)
        bound = math.sqrt(OPTIONS["kl_clip"] / curvature)
        eta = self.share * min(OPTIONS["lr"], bound)
        self.bounded += bound < OPTIONS["lr"]
        with torch.no_grad():
            for name, p in self.parameters.items():
                self.velocity[name] = OPTIONS["momentum"] * self.velocity[name] - eta * direction[name]
                p.copy_(p * (1 - eta * OPTIONS["weight_decay"]) + self.velocity[name])
        self.share *= self.schedule


@pytest.mark.parametrize("delay", [0, 1], ids=["synchronous", "background"])
@pytest.mark.parametrize("layer", [LSTM, GRU])
@pytest.mark.parametrize("approximation", THREE)
def test_every_step_is_that_of_the_recipe_on_dense_matrices(approximation, layer, delay):
    model = language_model(dtype=torch.float64, layers=1, layer=layer)
    reference = Dense(model, approximation)
    optimizer = KFAC(
        model, approximation, loss_scale=T, **OPTIONS, statistics_every=2, statistics_decay=Dense.decay,
        refresh_every=3, refresh_delay=delay, early_interval=0.25,
    )  # fmt: skip
    scheduler = ExponentialLR(optimizer, Dense.schedule)
    # Both come before every update at first, and settle at every second and every third.
    statistics, refreshes, made = {*range(9), 10, 12, 14}, {*range(9), 10, 12, 15}, {}
    in_use_from = {update if update == 0 else update + delay: update for update in refreshes}
    for update in range(17):
        x, y, sampled = tokens(2 * update), tokens(2 * update + 1), tokens(100 + update)
        if update in statistics:
            reference.observe(x, sampled)
        if update in refreshes:
            made[update] = reference.average()
        if update in in_use_from:
            reference.factors = made[in_use_from[update]]
        reference.step(x, y)
        train(model, optimizer, [update], sampled=lambda update: tokens(100 + update))
        scheduler.step()
        torch.testing.assert_close(parameters(model), parameters(reference.model), rtol=1e-8, atol=1e-9)
    assert 0 < reference.bounded < 17  # the KL bound acted, and so did the learning rate


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("approximation", THREE)
def test_steps_on_the_gpu_equal_steps_on_the_cpu(approximation):
    found = []
    for device in ("cpu", "cuda"):
        model = language_model(dtype=torch.float64).to(device)
        optimizer = KFAC(model, approximation, loss_scale=T, statistics_every=1, refresh_every=2, refresh_delay=1)
        for update in range(4):
            x, y, sampled = (tokens(seed + update).to(device) for seed in (0, 10, 20))
            optimizer.update_statistics(lambda x=x, y=sampled, model=model: Given(y, model(x)))
            optimizer.zero_grad()
            mean_loss(model, x, y).backward()
            optimizer.step()
        found.append([p.cpu() for p in parameters(model)])
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-9)


# -------------------------------------------------------------------------------------------------------- normalisation


def first_steps(approximation, x, y, sampled, *, repeats=1, scale=1.0, steps=T, layer=LSTM, **options):
    """The parameters after two updates on the same data."""
    model = language_model(dtype=torch.float64, layer=layer)
    options = {"loss_scale": steps, "statistics_every": 1, "refresh_every": 1, **options}
    optimizer = KFAC(model, approximation, **options)
    for _ in range(2):
        optimizer.update_statistics(lambda: Given(sampled.repeat(1, repeats), model(x.repeat(1, repeats))))
        optimizer.zero_grad()
        (scale * mean_loss(model, x.repeat(1, repeats), y.repeat(1, repeats))).backward()
        optimizer.step()
    return parameters(model)


@pytest.mark.parametrize("layer", [LSTM, LayerNormLSTM, GRU])
@pytest.mark.parametrize("approximation", THREE)
def test_an_update_does_not_change_when_the_batch_is_duplicated(approximation, layer):
    data = tokens(0), tokens(1), tokens(2)
    once, twice = (first_steps(approximation, *data, repeats=repeats, layer=layer) for repeats in (1, 2))
    torch.testing.assert_close(once, twice, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("approximation", THREE)
def test_an_update_does_not_change_when_the_loss_is_rescaled_and_N_and_the_kl_bound_with_it(approximation):
    data = tokens(0), tokens(1), tokens(2)
    per_step = first_steps(approximation, *data, kl_clip=1e-2)
    summed = first_steps(approximation, *data, scale=T, loss_scale=1, kl_clip=T * 1e-2)  # nats per sequence
    torch.testing.assert_close(per_step, summed, rtol=1e-8, atol=1e-10)


def test_an_update_does_not_change_when_T_doubles_without_correlation_over_time():
    found = []
    for doubled in (1, 2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(V, 3), nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, V)).double()
        x, y, sampled = (tokens(seed).repeat(doubled, 1) for seed in (0, 1, 2))
        optimizer = KFAC(model, "indep", loss_scale=len(x))
        optimizer.update_statistics(lambda x=x, y=sampled, model=model: Given(y, model(x)))
        mean_loss(model, x, y).backward()
        optimizer.step()
        found.append(parameters(model))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------- inclusions


def test_with_one_step_per_sequence_the_three_are_one():
    data = tokens(0, 1), tokens(1, 1), tokens(2, 1)
    indep, option1, option2 = (first_steps(approximation, *data, steps=1) for approximation in THREE)
    torch.testing.assert_close(option1, indep, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(option2, indep, rtol=1e-9, atol=1e-12)


def test_with_several_steps_the_three_differ():
    data = tokens(0), tokens(1), tokens(2)
    indep, option1, option2 = (torch.cat([p.flatten() for p in first_steps(each, *data)]) for each in THREE)
    assert min((indep - option1).norm(), (indep - option2).norm(), (option1 - option2).norm()) > 1e-3


@pytest.mark.parametrize("approximation", THREE)
@pytest.mark.parametrize("layer", [LSTM, LayerNormLSTM, GRU])
def test_very_large_damping_follows_the_gradient(approximation, layer):
    model = language_model(dtype=torch.float64, layer=layer, bias=False)
    before = parameters(model)
    optimizer = KFAC(model, approximation, loss_scale=T, damping=1e12, lr=1e12, kl_clip=1e-6)
    train(model, optimizer, [0])
    update = torch.cat([(p - q).flatten() for p, q in zip(parameters(model), before, strict=True)])
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    cosine = -update @ gradient / (update.norm() * gradient.norm())
    assert update.norm() > 0
    assert cosine > 1 - 1e-9


# --------------------------------------------------------------------------------------------------------------- resume


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize(
    ("delay", "tolerance"), [(0, None), (2, None), (2, 0.05)], ids=["synchronous", "background", "few modes"]
)
@pytest.mark.parametrize("approximation", THREE)
def test_a_run_continues_from_its_state_bit_for_bit(approximation, delay, tolerance):
    def fresh(seed):
        model = language_model(seed, dropout=0.3)
        return model, KFAC(
            model, approximation, loss_scale=T, statistics_every=2, refresh_every=4, refresh_delay=delay,
            weight_decay=0.1, adaptive_damping=LevenbergMarquardt(every=3), seed=seed, lag_tolerance=tolerance,
        )  # fmt: skip

    def go(model, optimizer, updates):
        for update in updates:
            (loss,) = train(model, optimizer, [update])
            if optimizer.reduction_due:
                optimizer.adapt_damping(loss, 0.99 * loss)

    model, optimizer = fresh(0)
    go(model, optimizer, range(9))  # a refresh was begun at update 8
    optimizer.update_statistics(lambda: Categorical(model(tokens(0)) * math.nan))  # the state counts what was left out
    state = saved({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    assert (state["optimizer"]["kfac"]["inverses"]["pending"] is not None) == (delay > 0)
    other, resumed = fresh(1)
    other.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    for each in ((model, optimizer), (other, resumed)):
        torch.manual_seed(3)  # of the training run's own dropout, which is not KFAC's to restore
        go(*each, range(9, 16))
    assert_same(model, other)
    assert resumed.stats() == optimizer.stats()


def test_settings_of_numpys_kind_leave_a_state_that_loads():
    one, half = np.float64(1.0), np.float64(0.5)
    options = {"lr": one, "damping": half, "first_damping": one, "momentum": half, "weight_decay": half}
    options |= {"statistics_decay": half, "adaptive_damping": LevenbergMarquardt(rate=np.float64(0.9), every=1)}
    model = language_model()
    optimizer = KFAC(model, loss_scale=np.mean([5, 5]), kl_clip=np.float32(0.5), **options)
    optimizer.damping = one
    train(model, optimizer, [0])
    optimizer.adapt_damping(1.0, 2.0)
    optimizer.param_groups[0]["lr"] = one
    state = saved(optimizer.state_dict())
    assert state["kfac"]["numbers"]["loss_scale"] == 5
    assert state["param_groups"][0]["lr"] == 1


def test_a_state_before_the_first_statistics_can_be_loaded():
    model, other = language_model(), language_model()
    optimizer, resumed = KFAC(model, loss_scale=T), KFAC(other, loss_scale=T, seed=5)
    resumed.load_state_dict(saved(optimizer.state_dict()))
    train(model, optimizer, range(3))
    train(other, resumed, range(3))
    assert_same(model, other)


def test_optimisers_that_exchanged_a_state_in_memory_share_none_of_it():
    model, other = language_model(), language_model()
    optimizer, resumed = KFAC(model, loss_scale=T, statistics_every=1), KFAC(other, loss_scale=T, statistics_every=1)
    train(model, optimizer, range(2))
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(2, 5))
    train(other, resumed, range(2, 5))
    assert_same(model, other)


def test_the_state_of_something_else_is_refused():
    model = language_model()
    optimizer = KFAC(model, "option1", loss_scale=T)
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    for other, approximation, message in (
        (language_model(layers=3), "option1", "the state is that of another model: rnn.l2"),
        (
            language_model(vocabulary=6),
            "option1",
            "the state is that of another model or other gates: embedding has factors",
        ),
        (language_model(), "option2", "the state is that of option1, not of option2"),
    ):
        with pytest.raises(ValueError, match=message):
            KFAC(other, approximation, loss_scale=T).load_state_dict(state)
    with pytest.raises(ValueError, match=r"the state is that of another model or other gates: rnn\.l0 has factors"):
        KFAC(language_model(), "option1", loss_scale=T, gates="joint").load_state_dict(state)
    other = language_model()
    groups = [{"params": [*part.parameters()]} for part in other.children()]
    fresh = KFAC(other, "option1", loss_scale=T, params=groups)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        fresh.load_state_dict(state)
    assert fresh.statistics_due  # nothing was changed
    with pytest.raises(ValueError, match="the state is that of another optimiser, not of option1"):
        optimizer.load_state_dict(torch.optim.Adam(model.parameters()).state_dict())


# ------------------------------------------------------------------------------------------- an optimiser among others


def test_parameter_groups_have_their_own_learning_rate_momentum_and_weight_decay():
    model = language_model(dtype=torch.float64)
    groups = [
        {"params": list(model.rnn.parameters()), "lr": 0.02, "weight_decay": 0.5},
        {"params": [*model.embedding.parameters(), *model.norm.parameters()]},
        {"params": list(model.softmax.parameters()), "lr": 0.04, "momentum": 0.0},
    ]
    optimizer = KFAC(model, loss_scale=T, lr=0.01, momentum=0.9, kl_clip=1e9, params=groups, refresh_every=100)
    assert [group["momentum"] for group in optimizer.param_groups] == [0.9, 0.9, 0.0]
    plain = language_model(dtype=torch.float64)
    reference = KFAC(plain, loss_scale=T, lr=0.01, momentum=0.0, kl_clip=1e9)
    before = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in before.items()}
    train(model, optimizer, [0])
    train(plain, reference, [0])
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        step, old = q.detach() - before[name], before[name]
        if name.startswith("rnn"):
            expected = old * (1 - 0.02 * 0.5) + 2 * step
        else:
            expected = old + (4 if name.startswith("softmax") else 1) * step
        torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kl_clip", [1e6, 1e-12], ids=["at the learning rate", "at the KL bound"])
def test_learning_rate_schedulers_act_on_the_step_size(kl_clip):
    model = language_model()
    optimizer = KFAC(model, loss_scale=T, lr=1e-3, kl_clip=kl_clip, statistics_every=100)
    scheduler, sizes = LambdaLR(optimizer, lambda update: 0.5**update), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for update in range(4):
            train(model, optimizer, [update])
            scheduler.step()
            stats = optimizer.stats()
            sizes.append(stats["step_size"] / math.sqrt(min(1, kl_clip / optimizer._last.curvature / 1e-6)))
    assert sizes == pytest.approx([1e-3, 5e-4, 2.5e-4, 1.25e-4])


def test_a_learning_rate_may_be_a_tensor():
    models = [language_model(), language_model()]
    for model, lr in zip(models, (0.25, torch.tensor(0.25)), strict=True):
        optimizer = KFAC(model, loss_scale=T, lr=lr)
        scheduler = LambdaLR(optimizer, lambda update: max(0, 1 - update / 2))
        for update in range(4):
            train(model, optimizer, [update])
            scheduler.step()
    assert_same(*models)


def test_accumulated_gradients_are_the_gradient_of_the_whole_batch():
    whole, parts = language_model(dtype=torch.float64), language_model(dtype=torch.float64)
    x, y, sampled = tokens(0, cases=6), tokens(1, cases=6), tokens(2, cases=6)
    for model, sizes in ((whole, [6]), (parts, [2, 4])):
        optimizer = KFAC(model, loss_scale=T)
        optimizer.update_statistics(lambda model=model: Given(sampled, model(x)))
        for x_part, y_part in zip(x.split(sizes, 1), y.split(sizes, 1), strict=True):
            (mean_loss(model, x_part, y_part) * x_part.shape[1] / 6).backward()
        optimizer.step()
    torch.testing.assert_close(parameters(whole), parameters(parts), rtol=1e-9, atol=1e-12)


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned():
    model, x, y = language_model(), tokens(0), tokens(1)
    optimizer = KFAC(model, loss_scale=T)
    optimizer.update_statistics(lambda: Categorical(model(x)))

    def closure():
        optimizer.zero_grad()
        loss = mean_loss(model, x, y)
        loss.backward()
        return loss

    before = parameters(model)
    assert optimizer.step(closure).item() == pytest.approx(mean_loss_of(before, x, y))
    assert all((p != q).any() for p, q in zip(parameters(model), before, strict=True))


def mean_loss_of(values: list[Tensor], x: Tensor, y: Tensor) -> float:
    model = language_model()
    with torch.no_grad():
        for p, value in zip(model.parameters(), values, strict=True):
            p.copy_(value)
    return mean_loss(model, x, y).item()


def test_autocast_around_the_step_changes_nothing():
    inside, outside = language_model(), language_model()
    for model, enabled in ((inside, True), (outside, False)):
        optimizer = KFAC(model, loss_scale=T, compute_dtype=torch.float32)
        optimizer.update_statistics(lambda model=model: Categorical(model(tokens(0))))
        mean_loss(model, tokens(0), tokens(1)).backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            optimizer.step()
    assert_same(inside, outside)


@pytest.mark.parametrize("approximation", THREE)
def test_an_update_under_bf16_autocast_is_that_of_float32_to_the_precision_of_bf16(approximation):
    updates, start = [], torch.cat([p.flatten() for p in parameters(language_model())])
    for enabled in (True, False):
        model = language_model()
        # The logits' common shift has no curvature: rounding along it is divided by the damping.
        optimizer = KFAC(model, approximation, loss_scale=T, statistics_every=1, damping=1e-3)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            train(model, optimizer, [0], sampled=lambda _: tokens(1))
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        updates.append(torch.cat([p.flatten() for p in parameters(model)]) - start)
    assert (updates[0] - updates[1]).norm() < 0.06 * updates[1].norm()  # the gradients differ by 2.5 %


def test_a_compiled_model_is_trained_as_the_plain_one_is():
    plain, inner = language_model(), language_model()
    compiled = torch.compile(inner, backend="eager")
    train(plain, KFAC(plain, loss_scale=T), range(3))
    train(compiled, KFAC(compiled, loss_scale=T), range(3))
    torch.testing.assert_close(parameters(inner), parameters(plain))


def test_parameters_without_a_gradient_stay_where_they_are():
    model = language_model()
    optimizer = KFAC(model, loss_scale=T, weight_decay=0.1)
    train(model, optimizer, range(2))
    before, norm = parameters(model.norm), parameters(model.softmax)
    mean_loss(model, tokens(0), tokens(1)).backward()
    for p in model.norm.parameters():
        p.grad = None
    optimizer.step()
    torch.testing.assert_close(parameters(model.norm), before, rtol=0, atol=0)
    assert not torch.equal(parameters(model.softmax)[0], norm[0])
    optimizer.zero_grad()
    before = parameters(model)
    optimizer.step()
    torch.testing.assert_close(parameters(model), before, rtol=0, atol=0)


def test_a_block_with_only_some_of_its_gradients_is_refused_before_anything_moves():
    model = language_model()
    optimizer = KFAC(model, loss_scale=T)
    train(model, optimizer, range(2))
    before = parameters(model)
    mean_loss(model, tokens(0), tokens(1)).backward()
    model.softmax.bias.grad = None
    with pytest.raises(ValueError, match=r"^softmax\.bias has no gradient and others of softmax have"):
        optimizer.step()
    torch.testing.assert_close(parameters(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("given", [True, False], ids=["in a group", "by default"])
def test_a_layer_unfrozen_after_the_optimiser_was_made_is_refused_by_name(given):
    model = language_model()
    model.embedding.requires_grad_(False)
    optimizer = KFAC(model, loss_scale=T, params=model.parameters() if given else None)
    train(model, optimizer, range(2))
    model.embedding.requires_grad_(True)
    with pytest.raises(ValueError, match=r"^embedding\.weight was unfrozen after the optimiser was made"):
        train(model, optimizer, [2])


def test_a_layer_that_another_optimiser_trains_may_be_unfrozen():
    model = language_model()
    model.embedding.requires_grad_(False)
    optimizer = KFAC(model, loss_scale=T, params=[p for p in model.parameters() if p.requires_grad])
    model.embedding.requires_grad_(True)
    train(model, optimizer, range(2))


def test_frozen_layers_stay_where_they_are_and_are_not_in_the_table():
    model = language_model()
    model.embedding.requires_grad_(False)
    frozen = parameters(model.embedding)
    optimizer = KFAC(model, loss_scale=T, params=model.parameters())  # a group may hold what is not trained
    train(model, optimizer, range(3))
    torch.testing.assert_close(parameters(model.embedding), frozen, rtol=0, atol=0)
    assert "embedding" not in str(optimizer.coverage())


def test_the_first_step_needs_statistics():
    model = language_model()
    optimizer = KFAC(model, loss_scale=T)
    mean_loss(model, tokens(0), tokens(1)).backward()
    with pytest.raises(RuntimeError, match="call update_statistics whenever statistics_due is True"):
        optimizer.step()


def test_statistics_are_due_at_nearly_every_update_at_first_and_later_every_k():
    model = language_model()
    optimizer, due = KFAC(model, loss_scale=T, statistics_every=6, early_interval=0.25), []
    for update in range(38):
        if optimizer.statistics_due:
            due.append(update)
        train(model, optimizer, [update])
        assert optimizer.stats()["skipped_updates"] == 0
    assert due == [*range(9), 10, 12, 15, 18, 22, 24, 30, 36]


def test_statistics_stay_due_until_they_are_taken():
    model = language_model()
    optimizer = KFAC(model, loss_scale=T)
    assert optimizer.statistics_due
    assert optimizer.statistics_due
    train(model, optimizer, [0])
    optimizer.update_statistics(lambda: Categorical(logits=model(tokens(1))))
    assert not optimizer.statistics_due


def test_statistics_rotate_over_the_sequences_of_a_batch():
    optimizer = KFAC(language_model(), loss_scale=T, statistics_fraction=0.25)
    slices = [optimizer.statistics_cases(8) for _ in range(5)]
    assert [(s.start, s.stop) for s in slices] == [(0, 2), (2, 4), (4, 6), (6, 8), (0, 2)]
    assert optimizer.statistics_cases(1) == slice(0, 1)


def test_no_sequence_is_left_out_of_the_rotation():
    optimizer = KFAC(language_model(), loss_scale=T, statistics_fraction=0.3)
    seen = [range(10)[optimizer.statistics_cases(10)] for _ in range(5)]
    assert [(s.start, s.stop) for s in seen] == [(0, 3), (3, 6), (6, 9), (7, 10), (0, 3)]


# ----------------------------------------------------------------------------------------------------- adaptive damping


def test_the_reduction_ratio_is_that_of_the_quadratic_model_on_a_dense_matrix():
    """M(δ) = ∇hᵀδ + ½ δᵀ(F̂/N)δ, F̂ = E[T]·(A0 ⊗ G0) with its damping, for a factor that does not change."""
    torch.manual_seed(0)
    model, damping = nn.Linear(3, 2).double(), 0.02
    x, bits = torch.randn(T, B, 3).double(), (torch.rand(T, B, 2) < 0.5).double()
    rule = LevenbergMarquardt(every=1)
    optimizer = KFAC(
        model, loss_scale=T, damping=damping, statistics_every=100, momentum=0.8, kl_clip=1e-2, adaptive_damping=rule
    )
    optimizer.update_statistics(lambda: GivenBits(bits, model(x)))
    a = torch.cat([x, torch.ones(T, B, 1)], -1)
    g = (model(x).sigmoid() - bits).detach()
    A0, G0 = (torch.einsum("tbi,tbj->ij", v, v) / (T * B) for v in (a, g))
    curvature = torch.from_numpy(
        torch.kron(*map(torch.from_numpy, dense.damped_factors(A0.numpy(), G0.numpy(), damping))).numpy()
    )
    for ratio, factor in ((0.9, 0.95), (0.5, 1.0), (0.1, 1 / 0.95)):
        before, old_damping = torch.cat([model.weight, model.bias.unsqueeze(1)], 1).detach(), optimizer.damping
        optimizer.zero_grad()
        (F.binary_cross_entropy_with_logits(model(x), bits, reduction="sum") / (T * B)).backward()
        gradient = torch.cat([model.weight.grad, model.bias.grad.unsqueeze(1)], 1)
        optimizer.step()
        assert optimizer.reduction_due
        change = torch.cat([model.weight, model.bias.unsqueeze(1)], 1).detach() - before
        delta = change.T.flatten()  # columns stacked
        predicted = (gradient * change).sum() + 0.5 * delta @ curvature @ delta
        optimizer.adapt_damping(1.0, 1.0 + ratio * predicted)
        assert optimizer.stats()["reduction_ratio"] == pytest.approx(ratio, rel=1e-9)
        assert optimizer.damping == pytest.approx(factor * old_damping)


def test_damping_grows_when_the_loss_is_lost_and_stays_when_nothing_moved():
    model = language_model()
    optimizer = KFAC(model, loss_scale=T, adaptive_damping=LevenbergMarquardt())
    train(model, optimizer, range(1))
    damping = optimizer.damping
    optimizer.adapt_damping(1.0, math.nan)
    assert optimizer.damping > damping
    fresh = language_model()
    optimizer = KFAC(fresh, loss_scale=T, adaptive_damping=LevenbergMarquardt())
    optimizer.update_statistics(lambda: Categorical(fresh(tokens(0))))
    for p in fresh.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.adapt_damping(1.0, 1.0)
    assert optimizer.damping == damping


def test_damping_is_adapted_once_for_every_step_and_by_losses_as_they_are(recwarn):
    model = language_model()
    optimizer = KFAC(model, loss_scale=T, adaptive_damping=LevenbergMarquardt(every=1))
    assert not optimizer.reduction_due  # there was no step
    train(model, optimizer, range(1))
    assert optimizer.reduction_due
    loss = mean_loss(model, tokens(0), tokens(1))
    optimizer.adapt_damping(loss, loss)
    assert not optimizer.reduction_due  # a gradient scaler may have left out the next step
    assert not [w for w in recwarn if "requires_grad" in str(w.message)]
    train(model, optimizer, range(1, 2))
    assert optimizer.reduction_due


def test_the_first_damping_falls_to_the_lasting_one_and_inverses_are_made_with_it():
    def moved(damping, **options):
        model = language_model()
        optimizer = KFAC(model, loss_scale=T, damping=damping, statistics_every=1, refresh_every=1, **options)
        seen = []
        for update in range(4):
            train(model, optimizer, range(update, update + 1))
            seen.append(optimizer.stats()["damping"])
        return seen, [p.detach().clone() for p in model.parameters()]

    seen, falling = moved(3e-2, first_damping=0.1)
    assert seen == pytest.approx([0.1, 0.07, 0.049, 0.0343])

    model = language_model()
    optimizer = KFAC(model, loss_scale=T, damping=1.0, statistics_every=1, refresh_every=1)
    for update, optimizer.damping in enumerate(seen):
        train(model, optimizer, range(update, update + 1))
    assert all(torch.equal(one, other) for one, other in zip(falling, model.parameters(), strict=True))
    assert not torch.equal(falling[0], moved(3e-2)[1][0])


def test_adapting_a_fixed_damping_is_refused():
    optimizer = KFAC(language_model(), loss_scale=T)
    assert not optimizer.reduction_due
    with pytest.raises(RuntimeError, match="adaptive_damping=LevenbergMarquardt"):
        optimizer.adapt_damping(1.0, 0.9)


# ------------------------------------------------------------------------------------------------ coverage and refusals


@pytest.mark.parametrize("layer", [LSTM, LayerNormLSTM])
def test_every_trained_parameter_is_in_the_table_exactly_once(layer):
    model = language_model(layer=layer)
    optimizer = KFAC(model, loss_scale=T)
    rows: dict[str, list[str]] = {}
    for row in optimizer.coverage():
        for entry in row.parameters.split(", "):
            name, _, part = entry.partition("[")
            rows.setdefault(name, []).append(part)
    assert set(rows) == {name for name, _ in model.named_parameters()}
    quarters = [f"{3 * k}:{3 * k + 3}]" for k in range(4)]
    assert all(parts in ([""], quarters) for parts in rows.values())
    assert str(optimizer.coverage()).count("\n") == len(optimizer.coverage())


def test_the_table_shows_what_the_first_statistics_reveal_about_the_output_map():
    model = language_model()
    optimizer = KFAC(model, "option1", loss_scale=T)
    gates = {f"rnn.l{layer}.{gate}": "option1" for layer in range(2) for gate in "ifgo"}
    for softmax in ("option1", "indep"):
        approximations = {row.block: row.approximation for row in optimizer.coverage()}
        assert approximations == {"embedding": "indep", **gates, "norm": "diagonal", "softmax": softmax}
        train(model, optimizer, [0])


class WithMemory(nn.Module):
    """A learnt initial state, which no map holds."""

    def __init__(self):
        super().__init__()
        self.embedding, self.rnn, self.softmax = nn.Embedding(V, 3), LSTM(3, 4), nn.Linear(4, V)
        self.h0 = nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x):
        h0 = self.h0.expand(-1, x.shape[1], -1).contiguous()
        return self.softmax(self.rnn(self.embedding(x), (h0, torch.zeros_like(h0)))[0])


def test_what_no_block_covers_is_refused_by_name_unless_it_may_follow_the_gradient():
    model = WithMemory()
    with pytest.raises(ValueError, match=r"no Fisher block covers h0: .*fallback='gradient'"):
        KFAC(model, loss_scale=T)
    optimizer = KFAC(model, loss_scale=T, fallback="gradient", momentum=0.0)
    assert [row.approximation for row in optimizer.coverage() if row.parameters == "h0"] == ["gradient"]
    before = model.h0.detach().clone()
    train(model, optimizer, [0])
    torch.testing.assert_close(model.h0.detach(), before - optimizer.stats()["step_size"] * model.h0.grad)


class Unigrams(nn.Module):
    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(V))

    def forward(self, x):
        return self.logits.expand(*x.shape, V)


def test_what_has_no_matrix_to_train_is_trained_too():
    """Gains and shifts alone, and parameters that follow the gradient alone."""
    norms = language_model()
    norms.requires_grad_(False)
    norms.norm.requires_grad_(True)
    for model, fallback in ((norms, None), (Unigrams(), "gradient")):
        optimizer = KFAC(model, loss_scale=T, fallback=fallback)
        first, *_, last = train(model, optimizer, [0] * 30)
        assert last < first


def test_a_weight_computed_from_others_leaves_the_other_layers_their_blocks():
    model = language_model(layers=2)
    nn.utils.parametrizations.weight_norm(model.rnn, "weight_hh_l0")
    optimizer = KFAC(model, loss_scale=T, fallback="gradient")
    rows = {row.block: row.approximation for row in optimizer.coverage()}
    assert rows["rnn.l1.i"] == "option2"
    assert "rnn.l0.i" not in rows
    first, *_, last = train(model, optimizer, [0] * 30)
    assert last < first


class WithAttention(LanguageModel):
    """With a layer that uses the weights of a linear map without calling it."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(self.softmax.in_features, 1)

    def forward(self, x):
        h = self.norm(self.rnn(self.embedding(x))[0])
        return self.softmax(h + self.attention(h, h, h)[0])


def test_attention_is_refused_by_name_unless_it_may_follow_the_gradient():
    with pytest.raises(
        ValueError, match=r"no Fisher block covers attention.in_proj_weight, .*attention.out_proj.weight"
    ):
        KFAC(WithAttention(), loss_scale=T)
    model = WithAttention()
    train(model, KFAC(model, loss_scale=T, fallback="gradient"), range(2))


def test_parameters_that_are_not_the_models_are_refused():
    with pytest.raises(ValueError, match=r"params holds a \[7, 7\] that is not a parameter of the model"):
        KFAC(model := language_model(), loss_scale=T, params=[*model.parameters(), nn.Parameter(torch.zeros(7, 7))])


def test_a_group_added_later_is_refused_since_its_blocks_would_be_missing():
    optimizer = KFAC(language_model(), loss_scale=T)
    with pytest.raises(ValueError, match="param groups of KFAC are given once"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_a_layer_that_cannot_be_converted_follows_the_gradient_where_that_is_asked_for():
    model = nn.Sequential(Outputs(3, 4, proj_size=2), nn.Linear(2, V))
    with pytest.raises(ValueError, match=r"no Fisher block covers 0\.weight_ih_l0.*: use .* without proj_size, freeze"):
        KFAC(model, loss_scale=T)
    optimizer, before = KFAC(model, loss_scale=T, fallback="gradient"), [p.clone() for p in model.parameters()]
    x = torch.randn(T, B, 3)
    optimizer.update_statistics(lambda: Categorical(model(x)))
    mean_loss(model, x, tokens(1)).backward()
    optimizer.step()
    assert not any(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))


class Outputs(nn.LSTM):
    def forward(self, x):
        return super().forward(x)[0]


def test_an_unconverted_layer_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"0 is a torch\.nn\.GRU, .* kfacrnn\.nn\.convert"):
        KFAC(nn.Sequential(nn.GRU(2, 3)), loss_scale=T)


OUT_OF_RANGE = {
    "approximation": ("option3", None, 1),
    "fisher": ("exact", None),
    "fallback": ("adam", 1),
    "lr": (0.0, -1.0, math.nan, math.inf, None),
    "damping": (0.0, -1e-3, math.nan, "0.1"),
    "first_damping": (0.0, -1e-3, math.inf),
    "kl_clip": (0.0, math.inf),
    "loss_scale": (0, -1, math.nan),
    "gamma_max": (0.0, math.inf),
    "statistics_fraction": (0.0, 1.5),
    "early_interval": (0.0, 1.5, math.nan),
    "momentum": (-0.1, 1.0, None),
    "statistics_decay": (-0.1, 1.0),
    "weight_decay": (-1.0, math.inf),
    "statistics_every": (0, 2.5),
    "refresh_every": (0,),
    "refresh_delay": (-1, 20, 0.5),
    "gates": ("both", None),
    "max_dense": (0,),
    "compute_dtype": (torch.float16, torch.bfloat16),
    "product_dtype": (torch.float16, torch.float64),
    "lag_tolerance": (-0.1, 1.0, math.nan),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_an_argument_out_of_range_is_refused_by_name(name):
    for value in OUT_OF_RANGE[name]:
        with pytest.raises(ValueError, match=f"^{name} must be"):
            KFAC(nn.Linear(2, 3), **{"loss_scale": T, name: value})


def test_parameters_in_place_of_a_model_are_refused():
    with pytest.raises(ValueError, match=r"^model must be a torch\.nn\.Module, "):
        KFAC(nn.Linear(2, 3).parameters(), loss_scale=T)


@pytest.mark.parametrize("name", ["damping", "kl_clip", "loss_scale"])
@pytest.mark.parametrize("value", [0.0, -1e-3, math.nan, None])
def test_a_setting_that_is_changed_later_is_checked_as_at_first(name, value):
    optimizer = KFAC(nn.Linear(2, 3), loss_scale=T)
    before = getattr(optimizer, name)
    with pytest.raises(ValueError, match=f"^{name} must be"):
        setattr(optimizer, name, value)
    assert getattr(optimizer, name) == before


@pytest.mark.parametrize("lr", [math.nan, -0.1])
def test_a_learning_rate_that_is_no_longer_one_is_refused_before_anything_moves(lr):
    model = language_model()
    optimizer = KFAC(model, loss_scale=T)
    train(model, optimizer, [0])
    before = parameters(model)
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match=r"^lr must be"):
        train(model, optimizer, [1])
    torch.testing.assert_close(parameters(model), before, rtol=0, atol=0)


def test_the_loss_may_be_scaled_otherwise_later():
    models = [language_model(), language_model()]
    first, second = (KFAC(model, loss_scale=scale, kl_clip=1e9) for model, scale in zip(models, (T, 1), strict=True))
    second.loss_scale = T
    for model, optimizer in zip(models, (first, second), strict=True):
        train(model, optimizer, range(2))
    assert_same(*models)
    third = KFAC(models[1], loss_scale=1)
    third.load_state_dict(second.state_dict())
    assert third.loss_scale == T


def test_a_copy_is_refused_and_told_of_the_state():
    optimizer = KFAC(nn.Linear(2, 3), loss_scale=T)
    for copied in (copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=r"state_dict\(\)"):
            copied(optimizer)


@pytest.mark.parametrize("option", [{"lr": -1.0}, {"momentum": 1.0}, {"weight_decay": -1.0}], ids=str)
def test_an_option_of_a_group_out_of_range_is_refused_by_name(option):
    model = nn.Linear(2, 3)
    with pytest.raises(ValueError, match=f"^{next(iter(option))} must be"):
        KFAC(model, loss_scale=T, params=[{"params": model.parameters(), **option}])


# ------------------------------------------------------------------------------------------------------------- abuse


def assert_finite(model: nn.Module) -> None:
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e38])
def test_gradients_that_are_not_finite_move_nothing_and_are_counted(poison):
    model = language_model()
    optimizer = KFAC(model, loss_scale=T)
    train(model, optimizer, range(3))
    before = parameters(model)
    mean_loss(model, tokens(0), tokens(1)).backward()
    model.rnn.weight_hh_l0.grad[1, 1] = poison
    optimizer.step()
    torch.testing.assert_close(parameters(model), before, rtol=0, atol=0)
    assert optimizer.stats()["skipped_updates"] == 1
    assert optimizer.stats()["step_size"] == optimizer.stats()["predicted_kl"] == 0
    train(model, optimizer, range(3, 6))
    assert not torch.equal(parameters(model)[0], before[0])
    assert_finite(model)


def test_a_predicted_change_that_rounding_made_negative_moves_nothing(monkeypatch):
    model = language_model()
    optimizer = KFAC(model, loss_scale=T)
    train(model, optimizer, range(3))
    before = parameters(model)
    monkeypatch.setattr(KFAC, "_directions", lambda _: ({p: torch.ones_like(p) for p in model.parameters()}, -1e-9))
    optimizer.step()
    torch.testing.assert_close(parameters(model), before, rtol=0, atol=0)
    assert optimizer.stats()["skipped_updates"] == 1


def test_statistics_that_are_not_finite_are_left_out_and_counted():
    model, x = language_model(), tokens(0)
    optimizer = KFAC(model, loss_scale=T, statistics_every=1, refresh_every=1)
    train(model, optimizer, range(2))
    optimizer.update_statistics(lambda: Categorical(model(x) * math.nan))
    train(model, optimizer, range(2, 4))
    assert optimizer.stats()["skipped_statistics"] == 1
    assert optimizer.stats()["failed_inversions"] == optimizer.stats()["skipped_updates"] == 0
    assert_finite(model)


@pytest.mark.parametrize("approximation", THREE)
def test_zero_gradients_move_nothing(approximation):
    model = language_model()
    optimizer = KFAC(model, approximation, loss_scale=T)
    optimizer.update_statistics(lambda: Categorical(model(tokens(0))))
    before = parameters(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(parameters(model), before, rtol=0, atol=0)
    assert optimizer.stats()["skipped_updates"] == 0


def dead(model: LanguageModel) -> LanguageModel:
    """Hidden units that never speak, one of which is never heard."""
    with torch.no_grad():
        for name, p in model.rnn.named_parameters():
            if not name.startswith("gain"):
                p.zero_()
        model.softmax.weight[:, 0] = 0
    return model


ABUSES = {
    "dead units": lambda **o: (dead(language_model(**o)), tokens(0)),
    "nothing reaches the layers": lambda **o: (silent(language_model(**o)), tokens(0)),
    "tokens never seen": lambda **o: (language_model(**o), torch.full((T, B), 2)),
    "batch of one": lambda **o: (language_model(**o), tokens(0, cases=1)),
    "sequence of one": lambda **o: (language_model(**o), tokens(0, steps=1)),
    "one step of one case": lambda **o: (language_model(**o), tokens(0, 1, 1)),
    "saturated": lambda **o: (scaled(language_model(**o), 100.0), tokens(0)),
    "vanishing": lambda **o: (scaled(language_model(**o), 1e-20), tokens(0)),
}


def silent(model: LanguageModel) -> LanguageModel:
    with torch.no_grad():
        model.softmax.weight.zero_()
    return model


def scaled(model: LanguageModel, factor: float) -> LanguageModel:
    with torch.no_grad():
        for p in model.parameters():
            p *= factor
    return model


@pytest.mark.parametrize("abuse", ABUSES)
@pytest.mark.parametrize("approximation", THREE)
@pytest.mark.parametrize("layer", [LSTM, LayerNormLSTM])
def test_degenerate_models_and_data_are_trained_without_a_nan(abuse, approximation, layer):
    model, x = ABUSES[abuse](layer=layer)
    optimizer = KFAC(model, approximation, loss_scale=len(x), statistics_every=1, refresh_every=2)
    for _ in range(6):
        optimizer.update_statistics(lambda: Categorical(model(x)))
        optimizer.zero_grad()
        mean_loss(model, x, (x + 1) % V).backward()
        optimizer.step()
        assert_finite(model)
    assert all(math.isfinite(value) for name, value in optimizer.stats().items() if name != "reduction_ratio")
    assert optimizer.stats()["skipped_updates"] == 0


@pytest.mark.parametrize("approximation", THREE)
def test_a_dnc_is_trained_with_nothing_left_out(approximation):
    torch.manual_seed(0)
    model = DNC(3, 2, hidden=4, slots=4, word=3, read_heads=2)
    optimizer = KFAC(model, approximation, loss_scale=1, lr=0.1, kl_clip=0.1, momentum=0.0, statistics_every=1)
    x, bits = torch.randn(5, 4, 3), (torch.rand(5, 4, 2) < 0.5).float()
    mask = torch.arange(5).unsqueeze(1).expand(5, 4) >= 2
    losses = []
    for _ in range(20):
        optimizer.update_statistics(lambda: Bernoulli(model(x), mask=mask))
        optimizer.zero_grad()
        loss = Bernoulli(model(x), mask=mask).log_loss(bits).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert len(optimizer.coverage()) == 15
    assert optimizer.stats()["psi_max"] <= 1 + 1e-4
    assert_finite(model)


@pytest.mark.parametrize("variance", [1.0, 0.01])
def test_one_full_step_on_squared_errors_is_the_least_squares_solution(variance):
    torch.manual_seed(0)
    steps, outputs = 5, 2
    model = nn.Linear(4, outputs).double()
    x = torch.randn(steps, 4000, 4, dtype=torch.float64) + 1
    y = torch.nn.functional.linear(x, torch.randn(outputs, 4).double(), torch.randn(outputs).double())
    y += variance**0.5 * torch.randn_like(y)
    scale = steps * outputs / (2 * variance)
    optimizer = KFAC(model, "indep", loss_scale=scale, lr=1.0, kl_clip=1e9, momentum=0.0, damping=1e-9)
    optimizer.update_statistics(lambda: Gaussian(model(x), variance))
    torch.nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    homogeneous = torch.cat([x, torch.ones_like(x[..., :1])], -1).flatten(0, 1)
    expected = torch.linalg.lstsq(homogeneous, y.flatten(0, 1)).solution.T
    found = torch.cat([model.weight, model.bias[:, None]], 1)
    assert (found - expected).norm() < 0.03 * expected.norm()  # G0 is sampled, 20,000 times: 1 % of an entry


def test_the_stats_say_how_the_last_step_was_made():
    model = language_model()
    optimizer = KFAC(
        model, "option1", loss_scale=T, lr=1e9, kl_clip=0.04, refresh_every=4, statistics_every=1, early_interval=0.25
    )
    train(model, optimizer, range(12))  # the newest refresh before update 10
    stats = optimizer.stats()
    assert stats["predicted_kl"] == pytest.approx(0.02)
    assert stats["staleness"] == 1
    assert -1 <= stats["psi_min"] < 0 < stats["psi_max"] <= 1 + 1e-4
    assert stats["condition_A"] > 1
    assert stats["condition_G"] > 1
    assert stats["psi_clipped"] == stats["retries"] == stats["failed_inversions"] == 0
