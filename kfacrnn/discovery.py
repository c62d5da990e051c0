"""Finding what there is by looking: a module in a package and a YAML file of the same name, no registry."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import itertools
import pkgutil
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from kfacrnn.errors import UserError


def resource(folder: str) -> Path:
    """`configs` or `experiments`: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / folder
    return installed if installed.is_dir() else package.parent / folder


def place(text: str | Path) -> Path:
    """The path that a user has written, `~` resolved. Raises `UserError` for the home of somebody unknown, and for a
    name that no file can have."""
    try:
        path = Path(text).expanduser()
        path.is_dir()  # False where there is nothing, OSError where there cannot be anything
    except RuntimeError as error:
        raise UserError(f"{text}: there is no such home; write ./~… for a name that begins so") from error
    except OSError as error:
        raise UserError(f"{text}: {error.strerror}") from error
    return path


def command(*words: str, results: str | Path) -> str:
    """`kfacrnn …` as one types it, for a result store that need not be the default."""
    return shlex.join(["kfacrnn", *words, *([] if str(results) == "results" else ["--results", str(results)])])


def modules(package: str) -> list[str]:
    """Public modules of `kfacrnn.<package>`, by name, without importing them."""
    folder = Path(__file__).resolve().parent / package
    return sorted(m.name for m in pkgutil.iter_modules([str(folder)]) if not m.name.startswith("_"))


def load(package: str, name: str) -> ModuleType:
    return importlib.import_module(f"kfacrnn.{package}.{name}")


def missing(package: str, name: str) -> str | None:
    """The first of the packages that the module says it `NEEDS` that is not installed."""
    needs = getattr(load(package, name), "NEEDS", ())
    return next((needed for needed in needs if importlib.util.find_spec(needed) is None), None)


def yaml_names(folder: Path) -> list[str]:
    """Public YAML files: those that do not begin with an underscore."""
    return sorted(path.stem for path in folder.glob("[!_]*.yaml"))


def summary(path: Path) -> str:
    """What a YAML file says of itself: the first sentence of the comment at its top."""
    comment = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    text = " ".join(line.lstrip("# ").strip() for line in comment)
    return re.split(r"(?<=[.?])\s", text, maxsplit=1)[0].removesuffix(".")


def unknown(what: str, name: str, valid: Iterable[Any]) -> str:
    """`no such optimizer: 'adamm'; did you mean 'adam'? (there are: adam, sgd)`. `lr` may mean `optimizer.lr`."""
    names = [str(v) for v in valid]
    last = {name.rpartition(".")[2]: name for name in reversed(names)}
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    near = near or [last[part] for part in difflib.get_close_matches(name.rpartition(".")[2], last, n=1)]
    hint = f"; did you mean '{near[0]}'?" if near else ""
    there_are = f" (there are: {', '.join(names)})" if len(names) <= 12 else ""
    return f"no such {what}: '{name}'{hint}{there_are}"
