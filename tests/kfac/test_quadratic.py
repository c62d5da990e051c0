"""Step size and momentum from the exact quadratic model, against the Fisher as a dense matrix."""

from __future__ import annotations

import copy
import io
import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.functional import hessian
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from kfacrnn import KFAC
from kfacrnn.kfac import LevenbergMarquardt, QuadraticModel
from kfacrnn.kfac.quadratic import logit_changes, minimum
from kfacrnn.nn import DNC, LSTM
from kfacrnn.predictive import Bernoulli, Categorical, Gaussian
from tests.ranks import together

T, B, V = 4, 5, 5
LENGTHS = torch.tensor([4, 2, 3, 1, 4])


class Text(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.embedding, self.lstm, self.softmax = nn.Embedding(V, 2), LSTM(2, 3), nn.Linear(3, V)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.softmax(self.dropout(self.lstm(self.embedding(tokens))[0]))


def text(seed: int = 0, dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> Text:
    torch.manual_seed(seed)
    model = Text(dropout).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    return model


def tokens(seed: int, steps: int = T, cases: int = B) -> Tensor:
    return torch.randint(V, (steps, cases), generator=torch.Generator().manual_seed(seed))


def mask(seed: int = 0) -> Tensor:
    return torch.rand(T, B, generator=torch.Generator().manual_seed(seed)) < 0.7


class Problem:
    """A model, inputs of `B` sequences and what it predicts for them."""

    def __init__(self, model: nn.Module, x: Tensor, predict: Callable[[Tensor], Any]):
        self.model, self.x, self.predict = model, x, predict
        self.parameters = list(model.parameters())

    def forward(self) -> Any:
        return self.predict(self.model(self.x))

    def flat(self, vector: list[Tensor]) -> Tensor:
        return torch.cat([x.detach().flatten() for x in vector])

    def jacobian(self, case: int, length: int) -> Tensor:
        """`[length, out, parameters]`, one row at a time, of one case at its own length."""
        logits = self.model(self.x[:length, case : case + 1])[:, 0]
        rows = [torch.autograd.grad(z, self.parameters, retain_graph=True) for z in logits.flatten()]
        return torch.stack([self.flat(row) for row in rows]).view(*logits.shape, -1)

    def dense_fisher(self) -> Tensor:
        """Σ over cases and steps of Jᵀ F_out J, F_out from every target."""
        predicted, size = self.forward(), len(self.flat(self.parameters))
        total = torch.zeros(size, size, dtype=torch.float64)
        lengths = [T] * B if predicted.lengths is None else predicted.lengths.tolist()
        for case, length in enumerate(lengths):
            for t, J in enumerate(self.jacobian(case, length)):
                if predicted.mask is None or predicted.mask[t, case]:
                    total += J.T @ output_fisher(predicted, t, case) @ J
        return total


class ByCoordinates(Problem):
    """With a model whose gradient leaves something out, as the DNC's does the usage of what it has just written."""

    @torch.no_grad()
    def jacobian(self, case: int, length: int) -> Tensor:
        columns = []
        for p in self.parameters:
            for at in p.view(-1).split(1):
                value, logits = at.item(), []
                for shift in (1e-5, -1e-5):
                    at.fill_(value + shift)
                    logits.append(self.model(self.x[:length, case : case + 1])[:, 0])
                at.fill_(value)
                columns.append((logits[0] - logits[1]) / 2e-5)
        return torch.stack(columns, -1)


def output_fisher(predicted: Any, t: int, case: int) -> Tensor:
    """Σ_y p(y) g gᵀ over the targets of one step."""
    z = predicted.logits[t, case].detach().clone().requires_grad_()
    total = torch.zeros(len(z), len(z), dtype=torch.float64)
    if isinstance(predicted, Categorical):
        for y, p in enumerate(z.softmax(0).tolist()):
            (g,) = torch.autograd.grad(F.cross_entropy(z, torch.tensor(y)), z)
            total += p * torch.outer(g, g)
        return total
    if isinstance(predicted, Gaussian):
        target, scale = z.detach(), predicted.variance.sqrt()  # the Hessian does not depend on the target
        return hessian(lambda mean: -torch.distributions.Normal(mean, scale).log_prob(target).sum(), z.detach())
    p = z.sigmoid().detach()
    for y in torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * len(z)):
        (g,) = torch.autograd.grad(F.binary_cross_entropy_with_logits(z, y, reduction="sum"), z)
        total += torch.where(y == 1, p, 1 - p).prod() * torch.outer(g, g)
    return total


def dnc() -> DNC:
    torch.manual_seed(0)
    return DNC(3, 2, hidden=3, slots=3, word=2, read_heads=1, write_heads=1).double()


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "LSTM": lambda: Problem(text(), tokens(0), Categorical),
    "LSTM, masked": lambda: Problem(text(), tokens(0), lambda z: Categorical(z, mask())),
    "LSTM, padded": lambda: Problem(text(), tokens(0), lambda z: Categorical(z, mask(), LENGTHS)),
    "DNC, masked and padded": lambda: ByCoordinates(
        dnc(), torch.randn(T, B, 3, dtype=torch.float64), lambda z: Bernoulli(z, mask(), LENGTHS)
    ),
}
each_problem = pytest.mark.parametrize("problem", [pytest.param(make, id=name) for name, make in PROBLEMS.items()])


