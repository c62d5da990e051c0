"""The files and the warning: where numbers come from, and whether anybody else was using the machine."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kfacrnn import provenance
from kfacrnn.bench.request import Request
from kfacrnn.files import write_json
from kfacrnn.neighbours import Machine
from kfacrnn.tables import plain

SCHEMA_VERSION = 1


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
