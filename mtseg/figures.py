"""Pictures of cases and of runs, for papers: colours for the colour-blind, line styles and hatches for grey print.

    python inference.py --model_path model/LA_vnet_8_labeled/MT/iter_6000.pth --save_result predictions/MT
    python -m mtseg.figures overlay  predictions/MT --out overlay.png             # the median case, or --case NAME
    python -m mtseg.figures gallery  predictions/MT --out gallery.png             # best, median, five worst cases
    python -m mtseg.figures compare  supervised=predictions/supervised MT=predictions/MT --out compare.png
    python -m mtseg.figures surfaces supervised=predictions/supervised MT=predictions/MT --out surfaces.png
    python -m mtseg.figures curves   model/LA_vnet_8_labeled/* --out curves.png   # from each run's metrics.csv
    python -m mtseg.figures boxes    model/LA_vnet_8_labeled --out boxes.png      # Dice and HD95 per method

Predictions are folders of <case>.h5 with 'image' (W, H, D) or (C, W, H, D), 'label' and 'prediction' (W, H, D), as
`inference.py --save_result` writes them. Needs Matplotlib, and scikit-image for surfaces: pip install "mtseg[plot]".

Each function draws from plain arrays and returns a Matplotlib figure; `save(figure, path)` writes it.
"""

import csv
import io
import json
import math
from pathlib import Path

import h5py
import numpy as np
from scipy import ndimage

# Okabe and Ito, "Color Universal Design", 2008: told apart with every kind of colour blindness.
ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#999999"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION, GREY, "#000000")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)), (0, (3, 1)))
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo", "+++", "---")
# Inches: a page's text is about 7 wide, and 9 points stay legible when it is printed at half of that.
WIDTH = 7.0
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.6,
    "figure.dpi": 100,
    "savefig.dpi": 150,
}
AXES = ("x", "y", "z")  # of the array: what they are in the body, the files do not say
PANELS = {
    "loss": "loss",
    "supervised_loss": "supervised loss",
    "consistency_dist": "consistency distance",
    "consistency_weight": "consistency weight",
    "lr": "learning rate",
}
SETTINGS = ("consistency_weight", "lr")  # follow from the flags: nothing to smooth


class FigureError(ValueError):
    """A picture that cannot be made; the message is one sentence with the file and the remedy."""


def pyplot():
    """A way to make figures that needs no display; FigureError where Matplotlib is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise FigureError('pictures need Matplotlib: pip install "mtseg[plot]"') from error
    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    return plt


def render(figure, format="png", dpi=150):
    """The figure as the bytes of an image file, and closed. A PNG has 256 colours, for a third of the size."""
    content = io.BytesIO()
    try:
        figure.savefig(content, format=format, dpi=dpi, bbox_inches="tight", pad_inches=0.05)
    finally:
        pyplot().close(figure)
    if format == "png":
        from PIL import Image  # comes with Matplotlib

        smaller = io.BytesIO()
        picture = Image.open(content).convert("RGB").quantize(256, dither=Image.Dither.NONE)
        picture.save(smaller, "png", optimize=True, dpi=(dpi, dpi))
        content = smaller
    return content.getvalue()


def save(figure, path, dpi=150):
    """Write the figure as PNG, PDF or SVG, by the suffix of `path`, whole or not at all. Raises FigureError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        content = render(figure, path.suffix.removeprefix(".") or "png", dpi)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except ValueError as error:
        raise FigureError(f"{path}: {error}; name a .png, .pdf or .svg file") from error
    except OSError as error:
        raise FigureError(f"{path}: cannot be written ({error.strerror or error}); choose another --out") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


# ---------------------------------------------------------------------------------------------------------- reading