def random_vector(parameters: list[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in parameters]


# ------------------------------------------------------------------------------------------------- products with F


@pytest.mark.parametrize("distribution", [Categorical, Bernoulli, partial(Gaussian, variance=0.3)])
def test_the_product_with_the_logits_fisher_is_the_expectation_over_all_targets(distribution):
    logits, u, v = (torch.randn(T, B, 3, generator=torch.Generator().manual_seed(i)).double() for i in range(3))
    for options in ({}, {"mask": mask()}, {"mask": mask(), "lengths": LENGTHS}):
        predicted = distribution(logits, **options)
        steps = [[t for t in range(T) if predicted.mask is None or predicted.mask[t, b]] for b in range(B)]
        expected = [sum(u[t, b] @ output_fisher(predicted, t, b) @ v[t, b] for t in steps[b]) for b in range(B)]
        torch.testing.assert_close(predicted.fisher_product(u, v), torch.tensor(expected, dtype=torch.float64))


def test_half_precision_logits_have_products_in_float32():
    z, u = torch.randn(T, B, 3), torch.randn(T, B, 3)
    for distribution in (Categorical, Bernoulli, Gaussian):
        half = distribution(z.bfloat16()).fisher_product(u, u)
        torch.testing.assert_close(half, distribution(z.bfloat16().float()).fisher_product(u, u))


@each_problem
def test_products_with_the_exact_fisher_are_those_of_the_dense_matrix(problem):
    problem = problem()
    u, v = (random_vector(problem.parameters, seed) for seed in (1, 2))
    dense = problem.dense_fisher()
    with torch.no_grad():
        predicted, changes = logit_changes(problem.forward, problem.parameters, [u, v], [100.0, 1.0])
    for a, Ja in zip((u, v), changes, strict=True):
        for b, Jb in zip((u, v), changes, strict=True):
            expected = problem.flat(a) @ dense @ problem.flat(b)
            torch.testing.assert_close(predicted.fisher_product(Ja, Jb).sum(), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("wrong", [1e-2, 1.0, 1e2])
def test_in_float32_the_logits_change_is_right_to_two_percent_though_the_foretold_be_wrong_by_a_hundred(wrong):
    exact, single = text(), text(dtype=torch.float32)
    u = random_vector(list(exact.parameters()), 1)
    foretold = float(problem_curvature(exact, u)) / B * wrong
    with torch.no_grad():
        _, (expected,) = logit_changes(lambda: Categorical(exact(tokens(0))), list(exact.parameters()), [u], [1.0])
        _, (found,) = logit_changes(
            lambda: Categorical(single(tokens(0))), list(single.parameters()), [[x.float() for x in u]], [foretold]
        )
    assert (found - expected).norm() < 0.02 * expected.norm()


def problem_curvature(model: nn.Module, u: list[Tensor]) -> Tensor:
    problem = Problem(model, tokens(0), Categorical)
    return problem.flat(u) @ problem.dense_fisher() @ problem.flat(u)


def test_parameters_are_where_they_were_bit_for_bit_even_after_an_error():
    model = text(dtype=torch.float32)
    before, vector = copy.deepcopy(model.state_dict()), random_vector(list(model.parameters()), 0)
    calls = []

    def forward() -> Categorical:
        calls.append(None)
        if len(calls) == 5:
            raise RuntimeError("out of memory")
        return Categorical(model(tokens(0)))

    with torch.no_grad():
        logit_changes(forward, list(model.parameters()), [vector], [1.0])
        assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
        with pytest.raises(RuntimeError, match="out of memory"):
            logit_changes(forward, list(model.parameters()), [vector], [1.0])
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


# ---------------------------------------------------------------------------------------------------- the 2 × 2 system


def test_the_minimum_is_where_no_other_point_is_lower():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        X = torch.randn(3, 2, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 1e-4])
        slopes, B2 = torch.randn(2, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 1e-4]), X.T @ X
        torch.testing.assert_close(minimum(slopes, B2), -torch.linalg.pinv(X) @ torch.linalg.pinv(X).T @ slopes)


