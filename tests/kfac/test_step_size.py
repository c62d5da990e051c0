"""The bounded step and the adaptive damping."""

from __future__ import annotations

import math

import pytest

from kfacrnn.kfac.step_size import LevenbergMarquardt, kl_bounded


@pytest.mark.parametrize("curvature", [1e-3, 1.0, 50.0, 1e300])
def test_the_predicted_kl_change_never_exceeds_half_the_bound(curvature):
    eta = kl_bounded(0.3, 1e-2, curvature)
    assert 0.5 * eta**2 * curvature <= 0.5 * 1e-2 * (1 + 1e-12)


def test_the_bound_is_attained_unless_the_learning_rate_is_smaller():
    assert kl_bounded(1e3, 0.04, 4.0) == pytest.approx(0.1)
    assert kl_bounded(0.05, 0.04, 4.0) == 0.05


@pytest.mark.parametrize("curvature", [0.0, 1e-320])
def test_nothing_to_bound_leaves_the_learning_rate(curvature):
    assert kl_bounded(0.3, 1e-2, curvature) == 0.3


def test_damping_grows_when_the_model_promises_too_much_and_shrinks_when_it_keeps_its_promises():
    rule = LevenbergMarquardt(every=5, rate=0.95)
    assert rule.adapted(1.0, 0.9) == pytest.approx(0.95**5)
    assert rule.adapted(1.0, 0.1) == pytest.approx(0.95**-5)
    assert rule.adapted(1.0, -3.0) == pytest.approx(0.95**-5)
    assert rule.adapted(1.0, 0.5) == 1.0


def test_the_thresholds_themselves_change_nothing():
    rule = LevenbergMarquardt()
    assert rule.adapted(1.0, 0.25) == rule.adapted(1.0, 0.75) == 1.0


@pytest.mark.parametrize("ratio", [math.nan, math.inf, -math.inf])
def test_damping_grows_when_the_loss_is_lost(ratio):
    assert LevenbergMarquardt().adapted(1.0, ratio) > 1.0


def test_damping_stays_within_its_range():
    rule = LevenbergMarquardt(minimum=0.9, maximum=1.1)
    assert rule.adapted(1.0, 1.0) == 0.9
    assert rule.adapted(1.0, 0.0) == 1.1


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"every": 0}, "every"),
        ({"rate": 1.0}, "rate"),
        ({"rate": 0.0}, "rate"),
        ({"minimum": 0.0}, "minimum"),
        ({"minimum": 2.0, "maximum": 1.0}, "maximum"),
        ({"maximum": math.inf}, "maximum"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_by_name(options, name):
    with pytest.raises(ValueError, match=name):
        LevenbergMarquardt(**options)
