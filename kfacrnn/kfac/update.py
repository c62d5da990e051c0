"""An update, from the blocks to the parameters: Δ = N·F⁻¹∇h, then v ← μv − ηΔ and θ ← θ + v, and what M(v) promises.

Which η and μ it is to be, `kfacrnn.kfac.step_size` or `kfacrnn.kfac.quadratic` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfacrnn.kfac.estimator import Estimator
from kfacrnn.kfac.processes import Alone

Directions = dict[Tensor, Tensor]  # Δ by parameter
State = MutableMapping[Tensor, dict[str, Any]]  # an optimiser's


def preconditioned(estimator: Estimator, processes: Alone, loss_scale: float) -> tuple[Directions, float]:
    """Δ for every parameter that has a gradient, and ΔᵀF̂Δ = Δᵀ∇h in one transfer from the device. Raises ValueError
    where a block has only some of its gradients: it moves as one."""
    directions: Directions = {}
    products = []
    blocks = [block for block in estimator.moving.values() if block.has_gradients()]
    found = processes.directions(blocks, loss_scale)
    for block, (block_directions, product) in zip(blocks, found, strict=True):
        for parameter, direction in zip(block.parameters, block_directions, strict=True):
            if direction.shape == parameter.shape:
                directions[parameter] = direction
            else:  # other maps hold the other rows
                directions.setdefault(parameter, torch.zeros_like(parameter))[block.map.rows] = direction
        products.append(product)
    for parameter in estimator.uncovered.values():
        if parameter.grad is not None:
            directions[parameter] = parameter.grad
            products.append(parameter.grad.square().sum())
    return directions, processes.mean(torch.stack(products).sum()).item() if products else 0.0


class Step(NamedTuple):
    """That of those parameters of one group, at least one, that have a direction."""

    parameters: list[Tensor]
    eta: float
    mu: float
    weight_decay: float


class Taken(NamedTuple):
    """What became of an update; nothing, if it was skipped."""

    curvature: float = 0.0  # ΔᵀF̂Δ
    eta: float = 0.0
    mu: float = 0.0
    predicted_kl: float = 0.0  # nats per unit of h
    predicted_change: float = 0.0  # M(v), where somebody wants to know


def steps(
    groups: Iterable[Mapping[str, Any]],
    directions: Directions,
    choose: Callable[[Mapping[str, Any]], tuple[float, float]],
) -> list[Step]:
    """One for every group that has any to take; `choose(group)` says η and μ."""
    moving = [(group, [p for p in group["params"] if p in directions]) for group in groups]
    return [Step(parameters, *choose(group), group["weight_decay"]) for group, parameters in moving if parameters]


def move(steps: Sequence[Step], directions: Directions, state: State) -> tuple[float, float]:
    """v ← μv − ηΔ,  θ ← (1 − ηw)θ + v. Returns the η and the μ that are furthest from 0."""
    for parameters, eta, mu, weight_decay in steps:
        velocities = running("velocity", parameters, state)
        torch._foreach_mul_(velocities, mu)
        torch._foreach_add_(velocities, [directions[p] for p in parameters], alpha=-eta)
        if weight_decay:
            decay = max(eta, 0.0) * weight_decay  # a quadratic model may go backwards, but no weight should grow
            torch._foreach_mul_(parameters, 1 - decay)
        torch._foreach_add_(parameters, velocities)
    return max([0.0, *(step.eta for step in steps)], key=abs), max([0.0, *(step.mu for step in steps)], key=abs)


def predicted_change(steps: Iterable[Step], state: State) -> float:
    """M(v) = ∇hᵀv + ½ vᵀF̂v, of the steps that `move` has just made. As F̂Δ = ∇h, the response F̂v is the same running
    sum as v, of gradients instead of directions, as far as F̂ changes little over the memory of the momentum."""
    total = 0.0
    for parameters, eta, mu, _ in steps:
        changes = []
        sums = running("velocity", parameters, state), running("response", parameters, state)
        for gradient, velocity, response in zip(gradients(parameters), *sums, strict=True):
            response.mul_(mu).add_(gradient, alpha=-eta)
            changes.append((velocity * (gradient + response / 2)).sum())
        total += torch.stack(changes).sum().item()
    return total


def gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """∇h; zero where there is none."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def running(name: str, parameters: Iterable[Tensor], state: State) -> list[Tensor]:
    """A sum over the updates for each of the parameters, 0 before the first."""
    sums = []
    for parameter in parameters:
        if name not in state[parameter]:
            state[parameter][name] = torch.zeros_like(parameter)
        sums.append(state[parameter][name])
    return sums
