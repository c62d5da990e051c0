"""From Hydra overrides to a typed, range-checked run, and from a run to its identity.

Hydra composes the YAML groups; the dataclasses of the chosen task and optimiser modules then check types, ranges and
names. Every mistake ends in one line that names the key, the value and the nearest right thing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kfacrnn import discovery, settings
from kfacrnn.errors import UserError
from kfacrnn.settings import setting

if TYPE_CHECKING:
    from omegaconf import DictConfig

NUMERICS_VERSION = 1
"""Raised whenever a change of code changes training curves, so that old results are not taken for new ones."""


@dataclass
class Budget:
    """How long to train and how often to look."""

    name: str = setting("which budget this is")
    updates: int = setting("parameter updates", at_least=1)
    log_every: int = setting("updates between rows of metrics.csv", at_least=1)
    eval_every: int = setting("updates between validations; 0: never", at_least=0)
    checkpoint_every: int = setting("updates between checkpoints", at_least=1)


@dataclass
class Data:
    """Where corpora come from."""

    root: str | None = setting("folder with ptb.train.txt, ptb.valid.txt and ptb.test.txt")
    source: str = setting("who reads the files", choices=["files", "torchtext"])


@dataclass
class Tracker:
    """Where a mirror of the results goes."""

    name: str = setting("who mirrors the results", choices=["none", "wandb"])
    mode: str = setting("mode of the mirror", choices=["offline", "online"])
    project: str = setting("W&B project")
    entity: str | None = setting("W&B entity: a user or a team")
    group: str | None = setting("W&B group, such as an experiment's name")
    tags: list[str] = setting("W&B tags")


@dataclass
class Basics:
    """The settings that belong to no group."""

    seed: int = setting("seeds weights, data and sampling", at_least=0, at_most=2**31 - 1)
    precision: str = setting("arithmetic of forward and backward passes", choices=["fp32", "bf16"])
    threads: int = setting("threads of one run", at_least=1, at_most=1024)
    device: str = setting("cpu, cuda or cuda:1")
    results: str = setting("folder of the result store")


@dataclass(kw_only=True)
class Run(Basics):
    """One training run, completely. `task` and `optimizer` are the `Config` dataclasses of their modules."""

    budget: Budget
    tracker: Tracker
    data: Data
    optimizer: Any
    task: Any

    @property
    def scientific(self) -> dict[str, Any]:
        """What decides the training curve, and nothing else: no paths, trackers or devices."""
        kept = ("task", "optimizer", "budget", "seed", "precision", "threads")
        config = dataclasses.asdict(self)
        return {key: config[key] for key in kept} | {"numerics_version": NUMERICS_VERSION}

    @property
    def run_id(self) -> str:
        """Twelve hexadecimal digits: runs with equal scientific configuration have equal identity."""
        return hashlib.sha256(json.dumps(self.scientific, sort_keys=True).encode()).hexdigest()[:12]


SCHEMAS = {"budget": Budget, "tracker": Tracker, "data": Data}
MODULES = {"optimizer": "optimizers", "task": "tasks"}


def compose(overrides: Sequence[str]) -> Run:
    """The run that Hydra overrides such as `["task=ptb_char", "optimizer.lr=0.1"]` describe. Raises `UserError`."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(discovery.resource("configs")), version_base="1.3"):
        try:
            config = hydra_compose("config", overrides=list(overrides))
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(_explain(error, overrides)) from error
    return typed(config)


def typed(config: DictConfig) -> Run:
    """Checks a composed configuration against the dataclasses: types first, then names, then ranges."""
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    plain.pop("hydra", None)
    fields = [field.name for field in dataclasses.fields(Run)]
    for key in plain:
        if key not in fields:
            raise UserError(discovery.unknown("key", str(key), fields))
    values = vars(_checked(Basics, config, ""))
    for key, schema in SCHEMAS.items():
        values[key] = _checked(schema, config, key)
    for key, package in MODULES.items():
        values[key] = _checked(discovery.load(package, plain[key]["name"]).Config, config, key)
    return Run(**values)


def _checked(schema: Any, config: DictConfig, key: str) -> Any:
    """`config[key]`, or the basics for an empty key, as an instance of the dataclass `schema`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

    prefix = f"{key}." if key else ""
    fields = [field.name for field in dataclasses.fields(schema)]
    node = config[key] if key else OmegaConf.masked_copy(config, fields)
    where = f" (configs/{key}/{node['name']}.yaml)" if "name" in node else ""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), node)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise UserError(f"{prefix}{missing[0]} has no value{where}")
        checked = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        name = f"{prefix}{error.full_key or error.key}"
        if isinstance(error, ConfigKeyError):
            owner = error.object_type if dataclasses.is_dataclass(error.object_type) else schema
            there_are = [field.name for field in dataclasses.fields(owner)]
            raise UserError(f"{name}: {discovery.unknown('key', str(error.key), there_are)}{where}") from error
        raise UserError(f"{name}={_raw(config, name)}: {_first_line(error)}{where}") from error
    for problem in settings.problems(checked, prefix):
        raise UserError(problem)
    return checked


def _raw(config: DictConfig, name: str) -> Any:
    """The value at a dotted name as it was written, interpolations unresolved."""
    from omegaconf import OmegaConf

    node: Any = OmegaConf.to_container(config, resolve=False)
    for key in name.split("."):
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    """One line for an error of Hydra's: the override that caused it and the nearest right one."""
    from hydra.errors import MissingConfigException, OverrideParseException

    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        options = [option for option in error.options or [] if not option.startswith("_")]
        return discovery.unknown(group or "configuration", name, options)
    if isinstance(error, OverrideParseException):
        return f"'{error.override}' is no override: write key=value, such as optimizer.lr=0.1 ({_first_line(error)})"
    for override in overrides:
        key = override.split("=", 1)[0].lstrip("+~")
        if f"'{key}'" in str(error):
            return f"{override}: {discovery.unknown('key', key, _keys(overrides))}"
    return _first_line(error)


def _keys(overrides: Sequence[str]) -> list[str]:
    """Every key of the configuration, as far as the group choices among `overrides` can be composed."""
    from hydra import compose as hydra_compose
    from omegaconf import OmegaConf

    groups = [o for o in overrides if o.split("=", 1)[0] in ("task", "optimizer", "budget", "tracker")]
    plain = OmegaConf.to_container(hydra_compose("config", overrides=groups))
    keys: list[str] = []

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items():
            keys.append(f"{prefix}{key}")
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")

    walk(plain, "")
    return keys


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
