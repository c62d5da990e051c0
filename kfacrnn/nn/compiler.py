"""The C sources of this package, compiled when they are first needed and kept in the user's cache folder.

That takes about a second. Where it cannot be done the layers do the same in torch operations, and `status` says why.
The environment's KFACRNN_POINTWISE=torch does without; KFACRNN_POINTWISE=compiled makes it an error not to have them.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from kfacrnn import cache

COMPILERS = ("cc", "gcc", "clang")
# Not fast-math: runs that explode must show NaN and infinity.
FLAGS = ("-O3", "-march=native", "-fPIC", "-fno-math-errno", "-fno-trapping-math")


def load(source: Path, *flags: str) -> ctypes.CDLL | None:
    """What is made of `source`; None where torch is to do it. Raises RuntimeError if it is missing though
    KFACRNN_POINTWISE=compiled."""
    return _decide(source, flags)[0]


def status(source: Path, *flags: str) -> str:
    """ "compiled", or "plain torch: " and the reason. Compiles if that has not been tried yet."""
    found, reason = _decide(source, flags)
    return f"plain torch: {reason}" if found is None else "compiled"


@functools.cache
def _decide(source: Path, flags: tuple[str, ...]) -> tuple[ctypes.CDLL | None, str]:
    wish = os.environ.get("KFACRNN_POINTWISE") or "auto"
    if wish not in ("auto", "torch", "compiled"):
        raise RuntimeError(f"KFACRNN_POINTWISE={wish} must be torch or compiled")
    if wish == "torch":
        return None, "KFACRNN_POINTWISE=torch"
    try:
        return _load(source, flags), ""
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
    if wish == "compiled":
        raise RuntimeError(f"KFACRNN_POINTWISE=compiled, but the kernel cannot be had: {reason}")
    return None, reason


def _load(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    if sys.platform != "linux":
        raise RuntimeError(f"not tried on {sys.platform}")
    compiler = _compiler()
    version = _run([compiler, "--version"])
    # gcc's threads are those of the libgomp that torch has loaded; clang would bring a second OpenMP.
    flags = (*FLAGS, *flags, "-fopenmp-simd" if "clang" in version else "-fopenmp")
    texts = [path.read_text("utf-8") for path in (source, *sorted(source.parent.glob("*.h")))]
    key = "\n".join([*texts, *flags, version, _processor_features()])
    name = f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    library = cache.place(name)
    if not library.exists():
        _build([compiler, *flags], source, library)
    return ctypes.CDLL(str(library))


def _compiler() -> str:
    for name in (os.environ.get("CC"), *COMPILERS):
        if name and (path := shutil.which(name)):
            return path
    raise RuntimeError("no C compiler found")


def _build(command: list[str], source: Path, library: Path) -> None:
    """Atomic, so that several processes may build at once."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{library.name}.", dir=library.parent) as folder:
        compiled, linked = f"{folder}/{source.stem}.o", f"{folder}/{library.name}"
        _run([*command, "-c", str(source), "-o", compiled])
        # Linked without libgomp, whose functions are found in the one that torch has loaded, whatever its file name.
        _run([command[0], "-shared", "-nostdlib", compiled, "-lm", "-o", linked])
        Path(linked).replace(library)


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, timeout=60).stdout
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{Path(command[0]).name} failed: {error.stderr.strip()}") from error


def _processor_features() -> str:
    """What -march=native depends on; a home folder may be shared by machines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    keys = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(keys)})) + platform.machine()
