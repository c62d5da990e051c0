"""What an experiment is: methods, models, searches, seeds, the rule of selection and the picture, as
`experiments/*.yaml` say it.

A method is one *line* of the figure, or one on each model. A line whose method has a grid or a search is tuned first:
every point with the tuning seed, at the tuning overrides; the winner by `select` is then run with every seed. Without
either, it is run as it is. This module knows neither the result store nor processes: `kfacrnn.plan` brings the two
together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kfacrnn import discovery, search, settings
from kfacrnn.overrides import override, own_keys
from kfacrnn.picture import MARKERS, STYLES, Picture
from kfacrnn.search import Choice
from kfacrnn.settings import setting

MOST_TRIALS = 10_000  # of a line: all of them are kept in memory, and looked at again and again


@dataclass
class Method:
    """An optimiser with its settings, and where the best of them are to be looked for; `tune_overrides` are for its
    trials alone, after those of `tune`. With `settings`, the name of another method, it has those that won there."""

    optimizer: str = setting("file in configs/optimizer")
    overrides: list[str] = field(default_factory=list)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    cross: dict[str, list[Any]] = field(default_factory=dict)
    search: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    tune_overrides: list[str] = field(default_factory=list)
    settings: str | None = None
    label: str | None = None
    style: str = setting("of the line", default="solid", choices=STYLES)
    marker: str | None = setting("on the line", default=None, choices=list(MARKERS))

    def check(self) -> Iterator[str]:
        yield from own_keys("overrides", self.overrides)
        yield from own_keys("tune_overrides", self.tune_overrides)
        for kind in ("grid", "cross", "search"):
            yield from own_keys(kind, getattr(self, kind))
        axes = "grid" if self.grid else "cross"
        for key, values in self.axes.items():
            if not values:
                yield f"{axes}.{key}: has no values"
            if len(set(values)) < len(values):
                yield f"{axes}.{key}={values}: has a value twice"
        for key, values in self.cross.items():
            if len(values) % 2 == 0:
                yield f"cross.{key}: must have an odd number of values, for there to be a middle one"
        kinds = [kind for kind in ("settings", "grid", "cross", "search") if getattr(self, kind)]
        if len(kinds) > 1:
            yield f"{kinds[1]}: there is a `{kinds[0]}` as well; a method has one of them"

    @property
    def axes(self) -> dict[str, list[Any]]:
        """What of the method's search can be extended, or have edges."""
        return self.grid or self.cross

    @property
    def is_searched(self) -> bool:
        return bool(self.axes or self.search)


@dataclass
class Model:
    """What every method is run on, such as a size of the network. With `settings`, the name of a model before it, the
    methods are not tuned on this one: they have the settings that won on that one."""

    overrides: list[str] = field(default_factory=list)
    label: str | None = None
    style: str = setting("of the lines", default="solid", choices=STYLES)
    seeds: list[int] | None = None
    settings: str | None = None

    def check(self) -> Iterator[str]:
        yield from own_keys("overrides", self.overrides)
        if self.seeds is not None:
            yield from _seeds(self.seeds)


@dataclass
class Tune:
    """How settings are searched: `trials` points of a search, all points of a grid or cross and then `extend` more.
    Each is judged by the mean over its last `last` updates, if it is given, or over `select.last`."""

    seed: int = setting("seed of every tuning run and of what a search draws", at_least=0, at_most=2**31 - 1)
    overrides: list[str] = field(default_factory=list)
    trials: int | None = setting("points of every search", default=None, at_least=1, at_most=MOST_TRIALS)
    extend: int = setting("points added to every grid", default=0, at_least=0, at_most=MOST_TRIALS)
    last: int | None = setting("updates that trials are judged by", default=None, at_least=1)

    def check(self) -> Iterator[str]:
        yield from own_keys("overrides", self.overrides)


