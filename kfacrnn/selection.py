"""Which runs are compared: those of several sources that meet the conditions, each once; and what became of the rest.

Nothing is left out without a word: `Selection.said` counts what was found, matched, used and skipped, and why.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kfacrnn.errors import UserError
from kfacrnn.provenance import machine, undisturbed
from kfacrnn.run import Budget
from kfacrnn.sources import Source, open_source
from kfacrnn.store import CUT, FINISHED, RunFolder
from kfacrnn.where import Condition, text_of

EXTRA = ("run_id", "state", "source", "commit", "machine")
"""Keys beside those of the configuration."""
NAMED = 4  # runs that a remark names before it only counts


@dataclass(frozen=True, eq=False)
class StoredRun:
    """A run of a source. `values` has its flat configuration and the keys of `EXTRA`."""

    source: str
    folder: RunFolder
    values: dict[str, Any]
    meta: dict[str, Any]
    status: dict[str, Any]

    @property
    def run_id(self) -> str:
        return self.folder.run_id

    @property
    def state(self) -> str:
        return self.values["state"]

    def config(self) -> dict[str, Any]:
        """The configuration as it was resolved."""
        return read_config(self.folder)

    @property
    def undisturbed(self) -> bool:
        return undisturbed(self.meta)

    @property
    def is_cut(self) -> bool:
        """Of a run that is done: whether its rows are not those of its budget, or its configuration names none."""
        keys = ("updates", "log_every", "eval_every")
        numbers: dict[str, Any] = {key: self.values.get(f"budget.{key}") for key in keys}
        if not all(type(number) is int and number >= 0 for number in numbers.values()):
            return self.state == "done"
        return self.folder.is_cut(Budget(name="", checkpoint_every=1, **numbers))


@dataclass(frozen=True)
class Selection:
    """The runs that are used, and in `said` what became of all of them, a line each."""

    runs: list[StoredRun]
    said: list[str]


def select(
    names: Sequence[str],
    where: Sequence[str] = (),
    *,
    results: str = "results",
    refresh: bool = False,
    offline: bool = False,
    each_source: bool = False,
) -> Selection:
    """The runs of the sources `names` that meet all conditions. Only finished ones, unless a condition is on `state`;
    a run that several sources have is taken from the first of them, or with `each_source` from each.

    Raises `UserError` for a condition on a key that no run has, and when nothing is left.
    """
    conditions = [Condition.parse(text) for text in where]
    opened = [open_source(name, results=results, refresh=refresh, offline=offline) for name in dict.fromkeys(names)]
    found = {source.name: [run_of(source, folder) for folder in source.store] for source in opened}
    copies = {source.name for source in opened if source.copied}  # of which it is said what W&B has not
    every = [run for runs in found.values() for run in runs]
    said = [f"{source.name}: {note}" for source in opened for note in source.notes]
    if not every:
        raise UserError(f"{', '.join(found)}: there is no run" + "".join(f"; {line}" for line in said))
    there_are = {key for run in every for key in run.values}
    keys = {condition: condition.keys(there_are) for condition in conditions}
    taken: dict[str, StoredRun] = {}
    used: list[StoredRun] = []
    for name, runs in found.items():
        matched = [run for run in runs if all(c.holds(run.values, keys[c]) for c in conditions)]
        ready = matched
        if not any("state" in keys[condition] for condition in conditions):
            ready = [run for run in matched if run.state in FINISHED]
        whole = [run for run in ready if name in copies or not run.is_cut]
        kept = [run for run in whole if each_source or run.run_id not in taken]
        taken |= {run.run_id: run for run in kept}
        said.append(f"{name}: {len(runs)} runs, {len(matched)} match, {len(kept)} used")
        for state in dict.fromkeys(run.state for run in matched if run not in ready):
            of_state = [run for run in matched if run.state == state]
            said.append(f"{name}: skipped {named(of_state)}: {state}; --where state=… takes them")
        cut = [run for run in ready if run not in whole]
        if cut:
            said.append(f"{name}: skipped {named(cut)}: {CUT}; delete the folder to make it again")
        doubles = [run for run in whole if run not in kept]
        if doubles:
            others = sorted({taken[run.run_id].source for run in doubles})
            said.append(f"{name}: skipped {named(doubles)}: already from {', '.join(others)}")
        used += kept
    if not used:
        raise UserError(f"no run is left of {len(every)}: {'; '.join([*said, *_nearest(conditions, keys, every)])}")
    return Selection(used, said)


def _nearest(
    conditions: Sequence[Condition], keys: dict[Condition, list[str]], every: Sequence[StoredRun]
) -> list[str]:
    """What the runs have where a condition is met by none."""
    lines = []
    for condition in conditions:
        if not any(condition.holds(run.values, keys[condition]) for run in every):
            values = sorted({text_of(run.values[key]) for run in every for key in keys[condition] if key in run.values})
            lines.append(f"{condition.text} is met by none; {condition.key} is {', '.join(values[:12])}")
    return lines


def run_of(source: Source, folder: RunFolder) -> StoredRun:
    """Configuration, provenance and state of a run; its rows wait until they are wanted."""
    meta, status = folder.meta(), folder.status()
    sessions = meta.get("sessions") or [{}]
    extra = {
        "run_id": folder.run_id,
        "state": source.state(folder) or "missing",
        "source": source.name,
        "commit": sessions[-1].get("commit"),
        "machine": machine(sessions[-1].get("hardware", {})),
    }
    return StoredRun(source.name, folder, flat(read_config(folder)) | extra, meta, status)


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key; whole floats are integers, since JSON does not tell them apart."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            values |= flat(value, f"{prefix}{key}.")
        else:
            whole = isinstance(value, float) and value.is_integer()
            values[f"{prefix}{key}"] = int(value) if whole else value
    return values


def read_config(folder: RunFolder) -> dict[str, Any]:
    """config.yaml. Raises `UserError` where it cannot be read."""
    import yaml

    path = folder.path / "config.yaml"
    try:
        config = yaml.load(path.read_text(), _loader()) or {}
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds no settings")
    return config


@functools.cache
def _loader() -> Any:
    """The safe loader, in C where there is one: ten times as fast."""
    import yaml

    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def named(runs: Sequence[StoredRun]) -> str:
    """`3 runs (a, b, c)`."""
    some = ", ".join(run.run_id for run in runs[:NAMED]) + (", …" if len(runs) > NAMED else "")
    return f"{len(runs)} run{'s' if len(runs) != 1 else ''} ({some})"
