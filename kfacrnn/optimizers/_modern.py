"""SOAP, Shampoo and PSGD-Kron as the package pytorch_optimizer has them, and what a run needs beside that.

    of the package                                             here
    Shampoo and Kron draw from torch's generator               noise depends on the seed and the update alone
    Kron draws from NumPy's, which is in no checkpoint         drawn from torch's
    Kron's first Q is I, whatever the size of the gradients    suits the first gradient, as in the authors' newer code
    Shampoo's state is Python objects                          its `state_dict` is tensors
    the preconditioner is renewed by a count inside the step   `refresh_share`, and `prompt`, for a bench

A refresh is the costly part of a step that does not come every time: new eigenvectors, new roots, a new Q.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_optimizer
import torch
from pytorch_optimizer.optimizer.shampoo import LayerWiseGrafting
from torch.optim import Optimizer

NEVER = 2**62  # updates between refreshes
BALANCED = 0.01  # share of Kron's refreshes that also make the norms of its two factors equal


@contextmanager
def _noise(optimizer: Optimizer, seed: int) -> Iterator[torch.device]:
    """Inside, torch's generator of the parameters' device follows from seed and update; then it is as before."""
    group = optimizer.param_groups[0]
    device = group["params"][0].device
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    before = generator.get_state()
    generator.manual_seed(seed * 1_000_003 + group.get("step", 0))  # no two seeds share an update's noise
    try:
        yield device
    finally:
        generator.set_state(before)


class SOAP(pytorch_optimizer.SOAP):
    """Its first step sets up the eigenvectors and moves nothing."""

    @property
    def refresh_share(self) -> float:
        return 1 / self.param_groups[0]["precondition_frequency"]

    def prompt(self, refresh: bool) -> None:
        """Whether the next steps are to refresh."""
        for state in self.state.values():
            state["precondition_frequency"] = 1 if refresh else NEVER


class Shampoo(pytorch_optimizer.ScalableShampoo):
    """RMSProp until the first inverse roots are there, and of its length afterwards. Its mean square is not corrected
    for starting at zero: the first steps are up to 1/√(1 − β2) times the learning rate, hence a warm-up."""

    def __init__(self, parameters: Any, seed: int, refresh_every: int, **settings: Any):
        self._seed = seed
        super().__init__(
            parameters,
            preconditioning_compute_steps=refresh_every,
            start_preconditioning_step=refresh_every,
            graft_type=LayerWiseGrafting.RMSPROP,
            moving_average_for_momentum=True,
            decoupled_weight_decay=True,
            shape_interpretation=False,  # would join the dimensions of a small matrix, and then leave it alone
            **settings,
        )
        self.refresh_share = 1 / refresh_every

    def step(self, closure: Any = None) -> Any:
        with _noise(self, self._seed):
            return super().step(closure)

    def prompt(self, refresh: bool) -> None:
        """Whether the next steps are to refresh."""
        self.preconditioning_compute_steps = 1 if refresh else NEVER

    def state_dict(self) -> dict[str, Any]:
        packed = super().state_dict()
        packed["state"] = {
            key: {
                "momentum": state["momentum"],
                "graft": [state["graft"].momentum, state["graft"].statistics],
                "statistics": state["pre_conditioner"].statistics,
                "roots": state["pre_conditioner"].pre_conditioners,
            }
            for key, state in packed["state"].items()
        }
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        packed = dict(self.state)
        self.state.clear()
        gradients = {parameter: parameter.grad for parameter in packed}
        for parameter in packed:  # `init_group` makes the objects, for parameters that have a gradient
            parameter.grad = torch.zeros_like(parameter)
        for group in self.param_groups:
            self.init_group(group)
        for parameter, values in packed.items():
            parameter.grad = gradients[parameter]
            state = self.state[parameter]
            state["momentum"] = values["momentum"]
            state["graft"].momentum, state["graft"].statistics = values["graft"]
            state["pre_conditioner"].statistics = values["statistics"]
            state["pre_conditioner"].pre_conditioners = values["roots"]


def _first_scale(parameter: torch.Tensor) -> float:
    """Of Q, for which Qᵀ Q makes a gradient of size 1 of the first one. From I it takes some 50 updates to get there
    where gradients are of 1e-4, as those of a mean over many tokens may be."""
    fourth = 0.0 if parameter.grad is None else float(parameter.grad.double().pow(4).mean())
    return (fourth + 1e-36) ** (-1 / 8)


class Kron(pytorch_optimizer.Kron):
    """`refresh_every` None: the authors' schedule, of which `refresh_share` tells the first 500 updates."""

    def __init__(self, parameters: Any, seed: int, refresh_every: int | None, **settings: Any):
        self._seed = seed
        # A count of updates is compared with the inverse: half an update less, so that rounding is no matter.
        probability = None if refresh_every is None else 1 / (refresh_every - 0.5)
        groups = [{"params": [parameter]} for parameter in parameters]  # each has its own scale of the first Q
        super().__init__(groups, pre_conditioner_update_probability=probability, **settings)
        self.refresh_share = 1 / (refresh_every or 1)

    def step(self, closure: Any = None) -> Any:
        if "step" not in self.param_groups[0]:
            for group in self.param_groups:
                group["precondition_init_scale"] = _first_scale(*group["params"])
        with _noise(self, self._seed) as device:
            # NumPy's generator is asked for a number in [0, 1) and whether it is below this.
            self.balance_prob = float(torch.rand((), device=device) < BALANCED)
            return super().step(closure)

    def prompt(self, refresh: bool) -> None:
        """Whether the next steps are to refresh."""
        self.param_groups[0]["pre_conditioner_update_probability"] = float(refresh)
