"""What a run shows while it goes: progress.png, TensorBoard, Weights & Biases, and where time and memory go.

metrics.csv is the truth, a row per logged iteration (runlog.RunLog writes it); all else here is a view of it. A resumed
run makes its views anew from the rows up to the iteration it goes on from, so no iteration stands in them twice. Once
training has begun, no view can end it: one that fails is given up in one line.

Columns are recognised by name: 'iteration', 'lr', 'loss', 'loss_*', '*_loss', 'consistency_dist', 'consistency_weight',
'val_dice*', '*_seconds', 'peak_memory_mb', and 'phase', a word. Every other column with numbers goes to TensorBoard and
Weights & Biases, but not into the picture. Empty cells are passed over.
"""

import csv
import gc
import math
import os
import re
import secrets
import shutil
import sys
import time
from array import array
from pathlib import Path

import numpy as np
import torch

# Panels of progress.png: title, the columns in it (in full), and how they are drawn.
PANELS = [
    ("loss", r"loss|loss_.*|.*_loss|consistency_dist", "noisy"),
    ("validation Dice", r"val_dice.*", "points"),
    ("consistency weight", r"consistency_weight", "exact"),
    ("learning rate", r"lr", "exact"),
    ("seconds per iteration", r".*_seconds", "noisy"),
    ("peak memory (MB)", r"peak_memory_mb", "exact"),
]
# Okabe and Ito's colours, told apart by colour-blind readers too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PHASES = {"warm-up": "#BBBBBB", "ramp": "#F0E442", "stable": "#56B4E9"}


class MonitorError(ValueError):
    """A view that was asked for and cannot be had; the message is one sentence with the remedy."""


def check_extras(tensorboard=False, wandb=None):
    """MonitorError where a package that these flags need is missing, or Weights & Biases online knows no user.

    Call it before anything is written. `wandb`: None, 'offline' or 'online'.
    """
    if tensorboard:
        _import_tensorboard()
    if wandb == "online":
        try:
            known = _import_wandb().login()
        except Exception as error:
            raise MonitorError(f"--wandb online: {_line(error)}; run `wandb login`, or take --wandb offline") from error
        if not known:
            raise MonitorError("--wandb online: nobody is logged in; run `wandb login`, or take --wandb offline")
    elif wandb:
        _import_wandb()


class Monitor:
    """Takes each row that metrics.csv gets, and keeps the views of it in the run's `folder` up to date.

    progress.png: redrawn, where Matplotlib is installed, no oftener than every `seconds` (None: never), and so seldom
    that it takes at most 2 % of the time. `tensorboard`: event files in `<folder>/tensorboard`. `wandb`: 'offline' (no
    network is touched; `wandb sync` uploads later) or 'online'; `config` goes there as the run's settings.

    `start`: the iteration training goes on from; 0 begins everything anew. `say`: called with one line on each view
    that fails. Raises MonitorError only here, where a view that was asked for cannot begin.
    """

    def __init__(self, folder, start=0, say=print, tensorboard=False, wandb=None, config=None, seconds=60):
        self.folder = Path(folder)
        self.say = say
        self.seconds = seconds
        self.draw_next = time.monotonic() + (seconds or 0)
        self.picture_works = seconds is not None
        self.views = {}
        if not start:
            (self.folder / "progress.png").unlink(missing_ok=True)
        try:
            if tensorboard:
                self.views["TensorBoard"] = _TensorBoard(self.folder / "tensorboard")
            if wandb:
                self.views["Weights & Biases"] = _WeightsAndBiases(self.folder, start, wandb, config)
        except MonitorError:
            raise
        except Exception as error:
            flag = "--tensorboard" if tensorboard and not self.views else f"--wandb {wandb}"
            raise MonitorError(f"{self.folder}: {flag} could not begin ({_line(error)}); go on without it") from error
        for row in _read(self.folder / "metrics.csv") if start and self.views else ():
            if int(row["iteration"]) <= start:
                self._show(row)

    def row(self, values):
        """Show `values`, the dict that RunLog.row has just written: 'iteration' and anything else."""
        self._show(values)
        if time.monotonic() >= self.draw_next:
            self._draw()

    def close(self):
        """Draw the last picture and write out what is still held back."""
        self._draw()
        for name in list(self.views):
            self._try(name, self.views[name].close)

    def _show(self, values):
        numbers = {name: _number(value) for name, value in values.items() if name != "iteration"}
        numbers = {name: value for name, value in numbers.items() if value is not None}
        for name in list(self.views):
            self._try(name, self.views[name].row, numbers, int(values["iteration"]))

    def _try(self, name, function, *arguments):
        try:
            function(*arguments)
        except Exception as error:  # whatever it is, the training is worth more than the view
            del self.views[name]
            self.say(f"{name} failed and is given up ({_line(error)}); metrics.csv holds everything")

    def _draw(self):
        if not self.picture_works:
            return
        began = time.monotonic()
        try:
            draw_progress(self.folder)
        except ImportError:
            self.picture_works = False
            self.say("progress.png is not drawn without Matplotlib: pip install matplotlib")
        except Exception as error:
            self.picture_works = False
            self.say(f"progress.png failed and is given up ({_line(error)}); metrics.csv holds everything")
        # Matplotlib's objects refer to each other in circles: left to Python's own rounds, several pictures lie in
        # memory at a time, and later blocks between them keep it from being one piece again.
        gc.collect()
        now = time.monotonic()
        self.draw_next = now + max(self.seconds, 49 * (now - began))


