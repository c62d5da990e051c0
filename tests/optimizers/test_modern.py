"""SOAP, Shampoo, PSGD-Kron and Muon as the framework builds them: their steps against dense computations, and what is
not the packages' own: who gets which parameter, the noise, the first scale, the prompts of a bench."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from kfacrnn import config, discovery
from kfacrnn.bench.cycle import PLAIN, Kind
from kfacrnn.bench.subjects import TrainingRun
from kfacrnn.nn import DNC, LSTM
from kfacrnn.tasks._language_model import LanguageModel
from tests import synthetic

MODERN = ["soap", "shampoo", "psgd_kron"]
REFRESH = Kind(refresh=True)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.hidden = nn.Parameter(torch.randn(4, 3, generator=generator))
        self.bias = nn.Parameter(torch.randn(4, generator=generator))
        self.output = nn.Parameter(torch.randn(2, 4, generator=generator))


def built(name: str, model: nn.Module, *settings: str, seed: int = 0) -> Optimizer:
    needed = discovery.missing("optimizers", name)
    if needed:
        pytest.skip(f"{name} needs {needed}, which is not installed")
    overrides = [f"optimizer={name}", *(f"optimizer.{setting}" for setting in settings)]
    return discovery.load("optimizers", name).build(model, config.compose(overrides).optimizer, task=None, seed=seed)


def gradients(number: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + number)
    return {name: scale * torch.randn(p.shape, generator=generator) for name, p in Layers().named_parameters()}


def moves(name: str, count: int, *settings: str, scale: float = 1.0, seed: int = 0) -> list[dict[str, Tensor]]:
    """What each of `count` steps added to the parameters."""
    model = Layers()
    optimizer, moved = built(name, model, "clip=null", *settings, seed=seed), []
    for number in range(count):
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        for key, gradient in gradients(number, scale).items():
            getattr(model, key).grad = gradient.clone()
        optimizer.step()
        moved.append({key: p.detach() - before[key] for key, p in model.named_parameters()})
    return moved


def power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix.double())
    return vectors * values.pow(exponent) @ vectors.T


# ---- Muon --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "hidden"),
    [
        (lambda: LanguageModel(11, config.compose(["task=ptb_char", "task.hidden=4"]).task, LSTM), "recurrent.weight"),
        (lambda: DNC(3, 2, hidden=4, slots=4, word=3), ("controller_weight", "interface_weight")),
    ],
    ids=["language model", "DNC"],
)
def test_muon_takes_the_hidden_matrices_and_adamw_embedding_output_and_vectors(model: Any, hidden: Any) -> None:
    network = model()
    groups = built("muon", network).param_groups
    names = {id(p): name for name, p in network.named_parameters()}
    with_muon, with_adamw = ({names[id(p)] for p in group["params"]} for group in groups)
    assert with_muon == {name for name in names.values() if name.startswith(hidden)}
    assert with_adamw == set(names.values()) - with_muon


def test_muon_moves_along_the_singular_vectors_of_its_gradient_and_adamw_along_signs() -> None:
    (moved,) = moves("muon", 1, "lr=0.1", "adam_lr=0.01", "weight_decay=0")
    gradient = gradients(0)
    left, values, right = torch.linalg.svd(gradient["hidden"], full_matrices=False)
    values = values / values.norm()
    for _ in range(5):  # Jordan et al. (2024): p(x) = 3.4445 x - 4.775 x³ + 2.0315 x⁵
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    expected = -0.1 * math.sqrt(4 / 3) * (left * values) @ right
    torch.testing.assert_close(moved["hidden"], expected, rtol=0, atol=5e-3)  # the package computes in bfloat16
    for name in ("bias", "output"):
        torch.testing.assert_close(moved[name], -0.01 * gradient[name].sign(), rtol=1e-4, atol=1e-6)


def test_a_schedule_acts_on_both_of_muons_rates_also_after_loading() -> None:
    model = Layers()
    optimizer = built("muon", model)
    optimizer.load_state_dict(optimizer.state_dict())
    schedule = LambdaLR(optimizer, lambda update: float(update == 0))
    for number, still in enumerate((False, True)):
        before = [p.detach().clone() for p in model.parameters()]
        for key, gradient in gradients(number).items():
            getattr(model, key).grad = gradient
        optimizer.step()
        schedule.step()
        assert all(torch.equal(a, b) is still for a, b in zip(before, model.parameters(), strict=True))


# ---- the package pytorch_optimizer -------------------------------------------------------------------------------


def test_soaps_first_update_is_adams_in_the_eigenbases_of_the_gradient_before_it() -> None:
    nothing, moved = moves("soap", 2, "lr=0.1", "weight_decay=0", "beta1=0.9", "beta2=0.9")
    assert not any(move.any() for move in nothing.values())
    earlier, gradient = gradients(0)["output"], gradients(1)["output"]
    left = torch.linalg.eigh(earlier @ earlier.T).eigenvectors
    right = torch.linalg.svd(earlier).Vh.T[:, :2]  # the other two span a null space: any basis of it would do
    signs = (left.T @ gradient @ right).sign()
    torch.testing.assert_close(left.T @ moved["output"] @ right, -0.1 * signs, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(moved["bias"], -0.1 * gradients(1)["bias"].sign(), rtol=1e-4, atol=1e-6)


def test_shampoos_update_has_the_direction_of_the_inverse_roots_and_the_length_of_rmsprop() -> None:
    settings = ["lr=0.1", "beta1=0.5", "beta2=0.9", "eps=1e-4", "refresh_every=1", "schedule.warmup=0"]
    (moved,) = moves("shampoo", 1, *settings)
    nesterov = (1 - 0.5) * (1 + 0.5)  # of a mean that starts at 0
    gradient = gradients(0)["output"].double()
    L, R = (0.9e-4 * torch.eye(len(s)) + 0.1 * s for s in (gradient @ gradient.T, gradient.T @ gradient))
    L, R = (s + 1e-4 * torch.linalg.eigvalsh(s)[-1] * torch.eye(len(s)) for s in (L, R))
    direction = power(L, -0.25) @ gradient @ power(R, -0.25)
    length = math.sqrt(gradient.numel() / (1 - 0.9))
    expected = -0.1 * nesterov * length * direction / direction.norm()
    torch.testing.assert_close(moved["output"].double(), expected, rtol=0.02, atol=1e-3)
    slow = -0.1 * nesterov * gradients(0)["bias"].sign() / math.sqrt(1 - 0.9)
    torch.testing.assert_close(moved["bias"], slow, rtol=1e-4, atol=1e-6)


def test_krons_updates_do_not_depend_on_the_scale_of_the_gradients() -> None:
    for ours, small in zip(moves("psgd_kron", 3), moves("psgd_kron", 3, scale=1e-4), strict=True):
        for name in ours:
            torch.testing.assert_close(small[name], ours[name], rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("every", [2, 3, 49])
def test_kron_renews_its_factors_exactly_as_often_as_it_is_told(every: int) -> None:
    model = Layers()
    optimizer = built("psgd_kron", model, f"refresh_every={every}")
    renewed, before = [], torch.empty(0)
    for update in range(1, 2 * every + 1):
        for key, gradient in gradients(0).items():
            getattr(model, key).grad = gradient.clone()
        optimizer.step()
        now = optimizer.state[model.hidden]["Q"][0].clone()
        renewed += [update] if update > 1 and not torch.equal(now, before) else []
        before = now
    assert renewed == [every, 2 * every]


@pytest.mark.parametrize("name", ["shampoo", "psgd_kron"])
def test_noise_follows_from_the_seed_and_leaves_torchs_generator_alone(name: str) -> None:
    settings = ["refresh_every=1", "lr=0.01"]
    found = []
    for other in (1, 2):
        torch.manual_seed(other)
        np.random.seed(other)  # noqa: NPY002 - the one that the package asks
        before = torch.get_rng_state()
        found.append(moves(name, 3, *settings, seed=5)[-1])
        assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_another_seed_is_other_noise() -> None:
    first, second = (moves("psgd_kron", 3, seed=seed)[-1] for seed in (1, 2))
    assert not torch.equal(first["hidden"], second["hidden"])


@pytest.mark.parametrize("name", MODERN)
def test_a_bench_gets_steps_with_and_without_a_refresh_as_it_asks(name: str) -> None:
    built(name, Layers())  # skips
    run = config.compose([*synthetic.TINY, f"optimizer={name}", "optimizer.refresh_every=4"])
    subject = TrainingRun(run)
    assert subject.weights == {PLAIN: 0.75, REFRESH: 0.25}
    matrix = next(p for p in subject.session.model.parameters() if p.dim() == 2)

    def factor() -> Tensor:
        state = subject.session.optimizer.state[matrix]
        return (state["pre_conditioner"].pre_conditioners if name == "shampoo" else state["Q"])[0].clone()

    for kind in (REFRESH, PLAIN, PLAIN, PLAIN, PLAIN, PLAIN, REFRESH):
        before = factor()
        subject.step(kind)
        assert torch.equal(before, factor()) is (kind == PLAIN)
