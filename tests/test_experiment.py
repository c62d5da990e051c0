"""What experiments/*.yaml may say, how it expands into runs, and how mistakes in it are answered."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from kfacrnn import config, discovery, experiment
from kfacrnn.errors import UserError
from kfacrnn.overrides import override
from kfacrnn.plan import Plan
from tests.synthetic import write_experiment

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


ADAM = "optimizer: adam"
EXPERIMENTS = discovery.yaml_names(discovery.resource("experiments"))


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


def test_a_method_may_have_overrides_of_its_own_for_its_trials(tmp_path: Path) -> None:
    own = "grid: {optimizer.lr: [1e-3, 1], optimizer.clip: [null, 5.0]}, tune_overrides: [budget.updates=40]"
    two = experiment.load(written(tmp_path, "grid: {optimizer.lr: [1e-3, 1], optimizer.clip: [null, 5.0]}", own))
    assert config.compose(two.tuning("SGD")[0].overrides).budget.updates == 40  # and not tune's 10
    assert config.compose(two.confirmation("SGD", {})[0].overrides).budget.updates == 100


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
        ("2025_07_01", "'2025_07_01'"),
        ("1e3", "'1e3'"),
        ("NULL", "'NULL'"),
        ("~/results", "'~/results'"),
        ("/tmp/results-1", "/tmp/results-1"),
    ],
)
def test_values_are_written_so_that_hydra_reads_them_back(value: object, text: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    written = override("key", value)
    assert written == f"key={text}"
    assert OverridesParser.create().parse_override(written).value() == value


def test_hydra_reads_back_whatever_text_is_written() -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser, rng = OverridesParser.create(), random.Random(0)
    words = [*"aeE01_.-+/@~'\"\\ ,=${}[]():\n\tß", "null", "True", "nan", "inf", "a_1"]
    for _ in range(1000):
        text = "".join(rng.choices(words, k=rng.randrange(7)))
        assert parser.parse_override(override("key", text)).value() == text


def test_an_experiment_named_like_a_number_groups_its_runs_by_that_name(tmp_path: Path) -> None:
    path = write_experiment(tmp_path / "2025_07.yaml", "{SGD: {optimizer: sgd}}")
    (point,) = experiment.load(path).confirmation("SGD", {})
    assert config.compose(point.overrides).tracker.group == "2025_07"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds:", "seedz:", "no such key: seedz; did you mean 'seeds'?"),
        ("grid:", "gird:", "no such key: methods.SGD.gird; did you mean 'grid'?"),
        ("seeds: [1, 2]", "seeds: [1, one]", "seeds[1]: Value 'one'"),
        ("seeds: [1, 2]", "seeds: [1, 1]", "seeds=[1, 1]: must be one or more different seeds"),
        ("[1e-3, 1]", "[]", "methods.SGD.grid.optimizer.lr: has no values"),
        ("[1e-3, 1]", "[1, 1.0]", "methods.SGD.grid.optimizer.lr=[1, 1.0]: has a value twice"),
        ("methods:", "select: {sequences: 0}\nmethods:", "select.sequences=0: must be at least 1"),
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
        ("grid: {", "cross: {", "methods.SGD.cross.optimizer.lr: must have an odd number of values"),
        (
            "optimizer: sgd,",
            "optimizer: sgd, search: {optimizer.lr: {choice: [1]}},",
            "search: there is a `grid` as well",
        ),
        (
            ADAM,
            f"{ADAM}, search: {{optimizer.lr: {{choice: [1]}}}}",
            "methods.Adam.search: needs `tune` with a seed and",
        ),
        ("seed: 0,", "seed: 0, trials: 0,", "tune.trials=0: must be at least 1"),
        ("seed: 0,", "seed: 0, extend: -1,", "tune.extend=-1: must be at least 0"),
        ("seed: 0,", f"seed: 0, extend: {10**18 - 1},", "must be at most 10000 (points added to every"),
        ("seed: 0,", f"seed: 0, trials: {10**18 - 1},", "must be at most 10000 (points of every"),
        ("seeds: [1, 2]", "seeds: [a: 1]", "seeds: {'a': 1}: must be a single value"),
        ("[optimizer.lr=0.5]", "[optimizer.lr: 0.5]", "methods.Adam.overrides: {'optimizer.lr': 0.5}: must be a"),
        ("methods:", "models: {a: {overrides: [[b]]}}\nmethods:", "models.a.overrides: ['b']: must be a single value"),
        ("methods:", "target: {baselines: [Adam: 1]}\nmethods:", "target.baselines: {'Adam': 1}: must be a single"),
        ("methods:", "models: {a: {style: wavy}}\nmethods:", "models.a.style=wavy: must be one of solid"),
        ("methods:", "models: {a: {seeds: [0]}}\nmethods:", "tune.seed=0: is one of `seeds`"),
        ("methods:", "models: {a: {seeds: []}}\nmethods:", "models.a.seeds=[]: must be one or more"),
        ("methods:", "models: {a: {settings: b}}\nmethods:", "models.a.settings=b: must be a model that has no"),
        ("methods:", "models: {a: {settings: a}}\nmethods:", "models.a.settings=a: must be a model that has no"),
        ("overrides: [optimizer.lr=0.5]", "settings: Sgd", "methods.Adam.settings=Sgd: must be a method with a grid"),
        ("overrides: [optimizer.lr=0.5]", "settings: Adam", "methods.Adam.settings=Adam: must be a method with a"),
        ("methods:", "models: {'1 2': {}, '2': {}}\nmethods:\n  SGD 1: {optimizer: sgd}", "would have the same name"),
        (
            "methods:",
            "models: {a: {}}\nmethods:\n  Old: {optimizer: sgd, style: dotted}",
            "methods.Old.style=dotted: is",
        ),
        (ADAM, f"{ADAM}, marker: moon", "methods.Adam.marker=moon: must be one of circle"),
        (
            "scale: linear}",
            "scale: linear}\n  ends: {hours: 2}",
            "figure.ends.hours=2.0: must be a number above 0 for one",
        ),
    ],
)
def test_a_mistake_in_the_file_is_one_line_that_names_it(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = written(tmp_path, old, new)
    with pytest.raises(UserError) as caught:
        experiment.load(path)
    assert str(caught.value).startswith(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"description: \xe4", b"[" * 5000, b"\x00"])
def test_a_file_that_is_no_text_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "odd.yaml").write_bytes(content)
    with pytest.raises(UserError, match=f"^{tmp_path / 'odd.yaml'}: "):
        experiment.load(str(tmp_path / "odd.yaml"))


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        (
            "{log_uniform: [0, 1]}",
            "optimizer.lr: log_uniform: [0, 1]: must be two numbers above 0, the lower one first",
        ),
        ("{uniform: [2, 1]}", "optimizer.lr: uniform: [2, 1]: must be two numbers, the lower one first"),
        ("{uniform: [1, .inf]}", "optimizer.lr: uniform: [1, inf]: must be two numbers"),
        ("{uniform: [1]}", "must be two numbers"),
        ("{log_uniform: [a, b]}", "must be two numbers above 0"),
        ("{lognormal: [1, 2]}", "optimizer.lr: lognormal: must be one of log_uniform, uniform, choice"),
        ("{uniform: [1, 2], choice: [1]}", "optimizer.lr: uniform, choice: must be one of"),
        ("{choice: []}", "optimizer.lr: choice: has no values"),
        ("{choice: [1, 2]}", "has 2 points, fewer than tune.trials=3"),
        ("0.1", "methods.Adam.search.optimizer.lr"),
    ],
)
def test_a_space_that_nothing_can_be_drawn_from_is_one_line(tmp_path: Path, axis: str, message: str) -> None:
    path = written(tmp_path, ADAM, f"{ADAM}, search: {{optimizer.lr: {axis}}}")
    Path(path).write_text(Path(path).read_text().replace("seed: 0", "seed: 0, trials: 3"))
    with pytest.raises(UserError) as caught:
        experiment.load(path)
    assert str(caught.value).startswith(f"{path}: methods.Adam.search")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_search_has_as_many_trials_as_tune_says(tmp_path: Path) -> None:
    path = written(tmp_path, ADAM, f"{ADAM}, search: {{optimizer.lr: {{log_uniform: [0.1, 30]}}}}")
    Path(path).write_text(Path(path).read_text().replace("seed: 0", "seed: 0, trials: 20"))
    points = experiment.load(path).tuning("Adam")
    assert len({str(point) for point in points}) == 20
    assert all(0.1 <= config.compose(point.overrides).optimizer.lr <= 30 for point in points[:3])


MODELS = """\
models:
  small: {}
  large: {overrides: [task.hidden=99, budget.updates=50], style: dashed, seeds: [3], settings: small, label: Large}
