"""What a run says and records: log.txt, metrics.csv, and an orderly stop on Ctrl-C."""

import csv
import io
import os
import signal
import threading
import time
from pathlib import Path

from tqdm import tqdm


class LogError(OSError):
    """A log that cannot be written; the message is one sentence with the file and the remedy."""


class MetricsError(ValueError):
    """A metrics.csv that cannot be read; the message is one sentence with the file and the remedy."""


class RunLog:
    """`<folder>/log.txt`, a line for everything said, and `<folder>/metrics.csv`, a row per logged iteration.

    The columns are those of the first row that is logged. `start`: the iteration training starts from; rows of later
    iterations, and a last line cut short by a crash, are dropped, so that after a resume every iteration stands there
    once. With `start=0` both files begin anew.
    """

    def __init__(self, folder, start=0):
        self.folder = Path(folder)
        self.columns = None
        self.earlier = [row for row in read_metrics(self.folder / "metrics.csv") if int(row["iteration"]) <= start]
        self.earlier = self.earlier if start else []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not start:
                (self.folder / "metrics.csv").unlink(missing_ok=True)
                (self.folder / "log.txt").write_text("")
        except OSError as error:
            raise self._failure(self.folder / "log.txt", error) from error

    def say(self, text):
        """Print `text` above the progress bar and append it to log.txt with the time."""
        tqdm.write(text)
        self._append("log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def row(self, values):
        """Append a row to metrics.csv; floats keep nine significant digits, enough for any float32."""
        if self.columns is None:
            self._begin(list(values))
        cells = (values.get(column, "") for column in self.columns)
        self._append("metrics.csv", ",".join(f"{v:.9g}" if isinstance(v, float) else str(v) for v in cells) + "\n")

    def _begin(self, columns):
        """Write the header and the rows of before the resume, whole or not at all."""
        self.columns = columns
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(self.earlier)
        self.earlier = []
        temporary = self.folder / ".metrics.csv.tmp"
        try:
            temporary.write_text(text.getvalue())
            os.replace(temporary, self.folder / "metrics.csv")
        except OSError as error:
            raise self._failure(self.folder / "metrics.csv", error) from error

    def _append(self, name, text):
        # Opened anew each time: what was said is in the file at once, whatever happens to the process next.
        try:
            with open(self.folder / name, "a") as file:
                file.write(text)
        except OSError as error:
            raise self._failure(self.folder / name, error) from error

    @staticmethod
    def _failure(path, error):
        why = error.strerror or error
        return LogError(f"{path}: could not be written ({why}); free space there and go on with --resume")


def read_metrics(path):
    """Yield the complete rows of a metrics.csv as dicts of strings; none where there is no file.

    A last line that a crash cut short is no row. Raises MetricsError for a file that is damaged or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        return
    number = 1
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(line for line in file if line.endswith("\n"))
            for row in reader:
                number = reader.line_num
                if None not in row.values() and None not in row:
                    int(row["iteration"])
                    yield row
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise _damaged(path, number, error) from error


def _damaged(path, number, error):
    why = "it has no column iteration" if isinstance(error, KeyError) else " ".join(str(error).split())
    return MetricsError(f"{path}: line {number} is not of a run's metrics.csv ({why}); restore it or move it away")


def training_seconds(path):
    """The time of all iterations in a metrics.csv, each from asking for its batch to the updated weights; None without
    rows. Validation, logging, saving and starting are not in it. Raises MetricsError."""
    seconds = before = 0
    for row in read_metrics(path):
        try:
            seconds += (int(row["iteration"]) - before) / float(row["iterations_per_second"])
        except (ValueError, KeyError, ZeroDivisionError) as error:
            why = ValueError("it has no usable iterations_per_second")
            raise _damaged(path, f"of iteration {row['iteration']}", why) from error
        before = int(row["iteration"])
    return seconds if before else None


class StopSignals:
    """A context in which Ctrl-C and SIGTERM only set `received` to the signal's number, for the loop to look at.

    A second Ctrl-C stops at once. Outside the main thread, where Python allows no handlers, signals act as always.
    """

    def __init__(self):
        self.received = None
        self._previous = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number, _):
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number


def until_stopped(batches, stop):
    """Yield from `batches` until they end, or until `stop` (StopSignals) has received a signal."""
    iterator = iter(batches)
    while stop.received is None:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except Exception:
            # A batch system's SIGTERM reaches the workers as well, and whatever the loader was doing with them fails;
            # it may do so before the signal is seen here.
            time.sleep(0.5)
            if stop.received is None:
                raise
            return
        yield batch


def leave_signals_to_main(_worker):
    """A DataLoader's `worker_init_fn`: the stop signals, which reach every process at once, are the main one's to see.

    Ctrl-C is ignored. SIGTERM, with which Python also ends its workers when it exits, ends a worker as if it were
    done: the loader takes any other end for a crash, at whatever moment it learns of it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
