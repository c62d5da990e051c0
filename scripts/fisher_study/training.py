"""The first updates of K-FAC on repeated copy with every approximation at equal settings.

The stored runs differ in more than the approximation: indep and options 1 and 2 have settings of their own. Here all
have the one kind or the other, as they were when this study was made (those shipped now have more momentum and fewer
statistics), on the DNC and the batches of the task as it stands.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from kfacrnn import KFAC
from kfacrnn.tasks import repeat_copy

APPROXIMATIONS = ("indep", "option1", "option2")
SETTINGS = {
    "of options 1 and 2": {"lr": 0.04, "kl_clip": 0.05, "damping": 1e-5, "rate": 0.9975},
    "of indep": {"lr": 0.06, "kl_clip": 0.1, "damping": 3e-5, "rate": 0.995},
}
COMMON = {
    "momentum": 0.0,
    "statistics_every": 2,
    "statistics_fraction": 1.0,
    "statistics_decay": 0.95,
    "early_interval": 0.25,
}
UPDATES = (50, 100)
FIRST_SEED = 201
TASK = Path(__file__).parents[2] / "configs" / "task" / "repeat_copy.yaml"


def train(approximation: str, settings: dict[str, float], seed: int) -> Iterator[tuple[int, float]]:
    """Update → nats per sequence on held-out sequences."""
    task = repeat_copy.RepeatCopy(repeat_copy.Config(**yaml.safe_load(TASK.read_text())), seed, torch.device("cpu"))
    torch.manual_seed(seed)
    model, rest = task.build_model(), dict(settings)
    rate = rest.pop("rate")
    optimizer = KFAC(model, approximation, loss_scale=task.loss_scale, refresh_every=6, seed=seed, **COMMON, **rest)
    for update in range(1, max(UPDATES) + 1):
        batch = task.next_batch()
        if optimizer.statistics_due:
            cases = optimizer.statistics_cases(batch.cases)
            optimizer.update_statistics(lambda batch=batch, cases=cases: task.predict(model, batch, cases))
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= rate
        if update in UPDATES:
            yield update, task.evaluate(model, "valid")


def compare(seeds: int) -> list[dict[str, Any]]:
    """A row for every setting, approximation, seed and update."""
    return [
        {"settings": name, "approximation": approximation, "seed": seed, "update": update, "nats": nats}
        for name, settings in SETTINGS.items()
        for approximation in APPROXIMATIONS
        for seed in range(FIRST_SEED, FIRST_SEED + seeds)
        for update, nats in train(approximation, settings, seed)
    ]
