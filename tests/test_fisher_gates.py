"""The parts of `scripts/fisher_gates.py` against dense matrices, and its page against its numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.scripts import script

RESULTS = Path(__file__).parents[1] / "results"

study, tables = script("fisher_gates"), script("fisher_study.tables")
problems, exact, gates, approximations = (
    script(f"fisher_study.{part}") for part in ("problems", "exact", "gates", "approximations")
)


@pytest.fixture(scope="module")
def layer() -> tuple[Any, list[Any]]:
    return gates.layer(problems.Language("sticky", 0), batches=1)


def of_gate(whole: Any, fisher: torch.Tensor, one: int, other: int) -> torch.Tensor:
    """Rows of gate `one` and columns of gate `other` of a matrix over column-stacked weights of all gates."""
    n, M = whole.A.shape[1], whole.G.shape[1]
    index = [
        [column * M + row for column in range(n) for row in range(M) if row // (M // 4) == g] for g in (one, other)
    ]
    return fisher[index[0]][:, index[1]]


def test_what_is_exact_of_all_gates_is_exact_of_each(layer: tuple[Any, list[Any]]) -> None:
    whole, parts = layer
    assert len(parts) == 4
    for number, part in enumerate(parts):
        torch.testing.assert_close(of_gate(whole, whole.fisher, number, number), part.fisher)
        torch.testing.assert_close(whole.A, part.A)
    assert of_gate(whole, whole.fisher, 0, 2).norm() > 0.01 * whole.fisher.norm()


def test_separate_gates_know_nothing_between_them(layer: tuple[Any, list[Any]]) -> None:
    whole, parts = layer
    fishers = [approximations.of_library("option1", part, 1e-3) for part in parts]
    total = gates.assembled(whole, parts, fishers)
    for one in range(4):
        for other in range(4):
            found = of_gate(whole, total, one, other)
            assert torch.equal(found, fishers[one] if one == other else torch.zeros_like(found))


def test_gates_that_have_nothing_between_them_are_measured_alike(layer: tuple[Any, list[Any]]) -> None:
    """With one gate there is no difference, and as much between gates as with F of separate ones: nothing."""
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
