"""Memory that a process frees and needs again at once: kept, instead of given back to the kernel and zeroed anew.

Activations are freed and allocated in every network call. glibc returns the end of its heap, and every large block by
itself, as soon as they are free; a page that comes back is zeroed by the kernel first. For a UNet call of 32 slots of
the micro model that was a seventh of its time.
"""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of `mallopt`, as glibc's malloc.h numbers them."""
KEPT, LARGE = 2**30, 2**26
"""Bytes: free at the end of the heap that are kept; and from which on a block still comes from the kernel."""


def keep_freed_memory() -> None:
    """For this process from now on; after models are loaded, whose leftovers are given back first.

    Does nothing where the C library is not glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)
        libc.mallopt(_TRIM_THRESHOLD, KEPT)
        libc.mallopt(_MMAP_THRESHOLD, LARGE)
