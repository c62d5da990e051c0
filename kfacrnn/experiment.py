"""What an experiment is: methods, grids, seeds, the rule of selection and the picture, as `experiments/*.yaml` say it.

A method without a grid is run with every seed. A method with a grid is tuned first: every point of its grid with the
tuning seed, at the tuning overrides; the winner by `select` is then run with every seed. This module knows neither the
result store nor processes: `kfacrnn.plan` brings the two together.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kfacrnn import discovery, settings
from kfacrnn.errors import UserError
from kfacrnn.settings import setting

STYLES = ("solid", "dashed", "dotted", "dashdot")
PANELS = ("updates", "seconds")
OWN_KEYS = {"seed": "`seeds` and `tune.seed`", "results": "--results DIR", "optimizer": "each method's `optimizer`"}


@dataclass
class Method:
    """One line of the figure."""

    optimizer: str = setting("file in configs/optimizer")
    overrides: list[str] = field(default_factory=list)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    label: str | None = None
    style: str = "solid"

    def check(self) -> Iterator[str]:
        yield from _own_keys("overrides", self.overrides)
        yield from _own_keys("grid", self.grid)
        yield from (f"grid.{key}: has no values" for key, values in self.grid.items() if not values)
        if self.style not in STYLES:
            yield f"style={self.style}: must be one of {', '.join(STYLES)}"

    @property
    def points(self) -> list[dict[str, Any]]:
        """Every combination of the grid's values, the last key varying fastest; one empty choice without a grid."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


@dataclass
class Tune:
    """How a grid is searched."""

    seed: int = setting("seed of every tuning run", at_least=0, at_most=2**31 - 1)
    overrides: list[str] = field(default_factory=list)

    def check(self) -> Iterator[str]:
        yield from _own_keys("overrides", self.overrides)


@dataclass
class Select:
    """The winner of a grid has the least mean of `metric` over the rows of the last `last` updates."""

    metric: str = "train/nats"
    last: int = 50

    def check(self) -> Iterator[str]:
        if self.metric not in ("train/nats", "valid/nats"):
            yield f"metric={self.metric}: must be train/nats or valid/nats"
        if self.last < 1:
            yield f"last={self.last}: must be at least 1 (updates)"

    def __str__(self) -> str:
        return f"least {self.metric}, mean over the last {self.last} updates"


@dataclass
class Axis:
    """The vertical axis."""

    label: str = setting("what is written beside it")
    metric: str = setting("column", choices=["train/metric", "train/nats", "valid/metric", "valid/nats"])
    scale: str = setting("linear or log", choices=["linear", "log"])
    limits: list[float] | None = None

    def check(self) -> Iterator[str]:
        if self.limits is not None and not (len(self.limits) == 2 and self.limits[0] < self.limits[1]):
            yield f"limits={self.limits}: must be two numbers, the lower one first"


@dataclass
class Picture:
    """Everything that the drawing needs and the figure's CSV does not hold."""

    title: str = setting("title of the figure")
    y: Axis = setting("vertical axis")
    chance: float | None = None
    panels: list[str] = field(default_factory=lambda: list(PANELS))
    mix_hardware: bool = False

    def check(self) -> Iterator[str]:
        if not self.panels or not set(self.panels) <= set(PANELS):
            yield f"panels={self.panels}: must be some of {', '.join(PANELS)}"


@dataclass(frozen=True)
class Point:
    """One run of an experiment before it is composed."""

    method: str
    role: str  # tune | confirm
    choice: dict[str, Any]  # of the grid's values
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
    tune: Tune | None = None
    select: Select = field(default_factory=Select)

    def check(self) -> Iterator[str]:
        for name, method in self.methods.items():
            yield from settings.problems(method, f"methods.{name}.")
            if method.grid and self.tune is None:
                yield f"methods.{name}.grid: needs `tune`, with the seed to search it with"
        if not self.methods:
            yield "methods: there is none"
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            yield f"seeds={self.seeds}: must be one or more different seeds, none below 0"
        if self.tune is not None and self.tune.seed in self.seeds:
            yield f"tune.seed={self.tune.seed}: is one of `seeds`; what confirms a choice must not have made it"
        yield from _own_keys("common", self.common)

    def tuning(self, name: str) -> list[Point]:
        """The runs that search the method's grid; none without a grid."""
        method = self.methods[name]
        if not method.grid or self.tune is None:
            return []
        return [self._point(name, "tune", choice, self.tune.seed, self.tune.overrides) for choice in method.points]

    def confirmation(self, name: str, choice: dict[str, Any]) -> list[Point]:
        """The runs that the figure draws, for one choice of the method's grid."""
        return [self._point(name, "confirm", choice, seed, []) for seed in self.seeds]

    def _point(self, name: str, role: str, choice: dict[str, Any], seed: int, extra: Sequence[str]) -> Point:
        method = self.methods[name]
        chosen = [override(key, value) for key, value in choice.items()]
        first = (f"optimizer={method.optimizer}", f"seed={seed}", f"tracker.group={self.name}")
        return Point(name, role, choice, seed, (*first, *self.common, *method.overrides, *extra, *chosen))


def load(name: str) -> Experiment:
    """The experiment of that name in `experiments/`, or at that path if it ends in `.yaml`; `2` means `figure2`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = _path(name)
    try:
        content = OmegaConf.load(path)
        merged = OmegaConf.merge(OmegaConf.structured(Experiment), content, {"name": path.stem})
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise UserError(f"{path}: {missing[0]} has no value")
        experiment = OmegaConf.to_object(merged)
    except YAMLError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_explain(error)}") from error
    assert isinstance(experiment, Experiment)
    for problem in settings.problems(experiment):
        raise UserError(f"{path}: {problem}")
    return experiment


def override(key: str, value: Any) -> str:
    """`key=value` in Hydra's grammar."""
    return f"{key}={_literal(value)}"


def refuse_own_keys(overrides: Sequence[str]) -> None:
    """Refuses overrides that would set what the experiment itself sets from run to run."""
    for problem in _own_keys("overrides", overrides):
        raise UserError(problem)


def _literal(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_literal, value))}]"
    if isinstance(value, str) and not re.fullmatch(r"[\w./~@-]+", value):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    return str(value)


def _own_keys(where: str, overrides: Sequence[str] | dict[str, Any]) -> Iterator[str]:
    for entry in overrides:
        key = entry.split("=", 1)[0].lstrip("+~")
        if key in OWN_KEYS:
            yield f"{where}: {entry}: is set by {OWN_KEYS[key]}"


def _path(name: str) -> Path:
    if name.endswith(".yaml"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"no such experiment: {path} is no file")
        return path
    folder = discovery.resource("experiments")
    name = f"figure{name}" if name.isdigit() else name
    if name not in discovery.yaml_names(folder):
        raise UserError(discovery.unknown("experiment", name, discovery.yaml_names(folder)))
    return folder / f"{name}.yaml"


def _explain(error: Any) -> str:
    """One line for an error of OmegaConf's: the key and what is wrong with it."""
    if error.key is None:
        return str(error).splitlines()[0]
    key = error.full_key or error.key
    schema = error.object_type
    valid = [field.name for field in dataclasses.fields(schema)] if dataclasses.is_dataclass(schema) else []
    if valid and error.key not in valid:
        near = difflib.get_close_matches(str(error.key), valid, n=1)
        return f"no such key: {key}" + (f"; did you mean '{near[0]}'?" if near else f" (there are: {', '.join(valid)})")
    return f"{key}: {str(error).splitlines()[0]}"
