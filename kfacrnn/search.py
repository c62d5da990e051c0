"""Where a method's settings are looked for: the points of a grid or a cross and what extends it, or points at random.

Pure functions of what an experiment's YAML says and of which points have been tried. An *axis* is a setting with its
values, a *choice* has one value of each axis.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kfacrnn.errors import UserError

Choice = dict[str, Any]
Grid = Mapping[str, Sequence[Any]]
Space = Mapping[str, Mapping[str, Sequence[Any]]]  # key → {kind: what it is drawn from}

KINDS = ("log_uniform", "uniform", "choice")
DIGITS = 3  # of drawn and added values, so that the overrides can be read
DRAWS = 100  # for every point, before there are taken to be no more


def points(grid: Grid) -> list[Choice]:
    """Every combination of the grid's values, the last key varying fastest; one empty choice without a grid."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def cross(axes: Grid) -> list[Choice]:
    """The middle value of every axis, then each axis's other values with the middle ones of the others."""
    centre = {key: values[len(values) // 2] for key, values in axes.items()}
    arms = [{**centre, key: value} for key, values in axes.items() for value in values if value != centre[key]]
    return [centre, *arms]


def problems(space: Space, trials: int | None) -> Iterator[str]:
    """What is wrong with a space to draw from, a line each."""
    for key, axis in space.items():
        if len(axis) != 1 or not set(axis) <= set(KINDS):
            yield f"{key}: {', '.join(axis) or 'nothing'}: must be one of {', '.join(KINDS)}"
            continue
        ((kind, values),) = axis.items()
        if kind == "choice":
            if not values:
                yield f"{key}: choice: has no values"
            continue
        ascending = len(values) == 2 and all(map(_is_number, values)) and values[0] < values[1]
        if not ascending or not all(map(math.isfinite, values)) or (kind == "log_uniform" and values[0] <= 0):
            positive = " above 0" if kind == "log_uniform" else ""
            yield f"{key}: {kind}: {list(values)}: must be two numbers{positive}, the lower one first"
    sizes = [len(axis["choice"]) if "choice" in axis else math.inf for axis in space.values()]
    if trials is not None and 0 < math.prod(sizes) < trials:
        yield f"has {math.prod(sizes)} points, fewer than tune.trials={trials}"


def draw(space: Space, trials: int, seed: int) -> list[Choice]:
    """`trials` different points. Every axis has a stream of its own, so that methods which share an axis are given the
    same values of it, and only `random()` is used, which Python promises never to change. Raises `UserError` where the
    space, whose values have few digits, has not so many points, as far as draws tell."""
    streams = {key: random.Random(f"{seed} {key}") for key in space}
    drawn: list[Choice] = []
    for _ in range(DRAWS * trials):
        if len(drawn) == trials:
            break
        choice = {key: _value(axis, streams[key].random()) for key, axis in space.items()}
        if choice not in drawn:
            drawn.append(choice)
    if len(drawn) < trials:
        what = f"{len(drawn)} points of {DIGITS} digits, fewer than tune.trials={trials}"
        raise UserError(f"search: {', '.join(space)}: has {what}; widen its range")
    return drawn


def candidates(grid: Grid, tried: Sequence[Choice], winner: Choice) -> Iterator[Choice]:
    """Points beside the `winner` that are not among the `tried` ones, the most wanted first.

    For every axis on whose edge it sits, the next value outward, at the ratio of the last two; the axis with fewest
    additions goes first. Then the geometric means of its value and the neighbouring ones. Momenta and decays, 0 and
    values from 1/2 to 1, are taken by their distance from 1. Axes that are not spaced logarithmically have neither.
    """
    scales = {key: _Scale(values) for key, values in grid.items()}
    axes = {key: _values(key, tried) for key, scale in scales.items() if scale.is_logarithmic}
    added = {key: len(values) - len(set(grid[key])) for key, values in axes.items()}
    outward = [
        (key, scales[key].beyond(edge, inner))
        for key, values in sorted(axes.items(), key=lambda axis: added[axis[0]])
        for edge, inner in ((values[-1], values[-2]), (values[0], values[1]))
        if winner[key] == edge
    ]
    between = [
        (key, scales[key].between(low, high))
        for key, values in axes.items()
        for low, high in reversed(list(itertools.pairwise(values)))
        if winner[key] in (low, high)
    ]
    for key, value in (*outward, *between):
        choice = {**winner, key: value}
        if choice not in tried:
            yield choice


def edges(grid: Grid, tried: Sequence[Choice], winner: Choice) -> list[str]:
    """The axes of numbers on which the winner has the least or the greatest value of all that were tried. Zero is no
    edge: no setting goes below it."""
    numeric = [key for key, values in grid.items() if all(map(_is_number, values)) and len({*values}) > 1]
    ends = {key: {_values(key, tried)[0], _values(key, tried)[-1]} - {0} for key in numeric}
    return [key for key in numeric if winner[key] in ends[key]]


def _value(axis: Mapping[str, Sequence[Any]], share: float) -> Any:
    ((kind, values),) = axis.items()
    if kind == "choice":
        return values[int(share * len(values))]
    low, high = values
    value = low * (high / low) ** share if kind == "log_uniform" else low + share * (high - low)
    return min(max(_rounded(value), float(low)), float(high))


def _values(key: str, tried: Sequence[Choice]) -> list[Any]:
    return sorted({choice[key] for choice in tried})


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class _Scale:
    """Steps along an axis of numbers: by their ratios, or by those of their distances from 1."""

    def __init__(self, values: Sequence[Any]):
        numbers = all(map(_is_number, values)) and len({*values}) > 1
        self._from_one = numbers and all(value == 0 or 0.5 <= value < 1 for value in values)
        self._whole = numbers and all(isinstance(value, int) for value in values)
        magnitudes = sorted(map(self._magnitude, {*values})) if numbers else []
        self.is_logarithmic = numbers and magnitudes[0] > 0 and _ratios_are_alike(magnitudes)

    def beyond(self, edge: float, inner: float) -> float | int:
        """The next value outward, at the ratio of the last two."""
        return self._value(self._magnitude(edge) ** 2 / self._magnitude(inner))

    def between(self, low: float, high: float) -> float | int:
        return self._value(math.sqrt(self._magnitude(low) * self._magnitude(high)))

    def _magnitude(self, value: float) -> float:
        return 1 - value if self._from_one else value

    def _value(self, magnitude: float) -> float | int:
        """A whole number on an axis of whole numbers stays one."""
        short = _rounded(magnitude)
        if self._from_one:
            return max(0.0, round(1 - short, 12))
        return int(short) if self._whole and short.is_integer() else short


def _ratios_are_alike(ascending: Sequence[float]) -> bool:
    """Whether ratios between neighbours are more alike than differences; of two numbers, yes."""
    pairs = list(itertools.pairwise(ascending))
    ratios, differences = [high / low for low, high in pairs], [high - low for low, high in pairs]
    return max(ratios) / min(ratios) <= max(differences) / min(differences)


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
