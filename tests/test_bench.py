"""`kfacrnn bench`: the arithmetic of costs, that what is timed is what users run, and what the files say. No timing is
asserted."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kfacrnn import cli, config, discovery, neighbours
from kfacrnn.bench import dnc, memory, report, scaling
from kfacrnn.bench.cycle import PLAIN, Kind, cost, frequencies, quantile, ratio
from kfacrnn.bench.request import Request
from kfacrnn.bench.subjects import PARTS, Phases, Record, Step, TrainingRun, interleave
from kfacrnn.errors import UserError
from kfacrnn.kfac.optimizer import KFAC
from kfacrnn.run import Run
from kfacrnn.session import Session
from tests import synthetic

STATISTICS, REFRESH, BOTH = Kind(True, False), Kind(False, True), Kind(True, True)
TINY = [o for o in synthetic.TINY if not o.startswith(("task=", "threads=", "budget."))]
SMALL_TEXT = ["task.hidden=4", "task.layers=1", "task.bptt=3", "task.batch_size=2"]
KFAC_SETTINGS = ["optimizer.statistics_every=2", "optimizer.refresh_every=3"]


def tiny_run(optimizer: str, *more: str) -> Run:
    return config.compose([*synthetic.TINY, f"optimizer={optimizer}", *more])


def bench(*arguments: str | Path) -> int:
    return cli.main(["bench", *map(str, arguments)])


def content(path: Path) -> Any:
    return json.loads(path.read_text())


def written_of(folder: Path, name: str) -> Any:
    """Of the one file whose name begins like this."""
    (path,) = folder.glob(f"{name}-*.json")
    return content(path)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be measured in a fresh process is measured in this one."""
    monkeypatch.setattr(memory, "in_fresh_process", lambda function, *arguments: function(*arguments))


# ---- arithmetic --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statistics_every", "refresh_every", "expected"),
    [
        (5, 20, {PLAIN: 16 / 20, STATISTICS: 3 / 20, BOTH: 1 / 20}),
        (1, 5, {STATISTICS: 4 / 5, BOTH: 1 / 5}),
        (1, 1, {BOTH: 1}),
        (5, 3, {PLAIN: 4 / 5, BOTH: 1 / 5}),  # no refresh without new statistics
        (4, 6, {PLAIN: 8 / 12, STATISTICS: 2 / 12, REFRESH: 1 / 12, BOTH: 1 / 12}),
    ],
)
def test_kinds_come_as_often_as_the_schedule_says(
    statistics_every: int, refresh_every: int, expected: dict[Kind, float]
) -> None:
    assert frequencies(statistics_every, refresh_every) == pytest.approx(expected)


def test_kinds_come_as_often_as_in_a_real_run() -> None:
    session = Session(tiny_run("kfac_indep", *KFAC_SETTINGS))
    optimizer = session.optimizer
    assert isinstance(optimizer, KFAC)
    seen: Counter[Kind] = Counter()
    for update in range(30):
        statistics, made_from = optimizer.statistics_due, optimizer._inverses.made_from
        session.step()
        if update >= 24:
            seen[Kind(statistics, optimizer._inverses.made_from != made_from)] += 1
    assert frequencies(2, 3) == pytest.approx({kind: count / 6 for kind, count in seen.items()})


def test_optimisers_whose_packages_are_missing_are_left_out_unless_they_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(discovery, "missing", lambda package, name: "a package" if name == "adamw" else None)
    everything = set(discovery.modules("optimizers"))
    assert set(Request("step-cost").runs("repeat_copy")) == everything - {"adamw"}
    assert set(Request("step-cost", optimizers=("adamw",)).runs("repeat_copy")) == {"sgd", "adamw"}


WEIGHTS = {PLAIN: 0.8, STATISTICS: 0.15, BOTH: 0.05}
ROUNDS = [{PLAIN: 10.0, STATISTICS: 15.0, BOTH: 50.0}] * 4 + [{PLAIN: 900.0, STATISTICS: 900.0, BOTH: 900.0}]


