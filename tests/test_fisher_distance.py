"""The maths of `scripts/fisher_distance.py`, against enumeration of every target sequence, one case at a time."""

from __future__ import annotations

import csv
import itertools
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.kfac import dense
from tests.scripts import script

ROOT = Path(__file__).parents[1]
H, STEPS, CASES = 6, 3, 2

study, tables = script("fisher_distance"), script("fisher_study.tables")
problems, exact, approximations, measures, report, training = (
    script(f"fisher_study.{part}") for part in ("problems", "exact", "approximations", "measures", "report", "training")
)


def vec(M: Tensor) -> Tensor:
    return M.mT.flatten()


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symbols(steps: int) -> Tensor:
    return torch.randint(4, (problems.BURN_IN + steps + 1, CASES), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def language() -> Any:
    return problems.Language("sticky", 0)


@pytest.fixture(scope="module")
def blocks(language: Any) -> list[Any]:
    return [*map(exact.enumerated_block, exact.enumerate_scores(language, symbols(STEPS)))]


def random_block(steps: int = 4, n: int = 3, m: int = 2) -> Any:
    """Factors of series that are correlated over time; what is used of it is A and G alone."""
    a, g = random(1, steps, 40, n), random(1, steps, 40, m, seed=2)
    a, g = a.cumsum(1), g - 0.7 * g.roll(1, 1)
    return exact.Block("any", torch.eye(n * m).double(), exact.second_moments(a), exact.second_moments(g))


def block_of_lags(A: list[Tensor], G: list[Tensor]) -> Any:
    """A block whose moments depend on the lag alone: M_ts = M_{t−s}, transposed for t < s."""
    whole = []
    for M in (A, G):
        rows = [[M[t - s] if t >= s else M[s - t].mT for s in range(len(M))] for t in range(len(M))]
        whole.append(torch.stack([torch.stack(row) for row in rows]).permute(0, 2, 1, 3))
    size = len(A[0]) * len(G[0])
    return exact.Block("any", torch.eye(size).double(), *whole)


class Walk:
    """One case of the model, step by step: log-probabilities, and a_t and s_t of the LSTM after the burn-in."""

    def __init__(self, model: Any, tokens: Tensor):
        p = dict(model.named_parameters())
        W = torch.cat([p["lstm.weight_ih_l0"], p["lstm.weight_hh_l0"]], 1)
        b = p["lstm.bias_ih_l0"] + p["lstm.bias_hh_l0"]
        h, c = torch.zeros(2, H).double()
        self.a, self.s, self.log_p = [], [], []
        for t, token in enumerate(tokens[:-1]):
            if t == problems.BURN_IN:
                h, c, self.a, self.s, self.log_p = h.detach(), c.detach(), [], [], []
            x = torch.cat([p["embedding.weight"][token], h])
            self.a.append(torch.cat([x, torch.ones(1)]).detach())
            self.s.append(W @ x + b)
            i, f, g, o = self.s[-1].split(H)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            self.log_p.append((p["softmax.weight"] @ h + p["softmax.bias"]).log_softmax(0))

    def outcomes(self) -> Any:
        """Probability and loss of every sequence of targets."""
        for targets in itertools.product(range(len(self.log_p[0])), repeat=len(self.log_p)):
            loss = -torch.stack([log_p[k] for log_p, k in zip(self.log_p, targets, strict=True)]).sum()
            yield math.exp(-loss.item()), loss


# ----------------------------------------------------------------------------------------------------- the exact Fisher


def test_the_fisher_is_the_mean_over_every_sequence_of_targets_of_the_squared_gradient(
    language: Any, blocks: list[Any]
) -> None:
    model, tokens = language.model, symbols(STEPS)
    expected = [torch.zeros(60, 60).double() for _ in blocks]
    plain = nn.LSTM(3, H).double()
    plain.load_state_dict(model.lstm.state_dict())
    for case in range(CASES):
        x = model.embedding(tokens[:-1, case : case + 1]).detach()
        with torch.no_grad():
            _, state = plain(x[: problems.BURN_IN])
        log_p = model.softmax(plain(x[problems.BURN_IN :], state)[0][:, 0]).log_softmax(-1)
        for targets in itertools.product(range(4), repeat=STEPS):
            log_likelihood = log_p[range(STEPS), targets].sum()
            W_x, W_h, b_x, _ = torch.autograd.grad(log_likelihood, list(plain.parameters()), retain_graph=True)
            for fisher, DW in zip(expected, torch.cat([W_x, W_h, b_x[:, None]], 1).split(H), strict=True):
                fisher += log_likelihood.exp().item() / CASES * torch.outer(vec(DW), vec(DW))
    for fisher, block in zip(expected, blocks, strict=True):
        torch.testing.assert_close(block.fisher, fisher, rtol=1e-10, atol=1e-14)


def test_the_factors_are_means_over_every_sequence_of_targets_with_one_divisor(
    language: Any, blocks: list[Any]
) -> None:
    A = [torch.zeros(10, 10).double() for _ in range(2)]
    G = [torch.zeros(24, 24).double() for _ in range(2)]
    for case in range(CASES):
        walk = Walk(language.model, symbols(STEPS)[:, case])
        for lag in (0, 1):
            for t in range(STEPS - lag):
                A[lag] += torch.outer(walk.a[t + lag], walk.a[t]) / (CASES * STEPS)
        for probability, loss in walk.outcomes():
            g = torch.autograd.grad(loss, walk.s, retain_graph=True)
            for lag in (0, 1):
                for t in range(STEPS - lag):
                    G[lag] += probability / (CASES * STEPS) * torch.outer(g[t + lag], g[t])
    for gate, block in enumerate(blocks):
        rows = slice(gate * H, (gate + 1) * H)
        for lag in (0, 1):
            torch.testing.assert_close(approximations.factor(block.A, lag), A[lag], rtol=1e-10, atol=1e-14)
            torch.testing.assert_close(approximations.factor(block.G, lag), G[lag][rows, rows], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("vocabulary", [3, 11])
def test_the_root_of_a_softmax_is_that_of_the_second_derivative_of_its_log_loss(vocabulary: int) -> None:
    language = problems.Language("sticky", 0)
    language.model.softmax = nn.Linear(H, vocabulary).double()
    y = random(2, 1, H)
    for h, root in zip(y[:, 0], language.roots(y)[:, 0], strict=True):
        hessian = torch.autograd.functional.hessian(lambda h: language.model.softmax(h).logsumexp(0), h)
        torch.testing.assert_close(root @ root.mT, hessian, rtol=1e-10, atol=1e-14)


def test_the_fisher_of_a_dnc_is_the_sum_over_predicted_bits_of_variance_times_squared_gradient() -> None:
    copy = problems.RepeatedCopy(0)
    config = problems.layout(1, 1)
    whole = problems.every_pattern(config)
    batch = problems.repeat_copy.Batch(whole.inputs[:, 5:7], whole.targets[:, 5:7], whole.mask[:, 5:7], None, 0)
    model, expected = copy.model, {}
    for case in range(2):
        logits = model(batch.inputs[:, case : case + 1])
        for logit in logits[batch.mask[:, case]].flatten():
            weights = (model.controller_weight, model.controller_bias, model.interface_weight, model.interface_bias)
            W, b, W_interface, b_interface = torch.autograd.grad(logit, weights, retain_graph=True)
            p = logit.sigmoid().item()
            for name, DW, rows in (
                ("f", torch.cat([W, b[:, None]], 1), slice(12, 24)),
                ("erase_vectors", torch.cat([W_interface, b_interface[:, None]], 1), slice(4, 8)),
            ):
                outer = p * (1 - p) / 2 * torch.outer(vec(DW[rows]), vec(DW[rows]))
                expected[name] = expected.get(name, 0) + outer
    found = {scores.name: exact.enumerated_block(scores) for scores in exact.enumerate_scores(copy, batch)}
    for name, fisher in expected.items():
        torch.testing.assert_close(found[name].fisher, fisher, rtol=1e-9, atol=1e-14)


def test_the_first_steps_are_the_shorter_sequence(language: Any, blocks: list[Any]) -> None:
    for block, scores in zip(blocks, exact.enumerate_scores(language, symbols(STEPS + 2)), strict=True):
        beginning = exact.enumerated_block(scores.prefix(STEPS))
        for M, expected in zip(beginning[1:4], block[1:4], strict=True):
            torch.testing.assert_close(M, expected, rtol=1e-10, atol=1e-14)


def test_of_all_inputs_there_is_nothing_left_to_estimate_and_of_some_the_standard_error_is_known() -> None:
    (batch,) = problems.RepeatedCopy(0).fixed(4)[9]
    assert len({tuple(case.flatten().tolist()) for case in batch.inputs.unbind(1)}) == 64 == batch.cases
    parts = [random_block()._replace(fisher=torch.full((6, 6), value).double()) for value in (1.0, 2.0, 6.0)]
    assert exact.mean_block(parts[:1]).noise == 0
    assert exact.mean_block(parts).noise == pytest.approx(statistics.stdev((1, 2, 6)) / math.sqrt(3) / 3)


# --------------------------------------------------------------------------------------------- one assumption at a time


def test_every_assumption_on_a_linear_network_of_three_steps_is_what_a_pencil_says() -> None:
    """s_t = w s_{t−1} + v x_t, x_t = ±1, targets N(s_t, 1): g_t^u = w^{u−t}, the same in every case."""
    w, v, T = 0.5, 0.8, 3
    x = torch.tensor([*itertools.product((-1.0, 1.0), repeat=T)]).double().mT

    def unrolled(W: Tensor) -> Tensor:
        s, steps = torch.zeros(8).double(), []
        for x_t in x:
            s = W[0] * s + W[1] * x_t
            steps.append(s)
        return torch.stack(steps)

    J = torch.autograd.functional.jacobian(unrolled, torch.tensor([w, v]).double())
    s = torch.cat([torch.zeros(1, 8).double(), unrolled(torch.tensor([w, v]).double())[:-1]])
    g = torch.tensor([[w ** (u - t) if t <= u else 0.0 for t in range(T)] for u in range(T)]).double()
    scores = exact.Scores("s", torch.stack([s, x], -1), g[:, :, None, None].expand(T, T, 8, 1), torch.arange(T))
    block = exact.enumerated_block(scores)
    torch.testing.assert_close(block.fisher, torch.einsum("ubi,ubj->ij", J, J) / 8)
    found = approximations.approximations(block, 1e-300)
    torch.testing.assert_close(found["independent"], block.fisher)
    # For v alone: E x_t x_s = 1 if t = s, so that nothing is left of lags; G_tt is 1 + w² + w⁴, 1 + w², 1.
    assert block.fisher[1, 1].item() == pytest.approx(3 + 2 * w**2 + w**4)
    for name in ("homogeneous", "one_divisor", "indep"):
        assert found[name][1, 1].item() == pytest.approx(3 + 2 * w**2 + w**4)
    # For w: A_ts is v² times [0, 0, 0; 0, 1, w; 0, w, 1 + w²], and G_10 = w + w³, G_21 = w, G_20 = w².
    A = v * v * torch.tensor([[0, 0, 0], [0, 1, w], [0, w, 1 + w * w]]).double()
    G = (g.mT @ g).double()
    lags = [((T - d) * A.diagonal(-d).mean() * G.diagonal(-d).mean() * (1 if d == 0 else 2)).item() for d in range(T)]
    assert found["homogeneous"][0, 0].item() == pytest.approx(sum(lags))
    shrunk = [value * ((T - d) / T) ** 2 for d, value in enumerate(lags)]
    assert found["one_divisor"][0, 0].item() == pytest.approx(sum(shrunk))


def test_homogeneity_costs_nothing_where_the_moments_depend_on_the_lag_alone() -> None:
    block = block_of_lags([*random(4, 3, 3)], [*random(4, 2, 2, seed=2)])
    independent = sum(torch.kron(block.A[t, :, s], block.G[t, :, s]) for t, s in itertools.product(range(4), repeat=2))
    homogeneous = approximations.sum_over_lags(block, 0.0, approximations.mean)
    torch.testing.assert_close(homogeneous, independent, rtol=1e-12, atol=1e-12)


def test_the_chain_costs_nothing_where_what_is_estimated_at_every_lag_follows_from_lag_one() -> None:
    A0, G0, Psi_A, Psi_G = 3 * torch.eye(3), 2 * torch.eye(2), random(3, 3), random(2, 2, seed=2)
    lags = [
        [4 / (4 - d) * torch.linalg.matrix_power(0.3 * Psi, d) @ M0.double() for d in range(4)]
        for M0, Psi in ((A0, Psi_A), (G0, Psi_G))
    ]
    block = block_of_lags(*lags)
    expected = approximations.sum_over_lags(block, 0.0, approximations.factor)
    torch.testing.assert_close(approximations.lggm(block, 0.0), expected, rtol=1e-12, atol=1e-12)
    assert all(row["chain"] < 1e-12 and row["homogeneity"] < 1e-12 for row in measures.lags(block, 0.0))


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("approximation", ["indep", "option1", "option2", "lggm"])
def test_a_dense_approximation_is_the_inverse_of_the_written_out_equation(approximation: str, damping: float) -> None:
    block, steps = random_block(), 4
    fisher = (
        approximations.lggm(block, damping)
        if approximation == "lggm"
        else approximations.of_library(approximation, block, damping)
    )
    factors = [approximations.factor(M, lag) for M in (block.A, block.G) for lag in (0, 1)]
    Z = random(2, 3, seed=3)
    x = dense.multiply(approximation, *factors, Z, lengths={steps: 1.0}, damping=damping)
    torch.testing.assert_close(fisher @ vec(x), vec(Z), rtol=1e-8, atol=1e-8)


def test_nothing_is_wrong_with_independence_where_the_scores_do_not_depend_on_the_case() -> None:
    g = random(7, 4, 1, 2, seed=2).expand(7, 4, 5, 2)
    block = exact.enumerated_block(exact.Scores("any", random(4, 5, 3), g, torch.zeros(7)))
    torch.testing.assert_close(approximations.independent(block, 0.0), block.fisher, rtol=1e-12, atol=1e-12)


def test_damping_of_the_independent_sum_is_that_of_the_factors_at_every_step() -> None:
    block, damping = random_block(), 0.3
    A0, G0 = (approximations.factor(M, 0).numpy() for M in (block.A, block.G))
    damped_A, damped_G = (torch.from_numpy(M) for M in dense.damped_factors(A0, G0, damping))
    added_A, added_G = damped_A - approximations.factor(block.A, 0), damped_G - approximations.factor(block.G, 0)
    expected = torch.zeros(6, 6).double()
    for t, s in itertools.product(range(4), repeat=2):
        extra_A, extra_G = (added_A, added_G) if t == s else (0, 0)
        expected += torch.kron(block.A[t, :, s] + extra_A, block.G[t, :, s] + extra_G)
    torch.testing.assert_close(approximations.independent(block, damping), expected, rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------------------------- the measures


def test_kl_is_that_of_gaussians_whose_precisions_are_given() -> None:
    roots = random(2, 5, 9, seed=4)
    F0, F1 = roots @ roots.mT
    p, q = (torch.distributions.MultivariateNormal(torch.zeros(5).double(), precision_matrix=M) for M in (F0, F1))
    found = measures.kl_divergences(measures.relative_spectrum(F1, F0))
    expected = [torch.distributions.kl_divergence(*pair).item() / 5 for pair in ((p, q), (q, p))]
    assert found == pytest.approx(expected, rel=1e-10)


def test_the_spectrum_says_how_many_times_too_long_a_step_is_along_its_direction() -> None:
    exact_fisher, approximate = torch.diag(torch.tensor([6.0, 1.0, 8.0])), torch.diag(torch.tensor([3.0, 4.0, 8.0]))
    torch.testing.assert_close(measures.relative_spectrum(exact_fisher, approximate), torch.tensor([0.25, 1.0, 2.0]))
    mixed = random(3, 3)
    found = measures.relative_spectrum(
        mixed @ exact_fisher.double() @ mixed.mT, mixed @ approximate.double() @ mixed.mT
    )
    torch.testing.assert_close(found, torch.tensor([0.25, 1.0, 2.0]).double())  # the same in any coordinates


def test_the_best_scale_takes_away_a_wrong_scale_and_nothing_else() -> None:
    M, N = random(2, 4, 4)
    assert measures.sine(3 * M, M) == pytest.approx(0, abs=1e-7)
    least = min(((0.001 * k * M - N).norm() / N.norm()).item() for k in range(-2000, 2000))
    assert measures.sine(M, N) == pytest.approx(least, abs=1e-5)


def test_chains_are_correlated_over_steps_as_their_names_say() -> None:
    generator = torch.Generator().manual_seed(5)
    share = {}
    for source in problems.CHAINS:
        tokens = problems.chain(source, 30, 200, generator)
        now, then = tokens[1:], tokens[:-1]
        agree = {"sticky": now == then, "alternating": now // 2 != then // 2, "rotating": now == (then + 1) % 4}[source]
        share[source] = agree.double().mean().item()
    # 0.64 of the pairs are free of noise, the others agree by chance: 0.64·0.85 + 0.36/4 and 0.64·0.9 + 0.36/2.
    assert share == pytest.approx({"sticky": 0.634, "alternating": 0.756, "rotating": 0.634}, abs=0.02)


# ------------------------------------------------------------------------------------------- what is written and said


def test_the_script_writes_what_its_command_says_and_reads_nothing_into_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(problems.Language, "lengths", (3, 6))
    monkeypatch.setattr(problems.Language, "train", lambda self, updates: None)
    argv = ["--problems", "sticky", "--seeds", "7", "--batches", "2", "--training-seeds", "0", "--out", str(tmp_path)]
    study.main(argv)
    text = (tmp_path / "fisher_distance.md").read_text()
    assert "`python scripts/fisher_distance.py " + " ".join(argv) in text
    assert report.READING not in text
    rows = tables.read(tmp_path / "fisher_distance.csv")
    assert len(rows) == 3 * 4 * (1 + 3) * 8  # stages, gates, dampings at T = 3 and at T = 6, approximations
    assert all(0 <= row["frobenius"] < math.inf and 0 < row["noise"] < 1 for row in rows)
    defined = [row for row in rows if row["approximation"] not in measures.INDEFINITE]
    assert all(0 < row["mu_min"] <= row["mu_95"] <= row["mu_max"] < math.inf for row in defined)
    assert (tmp_path / "fisher_distance.svg").read_text().startswith("<?xml")


def test_the_committed_tables_are_those_of_the_committed_numbers() -> None:
    parts = [tables.read(ROOT / "results" / f"fisher_distance{part}.csv") for part in ("", "_lags", "_training")]
    lines = [*report.lines(*parts, "python scripts/fisher_distance.py", whole=True)]
    of_this_study = lines[: lines.index("## Stored runs")]
    assert (ROOT / "results" / "fisher_distance.md").read_text().startswith("\n".join(of_this_study))


LSTMS, DNC = (*problems.CHAINS, "characters"), "copy"


class Committed:
    """Medians of the committed numbers, at the longest T where none is said."""

    def __init__(self) -> None:
        self.rows = tables.read(ROOT / "results" / "fisher_distance.csv")
        self.lags = tables.read(ROOT / "results" / "fisher_distance_lags.csv")
        self.T = {name: max(row["T"] for row in self.rows if row["problem"] == name) for name in problems.NAMES}

    def values(
        self, name: str, stage: str, approximation: str, column: str, at: float = 0.01, T: int = 0
    ) -> list[float]:
        key = (name, stage, approximation, at, T or self.T[name])
        found = ("problem", "stage", "approximation", "damping", "T")
        return [row[column] for row in self.rows if tuple(row[part] for part in found) == key]

    def median(self, *key: Any, **more: Any) -> float:
        return statistics.median(self.values(*key, **more))

    def gains(self, names: Any, stage: str, column: str, **more: Any) -> list[float]:
        """What options 1 and 2 take away of indep's, in per cent."""
        return [
            100
            * (1 - self.median(name, stage, option, column, **more) / self.median(name, stage, "indep", column, **more))
            for name in names
            for option in ("option1", "option2")
        ]

    def lag(self, name: str, side: str, lag: int, column: str) -> float:
        key = (name, "after", side, lag)
        found = ("problem", "stage", "side", "lag")
        return statistics.median(row[column] for row in self.lags if tuple(row[part] for part in found) == key)


@pytest.fixture(scope="module")
def committed() -> Committed:
    return Committed()


def extremes(values: Any, digits: int = 0) -> tuple[float, float]:
    ordered = sorted(values)
    return round(ordered[0], digits), round(ordered[-1], digits)


def test_the_reading_of_the_distances_is_true_of_the_committed_numbers(committed: Committed) -> None:
    gains = committed.gains
    assert extremes(gains(LSTMS, "before", "frobenius")) == (31, 46)
    assert extremes(gains([DNC], "before", "frobenius")) == (67, 72)
    assert extremes(gains(problems.NAMES, "before", "scaled")) == (12, 33)
    assert extremes(gains(LSTMS, "before", "kl_approximate_exact")) == (2, 6)
    assert extremes(gains([DNC], "before", "kl_approximate_exact")) == (19, 21)
    assert round(max(gains(problems.NAMES, "before", "kl_exact_approximate"))) == 2
    for T in (6, 12, 35):
        assert max(map(abs, gains(LSTMS, "after", "frobenius", T=T))) < 3
    for column in ("frobenius", "scaled"):
        assert max(map(abs, gains(problems.NAMES, "after", column))) < 3
    assert max(max(gains(problems.NAMES, "after", "kl_approximate_exact", at=at)) for at in study.DAMPINGS) < 5
    assert extremes(gains([DNC], "after", "kl_exact_approximate")) == (-13, -8)
    errors = {
        x: [error for name in problems.NAMES for error in committed.values(name, "after", x, "frobenius")]
        for x in ("indep", "option1", "option1_abs", "option2")
    }
    farther = {x: [e > base for e, base in zip(errors[x], errors["indep"], strict=True)] for x in errors}
    nearer = {x: [e < base for e, base in zip(errors[x], errors["indep"], strict=True)] for x in errors}
    assert len(errors["indep"]) == 75
    assert (sum(nearer["option1"]), sum(nearer["option2"]), sum(farther["option1_abs"])) == (38, 42, 59)
    for name in problems.NAMES:
        lengths = sorted({row["T"] for row in committed.rows if row["problem"] == name})
        by_length = [min(gains([name], "before", "frobenius", T=T)) for T in lengths]
        assert name == DNC or by_length == sorted(by_length)
        option1, with_abs = (committed.median(name, "after", x, "frobenius") for x in ("option1", "option1_abs"))
        assert with_abs > option1


def test_the_reading_of_the_assumptions_is_true_of_the_committed_numbers(committed: Committed) -> None:
    def moved(approximation: str) -> tuple[float, float]:
        return extremes((committed.median(name, "after", approximation, "step") for name in LSTMS), 2)

    assert extremes((committed.median(name, "after", "independent", "frobenius") for name in LSTMS), 2) == (0.65, 1.01)
    for approximation, most in (("homogeneous", 0.01), ("lggm", 0.04), ("option1", 0.09), ("option2", 0.01)):
        assert moved(approximation)[1] == most
    assert moved("indep") == (0.10, 0.25)
    assert [round(committed.median(DNC, stage, "independent", "frobenius"), 2) for stage in report.STAGES] == [
        0.06,
        0.24,
        0.44,
    ]
    assert round(committed.median(DNC, "after", "homogeneous", "frobenius"), 2) == 0.92
    assert round(committed.lag(DNC, "g", 0, "homogeneity"), 1) == 2.7
    assert extremes((committed.lag(name, "g", 0, "homogeneity") for name in LSTMS), 2) == (0.09, 0.24)
    assert extremes((100 * committed.lag(name, "g", 2, "chain") for name in problems.NAMES), 0) == (35, 90)
    assert extremes((100 * committed.lag(name, "g", 2, "size") for name in problems.NAMES), 0) == (3, 14)
    assert extremes((100 * committed.lag(name, "a", 2, "chain") for name in problems.NAMES), 0) == (4, 12)
    for at, expected in ((1e-4, (102, 3902)), (1.0, (5, 10))):
        spreads = [
            statistics.median(
                high / low
                for low, high in zip(
                    *(committed.values(name, "after", x, mu, at=at) for mu in ("mu_05", "mu_95")), strict=True
                )
            )
            for name in problems.NAMES
            for x in ("indep", "lggm", "option1", "option1_abs", "option2")
        ]
        assert extremes(spreads) == expected
    assert round(1e-3 / committed.median("characters", "after", "indep", "unit"), 2) == 0.12
    assert [round(x / committed.median(DNC, "after", "indep", "unit"), 3) for x in (1e-5, 3e-5)] == [0.001, 0.002]


def test_the_reading_of_the_training_is_true_of_the_stored_curves() -> None:
    def at(experiment: str, update: int) -> list[tuple[float, float, float]]:
        """Median and band of indep, option 1 and option 2."""
        rows = csv.DictReader((ROOT / "results" / "figures" / f"{experiment}.csv").open())
        chosen = {row["line"]: row for row in rows if row["panel"] == "updates" and float(row["x"]) == update}
        lines = ("K-FAC indep", "K-FAC option 1", "K-FAC option 2")
        return [tuple(float(chosen[line][key]) for key in report.BAND) for line in lines]

    runs = tables.read(ROOT / "results" / "fisher_distance_training.csv")
    for settings in training.SETTINGS:
        here = [run for run in runs if (run["settings"], run["update"]) == (settings, 100)]
        indep, *options = ([run["nats"] for run in here if run["approximation"] == x] for x in training.APPROXIMATIONS)
        assert round(statistics.median(indep), 1) in (30.3, 30.5)
        for option in options:
            assert 24.35 < statistics.median(option) < 26.55
            assert sum(a < b for a, b in zip(option, indep, strict=True)) in (5, 6)
    for experiment in ("dnc_defaults", "figure3"):
        indep, *options = at(experiment, 100)
        assert round(indep[0], 1) in (27.0, 29.2)
        assert all(25.35 < option[0] < 31.75 for option in options)
        assert min(options)[0] < indep[0]
        indep, *options = at(experiment, 300)
        assert max(middle for middle, _, _ in (indep, *options)) < 1
        assert all(option[0] > indep[0] / 1.21 for option in options)
    for update in report.UPDATES:
        indep, *options = at("char_defaults", update)
        assert all(abs(option[0] - indep[0]) <= 0.02 * indep[0] for option in options)


def test_the_page_of_results_has_the_committed_numbers(committed: Committed) -> None:
    page = (ROOT / "docs" / "results.md").read_text()
    for label, name in (
        ("LSTM, alternating chain", "alternating"),
        ("LSTM, characters", "characters"),
        ("DNC, repeated copy", DNC),
    ):
        cells = [
            " → ".join(f"{committed.median(name, stage, x, 'frobenius'):.2f}" for stage in ("before", "after"))
            for x in ("indep", "option1", "option1_abs", "option2", "independent")
        ]
        assert f"| {label} | " + " | ".join(cells) + " |" in page


def test_every_approximation_is_trained_on_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "UPDATES", (1,))
    monkeypatch.setattr(
        training.repeat_copy.RepeatCopy, "evaluate", lambda task, model, split: task.generator.get_state().sum().item()
    )
    stands = [list(training.train(x, training.SETTINGS["of indep"], 3)) for x in training.APPROXIMATIONS]
    assert stands[0] == stands[1] == stands[2]
