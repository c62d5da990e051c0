"""What a figure's table says, in its three files and in words."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from kfacrnn import experiment, figures, tables
from kfacrnn.errors import UserError
from kfacrnn.plan import Plan
from kfacrnn.summary_cells import significant
from tests.synthetic import store, write_experiment

METHODS = "{SGD: {optimizer: sgd, label: 'Steepest_descent & co'}, Adam: {optimizer: adam}}"
MORE = {"target": "{baselines: [SGD]}", "select": "{last: 2}", "seeds": "[1, 2]"}


def drawn(path: str, results: Path) -> Path:
    """The folder with the figure's files."""
    figures.figure(path, results=str(results))
    return results / "figures"


def store_both(path: str, results: Path, *, jobs: int = 1) -> None:
    plan = Plan(experiment.load(path), str(results))
    for run, last in zip(plan.confirmation("SGD"), (2.0, 4.0), strict=True):
        store(run, [9.0, 9.0, last, last], jobs=jobs)  # means over two updates: 9, 9, …, last
    for run in plan.confirmation("Adam"):
        store(run, [9.0, 3.0, 1.0, 1.0], seconds=[2.0, 4.0, 6.0, 9.0], jobs=jobs)  # means: 6, 2, 1


def test_the_files_say_the_same_with_all_digits_for_machines_and_few_for_people(tmp_path: Path) -> None:
    path = write_experiment(tmp_path / "tiny.yaml", METHODS, **MORE)
    store_both(path, tmp_path)
    folder = drawn(path, tmp_path)
    with (folder / "tiny.table.csv").open() as file:
        sgd, adam = csv.DictReader(file)
    assert (sgd["line"], sgd["baseline"], sgd["target"], sgd["reached"]) == ("SGD", "SGD", "4.0", "2")
    assert (adam["updates_to_target"], adam["updates_ratio"], adam["seconds_to_target"]) == ("3.0", "0.75", "6.0")
    assert (adam["seconds_ratio"], adam["seconds_ratio_low"], adam["seconds_from"]) == ("1.5", "1.5", "runs")
    assert (adam["seconds_per_update_median"], adam["final"]) == ("2.0", "1.0")
    header, rule, first, second = (folder / "tiny.table.md").read_text().splitlines()[:4]
    assert [cell.strip() for cell in header.strip("|").split("|")][:4] == ["line", "runs", "final value", "reached"]
    assert set(rule) == set("| -:")
    assert first.startswith("| Steepest_descent & co | 2 | 3.000 (2.000–4.000) | 2/2 | 4 | 1.00 | 4.00 | 1.00 |")
    assert second.startswith("| Adam | 2 | 1.000 | 2/2 | 3 | 0.75 | 6.00 | 1.50 |")
    latex = (folder / "tiny.table.tex").read_text()
    assert r"Steepest\_descent \& co & 2 & 3.000 (2.000--4.000)" in latex
    assert latex.count(r"\begin{") == latex.count(r"\end{") == 2
    assert "the mean over its last 2 updates" in latex


def test_the_notes_say_how_little_a_few_seeds_tell_and_which_baselines_are_missing(tmp_path: Path) -> None:
    methods = "{SGD: {optimizer: sgd}, Adam: {optimizer: adam}, RMSProp: {optimizer: rmsprop}}"
    path = write_experiment(tmp_path / "tiny.yaml", methods, **(MORE | {"target": "{baselines: [SGD, Adam, RMSProp]}"}))
    store_both(path, tmp_path)
    notes = (drawn(path, tmp_path) / "tiny.table.md").read_text()
    assert "final value of Adam, the best of SGD, Adam (of two" in notes
    assert "There are no runs yet of RMSProp." in notes
    assert "interval over seeds, which with 2 seeds covers at most 50%: read it as a range." in notes


def test_drawing_from_the_csv_leaves_table_and_provenance_alone(tmp_path: Path) -> None:
    path = write_experiment(tmp_path / "tiny.yaml", METHODS, **MORE)
    store_both(path, tmp_path)
    folder = drawn(path, tmp_path)
    names = ("tiny.json", "tiny.table.csv", "tiny.table.md", "tiny.table.tex")
    for name in names:
        (folder / name).write_text("mine")
    figures.figure(path, results=str(tmp_path), source="csv")
    assert {(folder / name).read_text() for name in names} == {"mine"}


def test_the_provenance_holds_the_table_and_the_findings_in_words(tmp_path: Path) -> None:
    path = write_experiment(tmp_path / "tiny.yaml", METHODS, claim="'It is faster.'", **MORE)
    store_both(path, tmp_path)
    stored = json.loads((drawn(path, tmp_path) / "tiny.json").read_text())
    assert (stored["title"], stored["claim"]) == ("Tiny", "It is faster.")
    assert [row["optimizer"] for row in stored["table"]["rows"]] == ["sgd", "adam"]
    assert stored["table"]["findings"] == [
        "Adam reaches the target, 4.000, in 0.75 of the updates of Steepest_descent & co, 1.50 of its seconds; "
        "2 of 2 runs do."
    ]


def test_seconds_of_runs_that_shared_the_machine_are_not_in_the_table(tmp_path: Path) -> None:
    path = write_experiment(tmp_path / "tiny.yaml", METHODS, **MORE)
    store_both(path, tmp_path, jobs=2)
    markdown = (drawn(path, tmp_path) / "tiny.table.md").read_text()
    assert "seconds" not in markdown.splitlines()[0]
    assert "No seconds: no run had the machine to itself." in markdown


def test_seconds_are_left_out_with_the_panel_of_seconds(tmp_path: Path) -> None:
    picture = "{title: Tiny, y: {metric: train/metric, label: loss, scale: linear}, panels: [updates]}"
    path = write_experiment(tmp_path / "tiny.yaml", METHODS, figure=picture, **MORE)
    store_both(path, tmp_path)
    markdown = (drawn(path, tmp_path) / "tiny.table.md").read_text()
    assert "seconds" not in markdown.splitlines()[0]
    assert "No seconds: the figure has no panel of seconds." in markdown


def test_a_target_must_be_made_of_methods(tmp_path: Path) -> None:
    path = write_experiment(tmp_path / "tiny.yaml", METHODS, target="{baselines: [Adamm]}")
    with pytest.raises(UserError, match=r"target\.baselines: no such method: 'Adamm'; did you mean 'Adam'"):
        experiment.load(path)
    path = write_experiment(tmp_path / "tiny.yaml", METHODS, target="{baselines: []}")
    with pytest.raises(UserError, match=r"target\.baselines: there is none"):
        experiment.load(path)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.0, "0.000"), (1.6, "1.600"), (9.9996, "10.00"), (352.04, "352.0"), (1179.4, "1,179"), (-1.5, "-1.500")),
        *((0.0028716, "0.002872"), (0.00002, "2.000e-05"), (8.748e48, "8.748e+48"), (math.inf, "∞")),
    ],
)
def test_numbers_have_four_significant_digits(value: float, text: str) -> None:
    assert significant(value) == text


def test_what_latex_or_markdown_would_read_as_its_own_is_escaped() -> None:
    assert r"a\_1 & 50\% \textbackslash{} \{\} $\infty$ \\" in tables.latex(["x", "y"], [["a_1", "50% \\ {} ∞"]])
    assert tables.markdown(["x"], [["a|b"], [None]]).splitlines()[2:] == ["| a&#124;b |", "|  |"]
