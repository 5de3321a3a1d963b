"""Slices of cases: image, label and prediction as contours, errors in colour and hatched. Needs Matplotlib.

A case is a dict of arrays (W, H, D): 'image', 'label', 'prediction'. `spacing` is the size of a voxel, `width` that of
the figure in inches. Each function returns a Matplotlib figure, or draws on the axes it is given.
"""

import math

import numpy as np
from scipy import ndimage

# Okabe and Ito, "Color Universal Design", 2008: told apart with every kind of colour blindness.
ORANGE, SKY, YELLOW, BLUE, PURPLE = "#E69F00", "#56B4E9", "#F0E442", "#0072B2", "#CC79A7"
AXES = ("x", "y", "z")  # of the array: what they are in the body, the files do not say


def largest_section(label):
    """(x, y, z): along each axis the slice in which the mask `label` has most voxels; the middle of an empty mask."""
    label = np.asarray(label) > 0
    if not label.any():
        return tuple(side // 2 for side in label.shape)
    others = ((1, 2), (0, 2), (0, 1))
    return tuple(int(label.sum(axis=axes).argmax()) for axes in others)


def worst_error(label, prediction, spacing=(1, 1, 1)):
    """(x, y, z) of the error voxel that lies farthest from where it would be right; None where there is no error.

    A voxel predicted in vain counts its distance to the label, a missed one its distance to the prediction; where that
    mask is empty, its depth in the other.
    """
    label, prediction = np.asarray(label) > 0, np.asarray(prediction) > 0
    depth = np.zeros(label.shape)
    for mask, other in ((label, prediction), (prediction, label)):
        wrong = mask & ~other
        if wrong.any():
            distance = ndimage.distance_transform_edt(~other if other.any() else mask, sampling=spacing)
            depth[wrong] = distance[wrong]
    return tuple(int(i) for i in np.unravel_index(depth.argmax(), depth.shape)) if depth.any() else None


def draw_slice(axes, case, axis, index, spacing=(1, 1, 1), prediction=True):
    """Slice `index` across `axis` of a case on the Matplotlib `axes`: the image, the label's contour (solid), that of
    the prediction (dashed), and between them what is missed (dotted) and what is too much (hatched)."""

    from matplotlib.patheffects import withStroke

    def cut(name):
        return np.take(case[name], index, axis=axis).T

    image, label = cut("image"), cut("label")
    low, high = np.percentile(case["image"], [1, 99.5])
    rest = [side for number, side in enumerate(spacing) if number != axis]
    axes.imshow(image, cmap="gray", vmin=low, vmax=high, origin="lower", aspect=rest[1] / rest[0])
    outlines = [("label", SKY, "-", 1.6)]
    if prediction:
        predicted = cut("prediction")
        errors = (((label > 0) & (predicted == 0), BLUE, "...."), ((predicted > 0) & (label == 0), YELLOW, "////"))
        errors += (((label > 0) & (predicted > 0) & (label != predicted), PURPLE, "xxxx"),)
        for mask, colour, hatch in errors:
            if mask.any():
                axes.contourf(mask, levels=[0.5, 1.5], colors=[colour], alpha=0.45, hatches=[hatch])
        outlines.append(("prediction", ORANGE, (0, (3, 1.5)), 1.6))
    for name, colour, dash, width in outlines:
        mask = cut(name)
        for value in np.unique(mask[mask > 0]):
            drawn = axes.contour(mask == value, levels=[0.5], colors=[colour], linestyles=[dash], linewidths=width)
            # In grey print both colours are as light as the blood around them: a dark edge keeps the lines visible.
            drawn.set_path_effects([withStroke(linewidth=width + 1.2, foreground="black")])
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def slice_legend(several_classes=False):
    """The handles of a legend for `draw_slice`."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Line2D([], [], color=SKY, linewidth=1.8, label="label"),
        Line2D([], [], color=ORANGE, linewidth=1.8, linestyle=(0, (3, 1.5)), label="prediction"),
        Patch(facecolor=BLUE, alpha=0.6, hatch="....", edgecolor="black", linewidth=0, label="missed"),
        Patch(facecolor=YELLOW, alpha=0.6, hatch="////", edgecolor="black", linewidth=0, label="too much"),
    ]
    wrong = Patch(facecolor=PURPLE, alpha=0.6, hatch="xxxx", edgecolor="black", linewidth=0, label="wrong class")
    return [*handles, wrong] if several_classes else handles


def legend_below(figure, several_classes=False):
    handles = slice_legend(several_classes)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, handlelength=2.2)


def overlay(case, caption="", spacing=(1, 1, 1), width=7.0):
    """Three orthogonal slices through the label's largest section, and three through the worst error.

    `case`: dict of arrays (W, H, D) 'image', 'label', 'prediction'. `caption`: a line above, such as case and metrics.
    """
    from matplotlib import pyplot as plt

    places = {"largest section": largest_section(case["label"])}
    worst = worst_error(case["label"], case["prediction"], spacing)
    if worst is not None:
        places["worst error"] = worst
    shape = np.array(case["label"].shape) * spacing
    widths = (shape[1], shape[0], shape[0])
    tallest = max(shape[2], shape[1])
    height = 0.7 + len(places) * (0.2 + 0.96 * width * tallest / sum(widths))
    figure, grid = plt.subplots(
        len(places), 3, figsize=(width, height), squeeze=False, layout="constrained", width_ratios=widths
    )
    for row, (name, place) in zip(grid, places.items(), strict=True):
        for axis, axes in enumerate(row):
            draw_slice(axes, case, axis, place[axis], spacing)
            axes.set_title(f"{AXES[axis]} = {place[axis]}")
        row[0].set_ylabel(name)
    figure.suptitle(caption, fontsize=10)
    legend_below(figure, len(np.unique(case["label"])) > 2)
    return figure


def compare(cases, captions=None, spacing=(1, 1, 1), width=7.0):
    """The same case under several methods, a column each, and its label in the last: three slices, a row each.

    `cases`: {method: case} with the same image and label. `captions`: {method: text}, such as Dice and HD95. The slices
    are those of the label's largest section.
    """
    from matplotlib import pyplot as plt

    first = next(iter(cases.values()))
    place = largest_section(first["label"])
    shape = np.array(first["label"].shape) * spacing
    heights = (shape[2], shape[2], shape[1])
    widest = max(shape[0], shape[1])
    columns = len(cases) + 1
    height = 0.9 + width / columns * sum(heights) / widest
    figure, grid = plt.subplots(
        3, columns, figsize=(width, height), squeeze=False, layout="constrained", height_ratios=heights
    )
    for column, (name, case) in enumerate([*cases.items(), ("label", first)]):
        for axis in range(3):
            draw_slice(grid[axis, column], case, axis, place[axis], spacing, prediction=column < len(cases))
            if column == 0:
                grid[axis, 0].set_ylabel(f"{AXES[axis]} = {place[axis]}")
        caption = (captions or {}).get(name, "") if column < len(cases) else ""
        grid[0, column].set_title(f"{name}\n{caption}" if captions else name)
    legend_below(figure, len(np.unique(first["label"])) > 2)
    return figure


def gallery(cases, spacing=(1, 1, 1), width=7.0):
    """Of each case the slice across z in which most voxels are wrong.

    `cases`: a list of (caption, name, case), such as the best, the median and the worst, drawn four in a row; the last
    place is the legend's.
    """
    from matplotlib import pyplot as plt

    columns = 4
    rows = math.ceil((len(cases) + 1) / columns)
    several = any(len(np.unique(case["label"])) > 2 for _, _, case in cases)
    tallest = max(case["label"].shape[1] * spacing[1] / (case["label"].shape[0] * spacing[0]) for _, _, case in cases)
    height = rows * (0.8 + 0.96 * tallest * width / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")
    for axes, (caption, name, case) in zip(grid.flat, cases, strict=False):
        wrong = (case["label"] != case["prediction"]).sum(axis=(0, 1))
        place = int(wrong.argmax()) if wrong.any() else largest_section(case["label"])[2]
        draw_slice(axes, case, 2, place, spacing)
        axes.set_anchor("N")
        axes.set_title(f"{caption}\nz = {place}", fontsize=8.5)
        axes.set_xlabel(name, fontsize=6.5)
    for axes in grid.flat[len(cases) :]:
        axes.axis("off")
    grid.flat[len(cases)].legend(handles=slice_legend(several), loc="center", frameon=False, handlelength=2.2)
    return figure
