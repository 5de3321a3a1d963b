"""Where the time of an iteration goes, and the most memory it took."""

import sys
import time

import torch


class StepClock:
    """Take the batches from `batches(loader)`, and call `stepped()` when the weights have been updated; what comes
    after it in an iteration (logging, validation, saving) counts for nothing here. `row()` gives the dict for the log,
    means over the iterations since the last call:

    data_seconds     waiting for the batch: more than a little, and the data loader is what limits the run
    step_seconds     from the batch to the updated weights: copying it to the device, forward and backward passes,
                     optimizer and teacher
    iterations_per_second   1 / (data_seconds + step_seconds)
    peak_memory_mb   in 10^6 bytes; on a GPU what tensors took at most since the last call, on the CPU what the process
                     took at most since it began, without the data workers; left out where the system does not tell

    On a GPU both are measured by events in its queue, read when the next iteration is queued: step_seconds until it has
    done all of a step, data_seconds only that part of the wait in which it had nothing left to do.
    """

    def __init__(self, device="cpu"):
        self.device = torch.device(device)
        self.on_gpu = self.device.type == "cuda"
        self._loaded = self._waited = None
        self._queued = []  # on a GPU, of iterations not yet read: (seconds waited, end of the one before, begin, end)
        self._begin = self._end = None
        self._data = self._step = 0.0
        self._steps = 0

    def batches(self, batches):
        """Yield from `batches`, timing how long each was waited for."""
        asked = time.perf_counter()
        for batch in batches:
            self._loaded = time.perf_counter()
            self._waited = self._loaded - asked
            if self.on_gpu:
                self._begin = self._event()
            yield batch
            asked = time.perf_counter()

    def stepped(self):
        """The weights have been updated, or on a GPU: all that updates them is queued."""
        if self.on_gpu:
            before, self._end = self._end, self._event()
            self._queued.append((self._waited, before, self._begin, self._end))
            if len(self._queued) > 1:
                self._count(*self._read(self._queued.pop(0)))
        else:
            self._count(self._waited, time.perf_counter() - self._loaded)

    def row(self):
        """The dict for the log; {} where there was no iteration since the last call.

        On a GPU the last iteration counts in the next row. The first row, which would have none, has it as well.
        """
        if not self._steps and self._queued:
            self._count(*self._read(self._queued[0]))
        if not self._steps:
            return {}
        row = {"data_seconds": self._data / self._steps, "step_seconds": self._step / self._steps}
        row["iterations_per_second"] = self._steps / (self._data + self._step)
        self._data = self._step = 0.0
        self._steps = 0
        peak = peak_memory(self.device)
        return row if peak is None else {**row, "peak_memory_mb": peak / 1e6}

    def _event(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read(self, queued):
        """(seconds without work for the GPU, seconds of the step) of an iteration, when the GPU has done it."""
        waited, before, begin, end = queued
        end.synchronize()
        idle = waited if before is None else min(waited, before.elapsed_time(begin) / 1e3)
        return idle, begin.elapsed_time(end) / 1e3

    def _count(self, data, step):
        self._data += data
        self._step += step
        self._steps += 1


def peak_memory(device):
    """Bytes: on a GPU the most that tensors held since the last call; on the CPU the process's most so far, or None."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    try:
        import resource
    except ImportError:
        return None  # not a POSIX system
    # Linux counts in units of 1024 bytes, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
