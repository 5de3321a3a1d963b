"""Training curves of runs, and box plots of their results. Needs Matplotlib."""

import csv
import json
import math
from pathlib import Path

import numpy as np

# Okabe and Ito, "Color Universal Design", 2008: told apart with every kind of colour blindness.
SERIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)), (0, (3, 1)))
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo", "+++", "---")
PANELS = {
    "loss": "loss",
    "supervised_loss": "supervised loss",
    "consistency_dist": "consistency distance",
    "consistency_weight": "consistency weight",
    "lr": "learning rate",
}
SETTINGS = ("consistency_weight", "lr")  # follow from the flags: nothing to smooth


class RunError(ValueError):
    """A run whose curves cannot be drawn; the message is one sentence with the folder and the remedy."""


def read_curves(run):
    """(name, seed, {column: array}) of a run's metrics.csv. Raises RunError."""
    path = Path(run) / "metrics.csv"
    try:
        config = json.loads((Path(run) / "config.json").read_text(encoding="utf-8"))
        name = f"{config['model']}, {config['labelnum']} labels"
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if None not in row.values() and None not in row]
        shown = ["iteration", *(key for key in PANELS if key in rows[0])]
        if len(shown) == 1:
            raise LookupError(f"none of {', '.join(PANELS)} was logged")
        return name, config.get("seed"), {key: np.array([float(row[key]) for row in rows]) for key in shown}
    except (OSError, ValueError, TypeError, LookupError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise RunError(f"{run}: not a run with config.json and metrics.csv ({reason}); give a run's folder") from error


def moving_average(values, window):
    """The mean of the last `window` values up to each; of fewer at the start."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def curves(runs, window=None, width=7.0):
    """Training curves: a panel for each logged quantity that some run has, a colour and line style for each method.

    `runs`: (name, seed, {column: array}) as `read_curves` gives them; runs of one name share colour and legend. Losses
    and distances are moving averages over `window` rows (default: a fiftieth of the longest run), weights and rates
    are not.
    """
    from matplotlib import pyplot as plt

    shown = [name for name in PANELS if any(name in columns for _, _, columns in runs)]
    window = window or max(1, max(len(columns["iteration"]) for _, _, columns in runs) // 50)
    names = list(dict.fromkeys(name for name, _, _ in runs))
    rows = math.ceil((len(shown) + 1) / 2)
    figure, grid = plt.subplots(rows, 2, figsize=(width, 0.3 + 1.9 * rows), squeeze=False, layout="constrained")
    for axes, panel in zip(grid.flat, shown, strict=False):
        for name, _, columns in runs:
            if panel not in columns:
                continue
            style = names.index(name) % len(SERIES)
            several = sum(other == name for other, _, _ in runs) > 1
            axes.plot(
                columns["iteration"],
                columns[panel] if panel in SETTINGS else moving_average(columns[panel], window),
                color=SERIES[style],
                linestyle=DASHES[style],
                linewidth=1.0 if several else 1.4,
                alpha=0.8 if several else 1,
            )
        axes.set_title(PANELS[panel])
        axes.set_xlabel("iteration")
        axes.set_xlim(left=0)
        axes.grid(color="#DDDDDD", linewidth=0.5)
        axes.set_axisbelow(True)
        axes.ticklabel_format(axis="y", scilimits=(-2, 3), useMathText=True, useOffset=False)
        if panel in SETTINGS:
            axes.set_ylim(bottom=0)
    for axes in grid.flat[len(shown) :]:
        axes.axis("off")
    seeds = {name: sum(other == name for other, _, _ in runs) for name in names}
    handles = [
        plt.Line2D([], [], color=SERIES[i % len(SERIES)], linestyle=DASHES[i % len(DASHES)], label=_runs(name, seeds))
        for i, name in enumerate(names)
    ]
    title = f"losses and distances:\nmean of {window} iterations" if window > 1 else None
    grid.flat[len(shown)].legend(
        handles=handles, loc="center", frameon=False, title=title, title_fontsize=8.5, handlelength=3
    )
    return figure


def _runs(name, seeds):
    return f"{name} ({seeds[name]} seeds)" if seeds[name] > 1 else name


def boxes(methods, unit="voxel", width=7.0):
    """Box plots of Dice and HD95 over the cases, a box for each method.

    `methods`: {name: {'dice': values in 0 .. 1, 'hd95': values}}. The box is the quartiles, the line the median, the
    whiskers reach to the last value within 1.5 of the box's length; every case is a dot. NaN is left out and counted.
    """
    from matplotlib import pyplot as plt

    rng = np.random.default_rng(0)
    height = 1.0 + 0.45 * len(methods)
    figure, grid = plt.subplots(1, 2, figsize=(width, height), layout="constrained", sharey=True)
    for axes, (metric, title, scale) in zip(
        grid, (("dice", "Dice (%)", 100), ("hd95", f"HD95 ({unit})", 1)), strict=True
    ):
        for i, (_, values) in enumerate(methods.items()):
            values = scale * np.asarray(values[metric], dtype=float)
            missing = int(np.isnan(values).sum())
            values = values[~np.isnan(values)]
            place = len(methods) - 1 - i
            box = axes.boxplot(
                values,
                positions=[place],
                orientation="horizontal",
                widths=0.55,
                patch_artist=True,
                showfliers=False,
            )
            box["boxes"][0].set(facecolor=SERIES[i % len(SERIES)], alpha=0.45, hatch=HATCHES[i % len(HATCHES)])
            box["medians"][0].set(color="black", linewidth=2)
            jitter = rng.uniform(-0.18, 0.18, len(values))
            axes.plot(values, place + jitter, "o", markersize=2.4, color="black", alpha=0.65, markeredgewidth=0)
            if missing:
                axes.annotate(
                    f"{missing} undefined",
                    (1, place),
                    xycoords=("axes fraction", "data"),
                    ha="right",
                    va="bottom",
                    xytext=(0, 10),
                    textcoords="offset points",
                    fontsize=7.5,
                )
        axes.set_xlabel(title)
        axes.grid(axis="x", color="#DDDDDD", linewidth=0.5)
        axes.set_axisbelow(True)
    grid[0].set_yticks(range(len(methods)), list(methods)[::-1])
    grid[0].set_ylim(-0.6, len(methods) - 0.4)
    counts = sorted({len(np.atleast_1d(values["dice"])) for values in methods.values()})
    grid[0].set_title(f"{' / '.join(map(str, counts))} cases", loc="left", fontsize=8.5)
    return figure