def read_case(path):
    """{'image' (W, H, D), 'label', 'prediction'} of a <case>.h5 of inference.py; of several channels the first."""
    try:
        with h5py.File(path, "r") as file:
            case = {name: file[name][...] for name in ("image", "label", "prediction")}
    except FileNotFoundError as error:
        raise FigureError(f"{path}: no such file; write it with inference.py --save_result") from error
    except (OSError, KeyError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise FigureError(
            f"{path}: holds no image, label and prediction ({reason}); write it again with inference.py --save_result"
        ) from error
    case["image"] = case["image"][0] if case["image"].ndim == 4 else case["image"]
    if case["label"].ndim != 3 or not case["image"].shape == case["label"].shape == case["prediction"].shape:
        raise FigureError(f"{path}: image, label and prediction have different shapes; write it again")
    return case


def case_files(folder):
    """{case: path} of the predictions in `folder`. Raises FigureError where there is none."""
    files = {path.stem: path for path in sorted(Path(folder).glob("*.h5"))}
    if not files:
        raise FigureError(f"{folder}: holds no <case>.h5; write them with inference.py --save_result {folder}")
    return files


def read_curves(run):
    """(name, seed, {column: array}) of a run's metrics.csv. Raises FigureError."""
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
        raise FigureError(
            f"{run}: not a run with config.json and metrics.csv ({reason}); give a run's folder"
        ) from error


# ------------------------------------------------------------------------------------------------------------- slices


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


def overlay(case, caption="", spacing=(1, 1, 1)):
    """Three orthogonal slices through the label's largest section, and three through the worst error.

    `case`: dict of arrays (W, H, D) 'image', 'label', 'prediction'. `caption`: a line above, such as case and metrics.
    """
    plt = pyplot()
    places = {"largest section": largest_section(case["label"])}
    worst = worst_error(case["label"], case["prediction"], spacing)
    if worst is not None:
        places["worst error"] = worst
    shape = np.array(case["label"].shape) * spacing
    widths = (shape[1], shape[0], shape[0])
    tallest = max(shape[2], shape[1])
    with plt.rc_context(STYLE):
        height = 0.7 + len(places) * (0.2 + 0.96 * WIDTH * tallest / sum(widths))
        figure, grid = plt.subplots(
            len(places), 3, figsize=(WIDTH, height), squeeze=False, layout="constrained", width_ratios=widths
        )
        for row, (name, place) in zip(grid, places.items(), strict=True):
            for axis, axes in enumerate(row):
                draw_slice(axes, case, axis, place[axis], spacing)
                axes.set_title(f"{AXES[axis]} = {place[axis]}")
            row[0].set_ylabel(name)
        figure.suptitle(caption, fontsize=10)
        legend_below(figure, len(np.unique(case["label"])) > 2)
    return figure


def compare(cases, captions=None, spacing=(1, 1, 1)):
    """The same case under several methods, a column each, and its label in the last: three slices, a row each.

    `cases`: {method: case} with the same image and label. `captions`: {method: text}, such as Dice and HD95. The slices
    are those of the label's largest section.
    """
    plt = pyplot()
    first = next(iter(cases.values()))
    place = largest_section(first["label"])
    shape = np.array(first["label"].shape) * spacing
    heights = (shape[2], shape[2], shape[1])
    widest = max(shape[0], shape[1])
    columns = len(cases) + 1
    with plt.rc_context(STYLE):
        height = 0.9 + WIDTH / columns * sum(heights) / widest
        figure, grid = plt.subplots(
            3, columns, figsize=(WIDTH, height), squeeze=False, layout="constrained", height_ratios=heights
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


def gallery(cases, spacing=(1, 1, 1)):
    """Of each case the slice across z in which most voxels are wrong.

    `cases`: a list of (caption, name, case), such as the best, the median and the worst, drawn four in a row; the last
    place is the legend's.
    """
    plt = pyplot()
    columns = 4
    rows = math.ceil((len(cases) + 1) / columns)
    several = any(len(np.unique(case["label"])) > 2 for _, _, case in cases)
    tallest = max(case["label"].shape[1] * spacing[1] / (case["label"].shape[0] * spacing[0]) for _, _, case in cases)
    with plt.rc_context(STYLE):
        height = rows * (0.8 + 0.96 * tallest * WIDTH / columns)
        figure, grid = plt.subplots(rows, columns, figsize=(WIDTH, height), squeeze=False, layout="constrained")
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


# ------------------------------------------------------------------------------------------------------------ surfaces


def surface(mask, spacing=(1, 1, 1), smooth=0.8):
    """(vertices (N, 3) in the unit of `spacing`, faces (M, 3)) of a mask by marching cubes; needs scikit-image.

    The mask is blurred by `smooth` voxels first, so that the surface shows the shape and not the voxels' steps; a mask
    that the blur would make vanish is taken as it is. Raises FigureError for an empty mask.
    """
    try:
        from skimage.measure import marching_cubes
    except ImportError as error:
        raise FigureError('surfaces need scikit-image: pip install "mtseg[plot]"') from error
    mask = np.pad(np.asarray(mask) > 0, 3).astype(np.float32)
    if not mask.any():
        raise FigureError("an empty mask has no surface; choose another case by --case")
    blurred = ndimage.gaussian_filter(mask, smooth)
    # About 30 thousand triangles are as many as a printed panel shows and Matplotlib draws in seconds.
    step = max(1, round((np.count_nonzero(mask) ** (2 / 3) / 2500) ** 0.5))
    vertices, faces, _, _ = marching_cubes(
        blurred if blurred.max() > 0.5 else mask, 0.5, spacing=tuple(map(float, spacing)), step_size=step
    )
    return vertices - 3 * np.asarray(spacing, dtype=float), faces


def surfaces(label, predictions, captions=None, spacing=(1, 1, 1), unit="voxel", views=((20, -60), (20, 120))):
    """Label and predictions as surfaces: a column for the label and for each method, a row for each of the `views`
    (elevation, azimuth in degrees). Each prediction is coloured by the distance to the label's surface, in `unit`.

    `predictions`: {method: mask (W, H, D)}; `captions`: {method: text}.
    """
    plt = pyplot()
    from mpl_toolkits.mplot3d.art3d import Poly3DCollection

    label = np.asarray(label) > 0
    outside = ndimage.distance_transform_edt(~label, sampling=spacing)
    inside = ndimage.distance_transform_edt(label, sampling=spacing)
    # From the centre of a voxel on either side, the surface between them is half a voxel away.
    distance = np.maximum(np.maximum(outside, inside) - 0.5 * min(spacing), 0)

    shapes = {"label": (*surface(label, spacing), None)}
    for name, mask in predictions.items():
        vertices, faces = surface(mask, spacing)
        centres = vertices[faces].mean(axis=1) / np.asarray(spacing)
        shapes[name] = (vertices, faces, ndimage.map_coordinates(distance, centres.T, order=1, mode="nearest"))
    limit = max([np.percentile(d, 99) for _, _, d in shapes.values() if d is not None] + [1.0])
    texts = [f"{name}\n{(captions or {}).get(name, '')}".rstrip() for name in shapes]
    low = np.min([v.min(axis=0) for v, _, _ in shapes.values()], axis=0)
    high = np.max([v.max(axis=0) for v, _, _ in shapes.values()], axis=0)

    with plt.rc_context(STYLE):
        columns = len(shapes)
        side, above, below = WIDTH / columns, 0.12 + 0.17 * (1 + max(t.count("\n") + 1 for t in texts)), 0.7
        row_height = 0.66 * side
        total = above + len(views) * row_height + below
        figure = plt.figure(figsize=(WIDTH, total))
        colours, norm = plt.get_cmap("YlGnBu"), plt.Normalize(0, limit)
        for row, (elevation, azimuth) in enumerate(views):
            for column, (vertices, faces, distances) in enumerate(shapes.values()):
                # Matplotlib keeps a wide margin inside three-dimensional axes: they are drawn larger than their place.
                middle = ((column + 0.5) * side, below + (len(views) - row - 0.5) * row_height)
                box = [middle[0] - 0.61 * side, middle[1] - 0.61 * side, 1.22 * side, 1.22 * side]
                box = [value / length for value, length in zip(box, (WIDTH, total, WIDTH, total), strict=True)]
                axes = figure.add_axes(box, projection="3d", facecolor="none")
                triangles = vertices[faces]
                normals = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
                normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)
                light = 0.45 + 0.55 * np.abs(normals @ _towards_viewer(elevation + 15, azimuth + 20))
                base = (
                    np.tile([0.85, 0.85, 0.85, 1.0], (len(faces), 1)) if distances is None else colours(norm(distances))
                )
                shaded = np.concatenate([base[:, :3] * light[:, None], base[:, 3:]], axis=1)
                # Edges in the faces' own colours close the hairlines between neighbouring triangles.
                drawn = Poly3DCollection(triangles, facecolors=shaded, edgecolors=shaded, linewidths=0.2)
                axes.add_collection3d(drawn)
                drawn.set_clip_on(False)
                for setter, a, b in zip((axes.set_xlim, axes.set_ylim, axes.set_zlim), low, high, strict=True):
                    setter(a, b)
                axes.set_box_aspect(high - low)
                axes.view_init(elevation, azimuth)
                axes.set_axis_off()
                axes.set_in_layout(False)
        for column, text in enumerate(texts):
            figure.text((column + 0.5) / columns, 1 - 0.05 / total, text, ha="center", va="top")
        bar = figure.add_axes((0.25, 0.28 / total, 0.5, 0.12 / total))
        scale = plt.cm.ScalarMappable(norm, colours)
        figure.colorbar(scale, cax=bar, orientation="horizontal", extend="max")
        bar.set_title(f"distance to the label's surface ({unit})", fontsize=8.5, pad=3)
    return figure


def _towards_viewer(elevation, azimuth):
    elevation, azimuth = math.radians(elevation), math.radians(azimuth)
    flat = math.cos(elevation)
    return np.array([flat * math.cos(azimuth), flat * math.sin(azimuth), math.sin(elevation)])


# ---------------------------------------------------------------------------------------------------------------- runs


def moving_average(values, window):
    """The mean of the last `window` values up to each; of fewer at the start."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def curves(runs, window=None):
    """Training curves: a panel for each logged quantity that some run has, a colour and line style for each method.

    `runs`: (name, seed, {column: array}) as `read_curves` gives them; runs of one name share colour and legend. Losses
    and distances are moving averages over `window` rows (default: a fiftieth of the longest run), weights and rates
    are not.
    """
    plt = pyplot()
    shown = [name for name in PANELS if any(name in columns for _, _, columns in runs)]
    window = window or max(1, max(len(columns["iteration"]) for _, _, columns in runs) // 50)
    names = list(dict.fromkeys(name for name, _, _ in runs))
    with plt.rc_context(STYLE):
        rows = math.ceil((len(shown) + 1) / 2)
        figure, grid = plt.subplots(rows, 2, figsize=(WIDTH, 0.3 + 1.9 * rows), squeeze=False, layout="constrained")
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
            plt.Line2D(
                [], [], color=SERIES[i % len(SERIES)], linestyle=DASHES[i % len(DASHES)], label=_runs(name, seeds)
            )
            for i, name in enumerate(names)
        ]
        title = f"losses and distances:\nmean of {window} iterations" if window > 1 else None
        grid.flat[len(shown)].legend(
            handles=handles, loc="center", frameon=False, title=title, title_fontsize=8.5, handlelength=3
        )
    return figure


def _runs(name, seeds):
    return f"{name} ({seeds[name]} seeds)" if seeds[name] > 1 else name


def boxes(methods, unit="voxel"):
    """Box plots of Dice and HD95 over the cases, a box for each method.

    `methods`: {name: {'dice': values in 0 .. 1, 'hd95': values}}. The box is the quartiles, the line the median, the
    whiskers reach to the last value within 1.5 of the box's length; every case is a dot. NaN is left out and counted.
    """
    plt = pyplot()
    rng = np.random.default_rng(0)
    with plt.rc_context(STYLE):
        height = 1.0 + 0.45 * len(methods)
        figure, grid = plt.subplots(1, 2, figsize=(WIDTH, height), layout="constrained", sharey=True)
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


# -------------------------------------------------------------------------------------------------------------- command


def order_cases(scores):
    """Case names by falling score {case: Dice}; ties by name."""
    return sorted(scores, key=lambda case: (-scores[case], case))


def pick_for_gallery(scores, worst=5):
    """[(place, case)]: the best, the median and the `worst` worst cases by {case: Dice}, each case once."""
    ordered = order_cases(scores)
    picked = [("best", ordered[0]), ("median", ordered[(len(ordered) - 1) // 2])]
    last = ordered[-worst:][::-1]
    picked += [("worst" if n == 0 else f"{n + 1}. worst", case) for n, case in enumerate(last)]
    seen = set()
    return [(place, case) for place, case in picked if not (case in seen or seen.add(case))]


def named_folders(words):
    """{name: folder} of words like MT=predictions/MT, or predictions/MT, whose name is that of the folder."""
    folders = {}
    for word in words:
        name, _, folder = str(word).rpartition("=")
        name = name or Path(folder).name
        if name in folders:
            raise FigureError(f"{word}: two folders are called {name!r}; name them, as in supervised=FOLDER MT=FOLDER")
        folders[name] = Path(folder)
    return folders


def read_everywhere(folders, case):
    """{name: case} of one case from several folders, whose labels must be the same."""
    cases = {name: read_case(folder / f"{case}.h5") for name, folder in folders.items()}
    first = next(iter(cases.values()))
    for name, other in cases.items():
        if not np.array_equal(first["label"], other["label"]):
            raise FigureError(
                f"{folders[name] / f'{case}.h5'}: its label is not that of {next(iter(folders.values()))}"
            )
    return cases


def parse_flags(argv):
    from mtseg.flags import Parser

    parser = Parser(description=__doc__, prog="python -m mtseg.figures")
    flag = parser.add_argument
    flag("kind", choices=("overlay", "gallery", "compare", "surfaces", "curves", "boxes"), help="which picture")
    flag("paths", nargs="+", metavar="[NAME=]FOLDER", help="predictions; for curves runs; for boxes runs or results")
    flag("--case", help="case to draw (default: the one of median Dice in the last folder)")
    flag("--out", type=Path, help="file to write: .png, .pdf or .svg (default: <kind>.png)")
    flag("--dpi", type=int, default=150, help="dots per inch of a .png")
    flag("--spacing", type=float, nargs=3, default=(1.0, 1.0, 1.0), metavar=("X", "Y", "Z"), help="mm of a voxel")
    args = parser.parse_args(argv)
    args.out = args.out or Path(f"{args.kind}.png")
    args.unit = "voxel" if tuple(args.spacing) == (1.0, 1.0, 1.0) else "mm"
    return args


def main(argv=None):
    from mtseg import report
    from mtseg.flags import one_sentence
    from mtseg.metrics import dice, hd95

    def score(case):
        return dice(case["prediction"] > 0, case["label"] > 0)

    def caption(case):
        distance = hd95(case["prediction"] > 0, case["label"] > 0, args.spacing)
        return f"Dice {100 * score(case):.1f} %, HD95 {distance:.1f} {args.unit}"

    with one_sentence(FigureError, report.ReportError):
        args = parse_flags(argv)
        pyplot()
        if args.kind == "curves":
            runs = [config.parent for path in args.paths for config in sorted(Path(path).rglob("config.json"))]
            if not runs:
                raise FigureError(f"{', '.join(args.paths)}: no run with a config.json there; give runs' folders")
            figure = curves([read_curves(run) for run in dict.fromkeys(runs)])
        elif args.kind == "boxes":
            rows, _ = report.group_results(report.find_results(args.paths)[0])
            report.mark_incomparable(rows, rows[0])
            odd = next((row for row in rows if row.mark), None)
            if odd:
                raise FigureError(
                    f"{odd.name} is not comparable with {rows[0].name} ({odd.incomparable}); leave it out"
                )
            figure = boxes(
                {
                    f"{row.name}, {row.labelnum} labels": {
                        metric: list(report.average_seeds(row, metric).values()) for metric in ("dice", "hd95")
                    }
                    for row in rows
                },
                rows[0].unit,
            )
        else:
            folders = named_folders(args.paths)
            last = next(reversed(folders.values()))
            if args.kind == "gallery" or args.case is None:
                scores = {case: score(read_case(path)) for case, path in case_files(last).items()}
            if args.kind == "gallery":
                entries = []
                for place, name in pick_for_gallery(scores):
                    case = read_case(last / f"{name}.h5")
                    entries.append((f"{place}: {caption(case)}".replace(", ", "\n"), name, case))
                figure = gallery(entries, args.spacing)
            else:
                case = args.case or order_cases(scores)[(len(scores) - 1) // 2]
                cases = read_everywhere(folders, case)
                captions = {name: caption(content) for name, content in cases.items()}
                short = {name: text.replace(", ", "\n") for name, text in captions.items()}
                if args.kind == "overlay":
                    name = next(reversed(cases))
                    figure = overlay(cases[name], f"{case}: {captions[name]}", args.spacing)
                elif args.kind == "compare":
                    figure = compare(cases, short, args.spacing)
                else:
                    label = next(iter(cases.values()))["label"]
                    masks = {name: content["prediction"] for name, content in cases.items()}
                    figure = surfaces(label, masks, short, args.spacing, args.unit)
                print(f"case {case}: " + "; ".join(f"{name} {text}" for name, text in captions.items()))
        print(f"written to {save(figure, args.out, args.dpi)}")


if __name__ == "__main__":
    main()
