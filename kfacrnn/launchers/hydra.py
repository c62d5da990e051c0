"""A sweep through one of Hydra's launchers: joblib, submitit (SLURM), Ray.

The launcher is given every run that can be started, and again those that their results decide on, until there are none
left. It keeps no state but the store's either: the same command, here or on another machine that sees the same results
folder, takes up what is missing, and a run that two of them start belongs to the first.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kfacrnn import discovery, launch
from kfacrnn.errors import UserError, first_line
from kfacrnn.launchers.pending import LOOK, Pending, ending
from kfacrnn.overrides import override

if TYPE_CHECKING:
    from hydra.plugins.launcher import Launcher

    from kfacrnn.plan import Plan, PlannedRun


def run(plan: Plan, pending: Pending, settings: Sequence[str]) -> bool:
    """Runs what is `pending` through the launcher that Hydra's own `settings` name, such as `hydra/launcher=joblib`.
    Returns when nothing is left to start, here or elsewhere, or after Ctrl-C; whether it was that. Raises `UserError`
    for settings that Hydra cannot compose."""
    results = override("results", str(plan.store.root.absolute()))
    launcher = _launcher([*settings, results])
    name, begun, waiting = type(launcher).__name__, 0, False
    try:
        while (batch := pending.runs()) or (others := pending.elsewhere()):
            if not batch:
                if not waiting:
                    print(f"{others} runs are made elsewhere; waiting for what they decide on", flush=True)
                waiting = True
                time.sleep(LOOK)
                continue
            pending.take(batch)
            print(f"{len(batch)} runs to {name}", flush=True)
            try:
                launcher.launch([[*planned.overrides, results] for planned in batch], initial_job_idx=begun)
            except Exception as error:  # joblib gives up the whole batch when one process is killed
                print(f"kfacrnn: {name}: {first_line(error)}", file=sys.stderr)
                _again(pending, batch)
            begun += len(batch)
            pending.put_back(planned for planned in batch if planned.folder.state() == "running")  # by another
            for planned in batch:
                print(ending(planned), flush=True)
    except KeyboardInterrupt:
        return True
    return False


def _again(pending: Pending, batch: Sequence[PlannedRun]) -> None:
    """What of a broken batch never began is still to be started, unless nothing of it did."""
    idle = [planned for planned in batch if planned.folder.state() is None]
    if len(idle) < len(batch):
        pending.put_back(idle)


def _launcher(settings: Sequence[str]) -> Launcher:
    """As Hydra makes one for a multirun, for a list of runs instead of a grid."""
    from hydra._internal.callbacks import Callbacks
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.plugins import Plugins
    from hydra.errors import HydraException
    from hydra.types import HydraContext, RunMode

    hydra = Hydra.create_main_hydra2("kfacrnn", create_config_search_path(str(discovery.resource("configs"))))
    try:
        composed = hydra.compose_config("config", list(settings), RunMode.MULTIRUN, with_log_configuration=True)
        return Plugins.instance().instantiate_launcher(
            hydra_context=HydraContext(hydra.config_loader, Callbacks(composed)),
            task_function=launch.job,
            config=composed,
        )
    except HydraException as error:
        raise UserError(first_line(error)) from error
