"""The time ledger, against a clock that the test winds by hand."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace

import pytest

from kfacrnn import clock
from kfacrnn.clock import ACCOUNTS, Ledger


class Hands:
    """A wall clock and a processor clock that run half as fast."""

    def __init__(self) -> None:
        self.now = 100.0

    def spend(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    hands = Hands()
    time = SimpleNamespace(perf_counter=lambda: hands.now, process_time=lambda: hands.now / 2)
    monkeypatch.setattr(clock, "time", time)
    return hands


def test_every_second_is_booked_once_also_in_nested_accounts(hands: Hands) -> None:
    ledger = Ledger()
    hands.spend(1)  # setup
    with ledger("train"):
        hands.spend(2)
    hands.spend(4)  # setup again
    with ledger("log"):
        hands.spend(8)
        with ledger("eval"):
            hands.spend(16)
        hands.spend(32)
    assert ledger.wall == {"train": 2, "eval": 16, "log": 40, "checkpoint": 0, "setup": 5}
    assert ledger.cpu == {account: seconds / 2 for account, seconds in ledger.wall.items()}
    hands.spend(64)
    assert ledger.total == 127  # what runs right now included


def test_an_exception_ends_an_account(hands: Hands) -> None:
    ledger = Ledger()
    with suppress(ZeroDivisionError), ledger("train"):
        hands.spend(1)
        raise ZeroDivisionError
    hands.spend(2)
    assert (ledger.total, ledger.wall["train"], ledger.wall["setup"]) == (3, 1, 2)


def test_a_later_session_adds_to_the_seconds_of_the_earlier(hands: Hands) -> None:
    first = Ledger()
    with first("train"):
        hands.spend(3)
    state = first.state_dict()
    hands.spend(1000)  # the process is gone
    second = Ledger()
    hands.spend(1)
    second.load_state_dict(state)
    with second("train"):
        hands.spend(4)
    assert (second.wall["train"], second.cpu["train"], second.total) == (7, 3.5, 8)
    assert set(second.state_dict()["wall"]) == set(ACCOUNTS)


def test_the_device_is_awaited_where_an_account_begins_and_where_it_ends(hands: Hands) -> None:
    ledger = Ledger(synchronise=lambda: hands.spend(5))  # queued work that the host has to wait for
    with ledger("train"):
        hands.spend(1)
    assert ledger.wall["train"] == 6  # its own queue, and not what was queued before
    assert ledger.wall["setup"] == 5
