"""What a run says and records: log.txt, metrics.csv, and an orderly stop on Ctrl-C."""

import contextlib
import csv
import io
import itertools
import math
import os
import signal
import threading
import time
from pathlib import Path

from tqdm import tqdm

from mtseg.checkpoint import write_whole


class LogError(OSError):
    """A log that cannot be written; the message is one sentence with the file and the remedy."""


class MetricsError(ValueError):
    """A metrics.csv that cannot be read; the message is one sentence with the file and the remedy."""


class RunLog:
    """`<folder>/log.txt`, a line for everything said, and `<folder>/metrics.csv`, a row per logged iteration.

    `start`: the iteration training starts from; rows of later iterations, and a last line cut short by a crash, are
    dropped, so that after a resume every iteration stands there once. With `start=0` both files begin anew. `source`:
    the folder with the metrics.csv that is gone on with (default: `folder`). `log_freq`: iterations between two rows,
    now or before, whichever is more. `notes`: a list with a sentence where rows up to `start` are missing, or empty.
    Raises MetricsError where metrics.csv is damaged.
    """

    def __init__(self, folder, start=0, source=None, log_freq=1):
        self.folder = Path(folder)
        self.columns = []
        path = Path(source or folder) / "metrics.csv"
        earlier = [row for row in read_metrics(path) if int(row["iteration"]) <= start] if start else []
        self.notes = [f"{path}: {gaps}" for gaps in missing_rows(earlier, start, log_freq)]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not start:
                (self.folder / "log.txt").write_text("")
            if not earlier:
                (self.folder / "metrics.csv").unlink(missing_ok=True)
        except OSError as error:
            raise self._failure(self.folder / "log.txt", error) from error
        if earlier:
            self._rewrite(list(earlier[0]), earlier)

    def say(self, text):
        """Append `text` to log.txt with the time, and print it above the progress bar."""
        self._append("log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        with contextlib.suppress(OSError):  # a terminal that was closed, or `| head`: no reason to end a training
            tqdm.write(text)

    def row(self, values):
        """Append a row to metrics.csv; floats keep nine significant digits, enough for any float32."""
        if not values.keys() <= set(self.columns):
            # A column of before that this version or these flags do not know stays: nothing that was measured is lost.
            columns = [*values, *(name for name in self.columns if name not in values)]
            self._rewrite(columns, list(read_metrics(self.folder / "metrics.csv")))
        cells, line = (values.get(column, "") for column in self.columns), io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(f"{v:.9g}" if isinstance(v, float) else v for v in cells)
        self._append("metrics.csv", line.getvalue())

    def _rewrite(self, columns, rows):
        """Write metrics.csv with these columns and rows, whole or not at all."""
        self.columns = columns
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self.folder / "metrics.csv", text.getvalue().encode())

    def _append(self, name, text):
        # Opened anew each time: what was said is in the file at once, whatever happens to the process next.
        try:
            with open(self.folder / name, "a") as file:
                file.write(text)
        except OSError as error:
            raise self._failure(self.folder / name, error) from error

    @staticmethod
    def _failure(path, error):
        reason = error.strerror or error
        return LogError(f"{path}: could not be written ({reason}); free space there and go on with --resume")


def read_metrics(path):
    """Yield the complete rows of a metrics.csv as dicts of strings; none where there is no file.

    A last line that a crash cut short is no row. Raises MetricsError for a file that is damaged or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        return
    number, last = 1, 0
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader((line for line in file if line.endswith("\n")), strict=True)
            for row in reader:
                number = reader.line_num
                iteration = int(row["iteration"])
                if None in row.values() or None in row:
                    raise ValueError("it has not as many cells as there are columns")
                if iteration <= last:
                    raise ValueError(f"iteration {iteration} follows iteration {last}")
                yield row
                last = iteration
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise _damaged(path, number, error) from error


def missing_rows(rows, start, log_freq):
    """A list with a sentence on the iterations up to `start` of which `rows` should tell and do not, or empty."""
    logged = [0, *(int(row["iteration"]) for row in rows), start + 1]
    gaps = [(before + 1, now - 1) for before, now in itertools.pairwise(logged) if now - before > log_freq]
    if not gaps:
        return []
    named = ", ".join(f"{first} to {last}" for first, last in gaps[:3]) + (", ..." if len(gaps) > 3 else "")
    return [f"the rows of iterations {named} are missing, and no curve will show them"]


def _damaged(path, number, error):
    reason = "it has no column iteration" if isinstance(error, KeyError) else " ".join(str(error).split())
    return MetricsError(f"{path}: line {number} is not of a run's metrics.csv ({reason}); restore it or move it away")


def training_cost(path, last=math.inf):
    """(seconds, iterations, most memory in MB) of a metrics.csv up to iteration `last`; None each that no row tells.
    Raises MetricsError.

    The seconds of an iteration are from asking for its batch to the updated weights: validation, logging, saving and
    starting are not in them. The memory is clock.StepClock's.
    """
    seconds = before = peak = 0
    for row in read_metrics(path):
        if int(row["iteration"]) > last:
            break
        try:
            seconds += (int(row["iteration"]) - before) / float(row["iterations_per_second"])
            peak = max(peak, float(row.get("peak_memory_mb") or 0))
        except (ValueError, KeyError, ZeroDivisionError) as error:
            reason = ValueError("it has no usable iterations_per_second")
            raise _damaged(path, f"of iteration {row['iteration']}", reason) from error
        before = int(row["iteration"])
    return seconds or None, before or None, peak or None


class StopSignals:
    """A context in which Ctrl-C, SIGTERM and SIGHUP only set `received` to the signal's number, for the loop to see.

    SIGHUP is what a terminal that is closed sends; where nohup has the process ignore it, it stays ignored. A second
    Ctrl-C stops at once; a second SIGTERM does not, as a batch system sends it to a process and to its parent, which
    hands it on. Outside the main thread, where Python allows no handlers, signals act as always.
    """

    def __init__(self):
        self.received = None
        self._previous = {}

    def __enter__(self):
        names = ("SIGINT", "SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
        for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number, _):
        if self.received is not None and number == signal.SIGINT:
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

    Ctrl-C and SIGHUP are ignored. SIGTERM, with which Python also ends its workers when it exits, ends a worker as if
    it were done: the loader takes any other end for a crash, at whatever moment it learns of it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