def test_a_cost_is_the_weighted_sum_of_medians_and_one_disturbed_round_does_not_matter() -> None:
    assert cost(ROUNDS, WEIGHTS) == pytest.approx(0.8 * 10 + 0.15 * 15 + 0.05 * 50)


def test_quantiles_count_a_kind_as_often_as_it_comes() -> None:
    rounds = ROUNDS[:4]
    assert [quantile(rounds, WEIGHTS, share) for share in (0.5, 0.8, 0.81, 0.95, 0.96, 1.0)] == [10, 10, 15, 15, 50, 50]


def test_a_ratio_of_equal_rounds_has_no_spread_even_if_the_machine_drifts() -> None:
    drift = [{PLAIN: 10.0 * (1 + i)} for i in range(9)]
    twice = [{PLAIN: 2 * one[PLAIN]} for one in drift]
    assert ratio(twice, {PLAIN: 1.0}, drift, {PLAIN: 1.0}) == pytest.approx((2, 2, 2))


def test_an_interval_holds_the_ratio_and_is_wider_for_noisier_rounds() -> None:
    below, widths = [{PLAIN: 10.0}] * 11, []
    for spread in (0.1, 2.0):
        noisy = [{PLAIN: 12.0 + spread * (i - 5) / 5} for i in range(11)]
        middle, low, high = ratio(noisy, {PLAIN: 1.0}, below, {PLAIN: 1.0})
        assert low < middle < high
        widths.append(high - low)
    assert widths[0] < widths[1]


class Metronome:
    """A subject whose steps take the seconds that the test says."""

    def __init__(self, weights: dict[Kind, float], seconds: dict[Kind, dict[str, float]]):
        self.weights, self._seconds, self.taken = weights, seconds, Counter[Kind]()

    def step(self, kind: Kind) -> Step:
        self.taken[kind] += 1
        parts = dict.fromkeys(PARTS, 0.0) | self._seconds[kind]
        return Step(parts, {part: 2 * value for part, value in parts.items()})


def test_a_row_on_a_fake_clock_has_the_costs_of_whole_cycles() -> None:
    plain = {"train": 0.8, "products": 0.1, "update": 0.1}
    both = plain | {"statistics": 0.5, "refresh": 1.5}
    subjects = {
        "sgd": Metronome({PLAIN: 1.0}, {PLAIN: {"train": 0.9, "update": 0.1}}),
        "kfac": Metronome({PLAIN: 0.9, BOTH: 0.1}, {PLAIN: plain, BOTH: both}),
    }
    records = interleave(None, subjects, 4)
    row = records["kfac"].row(records["sgd"], "sgd")
    assert subjects["kfac"].taken == {PLAIN: 5, BOTH: 5}  # four rounds, and one that does not count
    assert row["ms_mean_cycle"] == pytest.approx(1200)
    assert (row["ms_median"], row["ms_p95"]) == pytest.approx((1000, 3000))
    assert (row["ratio_to_sgd"], row["low"], row["high"]) == pytest.approx((1.2, 1.2, 1.2))
    assert row["cpu_ms_mean_cycle"] == pytest.approx(2400)
    split = {"train": 800, "statistics": 50, "refresh": 150, "products": 100, "update": 100}
    assert row["split"] == pytest.approx(split)
    assert row["kinds"]["statistics+refresh"] == pytest.approx({"frequency": 0.1, "ms_median": 3000})


def test_a_split_adds_up_to_the_whole_though_medians_do_not() -> None:
    parts = [{"train": 3.0, "products": 1.0}, {"train": 1.0, "products": 9.0}, {"train": 2.0, "products": 3.0}]
    steps = [Step(dict.fromkeys(PARTS, 0.0) | one, dict.fromkeys(PARTS, 0.0) | one) for one in parts]
    record = Record({PLAIN: 1.0}, [{PLAIN: step} for step in steps])
    assert sum(record.split("wall").values()) == pytest.approx(cost(record.milliseconds("wall"), {PLAIN: 1.0}))
    assert record.split("wall")["products"] == pytest.approx(3000)


