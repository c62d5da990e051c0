"""What there is: tasks, optimisers, budgets, trackers, experiments, and the runs of a result store.

Looks at files only: nothing it lists is imported.
"""

from __future__ import annotations

from datetime import datetime

from kfacrnn import discovery, tables
from kfacrnn.errors import UserError
from kfacrnn.store import RunFolder, Store

PACKAGES = {"tasks": "task", "optimizers": "optimizer"}  # package of the modules: group of the YAML files
FOLDERS = {"budgets": "budget", "trackers": "tracker"}
KINDS = (*PACKAGES, *FOLDERS, "experiments")


def show(kind: str | None, results: str = "results") -> None:
    """Prints one kind of thing, or without a kind everything but the runs. Raises `UserError` for an unknown kind."""
    if kind == "runs":
        print(_runs(Store(results)))
    elif kind in KINDS:
        print("\n".join(_entries(kind)))
    elif kind is None:
        print("\n\n".join("\n".join([f"{each}:", *(f"  {entry}" for entry in _entries(each))]) for each in KINDS))
    else:
        raise UserError(discovery.unknown("kind", kind, [*KINDS, "runs"]))


def _entries(kind: str) -> list[str]:
    """A line for each: its name and what its YAML file says of itself, or which half of it is missing."""
    group = PACKAGES.get(kind) or FOLDERS.get(kind)
    folder = discovery.resource("configs") / group if group else discovery.resource("experiments")
    written = {name: discovery.summary(folder / f"{name}.yaml") for name in discovery.yaml_names(folder)}
    if kind in PACKAGES:
        for name in set(written) ^ set(discovery.modules(kind)):
            missing = f"configs/{group}/{name}.yaml" if name not in written else f"kfacrnn/{kind}/{name}.py"
            written[name] = f"incomplete: {missing} is missing"
    width = max(map(len, written), default=0)
    return [f"{name:{width}}  {text}".rstrip() for name, text in sorted(written.items())]


def _runs(store: Store) -> str:
    rows = [_run(folder) for folder in store]
    if not rows:
        return f"no runs in {store.root / 'runs'}"
    return tables.plain(("task", "optimizer", "run", "state", "updates", "train/metric", "last sign of life"), rows)


def _run(folder: RunFolder) -> tuple[str | None, ...]:
    status, last = folder.status(), folder.metrics.last_row()
    heartbeat = status.get("heartbeat")
    return (
        folder.path.parts[-3],
        folder.path.parts[-2],
        folder.run_id,
        folder.state(),
        f"{status['update']}/{status['updates']}" if status else None,
        f"{last['train/metric']:.4g}" if last else None,
        datetime.fromtimestamp(heartbeat).strftime("%Y-%m-%d %H:%M") if heartbeat else None,
    )
