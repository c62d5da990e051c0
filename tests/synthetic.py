"""Finished runs without training: what `kfacrnn.train` leaves in a result store, with numbers of a test's choosing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from kfacrnn.files import write_json
from kfacrnn.plan import PlannedRun

TINY = [
    *("task=repeat_copy", "task.hidden=4", "task.slots=2", "task.word_size=2", "task.read_heads=1", "task.bits=2"),
    *("task.batch_size=2", "task.eval_sequences=2", "task.sequences=1", "task.min_length=1", "task.max_length=1"),
    *("task.min_repeats=1", "task.max_repeats=1", "threads=1", "budget.updates=4", "budget.log_every=1"),
    *("budget.eval_every=0", "budget.checkpoint_every=2"),
]
"""Overrides for runs of a moment: chance level is 2 ln 2 nats per sequence."""

FIGURE = "{title: Tiny, y: {metric: train/metric, label: loss, scale: linear}}"


def write_experiment(path: Path, methods: str, *, seeds: str = "[1]", common: Sequence[str] = (), **more: str) -> str:
    """An experiment of tiny runs at `path`; every value is YAML in one line."""
    described = {"description": path.stem, "common": f"[{', '.join([*TINY, *common])}]", "seeds": seeds}
    described |= {"methods": methods, "figure": FIGURE} | more
    path.write_text("\n".join(f"{key}: {value}" for key, value in described.items()) + "\n")
    return str(path)


def store(
    planned: PlannedRun,
    nats: Sequence[float],
    *,
    every: int = 1,
    seconds: Sequence[float] | None = None,
    state: str = "done",
    jobs: int = 1,
    cpu: str = "Abacus 1",
    task: dict[str, Any] | None = None,
    metric: Sequence[float] | None = None,
) -> None:
    """Puts a run into its folder: the first of `nats` for its first `every` updates, and so on. If it is done, it keeps
    the last of them to the end of its budget."""
    folder = planned.folder
    folder.path.mkdir(parents=True)
    (folder.path / "config.yaml").write_text(OmegaConf.to_yaml(dataclasses.asdict(planned.run)))
    session = {
        "commit": "c0ffee",
        "dirty": False,
        "hardware": {"cpu": cpu, "cores": 2},
        "jobs": jobs,
        "others_cores": 0.0,
    }
    task = task or {"unit": "sequence", "metric": "nats per sequence", "chance": 1.386}
    write_json(folder.path / "meta.json", {"run_id": folder.run_id, "task": task, "sessions": [session]})
    budget, end = planned.run.budget, len(nats) * every
    assert end <= budget.updates
    end = budget.updates if state == "done" else end
    for update in (update for update in budget.log_points if update <= end and nats):
        index = min((update - 1) // every, len(nats) - 1)
        second = seconds[index] if seconds else float(update)
        shown = metric[index] if metric else nats[index]
        row = {"time_train_s": second, "time_wall_s": 2 * second, "train/nats": nats[index], "train/metric": shown}
        folder.metrics.append({"update": update, "memory_mb": 1, **row})
    folder.set_status(state, update=end, updates=budget.updates)
