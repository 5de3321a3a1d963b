"""How a script ends: a mistake in one sentence with exit code 2, Ctrl-C and SIGTERM with nothing half-made behind."""

import contextlib
import os
import re
import signal
import sys
import threading

# How PyTorch and CUDA word, in plain RuntimeErrors, that memory ran out.
NO_MEMORY = re.compile(r"out of memory|not enough memory|can(no|')t allocate memory|ALLOC_FAILED", re.IGNORECASE)
AMOUNT = re.compile(r"tried to allocate ([\d.]+ \w+)|unable to allocate ([\d.]+ \w+)", re.IGNORECASE)
DEAD_WORKER = re.compile(r"DataLoader worker.*(killed by signal|exited unexpectedly|terminated)")


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP; `number` is the signal's. As after Ctrl-C, temporary files are removed on the way out."""

    def __init__(self, number):
        self.number = number


def answer_help(parser, name):
    """In a script, whose `name` is '__main__': answer --help and misspelt flags now, before PyTorch is loaded.

    Ctrl-C while it is being loaded ends the process in one line; nothing has been written yet.
    """
    if name == "__main__":
        signal.signal(signal.SIGINT, _leave_at_once)
        parser.parse_args()


def _leave_at_once(*_):
    # An exception would pass through the imports of extension modules, some of which turn it into another one.
    os.write(2, b"interrupted\n")
    os._exit(130)


def _terminate(number, _):
    raise Terminated(number)


@contextlib.contextmanager
def _signals():
    """A context in which Ctrl-C, SIGTERM and SIGHUP raise exceptions, so that what is half-made is cleaned up."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _terminate}
    if hasattr(signal, "SIGHUP"):
        handlers[signal.SIGHUP] = _terminate
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            # A handler of somebody else's stays, and so does what nohup has set.
            if signal.getsignal(number) in (signal.SIG_DFL, _leave_at_once):
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def one_sentence(*errors):
    """Turn a mistake into a line on stderr and exit code 2; what `sentence` does not know keeps its traceback."""
    try:
        with _signals():
            yield
    except Terminated as error:
        print(f"stopped by {signal.Signals(error.number).name}", file=sys.stderr)
        raise SystemExit(128 + error.number) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # Nobody reads what is printed any more (`| head`). Python would complain once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + 13) from None
    except Exception as error:
        text = sentence(error, errors)
        if text is None:
            raise
        print(f"error: {text}", file=sys.stderr)
        raise SystemExit(2) from error


def sentence(error, errors=()):
    """What to tell the user of `error`: a sentence, or None where it is nobody's mistake but the program's.

    Errors that mtseg's modules define, and `errors`, hold their sentence. Others that a machine or its user causes:
    memory that ran out, a data worker that was killed, a file that cannot be read or written.
    """
    if isinstance(error, errors) or type(error).__module__.partition(".")[0] == "mtseg":
        return str(error)
    text = str(error).strip()
    if out_of_memory(error):
        amount = AMOUNT.search(text)
        amount = f" ({amount[1] or amount[2]} were asked for)" if amount else ""
        return (
            f"there is not enough memory{amount}; take smaller patches, batches or a smaller network, and in training "
            f"--accumulation_steps or --gradient_checkpointing"
        )
    if isinstance(error, RuntimeError) and DEAD_WORKER.search(text):
        return (
            "a process that loads data was killed, most often because memory ran out; lower --num_workers, and go on "
            "with --resume"
        )
    if isinstance(error, OSError):
        reason = error.strerror or (text.splitlines() or [type(error).__name__])[-1]
        return f"{error.filename}: {reason}" if error.filename else reason
    return None


def out_of_memory(error):
    """Whether memory ran out, of the machine or of its GPU."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(NO_MEMORY.search(str(error))))


def first_line(error):
    """The first line of an error's message, for a sentence; the error's name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
