#!/usr/bin/env python3
"""Which optimiser generalises best on words, with dropout, weight decay and early stopping tuned alike, and how fast.

    kfacrnn sweep generalisation && python scripts/generalisation.py

evaluates every confirmed run on the test set, with the parameters of its best validation (kept beside the run, so once
is enough), and writes results/generalisation.md. `kfacrnn figure generalisation` draws the curves.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from kfacrnn import experiment
from kfacrnn.discovery import command
from kfacrnn.drawing import write_files
from kfacrnn.errors import UserError
from kfacrnn.evaluate import EVALUATION, best_update, evaluate
from kfacrnn.plan import Plan, PlannedRun
from kfacrnn.tables import markdown
from kfacrnn.units import from_nats

NAME = "generalisation"
PUBLISHED = (86.2, 82.7)
"""Perplexities on validation and test set of the medium model of W. Zaremba, I. Sutskever, O. Vinyals, "Recurrent
Neural Network Regularization", 2014, table 1: of the same size, trained for 39 epochs of batch 20."""


class Result(NamedTuple):
    """Of one run: perplexities at its best validation, and when that was."""

    update: int
    valid: float
    test: float


def result(run: PlannedRun, results: str, root: str | None) -> Result:
    update = best_update(run.folder)
    known = run.folder.read_json(EVALUATION).get("best", {})
    if known.get("update") != update or "test/metric" not in known:
        print(evaluate(run.run.run_id, results=results, root=root))
        known = run.folder.read_json(EVALUATION)["best"]
    convert = from_nats(run.folder.task()["metric"])
    valid = dict(zip(*run.columns(["update", "valid/nats"]).values(), strict=True))[update]
    return Result(update, convert(valid), known["test/metric"])


def page(plan: Plan, results: dict[str, list[Result]]) -> str:
    rows = []
    for line, found in results.items():
        winner = plan.winner(line)
        chosen = ", ".join(f"{key} {value:g}" for key, value in winner.point.choice.items()) if winner else ""
        updates = " ".join(str(result.update) for result in found)
        rows.append(
            (line, chosen, each(result.valid for result in found), each(result.test for result in found), updates)
        )
    valid, test = PUBLISHED
    return f"""\
# Generalisation on words

Made by `python scripts/generalisation.py` from the runs of `experiments/generalisation.yaml`.
{plan.experiment.description}. Perplexities: the median over seeds, and each seed.

{markdown(("line", "chosen", "best validation", "test", "at update"), rows)}

Zaremba et al. (2014) publish {valid} and {test} for a model of this size after 39 epochs of batch 20, {gap(results)}.
"""


def each(values: Iterable[float]) -> str:
    found = sorted(values)
    return f"{statistics.median(found):.1f} ({', '.join(f'{value:.1f}' for value in found)})"


def gap(results: dict[str, list[Result]]) -> str:
    """How far the best line is from what is published."""
    medians = {
        line: [statistics.median(getattr(result, key) for result in found) for key in ("valid", "test")]
        for line, found in results.items()
    }
    best = min(medians, key=lambda line: medians[line])
    differences = [here - there for here, there in zip(medians[best], PUBLISHED, strict=True)]
    return f"from which {best} is {differences[0]:+.1f} and {differences[1]:+.1f} away"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default="results", metavar="DIR", help="the result store (default results)")
    parser.add_argument("--root", metavar="DIR", help="folder of the corpus (default: the runs')")
    options = parser.parse_args(arguments)
    plan = Plan(experiment.load(NAME), options.results)
    try:
        finished = {line: [run for run in plan.confirmation(line) if run.finished] for line in plan.lines}
        found = {
            line: [result(run, options.results, options.root) for run in runs]
            for line, runs in finished.items()
            if runs
        }
        if not found:
            sweep = command("sweep", NAME, results=options.results)
            raise UserError(f"{NAME} has no finished run in {options.results}; {sweep}")
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(*write_files({"md": page(plan, found).encode()}, Path(options.results) / plan.experiment.name), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
