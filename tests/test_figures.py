"""The numbers of a figure against hand computation, its files against themselves, its refusals in one line each."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kfacrnn import config, experiment, figures
from kfacrnn.curves import Curve, over_seconds, over_updates, quantile
from kfacrnn.drawing import COLOURS, OTHER_COLOURS, colour
from kfacrnn.errors import UserError
from kfacrnn.plan import Plan, PlannedRun
from tests.synthetic import FIGURE, TINY, store, write_experiment

METHODS = "{SGD: {optimizer: sgd, label: Steepest}, Adam: {optimizer: adam, style: dashed}}"
OF_DEFAULT_SIZE = "[task=repeat_copy, threads=1, budget.updates=20]"
FILES = ("png", "svg", "pdf")


def identity(nats: float) -> float:
    return nats


def confirmation(path: str, results: Path, method: str) -> list[PlannedRun]:
    return Plan(experiment.load(path), str(results)).confirmation(method)


def drawn(path: str, results: Path, **more: str) -> list[dict[str, str]]:
    """Draws the figure and returns the rows of its CSV."""
    table = next(file for file in figures.figure(path, results=str(results), **more) if file.suffix == ".csv")
    with table.open() as file:
        return list(csv.DictReader(file))


def column(rows: list[dict[str, str]], panel: str, line: str, key: str) -> list[float]:
    return [float(row[key]) for row in rows if (row["panel"], row["line"]) == (panel, line)]


def legend_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where the labels of the next figure's legend will be, its title first if there is one."""
    import matplotlib.figure

    labels: list[str] = []
    draw_legend = matplotlib.figure.Figure.legend

    def spy(self: matplotlib.figure.Figure, *args: object, **kwargs: object) -> object:
        labels.extend([str(kwargs["title"])] if "title" in kwargs else [])
        labels.extend(handle.get_label() for handle in kwargs["handles"])  # type: ignore[attr-defined]
        return draw_legend(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "legend", spy)
    return labels


