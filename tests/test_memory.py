"""Freed memory stays in the process."""

import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from kfacrnn.memory import keep_freed_memory, peak_rss_mb

FAULTS = """
import resource, sys
from kfacrnn.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory() or sys.exit("cannot")
used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(1 << 26)
before = used()
for _ in range(5):
    bytearray(1 << 26)
print(used() - before)
"""


def page_faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not keep_freed_memory(), reason="the C library has no mallopt")
def test_a_buffer_that_is_freed_and_allocated_again_costs_no_page_faults():
    assert page_faults("keep") < page_faults("default") / 10


@pytest.mark.parametrize(("system", "unit"), [("Linux", 1024), ("Darwin", 1024**2)])
def test_where_there_is_no_proc_the_peak_is_in_the_unit_of_the_system(monkeypatch, system, unit):
    def refuse(*_):
        raise OSError

    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(resource, "getrusage", lambda _: resource.struct_rusage([0, 0, 5 * unit, *[0] * 13]))
    assert peak_rss_mb() == 5
