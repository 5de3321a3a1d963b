"""Processes that start with PyTorch loaded, for tests of what scripts do as processes: each takes seconds less.

A server, which has imported what takes long and nothing of this repository, is forked for every process that is asked
for. `Python` is that server; its `executable` can stand where `python` does in a command, and what such a process
starts by its sys.executable comes from the server as well.
"""

import atexit
import json
import os
import select
import signal
import socket
import sys
import threading
import traceback

LOADED = ("torch", "torch.distributed", "torch.nn.parallel", "torch.utils.data", "torch.utils.checkpoint", "h5py")
LOADED += ("scipy.ndimage", "scipy.optimize", "scipy.spatial", "tqdm", "matplotlib.figure", "nibabel")
CLIENT = """#!{python} -IS
import sys
sys.path.append({folder!r})
from warm import Process
status = Process({address!r}, sys.argv[1:]).wait()
sys.exit(status if status >= 0 else 128 - status)
"""


class Python:
    """The server, with its socket and its `executable` in `folder`; `stop` ends it."""

    def __init__(self, folder):
        import subprocess

        self.executable, self.address = folder / "python", str(folder / "socket")
        client = {"python": sys.executable, "folder": os.path.dirname(__file__), "address": self.address}
        self.executable.write_text(CLIENT.format(**client))
        self.executable.chmod(0o755)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(self.address)
            listener.listen(64)
            command = [sys.executable, __file__, str(listener.fileno()), str(self.executable)]
            # Its standard input closes when this process ends, however that is, and then it ends, too.
            self.server = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()])

    def start(self, *words, **files):
        """The Process `python <words>`; `files`: its `out` and `err`."""
        return Process(self.address, [str(word) for word in words], **files)

    def stop(self):
        self.server.stdin.close()
        self.server.wait()


class Process:
    """A process in a session of its own, of number `pid`; it writes to the files `out` and `err`, by default ours."""

    def __init__(self, address, words, out="/dev/stdout", err="/dev/stderr"):
        self.returncode, self.socket = None, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.connect(address)
        message = json.dumps([words, os.getcwd(), dict(os.environ)]).encode()
        with open(out, "ab") as to_out, open(err, "ab") as to_err:
            socket.send_fds(self.socket, [message], [0, to_out.fileno(), to_err.fileno()])
        self.pid = int(self.socket.recv(32))

    def poll(self):
        """The exit status, negative where a signal ended it; None while it runs."""
        return self.wait() if select.select([self.socket], [], [], 0)[0] else self.returncode

    def wait(self):
        if self.returncode is None:
            self.returncode = int(self.socket.recv(32))
        return self.returncode


def serve(listener, executable):
    """Fork for each connection until standard input ends. The child forks once more, and reports on the grandchild."""
    for name in LOADED:
        try:
            __import__(name)
        except ImportError:
            pass
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        message, files, _, _ = socket.recv_fds(connection, 2**20, 3)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if pid := os.fork():
            connection.send(b"%d" % pid)
            connection.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            os._exit(0)
        os.setsid()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        listener.close()
        connection.close()
        sys.executable = executable
        return run(*json.loads(message))


def run(words, folder, environment):
    """What the interpreter does with `words`: a script, -m module or -c code, and its arguments."""
    import runpy

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    unbuffered = words[0] == "-u"
    sys.stdout.reconfigure(write_through=unbuffered)
    first, *rest = words = words[unbuffered:]
    sys.path[0] = os.path.dirname(os.path.abspath(first)) if not first.startswith("-") else ""
    sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(first, run_name="__main__")


def status_of(function, *arguments):
    """The exit status of a process that does this alone."""
    try:
        function(*arguments)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    status = status_of(serve, socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # to take down all that is loaded takes as long as to load it
