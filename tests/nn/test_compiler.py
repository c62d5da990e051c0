"""How C sources are built, kept and done without, by the example of pointwise.c."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from kfacrnn.nn import compiler, pointwise


@pytest.fixture
def undecided(tmp_path, monkeypatch):
    """As a process starts, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("KFACRNN_POINTWISE", raising=False)
    compiler._decide.cache_clear()
    yield monkeypatch
    compiler._decide.cache_clear()


def a_compiler(folder, script):
    path = folder / "a-compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_without_a_compiler_torch_is_used_and_the_reason_is_told(undecided, tmp_path):
    undecided.delenv("CC", raising=False)
    undecided.setenv("PATH", str(tmp_path))
    assert pointwise.status() == "plain torch: no C compiler found"
    assert pointwise.kernel_for(torch.float32, torch.float32, torch.device("cpu")) is None


@pytest.mark.parametrize(
    "script", ["echo no licence >&2; exit 1", 'case "$1" in --version) ;; *) echo no licence >&2; exit 1;; esac']
)
def test_a_compiler_that_fails_is_quoted_in_one_line(undecided, tmp_path, script):
    undecided.setenv("CC", a_compiler(tmp_path, script))
    assert pointwise.status() == "plain torch: a-compiler failed: no licence"


def test_what_the_compiler_made_must_load(undecided, tmp_path):
    undecided.setenv(
        "CC", a_compiler(tmp_path, 'for last; do :; done; [ "$1" = --version ] || echo nonsense > "$last"')
    )
    assert pointwise.status().startswith("plain torch: ")


def test_a_cache_that_cannot_be_written_is_no_error(undecided, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert pointwise.status().startswith("plain torch: ")


def test_the_environment_forces_either_path(undecided, tmp_path):
    undecided.setenv("KFACRNN_POINTWISE", "torch")
    assert pointwise.status() == "plain torch: KFACRNN_POINTWISE=torch"
    compiler._decide.cache_clear()
    undecided.setenv("KFACRNN_POINTWISE", "compiled")
    undecided.setenv("CC", a_compiler(tmp_path, "exit 1"))
    with pytest.raises(RuntimeError, match="KFACRNN_POINTWISE=compiled, but the kernel cannot be had: a-compiler"):
        pointwise.status()
    undecided.setenv("KFACRNN_POINTWISE", "fast")
    with pytest.raises(RuntimeError, match="KFACRNN_POINTWISE=fast must be torch or compiled"):
        pointwise.status()


FRESH = """
import pathlib, torch
from kfacrnn import nn
from kfacrnn.kfac.capture import Tape
from kfacrnn.nn import compiler, pointwise
layer = nn.LSTM(3, 4)
layer(torch.zeros(2, 2, 3))
decided = compiler._decide.cache_info().currsize
layer.tape = Tape()
layer(torch.zeros(2, 2, 3))
maps = pathlib.Path("/proc/self/maps").read_text().splitlines()
openmp = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line}
print(decided, compiler._decide.cache_info().currsize, pointwise.status(), len(openmp))
"""


def test_processes_may_build_at_once_when_first_needed_and_have_one_openmp(undecided, tmp_path):
    if pointwise.status() != "compiled":
        pytest.skip(pointwise.status())
    cache = tmp_path / "fresh"
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, "-c", FRESH], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate()[0] for process in started] == ["0 1 compiled 1\n"] * 2
    (built,) = (cache / "kfacrnn").iterdir()
    ctypes.CDLL(str(built))
