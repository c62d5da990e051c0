"""What a run records of the way in which it computes."""

import pytest

from kfacrnn import provenance
from kfacrnn.errors import UserError
from kfacrnn.nn import pointwise


@pytest.fixture
def undecided(tmp_path, monkeypatch):
    """As a process starts, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("KFACRNN_POINTWISE", raising=False)
    pointwise._decide.cache_clear()
    yield monkeypatch
    pointwise._decide.cache_clear()


def test_versions_say_that_steps_are_compiled_where_they_can_be(undecided):
    expected = "compiled" if pointwise.status() == "compiled" else "torch"
    assert provenance.versions()["pointwise"] == expected


def test_versions_say_that_steps_run_in_torch(undecided):
    undecided.setenv("KFACRNN_POINTWISE", "torch")
    assert provenance.versions()["pointwise"] == "torch"


def test_a_kernel_that_was_demanded_and_cannot_be_had_is_one_line_for_the_user(undecided):
    undecided.setenv("KFACRNN_POINTWISE", "compiled")
    undecided.setenv("CC", "/bin/false")
    with pytest.raises(UserError, match="the kernel cannot be had: false failed"):
        provenance.versions()
