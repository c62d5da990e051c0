"""What the scripts that enumerate Fishers are asked for alike."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence

from fisher_study.problems import Problem, problem
from kfacrnn.errors import UserError


def parser_of_study(description: str, problems: Sequence[str]) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--problems", nargs="+", default=[*problems], choices=problems)
    made.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    made.add_argument("--batches", type=int, default=4, help="of 64 sequences, that x runs over (default: 4)")
    return made


def untrained(script: str, arguments: argparse.Namespace) -> dict[tuple[str, int], Problem]:
    """By problem and seed, untrained. Ends the script where there is no Penn Treebank for one of them."""
    try:
        return {key: problem(*key) for key in itertools.product(arguments.problems, arguments.seeds)}
    except UserError as error:
        sys.exit(f"{script}: {error}; or --problems without characters")