def draw_progress(folder):
    """Draw `<folder>/metrics.csv` into `<folder>/progress.png`, whole or not at all; nothing where there are no rows.

    One panel each for losses, validation Dice, consistency weight, learning rate, time and memory, as far as there are
    numbers; noisy curves pale, with their running mean over a fiftieth of the run. The phases of training (column
    'phase': warm-up, ramp, stable) are the background. Raises ImportError without Matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder = Path(folder)
    columns, phases = _read_columns(folder / "metrics.csv")
    panels = [(title, [name for name in columns if re.fullmatch(pattern, name)], how) for title, pattern, how in PANELS]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return

    # No pyplot: its state is the whole process's, and it asks for a display.
    height = (len(panels) + 1) // 2
    figure = Figure(figsize=(12, 0.6 + 2.9 * height), layout="constrained")
    FigureCanvasAgg(figure)
    first = int(min(iterations[0] for iterations, _ in columns.values()))
    last = int(max(iterations[-1] for iterations, _ in columns.values()))
    for number, (title, names, how) in enumerate(panels, start=1):
        axes = figure.add_subplot(height, 2, number)
        for begin, end, phase in phases:
            axes.axvspan(begin, end, color=PHASES.get(phase, "white"), alpha=0.22, linewidth=0, label=phase)
        for place, name in enumerate(names):
            # The total is wide, so that it stays visible below the parts that make it up.
            style = {"color": COLORS[place % len(COLORS)], "linewidth": 2.8 if name == "loss" else 1.3}
            _curve(axes, name, columns[name], how, **style)
        low = min(min(columns[name][1]) for name in names)
        if title == "loss" and low > 0:
            axes.set_yscale("log")
        else:
            top = max(max(columns[name][1]) for name in names)
            axes.set_ylim(min(0, low), 1 if how == "points" else 1.08 * top if top > 0 else 1)
        axes.set_title(title, fontsize=10)
        axes.set_xlim(first, max(last, first + 1))
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
        if len(names) > 1 or how == "points":
            place = "lower left" if title == "loss" else "best"
            axes.legend(handles=axes.get_legend_handles_labels()[0][-len(names) :], loc=place, fontsize=8)
    if phases:
        shades = {patch.get_label(): patch for patch in axes.patches}
        figure.legend(handles=list(shades.values()), loc="outside lower center", ncols=3, fontsize=8)
    written = time.strftime("%Y-%m-%d %H:%M")
    figure.suptitle(f"{folder.parent.name}/{folder.name}: iteration {last}, {written}", fontsize=11)
    temporary = folder / ".progress.png.tmp"
    figure.savefig(temporary, format="png", dpi=100)
    os.replace(temporary, folder / "progress.png")


class StepClock:
    """Where the time of an iteration goes, and the most memory it took.

    Take the batches from `batches(loader)`, and call `stepped()` when the weights have been updated; what comes after
    it in an iteration (logging, validation, saving) counts for neither. `row()` gives the dict for the log, means over
    the iterations since the last call:

    data_seconds     waiting for the batch: more than a little, and the data loader is what limits the run
    step_seconds     from the batch to the updated weights
    iterations_per_second   what both allow
    peak_memory_mb   in 10^6 bytes; on a GPU what tensors took at most since the last call, on the CPU what the process
                     took at most since it began, without the data workers; left out where the system does not tell

    The GPU is never waited for: its work is counted where the script itself waits for it, as it does for the loss.
    """

    def __init__(self, device="cpu"):
        self.device = torch.device(device)
        self._loaded = None
        self._data = self._step = 0.0
        self._steps = 0

    def batches(self, batches):
        """Yield from `batches`, timing how long each was waited for."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._loaded = time.perf_counter()
            self._data += self._loaded - asked
            yield batch

    def stepped(self):
        """The weights have been updated."""
        self._step += time.perf_counter() - self._loaded
        self._steps += 1

    def row(self):
        """The dict for the log; {} where there was no iteration since the last call."""
        if not self._steps:
            return {}
        row = {"data_seconds": self._data / self._steps, "step_seconds": self._step / self._steps}
        row["iterations_per_second"] = self._steps / (self._data + self._step)
        self._data = self._step = 0.0
        self._steps = 0
        peak = peak_memory(self.device)
        return row if peak is None else {**row, "peak_memory_mb": peak / 1e6}


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


