"""Points of grids, crosses and random searches, and what is tried next to a winner, against lists written by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from kfacrnn import search
from kfacrnn.errors import UserError

LR, MOMENTUM = "optimizer.lr", "optimizer.momentum"


def extended(grid: dict[str, list[Any]], winner: dict[str, Any], count: int = 9) -> list[dict[str, Any]]:
    """What differs from the winner in the candidates, most wanted first, when every point of the grid was tried."""
    found = itertools.islice(search.candidates(grid, search.points(grid), winner), count)
    return [{key: value for key, value in choice.items() if value != winner[key]} for choice in found]


def test_a_cross_is_its_centre_and_then_one_setting_changed_at_a_time() -> None:
    assert search.cross({"a": [1, 2, 3], "b": [10, 20, 30]}) == [
        {"a": 2, "b": 20},
        {"a": 1, "b": 20},
        {"a": 3, "b": 20},
        {"a": 2, "b": 10},
        {"a": 2, "b": 30},
    ]


@pytest.mark.parametrize(
    ("values", "winner", "tried_next"),
    [
        ([0.1, 0.3, 1.0, 3.0, 10.0], 10.0, [33.3, 5.48]),  # 10·(10/3), √(3·10)
        ([0.1, 0.3, 1.0, 3.0, 10.0], 0.1, [0.0333, 0.173]),
        ([0.1, 0.3, 1.0, 3.0, 10.0], 1.0, [1.73, 0.548]),
        ([10.0, 1.0, 0.1], 10.0, [100.0, 3.16]),  # in whatever order they are written
        ([1, 10], 10, [100, 3.16]),  # a whole number where it is one
        ([0.9, 0.99], 0.99, [0.999, 0.9684]),  # by the distance from 1: 0.01·(0.01/0.1), √(0.1·0.01) = 0.0316
        ([1.0, 2.0, 3.0], 3.0, []),  # not logarithmic
        ([0.0, 0.5], 0.5, [0.75, 0.293]),  # 1 and 1/2 from 1: 0.5·(0.5/1), √(1·0.5) = 0.707
        ([0.0, 0.9], 0.0, [0.684]),  # nothing beyond 0
        ([0.5, 0.9], 0.5, [0.0, 0.776]),
        ([0.0, 0.1], 0.1, []),
        (["constant", "cosine"], "cosine", []),
        ([None, 5.0], 5.0, []),
        ([[1, 2], [3, 4]], [3, 4], []),
        ([False, True], True, []),
        ([0.3], 0.3, []),
    ],
)
def test_next_to_a_winner_come_the_value_outward_and_the_geometric_means(
    values: list[Any], winner: Any, tried_next: list[float]
) -> None:
    found = [choice[LR] for choice in extended({LR: values}, {LR: winner})]
    assert found == tried_next
    assert [type(value) for value in found] == [type(value) for value in tried_next]


def test_in_a_corner_every_axis_is_extended_before_anything_is_refined() -> None:
    grid = {LR: [0.1, 1.0, 10.0], MOMENTUM: [0.8, 0.9]}
    assert extended(grid, {LR: 0.1, MOMENTUM: 0.9}, 2) == [{LR: 0.01}, {MOMENTUM: 0.95}]


def test_an_axis_that_has_been_extended_waits_for_the_others() -> None:
    grid = {LR: [0.1, 1.0], "optimizer.clip": [1.0, 10.0]}
    winner = {LR: 0.01, "optimizer.clip": 10.0}
    first, second = itertools.islice(search.candidates(grid, [*search.points(grid), winner], winner), 2)
    assert first == {LR: 0.01, "optimizer.clip": 100.0}
    assert second == {LR: 0.001, "optimizer.clip": 10.0}


def test_a_winner_is_on_an_edge_of_what_was_tried_beyond_the_grid_too() -> None:
    grid = {LR: [0.1, 1.0], "optimizer.schedule.kind": ["constant", "cosine"]}
    tried, winner = search.points(grid), {LR: 1.0, "optimizer.schedule.kind": "cosine"}
    assert search.edges(grid, tried, winner) == [LR]
    assert search.edges(grid, [*tried, {**winner, LR: 10.0}], winner) == []


def test_zero_is_no_edge() -> None:
    grid = {MOMENTUM: [0.0, 0.9]}
    assert search.edges(grid, search.points(grid), {MOMENTUM: 0.0}) == []
    assert search.edges(grid, search.points(grid), {MOMENTUM: 0.9}) == [MOMENTUM]


def test_points_are_drawn_within_their_ranges_and_can_be_read() -> None:
    space = {LR: {"log_uniform": [0.001, 10]}, MOMENTUM: {"choice": [0, 0.9]}, "x": {"uniform": [2, 4]}}
    drawn = search.draw(space, 400, seed=3)
    rates = [math.log10(choice[LR]) for choice in drawn]
    assert all(-3 <= rate <= 1 for rate in rates)
    for decade in range(-3, 1):  # a quarter each, within four standard deviations
        assert sum(decade <= rate < decade + 1 for rate in rates) == pytest.approx(100, abs=35)
    assert {choice[MOMENTUM] for choice in drawn} == {0, 0.9}
    assert all(2 <= choice["x"] <= 4 for choice in drawn)
    assert all(choice[LR] == float(f"{choice[LR]:.2e}") for choice in drawn)


def test_draws_depend_on_the_seed_alone_and_an_axis_is_the_same_whatever_else_is_drawn() -> None:
    lr = {"log_uniform": [0.1, 30]}
    alone, again, other = search.draw({LR: lr}, 5, 0), search.draw({LR: lr}, 5, 0), search.draw({LR: lr}, 5, 1)
    beside = search.draw({"x": {"uniform": [0, 1]}, LR: lr}, 5, 0)
    assert alone == again != other
    assert [choice[LR] for choice in beside] == [choice[LR] for choice in alone]
    assert search.draw({LR: lr}, 3, 0) == alone[:3]


def test_a_value_that_rounding_would_take_out_of_its_range_stays_in_it() -> None:
    drawn = search.draw({"x": {"uniform": [1.003, 1.017]}}, 3, seed=0)
    assert sorted(choice["x"] for choice in drawn) == [1.003, 1.01, 1.017]


def test_a_range_with_fewer_values_of_few_digits_than_trials_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^search: x: has 3 points of 3 digits, fewer than tune\.trials=4; widen"):
        search.draw({"x": {"uniform": [1.003, 1.017]}}, 4, seed=0)


def test_no_point_is_drawn_twice() -> None:
    space = {"a": {"choice": [1, 2]}, "b": {"choice": [1, 2, 3]}}
    drawn = search.draw(space, 6, seed=0)
    assert sorted(choice["a"] * 10 + choice["b"] for choice in drawn) == [11, 12, 13, 21, 22, 23]
