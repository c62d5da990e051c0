"""The three approximations against their literal dense evaluation (`dense.py`), and what they have in common."""

from __future__ import annotations

import io
import math
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kfacrnn.kfac import fisher_inverse
from kfacrnn.kfac.fisher import from_state
from kfacrnn.kfac.inversion import inversion
from tests.kfac import dense

THREE = ("indep", "option1", "option2")
LENGTHS = ({1: 1.0}, {2: 1.0}, {5: 1.0}, {35: 1.0}, {100: 1.0}, {1000: 1.0}, {1: 0.25, 5: 0.25, 36: 0.5})
EPS = torch.finfo(torch.float64).eps


class Pair(NamedTuple):
    M0: Tensor
    M1: Tensor


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthogonal(n: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q


def from_spectrum(singular: Tensor, condition: float, generator: torch.Generator, symmetric: bool = False) -> Pair:
    """M0 of the given condition number, M1 = M0^{1/2} U diag(singular) Vᵀ M0^{1/2}; V = U if symmetric."""
    n = len(singular)
    Q, U = orthogonal(n, generator), orthogonal(n, generator)
    V = U if symmetric else orthogonal(n, generator)
    S = Q * torch.logspace(0, -math.log10(condition) / 2, n, dtype=torch.float64) @ Q.mT
    M0 = S @ S
    return Pair((M0 + M0.mT) / 2, S @ (U * singular) @ V.mT @ S)


def from_sequences(n: int, generator: torch.Generator, memory: float = 0.7, steps: int = 12, cases: int = 40) -> Pair:
    """Both factors as section 3.5.4 measures them, on sequences of random lengths; x_t = memory · Q x_{t−1} + noise."""
    lengths = torch.randint(1, steps + 1, (cases,), generator=generator)
    mixing = orthogonal(n, generator)
    x, previous = [], torch.zeros(cases, n, dtype=torch.float64)
    for t in range(steps):
        noise = torch.randn(cases, n, dtype=torch.float64, generator=generator)
        previous = memory * previous @ mixing.mT + noise
        x.append(previous * (t < lengths)[:, None])
    x = torch.stack(x)
    M0 = torch.einsum("tbi,tbj->ij", x, x)
    return Pair((M0 + M0.mT) / 2 / lengths.sum(), torch.einsum("tbi,tbj->ij", x[1:], x[:-1]) / lengths.sum())


def gradient(G: Pair, A: Pair, seed: int = 0) -> Tensor:
    return torch.randn(len(G.M0), len(A.M0), dtype=torch.float64, generator=seeded(seed))


def relative_error(value: Tensor, reference: Tensor) -> float:
    return ((value.double() - reference).norm() / reference.norm()).item()


def product(approximation: str, A: Pair, G: Pair, Z: Tensor, **options) -> Tensor:
    return fisher_inverse(approximation, *A, *G, **options).multiply(Z)


# ----------------------------------------------------------------------------------------- agreement with the equations


@pytest.mark.parametrize("approximation", THREE)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 12),
    m=st.integers(1, 12),
    lengths=st.sampled_from(LENGTHS),
    damping=st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 1.0]),
    condition=st.sampled_from([1.0, 30.0, 1e3]),
    seed=st.integers(0, 2**20),
)
def test_multiply_agrees_with_the_dense_evaluation(approximation, n, m, lengths, damping, condition, seed):
    generator = seeded(seed)
    A, G = (
        from_spectrum(1.8 * torch.rand(size, dtype=torch.float64, generator=generator) - 0.9, condition, generator)
        for size in (n, m)
    )
    Z = gradient(G, A, seed)
    expected = dense.multiply(approximation, *A, *G, Z, lengths=lengths, damping=damping)
    assert relative_error(product(approximation, A, G, Z, lengths=lengths, damping=damping), expected) < 1e-9


@pytest.mark.parametrize("approximation", THREE)
@pytest.mark.parametrize("memory", [0.9, -0.9])
def test_multiply_agrees_with_the_dense_evaluation_on_factors_of_real_sequences(approximation, memory):
    A, G = from_sequences(6, seeded(1), memory), from_sequences(4, seeded(2))
    Z, lengths = gradient(G, A), dict.fromkeys(range(1, 13), 1 / 12)
    expected = dense.multiply(approximation, *A, *G, Z, lengths=lengths, damping=1e-3)
    assert relative_error(product(approximation, A, G, Z, lengths=lengths, damping=1e-3), expected) < 1e-10


