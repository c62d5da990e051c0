"""Mutated command lines, experiment files, checkpoints and W&B files: a line and exit code 2, or what was asked for.

Nothing mutated may show a traceback, run code that it brings, write outside its results folder, or start a run that
cannot finish. Runs that a mutation leaves valid and small are therefore run, for a few updates.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from kfacrnn import config
from kfacrnn import train as training
from kfacrnn.errors import UserError
from kfacrnn.train import train
from tests.synthetic import FIGURE, TINY, write_experiment
from tests.torture.disk import OVERRIDES, after_update, halt
from tests.torture.runs import Said, fingerprint, folder_of, say
from tests.torture.tally import Tally

VALUES = [
    *("", "null", "true", "-1", "0", "1", "2", "1.5", "-0.0", "nan", "inf", "-inf", "1e400", "1e-400"),
    *(
        "9" * 18,
        "9" * 40,
        "9" * 5000,
        "0x10",
        "1_000",
        "[]",
        "[1,2]",
        "{}",
        "{a: 1}",
        "'",
        '"',
        "''",
        "a,b",
        "1,2",
        "range(3)",
        "glob(*)",
    ),
    *("???", "${seed}", "${oc.env:HOME}", "${nope}", "${task}", "${optimizer.lr}", "${oc.create:{a: 1}}", "${${seed}}"),
    *("../../etc/passwd", "/etc/passwd", "~", "~root", "..", ".", "a/b", "a\\b", "a\nb", "a\rb", "a\tb", "a\0b"),
    *("\x1b[2J", "größe", "\u202e", "😀", "\ud800", "ﬁ", "١", "$(touch owned)", "`touch owned`", "; touch owned"),
    *("!!python/object/apply:os.system [touch owned]", "&a [*a]", "__class__", "os.system", "x" * 100_000),
]
KEYS = [
    *("optimizer", "optimizer.lr", "optimizer.clip", "optimizer.name", "optimizer.schedule.kind", "optimizer/schedule"),
    *("task", "task.hidden", "task.batch_size", "task.name", "task.bits", "task.pad_to", "task.max_length"),
    *("budget", "budget.updates", "budget.log_every", "budget.checkpoint_every", "budget.eval_every", "budget.name"),
    *("seed", "precision", "threads", "device", "data.root", "data.source", "data", "tracker", "tracker.mode"),
    *("tracker.tags", "tracker.group", "hydra.verbose", "hydra/launcher", "hydra", "tuned", "", ".", "a.b.c.d"),
    *("optimizer.", ".lr", "lr", "optimizer.lr.x", "task@x", "größe", "__class__", "optimizer@optimizer"),
]
NUMERIC = [
    *("optimizer.lr", "optimizer.clip", "optimizer.schedule.warmup", "optimizer.schedule.rate", "task.hidden"),
    *("task.slots", "task.word_size", "task.read_heads", "task.write_heads", "task.bits", "task.batch_size"),
    *("task.min_length", "task.max_length", "task.min_repeats", "task.max_repeats", "task.sequences", "task.pad_to"),
    *("task.episodes", "task.norm_max", "task.eval_sequences", "task.clip", "seed", "budget.updates"),
    *("budget.log_every", "budget.eval_every", "budget.checkpoint_every", "+optimizer.momentum", "optimizer.damping"),
]
NUMBERS = ["0", "1", "2", "3", "7", "0.5", "1e-3", "1e-30", "1e30", "1e300", "-1", "null", "9" * 18, "2147483647"]
WHOLE = ["optimizer=sgd", "optimizer=kfac_option2", "optimizer=soap", "precision=bf16", "optimizer/schedule=cosine"]
PREFIXES = ("", "", "", "", "+", "++", "~", "-", "--", " ", "@", "'")
FLAGS = ["-m", "--cfg", "--cfg=job", "--help", "--info", "--bogus", "-", "--", "--multirun=1", "--version"]
COMMANDS = {
    "sweep": ["--dry-run", "--jobs=1", "--jobs=-3", "--jobs=x", "--only=SGD", "--only=", "--retry-failed"],
    "status": [],
    "figure": [
        "--from=csv",
        "--from=results",
        "--from=offline:/nope",
        "--from=wandb:a/b/c",
        "--from=nope",
        "--out=out",
    ],
    "compare": ["--where=seed=1", "--where", "--where==", "--group-by=,", "--metric=x", "--at=update=x", "--last=0"],
    "list": ["runs", "tasks", "nope"],
    "report": [],
    "data": ["check", "prepare ", "nope"],
}
PATIENCE = 30.0  # seconds of the processor
LARGEST, IMPOSSIBLE = 4_000, 10**15  # of a number in a run that is tried out: between these it may take its time


@contextmanager
def confined(place: Path) -> Iterator[Path]:
    """A working directory of its own, with all that is around it noted: nothing may be made outside `results`."""
    place.mkdir(parents=True, exist_ok=True)
    before, here = Path.cwd(), place / "here"
    here.mkdir()
    handler = signal.signal(signal.SIGPROF, _too_long)
    signal.setitimer(signal.ITIMER_PROF, PATIENCE)
    environment = {
        "HOME": str(place / "home"),
        "KFACRNN_DATA": str(place / "no corpus"),
        "XDG_CACHE_HOME": str(place.parent / "cache"),
    }
    os.chdir(here)
    try:
        with mock.patch.dict(os.environ, environment):
            yield here
        outside = [path for path in place.rglob("*") if not path.is_relative_to(here)]
        assert outside == [here] or not outside, f"written outside: {outside[:3]}"
        inside = [path.name for path in here.iterdir() if path.name not in ("results", "small.yaml", "outputs", "out")]
        assert not inside, f"written beside the results: {inside}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        os.chdir(before)
        shutil.rmtree(place)


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"not refused and not done after {PATIENCE} seconds")


@contextmanager
def tried_out() -> Iterator[None]:
    """A run that gets as far as training is really made if it is small, and otherwise said to be large."""

    def careful(run: Any, command: str) -> Any:
        sizes = [v for v in vars(run.task).values() if isinstance(v, int)]
        largest = max([*sizes, run.budget.updates, run.threads])
        if LARGEST < largest < IMPOSSIBLE or run.tracker.mode == "online":
            raise UserError("large: not tried out")
        return train(run, command)

    with mock.patch.object(training, "train", careful):
        yield


def _argument(rng: random.Random) -> str:
    """One override, mostly with something wrong in it."""
    kind = rng.random()
    if kind > 0.6:
        return f"{rng.choice(NUMERIC)}={rng.choice(NUMBERS)}"
    if kind > 0.5:
        return rng.choice(WHOLE)
    if kind < 0.1:
        return rng.choice(FLAGS)
    if kind < 0.2:
        return rng.choice(VALUES)
    text = f"{rng.choice(PREFIXES)}{rng.choice(KEYS)}={rng.choice(VALUES)}"
    return _scratched(text, rng) if rng.random() < 0.2 else text


def _scratched(text: str, rng: random.Random) -> str:
    """With one character left out, doubled, or replaced by any other."""
    place = rng.randrange(len(text))
    new = rng.choice(["", text[place] * 2, chr(rng.randrange(1, 0x3000))])
    return text[:place] + new + text[place + 1 :]


def _judge(said: Said) -> str:
    """A refusal is a line and exit code 2 (argparse's own has usage before it); else the command did what it says."""
    assert not any("Traceback" in line for line in said.err), said.err[-1]
    if said.code == 2:
        lines = [line for line in said.err if line.strip()]
        assert lines, "refused without a word"
        assert len(lines) == 1 or lines[0].startswith(("usage:", "[")), lines[:3]
        assert max(map(len, lines)) < 3000, "a line that nobody can read"
        return "large" if "not tried out" in lines[-1] else "refused"
    assert said.code in (0, 1), f"exit code {said.code}"
    return "accepted"


def of_command_lines(place: Path, rng: random.Random, times: int) -> Tally:
    """`train` and all other commands, with one to three mutated arguments."""
    tally, ends = Tally("mutated command lines"), {"refused": 0, "large": 0, "accepted": 0}
    base = [*TINY, "budget.updates=2", "budget.log_every=1"]
    for number in range(times):
        arguments = [_argument(rng) for _ in range(rng.randint(1, 3))]
        command = rng.choice(["train"] * 6 + [*COMMANDS])
        if command == "train":
            words = ["train", *base, *arguments]
        else:
            named = command in ("sweep", "status", "figure")
            first = [rng.choice(["small.yaml", "smoke", "2", "nope", "../x.yaml"])] * named
            flags = rng.sample(COMMANDS[command], min(1, len(COMMANDS[command])))
            words = [command, *first, *flags, *arguments[:2], *(["--dry-run"] * (command == "sweep"))]
        tried = tally.trial(lambda words=words: [word[:80] for word in words if word not in base])
        with tried, confined(place / f"line{number}") as here, tried_out():
            write_experiment(here / "small.yaml", "{SGD: {optimizer: sgd}}")
            ends[_judge(say(*words))] += 1
    tally.note = ", ".join(f"{count} {end}" for end, count in ends.items())
    return tally


def of_experiments(place: Path, rng: random.Random, times: int) -> Tally:
    """Files of an experiment with a value, a key or a few bytes changed; looked at by a dry run of the sweep."""
    tally, ends = Tally("mutated experiment files"), {"refused": 0, "large": 0, "accepted": 0}
    methods = "{SGD: {optimizer: sgd, grid: {optimizer.lr: [0.1, 0.2]}}, Adam: {optimizer: adam}}"
    for number in range(times):
        with tally.trial(number), confined(place / f"file{number}") as here, tried_out():
            path = here / "small.yaml"
            write_experiment(path, methods, tune="{seed: 0, extend: 1}", select="{last: 3}", figure=FIGURE)
            content = bytearray(path.read_bytes())
            for _ in range(rng.randint(1, 3)):
                if rng.random() < 0.5:  # a number for a number: the file can still be read
                    where = rng.choice([index for index, byte in enumerate(content) if chr(byte).isdigit()])
                    content[where : where + 1] = rng.choice(NUMBERS).encode()
                    continue
                where = rng.randrange(len(content))
                until = where + rng.choice([0, 1, 5])
                value = rng.choice(VALUES)[:3000].encode(errors="surrogatepass")
                content[where:until] = rng.choice([value, rng.randbytes(rng.randint(1, 4)), b""])
            path.write_bytes(content)
            command, *flags = rng.choice([["sweep", "--dry-run"], ["status"], ["figure"]])
            ends[_judge(say(command, "small.yaml", *flags))] += 1
    tally.note = ", ".join(f"{count} {end}" for end, count in ends.items())
    return tally


class Bomb:
    """What a pickle can do to whoever loads it."""

    def __reduce__(self) -> Any:
        return os.system, ("touch owned",)


def _mutated(content: bytes, rng: random.Random) -> bytes:
    """A checkpoint that somebody has changed, mostly with a sum that fits."""
    body = bytearray(content[32:])
    kind = rng.randrange(5)
    if kind == 0:
        body = bytearray(pickle.dumps({"update": 3, "model": Bomb()}))
    elif kind == 1:
        buffer = io.BytesIO()
        torch.save({"update": 3, "rows": None, "model": Bomb()}, buffer)
        body = bytearray(buffer.getvalue())
    elif kind == 2:
        state = torch.load(io.BytesIO(body), weights_only=True)
        state[rng.choice(list(state))] = rng.choice([None, -1, "x", [], {}, torch.zeros(3)])
        buffer = io.BytesIO()
        torch.save(state, buffer)
        body = bytearray(buffer.getvalue())
    else:
        for _ in range(rng.randint(1, 20)):
            body[rng.randrange(len(body))] = rng.randrange(256)
    return (hashlib.sha256(body).digest() if rng.random() < 0.9 else content[:32]) + bytes(body)


def of_checkpoints(place: Path, rng: random.Random, times: int) -> Tally:
    """Checkpoints with a right sum and a wrong content: never code, never a traceback; the run goes on or refuses."""
    tally, ends = Tally("mutated checkpoints"), {"refused": 0, "went on": 0}
    whole = fingerprint(train(config.compose([*OVERRIDES, f"results={place / 'whole'}"]), "torture"))
    with after_update(6, halt):
        assert say("train", *OVERRIDES, f"results={place / 'stopped'}").code == 2
    for number in range(times):
        with tally.trial(number), confined(place / f"checkpoint{number}") as here:
            shutil.copytree(place / "stopped", here / "results")
            folder = folder_of(here / "results", OVERRIDES)
            path = folder.path / "checkpoint.pt"
            path.write_bytes(_mutated(path.read_bytes(), rng))
            said = say("train", *OVERRIDES, f"results={here / 'results'}")
            assert not (here / "owned").exists(), "code was run"
            if said.code == 2:
                assert said.err[-1].startswith("kfacrnn: ")
                ends["refused"] += 1
            else:
                assert folder.state() in ("done", "diverged")
                ends["went on"] += 1
                sound = any("is not used" in line for line in said.err)
                assert not sound or fingerprint(folder) == whole
    tally.note = ", ".join(f"{count} {end}" for end, count in ends.items())
    return tally


def of_offline_files(place: Path, rng: random.Random, times: int) -> Tally:
    """`.wandb` files with bytes changed, cut or made up, read by `compare`."""
    tally, ends = Tally("mutated .wandb files"), {"refused": 0, "large": 0, "accepted": 0}
    mirrored = [*TINY, "tracker=wandb", f"results={place / 'mirrored'}"]
    private = {f"WANDB_{kind}_DIR": str(place / "private") for kind in ("CONFIG", "CACHE", "DATA")}
    with mock.patch.dict(os.environ, private):
        assert say("train", *mirrored).code == 0
        (file,) = place.rglob("*.wandb")
        content = file.read_bytes()
        for number in range(times):
            changed = bytearray(content)
            for _ in range(rng.randint(1, 20)):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            changed = changed[: rng.randrange(len(changed))] if rng.random() < 0.3 else changed
            changed = bytearray(rng.randbytes(rng.randrange(2000))) if rng.random() < 0.1 else changed
            files = place / f"offline{number}"
            files.mkdir()
            (files / "run-abc.wandb").write_bytes(changed)
            with tally.trial(number), mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(place / f"cache{number}")}):
                ends[_judge_said(say("compare", f"offline:{files}", "--where", "state=*"))] += 1
    tally.note = ", ".join(f"{count} {end}" for end, count in ends.items())
    return tally


def _judge_said(said: Said) -> str:
    """`compare` may say several things of what it could read."""
    if said.code == 2:
        return _judge(Said(2, said.out, said.err[-1:]))
    return _judge(said)