def test_what_has_no_curvature_of_its_own_is_left_alone():
    one = torch.tensor([1.0, 2.0], dtype=torch.float64)
    parallel = torch.outer(one, one)
    torch.testing.assert_close(minimum(-3 * one, parallel), torch.tensor([3.0, 0.0]).double())
    torch.testing.assert_close(minimum(one, torch.diag(one * torch.tensor([1, 0]))), torch.tensor([-1.0, 0.0]).double())
    assert minimum(one, torch.zeros(2, 2).double()).tolist() == [0, 0]
    assert minimum(one[:1], torch.zeros(1, 1).double()).tolist() == [0]


# --------------------------------------------------------------------------------------------------------------- steps


def train(model, optimizer, updates, cases=B, after=lambda *_: None):
    for update in updates:
        x, y = tokens(2 * update, cases=cases), tokens(2 * update + 1, cases=cases)
        if optimizer.statistics_due:
            part = optimizer.statistics_cases(cases)
            optimizer.update_statistics(lambda x=x[:, part]: Categorical(model(x)))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        part = optimizer.quadratic_cases(cases)
        optimizer.step(forward=lambda x=x[:, part]: Categorical(model(x)))
        after(loss)


@pytest.mark.parametrize("damping", [1e-4, 0.1])
def test_every_step_is_the_least_of_the_dense_model_in_the_plane_of_direction_and_last_step(damping):
    """M(δ) = ∇hᵀδ + ½ δᵀ(F/N + λE[T]/N)δ with N = T; Δ is what the KL-bounded optimiser goes along."""
    model = text()
    settings = {"loss_scale": T, "damping": damping, "statistics_fraction": 1.0, "momentum": 0.0}
    optimizer = KFAC(model, quadratic_model=QuadraticModel(fraction=1.0), weight_decay=0.1, **settings)
    scheduler = LambdaLR(optimizer, lambda update: 0.9**update)
    velocity = None
    for update in range(4):
        twin = copy.deepcopy(model)
        reference = KFAC(twin, lr=1.0, kl_clip=1e9, **settings)
        reference.load_state_dict({**optimizer.state_dict(), "param_groups": reference.state_dict()["param_groups"]})
        reference.kl_clip = 1e9
        x, y = tokens(2 * update), tokens(2 * update + 1)
        for each, trained in ((optimizer, model), (reference, twin)):
            if each.statistics_due:
                each.update_statistics(lambda x=x, trained=trained: Categorical(trained(x)))
            each.zero_grad()
            F.cross_entropy(trained(x).flatten(0, 1), y.flatten()).backward()
        reference.step()
        problem = Problem(model, x, Categorical)
        theta, g = problem.flat(problem.parameters), problem.flat([p.grad for p in problem.parameters])
        direction = theta - problem.flat(list(twin.parameters()))
        curvature = problem.dense_fisher() / B / T + damping * torch.eye(len(theta), dtype=torch.float64)
        P = torch.stack([-direction] if velocity is None else [-direction, velocity], 1)
        best = torch.linalg.lstsq(P.T @ curvature @ P, -P.T @ g.unsqueeze(1)).solution.squeeze(1)
        share = 0.9**update
        velocity = share * P @ best
        expected = theta * (1 - max(share * best[0], 0.0) * 0.1) + velocity
        optimizer.step(forward=lambda x=x: Categorical(model(x)))
        scheduler.step()
        torch.testing.assert_close(problem.flat(list(model.parameters())), expected, rtol=1e-6, atol=1e-9)
        stats = optimizer.stats()
        assert stats["step_size"] == pytest.approx(share * best[0].item(), rel=1e-6)
        assert stats["momentum"] == pytest.approx(share * best[1].item() if len(best) > 1 else 0.0, rel=1e-6)
        damped = (velocity @ curvature @ velocity / 2).item()
        assert stats["predicted_kl"] == pytest.approx(damped - damping * velocity.square().sum().item() / 2, rel=1e-6)
        assert optimizer._last.predicted_change == pytest.approx((g @ velocity).item() + damped, rel=1e-6)


