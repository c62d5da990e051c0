#!/usr/bin/env python3
"""What K-FAC's settings cost and what they are worth: final training loss against the cost of an update.

For every study, `experiments/cost_*.yaml`, the runs in the store say how well a setting trains (the mean over the last
updates of each seed), and `kfacrnn bench experiment NAME` says what its update costs by SGD's. A setting that lacks
either is left out, and so is a study that lacks all; both are said.

    python scripts/cost_study.py            draws results/figures/cost_study.{png,svg} and prints the table
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from kfacrnn import experiment
from kfacrnn.curves import conversion
from kfacrnn.drawing import OTHER_COLOURS, house_style, saved, write_files
from kfacrnn.plan import Plan
from kfacrnn.tables import plain

STUDIES = ("cost_char", "cost_word")
SHIPPED = "as shipped"


class Setting(NamedTuple):
    """One line of a study: an update's cost by SGD's with its interval, and the final value of every seed."""

    line: str
    cost: float
    low: float
    high: float
    finals: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.finals)


class Study(NamedTuple):
    title: str
    label: str
    settings: list[Setting]


def read(name: str, results: Path) -> Study:
    described = experiment.load(name)
    path = results / "bench" / f"experiment-{name}.json"
    costs = {row["line"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    plan, settings = Plan(described, str(results)), []
    for line in plan.lines:
        runs = [run for run in plan.confirmation(line) if run.finished]
        if not runs or line not in costs:
            command = f"bench experiment {name}" if runs else f"sweep {name} --only '{line}'"
            print(f"left out: {name}, {line}: kfacrnn {command}", file=sys.stderr)
            continue
        convert = conversion(runs[0].folder.meta()["task"]["metric"])
        finals = [convert(run.score(described.select)) for run in runs]
        row = costs[line]
        settings.append(Setting(line, row["ratio_to_sgd"], row["low"], row["high"], finals))
    return Study(described.figure.title, described.figure.y.label, settings)


def table(study: Study) -> str:
    rows = [
        (s.line, f"{s.cost:.3f}", f"{s.low:.3f}–{s.high:.3f}", " ".join(f"{final:.4g}" for final in sorted(s.finals)))
        for s in sorted(study.settings, key=lambda setting: setting.cost)
    ]
    return f"{study.title}\n{plain(('setting', 'cost by SGD', 'interval', f'{study.label}, each seed'), rows)}\n"


def draw(studies: list[Study]) -> dict[str, bytes]:
    """The files' contents by suffix. Costs on a logarithmic axis: nothing spared is several times as dear."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    with house_style():
        page = Figure(figsize=(4.6 * len(studies), 3.6))
        for ax, study in zip(page.subplots(1, len(studies), squeeze=False)[0], studies, strict=True):
            colours = iter(OTHER_COLOURS)
            for setting in study.settings:
                colour = "#0072B2" if setting.line == SHIPPED else next(colours)
                ax.plot([100 * (setting.cost - 1)] * 2, [min(setting.finals), max(setting.finals)], color=colour)
                ax.plot(100 * (setting.cost - 1), setting.median, "o", color=colour, label=setting.line)
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
            ax.set_xscale("log")
            ax.margins(x=0.1, y=0.2)
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
            ax.set_xlabel("cost of an update above SGD's (%)")
            ax.set_ylabel(study.label)
            ax.set_title(study.title, fontsize=9)
        return {suffix: saved(page, suffix) for suffix in ("png", "svg")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default="results", metavar="DIR", help="the result store (default results)")
    results = Path(parser.parse_args().results)
    studies = [study for study in (read(name, results) for name in STUDIES) if study.settings]
    if not studies:
        return 2
    for study in studies:
        print(table(study))
    print(*write_files(draw(studies), results / "figures" / "cost_study"), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
