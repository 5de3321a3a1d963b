"""Slices of cases: image, label and prediction as contours, errors in colour and hatched. Needs Matplotlib.

A case is what figures/cases.py makes, or a dict of arrays (W, H, D) alone: 'image', 'label', 'prediction'; a mask that
is None is not drawn. Each function returns a Matplotlib figure, or draws on the axes it is given. Of one class label
and prediction have a colour each; of several each class has one, in all that is drawn. Flat cases, images and stacks of
them, hold too many small things for contours: image, label, prediction and errors stand side by side.
"""

import math

import numpy as np
from scipy import ndimage

from mtseg.figures.canvas import WIDTH, subplots
from mtseg.figures.cases import best_median_worst, caption, classes_of, set_spacing
from mtseg.script.progress import BLUE, ORANGE, SKY, YELLOW, literal
from mtseg.script.snapshot import PALETTE, grey, in_colors, largest_section, visible

DASHES = {"label": "-", "prediction": (0, (3, 1.5))}
HATCHES = {"missed": "....", "too much": "////", "wrong class": "xxxx"}
WRONG = np.array([230, 0, 126], dtype=np.uint8)  # the colour of errors in flat cases
AXES = ("x", "y", "z")  # of the array: what they are in the body, the files do not say


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


def _errors(label, prediction, number, several, case):
    """[(mask, colour, hatch)] of what is wrong in a slice of the case about class `number`."""
    colour, background = _colour(number, case), case.get("background", 0)
    missed, too_much = (colour, colour) if several else (BLUE, YELLOW)
    return [
        ((label == number) & (prediction == background), missed, HATCHES["missed"]),
        ((prediction == number) & (label == background), too_much, HATCHES["too much"]),
        ((prediction == number) & (label != background) & (label != number), colour, HATCHES["wrong class"]),
    ]


def _palette(case):
    """The colours in which a case is drawn: without background nothing of the image shows through them."""
    palette = case.get("palette", PALETTE)
    return palette if case.get("background", 0) is None else visible(palette)


