"""The maths of `scripts/fisher_distance.py`, against enumeration of every target sequence, one case at a time."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import math
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.kfac import dense

ROOT = Path(__file__).parents[1]
H, STEPS, CASES = 6, 3, 2


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fisher_distance", ROOT / "scripts" / "fisher_distance.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


study = _script()


def vec(M: Tensor) -> Tensor:
    return M.mT.flatten()


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return study.LanguageModel().double()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.tensor([[0, 3], [2, 3], [1, 0]])


@pytest.fixture(scope="module")
def blocks(model: Any, tokens: Tensor) -> list[Any]:
    a, g = study.enumerate_scores(model, tokens)
    return [study.enumerated_block(a, gate) for gate in g.split(H, -1)]


def random_block(steps: int = 4, n: int = 3, m: int = 2) -> Any:
    """Factors of series that are correlated over time; what is used of it is A and G alone."""
    generator = torch.Generator().manual_seed(1)
    a, g = (torch.randn(1, steps, 40, size, generator=generator, dtype=torch.float64) for size in (n, m))
    a, g = a.cumsum(1), g - 0.7 * g.roll(1, 1)
    return study.Block(torch.eye(n * m).double(), study.second_moments(a), study.second_moments(g))


class Walk:
    """One case of the model, step by step: log-probabilities, and a_t and s_t of the LSTM."""

    def __init__(self, model: Any, tokens: Tensor):
        p = dict(model.named_parameters())
        W = torch.cat([p["lstm.weight_ih_l0"], p["lstm.weight_hh_l0"]], 1)
        b = p["lstm.bias_ih_l0"] + p["lstm.bias_hh_l0"]
        h, c = torch.zeros(2, H).double()
        self.a, self.s, self.log_p = [], [], []
        for token in tokens:
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


def test_the_fisher_is_the_mean_over_every_sequence_of_targets_of_the_squared_gradient(
    model: Any, tokens: Tensor, blocks: list[Any]
) -> None:
    expected = [torch.zeros(60, 60).double() for _ in blocks]
    plain = nn.LSTM(3, H).double()
    plain.load_state_dict(model.lstm.state_dict())
    for case in range(CASES):
        h = plain(model.embedding(tokens[:, case]).detach())[0]
        log_p = model.softmax(h).log_softmax(-1)
        for targets in itertools.product(range(4), repeat=STEPS):
            log_likelihood = log_p[range(STEPS), targets].sum()
            W_x, W_h, b_x, _ = torch.autograd.grad(log_likelihood, list(plain.parameters()), retain_graph=True)
            for F, DW in zip(expected, torch.cat([W_x, W_h, b_x[:, None]], 1).split(H), strict=True):
                F += log_likelihood.exp().item() / CASES * torch.outer(vec(DW), vec(DW))
    for F, block in zip(expected, blocks, strict=True):
        torch.testing.assert_close(block.fisher, F, rtol=1e-10, atol=1e-14)


def test_the_factors_are_means_over_every_sequence_of_targets_with_one_divisor(
    model: Any, tokens: Tensor, blocks: list[Any]
) -> None:
    A = [torch.zeros(10, 10).double() for _ in range(2)]
    G = [torch.zeros(24, 24).double() for _ in range(2)]
    for case in range(CASES):
        walk = Walk(model, tokens[:, case])
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
            torch.testing.assert_close(study.factor(block.A, lag), A[lag], rtol=1e-10, atol=1e-14)
            torch.testing.assert_close(study.factor(block.G, lag), G[lag][rows, rows], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("approximation", ["indep", "option1", "option2", "lggm"])
def test_a_dense_approximation_is_the_inverse_of_the_written_out_equation(approximation: str, damping: float) -> None:
    block, steps = random_block(), 4
    F = study.lggm(block, damping) if approximation == "lggm" else study.of_library(approximation, block, damping)
    factors = [study.factor(M, lag) for M in (block.A, block.G) for lag in (0, 1)]
    Z = torch.randn(2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = dense.multiply(approximation, *factors, Z, lengths={steps: 1.0}, damping=damping)
    torch.testing.assert_close(F @ vec(x), vec(Z), rtol=1e-8, atol=1e-8)


def test_nothing_is_wrong_with_independence_where_the_scores_do_not_depend_on_the_case() -> None:
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(4, 5, 3, generator=generator, dtype=torch.float64)
    g = torch.randn(7, 4, 1, 2, generator=generator, dtype=torch.float64).expand(7, 4, 5, 2)
    block = study.enumerated_block(a, g)
    torch.testing.assert_close(study.a_g_independent(block, 0.0), block.fisher, rtol=1e-12, atol=1e-12)


def test_damping_of_the_independent_sum_is_that_of_the_factors_at_every_step() -> None:
    block, damping = random_block(), 0.3
    A0, G0 = (study.factor(M, 0).numpy() for M in (block.A, block.G))
    damped_A, damped_G = (torch.from_numpy(M) for M in dense.damped_factors(A0, G0, damping))
    added_A, added_G = damped_A - study.factor(block.A, 0), damped_G - study.factor(block.G, 0)
    expected = torch.zeros(6, 6).double()
    for t, s in itertools.product(range(4), repeat=2):
        extra_A, extra_G = (added_A, added_G) if t == s else (0, 0)
        expected += torch.kron(block.A[t, :, s] + extra_A, block.G[t, :, s] + extra_G)
    torch.testing.assert_close(study.a_g_independent(block, damping), expected, rtol=1e-12, atol=1e-12)


def test_kl_is_that_of_gaussians_whose_precisions_are_given() -> None:
    roots = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    precisions = roots @ roots.mT
    p, q = (torch.distributions.MultivariateNormal(torch.zeros(5).double(), precision_matrix=F) for F in precisions)
    assert study.kl(*precisions) == pytest.approx(torch.distributions.kl_divergence(p, q).item() / 5, rel=1e-10)


def test_sources_are_correlated_over_steps_as_their_names_say() -> None:
    generator = torch.Generator().manual_seed(5)
    share = {}
    for source in study.SOURCES:
        tokens = study.sequences(source, 30, 200, generator)
        now, then = tokens[1:], tokens[:-1]
        agree = {"sticky": now == then, "alternating": now // 2 != then // 2, "rotating": now == (then + 1) % 4}[source]
        share[source] = agree.double().mean().item()
    # 0.64 of the pairs are free of noise, the others agree by chance: 0.64·0.85 + 0.36/4 and 0.64·0.9 + 0.36/2.
    assert share == pytest.approx({"sticky": 0.634, "alternating": 0.756, "rotating": 0.634}, abs=0.02)


def test_the_script_writes_what_its_command_says_and_reads_nothing_into_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    out = tmp_path / "study"
    argv = ["--seeds", "7", "--steps", "6", "--sequences", "16", "--updates", "2", "--out", str(out)]
    study.main(argv)
    text = out.with_suffix(".md").read_text()
    assert "`python scripts/fisher_distance.py " + " ".join(argv) in text
    assert study.READING not in text
    rows = list(csv.DictReader(out.with_suffix(".csv").open()))
    assert len(rows) == 3 * 2 * 4 * 2 * 6  # sources, models, gates, dampings, approximations
    for column in ("frobenius", "kl_approximate_exact", "kl_exact_approximate"):
        assert all(0 <= float(row[column]) < math.inf for row in rows)


def test_the_reading_says_what_the_committed_numbers_say() -> None:
    rows = list(csv.DictReader((ROOT / "results" / "fisher_distance.csv").open()))
    assert study.READING in (ROOT / "results" / "fisher_distance.md").read_text()

    def medians(model: str, column: str, damping: str = "0") -> dict[tuple[str, str], dict[str, float]]:
        """By source and T, then by approximation."""
        chosen = [row for row in rows if row["model"] == model and row["damping"] == damping]
        return {
            key: {
                name: statistics.median(
                    float(row[column])
                    for row in chosen
                    if (row["source"], row["T"], row["approximation"]) == (*key, name)
                )
                for name in study.COLUMNS
            }
            for key in dict.fromkeys((row["source"], row["T"]) for row in chosen)
        }

    def gains(table: dict[tuple[str, str], dict[str, float]]) -> list[float]:
        """What options 1 and 2 take away from indep's, in per cent."""
        return [100 * (1 - row[name] / row["indep"]) for row in table.values() for name in ("option1", "option2")]

    def extremes(values: list[float]) -> tuple[int, int]:
        return round(min(values)), round(max(values))

    before, after = medians("init", "frobenius"), medians("trained", "frobenius")
    assert extremes(gains(before)) == (30, 47)
    assert extremes(gains({key: row for key, row in after.items() if key[0] == "sticky"})) == (2, 5)
    assert extremes(gains({key: row for key, row in after.items() if key[0] != "sticky"})) == (-14, -2)
    for table in (before, after):
        for row in table.values():
            assert abs(row["option2"] - row["lggm"]) < 0.025
            assert row["option1"] - row["lggm"] < 0.075
            assert row["option1_abs"] > row["option1"]
            assert row["a_g_independent"] > row["indep"] * 0.97 or table is before
    assert min(row["option1_abs"] for key, row in after.items() if key[0] == "alternating") > 1
    alternating = [
        row for row in rows if (row["source"], row["model"], row["damping"]) == ("alternating", "trained", "0")
    ]
    errors = {
        name: [float(row["frobenius"]) for row in alternating if row["approximation"] == name] for name in study.COLUMNS
    }
    assert all(e_abs > e for e_abs, e in zip(errors["option1_abs"], errors["indep"], strict=True))
    assert extremes(gains(medians("init", "kl_approximate_exact"))) == (14, 29)
    for model in ("init", "trained"):
        assert min(gains(medians(model, "kl_approximate_exact"))) > 0
        assert max(gains(medians(model, "kl_approximate_exact", "0.01"))) < 6.5
        assert max(gains(medians(model, "kl_exact_approximate"))) < 0.5