def test_for_small_steps_the_loss_changes_as_the_model_predicts():
    model = text()
    optimizer = KFAC(
        model, loss_scale=T, damping=1e4, quadratic_model=QuadraticModel(), adaptive_damping=LevenbergMarquardt(every=1)
    )
    x, y = tokens(0), tokens(1)
    for _ in range(2):
        optimizer.update_statistics(lambda: Categorical(model(x)))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step(forward=lambda: Categorical(model(x)))
        optimizer.adapt_damping(loss.detach(), F.cross_entropy(model(x).flatten(0, 1), y.flatten()).detach())
        # M at its least is half of ∇hᵀδ, the other half is damping's: the loss itself falls by nearly all of ∇hᵀδ.
        assert optimizer.stats()["reduction_ratio"] == pytest.approx(2, rel=1e-2)


def test_the_model_foretells_what_the_step_makes_of_the_loss_where_curvature_matters():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x = torch.randn(1, 400, 3).double()
    y = (torch.rand(1, 400, 2, generator=torch.Generator().manual_seed(1)) < 0.5).double()
    optimizer = KFAC(
        model, loss_scale=1, damping=1e-8, statistics_fraction=1.0, quadratic_model=QuadraticModel(fraction=1.0),
        adaptive_damping=LevenbergMarquardt(every=1),
    )  # fmt: skip
    before = Bernoulli(model(x)).log_loss(y).mean()
    optimizer.update_statistics(lambda: Bernoulli(model(x)))
    before.backward()
    optimizer.step(forward=lambda: Bernoulli(model(x)))
    optimizer.adapt_damping(before.detach(), Bernoulli(model(x)).log_loss(y).mean().detach())
    assert optimizer.stats()["reduction_ratio"] == pytest.approx(1, abs=0.25)


def test_the_parts_of_a_batch_take_turns():
    model = QuadraticModel(fraction=0.3)
    seen = [model.cases(update, 10) for update in range(4)]
    assert [(s.start, s.stop) for s in seen] == [(0, 3), (3, 6), (6, 9), (7, 10)]
    assert {model.cases(update, 1).stop for update in range(3)} == {1}


def test_without_a_gradient_nothing_moves_and_nothing_is_skipped():
    model = text()
    optimizer = KFAC(model, loss_scale=T, quadratic_model=QuadraticModel())
    train(model, optimizer, range(2))
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad.zero_()
    optimizer.step(forward=lambda: Categorical(model(tokens(0))))
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert optimizer.stats()["skipped_updates"] == 0
    train(model, optimizer, [3])
    assert not torch.equal(model.softmax.weight, before["softmax.weight"])


