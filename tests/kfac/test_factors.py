"""Averages and moments: explicit loops, and what padding, lags and age may not do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kfacrnn.kfac.factors import Average, Sequences, add_frequencies, add_moments, with_homogeneous_coordinate
from kfacrnn.predictive import Categorical


def sequences(steps: int, lengths: list[int]) -> Sequences:
    return Sequences.of(Categorical(torch.zeros(steps, len(lengths), 2), lengths=torch.tensor(lengths)))


def test_the_time_axis_counts_lengths_and_observed_steps():
    seen = sequences(4, [4, 2, 2, 1])
    assert (seen.steps, seen.cases, seen.observed) == (4, 4, 9)
    assert seen.lengths == {1: 1.0, 2: 2.0, 4: 1.0}
    assert seen.once().observed == 4
    assert Sequences.of(Categorical(torch.zeros(3, 5, 2))).observed == 15


def test_padding_becomes_zero_and_nothing_else_does():
    x = torch.full((3, 2, 2), torch.nan)
    x[:1] = 1
    x[:, 1] = 2
    kept = sequences(3, [1, 3]).without_padding(x)
    assert kept[:, 0].tolist() == [[1, 1], [0, 0], [0, 0]]
    assert (kept[:, 1] == 2).all()


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_moments_are_sums_of_outer_products_of_neighbours_in_time_within_a_case(steps):
    x = torch.randn(steps, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    M0, M1 = torch.zeros(2, 4, 4, dtype=torch.float64)
    add_moments(M0, M1, x, divisor=7)
    expected = np.zeros((2, 4, 4))
    for case in x.transpose(0, 1).numpy():
        for t in range(steps):
            expected[0] += np.outer(case[t], case[t]) / 7
            expected[1] += np.outer(case[t + 1], case[t]) / 7 if t + 1 < steps else 0
    np.testing.assert_allclose(M0, expected[0], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(M1, expected[1], rtol=1e-12, atol=1e-14)
    diagonal = torch.zeros(4, dtype=torch.float64)
    add_moments(diagonal, None, x, divisor=7)
    np.testing.assert_allclose(diagonal, expected[0].diagonal(), rtol=1e-12)


def test_frequencies_are_the_diagonal_of_the_moments_of_one_hot_inputs():
    tokens = torch.randint(6, (4, 3), generator=torch.Generator().manual_seed(0))
    seen, frequencies, M0 = sequences(4, [4, 1, 2]), torch.zeros(6), torch.zeros(6, 6)
    add_frequencies(frequencies, tokens, seen, seen.observed)
    add_moments(M0, None, seen.without_padding(torch.nn.functional.one_hot(tokens, 6).float()), seen.observed)
    torch.testing.assert_close(torch.diag(frequencies), M0)
    assert frequencies.sum().item() == pytest.approx(1)


def test_the_homogeneous_coordinate_comes_last():
    assert with_homogeneous_coordinate(torch.zeros(1, 1, 2)).tolist() == [[[0, 0, 1]]]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95])
def test_an_average_of_equal_observations_is_the_observation_at_every_age(decay):
    average, observation = Average(), torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    for _ in range(5):
        average.begin(sequences(3, [3, 1]), decay, [(2, 2)], like=observation)
        average.sums[0] += observation
        torch.testing.assert_close(average.values()[0], observation)
        assert sum(average.lengths.values()) == pytest.approx(average.weight)


def test_an_average_weighs_by_decay_per_observation():
    average = Average()
    for value in (1.0, 2.0, 4.0):
        average.begin(sequences(3, [3, 1]), 0.5, [()], like=torch.zeros(()))
        average.sums[0] += value
    assert average.values()[0].item() == pytest.approx((0.25 * 1 + 0.5 * 2 + 4) / 1.75)


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_passes_of_other_lengths_count_by_their_time_steps(decay):
    """Σ w_p S_p / B_p over Σ w_p E_p[T], with S_p the sum of a pass's products and w_p its decay."""
    average, generator = Average(), torch.Generator().manual_seed(0)
    products, lengths, weights = [], [[2, 2, 2], [9, 7], [1, 4, 3, 3]], [decay**2, decay, 1.0]
    for those in lengths:
        seen = sequences(9, those)
        x = seen.without_padding(torch.randn(9, len(those), 3, generator=generator, dtype=torch.float64))
        average.begin(seen, decay, [(3, 3)], like=x)
        add_moments(*average.sums, None, x, average.divisor(seen))
        products.append(np.einsum("tbi,tbj->ij", x, x) / len(those))
    expected = np.tensordot(weights, products, 1) / np.dot(weights, [np.mean(those) for those in lengths])
    np.testing.assert_allclose(average.values()[0], expected, rtol=1e-12)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    memory=st.floats(-1, 1),
    decay=st.floats(0, 0.99),
    seed=st.integers(0, 2**31),
)
def test_lag_one_never_exceeds_lag_zero_whatever_the_padding_and_the_averaging(lengths, memory, decay, seed):
    """Appendix B.2: the largest singular value of M0^{-1/2} M1 M0^{-1/2} is at most 1."""
    generator, average = torch.Generator().manual_seed(seed), Average()
    for _ in range(3):
        x = torch.randn(6, len(lengths), 3, dtype=torch.float64, generator=generator)
        for t in range(1, 6):
            x[t] = memory * x[t - 1] + 0.1 * x[t]
        seen = sequences(6, lengths)
        average.begin(seen, decay, [(4, 4)] * 2, like=x)
        x = seen.without_padding(with_homogeneous_coordinate(x))
        add_moments(*average.sums, x, average.divisor(seen))
    M0, M1 = (value.numpy() for value in average.values())
    spectrum, Q = np.linalg.eigh(M0 + 1e-9 * np.eye(4))
    root = Q / np.sqrt(spectrum) @ Q.T
    assert np.linalg.svd(root @ M1 @ root, compute_uv=False).max() <= 1 + 1e-6


def test_a_state_holds_everything_that_an_average_is():
    average = Average()
    average.begin(sequences(3, [3, 1]), 0.9, [(2,)], like=torch.zeros(2))
    average.sums[0] += 1
    other = Average()
    other.load_state_dict(average.state_dict(), torch.device("cpu"))
    assert other.values()[0].tolist() == average.values()[0].tolist()
    assert (other.lengths, other.weight, other.first_length) == (average.lengths, average.weight, 2.0)
    older = {name: value for name, value in average.state_dict().items() if name != "first_length"}
    other.load_state_dict(older, torch.device("cpu"))
    assert other.first_length == 2.0
