"""Nats as a task calls them, and back."""

from __future__ import annotations

import math

import pytest

from kfacrnn.units import from_nats, to_nats


@pytest.mark.parametrize(
    ("metric", "nats", "value"),
    [
        ("perplexity", 0.0, 1.0),
        ("perplexity", 3.0, 20.085536923187668),
        ("perplexity", 705.0, 1.505e306),
        ("bits per character", 2.0, 2.8853900817779268),
        ("nats per sequence", 2.0, 2.0),
        ("", 2.0, 2.0),
    ],
)
def test_metrics_are_what_the_field_calls_them_and_come_back(metric: str, nats: float, value: float) -> None:
    assert from_nats(metric)(nats) == pytest.approx(value, rel=1e-3 if nats > 700 else 1e-15)
    assert to_nats(metric, from_nats(metric)(nats)) == pytest.approx(nats, rel=1e-15)


def test_the_perplexity_of_a_diverged_run_is_infinite() -> None:
    assert from_nats("perplexity")(1e4) == math.inf
    assert math.isnan(from_nats("perplexity")(math.nan))


def test_no_perplexity_is_zero_and_less_is_beyond_every_loss() -> None:
    assert to_nats("perplexity", 0.0) == to_nats("perplexity", -1.0) == -math.inf
