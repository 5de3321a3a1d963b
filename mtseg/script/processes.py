"""Scripts that another one runs, each a process of its own, and how they are stopped."""

import contextlib
import math
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

TO_STOP = 30  # seconds that a training may need to finish its iteration and save
running = set()  # the processes that this one started
ending = threading.Event()  # no more of them are to begin


class ScriptError(Exception):
    """A script that failed; the message is one sentence with its own, and with the file of its output."""


def run_script(words, log, seconds=math.inf, **environment):
    """Run `words`, a script and its flags, its output in the file `log`; `environment`: variables that it has besides.

    ScriptError where it fails, subprocess.TimeoutExpired after so many `seconds`. However this ends, it is stopped.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        before = file.tell()
        command, environment = [sys.executable, *map(str, words)], {**os.environ, **environment}
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        running.add(process)
        try:
            if ending.is_set():
                raise ScriptError(f"{words[0]} was not run, since another script failed or a signal came")
            code = process.wait(None if math.isinf(seconds) else seconds)
        except KeyboardInterrupt:
            stop(process, 2)
            raise
        finally:
            stop(process)
            running.discard(process)
    if code:
        said = log.read_bytes()[before:].decode(errors="replace").strip()
        # Its own sentence may stand behind the progress bar of a run that it found at work, and that writes there too.
        errors = re.findall(r"(?:^|[\n\r\]])(error: .*)", said)
        last = (errors or said.splitlines() or [""])[-1]
        raise ScriptError(f"{words[0]} ended with exit code {code} ({last}); all its output is in {log}")


def stop(process, patience=0):
    """End a process that still runs: on SIGTERM a training finishes its iteration, saves and stops. After a signal that
    it may have got too, give it some seconds of `patience` first."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience)
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(TO_STOP)
    process.kill()
    process.wait()


@contextlib.contextmanager
def threads(count):
    """A ThreadPoolExecutor of `count` threads that run scripts. What ends it early, an error or a signal, stops those
    that run, and no thread begins another: those that have not got the signal would go on without this process."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    except BaseException:
        ending.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for process in tuple(running):
            stop(process, 2)
        raise
    finally:
        pool.shutdown()  # where a second signal cuts this short, `ending` stays: threads that still work begin nothing
        ending.clear()