def test_every_moment_belongs_to_the_innermost_part(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("kfacrnn.clock.time", SimpleNamespace(perf_counter=lambda: now, process_time=lambda: 2 * now))

    def let_pass(seconds: float) -> None:
        nonlocal now
        now += seconds

    owner = SimpleNamespace(products=let_pass)
    owner.update = lambda: (let_pass(1), owner.products(4), let_pass(2))
    phases = Phases(lambda: None)
    phases.time(owner, "products", "products")
    phases.time(owner, "update", "update")
    with phases("train"):
        phases.clear()
        let_pass(8)
        owner.update()
        let_pass(16)
    wall, cpu = phases.step()
    assert wall == {"train": 24, "statistics": 0, "refresh": 0, "products": 4, "update": 3}
    assert cpu == {part: 2 * seconds for part, seconds in wall.items()}


# ---- what is timed is what users run -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "settings", "kinds"),
    [
        ("sgd", [], [PLAIN] * 7),
        # Both before updates 0 to 8, then statistics before every second and refreshes before every third
        ("kfac_option1", KFAC_SETTINGS, [BOTH] * 8 + [PLAIN, BOTH, PLAIN, BOTH, PLAIN, STATISTICS, REFRESH]),
    ],
    ids=["sgd", "kfac_option1"],
)
def test_a_timed_run_moves_the_parameters_exactly_as_an_untimed_one(
    optimizer: str, settings: list[str], kinds: list[Kind]
) -> None:
    run = tiny_run(optimizer, *settings)
    plain, timed = Session(run), TrainingRun(run)  # which has taken its first step
    plain.step()
    for kind in kinds:
        plain.step()
        timed.step(kind)
    for one, other in zip(plain.model.parameters(), timed.session.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", [PLAIN, STATISTICS, REFRESH, BOTH], ids=lambda kind: kind.label)
def test_a_step_does_what_its_kind_says_and_books_it(kind: Kind) -> None:
    subject = TrainingRun(tiny_run("kfac_option2", *KFAC_SETTINGS))
    optimizer = subject.session.optimizer
    assert isinstance(optimizer, KFAC)
    step, update = subject.step(kind), 1
    assert (optimizer._passes.newest == update) == kind.statistics
    assert (optimizer._inverses.made_from == update) == kind.refresh
    for account in step:
        assert {part for part in PARTS if account[part] == 0} == {
            *(() if kind.statistics else ("statistics",)),
            *(() if kind.refresh else ("refresh",)),
        }


def test_work_in_the_background_is_refused() -> None:
    with pytest.raises(UserError, match="measure with optimizer"):
        TrainingRun(tiny_run("kfac_indep", "optimizer.refresh_delay=2"))


# ---- commands ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_this_process")
def test_step_cost_writes_a_row_for_every_optimizer_and_prints_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "costs.json"
    flags = ["--task", "repeat_copy", "--threads", "1", "--rounds", "3", "--optimizers", "adam,kfac_option1"]
    assert bench("step-cost", *flags, "--json", path, *TINY, *KFAC_SETTINGS) == 0
    written = content(path)
    assert {"schema_version", "command", "date", "commit", "versions", "hardware", "machine", "method"} <= set(written)
    assert [row["optimizer"] for row in written["rows"]] == ["sgd", "adam", "kfac_option1"]
    sgd, _, kfac = written["rows"]
    for row in written["rows"]:
        assert (row["task"], row["dtype"], row["threads"], row["rounds"]) == ("repeat_copy", "fp32", 1, 3)
        assert 0 < row["low"] <= row["high"]
        assert row["ms_median"] <= row["ms_p95"]
        assert sum(row["split"].values()) == pytest.approx(row["ms_mean_cycle"], rel=1e-3)
        assert sum(kind["frequency"] for kind in row["kinds"].values()) == pytest.approx(1, rel=1e-3)
        assert row["peak_rss_mb"] > row["parameter_mb"] > 0
    assert (sgd["ratio_to_sgd"], sgd["split"]["statistics"]) == (1, 0)
    assert set(kfac["kinds"]) == {"plain", "statistics", "refresh", "statistics+refresh"}
    assert sgd["settings"] == {}
    assert {"statistics_every": 2, "refresh_every": 3}.items() <= kfac["settings"].items()
    assert kfac["state_mb"] > sgd["state_mb"]
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("kfac_option1", "/ sgd", "statistics", "peak MB", str(path)))


