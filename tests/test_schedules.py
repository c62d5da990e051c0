"""Learning-rate schedules against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from kfacrnn import config
from kfacrnn.schedules import Schedule

SETTINGS = {"kind": "constant", "warmup": 0, "rate": 1.0, "start": 0, "every": 1, "final": 0.0}


def factors(updates: int, **changes: object) -> list[float]:
    schedule = Schedule(**{**SETTINGS, **changes})  # type: ignore[arg-type]
    return [schedule.factor(update, updates) for update in range(updates + 1)]


def test_constant_is_one() -> None:
    assert factors(3) == [1, 1, 1, 1]


def test_exponential_multiplies_at_every_update() -> None:
    assert factors(3, kind="exponential", rate=0.5) == [1, 0.5, 0.25, 0.125]


def test_steps_begin_at_start_and_come_every_so_many_updates() -> None:
    assert factors(7, kind="step", rate=0.5, start=2, every=3) == [1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]


def test_a_cosine_falls_from_one_through_the_middle_to_final() -> None:
    half = 1 / math.sqrt(2)
    expected = [1, (1 + half) / 2, 0.5, (1 - half) / 2, 0]
    assert factors(4, kind="cosine") == pytest.approx(expected, abs=1e-15)
    assert factors(4, kind="cosine", final=0.2) == pytest.approx([0.2 + 0.8 * value for value in expected], abs=1e-15)


def test_a_cosine_stays_at_final_beyond_the_budget() -> None:
    assert Schedule(**{**SETTINGS, "kind": "cosine", "final": 0.25}).factor(99, 10) == 0.25  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["constant", "exponential"])
def test_a_warm_up_rises_in_equal_steps_to_the_schedule(kind: str) -> None:
    warm = factors(5, kind=kind, rate=0.5, warmup=4)
    plain = factors(5, kind=kind, rate=0.5)
    assert [w / p for w, p in zip(warm, plain, strict=True)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_the_step_schedule_is_that_of_zaremba_et_al() -> None:
    """Their code, medium model: rate 1 for six epochs, then divided by 1.2 before each: lr / 1.2^max(epoch - 6, 0)
    with epochs counted from 1; an epoch is ⌊929,589 / 200 / 35⌋ = 132 updates at the batch size used here."""
    schedule = config.compose(["optimizer/schedule=step"]).optimizer.schedule
    for epoch in range(1, 40):
        expected = 1.2 ** -max(epoch - 6, 0)
        first, last = 132 * (epoch - 1), 132 * epoch - 1
        assert schedule.factor(first, 10**6) == pytest.approx(expected, rel=1e-12)
        assert schedule.factor(last, 10**6) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["constant", "exponential", "step", "cosine"])
def test_each_kind_has_a_file_of_its_name(kind: str) -> None:
    assert config.compose([f"optimizer/schedule={kind}"]).optimizer.schedule.kind == kind
