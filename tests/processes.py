"""Real processes for tests: `kfacrnn …` in a process of its own that can be killed, without importing torch each time.

A fork server that has imported the framework, but has not used it, is forked for every command.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.warm", "pytest.__main__"])


def start(
    arguments: Sequence[str], output: Path | None = None, prepare: Callable[..., None] | None = None, *rest: Any
) -> BaseProcess:
    """Starts `kfacrnn arguments`; what it says is added to the file `output`. `prepare(*rest)` runs in it first."""
    process = CONTEXT.Process(target=_command, args=(list(arguments), output, prepare, rest))
    process.start()
    return process


def run(
    arguments: Sequence[str], output: Path, prepare: Callable[..., None] | None = None, *rest: Any
) -> tuple[int | None, list[str]]:
    """Runs a command to its end: exit code, and the lines it said."""
    process = start(arguments, output, prepare, *rest)
    process.join(120)
    assert not process.is_alive()
    return process.exitcode, output.read_text().splitlines()


def _command(arguments: list[str], output: Path | None, prepare: Callable[..., None] | None, rest: Any) -> None:
    file = os.open(output or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if prepare:
        prepare(*rest)
    from kfacrnn import cli

    sys.exit(cli.main(arguments))


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)
