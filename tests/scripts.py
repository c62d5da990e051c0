"""The scripts of the project as modules."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

FOLDER = str(Path(__file__).parents[1] / "scripts")


def script(name: str) -> ModuleType:
    """`scripts/name.py`, or a module of a package there."""
    if FOLDER not in sys.path:
        sys.path.append(FOLDER)
    return importlib.import_module(name)
