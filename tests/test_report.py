"""The page: well-formed, self-contained, escaped, and complete about what there is and what there is not."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest

from kfacrnn import cli, experiment, figures
from kfacrnn.errors import UserError
from kfacrnn.inline_svg import inline_svg
from kfacrnn.plan import Plan
from kfacrnn.report import report
from tests.synthetic import store, write_experiment

NASTY = "<script>alert('&\"')</script>"
METHODS = "{SGD: {optimizer: sgd, grid: {optimizer.lr: [0.1, 0.2]}}, Adam: {optimizer: adam}}"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with three figures, of the same two lines."""
    results = tmp_path_factory.mktemp("store")
    more = {"tune": "{seed: 0}", "target": "{baselines: [SGD]}", "claim": "It is faster."}
    path = write_experiment(results / "figure2.yaml", METHODS, **more)
    for index, run in enumerate(Plan(experiment.load(path), str(results)).tuning["SGD"]):
        store(run, [4.0, 3.0, 2.0, 1.0 + index])
    plan = Plan(experiment.load(path), str(results))
    store(plan.confirmation("SGD")[0], [4.0, 3.0, 2.0, 1.0])
    store(plan.confirmation("Adam")[0], [4.0, 0.5, 0.5, 0.5])
    figures.figure(path, results=str(results))
    for suffix in ("json", "svg"):
        for name in ("other", "figure10"):
            shutil.copy(results / "figures" / f"figure2.{suffix}", results / "figures" / f"{name}.{suffix}")
    return results


