"""The picture of a figure: a panel against updates, a panel against seconds, one colour per optimiser everywhere.

Okabe & Ito's colours, which people with any colour vision can tell apart, in `kfacrnn.mplstyle`'s look; beyond their
eight, experiments give lines a marker. The files hold no dates and no random identifiers: equal rows give equal bytes.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from kfacrnn.curves import SEEDS_FOR_QUARTILES, Row
from kfacrnn.experiment import Experiment
from kfacrnn.files import make_folder_of, write_atomic
from kfacrnn.picture import MARKERS, Axis

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
    "psgd_kron": "#882255",
    "muon": "#7B5AA6",
}
WIDTHS = {"kfac_indep": 3.2, "kfac_option1": 2.0, "kfac_option2": 0.9}  # their curves often coincide: each is seen
OTHER_COLOURS = ("#44AA99", "#999933", "#AA4499", "#117733", "#332288")
LEGEND_COLUMNS, LEGEND_ROW = 3, 0.19  # inches
LEGEND_WIDTH, NOTE_WIDTH = 70, 90  # characters of the labels side by side, and of a line of notes
NOTE: dict[str, Any] = {"color": "0.3", "fontsize": 8.5}
MARKERS_PER_LINE = 8
ON_SECONDS = ("seconds", "benched")  # panels of the CSV that the panel of seconds shows
X_LABELS = {"updates": "updates", "seconds": "seconds of training"}
METADATA: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


def draw(described: Experiment, rows: Sequence[Row]) -> dict[str, bytes]:
    """The files' contents by suffix: png, svg, pdf."""
    from matplotlib.figure import Figure

    panels, picture = described.figure.panels, described.figure
    with house_style():
        page = Figure()
        legend, note = _legend(described, rows), textwrap.fill("; ".join(_notes(described, rows)), NOTE_WIDTH)
        columns = _columns([handle.get_label() for handle in legend])
        legend_rows = (len(legend) - 1) // columns + (note.count("\n") + 1 if note else 0)
        page.set_figheight(page.get_figheight() + LEGEND_ROW * legend_rows)
        axes = page.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        _scale(axes[0], picture.y, picture.y.limits or _limits(rows, picture.chance, picture.y.scale))
        for ax, panel in zip(axes, panels, strict=True):
            shown = ON_SECONDS if panel == "seconds" else (panel,)
            _draw_panel(ax, described, [row for row in rows if row.panel in shown], picture.ends.get(panel))
            ax.set_xlabel(X_LABELS[panel])
            if panel == "updates":
                _mark_divergences(ax, described, rows)
            else:
                _say_what_is_missing(ax, described, rows)
        page.suptitle(picture.title, fontsize=10)
        title = {"title": note, "title_fontproperties": {"size": NOTE["fontsize"]}} if note else {}
        page.legend(handles=legend, loc="outside lower center", ncols=columns, **title)
        return {suffix: saved(page, suffix) for suffix in METADATA}


def house_style() -> AbstractContextManager[None]:
    """Inside it, matplotlib draws as every picture of the project looks."""
    from matplotlib import style

    return style.context(["default", Path(__file__).with_name("kfacrnn.mplstyle")])


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


