"""From Hydra overrides to a typed, range-checked run.

Hydra composes the YAML groups; the dataclasses of the chosen task and optimiser modules then check types, ranges and
names. Every mistake ends in one line that names the key, the value and the nearest right thing.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfacrnn import discovery, settings
from kfacrnn.errors import UserError, first_line
from kfacrnn.run import Run

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

MODULES = {"optimizer": "optimizers", "task": "tasks"}
PATHS = ("results", "data.root")
GROUPS = ("budget", "tracker", "data", *MODULES)


def compose(overrides: Sequence[str]) -> Run:
    """The run that Hydra overrides such as `["task=ptb_char", "optimizer.lr=0.1"]` describe. Raises `UserError`."""
    return typed(_composed(overrides))


def stored(config: dict[str, Any]) -> Run:
    """The run of a stored config.yaml, in which settings that came later are None. Raises `UserError`."""
    from omegaconf import OmegaConf

    groups = {key: config[key] for key in MODULES if isinstance(config.get(key), dict)}
    filled = {key: _later(MODULES[key], str(group.get("name"))) | group for key, group in groups.items()}
    return typed(OmegaConf.create(config | filled))


def _later(package: str, name: str) -> dict[str, None]:
    """The settings of a module that came later than its first runs."""
    if name not in discovery.modules(package):
        return {}
    fields = dataclasses.fields(discovery.load(package, name).Config)
    return {field.name: None for field in fields if field.metadata.get("later")}


class Composer:
    """`compose` for many runs of few choices of groups: Hydra reads the files once for each, which is most of its time.

    Values of settings that are there are set as Hydra sets them; what is anything else is for `compose`, and so is
    everything that has to be complained of.
    """

    def __init__(self) -> None:
        self._chosen: dict[tuple[str, ...], DictConfig] = {}

    def compose(self, overrides: Sequence[str]) -> Run:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        parsed = parse(overrides)
        if not all(_sets_one_value(override) for override in parsed):
            return compose(overrides)
        is_choice = [_folder(override).is_dir() for override in parsed]
        groups = tuple(itertools.compress(overrides, is_choice))
        try:
            if groups not in self._chosen:
                self._chosen[groups] = _with_types(_composed(groups))
            config = copy.deepcopy(self._chosen[groups])
            for override, is_of_group in zip(parsed, is_choice, strict=True):
                if not is_of_group:
                    OmegaConf.update(config, override.key_or_group, override.value())
            run = OmegaConf.to_object(config)
        except (OmegaConfBaseException, OverflowError):
            return compose(overrides)
        return _in_range(run)


def _composed(overrides: Sequence[str]) -> DictConfig:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(discovery.resource("configs")), version_base="1.3"):
        try:
            _check_choices(overrides)
            return hydra_compose("config", overrides=list(overrides))
        except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: such as `hydra=3`
            raise UserError(_explain(error, overrides)) from error


def parse(overrides: Sequence[str]) -> list[Override]:
    """The overrides as Hydra reads them. Raises `UserError` for what is none, and for a path without the quotes that it
    needs: 2025_07_01 would be the folder 20250701."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        example = """write key=value, such as optimizer.lr=0.1 or results="'größe'\""""
        raise UserError(f"'{error.override}' is no override: {example} ({first_line(error)})") from error
    except ValueError as error:  # thousands of digits
        raise UserError(first_line(error)) from error
    for override in parsed:
        if override.key_or_group in PATHS and isinstance(override.value(), (int, float)):
            text = (override.input_line or "").partition("=")[2]
            kind = "true or false" if isinstance(override.value(), bool) else "a number"
            right = f"""{override.key_or_group}="'{text}'\""""
            raise UserError(f"{override.input_line}: Hydra reads {kind}; put quotes around it: {right}")
    return parsed


def _check_choices(overrides: Sequence[str]) -> None:
    """Refuses what Hydra says too little of: several values at once, and groups set to what has no YAML file."""
    for override in parse(overrides):
        group, choice = override.key_or_group, override.value()
        if override.is_sweep_override():
            raise UserError(f"{override.input_line}: several values at once need the flag -m")
        folder = _folder(override)
        if not folder.is_dir() or isinstance(choice, dict):  # a dictionary sets keys
            continue
        nested = [f"{path.parent.name}/{path.stem}" for path in sorted(folder.glob("*/[!_]*.yaml"))]
        options = discovery.yaml_names(folder) or nested
        if override.is_delete() and group in GROUPS:
            raise UserError(f"{override.input_line}: a run needs one (there are: {', '.join(options)})")
        if not override.is_delete() and choice not in options:
            raise UserError(discovery.unknown(group, str(choice), options))


def _folder(override: Override) -> Path:
    """Where the files of a group are; there is none for a setting."""
    return discovery.place(discovery.resource("configs") / override.key_or_group)


