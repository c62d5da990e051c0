"""The files and the warning: where numbers come from, and whether anybody else was using the machine."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kfacrnn import provenance
from kfacrnn.bench.request import Request
from kfacrnn.store import write_json
from kfacrnn.tables import plain

SCHEMA_VERSION = 1
BUSY = 0.1  # cores of other processes


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


def warn_if_busy(machine: Mapping[str, Any]) -> None:
    if machine["busy"]:
        others = machine["others_cores"]
        what = f"load {machine['load_before']:.1f}" if others is None else f"other processes used {others:.1f} cores"
        print(f"warning: the machine was busy ({what}): these times are indicative only", file=sys.stderr)


def write(
    path: Path, bench: str, request: Request, machine: Machine, rows: Sequence[Mapping[str, Any]], **more: Any
) -> None:
    """One JSON file; says so, and warns if the machine was busy."""
    seen = machine.seen()
    content = {
        "schema_version": SCHEMA_VERSION,
        "bench": bench,
        "command": request.command,
        "date": provenance.now(),
        **provenance.commit(),
        "versions": provenance.versions(),
        "hardware": provenance.hardware(request.device),
        "threads": request.threads,
        "precision": request.precision,
        "overrides": list(request.overrides),
        "machine": seen,
        **more,
        "rows": [rounded(row) for row in rows],
    }
    write_json(path, content)
    warn_if_busy(seen)
    print(path)


def rounded(value: Any) -> Any:
    """Numbers with as many digits as can mean anything."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    return {key: rounded(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    print(f"{title}\n{plain(header, rows)}\n")
