"""How the rows of run.py are measured: ways by turns, in processes apart, and what a row holds."""

import contextlib
import functools
import importlib.util
import multiprocessing
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def by_turns(ways, rounds, device=CPU, warm_up=1):
    """Seconds of each call: {name: [one a round]}; `ways`: {name: function of the round's number}."""
    times = {name: [] for name in ways}
    for turn in range(warm_up + rounds):
        # Each way comes after another one in every second round: what the one leaves in the caches is the other's luck.
        for name, way in list(ways.items())[:: 1 - 2 * (turn % 2)]:
            start = time.perf_counter()
            way(turn)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= warm_up:
                times[name].append(time.perf_counter() - start)
    return times


@contextlib.contextmanager
def apart(makes):
    """Ways for `by_turns`, each in a process of its own: {name: (make, *arguments)}, of which make gives the way there.

    For what sets up a whole process, as mtseg's scripts do with its memory. Each way returns what it returns there.
    """
    context, pipes, processes = multiprocessing.get_context("spawn"), {}, []
    for name, words in makes.items():
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(theirs, *words), daemon=True))
        processes[-1].start()
        theirs.close()

    def way(pipe, turn):
        pipe.send(turn)
        return pipe.recv()

    try:
        for pipe in pipes.values():
            pipe.recv()
        yield {name: functools.partial(way, pipe) for name, pipe in pipes.items()}
    finally:
        for process in processes:
            process.terminate()
            process.join()


def serve(pipe, make, *words):
    way = make(*words)
    pipe.send("ready")
    while True:
        pipe.send(way(pipe.recv()))


def differences(what, ours, theirs, rtol=0, atol=0):
    """[] where the numbers `ours` and `theirs` are the same to this tolerance, else [a sentence that says how not]."""
    ours, theirs = (np.asarray(numbers, dtype=np.float64) for numbers in (ours, theirs))
    if np.allclose(ours, theirs, rtol, atol, equal_nan=True):
        return []
    return [f"{what} differ by {np.abs(ours - theirs).max():.3g} where {rtol or atol:g} is allowed"]


def row(what, times, note="", faster_than=None, differs=(), **goals):
    """A row of timed ways, mtseg's under 'mtseg'.

    `faster_than`: {way: so many times as fast is mtseg to be}. `differs`: sentences of `differences`. `goals`: {words:
    reached}, other goals.
    """
    named = {f"{least:g} x {way}": (way, least) for way, least in (faster_than or {}).items()}
    reached = {words: ratio(times, way) >= least if way in times else None for words, (way, least) in named.items()}
    return {"what": what, "goals": reached | goals, "note": note, "differs": list(differs), "seconds": times}


def fact(what, value, goals=None, **more):
    """A row that is no comparison of times; `value` says it in words, `more` in numbers."""
    return {"what": what, "goals": goals or {}, "note": value, **more}


def ratio(times, way):
    """How many times as long as mtseg a way takes, in the median of the rounds."""
    return median(a / b for a, b in zip(times[way], times["mtseg"], strict=True))


def has(package):
    return importlib.util.find_spec(package) is not None


def matmul_rate(dtype, device, n):
    """Operations per second of a large matrix product: what the machine gives in practice."""
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(by_turns({"product": lambda _: a @ b}, 5, device)["product"])


def grown_by(call):
    """(what `call` gives, by how many bytes the process grew at the most meanwhile or None where no one tells)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the largest size so far is forgotten
        before = resident("VmRSS")
    except OSError:
        return call(), None
    return call(), resident("VmHWM") - before


def resident(key):
    """Bytes of this process in memory: now (VmRSS), or at the most so far (VmHWM). OSError without Linux's /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])