@dataclass
class Select:
    """The winner has the least mean of `metric` over the rows of the last `last` updates, or of the last `sequences`
    where batches are not all of one size; with `early_stopping`, the least value that `metric` ever had. The same is a
    run's final value in the table."""

    metric: str = setting("what is compared", default="train/nats", choices=["train/nats", "valid/nats"])
    last: int = setting("updates that the mean goes over", default=50, at_least=1)
    sequences: int | None = setting("sequences that the mean goes over", default=None, at_least=1)
    early_stopping: bool = False

    def updates(self, batch_size: int) -> int:
        """Over which the mean goes."""
        return self.last if self.sequences is None else max(1, round(self.sequences / batch_size))

    @property
    def value(self) -> str:
        return "the least so far" if self.early_stopping else f"the mean over its last {self._window}"

    def __str__(self) -> str:
        how = "at any update" if self.early_stopping else f"mean over the last {self._window}"
        return f"least {self.metric}, {how}"

    @property
    def _window(self) -> str:
        return f"{self.last} updates" if self.sequences is None else f"{self.sequences:,} sequences"


@dataclass
class Target:
    """What the table measures the lines by: the least final value of these methods, where a line's is the median over
    its runs; or `solved` (nats) if that is more, the loss with which the experiment is content."""

    baselines: list[str] = setting("methods")
    solved: float | None = None

    def check(self) -> Iterator[str]:
        if not self.baselines:
            yield "baselines: there is none"


@dataclass(frozen=True)
class Line:
    """A method on a model: what a figure draws as one line. Without models, its name is the method's."""

    name: str
    method: str
    model: str | None
    label: str
    style: str
    overrides: tuple[str, ...]
    seeds: tuple[int, ...]
    tuned_as: str  # the line whose trials choose the settings of this one; mostly itself


@dataclass(frozen=True)
class Point:
    """One run of an experiment before it is composed."""

    line: str
    role: str  # tune | confirm
    choice: Choice
    seed: int
    overrides: tuple[str, ...]  # Hydra's, complete but for `results`

    def __str__(self) -> str:
        return " ".join([*(override(key, value) for key, value in self.choice.items()), f"seed={self.seed}"])


