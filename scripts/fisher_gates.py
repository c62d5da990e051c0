#!/usr/bin/env python3
"""What is lost where the gates of a layer are Fisher blocks of their own, and what do joint gates win?

On the LSTMs of fisher_distance.py, whose exact Fisher can be enumerated. Takes eight minutes on one thread, and the
Penn Treebank (KFACRNN_DATA).

    python scripts/fisher_gates.py                       results/fisher_gates.csv and .md
    python scripts/fisher_gates.py --problems sticky --seeds 1 --out /tmp/study
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from fisher_study import gates
from fisher_study.arguments import parser_of_study, untrained
from fisher_study.measures import Rows
from fisher_study.problems import CHAINS, Problem
from fisher_study.report import STAGES, USUAL
from fisher_study.tables import write

PROBLEMS = (*CHAINS, "characters")
COLUMNS = {"frobenius": "‖F̂ − F‖ / ‖F‖", "kl_approximate_exact": "KL(F̂⁻¹ ‖ F⁻¹)", "mu_max": "largest μ"}
HEADING = """\
# Joint gates, and gates that are blocks of their own, against the exact Fisher

Made by `{command}`, with fisher_gates.csv.

The LSTMs are those of [fisher_distance.md](fisher_distance.md), T and λ the usual ones there. F is the exact Fisher of
all gates of the layer together, F̂ the library's with separate gates → with joint ones; *between* is the norm of what
lies between gates, by ‖F‖. The largest eigenvalue μ of F̂^{{-1/2}} F F̂^{{-1/2}} says how many times too long a step is,
at worst. Medians over the seeds ({seeds}).
"""


def measure(studied: Problem, name: str, seed: int, batches: int) -> Iterator[dict[str, Any]]:
    trained = 0
    for stage, updates in zip(STAGES, studied.updates, strict=True):
        studied.train(updates - trained)
        trained = updates
        for row in gates.distances(*gates.layer(studied, batches), USUAL):
            yield {"problem": name, "stage": stage, "seed": seed, **row}


def table(rows: Rows) -> Iterator[str]:
    yield f"| problem | stage | between | approximation | {' | '.join(COLUMNS.values())} |"
    yield "|---" * (4 + len(COLUMNS)) + "|"
    for name, stage in itertools.product(dict.fromkeys(row["problem"] for row in rows), (STAGES[0], STAGES[-1])):
        here = [row for row in rows if (row["problem"], row["stage"]) == (name, stage)]
        between = statistics.median(row["between"] for row in here)
        for approximation in gates.APPROXIMATIONS:
            cells = [_cell(here, approximation, column) for column in COLUMNS]
            yield f"| {name} | {stage} | {between:.2f} | {approximation} | {' | '.join(cells)} |"


def _cell(rows: Rows, approximation: str, column: str) -> str:
    def median(how: str) -> float:
        return statistics.median(
            row[column] for row in rows if (row["approximation"], row["gates"]) == (approximation, how)
        )

    return f"{median('separate'):.2f} → {median('joint'):.2f}"


def main(argv: list[str]) -> None:
    parser = parser_of_study("Joint and separate gates against the exact Fisher of a layer.", PROBLEMS)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of both files (default: results)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    models = untrained("fisher_gates", arguments)
    rows = [row for key, model in models.items() for row in measure(model, *key, arguments.batches)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = write(arguments.out / "fisher_gates.csv", rows)
    heading = HEADING.format(
        command=" ".join(["python scripts/fisher_gates.py", *argv]), seeds=", ".join(map(str, arguments.seeds))
    )
    (arguments.out / "fisher_gates.md").write_text("\n".join([heading, *table(rows), ""]), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