class _TensorBoard:
    """Event files in `folder`, begun anew: a scalar per column, under the column's name."""

    def __init__(self, folder):
        writer = _import_tensorboard()
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self.writer = writer(str(folder), flush_secs=30)

    def row(self, numbers, iteration):
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, iteration)

    def close(self):
        self.writer.close()


class _WeightsAndBiases:
    """One run of project 'mtseg', of the same id however often training is resumed: what came before is replaced."""

    def __init__(self, folder, start, mode, config):
        wandb = _import_wandb()
        name = folder / "wandb_id"
        if not start or not name.is_file():
            name.write_text(secrets.token_hex(4) + "\n")
        for old in (folder / "wandb").glob("offline-run-*"):
            shutil.rmtree(old)
        # Rows and settings are sent, nothing else: no console, no code or its repository, no packages, no machine.
        off = ("disable_code", "disable_git", "x_disable_machine_info", "x_disable_meta", "x_disable_stats")
        settings = wandb.Settings(console="off", silent=True, x_save_requirements=False, **dict.fromkeys(off, True))
        self.run = wandb.init(
            project="mtseg",
            name=f"{folder.parent.name}/{folder.name}",
            id=name.read_text().strip(),
            dir=str(folder),
            mode=mode,
            config=config,
            settings=settings,
        )

    def row(self, numbers, iteration):
        self.run.log(numbers, step=iteration, commit=True)

    def close(self):
        self.run.finish()


def _import_tensorboard():
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MonitorError(f"--tensorboard needs TensorBoard ({_line(error)}): pip install tensorboard") from error
    return SummaryWriter


def _import_wandb():
    # It reports how it is used over the network otherwise, in offline mode too, and waits for it at the end.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb

        wandb.init, wandb.Settings  # noqa: B018  a folder of that name, as every run leaves one, imports too
    except (ImportError, AttributeError) as error:
        raise MonitorError(f"--wandb needs Weights & Biases ({_line(error)}): pip install wandb") from error
    return wandb


def _read(path):
    """Yield the complete rows of a metrics.csv as dicts of strings; none where there is no file."""
    if not path.is_file():
        return
    with open(path, newline="") as file:
        for row in csv.DictReader(line for line in file if line.endswith("\n")):
            if None not in row.values() and None not in row:
                yield row


def _read_columns(path):
    """({column: (iterations, numbers)}, [[first iteration, last iteration, phase]]) of a metrics.csv.

    The latter has one entry for each stretch of rows with the same word under 'phase'. Numbers are in arrays of eight
    bytes each.
    """
    columns, stretches = {}, []
    for row in _read(path):
        iteration, phase = int(row["iteration"]), row.get("phase")
        for name, value in row.items():
            number = _number(value)
            if name != "iteration" and number is not None and math.isfinite(number):
                iterations, numbers = columns.setdefault(name, (array("d"), array("d")))
                iterations.append(iteration)
                numbers.append(number)
        if stretches:
            stretches[-1][1] = iteration
        if phase and (not stretches or stretches[-1][2] != phase):
            stretches.append([iteration, iteration, phase])
    return columns, stretches


def _number(value):
    """`value` as a float, None where it is none: a word, an empty cell."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _curve(axes, name, points, how, **style):
    """Draw `points`, (iterations, values): 'points', 'exact', or 'noisy', which is pale below its running mean."""
    iterations, values = map(np.asarray, points)
    window = len(values) // 50
    if how == "points":
        axes.plot(iterations, values, marker="o", markersize=3, label=f"{name} (now {values[-1]:.3f})", **style)
    elif how == "exact" or window < 2:
        axes.plot(*_thinned(iterations, values), label=name, **style)
    else:
        axes.plot(*_thinned(iterations, values), **{**style, "linewidth": 0.6, "alpha": 0.25})
        sums = np.cumsum(np.concatenate(([0.0], values)))
        means = (sums[window:] - sums[:-window]) / window
        axes.plot(*_thinned(iterations[window - 1 :], means), label=name, **style)


def _thinned(iterations, values, stretches=500):
    """Of each of so many stretches of a curve the lowest and the highest point: a panel has no more columns of pixels.

    Drawn in full, the curves of a longer run would take more memory and time with every iteration.
    """
    if len(values) <= 2 * stretches:
        return iterations, values
    begins = np.linspace(0, len(values), stretches, endpoint=False).astype(int)
    ends = np.append(begins[1:], len(values))
    lows = [begin + values[begin:end].argmin() for begin, end in zip(begins, ends, strict=True)]
    highs = [begin + values[begin:end].argmax() for begin, end in zip(begins, ends, strict=True)]
    # The last point too: where the curve ends is what a reader looks for.
    kept = np.unique([0, *lows, *highs, len(values) - 1])
    return iterations[kept], values[kept]


def _line(error):
    """The first line of an error's message, for a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
