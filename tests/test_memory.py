"""Freed memory stays in the process."""

import subprocess
import sys

import pytest

from kfacrnn.memory import keep_freed_memory

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
