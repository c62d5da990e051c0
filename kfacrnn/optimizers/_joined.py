"""Several optimisers, each with parameters of its own, as one."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer


class Joined(Optimizer):
    """Takes a step of every part. Their groups and their state are its own, so that it is scheduled, saved and loaded
    like any other; groups cannot be added later."""

    def __init__(self, *parts: Optimizer):
        self._parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self._parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self._parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()