def _colour(number, case):
    return tuple(_palette(case)[number] / 255)


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
        for mask, colour, hatch in (e for c in classes for e in _errors(*masks.values(), c, len(classes) > 1, case)):
            if mask.any():
                axes.contourf(mask, levels=[0.5, 1.5], colors=[colour], alpha=0.45, hatches=[hatch])
    for name, mask in masks.items():
        for number in (number for number in classes if (mask == number).any()):
            colour = _colour(number, case) if len(classes) > 1 else {"label": SKY, "prediction": ORANGE}[name]
            style = {"colors": [colour], "linestyles": [DASHES[name]], "linewidths": 1.6}
            drawn = axes.contour(mask == number, levels=[0.5], **style)
            # In grey print the colours are as light as the blood around them: a dark edge keeps the lines visible.
            drawn.set_path_effects([withStroke(linewidth=2.8, foreground="black")])
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def slice_legend(cases):
    """The handles of a legend for `draw_slice` or `tiles_of` of these cases."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    def patch(colour, name, hatch=None, alpha=0.6):
        return Patch(facecolor=colour, alpha=alpha, hatch=hatch, edgecolor="black", linewidth=0, label=name)

    first = next(iter(cases))
    classes = {number: value for case in cases for number, value in classes_of(case).items()}
    names = {n: literal(v) if isinstance(v, str) else f"class {v}" for n, v in sorted(classes.items())}
    if first.get("flat"):
        wrong = [] if any(case["label"] is None for case in cases) else [patch(WRONG / 255, "wrong", alpha=1)]
        return [patch(_colour(number, first), name, alpha=1) for number, name in names.items()] + wrong
    several = len(classes) > 1
    lines = {"label": "#555555", "prediction": "#555555"} if several else {"label": SKY, "prediction": ORANGE}
    fills = dict.fromkeys(HATCHES, "#DDDDDD") if several else {"missed": BLUE, "too much": YELLOW}
    if any(case["label"] is None for case in cases):
        del lines["label"]
        fills = {}
    handles = [patch(_colour(n, first), name) for n, name in names.items()] if several else []
    handles += [Line2D([], [], color=c, linewidth=1.8, linestyle=DASHES[name], label=name) for name, c in lines.items()]
    return handles + [patch(colour, name, HATCHES[name]) for name, colour in fills.items()]


def legend_below(figure, cases):
    handles = slice_legend(cases)
    beside = max(1, min(5, 93 // (7 + max(len(handle.get_label()) for handle in handles))))  # of 93 letters' width
    columns = math.ceil(len(handles) / math.ceil(len(handles) / beside))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, handlelength=2.2)


def tiles_of(case, index=None):
    """[(name, uint8 (H, W, 3))] of an image, or of slice `index` of a stack: the image, the label and the prediction in
    colours, and what is wrong; without a label the image and the prediction."""
    arrays = {name: case[name] for name in ("image", "label", "prediction") if case[name] is not None}
    if index is not None:
        arrays = {name: np.take(array, index, axis=-3) for name, array in arrays.items()}
    picture, (*label, prediction) = grey(arrays.pop("image")), arrays.values()
    how = (_palette(case), case["background"], 1 if case["background"] is None else 0.7)
    tiles = [("image", picture), *((name, in_colors(picture, mask, *how)) for name, mask in arrays.items())]
    pale = 128 + picture // 2
    return tiles + [("errors", np.where((mask != prediction)[..., None], WRONG, pale)) for mask in label]


def section_of(case):
    """(x, y, z) of the label's largest section, without a label of the prediction's."""
    return largest_section(case["prediction"] if case["label"] is None else case["label"])


def slices_of(case, axis=0):
    """{what: index} of the slices of a stack or volume that are drawn; of an image None."""
    label, prediction = case["label"], case["prediction"]
    if prediction.ndim == 2:
        return {"": None}
    places = {"largest section": section_of(case)[axis]}
    if label is not None and (label != prediction).any():
        wrong = np.moveaxis(label != prediction, axis, 0)
        places["most errors"] = int(wrong.sum(axis=(1, 2)).argmax())
    return places


def tiled(rows, cases, title=""):
    """A figure of `rows`, (text beneath, [(title, uint8 (H, W, 3) or None)]), with the legend of the flat `cases`."""
    aspect = np.divide(*_spacing(next(iter(cases)))[-2:])
    columns = len(rows[0][1])
    sides = [[pixels.shape for _, pixels in row if pixels is not None] for _, row in rows]
    heights = [WIDTH / columns * aspect * max(high / wide for high, wide, _ in shapes) for shapes in sides]
    lines = sum(bool(text) + max(1 + name.count("\n") for name, _ in row) for text, row in rows)
    figure, grid = subplots(len(rows), columns, 0.6 + 0.17 * lines + 0.97 * sum(heights), height_ratios=heights)
    for place, (text, (name, pixels)) in enumerate((text, tile) for text, row in rows for tile in row):
        axes = grid.flat[place]
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        if pixels is not None:
            axes.imshow(pixels, aspect=aspect)
        axes.set_title(literal(name), fontsize=8.5)
        if text and place % columns == 0:  # it may be wider than the axes, which are not to grow with it
            how = {"xytext": (0, -4), "textcoords": "offset points", "va": "top", "fontsize": 8.5}
            axes.annotate(literal(text), (0, 0), xycoords="axes fraction", **how).set_in_layout(False)
            axes.set_xlabel(" ", fontsize=8.5)
    figure.suptitle(literal(title), fontsize=10)
    legend_below(figure, cases)
    return figure


def overlay(case, title=""):
    """Three orthogonal slices through the label's largest section, and three through the worst error; without a label,
    three through the prediction's largest section. `title`: a line above, such as case and metrics.
    """
    if case.get("flat"):
        rows = [(f"{what}, slice {i}" if what else "", tiles_of(case, i)) for what, i in slices_of(case).items()]
        if len(rows) == 1:  # two by two, as large as can be
            rows = [("", rows[0][1][:2]), (rows[0][0], rows[0][1][2:])][: len(rows[0][1]) // 2]
        return tiled(rows, [case], title)
    label, prediction, spacing = case["label"], case["prediction"], _spacing(case)
    places = {"largest section": section_of(case)}
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
    if first.get("flat"):
        index = next(iter(slices_of(first).values()))
        drawn = {method: dict(tiles_of(case, index)) for method, case in cases.items()}
        top = [tile for tile in tiles_of(first, index) if tile[0] in ("image", "label")]
        below = [("", None) for _ in top] + [("errors", tiles.get("errors")) for tiles in drawn.values()]
        top += [(f"{method}\n{captions[method]}", tiles["prediction"]) for method, tiles in drawn.items()]
        rows = [("" if index is None else f"slice {index}", top), ("", below)]
        return tiled(rows[: 1 if first["label"] is None else 2], cases.values())
    place = section_of(first)
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
    if cases[0][2].get("flat"):
        rows = []
        for text, name, case in cases:
            index = [*slices_of(case).values()][-1]
            place = "" if index is None else f", slice {index}"
            tiles = [("" if rows else title, pixels) for title, pixels in tiles_of(case, index)]
            rows.append((f"{text}: {name}{place}".replace("\n", ", "), tiles))
        return tiled(rows, [case for *_, case in cases])
    columns, rows = 4, math.ceil(len(cases) / 4)
    shapes = [np.array(case["label"].shape) * _spacing(case) for _, _, case in cases]
    tallest = max(shape[1] / shape[0] for shape in shapes)
    figure, grid = subplots(rows, columns, 0.5 + rows * (0.95 + 0.96 * tallest * WIDTH / columns))
    for axes, (text, name, case) in zip(grid.flat, cases, strict=False):
        place = [*slices_of(case, axis=2).values()][-1]
        draw_slice(axes, case, 2, place)
        axes.set_anchor("N")
        axes.set_title(f"{text}\nz = {place}", fontsize=8.5)
        axes.set_xlabel(name, fontsize=6.5)
    for axes in grid.flat[len(cases) :]:
        axes.axis("off")
    legend_below(figure, [case for *_, case in cases])
    return figure


def gallery_of(folder, spacing=None):
    """(figure, number of cases) of the best, the median and the worst of the predictions in `folder`, with their Dice
    and HD95. `spacing`: mm of a voxel, where the files are not to decide."""
    picked, count = best_median_worst(folder)
    set_spacing([case for *_, case in picked], spacing)
    return gallery([(f"{place}\n{caption(case)}", name, case) for place, name, case in picked]), count
