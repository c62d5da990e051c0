"""The gallery's scripts run and show what they say; its commands are commands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

GALLERY = Path(__file__).resolve().parent.parent / "docs" / "gallery"


def said(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, text=True, check=True, stdout=subprocess.PIPE
    ).stdout


@pytest.mark.slow
def test_kfac_beats_every_adam_on_ones_own_lstm(tmp_path: Path) -> None:
    lines = said([str(GALLERY / "own_lstm.py"), "picture.png"], tmp_path)
    bits = {name.strip(): float(value) for name, value in re.findall(r"^(.*?) +(\d\.\d\d) bits", lines, re.MULTILINE)}
    assert len(bits) == 5
    assert min(bits, key=lambda name: bits[name]) == "K-FAC option 1"
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.slow
def test_there_is_a_best_damping_and_less_of_it_makes_conditions_worse(tmp_path: Path) -> None:
    rows = said([str(GALLERY / "damping.py"), "picture.png"], tmp_path).splitlines()[1:6]
    bits = [float(row.split()[1]) for row in rows]
    assert 0 < bits.index(min(bits)) < 4
    conditions = [float(row.split()[-2]) for row in rows]
    assert conditions == sorted(conditions, reverse=True)


def test_the_coverage_page_shows_blocks_and_refusals(tmp_path: Path) -> None:
    lines = said([str(GALLERY / "coverage.py")], tmp_path)
    assert lines.count("lstm.l0.f") == 5
    assert re.search(r"^decoder .* option1 .*", lines, re.MULTILINE)
    assert re.search(r"^decoder .* indep .*", lines, re.MULTILINE)
    assert re.search(r"^decoder +embedding\.weight, decoder\.bias +tied ", lines, re.MULTILINE)
    assert lines.count("refused:") == 2


@pytest.mark.slow
def test_the_commands_for_figure_2_are_accepted(tmp_path: Path, ptb_folder: str) -> None:
    page = (GALLERY / "figure2.md").read_text()
    commands = "".join(re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)).splitlines()
    assert sum(command.startswith("kfacrnn sweep figure2") for command in commands) == 3
    for command in commands:
        program, verb, *rest = shlex.split(command)
        if verb == "sweep" and "--dry-run" not in rest:
            rest.append("--dry-run")
        if verb in ("data", "sweep", "status"):
            said(["-m", program, verb, *rest], tmp_path)


def test_links_lead_somewhere() -> None:
    for page in (GALLERY / "README.md", GALLERY / "figure2.md", GALLERY.parent / "clusters.md"):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), link
