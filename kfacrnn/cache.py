"""The user's cache folder: what is there can be made or downloaded again."""

from __future__ import annotations

import os
from pathlib import Path


def place(*parts: str) -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").joinpath("kfacrnn", *parts)
