"""Slices of cases: image, label and prediction as contours, errors in colour and hatched. Needs Matplotlib.

A case is what figures/cases.py makes, or a dict of arrays (W, H, D) alone: 'image', 'label', 'prediction'; a mask that
is None is not drawn. Each function returns a Matplotlib figure, or draws on the axes it is given. Of one class label
and prediction have a colour each; of several each class has one, in all that is drawn.
"""

import math

import numpy as np
from scipy import ndimage

from mtseg.figures.canvas import WIDTH, subplots
from mtseg.figures.cases import best_median_worst, caption, classes_of
from mtseg.script.progress import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, YELLOW

CLASSES = (ORANGE, SKY, GREEN, YELLOW, PURPLE, VERMILION, BLUE)  # the lighter ones first: images are dark
DASHES = {"label": "-", "prediction": (0, (3, 1.5))}
HATCHES = {"missed": "....", "too much": "////", "wrong class": "xxxx"}
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

    A voxel predicted in vain counts its distance to the label, a missed one its distance to the prediction, of the
    class in question; where that mask is empty, its depth in the other.
    """
    label, prediction = np.asarray(label), np.asarray(prediction)
    depth = np.zeros(label.shape)
    for number in range(1, 1 + int(max(label.max(), prediction.max()))):
        masks = label == number, prediction == number
        for mask, other in (masks, masks[::-1]):
            wrong = mask & ~other
            if wrong.any():
                distance = ndimage.distance_transform_edt(~other if other.any() else mask, sampling=spacing)
                depth[wrong] = np.maximum(depth[wrong], distance[wrong])
    return tuple(int(i) for i in np.unravel_index(depth.argmax(), depth.shape)) if depth.any() else None


def _spacing(case):
    return case.get("spacing", (1.0, 1.0, 1.0))


def _errors(label, prediction, number, several):
    """[(mask, colour, hatch)] of what is wrong in a slice about class `number`."""
    colour = _colour(number)
    missed, too_much = (colour, colour) if several else (BLUE, YELLOW)
    return [
        ((label == number) & (prediction == 0), missed, HATCHES["missed"]),
        ((prediction == number) & (label == 0), too_much, HATCHES["too much"]),
        ((prediction == number) & (label > 0) & (label != number), colour, HATCHES["wrong class"]),
    ]


def _colour(number):
    return CLASSES[(number - 1) % len(CLASSES)]


def draw_slice(axes, case, axis, index):
    """Slice `index` across `axis` of a case on the Matplotlib `axes`: the image, the label's contour (solid), that of
    the prediction (dashed), and between them what is missed (dotted), too much (hatched) or of a wrong class (crossed).
    """
    from matplotlib.patheffects import withStroke

    def cut(name):
        return np.take(case[name], index, axis=axis).T

    low, high = np.percentile(case["image"], [1, 99.5])
    rest = [side for number, side in enumerate(_spacing(case)) if number != axis]
    axes.imshow(cut("image"), cmap="gray", vmin=low, vmax=high, origin="lower", aspect=rest[1] / rest[0])
    classes = list(classes_of(case))
    masks = {name: cut(name) for name in DASHES if case[name] is not None}
    if len(masks) == 2:
        for mask, colour, hatch in (e for c in classes for e in _errors(*masks.values(), c, len(classes) > 1)):
            if mask.any():
                axes.contourf(mask, levels=[0.5, 1.5], colors=[colour], alpha=0.45, hatches=[hatch])
    for name, mask in masks.items():
        for number in (number for number in classes if (mask == number).any()):
            colour = _colour(number) if len(classes) > 1 else {"label": SKY, "prediction": ORANGE}[name]
            style = {"colors": [colour], "linestyles": [DASHES[name]], "linewidths": 1.6}
            drawn = axes.contour(mask == number, levels=[0.5], **style)
            # In grey print the colours are as light as the blood around them: a dark edge keeps the lines visible.
            drawn.set_path_effects([withStroke(linewidth=2.8, foreground="black")])
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def slice_legend(cases):
    """The handles of a legend for `draw_slice` of these cases."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    def patch(colour, name, hatch=None):
        return Patch(facecolor=colour, alpha=0.6, hatch=hatch, edgecolor="black", linewidth=0, label=name)

    classes = {number: value for case in cases for number, value in classes_of(case).items()}
    several = len(classes) > 1
    lines = {"label": "#555555", "prediction": "#555555"} if several else {"label": SKY, "prediction": ORANGE}
    fills = dict.fromkeys(HATCHES, "#DDDDDD") if several else {"missed": BLUE, "too much": YELLOW}
    if any(case["label"] is None for case in cases):
        del lines["label"]
        fills = {}
    handles = [patch(_colour(n), f"class {classes[n]}") for n in sorted(classes)] if several else []
    handles += [Line2D([], [], color=c, linewidth=1.8, linestyle=DASHES[name], label=name) for name, c in lines.items()]
    return handles + [patch(colour, name, HATCHES[name]) for name, colour in fills.items()]


