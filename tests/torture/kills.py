"""SIGKILL at random moments, from the start of a process to its end; then the same command until it is through.

What is left must be bit for bit what an undisturbed command leaves, and no process may outlive the command.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from kfacrnn.store import Store
from tests import processes
from tests.synthetic import write_experiment
from tests.torture.runs import combinations, fingerprint, folder_of, small, use_tiny_corpus
from tests.torture.tally import Tally

BUDGET = ["budget.updates=60", "budget.log_every=3", "budget.eval_every=20", "budget.checkpoint_every=7"]
KILLS = 5  # of one command
PATIENCE = 600  # seconds
METHODS = "{SGD: {optimizer: sgd, grid: {optimizer.lr: [0.01, 0.1]}}, K-FAC: {optimizer: kfac_option1}}"


def prepare(texts: Path) -> None:
    """In every process: the tiny corpus, and one thread as in the tests."""
    os.environ["OMP_NUM_THREADS"] = "1"
    use_tiny_corpus(texts)


def set_environment(values: dict[str, str]) -> None:
    os.environ.update(values)  # whose bound method cannot be pickled


def undisturbed(command: Sequence[str], texts: Path) -> float:
    """Runs a command to its end; returns its seconds."""
    begun = time.monotonic()
    process = processes.start(command, None, prepare, texts)
    process.join(PATIENCE)
    assert process.exitcode == 0, f"{' '.join(command)} ended with {process.exitcode}"
    return time.monotonic() - begun


def killed(
    command: Sequence[str], texts: Path, rng: random.Random, kills: int, seconds: float, kill: Callable[..., bool]
) -> int:
    """Runs the command until it is through, killed up to `kills` times on the way, each time somewhere in the
    `seconds` that it takes; returns how often. `kill` says whether there was anything to kill."""
    done = 0
    while done < kills:
        process = processes.start(command, None, prepare, texts)
        process.join(rng.uniform(0, seconds))
        if process.exitcode is not None:
            break
        done += kill(process)
        process.join(PATIENCE)
    undisturbed(command, texts)
    return done


def kill_it(process: BaseProcess) -> bool:
    process.kill()
    return True


def processes_of(results: Path) -> list[int]:
    """The processes that have the folder in their command line: runs that a sweep has started."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = line.read_bytes().split(b"\0")
            if b"kfacrnn.child" in words and any(str(results).encode() in word for word in words):
                found.append(int(line.parent.name))
    return found


def of_runs(place: Path, rng: random.Random, times: int) -> Tally:
    """Training on every task with every optimiser."""
    tally, texts = Tally("kill a run, all tasks and optimisers"), place / "texts"
    while tally.tried < times:
        for task, optimizer in combinations(rng):
            if tally.tried >= times:
                break
            overrides = small(task, optimizer, texts, *BUDGET, f"seed={tally.tried}")
            whole, broken = place / "whole", place / "broken"
            seconds = undisturbed(["train", *overrides, f"results={whole}"], texts)
            kills = min(KILLS, times - tally.tried)
            command = ["train", *overrides, f"results={broken}"]
            done = killed(command, texts, rng, kills, seconds, kill_it)
            if not done:
                continue
            with tally.trial(f"{task} {optimizer}", done):
                assert fingerprint(folder_of(broken, overrides)) == fingerprint(folder_of(whole, overrides))
    return tally


def of_sweeps(place: Path, rng: random.Random, times: int) -> Tally:
    """A sweep with two runs at a time: its launcher, one of its runs, or all of them."""
    tally, texts = Tally("kill a sweep: launcher, runs or both"), place / "texts"
    path = write_experiment(place / "small.yaml", METHODS, tune="{seed: 0, extend: 1}", common=BUDGET)
    command = ["sweep", path, "--jobs", "2", "--results"]
    seconds = undisturbed([*command, str(place / "sweep0")], texts)
    for number in itertools.count(1):
        if tally.tried >= times:
            break
        results = place / f"sweep{number}"

        def kill(process: BaseProcess, results: Path = results) -> bool:
            runs = processes_of(results)
            victims, hit = rng.choice([[process.pid], runs[:1], [process.pid, *runs]]), False
            for pid in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid or 0, signal.SIGKILL)
                    hit = True
            return hit

        kills = min(KILLS, times - tally.tried)
        done = killed([*command, str(results)], texts, rng, kills, seconds, kill)
        if not done:
            continue
        with tally.trial(f"sweep {number}", done):
            processes.wait_for(lambda results=results: not processes_of(results), PATIENCE)  # no orphans
            assert {f.run_id: fingerprint(f) for f in Store(results)} == {
                f.run_id: fingerprint(f) for f in Store(place / "sweep0")
            }
    return tally