@pytest.mark.parametrize("approximation", ["option1", "option2"])
@pytest.mark.parametrize("T", [1, 2, 35, 100, 1000])
@pytest.mark.parametrize("condition", [1.0, 30.0, 1e3])
def test_spectra_next_to_plus_and_minus_one_cost_no_more_digits_than_they_must(approximation, T, condition):
    generator = seeded(T)
    closeness = torch.tensor([1e-5, 1e-6, 1e-5, 3e-6], dtype=torch.float64)
    A = from_spectrum(torch.tensor([1.0, -1.0]) * (1 - closeness[:2]), condition, generator, symmetric=True)
    G = from_spectrum(torch.tensor([1.0, -1.0]) * (1 - closeness[2:]), condition, generator, symmetric=True)
    Z = gradient(G, A)
    expected = dense.multiply(approximation, *A, *G, Z, lengths={T: 1.0}, digits=60)
    tolerance = 100 * EPS * condition**2 / 4e-6
    assert relative_error(product(approximation, A, G, Z, lengths=T), expected) < tolerance


@pytest.mark.parametrize("approximation", THREE)
@pytest.mark.parametrize("damping", [1e-8, 1e-4])
def test_rank_deficient_factors_are_inverted_with_damping(approximation, damping):
    generator = seeded(3)
    x, g = (torch.randn(5, n, dtype=torch.float64, generator=generator) for n in (3, 2))
    x[:, 2], g[:, 1] = x[:, 0] - x[:, 1], 0.0  # a redundant input, a dead unit
    A, G = (Pair(y.mT @ y / 5, y[1:].mT @ y[:-1] / 5) for y in (x, g))
    Z = gradient(G, A)
    expected = dense.multiply(approximation, *A, *G, Z, lengths={5: 1.0}, damping=damping, digits=60)
    condition = math.prod(
        torch.linalg.cond(torch.from_numpy(M)).item()
        for M in dense.damped_factors(dense.matrix(A.M0), dense.matrix(G.M0), damping)
    )
    error = relative_error(product(approximation, A, G, Z, lengths=5, damping=damping), expected)
    assert error < 100 * EPS * condition


@pytest.mark.parametrize("approximation", THREE)
@pytest.mark.parametrize("diagonal", ["A", "G", "both"])
def test_a_diagonal_factor_gives_what_its_dense_matrix_gives(approximation, diagonal):
    generator = seeded(4)
    A, G = from_sequences(4, generator), from_sequences(3, generator)
    if diagonal != "G":
        A = Pair(A.M0.diagonal(), A.M1.diagonal())
    if diagonal != "A":
        G = Pair(G.M0.diagonal(), G.M1.diagonal())
    Z = gradient(G, A)
    expected = dense.multiply(approximation, *A, *G, Z, lengths={7: 1.0}, damping=0.01)
    assert relative_error(product(approximation, A, G, Z, lengths=7, damping=0.01), expected) < 1e-11


@pytest.mark.parametrize("approximation", THREE)
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.float64])
def test_float32_factors_give_a_float32_result_within_a_thousandth(approximation, compute_dtype):
    A, G = from_sequences(10, seeded(5), cases=200), from_sequences(8, seeded(6), cases=200)
    Z = gradient(G, A)
    single = [Pair(*(M.float() for M in pair)) for pair in (A, G)]
    result = product(approximation, *single, Z.float(), lengths=35, damping=1e-3, compute_dtype=compute_dtype)
    assert result.dtype == torch.float32
    assert relative_error(result, product(approximation, A, G, Z, lengths=35, damping=1e-3)) < 1e-3


