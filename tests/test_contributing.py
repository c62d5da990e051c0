"""CONTRIBUTING.md does what it says: its files are put into a copy of the checkout and its commands are run there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("kfacrnn", "configs", "experiments", "tests", "pyproject.toml")
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
FILES = dict(re.findall(r"^`(\S+)`\n\n```\w+\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[-1].splitlines()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    for name, content in FILES.items():
        assert not (folder / name).exists()
        (folder / name).write_text(content)
    return folder


def run(checkout: Path, command: str) -> str:
    program, *arguments = shlex.split(command)
    environment = {**os.environ, "PYTHONPATH": str(checkout)}  # goes before an installed kfacrnn
    result = subprocess.run(
        [sys.executable, "-m", program, *arguments],
        cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, f"{command}\n{result.stdout}"
    return result.stdout


def test_an_optimiser_and_a_task_are_one_module_and_one_yaml_each() -> None:
    assert list(FILES) == [
        "kfacrnn/optimizers/lion.py",
        "configs/optimizer/lion.yaml",
        "kfacrnn/tasks/parity.py",
        "configs/task/parity.yaml",
        "experiments/parity.yaml",
    ]


def test_what_is_shown_passes_the_linter(checkout: Path) -> None:
    modules = shlex.join(name for name in FILES if name.endswith(".py"))
    run(checkout, f"ruff check {modules}")
    run(checkout, f"ruff format --check {modules}")


@pytest.mark.slow
def test_what_is_shown_is_listed_trained_swept_drawn_and_passes_the_contract(checkout: Path) -> None:
    said = {command.split()[1]: run(checkout, command) for command in COMMANDS}
    listing, training, sweep, figure, contract = said.values()
    assert "Lion: the sign of a momentum" in listing
    assert "running parity of random bits" in listing
    assert "done at update 200" in training
    assert "2/2 done" in sweep
    assert str(Path("results", "figures", "parity.png")) in figure
    assert (checkout / "results" / "figures" / "parity.png").is_file()
    assert re.search(r"\b[1-9]\d* passed", contract)