def _sets_one_value(override: Override) -> bool:
    """Whether it is `key=value` and no more: no +, ~, @, sweep or dictionary."""
    is_plain = override.type is not None and override.type.name == "CHANGE" and override.package is None
    is_module = override.key_or_group in [f"{group}.name" for group in MODULES]  # which would have other settings
    return is_plain and not (is_module or override.is_sweep_override() or isinstance(override.value(), dict))


def typed(config: DictConfig) -> Run:
    """Checks a composed configuration against the dataclasses: types first, then names, then ranges."""
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

    try:
        with_types = _with_types(config)
        if missing := sorted(OmegaConf.missing_keys(with_types)):
            raise UserError(f"{missing[0]} has no value{_file(missing[0], config)}")
        run = OmegaConf.to_object(with_types)
    except OmegaConfBaseException as error:
        name = str(error.full_key or error.key)
        if isinstance(error, ConfigKeyError):
            owner = error.object_type if dataclasses.is_dataclass(error.object_type) else Run
            problem = discovery.unknown("key", str(error.key), [field.name for field in dataclasses.fields(owner)])
            raise UserError(f"{name}: {problem}{_file(name, config)}") from error
        value = _shown(dict(_leaves(_written(config))).get(name))
        raise UserError(f"{name}={value}: {first_line(error)}{_file(name, config)}") from error
    except OverflowError as error:  # OmegaConf does not say which
        large = (k for k, v in _leaves(_written(config)) if isinstance(v, int) and abs(v) > sys.float_info.max)
        name = next(large, "configuration")
        raise UserError(f"{name}: a number is too large for a float{_file(name, config)}") from error
    return _in_range(run)


def _with_types(config: DictConfig) -> DictConfig:
    """The composed configuration as a `Run` of the chosen modules, whose values have to be of its fields' types. Raises
    OmegaConf's errors, and `UserError` for a group or a key of no group that there is not."""
    from omegaconf import OmegaConf

    plain = _written(config)
    plain.pop("hydra", None)
    fields = [field.name for field in dataclasses.fields(Run)]
    for key in plain:
        if key not in fields:
            raise UserError(discovery.unknown("key", str(key), fields))
    schema: Any = OmegaConf.structured(Run)
    for key in GROUPS:
        if not isinstance(plain.get(key), dict):
            raise UserError(f"{key}={_shown(plain.get(key))}: must be a group of settings, as in configs")
    own = OmegaConf.masked_copy(config, fields)
    OmegaConf.merge(schema, own)  # what is wrong with the rest is said before modules import torch, for seconds
    for key, package in MODULES.items():
        name = str(plain[key].get("name"))
        if name not in discovery.modules(package):
            problem = discovery.unknown(f"module in kfacrnn/{package}", name, discovery.modules(package))
            raise UserError(f"{key}.name={name}: {problem}")
        schema[key] = discovery.load(package, name).Config
    merged: Any = OmegaConf.merge(schema, own)
    return merged


def _in_range(run: Any) -> Run:
    assert isinstance(run, Run)
    for problem in settings.problems(run):
        raise UserError(problem)
    return run


def _written(config: DictConfig) -> dict[str, Any]:
    """The configuration as it was written, interpolations unresolved."""
    from omegaconf import OmegaConf

    plain: Any = OmegaConf.to_container(config, resolve=False)
    return plain


def _file(name: str, config: DictConfig) -> str:
    """Where the group of a setting has its values, in brackets; nothing where no file says."""
    group, _, is_in_group = name.partition(".")
    if not is_in_group or group not in GROUPS:
        return ""
    file = f"configs/{group}/{_written(config)[group].get('name')}.yaml"
    return f" ({file})" if discovery.place(discovery.resource("configs").parent / file).is_file() else ""


def _leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a configuration by its dotted name, groups included, with its value as it was written."""
    for key, value in node.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")


def _shown(value: Any) -> str:
    """A value as one writes it on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    """One line for an error of Hydra's: the override that caused it and the nearest right one."""
    from hydra.errors import MissingConfigException

    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        options = [option for option in error.options or [] if not option.startswith("_")]
        return discovery.unknown(group or "configuration", name, options)
    for override in overrides:
        key = override.split("=", 1)[0].lstrip("+~")
        if f"'{key}'" in str(error):
            keys = _keys(overrides)
            if key in keys:
                return f"{override}: {key} is there already; without the + it is changed"
            return f"{override}: {discovery.unknown('key', key, keys)}"
    return first_line(error) if error.__cause__ is None else f"{first_line(error)}: {first_line(error.__cause__)}"


def _keys(overrides: Sequence[str]) -> list[str]:
    """Every key of the configuration, as far as the group choices among `overrides` can be composed."""
    from hydra import compose as hydra_compose

    groups = [o for o in overrides if o.split("=", 1)[0] in ("task", "optimizer", "budget", "tracker")]
    return [name for name, _ in _leaves(_written(hydra_compose("config", overrides=groups)))]
