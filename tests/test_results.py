"""The tables of docs/results.md say what the stored runs say: every number again, from their metrics.
What a figure was drawn from is stored."""

from __future__ import annotations

import csv
import functools
import json
import math
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kfacrnn import config, experiment
from kfacrnn.plan import Plan
from kfacrnn.selection import read_config
from kfacrnn.store import Store

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "results.md").read_text()
Rows = list[dict[str, str]]


def table(header: str) -> dict[str, list[str]]:
    """Of the table whose first line begins with `header`: the cells of every line, by its first one."""
    (lines,) = re.findall(rf"^\| {re.escape(header)}.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()]
    return {first: rest for first, *rest in cells}


@functools.cache
def plan_of(name: str) -> Plan:
    return Plan(experiment.load(name), str(ROOT / "results"))


def finished(name: str, line: str) -> Iterator[Rows]:
    """The rows of every run that the experiment's figure draws of a line, in the order of its seeds."""
    for planned in plan_of(name).confirmation(line):
        with (Path(planned.folder.path) / "metrics.csv").open() as file:
            yield list(csv.DictReader(file))


def mean(rows: Rows, first: int, last: int) -> float:
    """Nats over updates `first` to `last`; a row is about the ten updates up to its own, of equally many tokens."""
    found = [float(row["train/nats"]) for row in rows if row["train/nats"] and first + 9 <= int(row["update"]) <= last]
    assert len(found) == (last - first + 1) // 10
    return statistics.fmean(found)


def validation(rows: Rows) -> float:
    return [float(row["valid/nats"]) for row in rows if row["valid/nats"]][-1]


def bits(nats: float) -> str:
    return f"{nats / math.log(2):.2f}"


def perplexity(nats: float) -> str:
    return f"{math.exp(nats):.0f}"


@pytest.mark.parametrize(
    ("header", "name", "spans", "shown", "lines"),
    [
        (
            "bits per character, each seed",
            "char_defaults",
            [(141, 150), (491, 500)],
            bits,
            {"K-FAC indep", "K-FAC option 1", "K-FAC option 2", "SGD with momentum", "Adam"},
        ),
        (
            "perplexity, each seed",
            "word_defaults",
            [(51, 60), (191, 200)],
            perplexity,
            {"K-FAC indep", "K-FAC option 1", "K-FAC option 2", "Adam, 0.01"},
        ),
    ],
)
def test_language_models_as_shipped(
    header: str, name: str, spans: list[tuple[int, int]], shown: Callable[[float], str], lines: set[str]
) -> None:
    said = table(header)
    assert lines <= set(said)
    for line in lines:
        runs = list(finished(name, {"SGD with momentum": "SGD", "Adam, 0.01": "Adam"}.get(line, line)))
        found = [", ".join(shown(mean(rows, *span)) for rows in runs) for span in spans]
        assert said[line] == [*found, ", ".join(shown(validation(rows)) for rows in runs)], line


def test_the_dnc_as_shipped() -> None:
    said = table("nats per sequence (chance 33.3)")
    assert len(said) == 5
    for line, cells in said.items():
        runs = list(finished("dnc_defaults", line.replace("SGD with momentum", "SGD")))
        for (first, last), cell in zip([(451, 500), (951, 1000)], cells[:2], strict=True):
            below = sum(mean(rows, first, last) < 1 for rows in runs)
            assert cell.removesuffix(" seeds") == f"{below} of {len(runs)}", (line, last)
        firsts = [
            min((int(row["update"]) for row in rows if float(row["train/nats"] or "inf") < 1), default=math.inf)
            for rows in runs
        ]
        median = statistics.median(firsts)
        assert cells[2] == ("not reached" if math.isinf(median) else f"{median:.0f}"), line


def test_joint_gates() -> None:
    said = table("bits per character, median (range)")
    with (ROOT / "results" / "figures" / "gates_char.table.csv").open() as file:
        ratios = {row["line"]: float(row["updates_ratio"]) for row in csv.DictReader(file)}
    ends = {}
    for line, cells in said.items():
        assert cells[2] == f"{ratios[f'{line}, joint gates']:.2f}"
        for gates, cell in zip(("", ", joint gates"), cells[:2], strict=True):
            found = [mean(rows, 451, 500) / math.log(2) for rows in finished("gates_char", line + gates)]
            assert cell == f"{statistics.median(found):.3f} ({min(found):.3f}–{max(found):.3f})", line
            ends[line + gates] = found
    indep, *options = (ends[f"K-FAC {name}, joint gates"] for name in ("indep", "option 1", "option 2"))
    assert all(max(option) < min(indep) for option in options)


@pytest.mark.slow
def test_every_stored_run_has_the_identity_of_its_configuration_and_the_rows_of_its_budget() -> None:
    for folder in Store(ROOT / "results"):
        run = config.stored(read_config(folder))
        assert run.run_id == folder.run_id
        assert not folder.is_cut(run.budget)


@pytest.mark.parametrize("figure", sorted((ROOT / "results" / "figures").glob("*.json")), ids=lambda path: path.stem)
def test_every_run_that_a_figure_shows_is_stored(figure: Path) -> None:
    stored = {path.parent.name for path in (ROOT / "results" / "runs").glob("*/*/*/metrics.csv")}
    lines = json.loads(figure.read_text())["lines"]
    assert lines
    for line in lines:
        assert {run["run_id"] for run in line["runs"]} <= stored, line["line"]
