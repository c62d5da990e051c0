"""What a trained model is worth: the loss of a stored run's parameters on a whole split.

They are those of the run's best validation, as early stopping would have it, or the final ones. What is found is kept
beside the run, in evaluation.json, by parameters and split.
"""

from __future__ import annotations

import math
from dataclasses import replace

from kfacrnn import config
from kfacrnn.errors import UserError, first_line
from kfacrnn.files import write_json
from kfacrnn.selection import read_config
from kfacrnn.store import BEST, FINAL, FINISHED, RunFolder, Store
from kfacrnn.units import from_nats

EVALUATION = "evaluation.json"


def evaluate(
    name: str,
    *,
    split: str = "test",
    final: bool = False,
    results: str = "results",
    device: str | None = None,
    root: str | None = None,
) -> str:
    """A line for the run whose identity begins with `name`. `root` is a folder of the corpus, if it is not where the
    run found it. Raises `UserError` for a run that has not ended, or whose parameters are not there."""
    folder = Store(results).find(name)
    if folder.state() not in FINISHED:
        raise UserError(f"run {folder.run_id} is {folder.state()}: only a run that has ended can be evaluated")
    which, update = ("final", folder.status()["update"]) if final else ("best", best_update(folder))
    nats, value, metric = _measured(folder, _file(folder, update), split, device, root)
    known = folder.read_json(EVALUATION)
    of_parameters = known.get(which, {}) | {"update": update, f"{split}/nats": nats, f"{split}/metric": value}
    write_json(folder.path / EVALUATION, known | {which: of_parameters})
    task, optimizer = folder.path.parts[-3:-1]
    return f"{task} {optimizer} {folder.run_id}, {which} parameters (update {update}): {split} {value:.5g} {metric}"


def best_update(folder: RunFolder) -> int:
    """Of the least validation loss, the first if several are equal. Raises `UserError` where there is none."""
    columns = folder.metrics.columns(["valid/nats", "update"])
    finite = [(nats, int(update)) for nats, update in zip(*columns.values(), strict=True) if math.isfinite(nats)]
    if not finite:
        raise UserError(f"run {folder.run_id} has no validation to be the best: --final takes its last parameters")
    return min(finite)[1]


def _file(folder: RunFolder, update: int) -> str:
    if update == folder.status()["update"]:
        return FINAL
    if not (folder.path / BEST).is_file():
        raise UserError(f"{folder.path} has no {BEST}, of update {update}: --final takes the last parameters")
    return BEST


def _measured(
    folder: RunFolder, file: str, split: str, device: str | None, root: str | None
) -> tuple[float, float, str]:
    """Nats per unit, the task's metric, and the metric's name."""
    run = config.stored(read_config(folder))
    run = replace(run, device=device or run.device, data=replace(run.data, root=root or run.data.root))
    parameters = folder.load_model(file)
    from kfacrnn.session import Session

    session = Session(run)
    try:
        session.model.load_state_dict(parameters)
    except RuntimeError as error:
        raise UserError(f"{folder.path / file}: not of this run ({first_line(error)})") from error
    nats = session.evaluate(split)
    return nats, from_nats(session.task.metric)(nats), session.task.metric
