"""From a `kfacrnn train` command line to one run, or through Hydra's own launchers to many."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from kfacrnn import config, discovery
from kfacrnn.errors import UserError, first_line
from kfacrnn.overrides import split_hydra
from kfacrnn.run import Run
from kfacrnn.store import Store

if TYPE_CHECKING:
    from omegaconf import DictConfig

EXIT_CODES = {"done": 0, "diverged": 0, "interrupted": 130}
FAILED = 2


def run(arguments: Sequence[str], command: str) -> int:
    """Plain overrides are one run; with flags (`-m`, `--cfg job`, …) Hydra takes over. Returns the exit code: of a
    multirun, that of the point that ended worst."""
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    options, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        raise UserError(f"{unknown[0]}: no such flag (there are -m, --cfg job, --help and those of --hydra-help)")
    if options.multirun and (options.cfg or options.info):
        raise UserError("-m: shows nothing; take --cfg and --info without it, for one point")
    flags = [argument for argument in arguments if argument not in [*options.overrides, "--"]]
    points = _points(options.overrides) if options.multirun else [options.overrides]
    runs = [config.compose(point) for point in points]
    if not flags:
        return _one(runs[0], command)
    _hydra([*flags, *options.overrides])
    if not options.multirun:
        return 0
    return max(EXIT_CODES.get(Store(run.results).folder(run).state() or "", FAILED) for run in runs)


def _refuse(message: str) -> NoReturn:
    """For argparse's own way out, which quotes what it was given at any length."""
    raise UserError(message)


def _one(run: Run, command: str) -> int:
    from kfacrnn import ranks
    from kfacrnn.train import train

    folder = train(run, command)
    status = ranks.of_first(folder.status())
    reason = f" ({status['reason']})" if status["reason"] else ""
    if ranks.is_first():
        print(f"{status['state']}{reason} at update {status['update']}: {folder.path}")
    return EXIT_CODES[status["state"]]


def _points(overrides: Sequence[str]) -> list[list[str]]:
    """Every grid point of a multirun, as Hydra's basic sweeper expands it, without Hydra's own settings."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    _, own = split_hydra(overrides)
    return BasicSweeper.split_arguments(config.parse(own), max_batch_size=None)[0]


def _hydra(arguments: Sequence[str]) -> None:
    import hydra
    from hydra.errors import HydraException

    sys.argv = ["kfacrnn train", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors are raised to here instead of printed
    main = hydra.main(config_path=str(discovery.resource("configs")), config_name="config", version_base="1.3")(job)
    try:
        main()
    except HydraException as error:
        raise UserError(first_line(error)) from error
    except OSError as error:
        if error.filename is None:
            raise
        raise UserError(f"cannot write {error.filename}: {error.strerror}; choose another with results=DIR") from error


def job(composed: DictConfig) -> None:
    """One run that a launcher of Hydra's started. What stops it does not stop the others, but for Ctrl-C and SIGTERM.
    Only Hydra's basic launcher is known to run one at a time."""
    from hydra.core.hydra_config import HydraConfig

    if HydraConfig.get().runtime.choices["hydra/launcher"] != "basic":
        os.environ["KFACRNN_JOBS"] = "0"
    try:
        code = _one(config.typed(composed), shlex.join(["kfacrnn", "train", *HydraConfig.get().overrides.task]))
    except UserError as error:
        print(f"kfacrnn: {error}", file=sys.stderr)
        return
    if code == EXIT_CODES["interrupted"]:
        raise KeyboardInterrupt