def test_predictions_that_are_not_finite_move_nothing_and_are_counted():
    model = text()
    optimizer = KFAC(model, loss_scale=T, quadratic_model=QuadraticModel())
    train(model, optimizer, range(2))
    before = copy.deepcopy(model.state_dict())
    optimizer.step(forward=lambda: Categorical(model(tokens(0)) * math.nan))
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert optimizer.stats()["skipped_updates"] == 1


def test_noise_is_the_same_in_all_passes_of_a_step_and_another_in_the_next():
    model, seen = text(dropout=0.5), []
    optimizer = KFAC(model, loss_scale=T, quadratic_model=QuadraticModel())
    model.dropout.register_forward_hook(lambda _, x, y: seen.append((y == 0) & (x[0] != 0)))
    train(model, optimizer, range(1))
    seen.clear()
    global_noise = torch.get_rng_state()
    optimizer.step(forward=lambda: Categorical(model(tokens(0))))
    first, *others = seen
    assert len(seen) == 5
    assert first.any()
    assert all(torch.equal(first, other) for other in others)
    optimizer.step(forward=lambda: Categorical(model(tokens(0))))
    assert not torch.equal(first, seen[-1])
    assert torch.equal(torch.get_rng_state(), global_noise)


@pytest.mark.parametrize("draw", [random.random, np.random.random], ids=["random", "numpy"])
def test_noise_may_come_from_python_or_numpy(draw):
    model, seen = text(), []
    optimizer = KFAC(model, loss_scale=T, quadratic_model=QuadraticModel())

    def forward():
        seen.append(draw())
        return Categorical((1 + seen[-1]) * model(tokens(0)))

    optimizer.update_statistics(forward)
    model(tokens(0)).square().sum().backward()
    optimizer.step(forward=forward)
    assert len(seen) > 3
    assert len(set(seen[1:])) == 1


@pytest.mark.parametrize(("draw", "seed"), [(random.random, random.seed), (np.random.random, np.random.seed)])
def test_passes_for_k_fac_draw_nothing_from_the_training_runs_noise(draw, seed):
    model, draws, inside = text(), [], []

    def forward():
        inside.append(draw())
        return Categorical((1 + inside[-1]) * model(tokens(0)))

    for passes in (0, 1):
        optimizer = KFAC(model, loss_scale=T)
        seed(3)
        for _ in range(passes):
            optimizer.update_statistics(forward)
        draws.append(draw())
    assert draws[0] == draws[1] != inside[0]


def test_predictions_that_cannot_be_repeated_are_refused_before_anything_moves():
    model, calls = text(), []
    optimizer = KFAC(model, loss_scale=T, quadratic_model=QuadraticModel())

    def stateful():
        calls.append(None)
        return Categorical(model(tokens(0)) * len(calls))

    optimizer.update_statistics(stateful)
    model(tokens(0)).square().sum().backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="predicts otherwise when it is called again"):
        optimizer.step(forward=stateful)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_classes_that_are_ruled_out_change_nothing():
    """By logits of −∞ or by very low ones: both have a probability of 0."""
    moved = []
    for low in (-math.inf, -1e4):
        model = text()
        optimizer = KFAC(model, loss_scale=T, quadratic_model=QuadraticModel())

        def predicted(inputs, model=model, low=low):
            return model(inputs).masked_fill(torch.arange(V) >= 3, low)

        for update in range(3):
            forward = partial(lambda predicted, x: Categorical(predicted(x)), predicted, tokens(update))
            optimizer.update_statistics(forward)
            optimizer.zero_grad()
            forward().log_loss(tokens(update + 1) % 3).mean().backward()
            optimizer.step(forward=forward)
        assert optimizer.stats()["skipped_updates"] == 0
        moved.append(list(model.parameters()))
    torch.testing.assert_close(*moved, rtol=1e-12, atol=1e-14)


