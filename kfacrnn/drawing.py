"""The picture of a figure: a panel against updates, a panel against seconds, one colour per optimiser everywhere.

Okabe & Ito's colours, which people with any colour vision can tell apart, in `kfacrnn.mplstyle`'s look. The files hold
no dates and no random identifiers: equal rows give equal bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kfacrnn.curves import Row
from kfacrnn.experiment import Axis, Experiment

COLOURS = {
    "sgd": "#000000",
    "adam": "#E69F00",
    "adamw": "#8C5A00",
    "rmsprop": "#999999",
    "kfac_indep": "#56B4E9",
    "kfac_option1": "#0072B2",
    "kfac_option2": "#D55E00",
    "soap": "#009E73",
    "shampoo": "#CC79A7",
    "muon": "#7B5AA6",
}
OTHER_COLOURS = ("#882255", "#44AA99", "#999933", "#AA4499", "#117733", "#332288")
LEGEND_COLUMNS, LEGEND_ROW = 3, 0.19  # inches
X_LABELS = {"updates": "updates", "seconds": "seconds of training"}
METADATA: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


def draw(described: Experiment, rows: Sequence[Row]) -> dict[str, bytes]:
    """The files' contents by suffix: png, svg, pdf."""
    from matplotlib import style
    from matplotlib.figure import Figure

    panels, picture = described.figure.panels, described.figure
    with style.context(["default", Path(__file__).with_name("kfacrnn.mplstyle")]):
        page = Figure()
        legend = _legend(described, rows)
        page.set_figheight(page.get_figheight() + LEGEND_ROW * ((len(legend) - 1) // LEGEND_COLUMNS))
        axes = page.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        _scale(axes[0], picture.y, picture.y.limits or _limits(rows, picture.chance, picture.y.scale))
        for ax, panel in zip(axes, panels, strict=True):
            _draw_panel(ax, described, [row for row in rows if row.panel == panel])
            ax.set_xlabel(X_LABELS[panel])
            if panel == "updates":
                _mark_divergences(ax, described, rows)
            else:
                _say_what_is_missing(ax, described, rows)
        page.suptitle(picture.title, fontsize=10)
        page.legend(handles=legend, loc="outside lower center", ncols=min(len(legend), LEGEND_COLUMNS))
        return {suffix: _file(page, suffix) for suffix in METADATA}


def colour(optimizer: str) -> str:
    """The optimiser's colour in every figure; one that is not listed gets one by the letters of its name."""
    return COLOURS.get(optimizer, OTHER_COLOURS[sum(optimizer.encode()) % len(OTHER_COLOURS)])


def _scale(ax: Any, axis: Axis, limits: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    ax.set_yscale(axis.scale)
    ax.set_ylim(*limits)
    ax.set_ylabel(axis.label)
    if axis.scale == "log":  # 200, not 2 × 10²
        ax.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
        for set_formatter in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
            set_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _draw_panel(ax: Any, described: Experiment, rows: Sequence[Row]) -> None:
    top = ax.get_ylim()[1]
    ax.set_xlim(0, max((row.x for row in rows), default=1))
    for name, method in described.methods.items():
        line = [row for row in rows if row.line == name]
        x = [row.x for row in line]
        look = {"color": colour(method.optimizer)}
        low, high = ([min(getattr(row, side), 2 * top) for row in line] for side in ("low", "high"))
        ax.fill_between(x, low, high, **look, alpha=0.2, linewidth=0)
        ax.plot(x, [row.median for row in line], **look, linestyle=method.style)
    chance = described.figure.chance
    if chance is not None:
        ax.axhline(chance, color="0.4", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        place = {"xy": (1, chance), "xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        ax.annotate("chance", xytext=(-2, 2), **place, ha="right", va="bottom", color="0.3", fontsize=8.5)


def _mark_divergences(ax: Any, described: Experiment, rows: Sequence[Row]) -> None:
    """A cross on the upper edge where a run diverged."""
    for row in rows:
        if row.panel == "diverged":
            look = {"color": colour(described.methods[row.line].optimizer), "markeredgewidth": 1.4, "clip_on": False}
            ax.plot([row.x], [1], "x", **look, transform=ax.get_xaxis_transform())


def _say_what_is_missing(ax: Any, described: Experiment, rows: Sequence[Row]) -> None:
    """Runs that shared the machine are in the panel of updates only."""
    panels = {row.panel for row in rows}
    if "seconds" not in panels:
        text = f"no run had the machine to itself:\nkfacrnn sweep {described.name} --jobs 1"
        ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color="0.3", fontsize=8.5)
        ax.set_xticks([])
        return
    missing = sum(_runs(rows, "updates", name) - _runs(rows, "seconds", name) for name in described.methods)
    if missing:
        text = f"without {missing} that shared the machine"
        ax.text(1, 1.01, text, transform=ax.transAxes, ha="right", va="bottom", color="0.3", fontsize=8.5)


def _legend(described: Experiment, rows: Sequence[Row]) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = []
    for name, method in described.methods.items():
        diverged = sum(row.n for row in rows if row.panel == "diverged" and row.line == name)
        runs = max(diverged, _runs(rows, "updates", name))
        if runs:
            note = f"n = {runs}, {diverged} diverged" if diverged else f"n = {runs}"
            look: dict[str, Any] = {"color": colour(method.optimizer), "linestyle": method.style}
            handles.append(Line2D([], [], **look, label=f"{method.label or name} ({note})"))
    return handles


def _runs(rows: Sequence[Row], panel: str, line: str) -> int:
    return max((row.n for row in rows if row.panel == panel and row.line == line), default=0)


def _limits(rows: Sequence[Row], chance: float | None, scale: str) -> tuple[float, float]:
    """A little more than what there is to show."""
    values = [value for row in rows for value in (row.low, row.median, row.high, chance) if value is not None]
    finite = [value for value in values if math.isfinite(value)] or [1.0]
    low, high = min(finite), max(finite)
    if scale == "log":
        margin = (high / low) ** 0.05 * 1.01
        return low / margin, high * margin
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


def _file(page: Any, suffix: str) -> bytes:
    content = io.BytesIO()
    page.savefig(content, format=suffix, metadata=METADATA[suffix])
    return content.getvalue()
