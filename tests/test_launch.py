"""One command, many runs: Hydra's multirun without its surprises."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kfacrnn import config, launch
from kfacrnn.errors import UserError
from kfacrnn.store import Store
from tests import processes
from tests.synthetic import TINY


def settings(results: Path) -> list[tuple[float, int]]:
    """Learning rate and seed of every run in the store."""
    from omegaconf import OmegaConf

    stored = [OmegaConf.load(folder.path / "config.yaml") for folder in Store(results)]
    return sorted((run.optimizer.lr, run.seed) for run in stored)


def test_a_multirun_runs_every_point_and_a_second_one_none(tmp_path: Path) -> None:
    grid = ["optimizer.lr=0.01,0.1", "-m", *TINY, "seed=0,1", f"results={tmp_path}"]  # flags may stand anywhere
    code, said = processes.run(["train", *grid], tmp_path / "output.txt")
    assert code == 0
    assert settings(tmp_path) == [(0.01, 0), (0.01, 1), (0.1, 0), (0.1, 1)]
    folders = list(Store(tmp_path))
    assert {folder.state() for folder in folders} == {"done"}
    for folder in folders:
        (session,) = folder.meta()["sessions"]
        program, verb, *overrides = session["command"].split()
        assert (program, verb) == ("kfacrnn", "train")
        assert config.compose(overrides).run_id == folder.run_id  # the command of this point alone
    assert sum(line.startswith("done at update 4") for line in said) == 4
    assert processes.run(["train", *grid], tmp_path / "output.txt")[0] == 0
    assert all(len(folder.meta()["sessions"]) == 1 for folder in folders)


def test_a_bad_point_is_refused_before_the_first_run(tmp_path: Path) -> None:
    for bad in ("optimizer.lr=0.1,fast", "optimizer=adam,adamm", "task.hidden=4,0", "device=cpu,tpu"):
        with pytest.raises(UserError) as caught:
            launch.run(["-m", *TINY, bad, f"results={tmp_path / 'results'}"], "test")
        assert bad.split(",")[1] in str(caught.value)
    assert not (tmp_path / "results").exists()


def test_a_point_that_cannot_run_is_one_line_and_the_others_run(tmp_path: Path) -> None:
    grid = [*TINY, "device=cuda:99,cpu", f"results={tmp_path}", "seed=3"]
    code, said = processes.run(["train", "-m", *grid, "hydra.sweep.subdir=${seed}"], tmp_path / "output.txt")
    assert [line for line in said if line.startswith("kfacrnn:")] == [
        "kfacrnn: device=cuda:99: torch finds 0 CUDA devices here; write device=cpu"
    ]
    assert not [line for line in said if "Traceback" in line]
    assert settings(tmp_path) == [(0.003, 3)]
    assert code == 0  # the same run, on another device


def test_a_point_that_fails_gives_the_exit_code(tmp_path: Path) -> None:
    grid = ["task=ptb_char", "data.root=/nonexistent", "seed=1,2", f"results={tmp_path}"]
    code, said = processes.run(["train", "-m", *grid], tmp_path / "output.txt")
    assert code == 2
    assert sum("/nonexistent" in line for line in said if line.startswith("kfacrnn:")) == 2
    assert not [line for line in said if "Traceback" in line]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_stops_a_multirun_and_not_just_its_present_point(number: signal.Signals, tmp_path: Path) -> None:
    grid = [*TINY, "budget.updates=100000", "budget.log_every=1", "seed=0,1", f"results={tmp_path}"]
    process = processes.start(["train", "-m", *grid], tmp_path / "output.txt")
    processes.wait_for(lambda: any(folder.metrics.rows() for folder in Store(tmp_path)))
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 130
    assert [folder.state() for folder in Store(tmp_path)] == ["interrupted"]


def test_cfg_shows_the_composed_configuration_and_runs_nothing(tmp_path: Path) -> None:
    arguments = ["train", "--cfg", "job", "optimizer=sgd", "seed=7", f"results={tmp_path / 'results'}"]
    code, said = processes.run(arguments, tmp_path / "output.txt")
    assert code == 0
    assert {"seed: 7", "  name: sgd", "  name: repeat_copy"} <= set(said)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("flag", ["--", "--run"])
def test_hydras_own_flags_leave_nothing_beside_the_results(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert launch.run([*TINY, "results=here", flag], "test") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert settings(tmp_path / "here") == [(0.003, 0)]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--bogus"], "--bogus"),
        (["--cfg", "job", "optimizer.lr=fast"], "optimizer.lr=fast"),
        (["-m", "foo"], "'foo' is no override"),
        (["-m", "--cfg", "job", "seed=0,1"], "--cfg"),
        (["--info", f"tracker={'x' * 1000}"], "--info"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_a_mistake_among_the_flags_is_one_line(arguments: list[str], named: str) -> None:
    with pytest.raises(UserError) as caught:
        launch.run(arguments, "test")
    assert named in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_an_unknown_launcher_and_a_sweep_folder_that_cannot_be_made_are_one_line(tmp_path: Path) -> None:
    for setting, named in (("hydra/launcher=nope", "hydra/launcher/nope"), ("hydra.sweep.dir=/proc/x", "/proc/x")):
        output = tmp_path / named.replace("/", "_")
        code, said = processes.run(["train", "-m", *TINY, "seed=0,1", f"results={tmp_path}", setting], output)
        assert code == 2
        (line,) = (line for line in said if "[HYDRA]" not in line)
        assert line.startswith("kfacrnn: ")
        assert named in line


def test_the_joblib_launcher_runs_every_point(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    grid = [*TINY, "seed=0,1", f"results={tmp_path}", "hydra/launcher=joblib"]
    assert subprocess.run([sys.executable, "-m", "kfacrnn", "train", "-m", *grid], timeout=120).returncode == 0
    assert [seed for _, seed in settings(tmp_path)] == [0, 1]
