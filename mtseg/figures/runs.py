"""Training curves of runs, and box plots of their results. Needs Matplotlib."""

import math
import re
from pathlib import Path

import numpy as np

from mtseg.figures.canvas import FigureError, subplots
from mtseg.report.rows import OF_FOLD, frozen, settings_to_compare, tell_apart
from mtseg.script import progress
from mtseg.script.flags import read_config
from mtseg.script.progress import moving_average, panels_of, read_columns, thinned

# A colour, a dash and a hatch for each method.
SERIES = (progress.BLUE, progress.ORANGE, progress.GREEN, progress.PURPLE)
SERIES += (progress.SKY, progress.VERMILION, "#999999", progress.BLACK)
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)), (0, (3, 1)))
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo", "+++", "---")
MARKERS = ({"marker": "o"}, {"marker": "o", "fillstyle": "none"}, {"marker": "s"}, {"marker": "s", "fillstyle": "none"})
NOT_DRAWN = (progress.OF_CLASSES, "seconds per iteration", "peak memory (MB)")  # of the panels of progress.png


def find_runs(paths):
    """The folders of the runs at or under `paths`, each once; FigureError where one of them has none."""
    runs = {}
    for path in map(Path, paths):
        configs = sorted(path.rglob("config.json"))
        if not configs:
            raise FigureError(f"{path}: no run with a config.json there; give runs' folders, or folders above them")
        runs |= {config.parent.resolve(): config.parent for config in configs}
    return list(runs.values())


def read_runs(runs):
    """[(name, seed, {column: (iterations, values)})] of the folders of `runs`, for `curves`.

    Runs that differ in seed and fold alone have one name; others of one method, number of labels and --labeled_draw are
    told apart by the settings in which they differ. Raises FigureError, FlagError for a damaged config.json, and
    MetricsError.
    """
    configs = [read_config(Path(run) / "config.json") for run in runs]
    columns = [read_columns(Path(run) / "metrics.csv")[0] for run in runs]
    for run, config, column in zip(runs, configs, columns, strict=True):
        if not {"model", "labelnum"} <= config.keys() or not panels_of(column):
            raise FigureError(f"{run}: not a run with config.json and metrics.csv; give a run that has begun")
    several = len({config.get("dataset_name") for config in configs}) > 1
    groups = {}
    for number, config in enumerate(configs):
        name = f"{config['model']}, {config['labelnum']} labels"
        name += f", labeled_draw {config['labeled_draw']}" if config.get("labeled_draw") else ""
        groups.setdefault(f"{name}, {config.get('dataset_name')}" if several else name, []).append(number)
    names = {}
    for name, members in groups.items():
        compared = settings_to_compare([configs[number] for number in members])
        alike = {}
        for number in members:
            of_fold = OF_FOLD if configs[number].get("fold") is not None else set()
            settings = {setting: configs[number].get(setting) for setting in compared - of_fold}
            alike.setdefault(frozen(settings), []).append(number)
        words = tell_apart([configs[same[0]] for same in alike.values()]) if len(alike) > 1 else [""]
        names |= {number: name + w for w, same in zip(words, alike.values(), strict=True) for number in same}
    return [(names[n], config.get("seed"), columns[n]) for n, config in enumerate(configs)]