@pytest.fixture
def results(drawn: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    shutil.copytree(drawn / "figures", tmp_path / "figures")
    return tmp_path


def page(results: Path) -> tuple[str, Element]:
    """The page's text and, since it is well-formed XML as well, its tree."""
    text = report(results=str(results)).read_text()
    return text, ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>"))


def texts(tree: Element, tag: str) -> list[str]:
    return [" ".join("".join(element.itertext()).split()) for element in tree.iter(tag)]


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_papers_figures_come_first_by_number_and_what_is_not_drawn_last(results: Path) -> None:
    _, tree = page(results)
    headings = [element.text for element in tree.iter("b")]
    assert headings == ["Figure 2", "Figure 10", "other", "not drawn yet"]
    missing = next(section for section in tree.iter("section") if section.get("id") == "not-drawn")
    assert texts(missing, "h3")[:3] == ["Figure 1", "Figure 3", "Figure 4"]
    root = str(results)
    assert texts(missing, "pre")[0] == f"kfacrnn sweep figure1 --results {root} kfacrnn figure figure1 --results {root}"


def test_a_figure_comes_with_claim_findings_table_settings_runs_and_commands(results: Path) -> None:
    _, tree = page(results)
    section = next(section for section in tree.iter("section") if section.get("id") == "figure2")
    said = " ".join(section.itertext())
    run_id = json.loads((results / "figures/figure2.json").read_text())["lines"][0]["runs"][0]["run_id"]
    for part in ("It is faster.", "reaches the target, 2.500, in", "optimizer.lr=0.1", "c0ffee", "Abacus 1", run_id):
        assert part in said
    assert f"kfacrnn figure figure2 --results {results}" in said
    # one run, which ends at the mean of 4, 0.5, 0.5 and 0.5
    assert next(row for row in texts(section, "tr") if row.startswith("Adam")).startswith("Adam11.3751/1")
    assert len(list(section.iter("svg"))) == 1


def test_the_page_asks_nothing_of_any_network(results: Path) -> None:
    text, tree = page(results)
    assert "http" not in text
    assert "@import" not in text
    assert not [element for tag in ("script", "link", "img", "iframe") for element in tree.iter(tag)]
    references = [value for element in tree.iter() for key, value in element.items() if key in ("href", "src")]
    assert references
    assert all(value.startswith("#") for value in references)
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?(.)", text))


def test_ids_are_unique_and_every_reference_inside_the_page_has_its_target(results: Path) -> None:
    text, tree = page(results)
    ids = [element.get("id") for element in tree.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    references = {element.get("href", "#")[1:] for element in tree.iter() if element.get("href")}
    references |= set(re.findall(r"url\(#([^)]*)\)", text))
    assert len(references) > 10
    assert references <= set(ids)


def test_whatever_comes_from_files_is_escaped(results: Path) -> None:
    plain, _ = page(results)
    path = results / "figures" / "other.json"
    stored = json.loads(path.read_text())
    stored |= {"title": NASTY, "description": NASTY, "claim": NASTY, "unequal_trials": {NASTY: 3, "SGD": 4}}
    stored["table"] = {"header": [NASTY], "notes": [NASTY], "findings": [NASTY]} | {
        "rows": [{"optimizer": NASTY, "cells": [NASTY, f"{NASTY} ({NASTY})"]}]
    }
    for line in stored["lines"]:
        line |= {"label": NASTY, "optimizer": NASTY, "on_an_edge": [NASTY], "selection": NASTY}
        line["chosen"] = {NASTY: NASTY}
        for run in (*line["runs"], *line["trials"]):
            run |= {"run_id": NASTY, "state": NASTY, "commits": [NASTY], "hardware": [NASTY], "overrides": [NASTY]}
            run |= {"choice": {NASTY: NASTY}}
    path.write_text(json.dumps(stored))
    text, tree = page(results)
    assert "<script" not in text
    assert not list(tree.iter("script"))
    assert " ".join(tree.itertext()).count(NASTY) > 20
    assert text.count("<section") == plain.count("<section")


def test_a_name_that_is_no_id_still_leads_to_its_figure(results: Path) -> None:
    for suffix in ("json", "svg"):
        for name in ('"a" <b>', "'a' <b>"):
            shutil.copy(results / "figures" / f"other.{suffix}", results / "figures" / f"{name}.{suffix}")
    _, tree = page(results)
    sections = {section.get("id"): section for section in tree.iter("section")}
    links = {f"#{name}" for name in sections}
    assert len(sections) == 6
    assert {element.get("href") for element in tree.iter("a")} == links
    assert any(f"kfacrnn figure '\"a\" <b>' --results {results}" in text for text in texts(tree, "pre"))


def test_a_figure_without_picture_or_table_is_said_to_lack_it(results: Path) -> None:
    (results / "figures/other.svg").unlink()
    path = results / "figures/other.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "table"}))
    said = " ".join(" ".join(page(results)[1].itertext()).split())
    command = f"kfacrnn figure other --results {results}"
    assert f"The picture is missing: {command}" in said
    assert f"The table is missing: {command}" in said


def test_a_line_without_finished_runs_is_no_obstacle(results: Path) -> None:
    path = results / "figures/other.json"
    lines = json.loads(path.read_text())["lines"]
    lines[0] |= {"runs": [], "trials": [], "chosen": {}}
    change(path, lines=lines)
    assert " 1 run · cpu Abacus 1" in " ".join(texts(page(results)[1], "summary"))
    change(path, lines=[])
    assert " 0 runs · " in " ".join(texts(page(results)[1], "summary"))


def test_a_store_without_figures_has_a_page_that_says_what_makes_them(tmp_path: Path) -> None:
    _, tree = page(tmp_path)
    assert [section.get("id") for section in tree.iter("section")] == ["not-drawn"]


def test_what_is_no_figure_or_cannot_be_written_is_one_line(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (results / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/report\.html: .*; choose another with --out FILE"):
        report(results=str(results), out=str(results / "file" / "report.html"))
    (results / "figures/other.svg").write_text("<svg>")
    with pytest.raises(UserError, match=r"other\.svg: .*; kfacrnn figure other .*--from csv"):
        report(results=str(results))
    for broken in ("{", "[]", '{"lines": [{}]}', "null"):
        (results / "figures/other.json").write_text(broken)
        assert cli.main(["report", "--results", str(results)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "other.json: is no figure's provenance; kfacrnn figure other" in line


def test_the_command_writes_where_it_is_told_and_the_same_every_time(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "page.html"
    assert cli.main(["report", "--results", str(results), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    first = out.read_bytes()
    assert cli.main(["report", "--results", str(results), "--out", str(out)]) == 0
    assert out.read_bytes() == first


# ---- pictures ----------------------------------------------------------------------------------------------------

SVG = """<?xml version="1.0"?>
<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="9pt" viewBox="0 0 9 9" id="a">
  <style>body { display: none }</style><script>alert(1)</script><image href="http://a/b.png"/>
  <foreignObject><b>x</b></foreignObject>
  <defs><path id="p" d="M 0 0" style="fill: #ffffff"/></defs>
  <use xlink:href="#p" x="1" onclick="alert(1)" clip-path="url(#a)"/>
  <use href="http://a/c.svg#x"/><path fill="#abcdef" style="fill: url(http://a/d)" d="M 1 1"/>
</svg>"""


def test_of_a_picture_nothing_but_its_shapes_is_taken_over() -> None:
    text = inline_svg(SVG, "one-")
    tree = ElementTree.fromstring(text)
    assert [element.tag for element in tree.iter()] == ["svg", "defs", "path", "use", "use", "path"]
    assert tree.attrib == {"viewBox": "0 0 9 9", "id": "one-a"}
    _, _, shape, inside, outside, filled = tree.iter()
    assert shape.attrib == {"id": "one-p", "d": "M 0 0", "style": "fill: #ffffff"}
    assert inside.attrib == {"href": "#one-p", "x": "1", "clip-path": "url(#one-a)"}
    assert outside.attrib == {}
    assert filled.attrib == {"fill": "#abcdef", "d": "M 1 1"}


STUDY = "# What it costs & is worth\n\nMade by `python scripts/cost_study.py` from runs.\n"


def test_pictures_of_no_one_experiment_are_studies_with_their_title_and_command(results: Path) -> None:
    for name in ("cost_study", "some_map"):
        shutil.copy(results / "figures" / "other.svg", results / "figures" / f"{name}.svg")
    (results / "cost_study.md").write_text(STUDY)
    text, tree = page(results)
    titled, untitled = (section for section in tree.iter("section") if section.get("id") in ("cost_study", "some_map"))
    assert (texts(titled, "h2"), texts(untitled, "h2")) == (["What it costs & is worth"], ["some map"])
    assert texts(titled, "pre") == ["python scripts/cost_study.py"]
    assert texts(untitled, "pre") == []
    assert "Numbers: cost_study.md." in texts(titled, "p")
    assert text.count("<svg") == 5


def test_a_study_that_is_no_picture_is_an_error_with_its_command(results: Path) -> None:
    (results / "figures" / "cost_study.svg").write_text("<svg")
    (results / "cost_study.md").write_text(STUDY)
    with pytest.raises(UserError, match=r"cost_study\.svg: .*; python scripts/cost_study\.py$"):
        report(results=str(results))


def test_a_line_with_benched_seconds_leads_to_the_benchmark(results: Path) -> None:
    path = results / "figures" / "other.json"
    stored = json.loads(path.read_text())
    for line in stored["lines"]:
        line["benched"] = {"seconds": 0.5, "file": "bench/x.json", "commit": "c0ffee", "command": "kfacrnn bench x"}
    path.write_text(json.dumps(stored))
    _, tree = page(results)
    section = next(section for section in tree.iter("section") if section.get("id") == "other")
    (commands,) = texts(section, "pre")
    assert commands.split(" kfacrnn ")[1] == "bench x"
    assert commands.count("kfacrnn") == 3