methods:"""


def test_with_models_every_method_is_a_line_on_each_and_tuned_where_the_model_has_no_settings(tmp_path: Path) -> None:
    two = experiment.load(written(tmp_path, "methods:", MODELS))
    assert list(two.lines) == ["SGD small", "SGD large", "Adam small", "Adam large"]
    assert [line.label for line in two.lines.values()] == ["SGD, small", "SGD, Large", "Adam, small", "Adam, Large"]
    assert [len(two.tuning(line)) for line in two.lines] == [4, 0, 0, 0]
    assert two.lines["SGD large"].tuned_as == "SGD small"
    (large,) = two.confirmation("SGD large", {"optimizer.lr": 1})
    run = config.compose(large.overrides)
    assert (run.task.hidden, run.budget.updates, run.seed, run.optimizer.lr) == (99, 50, 3, 1.0)
    tuning = config.compose(two.tuning("SGD small")[0].overrides)
    assert (tuning.task.hidden, tuning.budget.updates) == (64, 10)


def test_an_experiment_may_have_its_runs_from_another_and_then_brings_none(tmp_path: Path) -> None:
    two = experiment.load(written(tmp_path))
    figure = "figure:\n  title: Again\n  y: {metric: valid/nats, label: loss, scale: linear}\n"
    again = tmp_path / "again.yaml"
    again.write_text(f"description: the same runs\nruns: two\n{figure}")
    loaded = experiment.load(str(again))
    assert (loaded.name, loaded.description, loaded.figure.title) == ("again", "the same runs", "Again")
    assert [loaded.tuning(line) for line in loaded.lines] == [two.tuning(line) for line in two.lines]
    assert loaded.confirmation("Adam", {}) == two.confirmation("Adam", {})

    again.write_text(f"description: x\nruns: two\nseeds: [7]\n{figure}")
    with pytest.raises(UserError, match=r"again\.yaml: seeds: comes with the runs of two; leave it out"):
        experiment.load(str(again))
    again.write_text(f"description: x\nruns: three\n{figure}")
    with pytest.raises(UserError, match=r"runs=three: there is no .*three\.yaml"):
        experiment.load(str(again))
    again.write_text(f"description: x\nruns: again\n{figure}")
    with pytest.raises(UserError, match="runs=again: has its runs from again; name that one"):
        experiment.load(str(again))


def test_a_bare_number_means_the_figure_of_that_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "figure2.yaml").write_text(WHOLE)
    monkeypatch.setattr(discovery, "resource", lambda folder: tmp_path)
    assert experiment.load("2").name == experiment.load("figure2").name == "figure2"


def test_an_unknown_name_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(UserError, match="did you mean 'smoke'"):
        experiment.load("smook")
    with pytest.raises(UserError, match="is no file"):
        experiment.load("elsewhere/smoke.yaml")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_line_of_every_experiment_of_the_package_composes(name: str) -> None:
    described = experiment.load(name)
    confirmations = [described.confirmation(line, described.choices(line)[0])[0] for line in described.lines]
    trials = described.tuning(next(iter(described.lines)))
    for point in (*confirmations, *trials[:1]):
        config.compose(point.overrides)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_point_of_every_experiment_of_the_package_composes(name: str, tmp_path: Path) -> None:
    Plan(experiment.load(name), str(tmp_path)).validate()
