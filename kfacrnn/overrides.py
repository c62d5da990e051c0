"""Hydra's `key=value` as an experiment writes it, and the keys that are not its to write."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from kfacrnn.errors import UserError

WORD = re.compile(r"[A-Za-z_/][\w./@-]*", re.ASCII)  # what Hydra reads as a text without quotes
NO_WORDS = ("null", "true", "false", "nan", "inf")  # but for these, whatever their case
OWN_KEYS = {"seed": "`seeds` and `tune.seed`", "results": "--results DIR", "optimizer": "each method's `optimizer`"}


def override(key: str, value: Any) -> str:
    """`key=value` in Hydra's grammar."""
    return f"{key}={_literal(value)}"


def own_keys(where: str, overrides: Iterable[str]) -> Iterator[str]:
    """A line for every override, or key of a grid, of what the experiment itself sets from run to run."""
    for entry in overrides:
        key = entry.split("=", 1)[0].lstrip("+~")
        if key in OWN_KEYS:
            yield f"{where}: {entry}: is set by {OWN_KEYS[key]}"


def refuse_own_keys(overrides: Sequence[str]) -> None:
    """Raises `UserError` for the first of `own_keys`."""
    for problem in own_keys("overrides", overrides):
        raise UserError(problem)


def split_hydra(overrides: Iterable[str]) -> tuple[list[str], list[str]]:
    """Hydra's own settings, such as `hydra/launcher=joblib`, and those of a run."""
    found: tuple[list[str], list[str]] = [], []
    for entry in overrides:
        found[0 if re.match(r"[+~]*hydra\b", entry) else 1].append(entry)
    return found


def _literal(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_literal, value))}]"
    if isinstance(value, str) and not (WORD.fullmatch(value) and value.lower() not in NO_WORDS):
        from hydra.core.override_parser.types import Quote, QuotedString

        return QuotedString(value, Quote.single).with_quotes()
    return str(value)
