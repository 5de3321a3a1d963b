"""Freed memory kept for the next tensors, instead of given back to the system with every one (Linux with glibc)."""

import ctypes

# The parameters of mallopt(3) and their values: where memory is kept, and as glibc has them once it has adapted to
# tensors: its threshold has grown to its limit, and twice that may lie unused at the end of the heap.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -3, -4, -8
LIMIT = 32 * 2**20
KEEP = {TRIM_THRESHOLD: -1, MMAP_MAX: 0, ARENA_MAX: 1}
RETURN = {TRIM_THRESHOLD: 2 * LIMIT, MMAP_THRESHOLD: LIMIT, MMAP_MAX: 65536, ARENA_MAX: 0}


def keep_freed_memory(keep=True):
    """Have this process keep the memory it frees (or, with `keep=False`, return it as before); returns True if it can.

    glibc gets every block above 32 MiB, such as the features of a V-Net on whole patches, from the system and returns
    it as soon as it is free, so that each operation of each iteration waits for thousands of new, zeroed pages. Kept
    memory has its pages already. No number changes. The price is a larger process: it keeps what it needed at most,
    and blocks of different sizes leave gaps. Call it before the first tensor: only threads that start later are bound
    to the one heap that keeps. Elsewhere than under glibc nothing happens, and False is returned; on a GPU nothing is
    gained, PyTorch keeps memory there by itself.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt, trim = libc.mallopt, libc.malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc: macOS, Windows, musl
        return False
    done = [mallopt(name, value) for name, value in (KEEP if keep else RETURN).items()]
    if not keep:
        trim(0)
    return all(done)
