"""From a `kfacrnn train` command line to one run, or through Hydra's own launchers to many."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kfacrnn import config, discovery
from kfacrnn.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

EXIT_CODES = {"done": 0, "diverged": 0, "interrupted": 130}


def run(arguments: Sequence[str], command: str) -> int:
    """Plain overrides are one run; with flags (`-m`, `--cfg job`, …) Hydra takes over. Returns the exit code."""
    flags = [argument for argument in arguments if argument.startswith("-")]
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    if not flags:
        return _one(config.compose(overrides), command)
    if {"-m", "--multirun"} & set(flags):
        for point in _points(overrides):
            config.compose(point)
    return _hydra(arguments)


def _one(run: config.Run, command: str) -> int:
    from kfacrnn.train import train

    folder = train(run, command)
    status = folder.status()
    reason = f" ({status['reason']})" if status["reason"] else ""
    print(f"{status['state']}{reason} at update {status['update']}: {folder.path}")
    return EXIT_CODES[status["state"]]


def _points(overrides: Sequence[str]) -> list[list[str]]:
    """Every grid point of a multirun, as Hydra's basic sweeper expands it, without Hydra's own settings."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    own = [override for override in overrides if not override.lstrip("+~").startswith("hydra")]
    try:
        parsed = OverridesParser.create().parse_overrides(own)
    except HydraException as error:
        raise UserError(str(error).split("\n", 1)[0]) from error
    return BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]


def _hydra(arguments: Sequence[str]) -> int:
    import hydra

    sys.argv = ["kfacrnn train", *arguments]
    hydra.main(config_path=str(discovery.resource("configs")), config_name="config", version_base="1.3")(_job)()
    return 0


def _job(composed: DictConfig) -> int:
    return _one(config.typed(composed), "kfacrnn train " + " ".join(_task_overrides()))


def _task_overrides() -> list[str]:
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task)
