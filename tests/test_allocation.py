"""Freed memory is kept: what a process allocates again and again costs no page of the kernel any more."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
from craftor.allocation import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        blocks = [bytearray(40 << 20), bytearray(8 << 20)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
keep_freed_memory()
faults()
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_is_allocated_again_has_its_pages() -> None:
    said = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    before, after = map(int, said.split())
    assert before > 20 * 1000 and after < 1000, said
