"""The bounded step."""

from __future__ import annotations

import pytest

from kfacrnn.kfac.step_size import kl_bounded


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