@pytest.mark.usefixtures("in_this_process", "bfloat16")
def test_every_task_has_its_own_file_in_the_folder(tmp_path: Path, tiny_ptb: Path) -> None:
    flags = ["--task", "ptb_word", "--task", "ptb_char", "--precision", "bf16", "--threads", "1", "--rounds", "3"]
    assert (
        bench("step-cost", *flags, "--optimizers", "sgd", "--out", tmp_path, f"data.root={tiny_ptb}", *SMALL_TEXT) == 0
    )
    for task in ("ptb_char", "ptb_word"):
        (row,) = written_of(tmp_path, f"step-cost-{task}-bf16-threads=1")["rows"]
        assert (row["task"], row["dtype"]) == (task, "bf16")


TWO_SETTINGS = """
description: Statistics often and rarely
common: [task=repeat_copy, threads=1]
seeds: [1]
methods:
  often: {optimizer: kfac_option1, overrides: [optimizer.statistics_every=1]}
  rarely: {optimizer: kfac_option1, overrides: [optimizer.statistics_every=8]}
figure:
  title: Two settings
  y: {metric: train/metric, label: nats, scale: linear}
"""


def test_the_lines_of_an_experiment_are_measured_with_their_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "settings.yaml").write_text(TWO_SETTINGS)
    flags = ["--rounds", "3", "--out", tmp_path]
    assert bench("experiment", tmp_path / "settings.yaml", *flags, *TINY) == 0
    written = written_of(tmp_path, "experiment-settings")
    rows = written["rows"]
    assert {written["threads"], *(row["threads"] for row in rows)} == {1}
    assert [(row["line"], row["optimizer"]) for row in rows] == [
        ("sgd", "sgd"),
        ("often", "kfac_option1"),
        ("rarely", "kfac_option1"),
    ]
    sgd, often, rarely = rows
    assert sgd["ratio_to_sgd"] == 1
    assert "statistics" in often["kinds"]
    assert "plain" not in often["kinds"]
    assert rarely["kinds"]["plain"]["frequency"] > 0.7
    assert "rarely" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own(tmp_path: Path) -> None:
    ballast = torch.ones(2**27)  # 512 MB on the peak of this process
    del ballast
    flags = ["--task", "repeat_copy", "--optimizers", "sgd", "--threads", "1", "--out", tmp_path]
    assert bench("memory", *flags, *TINY) == 0
    (row,) = written_of(tmp_path, "memory")["rows"]
    assert row["state_per_parameter"] == 1  # momentum
    assert 100 < row["peak_rss_mb"] < 600


def test_no_file_of_results_is_overwritten_by_what_it_cannot_be_compared_with(tmp_path: Path) -> None:
    def name(**asked: Any) -> str:
        return Request("bench", out=str(tmp_path), **asked).file("step-cost", "ptb_word").name

    assert name() == "step-cost-ptb_word-fp32-threads=2.json"
    assert name(threads=1, precision="bf16") == "step-cost-ptb_word-bf16-threads=1.json"
    assert (
        name(overrides=("task.hidden=1024", "data.root=/a/b"))
        == "step-cost-ptb_word-fp32-threads=2-task.hidden=1024.json"
    )
    assert (
        name(overrides=("optimizer/schedule=cosine",))
        == "step-cost-ptb_word-fp32-threads=2-optimizer_schedule=cosine.json"
    )
    assert Request("bench", json=f"{tmp_path}/all.json").file("lstm") == tmp_path / "all.json"


