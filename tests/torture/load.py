"""Many at once, and much of everything: sweeps on one folder, thousands of runs, a million rows, a long run."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from pathlib import Path
from unittest import mock

from kfacrnn import config
from kfacrnn.experiment import load
from kfacrnn.plan import Plan
from kfacrnn.session import Session
from kfacrnn.store import Store
from tests import processes, synthetic
from tests.synthetic import TINY, write_experiment
from tests.torture.runs import fingerprint, folder_of, say
from tests.torture.tally import Tally

PATIENCE = 1200  # seconds
SWEEPS = 8
RUNS, ROWS_EACH = 5_000, 20
ROWS = 1_000_000
METHODS = "{SGD: {optimizer: sgd, grid: {optimizer.lr: [0.01, 0.1]}}, Adam: {optimizer: adam}}"


def of_concurrent_sweeps(place: Path, rng: random.Random, times: int) -> Tally:
    """The same sweep from eight shells at once: every run is made once, as by one alone."""
    tally = Tally(f"{SWEEPS} sweeps at once on one results folder")
    path = write_experiment(place / "shared.yaml", METHODS, tune="{seed: 0}", seeds="[1, 2]")
    alone = ["sweep", path, "--results", str(place / "alone")]
    assert processes.run(alone, place / "alone.txt", None)[0] == 0
    wanted = {folder.run_id: fingerprint(folder) for folder in Store(place / "alone")}
    for number in range(times):
        results = place / f"together{number}"
        command = ["sweep", path, "--results", str(results)]
        files = [place / f"said{number}.{index}.txt" for index in range(SWEEPS)]
        together = [processes.start(command, file) for file in files]
        for process in together:
            process.join(PATIENCE)
        with tally.trial(number):
            said = [file.read_text() for file in files]
            assert {process.exitcode for process in together} <= {0, 1}
            assert not [text for text in said if "Traceback" in text]
            assert not [line for text in said for line in text.splitlines() if line.startswith("FAILED")]
            last = processes.run(command, place / f"last{number}.txt")
            assert last[0] == 0
            assert {folder.run_id: fingerprint(folder) for folder in Store(results)} == wanted
            sessions = Counter(len(folder.meta()["sessions"]) for folder in Store(results))
            assert set(sessions) == {1}, f"runs were made twice: {sessions}"
    return tally


def of_many_runs(place: Path, rng: random.Random, times: int) -> Tally:
    """A store of thousands of runs: every command that reads all of it, and how long it takes."""
    tally, results = Tally("a store of many runs"), place / "results"
    seeds = f"[{', '.join(map(str, range(1, max(times // 2, 1) + 1)))}]"
    path = write_experiment(place / "many.yaml", "{SGD: {optimizer: sgd}, Adam: {optimizer: adam}}", seeds=seeds)
    common = ["budget.updates=20"]
    for planned in Plan(load(path), str(results), common).known():
        synthetic.store(planned, [3.0 * 0.9**k + rng.random() / 9 for k in range(ROWS_EACH)])
    seconds = {}
    commands = {
        "list": ["list", "runs"],
        "status": ["status", path, *common],
        "sweep": ["sweep", path, *common],
        "compare": ["compare"],
        "figure": ["figure", path, *common],
    }
    for name, words in commands.items():
        begun = time.process_time()
        with tally.trial(name):
            said = say(*words, "--results", str(results))
            assert said.code == 0, said.err[-1]
        seconds[name] = time.process_time() - begun
    counted = sum(1 for _ in Store(results))
    tally.note = f"{counted:,} runs; processor seconds: " + ", ".join(f"{k} {v:.1f}" for k, v in seconds.items())
    return tally


def of_many_rows(place: Path, rng: random.Random, times: int) -> Tally:
    """metrics.csv of `times` rows: appended to, continued from, listed, compared."""
    tally, results = Tally("metrics.csv of many rows"), place / "long"
    overrides = [*TINY, "budget.log_every=1", f"budget.updates={times}"]
    folder = folder_of(results, overrides)
    run = config.compose([*overrides, f"results={results}"])
    session = Session(run)
    folder.path.mkdir(parents=True)
    session.begin(folder, "torture")
    session.step()
    row = session.row()
    folder.metrics.append(row)
    head, line = folder.metrics.path.read_text().splitlines()
    with folder.metrics.path.open("w") as file:
        file.write(f"{head}\n")
        for start in range(1, times + 1, 10_000):
            until = min(start + 10_000, times + 1)
            file.write("".join(f"{update}{line[line.index(',') :]}\n" for update in range(start, until)))
    seconds = {}

    def timed(name: str, act: object) -> None:
        begun = time.process_time()
        with tally.trial(name):
            act()  # type: ignore[operator]
        seconds[name] = time.process_time() - begun

    def truncate() -> None:
        folder.metrics.truncate(times - 1)
        assert len(folder.metrics.updates()) == times - 1

    def append() -> None:
        folder.metrics.append(row | {"update": times})
        last = folder.metrics.last_row()
        assert last is not None
        assert int(last["update"]) == times

    def finish() -> None:
        folder.set_status("done", update=times, updates=times)
        assert not folder.is_cut(run.budget)

    def command(*words: str) -> None:
        said = say(*words, "--results", str(results))
        assert said.code == 0, said.err[-1]

    timed("go on", truncate)
    timed("append", append)
    timed("end", finish)
    timed("list", lambda: command("list", "runs"))
    timed("compare", lambda: command("compare"))
    tally.note = f"{times:,} rows; processor seconds: " + ", ".join(f"{k} {v:.2f}" for k, v in seconds.items())
    return tally


def of_a_long_run(place: Path, rng: random.Random, times: int) -> Tally:
    """`times` updates with a row, a checkpoint and a status at every few: memory and open files stay what they are."""
    tally, seen = Tally("a long run: memory and open files"), []
    overrides = [*TINY, "optimizer=kfac_option1", f"budget.updates={times}", "budget.log_every=1"]
    step = Session.step

    def watched(session: Session) -> object:
        if session.update in (times // 4, times // 2, times - 1):
            resident = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line)
            seen.append((int(resident.split()[1]) / 1024, len(os.listdir("/proc/self/fd"))))  # noqa: PTH208
        return step(session)

    with tally.trial(f"{times} updates"):
        with mock.patch.object(Session, "step", watched), mock.patch("kfacrnn.train.HEARTBEAT", 0.0):
            said = say("train", *overrides, "budget.checkpoint_every=10", f"results={place / 'soak'}")
        assert said.code == 0
        (early, files), *_, (late, files_late) = seen
        assert files_late <= files, f"open files: {files} to {files_late}"
        assert late - early < 8, f"memory: {early:.0f} MB after a quarter, {late:.0f} MB at the end"
        tally.note = f"{times:,} updates; {early:.0f} MB after a quarter, {late:.0f} MB at the end"
    return tally
