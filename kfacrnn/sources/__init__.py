"""Where runs come from: the result store, offline W&B files, a W&B project. Whatever it is, it is read as a store.

Runs of the last two are first copied into a store of the cache, in the store's own files, so that there is one reader,
and what is compared or drawn does not depend on the way it came. A source says what it could not use, and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kfacrnn.discovery import place, unknown
from kfacrnn.errors import UserError
from kfacrnn.store import RunFolder, Store

KINDS = ("results", "a folder with a store", "offline:DIR", "wandb:ENTITY/PROJECT")


@dataclass(frozen=True)
class Source:
    """`name` as on the command line, `store` where its runs are, `notes` what there is to say of them, a line each."""

    name: str
    store: Store
    notes: Sequence[str] = ()
    copied: bool = False

    def state(self, folder: RunFolder) -> str | None:
        """Of a run here, whether it is still being written; of a copy, as the original had it."""
        return folder.status().get("state") if self.copied else folder.state()


def open_source(name: str, *, results: str = "results", refresh: bool = False, offline: bool = False) -> Source:
    """The source of that name. `refresh` reads again what the cache has, `offline` asks no server and takes what the
    cache has. Raises `UserError` where there is no such source, or no way to read it."""
    kind, colon, rest = name.partition(":")
    if name == "results":
        return Source(name, Store(results))
    if kind == "offline" and colon:
        from kfacrnn.sources import offline as offline_runs

        return offline_runs.read(name, place(rest), refresh=refresh)
    if kind == "wandb" and colon:
        from kfacrnn.sources import online

        return online.read(name, rest, refresh=refresh, offline=offline)
    if (place(name) / "runs").is_dir():
        return Source(name, Store(name))
    raise UserError(unknown("source", name, KINDS))
