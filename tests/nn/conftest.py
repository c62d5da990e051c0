"""Both ways of computing the point-wise part of a recurrence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kfacrnn.nn import compiler, pointwise


@pytest.fixture(scope="session")
def compiled_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for the whole session, because compiling takes a second."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(params=["torch", "compiled"])
def path(request: pytest.FixtureRequest, compiled_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Which of the two is used during the test. Skips the compiled one where there is no compiler."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(compiled_cache))
    monkeypatch.setenv("KFACRNN_POINTWISE", "torch" if request.param == "torch" else "auto")
    compiler._decide.cache_clear()
    if request.param == "compiled" and pointwise.status() != "compiled":
        pytest.skip(pointwise.status())
    yield request.param
    compiler._decide.cache_clear()
