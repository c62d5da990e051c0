"""Writing files: whole or not at all, and what the file system refuses in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kfacrnn.errors import UserError


@contextmanager
def explained(path: Path, hint: str = "") -> Iterator[None]:
    """What the file system refuses becomes one line, which may end in a hint."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}{hint and f'; {hint}'}") from error


def make_folder_of(path: Path, hint: str = "") -> None:
    """Makes the folder that a file is to be in, if there is none. Raises `UserError`."""
    with explained(path, hint):
        path.parent.mkdir(parents=True, exist_ok=True)


def write_atomic(path: Path, content: bytes) -> None:
    """Either the old content or the new one is there, whatever happens."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with explained(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, content: Any) -> None:
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())
