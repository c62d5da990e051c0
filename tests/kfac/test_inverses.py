"""When inverses are made and when they come into use: blocks that only note which update they were inverted at."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
import torch

from kfacrnn.kfac.inverses import Inverses
from kfacrnn.kfac.maths import DecompositionError


class Block:
    """Its inverse is `[version of its averages, damping]`."""

    def __init__(self):
        self.version, self.inverse, self.error = 0, None, None
        self.may_finish = threading.Event()
        self.may_finish.set()
        self.started = threading.Event()

    def inversion(self, damping):
        version, error = self.version, self.error

        def work():
            self.started.set()
            assert self.may_finish.wait(10)
            if error is not None:
                raise error
            return [torch.tensor([version, damping])]

        return work

    def restored(self, inverse):
        return inverse

    @property
    def made_from(self):
        return int(self.inverse[0][0])


def run(inverses, block, updates, statistics_every=1):
    """The version in use at every step; the averages change before every step."""
    in_use = []
    for update in updates:
        block.version = update
        inverses.advance(update, update - update % statistics_every, damping=0.5)
        in_use.append(block.made_from)
    return in_use


@pytest.mark.parametrize(
    ("early_interval", "made_from"),
    [
        (0.25, [*range(9), 10, 12, 15, 16, 20, 24, 30, 32, 40, 48, 56]),
        (0.0625, [*range(33), *range(34, 48, 2), *range(48, 56, 3), 56, 59]),
        (1.0, [*range(3), 4, 8, 16, 24, 32, 40, 48, 56]),
    ],
)
def test_refreshes_are_dense_at_the_start_and_then_every_r_updates(early_interval, made_from):
    block = Block()
    inverses = Inverses({"a": block}, every=8, delay=0, early_interval=early_interval)
    assert sorted(set(run(inverses, block, range(60)))) == made_from


def test_a_refresh_waits_for_statistics_that_are_new():
    block = Block()
    in_use = run(Inverses({"a": block}, every=3, delay=0), block, range(12), statistics_every=5)
    assert in_use == [*[0] * 5, *[5] * 5, 10, 10]


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_in_the_background_an_inverse_comes_into_use_exactly_d_updates_later(delay):
    block = Block()
    in_use = run(Inverses({"a": block}, every=4, delay=delay, early_interval=0.25), block, range(30))
    assert in_use[0] == 0  # the first has nothing to be stale against
    starts = {made: in_use.index(made) for made in sorted(set(in_use))[1:]}
    assert all(first == made + delay for made, first in starts.items())
    assert list(starts)[-3:] == [list(starts)[-1] - 8, list(starts)[-1] - 4, list(starts)[-1]]


def test_a_slow_thread_is_waited_for_and_a_fast_one_is_not_used_early():
    block = Block()
    inverses = Inverses({"a": block}, every=4, delay=2)
    run(inverses, block, [0])
    block.may_finish.clear()
    assert run(inverses, block, [1, 2]) == [0, 0]
    threading.Timer(0.1, block.may_finish.set).start()
    assert run(inverses, block, [3]) == [1]


def test_an_inverse_is_that_of_the_averages_and_damping_when_it_was_begun():
    block = Block()
    inverses = Inverses({"a": block}, every=1, delay=0)
    inverses.advance(0, 0, damping=0.25)
    assert block.inverse[0].tolist() == [0, 0.25]


def test_paused_work_stops_at_the_next_block_until_it_is_resumed():
    first, second = Block(), Block()
    inverses = Inverses({"a": first, "b": second}, every=4, delay=3)
    inverses.advance(0, 0, 0.5)
    for block in (first, second):
        block.version = 1
        block.started.clear()
    first.may_finish.clear()
    inverses.advance(1, 1, 0.5)
    assert first.started.wait(10)
    inverses.pause()
    first.may_finish.set()
    assert not second.started.wait(0.2)
    inverses.resume()
    assert second.started.wait(10)

    inverses.advance(4, 4, 0.5)
    assert (first.made_from, second.made_from) == (1, 1)


@pytest.mark.timeout(20)
def test_work_that_is_due_is_finished_even_if_paused():
    block = Block()
    inverses = Inverses({"a": block}, every=2, delay=1)
    inverses.advance(0, 0, 0.5)
    inverses.pause()
    assert run(inverses, block, [1, 2]) == [0, 1]


@pytest.mark.timeout(20)
def test_what_is_not_done_in_the_background_is_not_paused():
    block = Block()
    inverses = Inverses({"a": block}, every=1, delay=0)
    inverses.pause()
    assert run(inverses, block, [0, 1]) == [0, 1]


@pytest.mark.timeout(20)
def test_a_state_has_what_is_pending_and_leaves_the_pause():
    block = Block()
    inverses = Inverses({"a": block}, every=2, delay=1)
    inverses.advance(0, 0, 0.5)
    inverses.pause()
    inverses.advance(1, 1, 0.5)
    assert inverses.state_dict()["pending"] is not None
    block.started.clear()
    inverses.advance(2, 2, 0.5)
    assert not block.started.wait(0.2)
    inverses.resume()
    assert block.started.wait(10)


def test_a_failed_decomposition_keeps_the_last_good_inverse_and_is_counted():
    good, bad = Block(), Block()
    inverses = Inverses({"good": good, "bad": bad}, every=1, delay=0)
    inverses.advance(0, 0, 0.5)
    good.version = bad.version = 1
    bad.error = DecompositionError("no")
    inverses.advance(1, 1, 0.5)
    assert (good.made_from, bad.made_from, inverses.failures) == (1, 0, 1)
    bad.error, bad.version = None, 2
    inverses.advance(2, 2, 0.5)
    assert (bad.made_from, inverses.failures) == (2, 1)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.timeout(20)
def test_with_several_threads_blocks_are_inverted_side_by_side_each_on_its_own(two_threads):
    first, second = Block(), Block()
    threads_seen = []

    def waits_for(block, other):
        def inversion(damping):
            work = Block.inversion(block, damping)

            def together():
                block.started.set()
                assert other.started.wait(10)  # never, if one came after the other
                threads_seen.append(torch.get_num_threads())
                return work()

            return together

        return inversion

    first.inversion, second.inversion = waits_for(first, second), waits_for(second, first)
    Inverses({"a": first, "b": second}, every=1, delay=0).advance(0, 0, 0.5)
    assert (first.made_from, second.made_from) == (0, 0)
    assert threads_seen == [1, 1]
    assert torch.get_num_threads() == 2


def test_side_by_side_a_failure_is_that_of_its_block(two_threads):
    good, bad = Block(), Block()
    bad.error = DecompositionError("A0 is not finite")
    with pytest.raises(DecompositionError, match=r"^bad: A0 is not finite"):
        Inverses({"good": good, "bad": bad}, every=1, delay=0).advance(0, 0, 0.5)
    assert torch.get_num_threads() == 2


def test_the_first_failure_has_nothing_to_fall_back_on_and_names_the_block():
    block = Block()
    block.error = DecompositionError("A0 is not finite")
    inverses = Inverses({"encoder.l0": block}, every=5, delay=2)
    with pytest.raises(DecompositionError, match=r"encoder\.l0: A0 is not finite"):
        inverses.advance(0, 0, 0.5)
    block.error = None
    inverses.advance(1, 0, 0.5)  # tries again at once
    assert block.made_from == 0


def test_an_unexpected_error_in_the_background_surfaces_when_its_result_is_due():
    block = Block()
    inverses = Inverses({"a": block}, every=2, delay=1)
    inverses.advance(0, 0, 0.5)
    block.error = MemoryError("out of memory")
    inverses.advance(1, 1, 0.5)
    with pytest.raises(MemoryError, match="out of memory"):
        inverses.advance(2, 2, 0.5)


def test_a_state_includes_work_that_is_under_way_even_if_paused():
    block, other = Block(), Block()
    inverses = Inverses({"a": block}, every=4, delay=3)
    run(inverses, block, [0])
    block.may_finish.clear()
    run(inverses, block, [1])
    inverses.pause()
    block.may_finish.set()
    state = inverses.state_dict()
    resumed = Inverses({"a": other}, every=4, delay=3)
    resumed.load_state_dict(state)
    other.inverse = block.inverse
    assert run(resumed, other, range(2, 12)) == run(inverses, block, range(2, 12))
    assert other.made_from > 0


def test_a_state_before_the_first_refresh_is_a_state():
    block = Block()
    resumed = Inverses({"a": block}, every=4, delay=3)
    resumed.load_state_dict(Inverses({"a": Block()}, every=4, delay=3).state_dict())
    assert run(resumed, block, [0]) == [0]


PAUSED_AT_EXIT = """
import threading
from kfacrnn.kfac.inverses import Inverses
class Block:
    inverse = None
    def inversion(self, damping):
        return lambda: []
inverses = Inverses({"a": Block()}, every=4, delay=3)
inverses.advance(0, 0, 0.5)
inverses.pause()
inverses.advance(1, 1, 0.5)
"""


def test_a_program_may_end_while_background_work_is_paused():
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", PAUSED_AT_EXIT], check=True, timeout=60)
    assert time.monotonic() - start < 60
