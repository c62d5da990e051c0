"""Corpora for tests: the real Penn Treebank where it is to be found, and a tiny one that anyone can have."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kfacrnn.data import ptb
from kfacrnn.data.ptb import Published

TINY = {
    "train": " the cat sat on the mat \n the dog <unk> N times \n a cat 's mat \n" * 12,
    "valid": " the dog sat \n a cat sat on N mat \n",
    "test": " a dog \n the <unk> cat 's mat \n",
}


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


@pytest.fixture
def tiny_ptb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the three files of a tiny corpus, which is the published one for the time of the test."""
    published = {}
    for split, text in TINY.items():
        (tmp_path / f"ptb.{split}.txt").write_text(text)
        lines = (line.strip().replace(" ", "_") + "\n" for line in text.splitlines())
        characters = "".join(f"{symbol} " for line in lines for symbol in line)
        sums = [hashlib.sha256(content.encode()).hexdigest() for content in (text, characters)]
        published[split] = Published(len(text), *sums)
    monkeypatch.setattr(ptb, "PUBLISHED", published)
    monkeypatch.delenv("KFACRNN_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path
