"""One heap for all threads of the command line's process."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

THREADS = """
import ctypes, sys, threading
if sys.argv[1] == "shared":
    from qconv.cli.heap import share_one_heap
    assert share_one_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
addresses = [libc.malloc(1000)]
thread = threading.Thread(target=lambda: addresses.append(libc.malloc(1000)))
thread.start()
thread.join()
print(abs(addresses[1] - addresses[0]))
"""
HEAP_DISTANCE = 1 << 26
"""A heap of a thread's own begins at a multiple of 64 MiB, far from the program's."""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_threads_allocate_from_one_heap() -> None:
    def distance(mode: str) -> int:
        command = [sys.executable, "-c", THREADS, mode]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert distance("shared") < HEAP_DISTANCE
    assert distance("separate") > HEAP_DISTANCE, "else this test proves nothing"
