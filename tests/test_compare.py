"""Comparisons of hand-made runs against numbers computed by hand, and what is said of the runs that are left out."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pytest

from kfacrnn import cli
from kfacrnn.compare import Question, compare, parse_at
from kfacrnn.errors import UserError
from kfacrnn.frames import load
from kfacrnn.selection import select
from kfacrnn.store import RunFolder
from tests.runs import stored

SGD, ADAM = "optimizer=sgd", "optimizer=adam"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two seeds each of SGD and of Adam, which needs half the updates."""
    for seed in (1, 2):
        stored(tmp_path, [4.0, 3.0, 2.0, 1.0 * seed], SGD, f"seed={seed}", "tracker.group=tiny")
        stored(tmp_path, [2.0, 1.0, 0.5, 0.25 * seed], ADAM, f"seed={seed}", "tracker.group=tiny")
    return tmp_path


def rows(store: Path, *arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[list[dict[str, str]], list[str]]:
    assert cli.main(["compare", "--results", str(store), "--out", "csv", "--last", "1", *arguments]) == 0
    captured = capsys.readouterr()
    return list(csv.DictReader(io.StringIO(captured.out))), captured.err.splitlines()


def blank(folder: RunFolder, name: str) -> None:
    """Empties a column of metrics.csv."""
    path = folder.path / "metrics.csv"
    header, *lines = [line.split(",") for line in path.read_text().splitlines()]
    for cells in lines:
        cells[header.index(name)] = ""
    path.write_text("".join(f"{','.join(line)}\n" for line in (header, *lines)))


def test_values_targets_and_ratios_are_those_computed_by_hand(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (adam, sgd), said = rows(store, "--baseline", "sgd", capsys=capsys)
    assert (sgd["value"], sgd["value_low"], sgd["value_high"]) == ("1.5", "1.0", "2.0")
    assert sgd["target"] == "2.0"  # of two middle runs the higher
    assert (sgd["updates_to_target"], adam["updates_to_target"]) == ("3.0", "1.0")
    assert float(adam["updates_ratio"]) == pytest.approx(1 / 3)
    assert (adam["reached"], adam["runs"]) == ("2", "2")
    assert said[0] == "results: 4 runs, 4 match, 4 used"


def test_runs_that_share_a_seed_are_drawn_independently_of_another_line_s(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for optimizer in (SGD, ADAM):
        for arrives, lr in enumerate((0.1, 0.2, 0.3), start=1):
            curve = [2.0] * arrives + [1.0] * (4 - arrives)
            stored(tmp_path, curve, optimizer, f"optimizer.lr={lr}", "seed=1", "tracker.group=tiny")
    (adam, _), _ = rows(tmp_path, "--baseline", "sgd", "--target", "1", capsys=capsys)
    assert [float(adam[f"updates_ratio{part}"]) for part in ("", "_low", "_high")] == [1.0, 0.5, 2.0]


def test_a_run_that_lost_its_task_or_its_rows_is_one_line(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = sorted(store.glob("runs/*/sgd/*"))
    (first / "metrics.csv").write_text("")
    status = json.loads((first / "status.json").read_text())
    (first / "status.json").write_text(json.dumps(status | {"state": "diverged"}))
    _, said = rows(store, capsys=capsys)
    assert not any("Traceback" in line for line in said)
    (second / "meta.json").unlink()
    assert cli.main(["compare", "--results", str(store)]) == 2
    assert f"run {second.name}: meta.json lacks its task; delete " in capsys.readouterr().err


def test_a_named_target_needs_no_baseline_and_may_be_missed(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (adam, sgd), _ = rows(store, "--target", "1", capsys=capsys)
    assert (adam["updates_to_target"], adam["updates_ratio"], adam["reached"]) == ("2.0", "", "2")
    assert (sgd["updates_to_target"], sgd["reached"]) == ("inf", "1")
    (adam, sgd), _ = rows(store, "--target", "1", "--baseline", "optimizer.name=adam", capsys=capsys)
    assert (sgd["updates_ratio"], adam["updates_ratio"]) == ("inf", "1.0")


@pytest.mark.parametrize(
    ("at", "expected"), [("end", 1.5), ("best", 1.5), ("update=2", 3.0), ("update=4", 1.5)], ids=lambda v: str(v)
)
def test_a_value_is_taken_where_it_is_asked_for(
    store: Path, at: str, expected: float, capsys: pytest.CaptureFixture[str]
) -> None:
    (_, sgd), _ = rows(store, "--at", at, capsys=capsys)
    assert float(sgd["value"]) == expected


def test_a_value_is_the_mean_over_the_last_updates(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (_, sgd), _ = rows(store, "--at", "update=3", "--last", "2", capsys=capsys)
    assert float(sgd["value"]) == 2.5


def test_seconds_count_only_of_runs_that_had_the_machine_to_themselves_and_of_one_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored(tmp_path, [2.0, 1.0], SGD, seconds=[0.5, 1.0])
    stored(tmp_path, [2.0, 1.0], ADAM, seconds=[5.0, 10.0], jobs=2)
    (adam, sgd), _ = rows(tmp_path, "--baseline", "sgd", "--x", "time", capsys=capsys)
    assert (sgd["seconds_to_target"], adam["seconds_to_target"]) == ("1.0", "")
    stored(tmp_path, [2.0, 1.0], ADAM, "seed=5", cpu="Abacus 2")
    with pytest.raises(UserError, match=r"would mix hardware: .*Abacus 1.*Abacus 2.*--mix-hardware"):
        compare(select(["results"], results=str(tmp_path)), Question(x="time"))
    found, said = rows(tmp_path, capsys=capsys)
    assert {row["seconds_per_update_median"] for row in found} == {""}
    assert any("no seconds, for they would mix hardware" in line for line in said)


def test_what_is_left_out_is_said_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored(tmp_path, [2.0, 1.0], SGD)
    stopped = stored(tmp_path, [2.0], SGD, "seed=1", state="interrupted")
    silent = stored(tmp_path, [2.0], SGD, "seed=2")
    for name in ("train/nats", "train/metric"):
        blank(silent, name)
    stored(tmp_path, [1.0], SGD, "seed=3", state="diverged")
    (row,), said = rows(tmp_path, capsys=capsys)
    assert (row["runs"], row["diverged"], row["value_low"], row["value_high"]) == ("2", "1", "1.0", "inf")
    assert f"results: skipped 1 run ({stopped.run_id}): interrupted; --where state=… takes them" in said
    assert f"skipped 1 run ({silent.run_id}): nothing of train/metric" in said
    (row,), _ = rows(tmp_path, "--where", "state=interrupted", capsys=capsys)
    assert row["run_ids"] == stopped.run_id


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    folder = stored(tmp_path, [2.0, 1.0], SGD)
    path = folder.path / "metrics.csv"
    path.write_text(path.read_text() + "3,,,9.0,")
    (run,) = select(["results"], results=str(tmp_path)).runs
    assert run.folder.metrics.columns(["update", "train/nats"]) == {"update": [1.0, 2.0], "train/nats": [2.0, 1.0]}


def test_a_finished_run_that_has_lost_rows_is_left_out_and_said_to_be(tmp_path: Path) -> None:
    whole, cut = (stored(tmp_path, [2.0, 1.0], SGD, f"seed={seed}") for seed in (1, 2))
    path = cut.path / "metrics.csv"
    path.write_bytes(path.read_bytes()[:-1])
    selection = select(["results"], results=str(tmp_path))
    assert [run.run_id for run in selection.runs] == [whole.run_id]
    assert f"results: skipped 1 run ({cut.run_id}): metrics.csv lacks rows" in selection.said[-1]


@pytest.mark.parametrize("budget", ["{updates: 2}", "{updates: 2, log_every: often, eval_every: 0}", "2"])
def test_a_finished_run_whose_configuration_has_no_budget_counts_as_cut(tmp_path: Path, budget: str) -> None:
    whole, damaged = (stored(tmp_path, [2.0, 1.0], SGD, f"seed={seed}") for seed in (1, 2))
    path = damaged.path / "config.yaml"
    lines = path.read_text().split("\nbudget:")
    path.write_text(f"{lines[0]}\nbudget: {budget}\n" + lines[1].partition("\ntracker:")[2].join(("tracker:", "")))
    selection = select(["results"], results=str(tmp_path))
    assert [run.run_id for run in selection.runs] == [whole.run_id]
    assert f"skipped 1 run ({damaged.run_id}): metrics.csv lacks rows" in selection.said[-1]


def test_a_cell_that_is_no_number_is_one_line(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = next(store.glob("runs/*/sgd/*/metrics.csv"))
    path.write_bytes(path.read_bytes().replace(b"3.0", b"3\xff0"))
    assert cli.main(["compare", "--results", str(store)]) == 2
    assert f"{path}, update 2: train/nats is no number: '3�0'; delete {path.parent} " in capsys.readouterr().err


def test_a_run_that_two_sources_have_counts_once_unless_sources_are_compared(tmp_path: Path) -> None:
    for name in ("a", "b"):
        stored(tmp_path / name, [2.0, 1.0], SGD)
    names = [str(tmp_path / name) for name in ("a", "b")]
    selection = select(names)
    assert len(selection.runs) == 1
    assert selection.said[-1].endswith(f"already from {names[0]}")
    both = compare(select(names, each_source=True), Question(group_by=("source",)))
    assert [len(group.curves) for group in both.groups] == [1, 1]


def test_a_group_that_mixes_settings_or_lengths_says_so_and_one_that_mixes_tasks_is_refused(tmp_path: Path) -> None:
    stored(tmp_path, [2.0, 1.0], SGD, "optimizer.lr=0.1")
    stored(tmp_path, [2.0, 1.0, 0.5], SGD, "optimizer.lr=0.2")
    said = compare(select(["results"], results=str(tmp_path)), Question()).said
    assert "repeat_copy sgd: its runs differ in budget.updates (2, 3), optimizer.lr (0.1, 0.2)" in said
    assert "repeat_copy sgd: runs of unequal length, 2 to 3 updates, each taken at its own end" in said
    parted = compare(select(["results"], results=str(tmp_path)), Question(group_by=("optimizer.lr",)))
    assert [group.values for group in parted.groups] == [("0.1",), ("0.2",)]
    word = {"unit": "word", "metric": "perplexity", "chance": 3.0}
    stored(tmp_path, [2.0, 1.0], SGD, "seed=9", task=word, metric=[math.exp(2.0), math.e])
    with pytest.raises(UserError, match="mixes the tasks"):
        compare(select(["results"], results=str(tmp_path)), Question())


def test_perplexities_are_averaged_as_nats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    word = {"unit": "word", "metric": "perplexity", "chance": 3.0}
    for seed, nats in ((1, 1.0), (2, 3.0)):
        stored(tmp_path, [nats], SGD, f"seed={seed}", task=word, metric=[math.exp(nats)])
    (row,), _ = rows(tmp_path, "--target", str(math.exp(1.5)), capsys=capsys)
    assert float(row["value"]) == pytest.approx(math.exp(2.0))
    assert float(row["target"]) == pytest.approx(math.exp(1.5))
    assert row["reached"] == "1"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nowhere"], ["no such source: 'nowhere'", "offline:DIR"]),
        (["--where", "lr=1"], ["did you mean 'optimizer.lr'"]),
        (["--where", "optimizer.lr=77"], ["optimizer.lr=77 is met by none", "optimizer.lr is 0.0"]),
        (["--group-by", "optimizer.nam"], ["did you mean 'optimizer.name'"]),
        (["--metric", "train/metrics"], ["did you mean 'train/metric'"]),
        (["--baseline", "adamm"], ["did you mean 'adam'"]),
        (["--at", "middle"], ["end, best or update=N"]),
        (["--x", "epoch"], ["update, time"]),
        (["--out", "xml"], ["csv, md, tex, json"]),
        (["--plot", "a.jpg"], [".png, .svg, .pdf"]),
        (["a", "--diff"], ["two sides"]),
        (["feed1", "feed2", "--diff"], ["run_id=feed1* is met by none"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_with_the_nearest_right_thing(
    arguments: list[str], named: list[str], store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", "--results", str(store), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert [part for part in named if part not in line] == []


def test_every_form_holds_the_same_table(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = {}
    for form in ("text", "md", "tex", "json"):
        assert cli.main(["compare", "--results", str(store), "--last", "1", "--target", "1", "--out", form]) == 0
        out[form] = capsys.readouterr().out
    assert "1.500 (1.000–2.000)" in out["text"]
    assert "| repeat_copy | sgd | 2 | 1.500 (1.000–2.000) | 1/2 | ∞ |" in out["md"]
    assert r"repeat\_copy & sgd & 2 & 1.500 (1.000--2.000) & 1/2 & $\infty$" in out["tex"]
    found = json.loads(out["json"])
    assert [row["updates_to_target"] for row in found["rows"]] == [2.0, "Infinity"]
    assert found["said"][0] == "results: 4 runs, 4 match, 4 used"


def test_the_picture_has_a_line_for_every_group(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = store / "new" / "picture.svg"
    assert cli.main(["compare", "--results", str(store), "--plot", str(path)]) == 0
    text = path.read_text()
    assert "<!-- repeat_copy adam (n = 2) -->" in text
    assert "<!-- repeat_copy sgd (n = 2) -->" in text


def test_a_tidy_frame_has_a_row_for_every_log_point(store: Path) -> None:
    columns = ["update", "train/nats"]
    frame = load(results=str(store), where=["optimizer.name=sgd"], config=["optimizer.lr"], columns=columns)
    assert list(frame) == [
        *("run_id", "task.name", "optimizer.name", "seed", "state", "optimizer.lr", "update", "train/nats")
    ]
    by_seed = {seed: part["train/nats"].tolist() for seed, part in frame.groupby("seed")}
    assert by_seed == {1: [4.0, 3.0, 2.0, 1.0], 2: [4.0, 3.0, 2.0, 2.0]}
    assert frame["update"].dtype == "int64"
    with pytest.raises(UserError, match="did you mean 'train/nats'"):
        load(results=str(store), columns=["train/nat"])


def test_two_sources_are_paired_by_settings_and_the_update_where_they_part_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, last, cpu in (("a", 1.0, "Abacus 1"), ("b", 1.5, "Abacus 2")):
        stored(tmp_path / name, [3.0, 2.0, last], SGD, cpu=cpu)
        stored(tmp_path / name, [3.0, 2.0], ADAM)
    alone = stored(tmp_path / "a", [3.0], SGD, "seed=7")
    arguments = ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--diff", "--last", "1"]
    assert cli.main([*arguments, "--out", "csv"]) == 0
    captured = capsys.readouterr()
    adam, sgd = csv.DictReader(io.StringIO(captured.out))
    assert (sgd["value A"], sgd["value B"], sgd["value B/A"]) == ("1.0", "1.5", "1.5")
    assert (sgd["parts at update"], sgd["largest gap"]) == ("3", "0.5")
    assert (adam["parts at update"], adam["largest gap"]) == ("", "0.0")
    assert f"only in A: 1 run ({alone.run_id})" in captured.err
    assert cli.main(arguments) == 0
    assert "cpu Abacus 2, cores 2" in capsys.readouterr().out.split("task")[0]


def test_two_runs_are_compared_whatever_they_are(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {run.values["optimizer.name"]: run for run in select(["results"], ["seed=1"], results=str(store)).runs}
    sides = [runs["sgd"].run_id[:8], f"{store}@{runs['adam'].run_id}"]
    assert cli.main(["compare", *sides, "--diff", "--results", str(store), "--plot", str(store / "d.png")]) == 0
    out = capsys.readouterr().out
    settings = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith("optimizer")}
    assert settings["optimizer.name"] == ["sgd", "adam"]
    assert (store / "d.png").exists()


def test_where_a_value_is_taken_is_read_from_its_text() -> None:
    assert [parse_at(text) for text in ("end", "best", "update=20")] == ["end", "best", 20]
