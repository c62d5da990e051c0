"""Typed, range-checked settings: the dataclass says what a value may be, the YAML file says what it is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

PLAIN_LISTS = ("list[str]", "list[int]", "list[float]")


def setting(
    doc: str,
    *,
    default: Any = dataclasses.MISSING,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    choices: Sequence[Any] | None = None,
    scientific: bool = True,
    later: bool = False,
    costly: bool = False,
) -> Any:
    """A dataclass field with its meaning and its range; without a default, the YAML file has to say it. `None` in an
    optional field passes. What is not `scientific` changes no curve, only how it is computed, and is no part of a run's
    identity; nor is what came `later` than the first runs while it is `None`, so that those keep theirs. What an update
    takes depends on what is `costly`."""
    limits = {"above": above, "at_least": at_least, "below": below, "at_most": at_most, "choices": choices}
    about = {"doc": doc, "scientific": scientific, "later": later, "costly": costly}
    return dataclasses.field(default=default, metadata={**about, **limits})


def scientific(config: Any) -> dict[str, Any]:
    """The settings of a task or an optimiser that decide the training curve."""
    silent = [
        field.name
        for field in dataclasses.fields(config)
        if not field.metadata.get("scientific", True)
        or (field.metadata.get("later") and getattr(config, field.name) is None)
    ]
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in silent}


def costly(config: Any) -> dict[str, Any]:
    """The settings of an optimiser that decide how long an update takes; None is as good as a setting that is not
    there, which those that came later were not."""
    fields = dataclasses.fields(config)
    return without_none({field.name: getattr(config, field.name) for field in fields if field.metadata.get("costly")})


def without_none(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def problems(config: Any, prefix: str = "") -> Iterator[str]:
    """One line for every value out of its range, nested dataclasses included: key, value, what is allowed."""
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from problems(value, f"{key}.")
        elif isinstance(value, list) and str(field.type).startswith(PLAIN_LISTS):
            nested = [part for part in value if isinstance(part, (dict, list))]  # which OmegaConf lets pass
            yield from (f"{key}: {part}: must be a single value; put quotes around it" for part in nested)
        elif field.metadata and value is not None:
            wrong = _range_problem(value, field.metadata)
            if wrong:
                yield f"{key}={value}: {wrong} ({field.metadata['doc']})"
    if hasattr(config, "check"):  # what no single range can say; yields lines that begin with a key
        yield from (f"{prefix}{problem}" for problem in config.check())


def _range_problem(value: Any, limits: Any) -> str | None:
    if limits["choices"] is not None:
        return None if value in limits["choices"] else "must be one of " + ", ".join(map(str, limits["choices"]))
    numeric = [limits[name] for name in ("above", "at_least", "below", "at_most")]
    if all(limit is None for limit in numeric):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return "must be finite"
    above, at_least, below, at_most = numeric
    if above is not None and not value > above:
        return f"must be above {above}"
    if at_least is not None and not value >= at_least:
        return f"must be at least {at_least}"
    if below is not None and not value < below:
        return f"must be below {below}"
    if at_most is not None and not value <= at_most:
        return f"must be at most {at_most}"
    if isinstance(value, int) and abs(value) >= 2**63:
        return "must fit into 64 bits"
    return None
