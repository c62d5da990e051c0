"""η, γ, π and the safe decompositions against high-precision or hand-made references."""

from __future__ import annotations

import math
from collections import Counter

import mpmath
import numpy as np
import pytest
import torch

from kfacrnn.kfac import eta, maths


def exact_eta(x: float, T: int) -> float:
    """The closed form of section 3.5.2 with 80 digits."""
    with mpmath.workdps(80):
        y = mpmath.mpf(x)
        return float(T**2 if y == 1 else (T * (1 - y**2) - 2 * y * (1 - y**T)) / (1 - y) ** 2)


NEAR_ONE = [1 - 10.0**-k for k in range(1, 16)]
GRID = torch.tensor([*torch.linspace(-0.999, 1, 61, dtype=torch.float64).tolist(), *NEAR_ONE], dtype=torch.float64)


@pytest.mark.parametrize("T", [1, 2, 3, 6, 35, 100, 127, 1000, 9999, 10_000])
def test_eta_has_twelve_digits_up_to_and_at_one(T):
    expected = torch.tensor([exact_eta(x, T) for x in GRID.tolist()], dtype=torch.float64)
    torch.testing.assert_close(eta(GRID, T), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("T", [2, 35, 1000])
def test_eta_of_float32_input_is_rounded_only_once(T):
    x = GRID.float()
    expected = torch.tensor([exact_eta(value, T) for value in x.tolist()])
    assert eta(x, T).dtype == torch.float32
    torch.testing.assert_close(eta(x, T), expected, rtol=1.2e-7, atol=0)


def test_eta_of_a_mixture_is_the_expectation_over_lengths_whatever_the_scale_of_the_weights():
    lengths = {35: 6.0, 1: 2.0, 36: 1.0, 1000: 1.0}
    expected = [sum(w * exact_eta(x, T) for T, w in lengths.items()) / 10 for x in GRID.tolist()]
    torch.testing.assert_close(eta(GRID, lengths), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("T", [1, 2, 35, 36, 1000])
def test_eta_takes_its_exact_values_at_zero_one_and_minus_one(T):
    values = eta(torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64), T)
    assert values.tolist() == [T, T**2, T % 2]


def test_eta_keeps_the_shape_and_handles_more_elements_than_one_chunk():
    x = torch.linspace(-0.9, 0.9, 2 * maths._CHUNK + 7).reshape(1, -1)
    values = eta(x, 5)
    assert values.shape == x.shape
    assert values[0, -1] == eta(x[0, -1], 5)
    assert eta(torch.empty(0, 3), 5).shape == (0, 3)


@pytest.mark.parametrize(
    "lengths",
    [
        {}, {0: 1.0}, {-3: 1.0}, {2.5: 1.0}, {5: -1.0}, {5: math.nan}, {5: math.inf}, {5: 0.0}, {5: "x"}, 0, "35", None,
        torch.tensor([3, 4]), np.array([3, 4]),
    ],
)  # fmt: skip
def test_lengths_that_are_no_distribution_are_refused_by_name(lengths):
    with pytest.raises(ValueError, match="lengths"):
        eta(torch.zeros(1), lengths)


def test_lengths_counted_as_tensors_are_counted_together():
    lengths = torch.tensor([5, 5, 5, 2])
    assert maths.length_distribution(Counter(lengths)) == {2: 0.25, 5: 0.75}


def test_mean_length_weighs_every_length():
    assert maths.mean_length({10: 1.0, 30: 3.0}) == pytest.approx(25)
    assert maths.mean_length(7) == 7


def test_gamma_is_the_inverse_of_the_expectation_not_of_eta_at_the_mean_length():
    x, lengths = 0.98, {2: 0.5, 40: 0.5}
    expected = 1 / (0.5 * exact_eta(x, 2) + 0.5 * exact_eta(x, 40))
    assert maths.gamma(torch.tensor([x], dtype=torch.float64), lengths).item() == pytest.approx(expected, rel=1e-12)
    assert abs(1 / exact_eta(x, 21) / expected - 1) > 0.3


def test_gamma_is_bounded_where_eta_vanishes_and_exact_elsewhere():
    x = torch.tensor([-1.0, -1 + 1e-6, 0.0, 1.0], dtype=torch.float64)
    values = maths.gamma(x, 36, gamma_max=1e8)
    expected = torch.tensor([1e8 / 36, 1 / exact_eta(x[1].item(), 36), 1 / 36, 1 / 36**2], dtype=torch.float64)
    torch.testing.assert_close(values, expected, rtol=1e-8, atol=0)
    assert maths.GAMMA_MAX >= 1e8


def test_pi_balances_the_mean_diagonals_and_is_one_for_dead_factors():
    A0, G0 = torch.diag(torch.tensor([1.0, 3.0])), torch.tensor([0.25, 0.5, 0.75])
    assert maths.pi(A0, G0) == pytest.approx(2.0)
    assert maths.pi(A0.diagonal(), torch.diag(G0)) == pytest.approx(2.0)
    assert maths.pi(A0, G0, 3 * G0) == pytest.approx(math.sqrt(2.0))
    assert maths.pi(torch.zeros(2, 2), G0) == maths.pi(A0, torch.zeros(3)) == 1.0


def random_positive(n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    X = torch.randn(n, 2 * n, dtype=dtype, generator=torch.Generator().manual_seed(n))
    return X @ X.mT / (2 * n)


def test_whitening_turns_the_lag_zero_factor_into_the_identity_and_unwhitening_undoes_it():
    M, identity = random_positive(6), torch.eye(6, dtype=torch.float64)
    L = maths.safe_cholesky(M).L
    torch.testing.assert_close(maths.whiten(L, M), identity)
    torch.testing.assert_close(L.mT @ maths.unwhiten(L, identity), identity)
    torch.testing.assert_close(maths.inverse(L) @ M, identity)


def test_a_diagonal_is_decomposed_as_the_dense_matrix_it_stands_for():
    M0, M1 = torch.tensor([2.0, 0.5, 9.0]).double(), torch.tensor([-1.0, 0.2, 0.0]).double()
    root, dense_root = maths.safe_cholesky(M0), maths.safe_cholesky(torch.diag(M0))
    torch.testing.assert_close(torch.diag(root.L), dense_root.L)
    assert root.condition == pytest.approx(18) == dense_root.condition
    torch.testing.assert_close(torch.diag(maths.whiten(root.L, M1)), maths.whiten(dense_root.L, torch.diag(M1)))
    torch.testing.assert_close(torch.diag(maths.inverse(root.L)), maths.inverse(dense_root.L))
    U, values, E, _ = maths.safe_svd(M1)
    torch.testing.assert_close(U * values * E, M1)
    assert values.min() >= 0
    eigen = maths.safe_eigh(M1)
    torch.testing.assert_close(eigen.U * eigen.values * eigen.U, M1)


@pytest.mark.parametrize("kind", ["cholesky", "eigh", "svd"])
@pytest.mark.parametrize("failures", [0, 1, 2])
def test_a_decomposition_that_fails_is_retried_in_float64_then_with_jitter_and_counted(monkeypatch, kind, failures):
    M = random_positive(5, torch.float32)
    real, tried = getattr(torch.linalg, kind), []

    def unreliable(attempt):
        tried.append(attempt)
        if len(tried) <= failures:
            raise torch.linalg.LinAlgError("did not converge")
        return real(attempt)

    monkeypatch.setattr(torch.linalg, kind, unreliable)
    result = getattr(maths, f"safe_{kind}")(M, "A0")
    assert result.retries == failures
    assert [attempt.dtype for attempt in tried] == [torch.float32, torch.float64, torch.float64][: failures + 1]
    assert result[0].dtype == torch.float32
    rebuilt = {
        "cholesky": lambda r: r.L @ r.L.mT,
        "eigh": lambda r: r.U * r.values @ r.U.mT,
        "svd": lambda r: r.U * r.values @ r.E.mT,
    }[kind](result)
    torch.testing.assert_close(rebuilt, M, rtol=1e-5, atol=1e-6)


def test_nan_that_a_decomposition_returns_silently_counts_as_a_failure(monkeypatch):
    real = torch.linalg.eigh

    def silent(attempt):
        values, U = real(attempt)
        return (values * math.nan, U) if attempt.dtype == torch.float32 else (values, U)

    monkeypatch.setattr(torch.linalg, "eigh", silent)
    assert maths.safe_eigh(random_positive(3, torch.float32)).retries == 1


@pytest.mark.parametrize("decompose", [maths.safe_cholesky, maths.safe_eigh, maths.safe_svd])
def test_a_matrix_with_nan_or_infinity_is_refused_by_name(decompose):
    for bad in (math.nan, math.inf):
        M = torch.eye(3)
        M[1, 1] = bad
        with pytest.raises(maths.DecompositionError, match="G0"):
            decompose(M, "G0")


def test_an_indefinite_matrix_has_no_root_and_the_error_names_it():
    for M in (torch.diag(torch.tensor([1.0, -0.5])), torch.tensor([1.0, -0.5])):
        with pytest.raises(maths.DecompositionError, match="A0"):
            maths.safe_cholesky(M, "A0")


def test_a_pivot_that_is_rounding_noise_is_not_taken_for_a_root():
    x = torch.tensor([[1.0, 2.0, 3.0]])
    root = maths.safe_cholesky(x.mT @ x + 1e-7 * torch.eye(3))
    assert root.retries > 0
    assert root.L.isfinite().all()


@pytest.mark.parametrize("M", [torch.diag(torch.tensor([1.0, 0.0])), torch.tensor([1.0, 0.0]), torch.zeros(2, 2)])
def test_a_singular_matrix_asks_for_damping(M):
    with pytest.raises(maths.DecompositionError, match=r"A0 .*damping"):
        maths.require_nonsingular(M, "A0", 1e-7)
