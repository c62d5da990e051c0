"""SGD, Adam, AdamW and RMSProp as the framework builds them, against their recurrences written out in plain Python."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from kfacrnn import config, discovery

GRADIENTS = [[3.0, -4.0], [0.5, 1.0], [-2.0, 0.25]]
START = [1.0, -1.0]


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(START, dtype=torch.float64))


def trained(name: str, *overrides: str) -> list[list[float]]:
    """The weights after each of the three gradients."""
    settings = config.compose([f"optimizer={name}", *overrides]).optimizer
    model, task = Line(), None
    optimizer = discovery.load("optimizers", name).build(model, settings, task=task, seed=0)
    path = []
    for gradient in GRADIENTS:
        model.weight.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        path.append(model.weight.tolist())
    return path


def clipped(gradient: list[float], norm: float) -> list[float]:
    factor = min(1.0, norm / math.hypot(*gradient))
    return [g * factor for g in gradient]


def sgd(lr: float, momentum: float, nesterov: bool, decay: float, clip: float) -> list[list[float]]:
    weights, velocity, path = list(START), [0.0, 0.0], []
    for raw in GRADIENTS:
        gradient = [g + decay * w for g, w in zip(clipped(raw, clip), weights, strict=True)]
        velocity = [momentum * v + g for v, g in zip(velocity, gradient, strict=True)]
        step = [g + momentum * v for g, v in zip(gradient, velocity, strict=True)] if nesterov else velocity
        weights = [w - lr * s for w, s in zip(weights, step, strict=True)]
        path.append(weights)
    return path


def adam(lr: float, beta1: float, beta2: float, eps: float, decay: float, clip: float) -> list[list[float]]:
    """Kingma & Ba (2015), algorithm 1, with the decay of Loshchilov & Hutter (2019), algorithm 2."""
    weights, mean, square, path = list(START), [0.0, 0.0], [0.0, 0.0], []
    for t, raw in enumerate(GRADIENTS, 1):
        gradient = clipped(raw, clip)
        mean = [beta1 * m + (1 - beta1) * g for m, g in zip(mean, gradient, strict=True)]
        square = [beta2 * s + (1 - beta2) * g * g for s, g in zip(square, gradient, strict=True)]
        corrected = [
            (m / (1 - beta1**t)) / (math.sqrt(s / (1 - beta2**t)) + eps) for m, s in zip(mean, square, strict=True)
        ]
        weights = [w - lr * (c + decay * w) for w, c in zip(weights, corrected, strict=True)]
        path.append(weights)
    return path


def rmsprop(lr: float, alpha: float, momentum: float, eps: float, clip: float) -> list[list[float]]:
    """Tieleman & Hinton (2012), lecture 6e, slide 29, with momentum on the scaled gradient."""
    weights, square, velocity, path = list(START), [0.0, 0.0], [0.0, 0.0], []
    for raw in GRADIENTS:
        gradient = clipped(raw, clip)
        square = [alpha * s + (1 - alpha) * g * g for g, s in zip(gradient, square, strict=True)]
        scaled = [g / (math.sqrt(s) + eps) for g, s in zip(gradient, square, strict=True)]
        velocity = [momentum * v + g for v, g in zip(velocity, scaled, strict=True)]
        weights = [w - lr * v for w, v in zip(weights, velocity, strict=True)]
        path.append(weights)
    return path


def close(actual: list[list[float]], expected: list[list[float]]) -> bool:
    return all(
        a == pytest.approx(e, rel=1e-6, abs=1e-6) for a, e in zip(actual, expected, strict=True)
    )  # clipping divides by +1e-6


@pytest.mark.parametrize("clip", ["2.0", "null"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_with_momentum_decay_and_clipping(nesterov: bool, clip: str) -> None:
    settings = ["lr=0.1", "momentum=0.8", f"nesterov={nesterov}", "weight_decay=0.01", f"clip={clip}"]
    expected = sgd(0.1, 0.8, nesterov, 0.01, math.inf if clip == "null" else float(clip))
    assert close(trained("sgd", *(f"optimizer.{setting}" for setting in settings)), expected)


@pytest.mark.parametrize("clip", ["2.0", "null"])
@pytest.mark.parametrize(("name", "decay"), [("adam", 0.0), ("adamw", 0.3)])
def test_adam_and_its_decoupled_decay(name: str, decay: float, clip: str) -> None:
    settings = ["lr=0.1", "beta1=0.8", "beta2=0.95", "eps=0.01", f"clip={clip}"]
    settings += [f"weight_decay={decay}"] if name == "adamw" else []
    expected = adam(0.1, 0.8, 0.95, 0.01, decay, math.inf if clip == "null" else float(clip))
    assert close(trained(name, *(f"optimizer.{setting}" for setting in settings)), expected)


@pytest.mark.parametrize("clip", ["2.0", "null"])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_rmsprop_with_momentum_and_clipping(momentum: float, clip: str) -> None:
    settings = ["lr=0.1", "alpha=0.95", f"momentum={momentum}", "eps=0.01", f"clip={clip}"]
    expected = rmsprop(0.1, 0.95, momentum, 0.01, math.inf if clip == "null" else float(clip))
    assert close(trained("rmsprop", *(f"optimizer.{setting}" for setting in settings)), expected)


def test_a_gradient_below_the_bound_is_left_alone() -> None:
    assert trained("sgd", "optimizer.clip=5.1") == trained("sgd", "optimizer.clip=null")


def test_clipping_is_of_the_norm_over_all_parameters_together() -> None:
    settings: Any = config.compose(["optimizer=sgd", "optimizer.clip=1", "optimizer.lr=1", "optimizer.momentum=0"])
    model = nn.ParameterDict({"a": nn.Parameter(torch.zeros(1)), "b": nn.Parameter(torch.zeros(1))})
    optimizer = discovery.load("optimizers", "sgd").build(model, settings.optimizer, task=None, seed=0)
    model["a"].grad, model["b"].grad = torch.tensor([3.0]), torch.tensor([4.0])
    optimizer.step()
    assert [model["a"].item(), model["b"].item()] == pytest.approx([-0.6, -0.8], rel=1e-5)
