"""The disk under a run: full, read-only, over quota, broken; files deleted, cut or filled with garbage.

Afterwards the disk is well again, and the same command must end bit for bit where an undisturbed one ends. In between:
one line, no traceback, and never less to go on from than the last checkpoint that was whole.
"""

from __future__ import annotations

import errno
import functools
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from kfacrnn import config, selection
from kfacrnn.errors import UserError
from kfacrnn.session import Session
from kfacrnn.store import RunFolder
from kfacrnn.train import train
from tests.synthetic import TINY, write_experiment
from tests.torture.runs import fingerprint, folder_of, say
from tests.torture.tally import Tally

OVERRIDES = [*TINY, "budget.updates=12", "budget.log_every=1", "budget.checkpoint_every=3"]
FULL = {name: getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EROFS", "EIO", "EACCES")}
FILES = ("metrics.csv", "status.json", "config.yaml", "meta.json", "checkpoint.pt", "checkpoint.old.pt")


class Disk:
    """Counts what is done to files, and refuses it from one moment on for as long as it is told to."""

    def __init__(self, first: int, last: int, number: int):
        self.done, self.first, self.last, self.number = 0, first, last, number

    def check(self) -> None:
        self.done += 1
        if self.first <= self.done < self.last:
            raise OSError(self.number, os.strerror(self.number))

    def wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def act(*arguments: Any, **options: Any) -> Any:
            self.check()
            return function(*arguments, **options)

        return act

    def open(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def act(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if set(mode) & set("wax"):
                self.check()
            return function(path, mode, *arguments, **options)

        return act

    @contextmanager
    def failing(self) -> Iterator[Disk]:
        patches = [mock.patch.object(Path, name, self.wrapped(getattr(Path, name))) for name in ("replace", "mkdir")]
        patches += [mock.patch.object(Path, "open", self.open(Path.open))]
        patches += [mock.patch.object(os, "fsync", self.wrapped(os.fsync))]
        for patch in patches:
            patch.start()
        try:
            yield self
        finally:
            for patch in patches:
                patch.stop()


def _wanted(place: Path) -> tuple[str, int]:
    """What an undisturbed run leaves, and how often it touches the disk."""
    with Disk(0, 0, 0).failing() as disk:
        folder = train(config.compose([*OVERRIDES, f"results={place / 'whole'}"]), "torture")
    return fingerprint(folder), disk.done


def _saved(folder: RunFolder, saves: list[int]) -> Any:
    """Notes the update of every checkpoint that has been written without an error."""
    save = RunFolder.save_checkpoint

    def noted(self: RunFolder, state: dict[str, Any]) -> None:
        save(self, state)
        saves.append(state["update"])

    return mock.patch.object(RunFolder, "save_checkpoint", noted)


def of_the_disk(place: Path, rng: random.Random, times: int) -> Tally:
    """Any one write, or any and all that follow, refused for any reason."""
    tally = Tally("disk full, over quota, read-only, broken")
    wanted, touches = _wanted(place)
    for number in range(times):
        results = place / f"disk{number}"
        name, first = rng.choice(list(FULL)), rng.randint(1, touches)
        last = first + rng.choice([1, 1000])
        folder, saves = folder_of(results, OVERRIDES), [0]
        with tally.trial(f"{name} from the {first}th write to the {last}th"):
            with Disk(first, last, FULL[name]).failing(), _saved(folder, saves):
                said = say("train", *OVERRIDES, f"results={results}")
            finished = folder.status().get("state") == "done"  # a write that came after the end was refused
            if said.code and not finished:
                _one_line(said.err, said.code)
            assert say("train", *OVERRIDES, f"results={results}").code == 0
            if not finished and folder.meta()["sessions"][1:]:
                assert folder.meta()["sessions"][-1]["from_update"] >= saves[-1]
            assert fingerprint(folder) == wanted
        shutil.rmtree(results, ignore_errors=True)
    return tally


def _one_line(err: list[str], code: int) -> None:
    lines = [line for line in err if line.strip()]
    assert code == 2, f"exit code {code}"
    assert lines, "nothing was said"
    assert lines[-1].startswith("kfacrnn: ")
    assert not any("Traceback" in line for line in lines), lines[-1]


def halt() -> None:
    raise UserError("stopped")


@contextmanager
def after_update(moment: int, act: Callable[[], None]) -> Iterator[None]:
    """Runs that come to the update `moment` for the first time do something behind it."""
    step, done = Session.step, []

    def stepped(session: Session) -> Any:
        batch = step(session)
        if session.update == moment and not done:
            done.append(moment)
            act()
        return batch

    with mock.patch.object(Session, "step", stepped):
        yield


def _damage(path: Path, rng: random.Random, said: list[str]) -> None:
    """Deletes, empties, cuts or overwrites a file, if it is there, and notes what was done."""
    how = rng.choice(["deleted", "emptied", "cut", "overwritten", "flipped"])
    if not path.exists():
        return
    content = path.read_bytes()
    middle = rng.randrange(len(content) + 1)
    if how == "deleted":
        path.unlink()
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(content[:middle])
    elif how == "overwritten":
        path.write_bytes(rng.randbytes(len(content)))
    elif not path.name.startswith("metrics"):  # a changed digit is a digit: no file without sums can tell
        path.write_bytes(content[:middle] + rng.randbytes(1) + content[middle + 1 :])
    said.append(f"{path.name} {how}")


def of_files(place: Path, rng: random.Random, times: int) -> Tally:
    """A file of the run's own, under a running run or while it is stopped."""
    tally = Tally("a file deleted, cut or overwritten under a run")
    wanted, _ = _wanted(place)
    for number in range(times):
        results, halted = place / f"file{number}", rng.choice([False, True])
        folder, moment, name = folder_of(results, OVERRIDES), rng.randint(1, 11), rng.choice(FILES)
        damage: list[str] = []
        act = halt if halted else functools.partial(_damage, folder.path / name, rng, damage)
        with tally.trial(lambda moment=moment, damage=damage: f"{damage} at update {moment}"):
            with after_update(moment, act):
                said = say("train", *OVERRIDES, f"results={results}")
            if halted:
                _damage(folder.path / name, rng, damage)
            elif said.code:
                _one_line(said.err, said.code)
            assert say("train", *OVERRIDES, f"results={results}").code == 0
            assert fingerprint(folder) == wanted
        shutil.rmtree(results, ignore_errors=True)
    return tally


def of_results(place: Path, rng: random.Random, times: int) -> Tally:
    """metrics.csv of a run that is done: never half a curve in a figure or a comparison."""
    tally = Tally("metrics.csv of a finished run deleted or cut")
    methods = "{SGD: {optimizer: sgd}, Adam: {optimizer: adam}}"
    path = write_experiment(place / "two.yaml", methods)
    assert say("sweep", path, "--results", str(place / "results")).code == 0
    for number in range(times):
        results = place / f"results{number}"
        shutil.copytree(place / "results", results)
        victim = rng.choice(sorted(results.glob("runs/*/*/*/metrics.csv")))
        content = victim.read_bytes()
        with tally.trial(number):
            if rng.random() < 0.2:
                victim.unlink()
            else:
                victim.write_bytes(content[: rng.randrange(len(content))])
            drawn = say("figure", path, "--results", str(results))
            assert drawn.code == 2, "a figure was drawn"
            assert "lacks rows" in drawn.err[-1]
            chosen = selection.select(["results"], results=str(results))
            assert victim.parent.name not in [run.run_id for run in chosen.runs]
            assert any("lacks rows" in line for line in chosen.said)
        shutil.rmtree(results)
    return tally