@dataclass
class Experiment:
    """One file of `experiments/`."""

    name: str = setting("the file's name")
    description: str = setting("what it shows")
    common: list[str] = setting("Hydra overrides of every run")
    seeds: list[int] = setting("seeds of the runs that the figure draws")
    methods: dict[str, Method] = setting("lines of the figure")
    figure: Picture = setting("the picture")
    runs: str | None = None
    models: dict[str, Model] = field(default_factory=dict)
    tune: Tune | None = None
    select: Select = field(default_factory=Select)
    target: Target | None = None
    called: str = ""  # on the command line: its name or, if it is not in experiments/, its path
    claim: str = ""  # the paper's, to be held against what there is here

    def check(self) -> Iterator[str]:
        for name, method in self.methods.items():
            yield from settings.problems(method, f"methods.{name}.")
            yield from (f"methods.{name}.{problem}" for problem in self._search_problems(method))
        for name, model in self.models.items():
            yield from settings.problems(model, f"models.{name}.")
            if model.settings is not None and model.settings not in self._tuned_models():
                yield f"models.{name}.settings={model.settings}: must be a model that has no `settings` itself"
        if not self.methods:
            yield "methods: there is none"
        elif len(self.lines) < len(self.methods) * max(1, len(self.models)):
            yield "methods: two lines would have the same name, a method's and a model's"
        for name in self.target.baselines if self.target else ():
            if name not in self.methods:
                yield f"target.baselines: {discovery.unknown('method', name, self.methods)}"
        yield from _seeds(self.seeds)
        if self.tune is not None and any(self.tune.seed in line.seeds for line in self.lines.values()):
            yield f"tune.seed={self.tune.seed}: is one of `seeds`; what confirms a choice must not have made it"
        yield from own_keys("common", self.common)

    def _search_problems(self, method: Method) -> Iterator[str]:
        searched = [name for name, other in self.methods.items() if other.is_searched]
        if method.settings is not None and method.settings not in searched:
            yield f"settings={method.settings}: must be a method with a grid, a cross or a search"
        if self.models and method.style != "solid":
            yield f"style={method.style}: is the model's where there are `models`; a method may have a `marker`"
        if method.axes and self.tune is None:
            yield f"{'grid' if method.grid else 'cross'}: needs `tune`, with the seed to search it with"
        if method.search:
            if self.tune is None or self.tune.trials is None:
                yield "search: needs `tune` with a seed and the number of trials"
            else:
                yield from (f"search.{problem}" for problem in search.problems(method.search, self.tune.trials))

    def _tuned_models(self) -> list[str]:
        return [name for name, model in self.models.items() if model.settings is None]

    @property
    def lines(self) -> dict[str, Line]:
        """By name, in the order of the methods and within each of the models."""
        lines = []
        for name, method in self.methods.items():
            label, seeds, searched = method.label or name, tuple(self.seeds), method.settings or name
            if not self.models:
                overrides = (*self.common, *method.overrides)
                lines.append(Line(name, name, None, label, method.style, overrides, seeds, tuned_as=searched))
            for title, model in self.models.items():
                lines.append(
                    Line(
                        name=f"{name} {title}",
                        method=name,
                        model=title,
                        label=f"{label}, {model.label or title}",
                        style=model.style,
                        overrides=(*self.common, *model.overrides, *method.overrides),
                        seeds=tuple(model.seeds or seeds),
                        tuned_as=f"{searched} {model.settings or title}",
                    )
                )
        return {line.name: line for line in lines}

    def method(self, line: str) -> Method:
        return self.methods[self.lines[line].method]

    def searched(self, line: str) -> Method:
        """The method whose search chooses the settings of the line."""
        return self.method(self.lines[line].tuned_as)

    def choices(self, line: str) -> list[Choice]:
        """The points of the grid, cross or search that chooses the line's settings, as far as they are known before the
        first run; one empty choice where there is nothing to choose."""
        method = self.searched(line)
        if method.search and self.tune is not None:
            return search.draw(method.search, self.tune.trials or 0, self.tune.seed)
        return search.cross(method.cross) if method.cross else search.points(method.grid)

    @property
    def judgement(self) -> Select:
        """What trials are chosen by."""
        last = self.tune.last if self.tune is not None else None
        return self.select if last is None else replace(self.select, last=last, sequences=None)

    def extra_trials(self, line: str) -> int:
        """How many points are to be added to the line's grid or cross once it has a winner."""
        return self.tune.extend if self.tune is not None and self.searched(line).axes else 0

    def tuning(self, line: str) -> list[Point]:
        """The runs that search the line's settings; none where there is nothing to search, or where another line's
        search chooses them."""
        if not self.method(line).is_searched or self.lines[line].tuned_as != line:
            return []
        return [self.trial(line, choice) for choice in self.choices(line)]

    def trial(self, line: str, choice: Choice) -> Point:
        """The tuning run of one choice."""
        assert self.tune is not None
        overrides = (*self.tune.overrides, *self.method(line).tune_overrides)
        return self._point(line, "tune", choice, self.tune.seed, overrides)

    def confirmation(self, line: str, choice: Choice) -> list[Point]:
        """The runs that the figure draws, for one choice."""
        return [self._point(line, "confirm", choice, seed, ()) for seed in self.lines[line].seeds]

    def _point(self, line: str, role: str, choice: Choice, seed: int, extra: Sequence[str]) -> Point:
        chosen = [override(key, value) for key, value in choice.items()]
        tracked = (override("tracker.group", self.runs or self.name), f"tracker.job_type={role}")
        first = (f"optimizer={self.method(line).optimizer}", f"seed={seed}", *tracked)
        return Point(line, role, choice, seed, (*first, *self.lines[line].overrides, *extra, *chosen))


def load(name: str) -> Experiment:
    """The experiment of that name in `experiments/`, or at that path if it ends in `.yaml`; `2` means `figure2`."""
    from kfacrnn import experiment_file  # which is made of what is above

    return experiment_file.read(experiment_file.find(name))


def _seeds(seeds: Sequence[int]) -> Iterator[str]:
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        yield f"seeds={seeds}: must be one or more different seeds, none below 0"