def _draw_panel(ax: Any, described: Experiment, rows: Sequence[Row], end: float | None) -> None:
    top = ax.get_ylim()[1]
    ax.set_xlim(0, end or max((row.x for row in rows), default=1))
    for name, line in described.lines.items():
        drawn = [row for row in rows if row.line == name]
        x = [row.x for row in drawn]
        look = _look(described, line.method, line.style)
        low, high = ([min(getattr(row, side), 2 * top) for row in drawn] for side in ("low", "high"))
        ax.fill_between(x, low, high, color=look["color"], alpha=0.2, linewidth=0)
        if "marker" in look:
            look["markevery"] = max(1, sum(value <= ax.get_xlim()[1] for value in x) // MARKERS_PER_LINE)
        ax.plot(x, [row.median for row in drawn], **look)
    chance = described.figure.chance
    if chance is not None:
        ax.axhline(chance, color="0.4", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        place = {"xy": (1, chance), "xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        ax.annotate("chance", xytext=(-2, 2), **place, ha="right", va="bottom", **NOTE)


def _look(described: Experiment, method: str, style: str) -> dict[str, Any]:
    """Colour for the optimiser, line style for the model, a marker for what else there is to a method."""
    optimizer, marker = described.methods[method].optimizer, described.methods[method].marker
    look: dict[str, Any] = {"color": _colour(described, method), "linestyle": style}
    if optimizer in WIDTHS:
        look["linewidth"] = WIDTHS[optimizer]
    return look | ({"marker": MARKERS[marker], "markersize": 3.5, "markerfacecolor": "white"} if marker else {})


def _colour(described: Experiment, method: str) -> str:
    """The optimiser's; of methods that nothing else tells apart, that of the first, and another for each one more."""
    alike = [name for name in described.methods if _told_apart_by(described, name) == _told_apart_by(described, method)]
    place = alike.index(method)
    return OTHER_COLOURS[(place - 1) % len(OTHER_COLOURS)] if place else colour(described.methods[method].optimizer)


def _told_apart_by(described: Experiment, method: str) -> tuple[str | None, ...]:
    of_method = described.methods[method]
    return of_method.optimizer, of_method.style, of_method.marker


def _mark_divergences(ax: Any, described: Experiment, rows: Sequence[Row]) -> None:
    """A cross on the upper edge where a run diverged."""
    for row in rows:
        if row.panel == "diverged":
            shade = _colour(described, described.lines[row.line].method)
            look = {"color": shade, "markeredgewidth": 1.4, "clip_on": False}
            ax.plot([row.x], [1], "x", **look, transform=ax.get_xaxis_transform())


def _say_what_is_missing(ax: Any, described: Experiment, rows: Sequence[Row]) -> None:
    """Runs that shared the machine are in the panel of updates only, or at what a benchmark says they take."""
    shown = {row.panel for row in rows}
    place = {"transform": ax.transAxes, **NOTE}
    if not shown & set(ON_SECONDS):
        middle = {**place, "ha": "center", "va": "center", "bbox": {"facecolor": "white", "linewidth": 0}}
        ax.text(0.5, 0.5, "no run had the machine to itself", **middle)
        ax.set_xticks([])
        return
    benched = {row.line for row in rows if row.panel == "benched"}
    counted = [name for name in described.lines if name not in benched]
    missing = sum(_runs(rows, "updates", name) - _runs(rows, "seconds", name) for name in counted)
    if missing:
        ax.text(1, 1.01, f"without {missing} that shared the machine", **place, ha="right", va="bottom")


def _legend(described: Experiment, rows: Sequence[Row]) -> list[Any]:
    """A handle for every line; with models, for every method and then for every model."""
    from matplotlib.lines import Line2D

    handles = []
    for name, method in described.methods.items():
        lines = [line for line in described.lines.values() if line.method == name]
        diverged = [sum(row.n for row in rows if row.panel == "diverged" and row.line == line.name) for line in lines]
        runs = [max(lost, _runs(rows, "updates", line.name)) for lost, line in zip(diverged, lines, strict=True)]
        if any(runs):
            note = f"n = {' and '.join(str(count) for count in runs if count)}"
            note += f", {sum(diverged)} diverged" if any(diverged) else ""
            look = _look(described, name, lines[0].style)
            handles.append(Line2D([], [], **look, label=f"{method.label or name} ({note})"))
    for name, model in described.models.items():
        if not any(_runs(rows, "updates", line.name) for line in described.lines.values() if line.model == name):
            continue
        look = {"color": "0.3", "linestyle": model.style}
        handles.append(Line2D([], [], **look, label=model.label or name))
    return handles


def _columns(labels: Sequence[str]) -> int:
    """As many as there is room for; matplotlib fills them one after another, the first ones with one label more."""
    for columns in range(min(len(labels), LEGEND_COLUMNS), 1, -1):
        rows, longer = divmod(len(labels), columns)
        ends = [rows * (column + 1) + min(column + 1, longer) for column in range(columns)]
        widths = [max(map(len, labels[end - rows - (column < longer) : end])) for column, end in enumerate(ends)]
        if sum(widths) <= LEGEND_WIDTH:
            return columns
    return 1


def _notes(described: Experiment, rows: Sequence[Row]) -> Iterator[str]:
    """What a figure says on its face: what lines and bands are, methods that were not searched equally long, seconds
    that are not the runs'."""
    seeds = {row.n for row in rows if row.panel == "updates"}
    if max(seeds, default=0) > 1:
        bands = {"quartiles" if n >= SEEDS_FOR_QUARTILES else "ranges" for n in seeds if n > 1}
        yield f"medians and {' or '.join(sorted(bands, reverse=True))} of n seeds"
    counts: dict[int, list[str]] = {}
    for row in rows:
        if row.panel == "trials":
            counts.setdefault(int(row.x), []).append(described.lines[row.line].label)
    if counts:
        parts = [f"{count} for {', '.join(labels)}" for count, labels in sorted(counts.items())]
        yield f"numbers of trials are not equal: {' and '.join(parts)}"
    trained, benched = (
        list(dict.fromkeys(described.lines[row.line].label for row in rows if row.panel == panel))
        for panel in ("updates", "benched")
    )
    if benched:
        whose = "" if benched == trained else f" of {', '.join(benched)}"
        yield f"seconds{whose}: what updates cost by kfacrnn bench"


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


def saved(page: Any, suffix: str) -> bytes:
    """The contents of a png, svg or pdf of the page, without dates."""
    content = io.BytesIO()
    page.savefig(content, format=suffix, metadata=METADATA[suffix])
    return content.getvalue()


def write_files(contents: Mapping[str, bytes], path: Path) -> list[Path]:
    """Contents by suffix, to files beside one another that are called as `path`, which has no suffix; returns them."""
    make_folder_of(path)
    files = {path.with_name(f"{path.name}.{suffix}"): content for suffix, content in contents.items()}
    for file, content in files.items():
        write_atomic(file, content)
    return list(files)
