"""Conditions on a configuration, one way of writing after another."""

from __future__ import annotations

import pytest

from kfacrnn.errors import UserError
from kfacrnn.where import Condition, text_of

RUN = {"optimizer.name": "kfac_option1", "optimizer.lr": 0.01, "optimizer.momentum": 0.9, "seed": 12, "task.clip": None}


def holds(text: str) -> bool:
    condition = Condition.parse(text)
    return condition.holds(RUN, condition.keys(RUN))


@pytest.mark.parametrize(
    "text",
    [
        "optimizer.name=kfac_option1",
        "optimizer.name=kfac_*",
        "optimizer.name=adam,kfac_option?",
        "optimizer.lr=0.01",
        "optimizer.lr=1e-2",
        "optimizer.lr=1e-3..0.1",
        "optimizer.lr=0.01..",
        "optimizer.lr=..0.01",
        "optimizer.*=0.9",
        "seed=1,12",
        "seed!=1",
        "task.clip=null",
    ],
)
def test_a_condition_that_is_met(text: str) -> None:
    assert holds(text)


@pytest.mark.parametrize(
    "text",
    ["optimizer.name=kfac", "optimizer.lr=0.02..", "optimizer.name=1..2", "seed=1", "seed!=12", "optimizer.*=0.5"],
)
def test_a_condition_that_is_not_met(text: str) -> None:
    assert not holds(text)


def test_a_key_that_no_run_has_is_an_error_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"lr=1: no such key of a configuration: 'lr'; did you mean 'optimizer\.lr'"):
        holds("lr=1")
    with pytest.raises(UserError, match=r"did you mean 'optimizer\.momentum'"):
        holds("optimizer.momentun=1")
    with pytest.raises(UserError, match="must be KEY=PATTERN"):
        Condition.parse("optimizer.lr")


def test_values_read_the_same_whatever_a_source_made_of_them() -> None:
    assert [text_of(value) for value in (1.0, 1, True, None, 0.1 + 0.2, [1.0, "a"])] == [
        *("1", "1", "true", "null", "0.3", "[1,a]")
    ]
