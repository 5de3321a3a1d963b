"""metrics.csv as curves: the columns in it, and progress.png, which a run draws of itself.

Columns are recognised by name: 'iteration', 'lr', 'loss', 'loss_*', '*_loss', 'consistency_dist', 'consistency_weight',
'val_dice*', and 'val_dice*/<class>' of one class, '*_seconds', 'peak_memory_mb', and 'phase', a word; no other is
drawn. Empty cells are passed over.
"""

import io
import math
import re
import time
from array import array
from pathlib import Path

import numpy as np

from mtseg.checkpoint import write_whole
from mtseg.script.runlog import read_metrics

OF_CLASSES = "validation Dice of each class"  # a panel that is drawn where it has a colour for each column
# Panels: title, the columns in it (in full), and how they are drawn.
PANELS = [
    ("loss", r"loss|loss_.*|[^/]*_loss|consistency_dist", "noisy"),
    ("validation Dice", r"val_dice[^/]*", "points"),
    (OF_CLASSES, r"val_dice[^/]*/.*", "points"),
    ("consistency weight", r"consistency_weight", "exact"),
    ("learning rate", r"lr", "exact"),
    ("seconds per iteration", r"[^/]*_seconds", "noisy"),
    ("peak memory (MB)", r"peak_memory_mb", "exact"),
]
# Okabe and Ito, "Color Universal Design", 2008: told apart with every kind of colour blindness.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, YELLOW, BLACK = COLORS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000"),
)
PHASES = {"warm-up": "#BBBBBB", "ramp": YELLOW, "stable": SKY}


def panels_of(columns):
    """[(title, names of the columns in it, how)] of the PANELS for which there are columns, in the columns' order."""
    panels = [(title, [name for name in columns if re.fullmatch(pattern, name)], how) for title, pattern, how in PANELS]
    return [panel for panel in panels if panel[1] and (panel[0] != OF_CLASSES or len(panel[1]) <= len(COLORS))]


def draw_progress(folder):
    """Draw `<folder>/metrics.csv` into `<folder>/progress.png`, whole or not at all; nothing where there are no rows.

    One panel each for losses, validation Dice, consistency weight, learning rate, time and memory, as far as there are
    numbers; noisy curves pale, with their running mean over a fiftieth of the run. The phases of training (column
    'phase': warm-up, ramp, stable) are the background. Raises ImportError without Matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder = Path(folder)
    columns, phases = read_columns(folder / "metrics.csv")
    panels = panels_of(columns)
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
            axes.legend(handles=axes.get_legend_handles_labels()[0][-len(names) :], loc="best", fontsize=8)
    if phases:
        shades = {patch.get_label(): patch for patch in axes.patches}
        figure.legend(handles=list(shades.values()), loc="outside lower center", ncols=3, fontsize=8)
    written = time.strftime("%Y-%m-%d %H:%M")
    figure.suptitle(f"{folder.parent.name}/{folder.name}: iteration {last}, {written}", fontsize=11)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    write_whole(folder / "progress.png", picture.getbuffer())


def read_columns(path):
    """({column: (iterations, numbers)}, [[first iteration, last iteration, phase]]) of a metrics.csv.

    The latter has one entry for each stretch of rows with the same word under 'phase'. Numbers are in arrays of eight
    bytes each. Raises MetricsError.
    """
    columns, stretches = {}, []
    for row in read_metrics(path):
        iteration, phase = int(row["iteration"]), row.get("phase")
        for name, value in row.items():
            number = number_in(value)
            if name != "iteration" and number is not None and math.isfinite(number):
                iterations, numbers = columns.setdefault(name, (array("d"), array("d")))
                iterations.append(iteration)
                numbers.append(number)
        if stretches:
            stretches[-1][1] = iteration
        if phase and (not stretches or stretches[-1][2] != phase):
            stretches.append([iteration, iteration, phase])
    return columns, stretches


def number_in(value):
    """`value` as a float, None where it is none: a word, an empty cell."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def literal(text):
    """`text` so that Matplotlib takes it for text: what stands between two $ would be a formula."""
    return str(text).replace("$", r"\$")


def moving_average(values, window):
    """The mean of the last `window` values up to each; of fewer at the start."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def _curve(axes, name, points, how, **style):
    """Draw `points`, (iterations, values): 'points', 'exact', or 'noisy', which is pale below its running mean."""
    iterations, values = map(np.asarray, points)
    window = len(values) // 50
    name = literal(name.removeprefix("val_dice").lstrip("_/") if "/" in name else name)
    if how == "points":
        axes.plot(iterations, values, marker="o", markersize=3, label=f"{name} (now {values[-1]:.3f})", **style)
    elif how == "exact" or window < 2:
        axes.plot(*thinned(iterations, values), label=name, **style)
    else:
        axes.plot(*thinned(iterations, values), **{**style, "linewidth": 0.6, "alpha": 0.25})
        axes.plot(*thinned(iterations, moving_average(values, window)), label=name, **style)


def thinned(iterations, values, stretches=500):
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
