"""Freed memory kept for the next tensors, instead of given back to the system with every one (Linux with glibc)."""

import ctypes

TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8  # parameters of mallopt(3)
KEEP = {TRIM_THRESHOLD: -1, MMAP_MAX: 0, ARENA_MAX: 1}


def keep_freed_memory():
    """Have this process keep the memory it frees; returns True if it can.

    glibc gets every block above 32 MiB, such as the features of a V-Net on whole patches, from the system and returns
    it as soon as it is free, so that each operation of each iteration waits for thousands of new, zeroed pages. Kept
    memory has its pages already. No number changes. The price is a larger process: it keeps what it needed at most,
    and blocks of different sizes leave gaps. Call it before the first tensor: only threads that start later are bound
    to the one heap that keeps. Elsewhere than under glibc nothing happens, and False is returned; on a GPU nothing is
    gained, PyTorch keeps memory there by itself.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc: macOS, Windows, musl
        return False
    done = [mallopt(name, value) for name, value in KEEP.items()]
    return all(done)