def legend_below(figure, cases):
    handles = slice_legend(cases)
    columns = math.ceil(len(handles) / math.ceil(len(handles) / 5))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, handlelength=2.2)


def overlay(case, title=""):
    """Three orthogonal slices through the label's largest section, and three through the worst error; without a label,
    three through the prediction's largest section. `title`: a line above, such as case and metrics.
    """
    label, prediction, spacing = case["label"], case["prediction"], _spacing(case)
    places = {"largest section": largest_section(prediction if label is None else label)}
    worst = None if label is None else worst_error(label, prediction, spacing)
    if worst is not None:
        places["worst error"] = worst
    shape = np.array(prediction.shape) * spacing
    widths = (shape[1], shape[0], shape[0])
    tallest = max(shape[2], shape[1])
    height = 0.9 + len(places) * (0.2 + 0.96 * WIDTH * tallest / sum(widths))
    figure, grid = subplots(len(places), 3, height, width_ratios=widths)
    for row, (name, place) in zip(grid, places.items(), strict=True):
        for axis, axes in enumerate(row):
            draw_slice(axes, case, axis, place[axis])
            axes.set_title(f"{AXES[axis]} = {place[axis]}")
        row[0].set_ylabel(name)
    figure.suptitle(title, fontsize=10)
    legend_below(figure, [case])
    return figure


def compare(cases, captions):
    """The same case under several methods, a column each, and its label in the last: three slices, a row each.

    `cases`: {method: case} with the same image and label. `captions`: {method: text}, such as Dice and HD95. The slices
    are those of the label's largest section, without a label those of the first prediction's.
    """
    first = next(iter(cases.values()))
    place = largest_section(first["prediction"] if first["label"] is None else first["label"])
    shape = np.array(first["prediction"].shape) * _spacing(first)
    heights = (shape[2], shape[2], shape[1])
    widest = max(shape[0], shape[1])
    shown = [(f"{name}\n{captions[name]}", case) for name, case in cases.items()]
    if first["label"] is not None:
        shown.append(("label\n", first | {"prediction": None, "classes": classes_of(first)}))
    height = 1.1 + WIDTH / len(shown) * sum(heights) / widest
    figure, grid = subplots(3, len(shown), height, height_ratios=heights)
    for column, (title, case) in zip(grid.T, shown, strict=True):
        for axis, axes in enumerate(column):
            draw_slice(axes, case, axis, place[axis])
        column[0].set_title(title)
    for axis, axes in enumerate(grid[:, 0]):
        axes.set_ylabel(f"{AXES[axis]} = {place[axis]}")
    legend_below(figure, cases.values())
    return figure


def gallery(cases):
    """Of each case the slice across z in which most voxels are wrong.

    `cases`: a list of (text, name, case), such as the best, the median and the worst, drawn four in a row.
    """
    columns = 4
    legend_has_a_place = len(cases) % columns > 0
    rows = math.ceil(len(cases) / columns)
    shapes = [np.array(case["label"].shape) * _spacing(case) for _, _, case in cases]
    tallest = max(shape[1] / shape[0] for shape in shapes)
    height = rows * (0.95 + 0.96 * tallest * WIDTH / columns) + (0 if legend_has_a_place else 0.5)
    figure, grid = subplots(rows, columns, height)
    for axes, (text, name, case) in zip(grid.flat, cases, strict=False):
        wrong = (case["label"] != case["prediction"]).sum(axis=(0, 1))
        place = int(wrong.argmax()) if wrong.any() else largest_section(case["label"])[2]
        draw_slice(axes, case, 2, place)
        axes.set_anchor("N")
        axes.set_title(f"{text}\nz = {place}", fontsize=8.5)
        axes.set_xlabel(name, fontsize=6.5)
    for axes in grid.flat[len(cases) :]:
        axes.axis("off")
    drawn = [case for _, _, case in cases]
    if legend_has_a_place:
        grid.flat[len(cases)].legend(handles=slice_legend(drawn), loc="center", frameon=False, handlelength=2.2)
    else:
        legend_below(figure, drawn)
    return figure


def gallery_of(folder, spacing=None):
    """(figure, number of cases) of the best, the median and the worst of the predictions in `folder`, with their Dice
    and HD95. `spacing`: mm of a voxel, where the files are not to decide."""
    picked, count = best_median_worst(folder)
    for _, _, case in picked if spacing else ():
        case |= {"spacing": spacing, "unit": "mm"}
    return gallery([(f"{place}\n{caption(case)}", name, case) for place, name, case in picked]), count
