"""Runs as one tidy table, for notebooks:

from kfacrnn.frames import load
frame = load("results", "offline:runs", where=["optimizer.name=kfac_*"], config=["optimizer.lr"])
frame.groupby(["optimizer.name", "update"])["train/nats"].median()
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kfacrnn.discovery import unknown
from kfacrnn.errors import UserError
from kfacrnn.metrics import COLUMNS
from kfacrnn.selection import select

if TYPE_CHECKING:
    import pandas as pd

KEYS = ("run_id", "task.name", "optimizer.name", "seed", "state")


def load(
    *sources: str,
    where: Sequence[str] = (),
    columns: Sequence[str] = COLUMNS,
    config: Sequence[str] = (),
    results: str = "results",
    refresh: bool = False,
    offline: bool = False,
) -> pd.DataFrame:
    """A row per log point of every run: the keys of `KEYS` and `config`, then the columns of metrics.csv, NaN for an
    empty cell. Without a source it is the result store. Equal runs give equal rows, whatever source they come from.

    What was found, used and skipped goes to the standard error. Raises `UserError` as `kfacrnn.selection.select` does.
    """
    import pandas as pd

    selection = select(sources or ("results",), where, results=results, refresh=refresh, offline=offline)
    keys = (*KEYS, *(key for key in config if key not in KEYS))
    there_are = {key for run in selection.runs for key in run.values}
    for key in keys:
        if key not in there_are:
            raise UserError(f"{key}: {unknown('key of a configuration', key, sorted(there_are))}")
    for name in columns:
        if name not in COLUMNS:
            raise UserError(unknown("column of metrics.csv", name, COLUMNS))
    for line in selection.said:
        print(line, file=sys.stderr)
    frames = []
    for run in sorted(selection.runs, key=lambda run: (*run.folder.path.parts[-3:], run.source)):
        frame = pd.DataFrame(run.folder.metrics.columns(columns), columns=list(columns), dtype=float)
        for place, key in enumerate(keys):
            frame.insert(place, key, [run.values.get(key)] * len(frame))
        frames.append(frame)
    frame = pd.concat(frames, ignore_index=True)
    return frame.astype(
        {name: "int64" for name in ("update", "tokens") if name in columns and frame[name].notna().all()}
    )
