"""results/figures/fisher_distance: the distance by stage, by assumption and by damping. Medians and quartiles."""

from __future__ import annotations

import statistics
from typing import Any

from fisher_study.measures import Rows
from fisher_study.report import STAGES, USUAL
from kfacrnn.drawing import colour, house_style, saved

TITLES = {
    "sticky": "LSTM, sticky chain",
    "alternating": "LSTM, alternating chain",
    "rotating": "LSTM, rotating chain",
    "characters": "LSTM, characters",
    "copy": "DNC, repeated copy",
}
SHOWN = ("alternating", "characters", "copy")
LOOKS = {
    "indep": {"color": colour("kfac_indep"), "label": "indep"},
    "option1": {"color": colour("kfac_option1"), "label": "option 1"},
    "option1_abs": {"color": "0.6", "linestyle": "--", "label": "option 1, |ψ̂|"},
    "option2": {"color": colour("kfac_option2"), "label": "option 2"},
    "lggm": {"color": "black", "linestyle": ":", "label": "eqn 7"},
    "independent": {"color": "0.4", "linestyle": "-.", "label": "a ⟂ g alone"},
}
RUNGS = ("independent", "homogeneous", "lggm", "option1", "option2", "indep")
RUNG_LABELS = ("a ⟂ g", "+ same at\nall t", "+ chain", "option 1", "option 2", "indep")
LABELS = (*(rf"$\|\hat{{F}} - F\|\,/\,\|F\|${stage}" for stage in ("", ", after")), "KL per weight, after")
SUFFIXES = ("png", "svg")


def draw(rows: Rows) -> dict[str, bytes]:
    """The files' contents by suffix."""
    from matplotlib.figure import Figure

    problems = [name for name in SHOWN if any(row["problem"] == name for row in rows)] or [rows[0]["problem"]]
    with house_style():
        page = Figure(figsize=(5.5, 5.2))
        axes = page.subplots(3, len(problems), sharey="row", squeeze=False)
        for column, name in zip(axes.T, problems, strict=True):
            here = [row for row in rows if row["problem"] == name]
            here = [row for row in here if row["T"] == max(r["T"] for r in here)]
            usual = [row for row in here if row["damping"] == USUAL]
            after = [row for row in here if row["stage"] == "after"]
            column[0].set_title(TITLES[name], fontsize=9)
            _lines(column[0], usual, "stage", list(STAGES), "frobenius")
            _rungs(column[1], [row for row in usual if row["stage"] == "after"])
            _lines(column[2], after, "damping", sorted({row["damping"] for row in after}), "kl_approximate_exact")
            column[2].set_xlabel("λ / mean eigenvalue of $V_0$")
        for ax, label in zip(axes[:, 0], LABELS, strict=True):
            ax.set_ylabel(label)
            ax.set_ylim(bottom=0)
        page.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return {suffix: saved(page, suffix) for suffix in SUFFIXES}


def _lines(ax: Any, rows: Rows, by: str, values: list[Any], measure: str) -> None:
    for name, look in LOOKS.items():
        groups = [[row[measure] for row in rows if row["approximation"] == name and row[by] == v] for v in values]
        ax.plot(range(len(values)), [statistics.median(group) for group in groups], marker="o", markersize=3, **look)
    ax.margins(x=0.12)
    ax.set_xticks(range(len(values)), [f"{value:g}" if by == "damping" else value for value in values])


def _rungs(ax: Any, rows: Rows) -> None:
    """Medians as bars, quartiles as whiskers."""
    for place, name in enumerate(RUNGS):
        values = [row["frobenius"] for row in rows if row["approximation"] == name]
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        ax.bar(place, middle, color=LOOKS.get(name, {"color": "0.75"})["color"], width=0.7)
        ax.plot([place, place], [low, high], color="0.2", linewidth=0.9)
    ax.set_xticks(range(len(RUNGS)), RUNG_LABELS, rotation=90, fontsize=7)
    ax.grid(visible=False, axis="x")
