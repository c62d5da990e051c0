"""A W&B project, through the public API: every run with its full history, never the sampled one.

A finished run is asked for once: its copy in the cache is taken as long as the project says the same of it. The API is
used as W&B documents it: `Api.runs` and `Run.scan_history`, which reads by steps, an update being a step.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from kfacrnn import track
from kfacrnn.errors import UserError, first_line
from kfacrnn.sources import Source
from kfacrnn.sources.copies import Copy, NotOurs, cache, remove, stamp_of
from kfacrnn.store import RunFolder, Store

TIMEOUT = 30  # seconds for an answer
PAGE = 50  # runs
LIVE = {"running": "running", "pending": "running", "preempting": "running"}  # W&B's states of a run that goes on
BROKEN = {"crashed": "interrupted", "killed": "interrupted", "preempted": "interrupted"}


def read(name: str, project: str, *, refresh: bool = False, offline: bool = False) -> Source:
    """The runs of `ENTITY/PROJECT`. Raises `UserError` where W&B cannot be reached, or does not know the project."""
    if not re.fullmatch(r"[\w.-]+/[\w .:-]+", project):
        raise UserError(f"no such source: '{name}': write wandb:ENTITY/PROJECT")
    store = cache("wandb", *project.split("/"))
    known = {copy.run_id: copy for copy in store}
    if offline:
        return Source(name, store, _from_cache(name, known), copied=True)
    notes, there = [], set()
    with explained(name, "; --offline takes what the cache has"):
        for run in runs(project):
            there.add(run.id)
            notes += _keep(store, run, known.get(run.id), refresh)
    for run_id, copy in known.items():
        if run_id not in there:
            remove(copy)
    return Source(name, store, notes, copied=True)


def runs(project: str) -> Any:
    """The project's runs with configuration and summary, page after page."""
    api = track.client().Api(timeout=TIMEOUT)
    return api.runs(project, per_page=PAGE, lazy=False, order="+created_at")


@contextlib.contextmanager
def explained(name: str, otherwise: str = "") -> Iterator[None]:
    """Whatever the client raises becomes one line that says what to do; `otherwise` is what else one may do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the client's errors have no common ancestor but this
        said = first_line(error)
        if re.search(r"\b40[13]\b|api[_ ]key|not logged in", said, re.IGNORECASE):
            raise UserError(f"{name}: W&B refuses the key ({said}); wandb login, or set WANDB_API_KEY") from error
        if "Could not find project" in said:
            raise UserError(f"{name}: W&B knows no such project, or it is not yours to see") from error
        raise UserError(f"{name}: W&B: {said}{otherwise}") from error


def _from_cache(name: str, known: dict[str, RunFolder]) -> list[str]:
    if not known:
        raise UserError(f"{name}: the cache has nothing of it; leave out --offline once")
    notes = [note for copy in known.values() for note in stamp_of(copy).get("notes", [])]
    return [f"{len(known)} runs from the cache, as they were when last asked for", *notes]


def _keep(store: Store, run: Any, known: RunFolder | None, refresh: bool) -> list[str]:
    """Copies a run, unless the cache has just this state of it; returns what there is to say of it."""
    summary = {key: value for key, value in run.summary_metrics.items() if key != "_wandb"}
    stamp: dict[str, Any] = {"last_step": summary.get("_step"), "wandb_state": run.state, "said": summary.get("state")}
    before = stamp_of(known) if known else {}
    if not refresh and before and all(before.get(key) == value for key, value in stamp.items()):
        return before["notes"]
    if known:
        remove(known)
    try:
        copy = Copy.of(run.config, summary, ())
        if copy.run_id != run.id:
            raise NotOurs(f"its run_id is {copy.run_id}")
    except NotOurs as reason:
        return [f"{run.id}: skipped: {reason}"]
    repeated = copy.add(run.scan_history(page_size=1000, use_cache=False))
    notes = [f"{run.id}: {repeated} repeated rows dropped"] if repeated else []
    state = LIVE.get(run.state) or (BROKEN.get(run.state) if summary.get("state") is None else None)
    copy.write(store, stamp | {"notes": notes}, state)
    return notes
