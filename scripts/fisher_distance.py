#!/usr/bin/env python3
"""How far is each approximation from the exact Fisher, and which assumption costs what?

On LSTMs and a DNC so small that their Fisher can be enumerated, before, during and after training. Takes six minutes
on one thread, and the Penn Treebank (KFACRNN_DATA).

    python scripts/fisher_distance.py                       results/fisher_distance* and the figure
    python scripts/fisher_distance.py --problems sticky --seeds 1 --out /tmp/study
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import torch
from fisher_study import picture, report, training
from fisher_study.arguments import parser_of_study, untrained
from fisher_study.exact import exact_blocks
from fisher_study.measures import Rows, distances, lags
from fisher_study.problems import NAMES, Problem
from fisher_study.tables import write

DAMPINGS = (1e-4, 1e-2, 1.0)  # in units of V0's mean eigenvalue; at a shorter T only the usual one
FIGURES = Path("results/figures")


def measure(studied: Problem, name: str, seed: int, batches: int) -> tuple[Rows, Rows]:
    """Distances and lags of one model at every stage of its training."""
    rows, lag_rows, trained = [], [], 0
    for stage, updates in zip(report.STAGES, studied.updates, strict=True):
        studied.train(updates - trained)
        trained = updates
        fixed = studied.fixed(batches)
        nats = {steps: statistics.fmean(map(studied.nats, part)) for steps, part in fixed.items()}
        for steps, block in exact_blocks(studied, batches):
            setting = {"problem": name, "stage": stage, "updates": updates, "seed": seed}
            setting |= {"T": steps, "nats": nats.get(steps, nats[max(nats)]), "block": block.name}
            longest = steps == max(studied.lengths)
            for damping in DAMPINGS if longest else (report.USUAL,):
                rows += [setting | row for row in distances(block, damping)]
            if longest:
                lag_rows += [setting | row for row in lags(block, report.USUAL)]
    return rows, lag_rows


def main(argv: list[str]) -> None:
    parser = parser_of_study("Distance of the Fisher approximations from the exact Fisher.", NAMES)
    parser.add_argument(
        "--training-seeds", type=int, default=6, help="of K-FAC at equal settings (default: 6; 0: none)"
    )
    parser.add_argument("--out", type=Path, help="folder of all files (default: results and results/figures)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    models = untrained("fisher_distance", arguments)
    parts = [measure(model, *key, arguments.batches) for key, model in models.items()]
    rows, lag_rows = ([row for part in parts for row in part[i]] for i in (0, 1))
    folder, figures = arguments.out or Path("results"), arguments.out or FIGURES
    for path in (folder, figures):
        path.mkdir(parents=True, exist_ok=True)
    rows = write(folder / "fisher_distance.csv", rows)
    lag_rows = write(folder / "fisher_distance_lags.csv", lag_rows)
    runs = training.compare(arguments.training_seeds)
    runs = write(folder / "fisher_distance_training.csv", runs) if runs else []
    command = " ".join(["python scripts/fisher_distance.py", *argv])
    lines = report.lines(rows, lag_rows, runs, command, whole=not argv)
    (folder / "fisher_distance.md").write_text("\n".join(lines), encoding="utf-8")
    for suffix, content in picture.draw(rows).items():
        (figures / f"fisher_distance.{suffix}").write_bytes(content)


if __name__ == "__main__":
    main(sys.argv[1:])
