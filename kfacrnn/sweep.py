"""Runs what is missing of an experiment, and says how far it is.

A run that is done or has diverged is skipped, one that was stopped is continued, one that failed is left until it is
asked for. A run that dies takes nothing with it. The sweep itself can be stopped and started at any moment: it keeps no
state but the store's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from kfacrnn import discovery, experiment, standing
from kfacrnn.discovery import command
from kfacrnn.errors import UserError
from kfacrnn.launchers import hydra, local
from kfacrnn.launchers.pending import Pending
from kfacrnn.overrides import split_hydra
from kfacrnn.plan import Plan


def sweep(
    name: str,
    *,
    results: str,
    overrides: Sequence[str] = (),
    jobs: int = 1,
    dry_run: bool = False,
    only: Sequence[str] = (),
    retry_failed: bool = False,
) -> int:
    """Trains every run of an experiment that is not finished: in processes of this machine, or through the launcher
    that Hydra's own settings among the `overrides` name. Exit code: 0 when all of them are, 1 when some are not, 130
    when it was stopped. Raises, before the first run, `UserError` for a point of a grid that cannot be run, or not on
    this machine, and `ModuleNotFoundError` for a package that an optimiser needs."""
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: must be at least 1")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:  # as kfacrnn.ranks, without its imports
        raise UserError("sweep: under torchrun there is only kfacrnn train; start a sweep alone")
    hydras_own, own = split_hydra(overrides)
    if hydras_own and jobs > 1:
        raise UserError(f"--jobs {jobs}: Hydra's launchers have a setting of their own for this")
    plan = Plan(experiment.load(name), results, own, only)
    plan.validate()
    print(standing.runs(plan))
    print(f"{standing.summary(plan)}; {standing.estimate(plan, jobs)}", flush=True)
    if dry_run:
        return 0
    _require_packages(plan)
    if not hydras_own:  # whose runs may be on other machines
        _require_devices(plan)
    pending = Pending(plan, retry_failed)
    stopped = hydra.run(plan, pending, hydras_own) if hydras_own else local.run(plan, pending, jobs)
    if stopped:
        flags = [*(f"--only={method}" for method in only), *([f"--jobs={jobs}"] if jobs > 1 else [])]
        flags += ["--retry-failed"] if retry_failed else []
        again = command("sweep", name, *flags, *overrides, results=results)
        print(f"stopped; every run goes on from its last checkpoint, if it has one. Continue with: {again}")
        return 130
    print("\n".join([standing.summary(plan), *standing.remarks(plan)]))
    problems = list(standing.unfinished(plan))
    for problem in problems:
        print(f"kfacrnn: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _require_packages(plan: Plan) -> None:
    for name in {planned.run.optimizer.name: None for planned in plan.known() if not planned.finished}:
        package = discovery.missing("optimizers", name)
        if package:
            raise ModuleNotFoundError(f"{name} needs {package}", name=package)


def _require_devices(plan: Plan) -> None:
    from kfacrnn import ranks

    for device, precision in {(p.run.device, p.run.precision): None for p in plan.known() if not p.finished}:
        ranks.device(device, precision)


def status(name: str, *, results: str, overrides: Sequence[str] = ()) -> int:
    """Prints how far an experiment is; works from any shell while a sweep runs."""
    plan = Plan(experiment.load(name), results, overrides)
    print("\n".join([standing.summary(plan), standing.lines(plan), *standing.remarks(plan)]))
    return 0
