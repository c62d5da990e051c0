"""From a file of `experiments/` to an `Experiment`: its types, its ranges, and the runs it may have from another file.

Every mistake ends in one line that names the file, the key and the nearest right one.
"""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any

from kfacrnn import discovery, settings
from kfacrnn.errors import UserError
from kfacrnn.experiment import Experiment

RUN_KEYS = ("common", "seeds", "methods", "models", "tune", "select")
"""What decides which runs there are; an experiment with `runs: OTHER` has it from OTHER.yaml beside it."""


def find(name: str) -> Path:
    """The file of an experiment: in `experiments/`, or the path itself. Raises `UserError` where there is none."""
    if name.endswith(".yaml"):
        path = discovery.place(name)
        if not path.is_file():
            raise UserError(f"no such experiment: {path} is no file")
        return path
    folder = discovery.resource("experiments")
    name = f"figure{name}" if name.isdigit() else name
    if name not in discovery.yaml_names(folder):
        raise UserError(discovery.unknown("experiment", name, discovery.yaml_names(folder)))
    return folder / f"{name}.yaml"


def read(path: Path) -> Experiment:
    """Raises `UserError` for the first mistake."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    called = path.stem if path.parent == discovery.resource("experiments") else str(path)
    try:
        content = _with_runs(path, OmegaConf.load(path))
        merged = OmegaConf.merge(OmegaConf.structured(Experiment), content, {"name": path.stem, "called": called})
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise UserError(f"{path}: {missing[0]} has no value")
        experiment = OmegaConf.to_object(merged)
    except (YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_explain(error)}") from error
    assert isinstance(experiment, Experiment)
    for problem in settings.problems(experiment):
        raise UserError(f"{path}: {problem}")
    return experiment


def _with_runs(path: Path, content: Any) -> Any:
    """The content of a file with the keys that it has from the one named in `runs`."""
    from omegaconf import OmegaConf

    if not OmegaConf.is_dict(content) or not content.get("runs"):
        return content
    own = [key for key in RUN_KEYS if key in content]
    if own:
        raise UserError(f"{path}: {own[0]}: comes with the runs of {content.runs}; leave it out")
    other = path.with_name(f"{content.runs}.yaml")
    if not other.is_file():
        raise UserError(f"{path}: runs={content.runs}: there is no {other}")
    source: Any = OmegaConf.load(other)
    if source.get("runs"):
        raise UserError(f"{path}: runs={content.runs}: has its runs from {source.runs}; name that one")
    return OmegaConf.merge({key: source[key] for key in RUN_KEYS if key in source}, content)


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
