"""λ, at first and as Levenberg and Marquardt adapt it."""

from __future__ import annotations

import math

import pytest

from kfacrnn.kfac.damping import Damping, LevenbergMarquardt


def test_the_first_damping_falls_until_the_lasting_one_is_more():
    damping = Damping(0.3, first=1.0, rule=None)
    assert [damping.before(update) for update in range(5)] == pytest.approx([1, 0.7, 0.49, 0.343, 0.3])
    assert Damping(0.3, first=None, rule=None).before(0) == 0.3


def test_the_lasting_damping_is_adapted_while_the_first_one_still_falls():
    damping = Damping(0.1, first=1.0, rule=LevenbergMarquardt(every=2))
    assert [damping.is_due(updates) for updates in (1, 2, 3, 4)] == [False, True, False, True]
    assert damping.adapt(change=-0.9, predicted=-1.0) == pytest.approx(0.9)
    assert damping.before(0) == 1.0
    assert damping.before(100) == damping.lasting == pytest.approx(0.1 * 0.95**2)


def test_an_update_that_moves_nothing_teaches_nothing_unless_the_loss_is_lost():
    damping = Damping(0.1, first=None, rule=LevenbergMarquardt())
    assert math.isnan(damping.adapt(change=0.0, predicted=0.0))
    assert damping.lasting == 0.1
    assert math.isnan(damping.adapt(change=math.nan, predicted=0.0))
    assert damping.lasting > 0.1


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
