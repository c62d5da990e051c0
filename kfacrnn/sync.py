"""`kfacrnn sync`: runs that were stored, or mirrored offline, uploaded to Weights & Biases later.

A run's W&B counterpart has its identity: what is there already is not uploaded again, and a run that has gone on since
goes on there. A run that is complete there is skipped. Uploading changes nothing here.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kfacrnn import discovery, experiment, track
from kfacrnn.errors import UserError
from kfacrnn.selection import StoredRun, select
from kfacrnn.sources import online


def sync(
    sources: Sequence[str],
    where: Sequence[str],
    *,
    results: str = "results",
    project: str | None = None,
    entity: str | None = None,
    tags: Sequence[str] = (),
    dry_run: bool = False,
) -> int:
    """Uploads the runs of the sources that meet the conditions, one after another, unfinished ones too; returns the
    exit code. `project`, `entity` and `tags` are for runs that do not say themselves, or otherwise.

    Raises `UserError` where W&B cannot be reached: what was uploaded before stays there.
    """
    if any(name.startswith("wandb:") for name in sources):
        raise UserError("sync: wandb:… is where runs go to; name a source that is here")
    track.client()
    conditions = where if any(text.startswith("state") for text in where) else [*where, "state=*"]
    selection = select(sources, conditions, results=results)
    for line in selection.said:
        print(line, file=sys.stderr)
    runs = [(run, _tracked(run, project, entity, tags)) for run in selection.runs]
    there = {} if dry_run else _there([config["tracker"] for _, config in runs])
    done, uploaded = "to be uploaded" if dry_run else "uploaded", 0
    for run, config in runs:
        tracker = config["tracker"]
        target = f"{tracker['entity'] or 'your entity'}/{tracker['project']}"
        here = _progress(run.state, run.folder.metrics.columns(["update"])["update"])
        if there.get((tracker["entity"], tracker["project"], run.run_id)) == here:
            print(f"{run.run_id}: is in {target} already")
            continue
        if not dry_run:
            _upload(run, config, target)
        uploaded += 1
        what = [tracker[key] for key in ("group", "job_type") if tracker[key]]
        print(f"{run.run_id}: {done} to {target}{' '.join(['', 'as', *what] if what else [])}")
    print(f"{uploaded} of {len(runs)} runs {done}")
    return 0


def _tracked(run: StoredRun, project: str | None, entity: str | None, tags: Sequence[str]) -> dict[str, Any]:
    """The run's configuration, with the tracker that it is to have there."""
    config = run.config()
    tracker = dict(config["tracker"])
    tracker["project"], tracker["entity"] = project or tracker["project"], entity or tracker["entity"]
    tracker["tags"] = [*dict.fromkeys([*tracker["tags"], *tags])]
    tracker["job_type"] = tracker.get("job_type") or _job_type(tracker["group"], config["seed"])
    return config | {"tracker": tracker}


def _job_type(group: str | None, seed: int) -> str | None:
    """Of a run that was stored before runs said it themselves: the tuning seed of an experiment confirms nothing."""
    if group not in discovery.yaml_names(discovery.resource("experiments")):
        return None
    tune = experiment.load(group).tune
    return "tune" if tune is not None and tune.seed == seed else "confirm"


def _there(trackers: Sequence[dict[str, Any]]) -> dict[tuple[str | None, str, str], tuple[str | None, int]]:
    """State and last update of the runs that the projects have; nothing for a project that is new."""
    found = {}
    for entity, project in sorted({(t["entity"], t["project"]) for t in trackers}, key=str):
        path = f"{entity}/{project}" if entity else project
        with online.explained(f"sync to {path}"):
            try:
                listed = list(online.runs(path))
            except ValueError as error:
                if "Could not find project" not in str(error):
                    raise
                listed = []
            for run in listed:
                summary = run.summary_metrics
                found[entity, project, run.id] = (summary.get("state"), int(summary.get("update") or 0))
    return found


def _progress(state: str, updates: Sequence[float]) -> tuple[str, int]:
    return state, int(updates[-1]) if updates else 0


def _upload(run: StoredRun, config: dict[str, Any], target: str) -> None:
    with online.explained(f"sync of {run.run_id} to {target}"), tempfile.TemporaryDirectory() as place:
        session = track.Session(config, run.folder, mode="online", place=Path(place))
        for row in run.folder.metrics.numbers():
            session.log(row)
        session.finish(run.state)
