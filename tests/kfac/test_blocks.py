"""Blocks alone: what they make of a_t, g_t and a gradient, against dense matrices; and the coverage table."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from kfacrnn.kfac.block import Curvature
from kfacrnn.kfac.blocks import block_of
from kfacrnn.kfac.capture import ElementwiseMap, EmbeddingMap, LinearMap
from kfacrnn.kfac.coverage import Coverage, Row
from kfacrnn.kfac.factors import Sequences
from tests.kfac import dense

T, B = 4, 6
LAMBDA, N = 1e-2, 3.0
CURVATURE = Curvature("option1", 100, 1e10)
THREE = ("indep", "option1", "option2")


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, dtype=torch.float64))


def made(map, curvature: Curvature = CURVATURE, lengths: tuple[int, ...] = (T,) * B):
    """A block that has seen one pass, its averages inverted, its parameters with gradients; and that pass."""
    names = {p: f"p{number}" for number, p in enumerate(map.parameters)}
    block = block_of("block", map, curvature, names)
    if isinstance(map, EmbeddingMap):
        a = torch.randint(len(map.weight), (T, B))
    else:
        width = map.parameters[0].shape[-1] if isinstance(map, ElementwiseMap) else sum(W.shape[1] for W in map.weights)
        a = torch.randn(T, B, width, dtype=torch.float64).cumsum(0)
    out = map.weight.shape[1] if isinstance(map, EmbeddingMap) else map.parameters[0].shape[0]
    g = torch.randn(T, B, out, dtype=torch.float64).cumsum(0)
    behind = torch.arange(T)[:, None] >= torch.tensor(lengths)
    counts = {length: float(lengths.count(length)) for length in set(lengths)}
    sequences = Sequences(T, B, counts, behind)
    block.begin(sequences, 0.9)
    block.observe(a, g.masked_fill(behind.unsqueeze(-1), 0), None, sequences)
    block.inverse = block.inversion(LAMBDA)()
    for p in map.parameters:
        p.grad = torch.randn_like(p)
    return block, a, g


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.einsum("tbi,tbj->ij", x, x) / (T * B), torch.einsum("tbi,tbj->ij", x[1:], x[:-1]) / (T * B)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("approximation", THREE)
def test_a_block_with_two_inputs_two_biases_and_uneven_splits_agrees_with_dense_matrices(approximation):
    W_x, W_h, b_1, b_2 = parameter(6, 2), parameter(6, 3), parameter(6), parameter(6)
    splits = {"one": 1, "three": 3, "two": 2}
    linear = LinearMap("m", (W_x, W_h), (b_1, b_2), splits)
    block, a, g = made(linear, replace(CURVATURE, approximation=approximation))
    b_2.grad = b_1.grad.clone()  # as they are added to the same pre-activation
    (D_x, D_h, d_1, d_2), product = block.direction(N)

    A0, A1 = moments(torch.cat([a, torch.ones(T, B, 1)], -1))
    G = [moments(rows) for rows in g.split([1, 3, 2], -1)]
    mean_trace_G = sum(G0.trace() / len(G0) for G0, _ in G) / 3
    pi = (A0.trace() / len(A0) / mean_trace_G).sqrt().item()  # one for all splits
    Z = torch.cat([W_x.grad, W_h.grad, b_1.grad.unsqueeze(1)], 1)
    expected = [
        dense.multiply(approximation, A0, A1, *moment, z, lengths={T: 1.0}, damping=LAMBDA, pi=pi)
        for moment, z in zip(G, Z.split([1, 3, 2]), strict=True)
    ]
    expected = N * torch.cat(expected)
    torch.testing.assert_close(torch.cat([D_x, D_h, (d_1 + d_2).unsqueeze(1)], 1), expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(d_1, d_2)
    torch.testing.assert_close(product, (expected * Z).sum())


@pytest.mark.parametrize("approximation", THREE)
def test_joint_gates_are_one_block_with_their_correlations(approximation):
    weight = parameter(6, 3)
    linear = LinearMap("m", (weight,), (), {"one": 1, "three": 3, "two": 2})
    block, a, g = made(linear, replace(CURVATURE, approximation=approximation, joint_gates=True))
    expected = dense.multiply(approximation, *moments(a), *moments(g), weight.grad, lengths={T: 1.0}, damping=LAMBDA)
    torch.testing.assert_close(block.direction(N)[0][0], N * expected, rtol=1e-9, atol=1e-12)
    assert block.coverage() == [Row("block", "p0", approximation, "A 3 · G 6")]


def test_gates_that_would_be_too_large_together_stay_separate():
    curvature = replace(CURVATURE, joint_gates=True, max_dense=5)
    block, *_ = made(LinearMap("m", (parameter(6, 3),), (), {"one": 2, "two": 4}), curvature)
    assert [(row.block, row.factors) for row in block.coverage()] == [
        ("block.one", "A 3 · G 2"),
        ("block.two", "A 3 · G 4"),
    ]


def test_joint_gates_say_which_rows_of_their_parameters_they_are():
    weight = parameter(9, 3)
    joint = replace(CURVATURE, joint_gates=True)
    gates = block_of("gates", LinearMap("m", (weight,), (), {"r": 3, "z": 3}, slice(0, 6)), joint, {weight: "W"})
    rest = block_of("rest", LinearMap("m", (weight,), (), {"n": 3}, slice(6, 9)), joint, {weight: "W"})
    assert [(row.block, row.parameters) for row in (*gates.coverage(), *rest.coverage())] == [
        ("gates", "W[0:6]"),
        ("rest.n", "W[6:9]"),
    ]


def test_an_embedding_moves_the_rows_of_its_batch_as_dense_matrices_say_and_no_other():
    embedding = EmbeddingMap("m", parameter(7, 3))
    block, a, g = made(embedding)
    embedding.weight.grad[[0, 3, 4]] = 0
    (D,), product = block.direction(N)

    A0 = torch.bincount(a.flatten(), minlength=7).double() / (T * B)
    G0 = torch.einsum("tbi,tbj->ij", g, g) / (T * B)
    pi = (A0.mean() / (G0.trace() / 3)).sqrt()
    damped_A, damped_G = A0 + pi * LAMBDA**0.5, G0 + LAMBDA**0.5 / pi * torch.eye(3).double()
    expected = N / T * embedding.weight.grad / damped_A[:, None] @ torch.linalg.inv(damped_G)
    torch.testing.assert_close(D, expected, rtol=1e-9, atol=1e-12)
    assert not D[[0, 3, 4]].any()
    torch.testing.assert_close(product, (expected * embedding.weight.grad).sum())


@pytest.mark.parametrize("approximation", THREE)
def test_padded_sequences_enter_by_the_distribution_of_their_lengths(approximation):
    weight, lengths = parameter(3, 2), (4, 1, 3, 4, 4, 2)
    block, a, g = made(LinearMap("m", (weight,)), replace(CURVATURE, approximation=approximation), lengths)
    factors = []
    for x in (a, g):
        cases = [x[:length, case] for case, length in enumerate(lengths)]
        factors.append(sum(v.T @ v for v in cases) / sum(lengths))
        factors.append(sum(v[1:].T @ v[:-1] for v in cases) / sum(lengths))
    weights = {1: 1 / 6, 2: 1 / 6, 3: 1 / 6, 4: 1 / 2}
    expected = dense.multiply(approximation, *factors, weight.grad, lengths=weights, damping=LAMBDA)
    torch.testing.assert_close(block.direction(N)[0][0], N * expected, rtol=1e-9, atol=1e-12)


def test_an_embedding_agrees_with_the_dense_matrices_of_its_one_hot_inputs():
    weight = parameter(5, 3)
    block, tokens, g = made(EmbeddingMap("m", weight))
    (D,), product = block.direction(N)
    one_hot = nn.functional.one_hot(tokens, 5).double()
    A0, G0 = moments(one_hot)[0], moments(g)[0]
    zeros = torch.zeros_like(A0), torch.zeros_like(G0)
    expected = dense.multiply("indep", A0, zeros[0], G0, zeros[1], weight.grad.T, lengths={T: 1.0}, damping=LAMBDA)
    torch.testing.assert_close(D, N * expected.T, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(product, (D * weight.grad).sum())


@pytest.mark.parametrize("which", ["gain and shift", "gain", "shift"])
def test_gains_and_shifts_are_divided_by_the_second_moments_of_their_gradients(which):
    gain, shift = (parameter(4) if name in which else None for name in ("gain", "shift"))
    block, a, g = made(ElementwiseMap("m", gain, shift))
    directions, product = block.direction(N)
    moments = [((g * a) ** 2).mean((0, 1))] * (gain is not None) + [(g**2).mean((0, 1))] * (shift is not None)
    expected = [N * p.grad / (T * (m + LAMBDA)) for p, m in zip(block.parameters, moments, strict=True)]
    torch.testing.assert_close(directions, expected)
    torch.testing.assert_close(product, sum((d * p.grad).sum() for d, p in zip(directions, block.parameters)))  # noqa: B905


@pytest.mark.parametrize(("rows", "columns"), [(8, 3), (3, 8)])
def test_factors_that_are_too_large_are_diagonal_and_take_the_lags_with_them(rows, columns):
    weight = parameter(rows, columns)
    block, a, g = made(LinearMap("m", (weight,)), replace(CURVATURE, max_dense=4))
    A0, G0 = moments(a)[0], moments(g)[0]
    A0, G0 = (M.diagonal() if len(M) > 4 else M for M in (A0, G0))
    torch.testing.assert_close(block.average.values(), [A0, G0])
    zeros = torch.zeros_like(A0), torch.zeros_like(G0)
    expected = dense.multiply("indep", A0, zeros[0], G0, zeros[1], weight.grad, lengths={T: 1.0}, damping=LAMBDA)
    torch.testing.assert_close(block.direction(N)[0][0], N * expected, rtol=1e-9, atol=1e-12)
    assert block.coverage()[0].approximation == "indep"


def test_an_output_map_keeps_no_lag_factors():
    block, *_ = made(LinearMap("m", (parameter(3, 2),), is_output=True))
    assert [value.shape for value in block.average.values()] == [(2, 2), (3, 3)]


def test_a_map_computes_the_logits_if_its_g_is_theirs():
    block = block_of("b", LinearMap("m", (weight := parameter(3, 2),)), CURVATURE, {weight: "w"})
    g = torch.randn(T, B, 3)
    block.meet_logits(g, 2 * g)
    assert not block.is_logits
    block.meet_logits(g[..., :2], g)
    assert not block.is_logits
    block.meet_logits(g.bfloat16().float(), g)
    assert block.is_logits
    assert block.is_output


def test_exact_variances_stand_in_for_sampled_ones_where_G_is_diagonal():
    weight = parameter(5, 2)
    block = block_of("b", LinearMap("m", (weight,)), replace(CURVATURE, max_dense=4), {weight: "w"})
    a, g, variance = (torch.rand(T, B, size, dtype=weight.dtype) for size in (2, 5, 5))
    sequences = Sequences(T, B, {T: float(B)})
    block.begin(sequences, 0.9)
    block.observe(a, g, variance, sequences)
    torch.testing.assert_close(block.average.values()[1], variance.mean((0, 1)))


def test_a_block_has_gradients_or_none_but_not_some():
    W, b = parameter(3, 2), parameter(3)
    block, *_ = made(LinearMap("m", (W,), (b,)))
    assert block.has_gradients()
    b.grad = None
    with pytest.raises(ValueError, match="p1 has no gradient and others of block have: its block moves as one"):
        block.has_gradients()
    W.grad = None
    assert not block.has_gradients()


def test_a_map_of_some_rows_of_its_parameters_is_one_of_parameters_with_no_other_rows():
    W, b, whole_W, whole_b = parameter(3, 2), parameter(3), parameter(7, 2), parameter(7)
    rows, splits = slice(4, 7), {"one": 1, "two": 2}
    torch.manual_seed(1)
    alone, *_ = made(LinearMap("m", (W,), (b,), splits))
    partial_map = LinearMap("m", (whole_W,), (whole_b,), splits, rows)
    block = block_of("block", partial_map, CURVATURE, {whole_W: "W", whole_b: "b"})
    block.average, block.inverse = alone.average, alone.inverse
    for whole, part in ((whole_W, W), (whole_b, b)):
        whole.grad = torch.randn_like(whole)
        whole.grad[rows] = part.grad
    torch.testing.assert_close(block.direction(N), alone.direction(N), rtol=0, atol=0)
    assert block.rows == [1, 2]
    assert [row.parameters for row in block.coverage()] == ["W[4:5], b[4:5]", "W[5:7], b[5:7]"]


@pytest.mark.parametrize(
    "map",
    [
        LinearMap("m", (parameter(6, 2),), (parameter(6),), {"i": 3, "f": 3}),
        EmbeddingMap("m", parameter(5, 3)),
        ElementwiseMap("m", parameter(4), parameter(4)),
    ],
    ids=lambda map: type(map).__name__,
)
def test_a_block_restored_from_its_state_gives_the_same_direction_bit_for_bit(map):
    block, *_ = made(map)
    other = block_of("block", map, CURVATURE, dict.fromkeys(map.parameters, "p"))
    other.load_state_dict(block.state_dict(block.inverse))
    torch.testing.assert_close(other.direction(N), block.direction(N), rtol=0, atol=0)
    torch.testing.assert_close(other.average.values(), block.average.values(), rtol=0, atol=0)


def test_the_state_of_a_block_of_other_sizes_is_refused_by_name():
    state = made(LinearMap("m", (parameter(3, 2),)))[0].state_dict(None)
    other, *_ = made(LinearMap("m", (parameter(3, 4),)))
    with pytest.raises(ValueError, match="the state is that of another model or other gates: block has factors"):
        other.require_fitting(state)


def test_the_coverage_table_names_blocks_rows_approximations_and_factor_sizes():
    gates = LinearMap("m", (parameter(6, 2), parameter(6, 3)), (parameter(6),), {"i": 4, "f": 2})
    names = dict(zip(gates.parameters, ("W_x", "W_h", "b"), strict=True))
    rows = block_of("l0", gates, CURVATURE, names).coverage()
    rows += block_of("e", EmbeddingMap("m", weight := parameter(500, 3)), CURVATURE, {weight: "e.weight"}).coverage()
    rows += block_of("n", ElementwiseMap("m", gain := parameter(4)), CURVATURE, {gain: "n.gain"}).coverage()
    assert str(Coverage(rows)).splitlines() == [
        "block  parameters                  approximation  factors",
        "l0.i   W_x[0:4], W_h[0:4], b[0:4]  option1        A 6 · G 4",
        "l0.f   W_x[4:6], W_h[4:6], b[4:6]  option1        A 6 · G 2",
        "e      e.weight                    indep          A 500 diagonal · G 3",
        "n      n.gain                      diagonal       4",
    ]
