"""A W&B run as a folder of a result store: what was read of it, in the store's own files.

Names that come from outside become paths, so they are checked. Numbers are those that were logged; a column that the
store does not have is left out, as the store itself leaves it out.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kfacrnn.cache import place
from kfacrnn.files import write_atomic, write_json
from kfacrnn.store import STATES, RunFolder, Store

STAMP = "copied.json"
COUNTS = ("update", "tokens")
WORDS = {"NaN": "nan", "Infinity": "inf", "-Infinity": "-inf"}  # W&B's for what JSON has no number for


class NotOurs(Exception):
    """A W&B run that `kfacrnn train` or `kfacrnn sync` did not write; says what is missing."""


@dataclass
class Copy:
    """What W&B has of a run. `rows` by update; `summary` as it was at the end."""

    run_id: str
    config: dict[str, Any]
    summary: dict[str, Any]
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Mapping[str, Any], summary: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> Copy:
        """Takes the parts from where `kfacrnn.track` put them; of rows with the same update the last one counts.
        Raises `NotOurs`."""
        own = {key: value for key, value in config.items() if key not in ("_wandb", "run_id", "meta")}
        run_id, meta = config.get("run_id"), config.get("meta")
        if not isinstance(run_id, str):
            raise NotOurs("its configuration has no run_id: not a run of kfacrnn")
        if not isinstance(meta, dict) or "task" not in meta:
            raise NotOurs("its configuration has no meta: it has no row, or kfacrnn was too old to mirror it")
        names = [own.get(group, {}).get("name") for group in ("task", "optimizer")]
        for name in (run_id, *names):
            if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
                raise NotOurs(f"{name!r} cannot be a run, a task or an optimizer")
        copy = cls(run_id, own, dict(summary), {}, meta)
        copy.add(rows)
        return copy

    def add(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Adds rows, in the order of logging; returns how many there were already."""
        repeated = 0
        for row in rows:
            if isinstance(row.get("update"), (int, float)):
                update = int(row["update"])
                repeated += update in self.rows
                self.rows[update] = dict(row)
        return repeated

    def folder(self, store: Store) -> RunFolder:
        names = (self.config[group]["name"] for group in ("task", "optimizer"))
        return RunFolder(store.root.joinpath("runs", *names, self.run_id))

    def write(self, store: Store, stamp: Mapping[str, Any], state: str | None = None) -> RunFolder:
        """Puts the run into its folder, `stamp` last: a folder with a stamp is whole. `state` is what W&B itself knows
        better than the run's own summary, which may be that of an earlier session."""
        from omegaconf import OmegaConf

        folder = self.folder(store)
        folder.path.mkdir(parents=True, exist_ok=True)
        (folder.path / STAMP).unlink(missing_ok=True)
        updates = self.config["budget"]["updates"]
        last = max(self.rows, default=0)
        said = self.summary.get("state")
        status = {
            "state": state or (said if said in STATES else "interrupted"),
            "update": max(last, int(self.summary.get("stopped_at") or 0)) if state is None else last,
            "updates": updates,
            "reason": str(self.summary.get("reason") or ""),
        }
        write_atomic(folder.path / "config.yaml", OmegaConf.to_yaml(self.config).encode())
        folder.metrics.replace(
            {name: _cell(name, value) for name, value in row.items()} for _, row in sorted(self.rows.items())
        )
        write_json(folder.path / "meta.json", self.meta)
        write_json(folder.path / "status.json", status)
        write_json(folder.path / STAMP, stamp)
        return folder


def _cell(column: str, value: Any) -> Any:
    if isinstance(value, str):
        return WORDS.get(value, "")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return int(value) if column in COUNTS else value
    return ""


def stamp_of(folder: RunFolder) -> dict[str, Any]:
    """What was written beside the copy; empty for one that is not whole."""
    try:
        return json.loads((folder.path / STAMP).read_text())
    except (OSError, json.JSONDecodeError):
        return {}


def remove(folder: RunFolder) -> None:
    shutil.rmtree(folder.path, ignore_errors=True)


def cache(*parts: str) -> Store:
    """The store of the cache where such copies are."""
    return Store(place(*parts))