def test_a_run_continues_from_its_state_bit_for_bit():
    def fresh(seed: int) -> tuple[nn.Module, KFAC, Callable[..., None]]:
        model = text(seed, torch.float32, dropout=0.3)
        optimizer = KFAC(
            model, loss_scale=T, statistics_every=2, weight_decay=0.1, seed=seed, quadratic_model=QuadraticModel(0.4),
            adaptive_damping=LevenbergMarquardt(every=2),
        )  # fmt: skip

        def adapt(loss: Tensor) -> None:
            if optimizer.reduction_due:
                optimizer.adapt_damping(loss.item(), 0.99 * loss.item())

        return model, optimizer, adapt

    model, optimizer, adapt = fresh(0)
    train(model, optimizer, range(3), after=adapt)
    buffer = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), buffer)
    buffer.seek(0)
    states = torch.load(buffer, weights_only=True)
    other, resumed, adapt_other = fresh(1)
    other.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    for each in ((model, optimizer, adapt), (other, resumed, adapt_other)):
        torch.manual_seed(3)
        train(*each[:2], range(3, 6), after=each[2])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert resumed.stats() == optimizer.stats()
    assert optimizer.stats()["momentum"] != 0


def ranks_trained() -> dict[str, Tensor]:
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = text()
    group = dist.group.WORLD if ranks > 1 else None
    optimizer = KFAC(
        model, loss_scale=T, statistics_fraction=1.0, quadratic_model=QuadraticModel(fraction=0.5), process_group=group
    )
    parallel = DistributedDataParallel(model) if ranks > 1 else model
    for update in range(3):
        x, y = (tokens(2 * update + i, cases=8)[:, rank::ranks] for i in range(2))
        if optimizer.statistics_due:
            optimizer.update_statistics(lambda x=x: Categorical(model(x)))
        optimizer.zero_grad()
        F.cross_entropy(parallel(x).flatten(0, 1), y.flatten()).backward()
        part = optimizer.quadratic_cases(x.shape[1])
        optimizer.step(forward=lambda x=x[:, part]: Categorical(model(x)))
    return model.state_dict()


def test_two_ranks_are_one_process():
    alone = ranks_trained()
    for found in together(2, ranks_trained):
        torch.testing.assert_close(found, alone, rtol=1e-6, atol=1e-9)


# -------------------------------------------------------------------------------------------------------------- errors


def test_a_forward_and_a_quadratic_model_need_each_other():
    model = text()
    for optimizer, options in (
        (KFAC(model, loss_scale=T, quadratic_model=QuadraticModel()), {}),
        (KFAC(model, loss_scale=T), {"forward": lambda: Categorical(model(tokens(0)))}),
    ):
        optimizer.update_statistics(lambda: Categorical(model(tokens(0))))
        with pytest.raises(ValueError, match=r"takes steps by step\(forward=…\)"):
            optimizer.step(**options)
    with pytest.raises(RuntimeError, match="quadratic_cases needs KFAC"):
        KFAC(model, loss_scale=T).quadratic_cases(B)


def test_half_precision_predictions_are_refused():
    model = text(dtype=torch.float32)
    optimizer = KFAC(model, loss_scale=T, quadratic_model=QuadraticModel())
    with torch.autocast("cpu", torch.bfloat16):  # around the step it is switched off
        train(model, optimizer, range(2))
    with pytest.raises(ValueError, match=r"must predict in float32 or float64, got torch\.bfloat16"):
        optimizer.step(forward=lambda: Categorical(model(tokens(0)).bfloat16()))


def test_groups_with_schedules_of_their_own_are_refused():
    model = text()
    groups = [{"params": model.lstm.parameters(), "lr": 0.1}, {"params": model.softmax.parameters()}]
    model.embedding.requires_grad_(False)
    optimizer = KFAC(model, loss_scale=T, params=groups, quadratic_model=QuadraticModel())
    train(model, optimizer, range(1))
    optimizer.param_groups[0]["lr"] = 0.05
    with pytest.raises(ValueError, match="one schedule for all parameter groups"):
        train(model, optimizer, [1])


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.5, math.nan])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match="fraction must be"):
        QuadraticModel(fraction=fraction)
