"""What makes two runs the same."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import pytest

from kfacrnn.run import NUMERICS_VERSION, Budget, Data, Run, Tracker


@dataclass
class Small:
    name: str
    size: int
    rate: float


def handmade(**changes: Any) -> Run:
    """A run that no YAML file has a say in."""
    values: dict[str, Any] = {
        "seed": 3,
        "precision": "fp32",
        "threads": 2,
        "device": "cpu",
        "results": "results",
        "budget": Budget("short", 10, 2, 5, 5),
        "tracker": Tracker("none", "offline", "kfacrnn", None, None, []),
        "data": Data(None, "files"),
        "optimizer": Small("sgd", 1, 0.1),
        "task": Small("copy", 2, 1.0),
    }
    return Run(**{**values, **changes})


SCIENCE: list[dict[str, Any]] = [
    {"seed": 4},
    {"precision": "bf16"},
    {"threads": 1},
    {"budget": Budget("short", 11, 2, 5, 5)},
    {"budget": Budget("long", 10, 2, 5, 5)},
    {"optimizer": Small("sgd", 1, 0.10000000000000002)},
    {"optimizer": Small("adam", 1, 0.1)},
    {"task": Small("copy", 3, 1.0)},
]
CIRCUMSTANCES: list[dict[str, Any]] = [
    {"device": "cuda"},
    {"results": "/elsewhere"},
    {"data": Data("/corpora", "torchtext")},
    {"tracker": Tracker("wandb", "online", "other", "me", "all", ["a"])},
]


@pytest.mark.parametrize("change", SCIENCE, ids=str)
def test_what_decides_the_curve_changes_the_identity(change: dict[str, Any]) -> None:
    assert handmade(**change).run_id != handmade().run_id


@pytest.mark.parametrize("change", CIRCUMSTANCES, ids=str)
def test_paths_devices_and_trackers_do_not_change_the_identity(change: dict[str, Any]) -> None:
    assert handmade(**change).run_id == handmade().run_id


def test_a_raised_numerics_version_changes_every_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    before = handmade().run_id
    monkeypatch.setattr("kfacrnn.run.NUMERICS_VERSION", NUMERICS_VERSION + 1)
    assert handmade().run_id != before


def test_an_optimizer_may_have_a_numerics_version_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    identities = {handmade().run_id}
    for version in (1, 2):
        monkeypatch.setattr(Small, "numerics_version", version, raising=False)
        identities.add(handmade().run_id)
    assert len(identities) == 3


def test_the_identity_is_a_hash_of_sorted_json_so_that_stores_of_today_are_found_tomorrow() -> None:
    """Written out once more: a change of the recipe, however well meant, would orphan every finished run."""
    science = {
        "budget": {"name": "short", "updates": 10, "log_every": 2, "eval_every": 5, "checkpoint_every": 5},
        "numerics_version": NUMERICS_VERSION,
        "optimizer": {"name": "sgd", "size": 1, "rate": 0.1},
        "precision": "fp32",
        "seed": 3,
        "task": {"name": "copy", "size": 2, "rate": 1.0},
        "threads": 2,
    }
    text = json.dumps(science, sort_keys=True)
    assert handmade().run_id == hashlib.sha256(text.encode()).hexdigest()[:12]
    assert handmade(seed=3).run_id == handmade(seed=3).run_id
