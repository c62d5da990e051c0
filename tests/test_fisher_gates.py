"""The parts of `scripts/fisher_gates.py` against dense matrices, and its page against its numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kfac import dense
from tests.scripts import script

RESULTS = Path(__file__).parents[1] / "results"

study, tables = script("fisher_gates"), script("fisher_study.tables")
problems, exact, gates, approximations = (
    script(f"fisher_study.{part}") for part in ("problems", "exact", "gates", "approximations")
)


@pytest.fixture(scope="module")
def layer() -> tuple[Any, list[Any]]:
    return gates.layer(problems.Language("sticky", 0), batches=1)


def between(whole: Any, fisher: Tensor, one: int, other: int) -> Tensor:
    """Rows of gate `one` and columns of gate `other` of a matrix over column-stacked weights of all gates."""
    n, M = whole.A.shape[1], whole.G.shape[1]
    rows, columns = ([c * M + r for c in range(n) for r in range(M) if r // (M // 4) == g] for g in (one, other))
    return fisher[rows][:, columns]


def test_what_is_exact_of_all_gates_is_exact_of_each(layer: tuple[Any, list[Any]]) -> None:
    whole, parts = layer
    assert len(parts) == 4
    for number, part in enumerate(parts):
        torch.testing.assert_close(between(whole, whole.fisher, number, number), part.fisher)
        torch.testing.assert_close(whole.A, part.A)
    assert between(whole, whole.fisher, 0, 2).norm() > 0.01 * whole.fisher.norm()
    inside = gates.within(whole, parts)
    for one in range(4):
        for other in range(4):
            wanted = parts[one].fisher if one == other else torch.zeros_like(parts[one].fisher)
            assert torch.equal(between(whole, inside, one, other), wanted)


@pytest.mark.parametrize("approximation", ["indep", "option1", "option2"])
def test_separate_gates_share_one_balance_and_know_nothing_of_one_another(
    layer: tuple[Any, list[Any]], approximation: str
) -> None:
    whole, parts = layer
    fisher = gates.separate(approximation, whole, parts, 1e-3)
    A0, A1 = (approximations.factor(whole.A, lag) for lag in (0, 1))
    mean_G = torch.stack([approximations.factor(part.G, 0).diagonal().mean() for part in parts]).mean()
    pi = (A0.diagonal().mean() / mean_G).sqrt().item()
    for number, part in enumerate(parts):
        G0, G1 = (approximations.factor(part.G, lag) for lag in (0, 1))
        Z = torch.randn(len(G0), len(A0), dtype=torch.float64)
        lengths = {len(whole.A): 1.0}
        moved = dense.multiply(approximation, A0, A1, G0, G1, Z, lengths=lengths, damping=1e-3, pi=pi)
        found = between(whole, fisher, number, number) @ moved.mT.flatten()
        torch.testing.assert_close(found, Z.mT.flatten(), rtol=1e-6, atol=1e-8)
        assert between(whole, fisher, number, (number + 1) % 4).norm() < 1e-9 * fisher.norm()


def test_one_gate_alone_is_measured_alike_as_separate_and_as_joint(layer: tuple[Any, list[Any]]) -> None:
    _, (part, *_) = layer
    separate, joint = (
        {key: value for key, value in row.items() if key != "gates"}
        for row in gates.distances(part, [part], 1e-2)
        if row["approximation"] == "option2"
    )
    assert separate == pytest.approx(joint, nan_ok=True)
    assert separate["between"] == 0


def test_the_page_says_what_the_numbers_say() -> None:
    page = (RESULTS / "fisher_gates.md").read_text()
    rows = tables.read(RESULTS / "fisher_gates.csv")
    assert {row["problem"] for row in rows} == set(study.PROBLEMS)
    assert "\n".join(study.table(rows)) in page
    assert len(re.findall(r"^\| \w+ \| (before|after) ", page, re.MULTILINE)) == 4 * 2 * 3