def of_figures(place: Path, rng: random.Random, times: int) -> Tally:
    """Drawing: at any moment, each of the files is the whole new one or not there."""
    tally, texts = Tally("kill the drawing of a figure"), place / "texts"
    path = write_experiment(place / "small.yaml", METHODS, tune="{seed: 0}", common=["budget.updates=4"])
    undisturbed(["sweep", path, "--results", str(place / "drawn")], texts)
    command = ["figure", path, "--results", str(place / "drawn"), "--out"]
    seconds = undisturbed([*command, str(place / "whole")], texts)
    wanted = {file.name: file.read_bytes() for file in (place / "whole").iterdir()}
    while tally.tried < times:
        out = place / f"figure{tally.tried}"
        process = processes.start([*command, str(out)], None, prepare, texts)
        process.join(rng.uniform(0, seconds))
        process.kill()
        process.join()
        with tally.trial(out.name):
            there = [file for file in out.glob("*") if file.suffix != ".tmp"]
            assert all(file.read_bytes() == wanted[file.name] for file in there)
            undisturbed([*command, str(out)], texts)
            assert all((out / name).read_bytes() == content for name, content in wanted.items())
    return tally


def of_uploads(place: Path, rng: random.Random, times: int) -> Tally:
    """`sync` to a server of this process: afterwards every run is there once, with every row once."""
    from tests.wandb_server import serving

    tally, texts = Tally("kill an upload to W&B"), place / "texts"
    path = write_experiment(place / "small.yaml", METHODS, tune="{seed: 0}", common=["budget.updates=20"])
    results = place / "mirrored"
    undisturbed(["sweep", path, "--results", str(results)], texts)
    rows = {folder.run_id: [int(row["update"]) for row in folder.metrics.rows()] for folder in Store(results)}
    command, seconds = ["sync", str(results), "--entity", "me"], 0.0
    for number in itertools.count():
        if tally.tried >= times:
            break
        with serving() as server:
            here = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40}
            here |= {f"WANDB_{kind}_DIR": str(place / "wandb") for kind in ("CONFIG", "CACHE", "DATA")}
            if not number:
                seconds = _upload(command, here)
                continue
            dead = []
            for _ in range(min(KILLS, times - tally.tried)):
                process = processes.start(command, None, set_environment, here)
                process.join(rng.uniform(0, seconds))
                dead += [process.pid] if process.exitcode is None else []
                process.kill()
                process.join()
            if not dead:
                continue
            with tally.trial(f"sync {number}", len(dead)):
                processes.wait_for(lambda dead=dead: not services_of(dead), PATIENCE)  # no orphans
                _upload(command, here)
                there = {run.name: [row["update"] for row in run.history] for run in server.runs.values()}
                assert there == rows
                assert not server.unknown
    return tally


def services_of(pids: Sequence[int | None]) -> list[str]:
    """W&B's own services of these processes."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = line.read_bytes().split(b"\0")
            if b"wandb-core" in words[0] and any(str(pid).encode() in words for pid in pids):
                found.append(line.parent.name)
    return found


def _upload(command: Sequence[str], environment: dict[str, str]) -> float:
    begun = time.monotonic()
    process = processes.start(command, None, set_environment, environment)
    process.join(PATIENCE)
    assert process.exitcode == 0, f"sync ended with {process.exitcode}"
    return time.monotonic() - begun
