"""Curves of Dice against labels, of a simulation of active learning. Needs Matplotlib."""

import textwrap

import numpy as np

from mtseg.active.results import finished
from mtseg.figures.canvas import FigureError, subplots
from mtseg.figures.runs import DASHES, MARKERS, SERIES

LABELS = {"regions": "annotated regions", "voxels": "annotated voxels", "foreground": "annotated foreground voxels"}


def label_curves(records, ceiling=()):
    """Test Dice against labels, a panel for each of LABELS.

    `records`: as active.results has them; `ceiling`: Dice with all labels, of a seed each. A point is the mean over the
    seeds at a round, its bar their deviation. FigureError where no seed is finished by all strategies.
    """
    from matplotlib.ticker import EngFormatter

    runs, notes = finished(records)
    if not runs:
        raise FigureError("no seed is finished by all strategies; go on with the simulation")
    beside = max(1, min(4, 105 // (8 + max(map(len, runs)))))  # in the legend, as wide as the figure
    figure, (panels,) = subplots(1, len(LABELS), 2.8 + 0.18 * (len(runs) // beside + 1), sharey=True)
    for axes, measure in zip(panels, LABELS, strict=True):
        if len(ceiling):
            axes.axhline(100 * np.mean(ceiling), color="#555555", linestyle="--", linewidth=1, label="all labels")
        for i, (name, run) in enumerate(runs.items()):
            dice = 100 * run["dice"]
            bars = dice.std(axis=0, ddof=1) if len(dice) > 1 else None
            # The ninth has the first one's colour, and another dash.
            style = {"color": SERIES[i % 8], "linestyle": DASHES[(i + i // 8) % 8], **MARKERS[i % 4], "markersize": 3.5}
            style |= {"linewidth": 1.2, "elinewidth": 0.7, "capsize": 2, "label": name}
            axes.errorbar(run[measure].mean(axis=0), dice.mean(axis=0), bars, **style)
        axes.set(xlabel=LABELS[measure])
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(color="#DDDDDD", linewidth=0.5)
        axes.set_axisbelow(True)
    panels[0].set_ylabel("Dice (%)")
    handles, names = panels[0].get_legend_handles_labels()
    title = "\n".join(line for note in notes for line in textwrap.wrap(note, 110))
    how = {"loc": "outside lower center", "ncols": beside, "frameon": False, "handlelength": 3, "title_fontsize": 7.5}
    figure.legend(handles, names, title=title, **how)
    return figure
