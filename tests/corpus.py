"""A tiny corpus that anyone can have, and what would be published of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from kfacrnn.data.ptb import Published

TEXT = {
    "train": " the cat sat on the mat \n the dog <unk> N times \n a cat 's mat \n" * 12,
    "valid": " the dog sat \n a cat sat on N mat \n",
    "test": " a dog \n the <unk> cat 's mat \n",
}


def write(folder: Path) -> dict[str, Published]:
    """Puts the three files into `folder`; returns what takes the place of `kfacrnn.data.ptb.PUBLISHED`."""
    published = {}
    for split, text in TEXT.items():
        (folder / f"ptb.{split}.txt").write_text(text)
        lines = (line.strip().replace(" ", "_") + "\n" for line in text.splitlines())
        characters = "".join(f"{symbol} " for line in lines for symbol in line)
        sums = [hashlib.sha256(content.encode()).hexdigest() for content in (text, characters)]
        published[split] = Published(len(text), *sums)
    return published