@pytest.mark.parametrize("count", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("q", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_quantiles_are_those_of_numpy(count: int, q: float) -> None:
    values = sorted(np.random.default_rng(count).normal(size=count).tolist())
    assert quantile(values, q) == pytest.approx(np.quantile(values, q), abs=1e-12)


def test_the_band_is_the_range_below_five_seeds_and_the_middle_half_from_five_on() -> None:
    curves = [Curve((1,), (1.0,), (value,)) for value in (4.0, 0.0, 1.0, 2.0, 3.0)]
    (four,) = over_updates("line", curves[:4], identity)
    (five,) = over_updates("line", curves, identity)
    assert (four.low, four.median, four.high, four.n) == (0.0, 1.5, 4.0, 4)
    assert (five.low, five.median, five.high, five.n) == (1.0, 2.0, 3.0, 5)


def test_nats_are_averaged_before_they_become_perplexity() -> None:
    curves = [Curve((1,), (1.0,), (nats,)) for nats in (1.0, 3.0)]
    (row,) = over_updates("line", curves, math.exp)
    assert row.median == pytest.approx(math.exp(2.0))  # not the mean of e and e³
    assert (row.low, row.high) == (math.exp(1.0), math.exp(3.0))


def test_seconds_are_interpolated_on_common_ground_and_never_extrapolated() -> None:
    slow = Curve((10, 20, 30), (2.0, 4.0, 6.0), (3.0, 2.0, 1.0))
    fast = Curve((10, 20, 30), (1.0, 2.0, 5.0), (6.0, 4.0, 1.0))
    rows = over_seconds("line", [slow, fast], identity)
    assert [row.x for row in rows] == [2.0, 3.5, 5.0]  # from where both have begun to where the first has ended
    assert [row.low for row in rows] == pytest.approx([3.0, 2.25, 1.0])
    assert [row.high for row in rows] == pytest.approx([4.0, 2.5, 1.5])
    assert {row.n for row in rows} == {2}


def test_a_diverged_run_counts_as_infinitely_bad_from_there_on() -> None:
    good = [Curve((1, 2), (1.0, 2.0), (1.0, value)) for value in (0.5, 0.7)]
    bad = Curve((1,), (1.0,), (0.1,), diverged=True)
    rows = over_updates("line", [*good, bad], identity)
    assert [(row.median, row.high, row.n) for row in rows] == [(1.0, 1.0, 3), (0.7, math.inf, 3)]
    assert over_seconds("line", [*good, bad], identity)[-1].high == math.inf


def test_the_csv_holds_what_the_runs_hold(tmp_path: Path) -> None:
    path = write_experiment(tmp_path / "tiny.yaml", METHODS, common=["budget.log_every=2"], seeds="[1, 2, 3]")
    for run, last in zip(confirmation(path, tmp_path, "SGD"), (1.0, 2.0, 4.0), strict=True):
        store(run, [5.0, last], every=2)
    for run in confirmation(path, tmp_path, "Adam"):
        store(run, [4.0, 0.5], every=2)
    rows = drawn(path, tmp_path)
    assert list(rows[0]) == ["panel", "line", "x", "median", "low", "high", "n"]
    assert column(rows, "updates", "SGD", "x") == [2, 4]
    assert column(rows, "updates", "SGD", "median") == [5.0, 2.0]
    assert column(rows, "updates", "SGD", "low") == [5.0, 1.0]
    assert column(rows, "updates", "SGD", "high") == [5.0, 4.0]
    assert column(rows, "seconds", "Adam", "median") == [4.0, 0.5]
    assert {row["n"] for row in rows} == {"3"}


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_a_figure_redraws_from_its_csv_byte_for_byte(tmp_path: Path, scale: str) -> None:
    picture = FIGURE.replace("linear", scale)
    path = write_experiment(tmp_path / "tiny.yaml", METHODS, seeds="[1, 2]", figure=picture)
    for method in ("SGD", "Adam"):
        first, second = confirmation(path, tmp_path, method)
        store(first, [3.0, 2.0, 1.0, 0.1 + 0.2])
        store(second, [3.0, 2.0], state="diverged")
    drawn(path, tmp_path)
    original, again = tmp_path / "figures", tmp_path / "again"
    again.mkdir()
    (again / "tiny.csv").write_bytes((original / "tiny.csv").read_bytes())
    written = figures.figure(path, results="nowhere", source="csv", out=str(again))
    assert sorted(written) == sorted(again / f"tiny.{suffix}" for suffix in FILES)
    for suffix in FILES:
        assert (again / f"tiny.{suffix}").read_bytes() == (original / f"tiny.{suffix}").read_bytes()


def test_the_legend_counts_runs_and_divergences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = legend_of(monkeypatch)
    path = write_experiment(tmp_path / "tiny.yaml", METHODS, seeds="[1, 2]")
    first, second = confirmation(path, tmp_path, "SGD")
    store(first, [1.0, 1.0])
    store(second, [], state="diverged")
    store(confirmation(path, tmp_path, "Adam")[0], [1.0, 1.0])
    drawn(path, tmp_path)
    assert labels == ["medians and ranges of n seeds", "Steepest (n = 2, 1 diverged)", "Adam (n = 1)"]


def test_from_five_seeds_on_bands_are_quartiles_and_the_legend_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = legend_of(monkeypatch)
    path = write_experiment(tmp_path / "tiny.yaml", METHODS, seeds="[1, 2, 3, 4, 5]")
    for run in confirmation(path, tmp_path, "SGD"):
        store(run, [1.0, 1.0])
    drawn(path, tmp_path)
    assert labels[0] == "medians and quartiles of n seeds"
    for run in confirmation(path, tmp_path, "Adam")[:2]:
        store(run, [1.0, 1.0])
    labels.clear()
    drawn(path, tmp_path)
    assert labels[0] == "medians and ranges or quartiles of n seeds"


def test_a_cell_that_is_no_number_is_one_line(tmp_path: Path) -> None:
    path = write_experiment(tmp_path / "tiny.yaml", METHODS)
    store(confirmation(path, tmp_path, "SGD")[0], [2.0, 1.0])
    drawn(path, tmp_path)
    file = tmp_path / "figures" / "tiny.csv"
    file.write_text(file.read_text().replace("2.0", "abc"))
    with pytest.raises(UserError, match=r"tiny\.csv, line 2: .*abc"):
        figures.figure(path, results=str(tmp_path), source="csv", out=str(file.parent))


def test_a_run_without_its_task_is_one_line(tmp_path: Path) -> None:
    path = write_experiment(tmp_path / "tiny.yaml", METHODS)
    (run,) = confirmation(path, tmp_path, "SGD")
    store(run, [2.0, 1.0])
    (run.folder.path / "meta.json").unlink()
    with pytest.raises(UserError, match=f"^run {run.run.run_id}: meta.json lacks its task; delete "):
        drawn(path, tmp_path)


def test_runs_that_shared_the_machine_are_kept_out_of_the_panel_of_seconds(tmp_path: Path) -> None:
    path = write_experiment(tmp_path / "tiny.yaml", METHODS, common=["budget.updates=2"], seeds="[1, 2]")
    first, second = confirmation(path, tmp_path, "SGD")
    store(first, [2.0, 1.0])
    store(second, [2.0, 1.0], jobs=2)
    for run in confirmation(path, tmp_path, "Adam"):
        store(run, [2.0, 1.0], jobs=2)
    rows = drawn(path, tmp_path)
    assert column(rows, "updates", "SGD", "n") == [2, 2]
    assert column(rows, "seconds", "SGD", "n") == [1, 1]
    assert column(rows, "seconds", "Adam", "n") == []
    svg = (tmp_path / "figures" / "tiny.svg").read_text()
    assert "<!-- without 3 that shared the machine -->" in svg


def test_a_time_axis_does_not_mix_hardware_unless_asked_to(tmp_path: Path) -> None:
    path = write_experiment(tmp_path / "tiny.yaml", METHODS)
    store(confirmation(path, tmp_path, "SGD")[0], [2.0, 1.0], cpu="Abacus 1")
    store(confirmation(path, tmp_path, "Adam")[0], [2.0, 1.0], cpu="Abacus 2")
    with pytest.raises(UserError, match=r"mix hardware: .*Abacus 1.*Abacus 2.*mix_hardware: true"):
        drawn(path, tmp_path)
    for allowed in ("mix_hardware: true", "panels: [updates]"):
        path = write_experiment(tmp_path / "tiny.yaml", METHODS, figure=FIGURE.replace("}}", f"}}, {allowed}}}"))
        assert drawn(path, tmp_path)


def test_every_line_leads_back_to_its_runs_and_to_how_its_settings_were_chosen(tmp_path: Path) -> None:
    methods = "{SGD: {optimizer: sgd, grid: {optimizer.lr: [0.1, 0.2]}}}"
    path = write_experiment(tmp_path / "tiny.yaml", methods, seeds="[1, 2, 3]", tune="{seed: 0}")
    worse, better = Plan(experiment.load(path), str(tmp_path)).tuning["SGD"]
    store(worse, [3.0, 3.0, 3.0, 3.0], state="diverged")
    store(better, [3.0, 2.0, 2.0, 1.0])
    first, second, third = confirmation(path, tmp_path, "SGD")
    store(first, [3.0, 2.0])
    store(second, [3.0], state="diverged")
    store(third, [3.0], state="failed")
    drawn(path, tmp_path)
    (line,) = json.loads((tmp_path / "figures" / "tiny.json").read_text())["lines"]
    assert line["chosen"] == {"optimizer.lr": 0.2}
    assert line["selection"] == "least train/nats, mean over the last 50 updates"
    assert [(trial["choice"]["optimizer.lr"], trial["score"]) for trial in line["trials"]] == [(0.1, None), (0.2, 2.0)]
    assert [run["run_id"] for run in line["runs"]] == [first.run.run_id, second.run.run_id]
    assert line["runs"][0]["commits"] == ["c0ffee"]
    assert line["runs"][0]["hardware"] == ["cpu Abacus 1, cores 2"]
    assert line["seeds"] == {"used": [1, 2], "diverged": [2], "failed": [3], "missing": []}


def test_a_panel_without_seconds_says_why_and_names_no_command(tmp_path: Path) -> None:
    path = write_experiment(tmp_path / "tiny.yaml", METHODS)
    store(confirmation(path, tmp_path, "SGD")[0], [2.0, 1.0], jobs=2)
    drawn(path, tmp_path)
    svg = (tmp_path / "figures" / "tiny.svg").read_text()
    assert "<!-- no run had the machine to itself -->" in svg
    assert "kfacrnn" not in svg


def test_a_figure_that_was_never_drawn_names_the_command_that_draws_it(tmp_path: Path) -> None:
    path, out = write_experiment(tmp_path / "tiny.yaml", METHODS), str(tmp_path / "out")
    with pytest.raises(UserError, match=rf"kfacrnn figure {path} --out {out} --results elsewhere makes it$"):
        figures.figure(path, results="elsewhere", source="csv", out=out)
    assert experiment.load("2").called == "figure2"


def test_unfinished_runs_are_left_out_and_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_experiment(tmp_path / "tiny.yaml", METHODS, common=["budget.updates=2"], seeds="[1, 2]")
    with pytest.raises(UserError, match=rf"no finished run in .*; kfacrnn sweep {path} --results {tmp_path}$"):
        drawn(path, tmp_path)
    finished, stopped = confirmation(path, tmp_path, "SGD")
    store(finished, [2.0, 1.0])
    store(stopped, [7.0], state="interrupted")
    assert column(drawn(path, tmp_path), "updates", "SGD", "high") == [2.0, 1.0]
    assert capsys.readouterr().err.splitlines() == ["SGD: 1 of 2 runs are finished", "Adam: 0 of 2 runs are finished"]


def test_chance_levels_and_metrics_are_held_against_the_task(tmp_path: Path) -> None:
    path = write_experiment(tmp_path / "tiny.yaml", METHODS, figure=FIGURE.replace("}}", "}, chance: 2.0}"))
    (sgd,), (adam,) = (confirmation(path, tmp_path, method) for method in ("SGD", "Adam"))
    store(sgd, [1.0], task={"unit": "word", "metric": "perplexity", "chance": 3.0})
    with pytest.raises(UserError, match=r"figure.chance=2.0: the task says 3 perplexity"):
        drawn(path, tmp_path)
    path = write_experiment(tmp_path / "tiny.yaml", METHODS)
    assert column(drawn(path, tmp_path), "updates", "SGD", "median") == [math.e] * 4
    store(adam, [1.0], task={"unit": "character", "metric": "bits per character", "chance": 3.0})
    with pytest.raises(UserError, match="lines measure perplexity and bits per character; draw nats instead"):
        drawn(path, tmp_path)


def without_second_row(content: bytes) -> bytes:
    lines = content.splitlines(keepends=True)
    return b"".join([*lines[:2], *lines[3:]])


@pytest.mark.parametrize("harm", [lambda content: content[:-1], without_second_row, lambda content: content * 2])
def test_a_run_that_has_lost_rows_or_has_some_twice_is_not_drawn(
    tmp_path: Path, harm: Callable[[bytes], bytes]
) -> None:
    path = write_experiment(tmp_path / "cut.yaml", "{SGD: {optimizer: sgd}}")
    (run,) = Plan(experiment.load(path), str(tmp_path)).confirmation("SGD")
    store(run, [3.0, 2.0, 1.0, 0.5])
    metrics = run.folder.path / "metrics.csv"
    metrics.write_bytes(harm(metrics.read_bytes()))
    with pytest.raises(UserError, match=r"metrics.csv lacks rows or repeats some; delete .* to have it made again$"):
        figures.figure(path, results=str(tmp_path))
    assert not (tmp_path / "figures").exists()


def test_a_csv_that_does_not_belong_to_the_experiment_is_refused(tmp_path: Path) -> None:
    path = write_experiment(tmp_path / "tiny.yaml", METHODS)
    with pytest.raises(UserError, match=r"cannot read .*tiny\.csv"):
        figures.figure(path, results=str(tmp_path), source="csv", out=str(tmp_path))
    (tmp_path / "tiny.csv").write_text("panel,line,x,median,low,high,n\nupdates,Adamm,1,1,1,1,1\n")
    with pytest.raises(UserError, match="no such line in tiny: 'Adamm'; did you mean 'Adam'"):
        figures.figure(path, results=str(tmp_path), source="csv", out=str(tmp_path))
    (tmp_path / "tiny.csv").write_text("line,x,y\n")
    with pytest.raises(UserError, match="the first line must be panel,line,x,median,low,high,n"):
        figures.figure(path, results=str(tmp_path), source="csv", out=str(tmp_path))
    with pytest.raises(UserError, match="no such source: 'result'; did you mean 'results'"):
        figures.figure(path, results=str(tmp_path), source="result")


def test_an_optimiser_has_one_colour_and_a_new_one_gets_a_free_one() -> None:
    assert len(set(COLOURS.values())) == len(COLOURS)
    assert colour("sgd") == COLOURS["sgd"]
    assert colour("toy") == colour("toy")
    assert colour("toy") not in COLOURS.values()


def test_lines_that_nothing_else_tells_apart_have_colours_of_their_own(tmp_path: Path) -> None:
    slow = "{optimizer: sgd, overrides: [optimizer.lr=0.01]"
    methods = f"{{Fast: {{optimizer: sgd}}, Slow: {slow}}}, Slow dashed: {slow}, style: dashed}}}}"
    path = write_experiment(tmp_path / "tiny.yaml", methods)
    for method in ("Fast", "Slow", "Slow dashed"):
        for run in confirmation(path, tmp_path, method):
            if not run.folder.path.exists():
                store(run, [2.0, 1.0])
    drawn(path, tmp_path)
    svg = (tmp_path / "figures" / "tiny.svg").read_text().lower()
    assert COLOURS["sgd"].lower() in svg
    assert [shade.lower() in svg for shade in OTHER_COLOURS[:2]] == [True, False]


def test_with_models_the_legend_has_methods_and_then_models_that_have_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = (
        "{small: {}, large: {overrides: [task.hidden=5], style: dashed, seeds: [3], settings: small, label: Large}}"
    )
    methods = "{SGD: {optimizer: sgd}, Adam: {optimizer: adam, marker: circle}}"
    path = write_experiment(tmp_path / "tiny.yaml", methods, seeds="[1, 2]", models=models)
    labels = legend_of(monkeypatch)
    for line in ("SGD small", "Adam small", "SGD large"):
        for run in confirmation(path, tmp_path, line):
            store(run, [2.0, 1.0])
        labels.clear()
        rows = drawn(path, tmp_path)
        assert ("Large" in labels) == (line == "SGD large")
    assert labels == ["medians and ranges of n seeds", "SGD (n = 2 and 1)", "Adam (n = 2)", "small", "Large"]
    assert column(rows, "updates", "SGD large", "n") == [1] * 4
    stored = json.loads((tmp_path / "figures" / "tiny.json").read_text())["lines"]
    assert [(line["label"], line["model"]) for line in stored[:2]] == [("SGD, small", "small"), ("SGD, Large", "large")]
    assert stored[1]["seeds"]["used"] == [3]


def test_a_figure_whose_methods_had_different_numbers_of_trials_says_so_on_its_face(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = (
        "{SGD: {optimizer: sgd, grid: {optimizer.lr: [1]}}, Adam: {optimizer: adam, cross: {optimizer.lr: [1, 2, 3]}}}"
    )
    path = write_experiment(tmp_path / "tiny.yaml", methods, tune="{seed: 0}")
    plan = Plan(experiment.load(path), str(tmp_path))
    for trial in (*plan.tuning["SGD"], *plan.tuning["Adam"]):
        store(trial, [trial.run.optimizer.lr])
    for method in ("SGD", "Adam"):
        store(confirmation(path, tmp_path, method)[0], [2.0, 1.0])
    labels = legend_of(monkeypatch)
    drawn(path, tmp_path)
    said = "numbers of trials are not equal: 1 for SGD and 3 for Adam"
    assert labels[0] == said
    labels.clear()
    figures.figure(path, results="nowhere", source="csv", out=str(tmp_path / "figures"))
    assert labels[0] == said  # the CSV knows it
    stored = json.loads((tmp_path / "figures" / "tiny.json").read_text())
    assert stored["unequal_trials"] == {"SGD": 1, "Adam": 3}
    assert [line["on_an_edge"] for line in stored["lines"]] == [[], ["optimizer.lr"]]


BENCHED = FIGURE.replace("}}", "}, benched_seconds: true}")


def bench(
    results: Path,
    name: str = "step-cost-repeat_copy-fp32-threads=1",
    *,
    busy: bool = False,
    overrides: list[str] | None = None,
    cpu: str = "Abacus 1",
    **more: object,
) -> None:
    """Half a second for an update of Adam, unless `more` says something else."""
    row = {"task": "repeat_copy", "optimizer": "adam", "dtype": "fp32", "threads": 1, "settings": {}, **more}
    row.setdefault("ms_mean_cycle", 500.0)
    row |= {"kinds": {"plain": {"frequency": 1.0, "ms_median": row["ms_mean_cycle"]}}}
    rows = [{**row, "ms_p95": 700.0}, {**row, "threads": 2, "ms_mean_cycle": 1.0, "ms_p95": 1.0}]
    about = {"machine": {"busy": busy}, "overrides": overrides or [], "commit": "c0ffee", "command": "kfacrnn bench"}
    content = {**about, "hardware": {"cpu": cpu, "cores": 2}, "rows": rows}
    (results / "bench").mkdir(parents=True, exist_ok=True)
    (results / "bench" / f"{name}.json").write_text(json.dumps(content))


def test_a_line_whose_runs_all_shared_the_machine_may_have_benched_seconds(tmp_path: Path) -> None:
    path = write_experiment(tmp_path / "tiny.yaml", METHODS, figure=BENCHED)
    described = Path(path).read_text()
    default_task = described.replace(f"common: [{', '.join(TINY)}]", f"common: {OF_DEFAULT_SIZE}")
    Path(path).write_text(default_task)
    (sgd,), (adam,) = (confirmation(path, tmp_path, method) for method in ("SGD", "Adam"))
    store(sgd, [2.0, 1.0], every=10, jobs=2)
    store(adam, [4.0, 3.0], every=10, jobs=2)
    bench(tmp_path)
    rows = drawn(path, tmp_path)
    assert column(rows, "benched", "Adam", "x") == [5.0, 10.0]
    assert column(rows, "benched", "Adam", "median") == [4.0, 3.0]
    assert column(rows, "benched", "SGD", "x") == column(rows, "seconds", "Adam", "x") == []  # SGD was not benched
    svg = (tmp_path / "figures" / "tiny.svg").read_text()
    assert "<!-- seconds of Adam: what updates cost by kfacrnn bench -->" in svg
    assert "<!-- without 1 that shared the machine -->" in svg
    line = json.loads((tmp_path / "figures" / "tiny.json").read_text())["lines"][1]
    assert (line["benched"]["seconds"], line["benched"]["commit"]) == (0.5, "c0ffee")
    for unusable in ({"busy": True}, {"overrides": ["task.hidden=7"]}):
        bench(tmp_path, **unusable)  # type: ignore[arg-type]
        assert column(drawn(path, tmp_path), "benched", "Adam", "x") == []


def test_benched_seconds_are_for_the_sizes_that_were_benched_and_for_runs_without_their_own(tmp_path: Path) -> None:
    path = write_experiment(tmp_path / "tiny.yaml", METHODS, figure=BENCHED)  # a smaller task than the default
    store(confirmation(path, tmp_path, "Adam")[0], [4.0, 3.0], jobs=2)
    bench(tmp_path)
    assert column(drawn(path, tmp_path), "benched", "Adam", "x") == []


def test_a_benchmark_of_other_sizes_is_for_the_runs_that_have_them(tmp_path: Path) -> None:
    path = write_experiment(tmp_path / "tiny.yaml", METHODS, figure=BENCHED)
    sizes = "[task=repeat_copy, threads=1, budget.updates=20, task.hidden=7]"
    Path(path).write_text(Path(path).read_text().replace(f"[{', '.join(TINY)}]", sizes))
    store(confirmation(path, tmp_path, "Adam")[0], [4.0, 3.0], every=10, jobs=2)
    bench(tmp_path)
    default = "step-cost-repeat_copy-fp32-threads=1"
    for hidden, *more in ((8,), (7, "task.batch_size=3"), (7, "optimizer.clip=1"), (7, "task.gone=1")):
        overrides = [f"task.hidden={hidden}", *more]
        bench(tmp_path, "-".join([default, *overrides]), overrides=overrides)
        assert column(drawn(path, tmp_path), "benched", "Adam", "x") == []
    bench(tmp_path, f"{default}-task.hidden=7-avx2", overrides=["task.hidden=7"])
    assert column(drawn(path, tmp_path), "benched", "Adam", "x") == []
    bench(tmp_path, f"{default}-task.hidden=7", overrides=["task.hidden=7"])
    assert column(drawn(path, tmp_path), "benched", "Adam", "x") == [5.0, 10.0]


def test_a_benchmark_of_the_experiment_knows_each_of_its_lines(tmp_path: Path) -> None:
    budget = ["budget.updates=20", "budget.log_every=10"]
    path = write_experiment(tmp_path / "tiny.yaml", METHODS, common=budget, figure=BENCHED)  # smaller than the default
    store(confirmation(path, tmp_path, "Adam")[0], [4.0, 3.0], every=10, jobs=2)
    bench(tmp_path, "experiment-tiny-fp32-threads=1", line="SGD")
    assert column(drawn(path, tmp_path), "benched", "Adam", "x") == []
    bench(tmp_path, "experiment-tiny-fp32-threads=1", line="Adam", ms_mean_cycle=250.0)
    assert column(drawn(path, tmp_path), "benched", "Adam", "x") == [2.5, 5.0]


def test_benched_seconds_are_for_the_settings_that_were_benched(tmp_path: Path) -> None:
    methods = "{K-FAC: {optimizer: kfac_option1, overrides: [optimizer.statistics_every=1, optimizer.lr=1]}}"
    path = write_experiment(tmp_path / "tiny.yaml", methods, figure=BENCHED)
    Path(path).write_text(Path(path).read_text().replace(f"[{', '.join(TINY)}]", OF_DEFAULT_SIZE))
    (run,) = confirmation(path, tmp_path, "K-FAC")
    store(run, [2.0, 1.0], every=10, jobs=2)
    shipped = dataclasses.asdict(config.compose(["task=repeat_copy", "optimizer=kfac_option1"]).optimizer)
    costly = ("statistics_every", "statistics_fraction", "refresh_every", "refresh_delay", "max_dense")
    costly += ("decompositions", "products", "lag_tolerance", "quadratic_fraction", "adapt_damping_every")
    settings = {name: shipped[name] for name in costly}  # without gates, which came later
    for other in ({}, {"statistics_every": 1, "gates": "joint"}):
        bench(tmp_path, optimizer="kfac_option1", settings=settings | other)
        assert column(drawn(path, tmp_path), "benched", "K-FAC", "x") == []
    bench(tmp_path, optimizer="kfac_option1", settings=settings | {"statistics_every": 1})
    assert column(drawn(path, tmp_path), "benched", "K-FAC", "x") == [5.0, 10.0]


def test_all_lines_have_seconds_by_the_same_clock(tmp_path: Path) -> None:
    path = write_experiment(tmp_path / "tiny.yaml", METHODS, common=["budget.updates=2"], figure=BENCHED)
    store(confirmation(path, tmp_path, "SGD")[0], [2.0, 1.0])  # alone on the machine
    store(confirmation(path, tmp_path, "Adam")[0], [2.0, 1.0], jobs=2)
    bench(tmp_path, "experiment-tiny-fp32-threads=1", line="SGD", optimizer="sgd", ms_mean_cycle=250.0)
    rows = drawn(path, tmp_path)
    assert column(rows, "seconds", "SGD", "x") == column(rows, "benched", "Adam", "x") == []
    assert column(rows, "benched", "SGD", "x") == [0.25, 0.5]


def test_seconds_measured_side_by_side_go_before_those_of_runs_once_every_line_has_them(tmp_path: Path) -> None:
    path = write_experiment(tmp_path / "tiny.yaml", METHODS, common=["budget.updates=2"], figure=BENCHED)
    store(confirmation(path, tmp_path, "SGD")[0], [2.0, 1.0])
    bench(tmp_path, "experiment-tiny-fp32-threads=1", line="SGD", optimizer="sgd", ms_mean_cycle=250.0)
    assert column(drawn(path, tmp_path), "benched", "SGD", "x") == [0.25, 0.5]
    store(confirmation(path, tmp_path, "Adam")[0], [2.0, 1.0])
    rows = drawn(path, tmp_path)
    assert column(rows, "benched", "SGD", "x") == []
    assert column(rows, "seconds", "SGD", "median") == column(rows, "seconds", "Adam", "median") == [2.0, 1.0]


def test_benched_seconds_are_no_way_around_mixing_hardware(tmp_path: Path) -> None:
    path = write_experiment(tmp_path / "tiny.yaml", METHODS, figure=BENCHED)
    Path(path).write_text(Path(path).read_text().replace(f"[{', '.join(TINY)}]", "[task=repeat_copy, threads=1]"))
    store(confirmation(path, tmp_path, "SGD")[0], [2.0, 1.0])
    store(confirmation(path, tmp_path, "Adam")[0], [2.0, 1.0], jobs=2)
    bench(tmp_path, "experiment-tiny-fp32-threads=1", line="SGD", optimizer="sgd", cpu="Abacus 1")
    bench(tmp_path, cpu="Abacus 2")
    with pytest.raises(UserError, match=r"mix hardware: .*Abacus 1.*Abacus 2.*step-cost"):
        drawn(path, tmp_path)
