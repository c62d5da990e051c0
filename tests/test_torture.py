"""`make torture` in a short form, with seeds: a few trials of every kind of fault, none of them lost."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.torture import disk, fuzz, kills, load, numbers
from tests.torture.tally import Tally, record, table

SHORT = [
    (disk.of_the_disk, 8),
    (disk.of_files, 8),
    (numbers.of_poison, 2),
    (numbers.of_explosions, 3),
    (fuzz.of_command_lines, 10),
    (fuzz.of_experiments, 6),
    (fuzz.of_checkpoints, 6),
    (load.of_many_runs, 10),
    (load.of_many_rows, 2_000),
    (load.of_a_long_run, 40),
]
SLOW = [(kills.of_runs, 5), (kills.of_sweeps, 3), (kills.of_figures, 2), (kills.of_uploads, 2)]
SLOW += [(disk.of_results, 3), (fuzz.of_offline_files, 3), (load.of_concurrent_sweeps, 1)]


def survives(fault: Callable[..., Any], times: int, place: Path) -> None:
    found = fault(place, random.Random(7), times)
    for tally in [found] if isinstance(found, Tally) else found:
        assert tally.lost == [], str(tally)
        assert tally.tried == tally.survived > 0


@pytest.mark.parametrize(("fault", "times"), SHORT, ids=lambda value: getattr(value, "__name__", None))
def test_nothing_is_lost(fault: Callable[..., Any], times: int, tmp_path: Path) -> None:
    survives(fault, times, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("fault", "times"), SLOW, ids=lambda value: getattr(value, "__name__", None))
def test_nothing_is_lost_when_processes_are_killed_or_many(
    fault: Callable[..., Any], times: int, tmp_path: Path
) -> None:
    survives(fault, times, tmp_path)


def test_a_trial_that_raises_is_counted_as_lost_and_the_table_adds_up_what_was_counted(tmp_path: Path) -> None:
    path = tmp_path / "torture.csv"
    for broken in (False, True):
        tally = Tally("a fault", note=f"broken {broken}")
        with tally.trial("one", times=3):
            if broken:
                raise ValueError("a reason")
        with tally.trial(lambda: "two"):
            pass
        record(tally, path, seed=1)
    assert tally.lost == ["one: ValueError: a reason"]
    rows = list(csv.DictReader(path.open()))
    assert [(row["tried"], row["survived"], row["lost"]) for row in rows] == [("4", "4", "0"), ("4", "1", "3")]
    assert table(path).splitlines()[2:] == ["| a fault | 8 | 5 | 3 | broken True |"]