@pytest.mark.parametrize("approximation", THREE)
def test_products_in_bfloat16_keep_float32_s_result_to_their_own_rounding(approximation):
    A, G = (Pair(*(M.float() for M in from_sequences(n, seeded(n), cases=200))) for n in (40, 30))
    Z = gradient(G, A).float()
    factors = (A.M0, A.M1, [G.M0, G.M0[:7, :7]], [G.M1, G.M1[:7, :7]])
    exact, rounded = (
        inversion(approximation, *factors, lengths=35, damping=0.1, product_dtype=dtype)()
        for dtype in (None, torch.bfloat16)
    )
    Z = torch.cat([Z, Z[:7]])
    result = rounded.multiply(Z)
    assert result.dtype == torch.float32
    assert 1e-5 < relative_error(result, exact.multiply(Z)) < 0.03
    assert torch.equal(from_state(rounded.state()).multiply(Z), result)
    with pytest.raises(ValueError, match=r"^Z must be \[37, 40\] of torch.float32"):
        rounded.multiply(Z.bfloat16())


def test_option_1_keeps_the_sign_of_oscillating_modes_and_the_absolute_variant_is_far_from_equation_8():
    A, G = from_sequences(5, seeded(7), memory=-0.9, steps=30), from_sequences(4, seeded(8), memory=0.9, steps=30)
    A = Pair(A.M0, (A.M1 + A.M1.mT) / 2)
    Z = gradient(G, A)
    expected = dense.multiply("option1", *A, *G, Z, lengths={35: 1.0})
    signed, absolute = (product(name, A, G, Z, lengths=35) for name in ("option1", "option1_abs"))
    assert relative_error(signed, expected) < 1e-11
    assert relative_error(absolute, expected) > 0.3


# ----------------------------------------------------------------------------------------------------------- inclusions