def test_lstm_compares_the_layers_with_torch(tmp_path: Path) -> None:
    assert bench("lstm", "--task", "ptb_char", "--threads", "1", "--rounds", "3", "--out", tmp_path, *SMALL_TEXT) == 0
    rows = written_of(tmp_path, "lstm")["rows"]
    assert [row["layer"] for row in rows] == [
        "torch.nn.LSTM",
        "kfacrnn.nn.LSTM, captured",
        "kfacrnn.nn.LayerNormLSTM",
        "kfacrnn.nn.LayerNormLSTM, captured",
        "kfacrnn.nn.GRU",
        "kfacrnn.nn.GRU, captured",
    ]
    assert rows[0]["ratio_to_torch"] == 1
    assert {(row["hidden"], row["layers"], row["bptt"], row["batch_size"]) for row in rows} == {(4, 1, 3, 2)}


OTHER_DNC = """
import torch
class DNC(torch.nn.Module):
    def __init__(self, inputs, hidden, **options):
        super().__init__()
        assert options["nr_cells"] == 2 and options["cell_size"] == 2 and options["read_heads"] == 1
        self.map = torch.nn.Linear(inputs, inputs)
    def forward(self, x, state, reset_experience):
        assert x.shape[0] == 2
        return self.map(x), state
"""


@pytest.mark.slow
def test_the_reference_runs_in_a_python_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dnc.py").write_text(OTHER_DNC)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    flags = ["--threads", "1", "--rounds", "3", "--optimizers", "kfac_indep", "--out", tmp_path]
    assert bench("dnc", *flags, "--reference-python", sys.executable, *TINY) == 0
    written = written_of(tmp_path, "dnc")
    assert [row["model"] for row in written["rows"]] == ["DNC with adam", "DNC with kfac_indep", dnc.REFERENCE]
    assert [row["ratio_to_reference"] > 0 for row in written["rows"]] == [True, True, True]
    assert written["rows"][-1]["ratio_to_reference"] == 1
    assert written["reference"]["torch"] == torch.__version__
    assert "/ reference" in capsys.readouterr().out


def test_without_a_reference_it_says_how_to_get_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--threads", "1", "--rounds", "3", "--optimizers", "adam", "--out", tmp_path]
    assert bench("dnc", *flags, *TINY) == 0
    assert "pip install --no-deps dnc" in capsys.readouterr().out
    assert written_of(tmp_path, "dnc")["reference"] is None


@pytest.fixture
def few_points(monkeypatch: pytest.MonkeyPatch, in_this_process: None) -> None:
    monkeypatch.setattr(scaling, "FACTORS", {"bptt": (3, 6), "vocabulary": (30, 50, 10**8)})


@pytest.mark.usefixtures("few_points")
def test_scaling_needs_no_corpus_and_lists_what_it_skips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KFACRNN_DATA", str(tmp_path / "nothing"))
    flags = ["--task", "ptb_char", "--threads", "1", "--rounds", "3", "--out", tmp_path]
    assert bench("scaling", *flags, "--optimizers", "kfac_option1", *SMALL_TEXT) == 0
    written = written_of(tmp_path, "scaling")
    points = [(row["factor"], row["bptt"], row["vocabulary"]) for row in written["rows"][::2]]
    assert points == [("base", 3, 50), ("bptt", 6, 50), ("vocabulary", 3, 30)]
    (skipped,) = written["skipped"]
    assert (skipped["factor"], skipped["value"]) == ("vocabulary", 10**8)
    assert skipped["reason"].startswith("predicted: ")
    assert f"vocabulary={10**8}: predicted" in capsys.readouterr().out
    table = list(csv.DictReader(next(tmp_path.glob("scaling-*.csv")).open()))
    assert [float(line["ms_mean_cycle"]) for line in table] == [row["ms_mean_cycle"] for row in written["rows"]]
    for suffix in ("png", "svg"):
        assert next(tmp_path.glob(f"scaling-*.{suffix}")).stat().st_size > 1000


