#!/usr/bin/env python3
"""How much settings matter: the final training loss of every method over a grid of two of its settings.

    kfacrnn sweep sensitivity_dnc && python scripts/sensitivity.py dnc
    kfacrnn sweep sensitivity_char && python scripts/sensitivity.py char

draws results/figures/sensitivity_maps_{dnc,char}.{png,svg}, one map for each method and one scale of colours for all,
and prints for each how much of its grid is good: the share of points that end within a tenth of the way from the best
loss of all to chance. Every point is one run, with the seed of the search; a run that diverged is a cross.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

from kfacrnn import experiment
from kfacrnn.discovery import command
from kfacrnn.drawing import house_style, saved, write_files
from kfacrnn.errors import UserError
from kfacrnn.plan import Plan
from kfacrnn.tables import plain
from kfacrnn.units import from_nats

WITHIN = 0.1  # of the way from the best loss to chance


class Map(NamedTuple):
    """Final losses `[rows][columns]` over the values of two settings, infinite where a run diverged."""

    title: str
    names: tuple[str, str]  # of the settings down the rows and along the columns
    rows: list[Any]
    columns: list[Any]
    finals: list[list[float]]

    def share_below(self, bound: float) -> float:
        finals = [final for row in self.finals for final in row]
        return sum(final <= bound for final in finals) / len(finals)

    @property
    def best(self) -> float:
        return min(min(row) for row in self.finals)


class Study(NamedTuple):
    title: str
    label: str
    chance: float
    maps: list[Map]

    @property
    def best(self) -> float:
        return min(each.best for each in self.maps)


def read(name: str, results: Path, overrides: list[str]) -> Study:
    """Raises `UserError` where runs are missing, with the command that makes them, or a grid has not two settings."""
    described = experiment.load(name)
    plan, maps, chance = Plan(described, str(results), overrides), [], math.inf
    for line in plan.lines:
        grid, trials = described.method(line).grid, plan.tuning[line]
        missing = sum(not trial.finished for trial in trials)
        if missing:
            sweep = command("sweep", name, *overrides, results=results)
            raise UserError(f"{name}, {line}: {missing} runs are missing; {sweep}")
        if len(grid) != 2:
            raise UserError(f"{name}, {line}: must have a grid of two settings, got {', '.join(grid) or 'none'}")
        task = trials[0].folder.task()
        convert, chance = from_nats(task["metric"]), task["chance"]
        finals = [convert(trial.score(described.select)) for trial in trials]
        (first, rows), (second, columns) = grid.items()
        width = len(columns)
        names = (first.removeprefix("optimizer."), second.removeprefix("optimizer."))
        table = [finals[start : start + width] for start in range(0, len(finals), width)]
        maps.append(Map(described.lines[line].label, names, rows, columns, table))
    return Study(described.figure.title.partition(",")[0], described.figure.y.label, chance, maps)


def table(study: Study) -> str:
    bound = study.best + WITHIN * (study.chance - study.best)
    rows = [(each.title, f"{each.best:.4g}", f"{100 * each.share_below(bound):.0f} %") for each in study.maps]
    return f"{study.title}\n{plain(('method', f'best {study.label}', f'below {bound:.4g}'), rows)}\n"


def draw(study: Study) -> dict[str, bytes]:
    """The files' contents by suffix."""
    from matplotlib.figure import Figure

    with house_style():
        page = Figure(figsize=(2.6 * len(study.maps) + 0.8, 3.4), layout="constrained")
        axes = page.subplots(1, len(study.maps), squeeze=False)[0]
        for ax, each in zip(axes, study.maps, strict=True):
            image = ax.imshow(each.finals, vmin=study.best, vmax=study.chance, cmap="viridis_r", aspect="auto")
            for y, row in enumerate(each.finals):
                for x, final in enumerate(row):
                    dark = math.inf > final > (study.best + study.chance) / 2
                    text = f"{final:.3g}" if math.isfinite(final) else "×"
                    ax.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
            ax.set_xticks(range(len(each.columns)), [shown(value) for value in each.columns])
            ax.set_yticks(range(len(each.rows)), [shown(value) for value in each.rows])
            ax.set_xlabel(each.names[1])
            ax.set_ylabel(each.names[0])
            ax.set_title(each.title, fontsize=9)
            ax.grid(False)
        page.colorbar(image, ax=axes, label=study.label)
        return {suffix: saved(page, suffix) for suffix in ("png", "svg")}


def shown(value: Any) -> str:
    """A setting's value as a label; null is how a YAML file says that something is off."""
    return "null" if value is None else f"{value:g}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["dnc", "char"])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="those that the sweep was given")
    parser.add_argument("--results", default="results", metavar="DIR", help="the result store (default results)")
    args = parser.parse_intermixed_args()
    name, results = f"sensitivity_{args.study}", Path(args.results)
    try:
        study = read(name, results, args.overrides)
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(table(study))
    print(*write_files(draw(study), results / "figures" / f"sensitivity_maps_{args.study}"), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