def curves(runs):
    """Training curves: a panel for each loss and logged setting that some run has, one for the validation Dice of all
    its networks; a colour and line style for each method.

    `runs`: (name, seed, {column: (iterations, values)}) as `read_runs` gives them; runs of one name share colour and
    legend. Losses and distances are moving averages over a fiftieth of the longest run's rows.
    """
    from matplotlib import pyplot as plt

    panels, logged = [], dict.fromkeys(column for _, _, columns in runs for column in columns)
    for title, shown, how in panels_of(logged):
        if title not in NOT_DRAWN:
            panels += [(_title(column), [column], how) for column in shown] if how == "noisy" else [(title, shown, how)]
    longest = max(len(columns[c][0]) for _, _, columns in runs for _, shown, _ in panels for c in shown if c in columns)
    window = max(1, longest // 50)
    names = list(dict.fromkeys(name for name, _, _ in runs))
    styles = {name: {"color": SERIES[i % 8], "linestyle": DASHES[i % 8]} for i, name in enumerate(names)}
    networks = dict.fromkeys(_network(column) for column in logged if re.fullmatch("val_dice[^/]*", column))
    marks_of = {network: MARKERS[number % len(MARKERS)] for number, network in enumerate(networks)}
    rows = math.ceil((len(panels) + 1) / 2)
    figure, grid = subplots(rows, 2, 0.3 + 1.9 * rows)
    for axes, (title, shown, how) in zip(grid.flat, panels, strict=False):
        for name, _, columns in runs:
            several = sum(other == name for other, _, _ in runs) > 1
            style = styles[name] | ({"linewidth": 1.0, "alpha": 0.8} if several else {"linewidth": 1.4})
            for column in (column for column in shown if column in columns):
                iterations, values = map(np.asarray, columns[column])
                # A column with a number now and then, a loss on other cases, is no average.
                values = moving_average(values, min(window, max(len(values) // 50, 1))) if how == "noisy" else values
                marks = marks_of[_network(column)] | {"markersize": 3.5} if how == "points" else {}
                axes.plot(*thinned(iterations, values), **style, **marks)
        axes.set(title=title, xlabel="iteration", xlim=(0, None))
        axes.grid(color="#DDDDDD", linewidth=0.5)
        axes.set_axisbelow(True)
        axes.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=True, useOffset=False)
        if how == "exact":
            axes.set_ylim(bottom=0)
        if how == "points" and len(marks_of) > 1:
            grey = {"color": "#555555", "linestyle": "none", "markersize": 3.5}
            keys = [plt.Line2D([], [], label=network, **grey, **marks) for network, marks in marks_of.items()]
            axes.legend(handles=keys, fontsize=7.5, loc="best")
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    handles = [plt.Line2D([], [], label=_with_seeds(name, runs), **styles[name]) for name in names]
    title = f"losses and distances:\nmean of {window} rows of metrics.csv" if window > 1 else None
    grid.flat[len(panels)].legend(
        handles=handles, loc="center", frameon=False, title=title, title_fontsize=8.5, handlelength=3
    )
    return figure


def _title(column):
    if column.startswith("loss_"):
        return f"loss: {column.removeprefix('loss_')}"
    return {"consistency_dist": "consistency distance"}.get(column, column.replace("_", " "))


def _network(column):
    """Whose validation Dice a column holds: a run with one network does not name it."""
    return column.removeprefix("val_dice").strip("_") or "student"


def _with_seeds(name, runs):
    """`name`, and how many seeds its runs have; runs of one seed are no seeds more."""
    seeds = [seed for other, seed, _ in runs if other == name]
    kind = "seeds" if len(set(seeds)) == len(seeds) else "runs"
    return f"{name} ({len(seeds)} {kind})" if len(seeds) > 1 else name


def boxes_of(rows):
    """The figure `boxes` of rows of a report, which have one unit: their marks stand behind their names, and beneath
    it what is wrong with their own figures."""
    sets = len({row.dataset for row in rows if "set" in row.results[0].cases[0]}) > 1
    names = [f"{row.dataset}: {row.title}{row.mark}" if sets else row.title + row.mark for row in rows]
    values = [{metric: list(row.per_case(metric).values()) for metric in ("dice", "hd95")} for row in rows]
    notes = {f"{row.mark} {'; '.join(row.faults)}": None for row in rows if row.faults}
    several = any(len(row.classes()) > 1 for row in rows)
    return boxes(dict(zip(names, values, strict=True)), rows[0].unit, "mean " if several else "", "  ".join(notes))


def boxes(methods, unit="voxel", mean="", note=""):
    """Box plots of Dice and HD95 over the cases, a box for each method.

    `methods`: {name: {'dice': values in 0 .. 1, 'hd95': values}}. The box is the quartiles, the line the median, the
    whiskers reach to the last value within 1.5 of the box's length; every case is a dot. NaN is left out and counted.
    `mean`: before the names of the metrics, such as 'mean '; `note`: a sentence beneath.
    """
    rng = np.random.default_rng(0)
    height = 1.0 + 0.45 * len(methods) + (0.2 if note else 0)
    figure, (grid,) = subplots(1, 2, height, sharey=True)
    metrics = (("dice", f"{mean}Dice (%)", 100), ("hd95", f"{mean}HD95 ({unit})", 1))
    for axes, (metric, title, scale) in zip(grid, metrics, strict=True):
        for i, values in enumerate(methods.values()):
            values = scale * np.asarray(values[metric], dtype=float)
            missing = int(np.isnan(values).sum())
            values = values[~np.isnan(values)]
            place = len(methods) - 1 - i
            style = {"orientation": "horizontal", "widths": 0.55, "patch_artist": True, "showfliers": False}
            box = axes.boxplot(values, positions=[place], **style)
            box["boxes"][0].set(facecolor=SERIES[i % len(SERIES)], alpha=0.45, hatch=HATCHES[i % len(HATCHES)])
            box["medians"][0].set(color="black", linewidth=2)
            jitter = rng.uniform(-0.18, 0.18, len(values))
            axes.plot(values, place + jitter, "o", markersize=2.4, color="black", alpha=0.65, markeredgewidth=0)
            if missing:
                beside = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "bottom", "fontsize": 7.5}
                axes.text(1, place + 0.3, f"{missing} undefined", **beside)
        if all(np.isnan(values[metric]).all() for values in methods.values()):
            axes.set_xticks([])
        axes.set_xlabel(title)
        axes.grid(axis="x", color="#DDDDDD", linewidth=0.5)
        axes.set_axisbelow(True)
    grid[0].set_yticks(range(len(methods)), list(methods)[::-1])
    grid[0].set_ylim(-0.6, len(methods) - 0.4)
    counts = sorted({len(np.atleast_1d(values["dice"])) for values in methods.values()})
    grid[0].set_title(f"{' / '.join(map(str, counts))} cases", loc="left", fontsize=8.5)
    figure.supxlabel(note, fontsize=7.5)
    return figure