@pytest.mark.usefixtures("few_points")
@pytest.mark.parametrize(
    ("limit", "reason"), [("--seconds=1e-9", "seen: 0.0 s for a step of sgd (plain)"), ("--gigabytes=0.41", "seen: ")]
)
def test_a_point_that_turns_out_too_large_is_listed_too(tmp_path: Path, limit: str, reason: str) -> None:
    flags = ["--task", "ptb_char", "--threads", "1", "--rounds", "3", "--out", tmp_path, limit]
    assert bench("scaling", *flags, "--optimizers", "kfac_option1", *SMALL_TEXT) == 0
    written = written_of(tmp_path, "scaling")
    assert written["rows"] == []
    assert len(written["skipped"]) == 4
    assert written["skipped"][0]["reason"].startswith(reason)
    assert not list(tmp_path.glob("scaling-*.png"))


def killed(*_: object) -> None:
    raise memory.Ended


@pytest.mark.usefixtures("few_points")
def test_a_point_whose_process_is_killed_is_listed_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "in_fresh_process", killed)
    assert bench("scaling", "--task", "ptb_char", "--threads", "1", "--out", tmp_path, *SMALL_TEXT) == 0
    reasons = [one["reason"] for one in written_of(tmp_path, "scaling")["skipped"]]
    assert reasons[0] == "seen: the process was ended, as for want of memory"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["step-cost", "--task", "ptb_chars"], ["--task ptb_chars", "did you mean 'ptb_char'"]),
        (["step-cost", "--optimizers", "sgd,adamm"], ["--optimizers adamm", "did you mean 'adam'"]),
        (["step-cost", "--precision", "fp64"], ["precision=fp64", "fp32, bf16"]),
        (["step-cost", "--threads", "0"], ["threads=0", "at least 1"]),
        (["step-cost", "--rounds", "2"], ["--rounds 2", "at least 3"]),
        (["step-cost", "task.hiden=3", "--task", "ptb_char"], ["task.hiden=3", "did you mean 'task.hidden'"]),
        (["step-cost", "optimizer.refresh_evry=3"], ["did you mean 'optimizer.refresh_every'"]),
        (["step-cost", "optimizer=adam"], ["optimizer=adam", "--optimizers"]),
        (["step-cost", "--json", "/"], ["cannot write /", "--json FILE"]),
        (["lstm", "--out", "/proc/x"], ["cannot write /proc/x", "--out DIR"]),
        (["scaling", "--task", "repeat_copy"], ["--task repeat_copy", "ptb_char and ptb_word"]),
        (["dnc", "--reference-python", "/nonexistent"], ["--reference-python /nonexistent", "No such file"]),
        (["dnc", "--reference-python", "/bin/false"], ["--reference-python /bin/false", "import torch and dnc"]),
        (["dnc", "--reference-python", "x", "task.write_heads=2"], ["one write head"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], named: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert bench(*arguments) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert [part for part in named if part not in line] == []
    assert captured.out == ""


# ---- the machine -------------------------------------------------------------------------------------------------


def test_processor_seconds_leave_out_those_of_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", lambda _: 100)
    (tmp_path / "stat").write_text("cpu  100 20 30 90000 5000 7 3 0 0 0\ncpu0 1 2 3\n")
    assert neighbours.processor_seconds(tmp_path / "stat") == 1.6
    assert neighbours.processor_seconds(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("load", "others", "busy"), [(3.0, 0.02, False), (0.0, 0.9, True), (0.2, None, False), (1.0, None, True)]
)
def test_a_machine_is_busy_if_others_use_it(load: float, others: float | None, busy: bool) -> None:
    assert neighbours.is_busy(load, others) == busy


def test_a_busy_machine_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    report.warn_if_busy({"busy": False, "load_before": 0.0, "others_cores": 0.0})
    assert capsys.readouterr().err == ""
    report.warn_if_busy({"busy": True, "load_before": 2.0, "others_cores": 1.26})
    assert capsys.readouterr().err.startswith("warning: the machine was busy (other processes used 1.3 cores)")
