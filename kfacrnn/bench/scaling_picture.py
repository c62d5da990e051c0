"""The picture of `kfacrnn bench scaling`: where an update's time goes, and how the overhead falls.

A row for every task. A panel for every size: shares of an update of the last optimiser, as parts of the whole. The last
panel: overhead over SGD of every optimiser against B·T, from the points that change B or T.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kfacrnn.bench.request import BASELINE
from kfacrnn.drawing import colour, house_style, saved

Rows = Sequence[Mapping[str, Any]]

LABELS = {"hidden": "hidden units", "bptt": "T", "batch_size": "B", "vocabulary": "vocabulary"}
PART_COLOURS = {
    "train": "#DDDDDD",
    "statistics": "#56B4E9",
    "refresh": "#E69F00",
    "products": "#009E73",
    "update": "#CC79A7",
}
SUFFIXES = ("png", "svg")


def draw(rows: Rows) -> dict[str, bytes]:
    """The files' contents by suffix."""
    from matplotlib.figure import Figure

    tasks, optimizers = ([*dict.fromkeys(row[key] for row in rows)] for key in ("task", "optimizer"))
    shown = optimizers[-1]
    with house_style():
        page = Figure(figsize=(11, 0.7 + 2.1 * len(tasks)))
        panels = page.subplots(len(tasks), len(LABELS) + 1, squeeze=False)
        for line, task in zip(panels, tasks, strict=True):
            of_task = [row for row in rows if row["task"] == task]
            for ax, factor in zip(line, LABELS, strict=False):
                _shares(ax, [row for row in of_task if row["optimizer"] == shown], factor)
            line[0].set_ylabel(f"{task}\n% of an update")
            for optimizer in optimizers:
                if optimizer != BASELINE:
                    _overhead(line[-1], [row for row in of_task if row["optimizer"] == optimizer], optimizer)
            line[-1].set_ylabel(f"% above {BASELINE}")
        handles, labels = panels[0][0].get_legend_handles_labels()
        lines, names = panels[0][-1].get_legend_handles_labels()
        page.legend([*handles, *lines], [*labels, *names], loc="outside lower center", ncols=8)
        page.suptitle(f"What an update costs: shares of {shown}, and overhead over {BASELINE}", fontsize=10)
        return {suffix: saved(page, suffix) for suffix in SUFFIXES}


def along(rows: Rows, factors: Sequence[str], size: Any) -> Rows:
    """The rows that change one of `factors`, and the model as it is, by rising `size(row)`."""
    return sorted((row for row in rows if row["factor"] in (*factors, "base")), key=size)


def _shares(ax: Any, rows: Rows, factor: str) -> None:
    line = along(rows, [factor], lambda row: row[factor])
    shares = [[100 * row["split"][part] / row["ms_mean_cycle"] for row in line] for part in PART_COLOURS]
    ax.stackplot([row[factor] for row in line], shares, colors=PART_COLOURS.values(), labels=PART_COLOURS)
    ax.set_ylim(0, 100)
    _scale(ax, LABELS[factor], [row[factor] for row in line])


def _overhead(ax: Any, rows: Rows, optimizer: str) -> None:
    def tokens(row: Mapping[str, Any]) -> int:
        return int(row["bptt"] * row["batch_size"])

    places: set[int] = set()
    for factor, look in (("bptt", "-o"), ("batch_size", "--s")):
        line = along(rows, [factor], tokens)
        places |= set(map(tokens, line))
        overheads = [100 * (row[f"ratio_to_{BASELINE}"] - 1) for row in line]
        label = f"{optimizer}, {LABELS[factor]}"
        ax.plot([tokens(row) for row in line], overheads, look, color=colour(optimizer), label=label, markersize=3)
    _scale(ax, "B·T", sorted(places)[::2])


def _scale(ax: Any, label: str, places: Sequence[int]) -> None:
    """Logarithmic, with marks at the sizes that there are."""
    ax.set_xscale("log")
    ax.set_xticks(places, [f"{place:,}" for place in places], rotation=45, ha="right")
    ax.set_xticks([], minor=True)
    ax.set_xlabel(label)
