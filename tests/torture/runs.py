"""Small runs of every task and optimiser, commands in this process, and what must be equal at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kfacrnn import cli, config, discovery
from kfacrnn.data import ptb
from kfacrnn.store import RunFolder, Store
from tests import corpus
from tests.runs import curve
from tests.synthetic import TINY

TEXT = [
    *("task.hidden=8", "task.layers=1", "task.batch_size=4", "task.bptt=5", "task.eval_batch_size=2"),
    "task.dropout=0.3",
]


@dataclass(frozen=True)
class Said:
    """How a command ended in this process: its exit code and its lines. What it raised is raised."""

    code: int
    out: list[str]
    err: list[str]


def say(*arguments: str) -> Said:
    """Runs `kfacrnn arguments` in this process. Argparse's own way out is an exit code like any other."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return Said(code, out.getvalue().splitlines(), err.getvalue().splitlines())


def use_tiny_corpus(folder: Path) -> None:
    """Takes the tiny corpus, which it writes to `folder`, for the published one, for the rest of this process."""
    folder.mkdir(parents=True, exist_ok=True)
    ptb.PUBLISHED = corpus.write(folder)


def small(task: str, optimizer: str, texts: Path, *more: str) -> list[str]:
    """Overrides for a run of a second or less; `texts` has the tiny corpus."""
    settings = [f"task.{field.name}=" for field in dataclasses.fields(discovery.load("tasks", task).Config)]
    sizes = [size for size in (TINY if task == "repeat_copy" else TEXT) if size.startswith(tuple(settings))]
    return [f"task={task}", f"optimizer={optimizer}", f"data.root={texts}", "threads=1", *sizes, *more]


def combinations(rng: random.Random) -> list[tuple[str, str]]:
    """Every task with every optimiser whose package is here, in random order."""
    optimizers = [name for name in discovery.modules("optimizers") if not discovery.missing("optimizers", name)]
    pairs = list(itertools.product(discovery.modules("tasks"), optimizers))
    rng.shuffle(pairs)
    return pairs


def folder_of(results: Path, overrides: Sequence[str]) -> RunFolder:
    return Store(results).folder(config.compose([*overrides, f"results={results}"]))


def fingerprint(folder: RunFolder) -> str:
    """Everything of a finished run that no clock decides: rows, parameters, state; and that its folder is in order."""
    assert folder.state() == "done", f"{folder.path} is {folder.state()}: {folder.status().get('reason')}"
    litter = [path.name for path in folder.path.iterdir() if path.suffix == ".tmp" or "checkpoint" in path.name]
    assert not litter, f"left behind: {litter}"
    assert (folder.path / "config.yaml").is_file()
    assert folder.meta()["run_id"] == folder.run_id
    parameters = torch.load(folder.path / "model.pt", weights_only=True)
    digest = hashlib.sha256(repr(curve(folder)).encode())
    for name in sorted(parameters):
        digest.update(parameters[name].numpy().tobytes())
    return digest.hexdigest()
