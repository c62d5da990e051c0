"""What a run records of the way in which it computes."""

import os
from pathlib import Path

import pytest

from kfacrnn import provenance
from kfacrnn.errors import UserError
from kfacrnn.nn import compiler, pointwise


@pytest.fixture
def undecided(tmp_path, monkeypatch):
    """As a process starts, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("KFACRNN_POINTWISE", raising=False)
    compiler._decide.cache_clear()
    yield monkeypatch
    compiler._decide.cache_clear()


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


def test_where_a_process_cannot_ask_which_processors_it_may_use_all_of_them_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert provenance.cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert provenance.hardware()["cores"] == 7


def test_processors_of_one_name_are_told_apart_by_their_vector_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for flags in ("fpu avx2", "fpu avx2 avx512f avx512_bf16", "fpu"):
        about = f"processor\t: 0\nmodel name\t: A core\nflags\t\t: {flags}\n\nprocessor\t: 1\nmodel name\t: another\n"
        monkeypatch.setattr(Path, "read_text", lambda self, about=about: about)
        found.append(provenance.machine(provenance.hardware() | {"cores": 2}))
    assert found == [
        "cpu A core, vectors avx2, cores 2",
        "cpu A core, vectors avx512_bf16, cores 2",
        "cpu A core, cores 2",
    ]


@pytest.mark.parametrize(
    ("sessions", "alone"),
    [
        ([{"jobs": 1}], False),  # killed, or of a version that did not look
        ([{"jobs": 1, "others_cores": 0.2}], True),
        ([{"jobs": 1, "others_cores": None}], True),
        ([{"jobs": 2}], False),
        ([{"jobs": 1, "others_cores": 0.1}, {"jobs": 1, "others_cores": 0.9}], False),  # a second launcher
        ([], False),
    ],
)
def test_seconds_count_if_no_other_run_and_no_other_process_took_a_share(
    sessions: list[dict[str, object]], alone: bool
) -> None:
    assert provenance.undisturbed({"sessions": sessions}) == alone
