"""Choosing damping, and what `optimizer.stats()` says about it.

Damping λ is added to the curvature, in two factored parts (Martens & Grosse 2015, section 6.3), before it is inverted.
Small, and the optimiser believes directions in which the model has hardly been seen to curve: large steps there, until
it leaves the region where the curvature holds. Large, and every direction is treated alike: gradient descent.

    python docs/gallery/damping.py [PICTURE]

How to choose: train for a hundred updates or two with λ a factor of ten apart, and then in factors of three around the
best. Do it at the batch size you will train with: less noise in the factors stands less damping. Beside it, `kl_clip`
bounds the size of a step, whatever λ; where most steps are "at the bound", it and not `lr` decides their length.
"""

import sys

import torch
from own_lstm import bits, draw, fresh_model, train_kfac
from torch import nn
from torch.nn.functional import cross_entropy

from kfacrnn import KFAC
from kfacrnn.kfac import LevenbergMarquardt

DAMPINGS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


class Watch:
    """What happened in a training run."""

    def __init__(self) -> None:
        self.steps, self.at_the_bound, self.condition, self.psi = 0, 0, 0.0, 0.0

    def __call__(self, optimizer: KFAC, *_: object) -> None:
        stats, lr = optimizer.stats(), optimizer.param_groups[0]["lr"]
        self.steps += 1
        self.at_the_bound += stats["step_size"] < 0.99 * lr
        self.condition = max(self.condition, stats["condition_A"] * stats["condition_G"])
        self.psi = max(self.psi, stats["psi_max"])


def adapt(optimizer: KFAC, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, loss: torch.Tensor) -> None:
    """Levenberg–Marquardt: every few updates λ falls if the loss fell as the quadratic model predicted, else it rises.
    It costs a forward pass each time."""
    if optimizer.reduction_due:
        with torch.no_grad():
            after = cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.adapt_damping(loss.item(), after)


def main() -> None:
    print("damping   bits   steps at the bound   worst condition   largest ψ̂")
    curves = {}
    for damping in DAMPINGS:
        watch = Watch()
        losses, _ = train_kfac(fresh_model(), "option1", watch, damping=damping)
        curves[f"damping {damping:g}"] = losses
        share = f"{100 * watch.at_the_bound / watch.steps:.0f} %"
        print(f"{damping:7g}  {bits(losses):5.2f}  {share:>19}  {watch.condition:16.1e}  {watch.psi:11.2f}")

    losses, optimizer = train_kfac(
        fresh_model(), "option1", adapt, damping=1e-2, adaptive_damping=LevenbergMarquardt(every=5)
    )
    curves["adaptive damping, from 0.01"] = losses
    print(f"adaptive: {bits(losses):.2f} bits, damping 0.01 → {optimizer.damping:.2g}")
    if len(sys.argv) > 1:
        draw(curves, sys.argv[1])


if __name__ == "__main__":
    main()