@pytest.mark.parametrize("approximation", ["option1", "option2"])
def test_without_correlation_over_time_every_approximation_is_indep(approximation):
    A, G = from_sequences(5, seeded(9)), from_sequences(3, seeded(10))
    Z, lengths = gradient(G, A), {3: 0.5, 20: 0.5}
    indep = product("indep", A, G, Z, lengths=lengths, damping=0.01)
    for lag_A, lag_G in ((0 * A.M1, G.M1), (A.M1, 0 * G.M1), (None, None)):
        other = product(approximation, Pair(A.M0, lag_A), Pair(G.M0, lag_G), Z, lengths=lengths, damping=0.01)
        torch.testing.assert_close(other, indep, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("approximation", THREE)
def test_time_may_be_read_in_either_direction(approximation):
    A, G = from_sequences(5, seeded(9)), from_sequences(3, seeded(10))
    Z, lengths = gradient(G, A), {3: 0.5, 20: 0.5}
    forwards = product(approximation, A, G, Z, lengths=lengths, damping=0.01)
    backwards = product(approximation, Pair(A.M0, A.M1.mT), Pair(G.M0, G.M1.mT), Z, lengths=lengths, damping=0.01)
    torch.testing.assert_close(backwards, forwards, rtol=1e-9, atol=1e-9)


def test_one_step_makes_option_1_indep():
    A, G = from_sequences(5, seeded(9)), from_sequences(3, seeded(10))
    Z = gradient(G, A)
    torch.testing.assert_close(
        *(product(name, A, G, Z, lengths=1) for name in ("indep", "option1")), rtol=1e-10, atol=0
    )


def test_option_2_is_the_limit_of_option_1_as_sequences_grow_if_the_lag_factors_are_symmetric():
    A, G = (
        from_spectrum(torch.linspace(-0.8, 0.9, n, dtype=torch.float64), 10.0, seeded(n), symmetric=True)
        for n in (5, 3)
    )
    Z = gradient(G, A)
    distance = [
        relative_error(product("option1", A, G, Z, lengths=T), product("option2", A, G, Z, lengths=T))
        for T in (10, 100, 1000, 10_000)
    ]
    assert distance[0] > 0.01
    for near, nearer in pairwise(distance):
        assert nearer < 0.15 * near  # the difference is O(1/T)


@pytest.mark.parametrize("approximation", THREE)
def test_very_large_damping_leaves_the_gradients_direction(approximation):
    A, G = from_sequences(5, seeded(11)), from_sequences(3, seeded(12))
    Z = gradient(G, A)
    result = product(approximation, A, G, Z, lengths={4: 0.5, 8: 0.5}, damping=1e12)
    torch.testing.assert_close(result * 6e12, Z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("approximation", THREE)
def test_perfectly_constant_and_perfectly_oscillating_modes_give_bounded_numbers(approximation):
    for sign_A, sign_G in ((1, 1), (1, -1), (-1, -1)):
        M0 = torch.eye(3, dtype=torch.float64)
        inverse = fisher_inverse(approximation, M0, sign_A * M0, M0, sign_G * M0, lengths=2, gamma_max=1e8)
        result = inverse.multiply(torch.ones(3, 3, dtype=torch.float64))
        assert result.isfinite().all()
        assert result.abs().max() <= 4 * 1e8 / 2 * (1 + 1e-12)  # option 2: (I − Ψ̂) twice, each at most 2


@pytest.mark.parametrize(("approximation", "psi_G"), [("option1", 1.0), ("option2", 0.5)])
@pytest.mark.parametrize("sign", [1, -1])
def test_lag_factors_beyond_the_bound_of_appendix_b2_count_as_if_they_were_at_it(approximation, psi_G, sign):
    A0, G0 = from_sequences(4, seeded(13)).M0, from_sequences(3, seeded(14)).M0
    Z, lengths = gradient(Pair(G0, G0), Pair(A0, A0)), 1001
    beyond, at = (
        fisher_inverse(approximation, A0, sign * size * A0, G0, psi_G * G0, lengths=lengths) for size in (3, 1)
    )
    torch.testing.assert_close(beyond.multiply(Z), at.multiply(Z), rtol=1e-6, atol=0)
    assert beyond.diagnostics.clipped >= 4
    assert max(beyond.diagnostics.psi_max, -beyond.diagnostics.psi_min) == pytest.approx(3 * psi_G)


# -------------------------------------------------------------------------------------------------- splits, state, logs


@pytest.mark.parametrize("approximation", THREE)
@pytest.mark.parametrize("sizes", [(3, 3, 3, 3), (1, 4, 2), (90, 110)], ids=["one size", "small", "large"])
def test_splits_share_one_a_side_and_one_pi_and_are_blocks_of_their_own_otherwise(approximation, sizes):
    A = from_sequences(5, seeded(15))
    G = [from_sequences(m, seeded(16 + i), memory=0.2 * i) for i, m in enumerate(sizes)]
    G = [Pair(scale * M0, scale * M1) for scale, (M0, M1) in zip((1, 10, 0.1, 3), G, strict=False)]
    Z = torch.randn(sum(sizes), 5, dtype=torch.float64, generator=seeded(0))
    G0, G1 = [pair.M0 for pair in G], [pair.M1 for pair in G]
    inverse = inversion(approximation, *A, G0, G1, lengths=6, damping=0.1)()
    mean_G = sum(M0.diagonal().mean().item() for M0 in G0) / len(G0)
    common = math.sqrt(A.M0.diagonal().mean().item() / mean_G)
    expected = torch.cat(
        [
            dense.multiply(approximation, *A, *pair, rows, lengths={6: 1.0}, damping=0.1, pi=common)
            for pair, rows in zip(G, Z.split(sizes), strict=True)
        ]
    )
    assert relative_error(inverse.multiply(Z), expected) < 1e-11


@pytest.mark.parametrize("diagonal", [[0], [0, 1]], ids=["one of two", "both"])
def test_splits_with_a_diagonal_factor_are_what_their_dense_matrices_are(diagonal):
    A, G = from_sequences(5, seeded(15)), [from_sequences(3, seeded(i)) for i in range(2)]
    G0 = [pair.M0.diagonal() if i in diagonal else pair.M0 for i, pair in enumerate(G)]
    dense_G0 = [torch.diag(M0) if M0.dim() == 1 else M0 for M0 in G0]
    Z = torch.randn(6, 5, dtype=torch.float64, generator=seeded(0))
    found, expected = (
        inversion("indep", A.M0, None, some_G0, None, lengths=6, damping=0.1)().multiply(Z)
        for some_G0 in (G0, dense_G0)
    )
    assert relative_error(found, expected) < 1e-13


def test_splits_may_come_as_one_tensor():
    A, G = from_sequences(5, seeded(15)), [from_sequences(3, seeded(i)) for i in range(4)]
    G0, G1 = [pair.M0 for pair in G], [pair.M1 for pair in G]
    Z = torch.randn(12, 5, dtype=torch.float64, generator=seeded(0))
    listed = inversion("option1", *A, G0, G1, lengths=6, damping=0.1)()
    stacked = inversion("option1", *A, torch.stack(G0), torch.stack(G1), lengths=6, damping=0.1)()
    assert torch.equal(listed.multiply(Z), stacked.multiply(Z))


@pytest.mark.parametrize("approximation", [*THREE, "option1_abs"])
def test_an_inverse_survives_a_checkpoint_bit_for_bit(approximation):
    A, G = from_sequences(5, seeded(17)), from_sequences(3, seeded(18))
    inverse, Z = fisher_inverse(approximation, *A, *G, lengths=6, damping=0.1), gradient(G, A)
    file = io.BytesIO()
    torch.save(inverse.state(), file)
    file.seek(0)
    restored = from_state(torch.load(file, weights_only=True))
    assert type(restored) is type(inverse)
    assert restored.diagnostics == inverse.diagnostics
    assert torch.equal(restored.multiply(Z), inverse.multiply(Z))


# ------------------------------------------------------------------------------------------------ few correlated modes


def modes_in(A: Pair, G: Pair) -> tuple[list[float], list[float]]:
    """|ψ̂| of both sides in falling order, by the text-book: singular values of M0^{-1/2} M1 M0^{-1/2}."""
    found = []
    for pair in (A, G):
        values, vectors = torch.linalg.eigh(pair.M0)
        root = vectors / values.sqrt() @ vectors.mT
        found.append(torch.linalg.svdvals(root @ pair.M1 @ root).tolist())
    return found[0], found[1]


@pytest.mark.parametrize("approximation", ["option1", "option2"])
@pytest.mark.parametrize("diagonal", ["A", "G", "AG"])
def test_a_tolerance_changes_nothing_beside_a_diagonal_side(approximation, diagonal):
    A, G = from_sequences(9, seeded(30), 0.9), from_sequences(5, seeded(31), -0.8)
    factors = [M.diagonal() if side in diagonal else M for side, pair in zip("AG", (A, G), strict=True) for M in pair]
    exact, few = (
        fisher_inverse(approximation, *factors, lengths=6, damping=0.1, lag_tolerance=tolerance)
        for tolerance in (0.0, 0.5)
    )
    Z = gradient(G, A)
    assert torch.equal(few.multiply(Z), exact.multiply(Z))


@pytest.mark.parametrize("approximation", ["option1", "option2", "option1_abs"])
@pytest.mark.parametrize("lengths", [{35: 1.0}, {1: 0.25, 5: 0.25, 36: 0.5}], ids=["equal", "of several lengths"])
def test_a_tolerance_below_every_mode_changes_nothing_and_one_above_all_leaves_indep(approximation, lengths):
    A, G = from_sequences(9, seeded(30), 0.9), from_sequences(5, seeded(31), -0.8)
    Z, options = gradient(G, A), {"lengths": lengths, "damping": 1e-3}
    exact = product(approximation, A, G, Z, **options)
    assert relative_error(product(approximation, A, G, Z, **options, lag_tolerance=1e-15), exact) < 1e-13
    indep = product("indep", A, G, Z, **options)
    assert relative_error(product(approximation, A, G, Z, **options, lag_tolerance=0.999), indep) < 1e-15
    assert relative_error(exact, indep) > 0.05, "there is no correlation over time to leave out"


@pytest.mark.parametrize("approximation", ["option1", "option2"])
@pytest.mark.parametrize("tolerance", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_left_out_costs_no_more_than_its_modes_allow(approximation, tolerance, sign):
    generator = seeded(32)
    A, G = (
        from_spectrum(torch.logspace(-0.05, -3, size, dtype=torch.float64), 1.0, generator, symmetric=True)
        for size in (12, 8)
    )
    G = G._replace(M1=sign * G.M1)
    few = fisher_inverse(approximation, *A, *G, lengths=1000, lag_tolerance=tolerance)
    of_A, of_G = modes_in(A, G)
    expected = [sum(psi * of_G[0] > tolerance for psi in of_A), sum(psi * of_A[0] > tolerance for psi in of_G)]
    assert [few.lags.P_A.shape[1], few.lags.P_G[0].shape[1]] == expected
    assert 0 < expected[0] < 12
    for seed in range(20):  # with these factors, F̂ = V0 at ψ̂ = 0, and norms are those of the whitened modes
        Z = gradient(G, A, seed)
        error = relative_error(few.multiply(Z), product(approximation, A, G, Z, lengths=1000))
        assert error < 2 * tolerance / (1 - tolerance) * (1 + tolerance) / (1 - tolerance)


@pytest.mark.parametrize("approximation", ["option1", "option2"])
def test_splits_have_as_many_correlated_modes_as_each_of_them_has(approximation):
    A = from_sequences(9, seeded(33), 0.95)
    G = [from_sequences(5, seeded(34), 0.9), from_sequences(4, seeded(35), 0.0)]
    G[1] = G[1]._replace(M1=1e-3 * G[1].M1)
    Z = torch.randn(9, 9, dtype=torch.float64, generator=seeded(36))
    options = {"lengths": 9, "damping": 1e-6}
    lag_0, lag_1 = [pair.M0 for pair in G], [pair.M1 for pair in G]
    few = inversion(approximation, *A, lag_0, lag_1, **options, lag_tolerance=0.01)()
    (P_G,) = few.lags.P_G
    assert P_G.shape[1] > 0
    assert P_G[:5].any(0).all()
    assert not P_G[5:].any()
    exact = inversion(approximation, *A, lag_0, lag_1, **options)()
    assert relative_error(few.multiply(Z), exact.multiply(Z)) < 0.02


@pytest.mark.parametrize("approximation", ["option1", "option2"])
def test_few_modes_are_multiplied_in_bfloat16_and_go_through_a_checkpoint(approximation):
    A, G = (Pair(*(M.float() for M in from_sequences(n, seeded(n), 0.9))) for n in (9, 5))
    Z = gradient(G, A).float()
    half, full = (
        inversion(approximation, *A, [G.M0], [G.M1], lengths=6, damping=0.1, product_dtype=dtype, lag_tolerance=0.05)()
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert half.lags.P_A.dtype == half.P_A.dtype == torch.bfloat16
    assert half.lags.Y.dtype == torch.float32
    assert 0 < relative_error(half.multiply(Z), full.multiply(Z).double()) < 0.02
    file = io.BytesIO()
    torch.save(half.state(), file)
    file.seek(0)
    restored = from_state(torch.load(file, weights_only=True)).to("cpu")
    assert type(restored.lags) is type(half.lags)
    assert torch.equal(restored.multiply(Z), half.multiply(Z))


def test_diagnostics_know_of_the_modes_that_are_left_out():
    A, G = from_sequences(5, seeded(17)), from_sequences(3, seeded(18))
    exact, few = (fisher_inverse("option1", *A, *G, lengths=6, lag_tolerance=at).diagnostics for at in (0.0, 0.9))
    assert few == exact


def test_diagnostics_report_the_spectrum_and_the_condition_of_the_damped_factors():
    generator = seeded(19)
    A = from_spectrum(torch.tensor([0.5, -0.9, 0.1]), 100.0, generator, symmetric=True)
    G = from_spectrum(torch.tensor([0.8, -0.2]), 10.0, generator, symmetric=True)
    one, two = (fisher_inverse(name, *A, *G, lengths=6).diagnostics for name in ("option1", "option2"))
    assert (one.psi_min, one.psi_max) == pytest.approx((-0.72, 0.4))
    assert (two.psi_min, two.psi_max) == pytest.approx((0.02, 0.72))
    assert one.clipped == two.clipped == one.retries == two.retries == 0
    assert 1 < one.condition_A <= 100 * (1 + 1e-9)
    assert 1 < one.condition_G <= 10 * (1 + 1e-9)


def test_singular_values_measured_on_sequences_need_no_clipping():
    for seed in range(20):
        A, G = (from_sequences(n, seeded(seed + n), 0.99, steps=4, cases=6) for n in (8, 3))
        diagnostics = fisher_inverse("option2", *A, *G, lengths=4, damping=1e-9).diagnostics
        assert diagnostics.psi_max <= 1 + 1e-9


def test_a_decomposition_that_needed_a_second_attempt_is_counted(monkeypatch):
    real, calls = torch.linalg.eigh, []

    def unreliable(M):
        calls.append(M)
        if len(calls) == 1:
            raise torch.linalg.LinAlgError("did not converge")
        return real(M)

    A, G = from_sequences(5, seeded(20)), from_sequences(3, seeded(21))
    expected = product("option1", A, G, gradient(G, A), lengths=6)
    monkeypatch.setattr(torch.linalg, "eigh", unreliable)
    inverse = fisher_inverse("option1", *A, *G, lengths=6)
    assert inverse.diagnostics.retries == 1
    torch.testing.assert_close(inverse.multiply(gradient(G, A)), expected, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ bad input


GOOD = {
    "approximation": "option1",
    "A0": torch.eye(3),
    "A1": torch.zeros(3, 3),
    "G0": torch.eye(2),
    "G1": torch.zeros(2, 2),
    "lengths": 5,
    "damping": 0.1,
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("approximation", "option3"),
        ("approximation", ["option1"]),
        ("damping", None),
        ("damping", -1e-3),
        ("damping", math.nan),
        ("damping", math.inf),
        ("gamma_max", 0.0),
        ("compute_dtype", torch.float16),
        ("lengths", {0: 1.0}),
        ("A0", [[1.0]]),
        ("A0", torch.zeros(3, 2)),
        ("A0", torch.zeros(())),
        ("A0", torch.full((3, 3), math.nan)),
        ("A0", torch.triu(torch.ones(3, 3))),
        ("A0", torch.eye(3, dtype=torch.bfloat16)),
        ("A0", -torch.eye(3)),
        ("A1", torch.zeros(2, 2)),
        ("A1", torch.zeros(3)),
        ("A1", None),
        ("G0", torch.eye(2, dtype=torch.float64)),
        ("G0", torch.tensor([1.0, -5.0])),
        ("G1", "G1"),
        ("G1", torch.full((2, 2), math.inf)),
        ("G1", None),
    ],
)
def test_a_bad_argument_is_refused_by_name(name, value):
    related = {"G1": torch.zeros(2)} if name == "G0" and value.dim() == 1 else {}
    with pytest.raises(ValueError, match=name):
        fisher_inverse(**{**GOOD, name: value, **related})


def test_an_unknown_approximation_is_told_the_known_ones():
    with pytest.raises(ValueError, match=r"indep, option1, option2, option1_abs.*'option3'"):
        fisher_inverse(**{**GOOD, "approximation": "option3"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("approximation", THREE)
def test_a_singular_factor_without_damping_is_refused_and_the_message_names_it(approximation, dtype):
    x = torch.randn(2, 3, dtype=dtype, generator=seeded(22))
    deficient, regular = x.mT @ x, torch.eye(3, dtype=dtype)
    for name, A0, G0 in (("A0", deficient, regular), ("G0", regular, deficient), ("G0", regular[0] + 1, regular[0])):
        with pytest.raises(ValueError, match=f"{name} is singular.*damping"):
            fisher_inverse(approximation, A0, 0 * A0, G0, 0 * G0, lengths=5)


def test_a_gradient_of_another_shape_or_precision_is_refused():
    inverse = fisher_inverse(**GOOD)
    for Z in (torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float64)):
        with pytest.raises(ValueError, match="Z must be"):
            inverse.multiply(Z)


def test_the_factors_are_left_untouched():
    A, G = from_sequences(3, seeded(23)), from_sequences(2, seeded(24))
    before = [M.clone() for M in (*A, *G)]
    for damping in (0.0, 0.1):
        fisher_inverse("option2", *A, *G, lengths=5, damping=damping)
    assert all(torch.equal(M, copy) for M, copy in zip((*A, *G), before, strict=True))
