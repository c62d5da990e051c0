"""`python -m tests.torture`: every fault, its counts to results/torture.csv and into docs/reliability.md."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.torture import disk, fuzz, kills, load, numbers
from tests.torture.tally import Tally, record, write_table

ROOT = Path(__file__).resolve().parents[2]

FAULTS: dict[str, tuple[Callable[..., Any], int]] = {
    "kill-runs": (kills.of_runs, 120),
    "kill-sweeps": (kills.of_sweeps, 40),
    "kill-figures": (kills.of_figures, 20),
    "kill-uploads": (kills.of_uploads, 20),
    "disk": (disk.of_the_disk, 500),
    "files": (disk.of_files, 500),
    "results": (disk.of_results, 100),
    "poison": (numbers.of_poison, 100),
    "explosions": (numbers.of_explosions, 100),
    "command-lines": (fuzz.of_command_lines, 1000),
    "experiments": (fuzz.of_experiments, 1000),
    "checkpoints": (fuzz.of_checkpoints, 300),
    "offline-files": (fuzz.of_offline_files, 60),
    "sweeps-at-once": (load.of_concurrent_sweeps, 3),
    "many-runs": (load.of_many_runs, load.RUNS),
    "many-rows": (load.of_many_rows, load.ROWS),
    "long-run": (load.of_a_long_run, 100_000),
}
"""By name: the fault, and how many trials, runs, rows or updates are its full count."""


def tallies(name: str, place: Path, seed: int, times: int) -> Iterator[Tally]:
    """Runs one fault; some have several tallies. The same seed tries the same things in the same order."""
    found = FAULTS[name][0](place, random.Random(f"{name} {seed}"), times)
    yield from [found] if isinstance(found, Tally) else found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("faults", nargs="*", help=f"default: all of {', '.join(FAULTS)}")
    parser.add_argument("--share", type=float, default=1.0, help="of the full counts (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "torture.csv")
    options = parser.parse_args()
    lost = 0
    for name in options.faults or FAULTS:
        times = max(1, round(FAULTS[name][1] * options.share))
        with tempfile.TemporaryDirectory() as place:
            for tally in tallies(name, Path(place), options.seed, times):
                print(tally, flush=True)
                record(tally, options.out, options.seed)
                lost += tally.tried - tally.survived
    if options.out == ROOT / "results" / "torture.csv":
        write_table(options.out, ROOT / "docs" / "reliability.md")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
