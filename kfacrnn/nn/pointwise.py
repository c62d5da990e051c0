"""The point-wise part of an LSTM or GRU step in C, given a C compiler; knows nothing of layers or Fisher blocks.

`pointwise.c` is compiled when first needed, which takes about a second, and kept in the user's cache folder.
Where that cannot be done the layers do the same in torch operations, and `status()` says why. The environment's
KFACRNN_POINTWISE=torch does without it; KFACRNN_POINTWISE=compiled makes it an error not to have it.
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

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("pointwise.c")
COMPILERS = ("cc", "gcc", "clang")
# Not fast-math: runs that explode must show NaN and infinity.
FLAGS = ("-O3", "-march=native", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
SIZES = ("steps", "cases", "hidden", "threads", "narrow")
POINTERS = (
    *("inputs", "gates", "cells", "squashed", "output", "product", "d_output", "rounded", "d_gates", "d_cell"),
    *("recurrent", "norms", "gain_hh", "gain_c", "bias_c", "d_recurrent", "d_normed", "initial", "bias_hn"),
)


class _Steps(ctypes.Structure):
    """`Steps` of pointwise.c."""

    _fields_ = (*((name, ctypes.c_int64) for name in SIZES), *((name, ctypes.c_void_p) for name in POINTERS))


class CompiledSteps:
    """Steps t of one recurrence, forward (`advance`) or backward (`retreat`), on CPU tensors named as in pointwise.c.

    All must be contiguous and float32, but `output`, `initial`, `product`, `d_output` and `rounded` may be bfloat16
    together, and `inputs` always is. `kernel` is "lstm" or "gru".
    """

    def __init__(self, library: ctypes.CDLL, of: dict[str, Tensor | None], kernel: str):
        given = {name: tensor for name, tensor in of.items() if tensor is not None}
        output, narrow = given["output"], given["product"].dtype == torch.bfloat16
        sizes = dict(zip(SIZES, (*output.shape, torch.get_num_threads(), narrow), strict=True))
        self._tensors = given  # keeps the memory
        self._steps = ctypes.byref(_Steps(**sizes, **{name: tensor.data_ptr() for name, tensor in given.items()}))
        self._advance, self._retreat = (getattr(library, f"{kernel}_{way}") for way in ("advance", "retreat"))
        for function in (self._advance, self._retreat):
            function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_int64), None

    def advance(self, t: int) -> None:
        self._advance(self._steps, t)

    def retreat(self, t: int) -> None:
        self._retreat(self._steps, t)


def status() -> str:
    """ "compiled", or "plain torch: " and the reason. Compiles if that has not been tried yet."""
    library, reason = _decide()
    return f"plain torch: {reason}" if library is None else "compiled"


def compiled(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL | None:
    """The library made of another C source of this package, on the same terms as that of `kernel_for`."""
    return _decide(source, flags)[0]


def kernel_for(state: torch.dtype, product: torch.dtype, device: torch.device) -> ctypes.CDLL | None:
    """The compiled kernel, if there is one and it can do this. Raises RuntimeError if it is missing though
    KFACRNN_POINTWISE=compiled."""
    fits = device.type == "cpu" and state == torch.float32 and product in (torch.float32, torch.bfloat16)
    return _decide()[0] if fits else None


@functools.cache
def _decide(source: Path = SOURCE, flags: tuple[str, ...] = FLAGS) -> tuple[ctypes.CDLL | None, str]:
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
    flags = (*flags, "-fopenmp-simd" if "clang" in version else "-fopenmp")
    texts = [path.read_text("utf-8") for path in (source, *sorted(source.parent.glob("*.h")))]
    key = "\n".join([*texts, *flags, version, _processor_features()])
    name = f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kfacrnn"
    if not (cache / name).exists():
        _build([compiler, *flags], source, cache, name)
    return ctypes.CDLL(str(cache / name))


def _compiler() -> str:
    for name in (os.environ.get("CC"), *COMPILERS):
        if name and (path := shutil.which(name)):
            return path
    raise RuntimeError("no C compiler found")


def _build(command: list[str], source: Path, cache: Path, name: str) -> None:
    """Atomic, so that several processes may build at once."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{name}.", dir=cache) as folder:
        compiled, linked = f"{folder}/{source.stem}.o", f"{folder}/{name}"
        _run([*command, "-c", str(source), "-o", compiled])
        # Linked without libgomp, whose functions are found in the one that torch has loaded, whatever its file name.
        _run([command[0], "-shared", "-nostdlib", compiled, "-lm", "-o", linked])
        Path(linked).replace(cache / name)


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
