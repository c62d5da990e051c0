"""What a figure looks like, as `figure` in `experiments/*.yaml` says: what the drawing needs beside the CSV."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from kfacrnn.settings import setting

STYLES = ("solid", "dashed", "dotted", "dashdot")
MARKERS = {"circle": "o", "square": "s", "triangle": "^", "diamond": "D", "star": "*"}
PANELS = ("updates", "seconds")


@dataclass
class Axis:
    """The vertical axis."""

    label: str = setting("what is written beside it")
    metric: str = setting("column", choices=["train/metric", "train/nats", "valid/metric", "valid/nats"])
    scale: str = setting("linear or log", choices=["linear", "log"])
    limits: list[float] | None = None

    def check(self) -> Iterator[str]:
        if self.limits is not None and not (len(self.limits) == 2 and self.limits[0] < self.limits[1]):
            yield f"limits={self.limits}: must be two numbers, the lower one first"


@dataclass
class Picture:
    """`ends` says at which update or second a panel stops, when that is not where the last line does.
    `benched_seconds`: seconds of all lines are those of `kfacrnn bench`, which measures them side by side, if it has
    measured every line, or if the runs of any line never had the machine to themselves."""

    title: str = setting("title of the figure")
    y: Axis = setting("vertical axis")
    chance: float | None = None
    panels: list[str] = field(default_factory=lambda: list(PANELS))
    ends: dict[str, float] = field(default_factory=dict)
    mix_hardware: bool = False
    benched_seconds: bool = False

    def check(self) -> Iterator[str]:
        if not self.panels or not set(self.panels) <= set(PANELS):
            yield f"panels={self.panels}: must be some of {', '.join(PANELS)}"
        for panel, end in self.ends.items():
            if panel not in PANELS or not end > 0:
                yield f"ends.{panel}={end}: must be a number above 0 for one of {', '.join(PANELS)}"
