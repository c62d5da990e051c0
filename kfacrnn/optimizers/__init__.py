"""Optimisers: every module here that does not begin with an underscore is one and is found by its name. It defines
`Config`, a dataclass of settings with a `schedule`, and `build(model, config, task=…, seed=…)`.

An optimiser that needs curvature has `statistics_due`, `statistics_cases(cases)` and `update_statistics(forward)`; the
training loop asks for them by name and nothing else distinguishes it. One whose `quadratic_model` is not None takes
`step(forward=…)` on `quadratic_cases(cases)`; one that says `reduction_due` after a step is told the losses before and
after it, `adapt_damping(before, after)`. One that works in the background has `pause()` and `resume()`. One whose steps
are of two kinds, with and without a refresh, has `refresh_share`, how many are, and `prompt(refresh)`, for benches.
These modules import torch inside `build` only, so that a mistake in a setting is reported at once; packages of an
extra, too, and they name those in `NEEDS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from kfacrnn.tasks import Task


class Builder(Protocol):
    def __call__(self, model: nn.Module, config: Any, *, task: Task, seed: int) -> Optimizer: ...


def clip_gradients(optimizer: Optimizer, max_norm: float | None) -> Optimizer:
    """Scales the gradients down to a global norm of at most `max_norm` before every step; None: never."""
    if max_norm is not None:
        from torch.nn.utils import clip_grad_norm_

        parameters = [p for group in optimizer.param_groups for p in group["params"]]

        def clip(*_: Any) -> None:
            clip_grad_norm_(parameters, max_norm)

        optimizer.register_step_pre_hook(clip)
    return optimizer
