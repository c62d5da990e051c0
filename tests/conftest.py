"""Corpora for tests: the real Penn Treebank where it is to be found, and a tiny one that anyone can have."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kfacrnn.data import ptb
from kfacrnn.kfac.precision import has_half_precision_kernels
from tests import corpus


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """No test reaches further than this machine."""
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests have no network: {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_here)
        yield


@pytest.fixture(scope="session")
def ptb_folder() -> str:
    """The real word files, as KFACRNN_DATA or the cache has them. Skips without; never downloads."""
    folder = ptb.locate().folder
    if not (folder / "ptb.train.txt").exists():
        pytest.skip(f"no ptb.train.txt in {folder}: set KFACRNN_DATA, or run `kfacrnn data prepare`")
    return str(folder)


@pytest.fixture(scope="session")
def bfloat16() -> None:
    """Skips where torch's LSTM does not run in bfloat16, and training in it is refused."""
    if not has_half_precision_kernels(torch.bfloat16, torch.device("cpu")):
        pytest.skip("this processor has no bfloat16 arithmetic")


@pytest.fixture
def tiny_ptb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the three files of a tiny corpus, which is the published one for the time of the test."""
    monkeypatch.setattr(ptb, "PUBLISHED", corpus.write(tmp_path))
    monkeypatch.delenv("KFACRNN_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path
