"""Where a result comes from: commit, versions, machine, command."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from kfacrnn.errors import UserError
from kfacrnn.neighbours import SHARED

VECTORS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")  # the widest first, as Linux calls them
PACKAGES = ("torch", "numpy", "hydra-core", "omegaconf", "pandas", "matplotlib", "wandb")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def commit() -> dict[str, Any]:
    """Commit of the checkout the package runs from; an installed wheel has none."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if not (Path(git("rev-parse", "--show-toplevel")) / "kfacrnn").samefile(folder):
            return {"commit": None, "dirty": None}
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--", ":/kfacrnn", ":/configs")),
        }
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def versions() -> dict[str, str]:
    from kfacrnn import __version__

    found = {"kfacrnn": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found["pointwise"] = _pointwise()
    return found


def _pointwise() -> str:
    """Whether LSTM steps run "compiled" or in "torch" operations. Compiles now if need be, so that no training clock
    is running then."""
    from kfacrnn.nn import pointwise

    try:
        return "compiled" if pointwise.status() == "compiled" else "torch"
    except RuntimeError as error:
        raise UserError(str(error)) from error


def hardware(device: str = "cpu") -> dict[str, Any]:
    """Processor and, for a CUDA device, the GPU: what a time axis must not mix. Virtual machines give processors of
    several generations the same name; `vectors` tells them apart."""
    about = _cpuinfo()
    name = about.get("model name") or platform.processor() or platform.machine()
    found: dict[str, Any] = {"cpu": name, "cores": cores()}
    widest = next((name for name in VECTORS if name in about.get("flags", "").split()), None)
    if widest:
        found["vectors"] = widest
    if device.startswith("cuda"):
        import torch

        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def cores() -> int:
    """Processors that this process may use or, where the system does not say, that there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(hardware: dict[str, Any]) -> str:
    """Hardware in one line, whatever order its keys came in."""
    known = ("cpu", "vectors", "cores", "gpu")
    return ", ".join(f"{key} {hardware[key]}" for key in sorted(hardware, key=lambda key: (*known, key).index(key)))


def undisturbed(meta: dict[str, Any]) -> bool:
    """Whether the run of that meta.json had the machine to itself, so that its seconds mean something: no run beside it
    from the same launcher, and no other process that took its share, as far as the kernel says. A session that was
    killed says nothing, and is not taken to have been alone."""
    sessions = meta.get("sessions", [])
    return bool(sessions) and all(
        session.get("jobs") == 1 and "others_cores" in session and (session["others_cores"] or 0.0) <= SHARED
        for session in sessions
    )


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor; nothing elsewhere."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    parts = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in parts}
