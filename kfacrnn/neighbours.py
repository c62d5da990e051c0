"""What other processes do on the machine while something is timed."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

BUSY = 0.1  # processors of others, from which on a benchmark's times are indicative only
SHARED = 0.5  # and from which on a run's seconds do not count: more than a desktop at rest, less than another run


class Machine:
    """What other processes did between two moments."""

    def __init__(self) -> None:
        self.load = os.getloadavg()[0]
        self._began = self._now()

    def seen(self) -> dict[str, Any]:
        """Load before the benchmark, and processors that others used during it (None where the kernel does not say)."""
        (wall, own, everyone), (wall_before, own_before, before) = self._now(), self._began
        others = None
        if everyone is not None and before is not None:
            others = max(0.0, (everyone - before) - (own - own_before)) / max(wall - wall_before, 1e-9)
        return {"load_before": self.load, "others_cores": others, "busy": is_busy(self.load, others)}

    @staticmethod
    def _now() -> tuple[float, float, float | None]:
        """Wall seconds, processor seconds of this process and its children that have ended, and those of everyone."""
        times = os.times()
        return time.monotonic(), sum(times[:4]), processor_seconds(Path("/proc/stat"))


def is_busy(load: float, others: float | None) -> bool:
    return others > BUSY if others is not None else load > 0.5


def processor_seconds(stat: Path) -> float | None:
    """Of all processes since the machine started."""
    try:
        user, nice, system, _, _, irq, softirq = (int(field) for field in stat.read_text().split()[1:8])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
