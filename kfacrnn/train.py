"""One training run, from nothing or from where it stopped, to `done`, `diverged` or `interrupted`.

What decides the next update lives in a `Session` and goes through a checkpoint; here is when a run starts and ends, and
when rows, statuses and checkpoints are written.
"""

from __future__ import annotations

import time

import torch

from kfacrnn import provenance, ranks, signals, track
from kfacrnn.errors import first_line
from kfacrnn.kfac.maths import DecompositionError
from kfacrnn.memory import shortage_explained
from kfacrnn.progress import Progress, Silence
from kfacrnn.run import Run
from kfacrnn.session import Diverged, Session
from kfacrnn.store import BEST, FINISHED, RunFolder, Store
from kfacrnn.track import Mirror, Nobody, open_mirror

HEARTBEAT = 10.0  # seconds


def train(run: Run, command: str) -> RunFolder:
    """Trains until the budget is spent; returns at once if that has been done before. The folder says how it ended.
    Where several processes train together, each of them calls this."""
    ranks.join(run.task.batch_size, run.device)
    folder = Store(run.results).folder(run)
    folder = folder if ranks.is_first() else ranks.Onlooker(folder.path)
    with ranks.in_step():
        if _is_finished(folder):
            folder.drop_checkpoints()  # a process that was killed in its last moment has left them
            return folder
        track.check(run)
        with shortage_explained(run.task.name):
            session = Session(run)  # before the folder is made: what cannot start leaves none
        with folder.writing():
            if not _is_finished(folder):  # which another process may have done meanwhile
                _session(session, folder, command)
    return folder


def _is_finished(folder: RunFolder) -> bool:
    return ranks.of_first(folder.status().get("state")) in FINISHED


def _session(session: Session, folder: RunFolder, command: str) -> None:
    """From where the run is to its end, or to a signal. Whatever else ends it is in its status."""
    run = session.run
    folder.set_status("running", update=_update(folder), updates=run.budget.updates)  # for whom the lock keeps out
    mirror = open_mirror(run, folder.path) if ranks.is_first() else Nobody()  # where this ends, it was interrupted
    try:
        with ranks.in_step(), shortage_explained(run.task.name):
            session.begin(folder, command)
            for row in folder.metrics.numbers():  # a killed process takes with it what W&B has not yet written
                mirror.log(row)
            _loop(session, folder, mirror)
    except Exception as error:
        state = "interrupted" if isinstance(error, ranks.Lost) else "failed"
        reason = str(error) or type(error).__name__
        try:
            update = session.update or _update(folder)  # the session has none before it begins
            folder.set_status(state, update=update, updates=run.budget.updates, reason=reason)
        finally:
            mirror.finish(state)
        raise


def _update(folder: RunFolder) -> int:
    """The last known one."""
    return folder.status().get("update", 0)


def _loop(session: Session, folder: RunFolder, mirror: Mirror) -> None:
    run, ledger = session.run, session.ledger
    budget, title = run.budget, f"{run.task.name} {run.optimizer.name} {run.run_id}"
    state, reason, note, beat = "done", "", "", time.monotonic()
    shown = Progress(title, budget.updates, session.update) if ranks.is_first() else Silence()
    with signals.collected() as received, shown as progress:
        while session.update < budget.updates:
            try:
                _step(session)
                with ledger("log"):
                    row = session.row() if budget.row_is_due(session.update) else None
            except Diverged as why:
                state, reason = "diverged", str(why)
                break
            with ledger("log"):
                if row is not None:
                    folder.metrics.append(row)
                    mirror.log(row)
                    note = f"{row['train/metric']:.4g} {session.task.metric}"
                progress.show(session.update, note)
                if time.monotonic() - beat > HEARTBEAT:
                    beat = time.monotonic()
                    folder.set_status("running", update=session.update, updates=budget.updates)
            if session.is_best and not session.is_last:
                with ledger("checkpoint"):
                    folder.save_model(session.model.state_dict(), BEST)
            number = ranks.largest(received[0] if received else 0)
            if number or session.update % budget.checkpoint_every == 0:
                with ledger("checkpoint"):
                    folder.save_checkpoint(session.state_dict())
            if number:
                state, reason = "interrupted", f"by {signals.name(number)}"
                break
    _end(session, folder, mirror, state, reason)


def _step(session: Session) -> None:
    try:
        with session.training():
            session.step()
    except (torch.linalg.LinAlgError, DecompositionError) as error:  # no matrix of a healthy run does that
        raise Diverged(f"{first_line(error)} at update {session.update + 1}") from error


def _end(session: Session, folder: RunFolder, mirror: Mirror, state: str, reason: str) -> None:
    if state in FINISHED:
        folder.save_model(session.model.state_dict())
        if session.is_best:
            folder.drop_model(BEST)
    config, meta = session.description
    meta["sessions"][-1] |= {"end": provenance.now(), "others_cores": session.others_cores()}
    folder.describe(config, meta | {"ledger": session.ledger.state_dict(), "stats": session.stats()})
    folder.set_status(state, update=session.update, updates=session.run.budget.updates, reason=reason)
    if state in FINISHED:
        folder.drop_checkpoints()
    mirror.finish(state)
