"""What the system says of pages, not the allocator: a page that a process has already is not asked for again."""

import subprocess
import sys
from pathlib import Path

import pytest

resource = pytest.importorskip("resource", reason="needs a POSIX system")
ROOT = Path(__file__).resolve().parents[1]

# Five times a tensor of 80 MB is made, filled and freed, then one of 40 MB, here and in another thread (autograd has
# its own); printed are the pages that the process got from the system meanwhile.
PROGRAM = """
import resource, sys, threading
import torch
from mtseg.allocator import keep_freed_memory

def in_both_threads():
    work()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

def work():
    for _ in range(5):
        a = torch.ones(20_000_000)
        b = a[:10_000_000] + 1
        del a, b

torch.set_num_threads(1)
if sys.argv[1] == "keep":
    print(keep_freed_memory())
for _ in range(3):  # until the blocks have found their places
    in_both_threads()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
in_both_threads()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize())
"""


def asked_for(how):
    """Bytes of pages, with `how` 'keep' after keep_freed_memory()."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *could, pages = done.stdout.split()
    if "False" in could:
        pytest.skip("no glibc: nothing to set")
    return int(pages)


EACH = 4 * (20_000_000 + 10_000_000)


def test_kept_memory_is_not_asked_for_again():
    assert asked_for("return") > 7.5 * EACH  # of ten
    assert asked_for("keep") < 4 * EACH  # blocks of two sizes may leave gaps


def test_a_system_without_it_is_left_alone(monkeypatch):
    from mtseg import allocator

    for error in (AttributeError, OSError, TypeError):

        def nothing(_name, error=error):
            raise error

        monkeypatch.setattr(allocator.ctypes, "CDLL", nothing)
        assert allocator.keep_freed_memory() is False
