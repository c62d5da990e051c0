"""The command line as a stranger meets it: exit codes, one line for a mistake, pipes that close."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kfacrnn import cli, listing

KFACRNN = [sys.executable, "-m", "kfacrnn"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["optimizer.lr=fast"], ["optimizer.lr=fast", "Float"]),
        (["optimizer.lr=-1"], ["optimizer.lr=-1", "above 0"]),
        (["optimizer.lrr=1"], ["optimizer.lrr=1", "did you mean 'optimizer.lr'"]),
        (["optimizer=adamm"], ["'adamm'", "did you mean 'adam'"]),
        (["task=ptb_char", "task.bptt=0"], ["task.bptt=0", "at least 1"]),
        (["device=tpu"], ["device=tpu", "cpu, cuda"]),
        (["device=cuda:99"], ["device=cuda:99", "device=cpu"]),
        (["task=ptb_char", "data.root=/nonexistent"], ["/nonexistent/ptb.train.txt", "data.root", "put"]),
        (["results='~nobody-of-that-name'"], ["~nobody-of-that-name: there is no such home"]),
        (["results=/proc/x"], ["results=/proc/x", "choose another with results=DIR"]),
        (["optimizer.lr=a\nb"], ["optimizer.lr=a b"]),
        (["seed=" + "ü" * 100_000], ["key=value"]),
        (["--bogus"], ["--bogus"]),
    ],
    ids=lambda value: value[-1][:24].replace("\n", "⏎"),
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], named: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", f"results={tmp_path}", *arguments]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("kfacrnn: ")
    assert [part for part in named if part not in line] == []
    assert captured.out == ""
    assert not list(tmp_path.rglob("status.json"))


@pytest.mark.parametrize(("theirs", "spins"), [({}, cli.SPINS), ({"GOMP_SPINCOUNT": "7"}, "7")], ids=["ours", "theirs"])
def test_threads_that_wait_for_each_other_soon_leave_the_core_to_others(theirs: dict[str, str], spins: str) -> None:
    program = "from kfacrnn import cli; cli.main(['list']); import torch"
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    environment |= {"OMP_DISPLAY_ENV": "verbose", **theirs}
    said = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    if "GOMP_SPINCOUNT" not in said.stderr:
        pytest.skip("torch's threads are not those of GNU OpenMP")
    assert f"GOMP_SPINCOUNT = '{spins}'" in said.stderr


def test_an_argument_of_any_length_is_refused_in_a_line_that_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["report", "x" * 100_000])
    assert end.value.code == 2
    assert max(map(len, capsys.readouterr().err.splitlines())) < 500


LONG = "x" * 300  # more than a name of a file may have


@pytest.mark.parametrize(
    "arguments",
    [["train", f"results={LONG}"], ["compare", LONG], ["train", f"task/{LONG}=1"], ["train", f"budget.name={LONG}"]],
    ids=lambda words: f"{words[0]} {words[1][:9]}",
)
def test_a_path_that_no_file_can_have_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.removesuffix(": File name too long").removesuffix(".yaml").endswith("x")
    assert line.endswith(": File name too long")


def test_a_results_path_that_is_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["train", f"results={tmp_path / 'file'}"]) == 2
    assert "Not a directory; choose another with results=DIR" in capsys.readouterr().err


def test_a_mistake_in_a_fresh_process_is_one_line() -> None:
    process = subprocess.run([*KFACRNN, "train", "optimizer.lr=fast"], capture_output=True, text=True, timeout=60)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.count("\n") == 1
    assert "Traceback" not in process.stderr


def test_a_mistake_imports_no_torch() -> None:
    code = "import sys; from kfacrnn import cli; cli.main(['train', 'seed=fast']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize("arguments", [["list"], ["--help"], ["train", "--help"]], ids=" ".join)
def test_a_reader_that_leaves_early_is_no_error(arguments: list[str]) -> None:
    """The pipe is closed before anything is written: harsher than `| head -1`."""
    process = subprocess.Popen([*KFACRNN, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 0


def test_a_run_from_a_fresh_process_says_how_it_ended_and_where(tmp_path: Path) -> None:
    overrides = ["task.batch_size=2", "task.eval_sequences=2", "budget.updates=2", "threads=1"]
    command = [*KFACRNN, "train", *overrides, f"results='{tmp_path / 'größe und mehr'}'"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0
    state, _, folder = process.stdout.strip().partition(" at update 2: ")
    assert state == "done"
    assert (Path(folder) / "model.pt").is_file()
    assert "Traceback" not in process.stderr
    assert cli.main(["list", "runs", "--results", str(tmp_path / "größe und mehr")]) == 0


def test_a_terminal_that_lacks_a_letter_shows_a_question_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii", write_through=True))
    monkeypatch.setattr(listing, "show", lambda *_, **__: print("ψ̂ ½"))
    assert cli.main(["list"]) == 0
    assert shown.getvalue() == b"?? ?\n"
