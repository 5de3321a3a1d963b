"""Commands of Python without the seconds in which each would import PyTorch: a process that has it forks for each.

    with warm_python(folder) as python:
        subprocess.run([python, "script.py", "--flag"])

What such a command starts by its own sys.executable is warm, too. A killed command ends by itself alone.
"""

import atexit
import contextlib
import json
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import traceback

LONGEST = 2**20  # bytes of a command and its environment


@contextlib.contextmanager
def warm_python(folder):
    """The path of an executable, in `folder`, that takes the words of a command line of Python."""
    address, client = folder / "warm.socket", folder / "python"
    # -S: no site-packages, which the client does not need; -E: its PYTHONPATH is the command's.
    client.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-SE", __file__, str(address)])} "$@"\n')
    client.chmod(0o755)
    process = subprocess.Popen([sys.executable, __file__, str(address)], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()  # it listens
        yield client
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def ask(address, words):
    """Let the process at `address` run `python <words>` here; returns the exit code."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        command = [words, os.getcwd(), dict(os.environ)]
        socket.send_fds(connection, [json.dumps(command).encode()], [0, 1, 2])
        connection.shutdown(socket.SHUT_WR)
        return int(connection.recv(16) or 1)


def serve(address):
    import h5py
    import PIL.Image
    import scipy.ndimage
    import torch
    import tqdm

    del h5py, PIL, scipy, torch, tqdm
    sys.path.pop(0)  # this folder, which is none of the commands'
    executable = os.path.join(os.path.dirname(address), "python")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        print("ready", flush=True)
        while True:
            connection, _ = listening.accept()
            if os.fork():
                connection.close()
                continue
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listening.close()
            text, streams, _, _ = socket.recv_fds(connection, LONGEST, 3)
            while more := connection.recv(LONGEST):
                text += more
            pid = os.fork()
            if not pid:
                connection.close()
                for number, stream in enumerate(streams):
                    os.dup2(stream, number)
                    os.close(stream)
                run(executable, *json.loads(text))
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            connection.sendall(str(code if code >= 0 else 128 - code).encode())
            os._exit(0)


def run(executable, words, folder, environment):
    """End this process as `python <words>` would."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = executable
    words = [word for word in words if word != "-u"]
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    as_module = words[0] == "-m"
    sys.path[:0] = [folder if as_module else os.path.dirname(os.path.abspath(words[0])), *paths]
    sys.argv = words[as_module:]
    code = 0
    try:
        if as_module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else bool(code))


if __name__ == "__main__":
    where, *command = sys.argv[1:]
    sys.exit(ask(where, command) if command else serve(where))
