"""What experiments/*.yaml may say, how it expands into runs, and how mistakes in it are answered."""

from __future__ import annotations

from pathlib import Path

import pytest

from kfacrnn import config, discovery, experiment
from kfacrnn.errors import UserError
from kfacrnn.overrides import override
from kfacrnn.plan import Plan

WHOLE = """\
description: two methods
common: [task=repeat_copy, budget.updates=100]
seeds: [1, 2]
tune: {seed: 0, overrides: [budget.updates=10]}
methods:
  SGD: {optimizer: sgd, grid: {optimizer.lr: [1e-3, 1], optimizer.clip: [null, 5.0]}}
  Adam: {optimizer: adam, overrides: [optimizer.lr=0.5]}
figure:
  title: Two methods
  y: {metric: train/metric, label: loss, scale: linear}
"""


def written(folder: Path, old: str = "", new: str = "") -> str:
    assert old in WHOLE
    path = folder / "two.yaml"
    path.write_text(WHOLE.replace(old, new) if old else WHOLE)
    return str(path)


def test_a_grid_is_every_combination_and_the_last_key_varies_fastest(tmp_path: Path) -> None:
    points = experiment.load(written(tmp_path)).tuning("SGD")
    assert [str(point) for point in points] == [
        "optimizer.lr=0.001 optimizer.clip=null seed=0",
        "optimizer.lr=0.001 optimizer.clip=5.0 seed=0",
        "optimizer.lr=1 optimizer.clip=null seed=0",
        "optimizer.lr=1 optimizer.clip=5.0 seed=0",
    ]


def test_tuning_runs_take_the_tuning_seed_and_overrides_and_confirmation_runs_do_not(tmp_path: Path) -> None:
    two = experiment.load(written(tmp_path))
    tuning = config.compose(two.tuning("SGD")[1].overrides)
    confirmation = [config.compose(point.overrides) for point in two.confirmation("SGD", {"optimizer.lr": 1})]
    assert (tuning.seed, tuning.budget.updates, tuning.optimizer.lr, tuning.optimizer.clip) == (0, 10, 0.001, 5.0)
    assert [(run.seed, run.budget.updates, run.optimizer.lr) for run in confirmation] == [(1, 100, 1.0), (2, 100, 1.0)]


def test_a_method_without_a_grid_has_nothing_to_tune(tmp_path: Path) -> None:
    two = experiment.load(written(tmp_path))
    assert two.tuning("Adam") == []
    assert [config.compose(point.overrides).optimizer.lr for point in two.confirmation("Adam", {})] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (1e-5, "1e-05"),
        ("cosine", "cosine"),
        ("a b", "'a b'"),
        ("it's", "'it\\'s'"),
        ([1, "x y"], "[1,'x y']"),
    ],
)
def test_values_are_written_so_that_hydra_reads_them_back(value: object, text: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    written = override("key", value)
    assert written == f"key={text}"
    assert OverridesParser.create().parse_override(written).value() == value


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds:", "seedz:", "no such key: seedz; did you mean 'seeds'?"),
        ("grid:", "gird:", "no such key: methods.SGD.gird; did you mean 'grid'?"),
        ("seeds: [1, 2]", "seeds: [1, one]", "seeds[1]: Value 'one'"),
        ("seeds: [1, 2]", "seeds: [1, 1]", "seeds=[1, 1]: must be one or more different seeds"),
        ("[1e-3, 1]", "[]", "methods.SGD.grid.optimizer.lr: has no values"),
        ("[1e-3, 1]", "7", "methods.SGD.grid.optimizer.lr"),
        ("description: two methods\n", "", "description has no value"),
        ("optimizer: sgd, ", "", "methods.SGD.optimizer has no value"),
        ("scale: linear", "scale: loud", "figure.y.scale=loud: must be one of linear, log"),
        ("tune: {seed: 0, overrides: [budget.updates=10]}\n", "", "methods.SGD.grid: needs `tune`"),
        ("seed: 0", "seed: 1", "tune.seed=1: is one of `seeds`"),
        ("[optimizer.lr=0.5]", "[seed=3]", "methods.Adam.overrides: seed=3: is set by `seeds`"),
        ("optimizer.clip:", "seed:", "methods.SGD.grid: seed: is set by `seeds`"),
        ("optimizer: adam", "optimizer: adam, style: wavy", "methods.Adam.style=wavy: must be one of solid"),
        ("label: loss", "label: loss, limits: [3, 1]", "figure.y.limits=[3.0, 1.0]"),
        ("SGD: {", "SGD: {{", "line 6"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_that_names_it(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = written(tmp_path, old, new)
    with pytest.raises(UserError) as caught:
        experiment.load(path)
    assert str(caught.value).startswith(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bare_number_means_the_figure_of_that_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "figure2.yaml").write_text(WHOLE)
    monkeypatch.setattr(discovery, "resource", lambda folder: tmp_path)
    assert experiment.load("2").name == experiment.load("figure2").name == "figure2"


def test_an_unknown_name_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(UserError, match="did you mean 'smoke'"):
        experiment.load("smook")
    with pytest.raises(UserError, match="is no file"):
        experiment.load("elsewhere/smoke.yaml")


@pytest.mark.parametrize("name", discovery.yaml_names(discovery.resource("experiments")))
def test_every_run_of_every_experiment_of_the_package_composes(name: str, tmp_path: Path) -> None:
    Plan(experiment.load(name), str(tmp_path)).validate()
