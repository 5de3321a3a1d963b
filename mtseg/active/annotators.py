"""The files that an annotator gets in a round, and the masks that come back from his program.

A round's folder has, for each case: images/ (the user's own PNG or TIFF as it is, else grey PNG of an image, TIFF of a
stack, NIfTI of a volume), predictions/ (the values of the data set's masks, an image's with a palette), colour/ and
uncertainty/ (pictures), and masks/, into which the annotator saves <case>.<ending>. TODO.txt says what to draw where.

`spatial`: an image (H, W), a stack (S, H, W) or a volume (W, H, D), which `axis` tells apart: None, 0 or 2, the axis
along which slices follow each other. Boxes are [(start, stop), ...], the first voxel and the one past the last.
Labels are class numbers, uint8, and UNKNOWN, 255, where nobody annotated.
"""

import hashlib
import shlex
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mtseg.active.pictures import PLANE, colours, grey, heat, montage, slice_of
from mtseg.checkpoint import file_sha256, write_whole
from mtseg.classes import ClassError, ClassTable, check_shown, to_index
from mtseg.datasets import UNKNOWN
from mtseg.images import ENDINGS as IMAGES
from mtseg.images import ImageError, png_bytes, read_image, tiff_bytes
from mtseg.images import read_mask as read_pixels
from mtseg.layouts import stem
from mtseg.preprocess import canonical_axes, orient
from mtseg.script.scans import image_file
from mtseg.script.sources import words
from mtseg.volumes import VolumeError, nifti_header, read_volume, volume_bytes

ENDINGS = (*IMAGES, ".nii.gz", ".nii", ".nrrd")
LEAVE_OUT = "leave out"
KIND = {None: ".png", 0: ".tif", 2: ".nii.gz"}


class AnnotationError(ValueError):
    """A mask that cannot be taken back; one sentence with the file and the remedy."""


class Task(NamedTuple):
    """What one case gives an annotator.

    `image`: float (*spatial) or (C, *spatial). `prediction`: class numbers (*spatial), None without a network.
    `uncertainty`: (*spatial), from 0 to 1: entropy / ln C, or None. `spacing`: of a volume's voxels, 3 millimetres,
    None where not known. `files`: the user's own PNG or TIFF of an image, or one for each channel; () without any.
    """

    case: str
    image: np.ndarray
    boxes: list
    prediction: np.ndarray | None = None
    uncertainty: np.ndarray | None = None
    axis: int | None = None
    spacing: tuple | None = None
    files: tuple = ()


def annotation_table(table):
    """The ClassTable `table` with a colour for every class and one class more, the last: what the annotator leaves out.

    Its value is the table's `ignore`, else 255 or, where that is a class's, the value farthest from all classes: beside
    white it would be what `snap` takes for nearly white.
    """
    far = max(range(256), key=lambda v: (min(abs(v - one) for one in table.values), v))
    value = (far if 255 in table.values else 255) if table.ignore is None else table.ignore
    taken = table.other is not None or 255 in table.values or (255, 255, 255) in table.colors
    white = None if taken else (255, 255, 255)
    names, values, colors = (*table.names, LEAVE_OUT), (*table.values, value), (*table.colors, white)
    more = ClassTable(names, values, colors, table.background, None, table.other)
    colors = list(map(tuple, more.palette()[: len(names)].tolist()))
    if table.other is not None:
        colors[table.other] = None
    return replace(more, colors=tuple(colors))


# ------------------------------------------------------------------------------------------------------------- writing


def write_case(folder, task, table):
    """Write the files of a Task into a round's `folder`; returns its record for `write_todo` and for reading, for JSON.

    `table`: the data set's ClassTable. Each file is written whole or not at all.
    """
    folder, shape, more = Path(folder), task.image.shape[-(2 if task.axis is None else 3) :], annotation_table(table)
    record = {"case": task.case, "shape": list(shape), "axis": task.axis, "images": [], "prediction": None}
    record["boxes"] = [[list(map(int, start)), list(map(int, stop))] for start, stop in task.boxes]
    record["spacing"] = None if task.spacing is None else list(map(float, task.spacing))

    channels = task.image.reshape(-1, *shape)
    images = ((path.suffix.lower(), path.read_bytes()) for path in map(Path, task.files))
    if not task.files:
        images = (grid_file(channel if task.axis == 2 else grey(channel), record) for channel in channels)
    for number, (ending, content) in enumerate(images):
        name = f"images/{task.case}{f'_{number}' if len(task.files or channels) > 1 else ''}{ending}"
        write_whole(folder / name, content)
        record["images"].append(name)
    if task.prediction is not None:
        values = more.to_values(task.prediction)
        ending, content = grid_file(values, record) if task.axis == 2 else image_file(task.prediction, more)
        record |= {"prediction": f"predictions/{task.case}{ending}", "sha256": hashlib.sha256(content).hexdigest()}
        write_whole(folder / record["prediction"], content)
    picture = montage(shape, task.axis, task.boxes, colours(channels, task.prediction, task.axis, more))
    write_whole(folder / f"colour/{task.case}.png", png_bytes(picture))
    if task.uncertainty is not None:

        def draw(number):
            return heat(slice_of(task.uncertainty, task.axis, number))

        picture = montage(shape, task.axis, task.boxes, draw, scale=True)
        write_whole(folder / f"uncertainty/{task.case}.png", png_bytes(picture))
        if task.axis is not None:
            ending, content = grid_file(task.uncertainty.astype(np.float32), record)
            write_whole(folder / f"uncertainty/{task.case}{ending}", content)
    return record


def grid_file(array, record):
    """(ending, bytes) of a file with `array` (*spatial) as programs for annotators open it."""
    if record["axis"] != 2:
        return KIND[record["axis"]], (png_bytes if record["axis"] is None else tiff_bytes)(array)
    header = nifti_header(np.diag([*(record["spacing"] or (1, 1, 1)), 1]))
    return ".nii.gz", volume_bytes(array, ".nii.gz", header)


def write_todo(folder, records, table, place=None):
    """Write TODO.txt, the classes' names and colours as annotators' programs read them, and an empty folder masks/.

    `records`: what `write_case` returned for each case of the round. `place`: what `folder` is called in the end, where
    it still has another name.
    """
    folder, more, files = Path(folder), annotation_table(table), []
    colors = more.palette()[: len(more.names)].tolist()
    rows = [(v, n.replace('"', "'"), rgb) for v, n, rgb in zip(more.values, more.names, colors, strict=True)]
    (folder / "masks").mkdir(parents=True, exist_ok=True)
    if any(record["axis"] != 2 for record in records) and max(more.values) < 256:
        write_whole(folder / "classes.lut", more.palette(by_value=True).T.tobytes())
        files.append("classes.lut: the colours for ImageJ: open a prediction, then File > Import > LUT")
    if any(record["axis"] == 2 for record in records):
        lines = [f'{v} {r} {g} {b} 1 1 1 "{name}"' for v, name, (r, g, b) in sorted(rows) if v]
        write_whole(folder / "labels.txt", "\n".join(['0 0 0 0 0 0 0 "Clear Label"', *lines, ""]).encode())
        lines = [f"{v} {name.replace(' ', '_')} {r} {g} {b} {255 * (v > 0)}" for v, name, (r, g, b) in sorted(rows)]
        write_whole(folder / "classes.ctbl", "\n".join(["# Color table file classes.ctbl", *lines, ""]).encode())
        files.append("labels.txt: names and colours for ITK-SNAP: Segmentation > Import Label Descriptions")
        files.append("classes.ctbl: the same for 3D Slicer: load it as a color table, before the prediction")
    write_whole(folder / "TODO.txt", todo(place or folder, records, rows, files).encode())


def todo(folder, records, rows, files):
    """The text of TODO.txt; `rows`: (value, name, colour) of each class, `files`: a line for each file of classes."""
    count, value = sum(len(record["boxes"]) for record in records), rows[-1][0]
    width = max(len(name) for _, name, _ in rows)
    lines = [
        f"To annotate: {count} regions in {len(records)} cases, see the list at the end.",
        "",
        "1. Open a case's file. Its prediction, where there is one, may be the start: open it too, and correct it.",
        "2. Draw in the region that is named, all of it. What lies outside of the regions is passed over.",
        f"   What you cannot tell gets the value {value}, {LEAVE_OUT}: training ignores it.",
        "3. Save the mask as the list says, as large as the image, in masks/ and not over the prediction.",
        "   PNG, TIFF, NIfTI and NRRD are read.",
        "4. When all masks are there, take them back:",
        f"   python recipes/active_learning.py take {shlex.quote(str(folder))}",
        "",
        "Values, names and colours (red, green, blue) of the classes. A mask holds the values, or exactly the colours:",
        *(f"{v:>6}  {name:{width}}  {r:>3} {g:>3} {b:>3}" for v, name, (r, g, b) in rows),
        *files,
        "",
        "colour/ shows the prediction over the image, the regions framed. uncertainty/ shows how unsure the network",
        "is, in all pictures on one scale: from 0, dark blue, sure, to 1, yellow, all classes are equally likely.",
        "Slices are counted from 1, as ImageJ and ITK-SNAP do, and in brackets from 0, as napari and 3D Slicer do.",
        "x runs to the right and y down, both counted from 0, as in ImageJ. napari names y before x; ITK-SNAP counts",
        "them from 1, and may show a volume mirrored.",
    ]
    for record in records:
        name = f"masks/{record['case']}{KIND[record['axis']]}"
        lines += ["", record["case"], f"  open     {', '.join(record['images'])}"]
        lines += [f"  start    {record['prediction']}"] if record["prediction"] else []
        lines += [f"  draw     {region(record, *box)}" for box in record["boxes"]] + [f"  save as  {name}"]
    return "\n".join([*lines, ""])


def region(record, start, stop):
    """The words for a box."""
    shape, axis, (down, right) = record["shape"], record["axis"], PLANE[record["axis"]]
    sides = [stop[side] - start[side] for side in (right, down)]
    box = f"x {start[right]} to {stop[right] - 1}, y {start[down]} to {stop[down] - 1} ({sides[0]} x {sides[1]} pixels)"
    whole = sides == [shape[right], shape[down]]
    if axis is None:
        return "the whole image" if whole else f"the box {box}"
    first, last = start[axis], stop[axis] - 1
    if whole and last - first + 1 == shape[axis]:
        return "all slices, whole"
    slices = f"slice {last + 1} ({last})" if first == last else f"slices {first + 1} to {last + 1} ({first} to {last})"
    return f"{slices}, {'whole' if whole else f'the box {box}'}"


# ------------------------------------------------------------------------------------------------------------- reading


def check_folder(folder, records):
    """AnnotationError for a file in masks/ that this round did not ask for, and for a prediction that was changed."""
    folder, cases = Path(folder), {record["case"] for record in records}
    for path in sorted((folder / "masks").glob("*")):
        if not path.name.lower().endswith(ENDINGS):
            if any(path.name.startswith(f"{case}.") for case in cases):
                raise AnnotationError(f"{path}: is of a kind that is not read; save one of {', '.join(ENDINGS)}")
        elif stem(path) not in cases | {None}:  # None: hidden
            where = f"{folder.name} asked for no case {stem(path)}"
            raise AnnotationError(f"{path}: {where}; move it to the round that did, or name it as TODO.txt says")
    for record in records:
        path = folder / (record["prediction"] or "")
        if record["prediction"] and path.is_file() and file_sha256(path) != record["sha256"]:
            move = f"move it to masks/{path.name}" if not masks_of(folder, record) else "delete it, a mask is there"
            raise AnnotationError(f"{path}: was changed in place, which is where predictions are; {move}")


def masks_of(folder, record):
    """The files in masks/ that are the case's."""
    paths = sorted((Path(folder) / "masks").glob("*"))
    return [p for p in paths if stem(p) == record["case"] and p.name.lower().endswith(ENDINGS)]


def read_mask(folder, record, table, snap=False, allow_empty=False):
    """(labels, how many voxels were snapped) of a case: class numbers, uint8 (*spatial), UNKNOWN outside of its boxes
    and where the annotator left it out.

    Whatever lies outside of the boxes is passed over. AnnotationError where there is no file or two, one of another
    size or place, values or colours that are no class's (`snap` takes the nearest), a box in which all is left out,
    and, without `allow_empty`, for nothing but the background.
    """
    paths = masks_of(folder, record)
    if not paths:
        name = Path(folder) / f"masks/{record['case']}{KIND[record['axis']]}"
        raise AnnotationError(f"{name}: no such file, nor one with another ending; save the mask of the case there")
    if len(paths) > 1:
        raise AnnotationError(f"{paths[0]}: case {record['case']} has another mask in {paths[1].name}; remove one")
    labels, snapped = read_labels(paths[0], record, record["boxes"], table, snap)
    for start, stop in record["boxes"]:
        if (labels[slices(start, stop)] == UNKNOWN).all():
            where = region(record, start, stop)
            raise AnnotationError(f"{paths[0]}: all is left out in {where}; annotate some of it")
    if table.background is not None and not allow_empty and not (labels[labels != UNKNOWN]).any():
        only = f"all is {table.names[0]!r}, or {LEAVE_OUT} ({annotation_table(table).values[-1]}), in its regions"
        raise AnnotationError(f"{paths[0]}: {only}; draw what is there, or say that it is so with --allow_empty")
    return labels, snapped


def read_prediction(folder, record, table):
    """The prediction that `write_case` wrote, class numbers, uint8 (*spatial); None where there is none."""
    path = Path(folder) / (record["prediction"] or "")
    everywhere = [([0] * len(record["shape"]), record["shape"])]
    return read_labels(path, record, everywhere, table)[0] if path.is_file() else None


def changed_share(prediction, labels, boxes):
    """The share of the voxels annotated in `boxes` whose label is not the prediction; NaN without a prediction."""
    known = within(labels.shape, boxes) & (labels != UNKNOWN)
    return float("nan") if prediction is None else float((prediction != labels)[known].mean())


def slices(start, stop):
    return tuple(map(slice, start, stop))


def within(shape, boxes):
    """bool of `shape`: what lies in a box."""
    inside = np.zeros(shape, bool)
    for start, stop in boxes:
        inside[slices(start, stop)] = True
    return inside


def read_labels(path, record, boxes, table, snap=False):
    """(class numbers in a file, UNKNOWN outside of `boxes` and where left out; how many were snapped)."""
    shape, more = tuple(record["shape"]), annotation_table(table)
    inside, labels = within(shape, boxes), np.full(shape, UNKNOWN, np.uint8)
    try:
        mask, colors = read_voxels(path, record)
        if mask.shape[: len(shape)] != shape or mask.shape[len(shape) :] not in ((), (3,)):
            raise AnnotationError(f"{path}: is {words(mask.shape)}, its image {words(shape)}; save a mask as large")
        mask = mask[inside][None]
        if colors is not None:
            mask = by_palette(mask, colors[inside][None], more)
        if mask.dtype == bool and len(table.names) == 2:  # which to_index would not know, with one class more
            mask = np.where(mask, max(table.values), min(table.values))
        found, snapped = to_index(mask, more, snap)
    except (ClassError, ImageError, VolumeError) as error:
        sentence = f"{path}: {error}" if isinstance(error, ClassError) else str(error)
        raise AnnotationError(sentence) from error
    labels[inside] = np.where(found == len(table.names), UNKNOWN, found)[0]
    return labels, snapped


def read_voxels(path, record):
    """(mask (*spatial) of values or (*spatial, 3) of colours, the colours (*spatial, 3) in which its palette shows the
    values, or None)."""
    if not path.name.lower().endswith(IMAGES):
        if record["axis"] == 2:
            return on_grid(path, record), None
        volume = read_volume(path)
        codes = volume.header.get("qform_code", 1), volume.header.get("sform_code", 1)  # 0: the file does not say
        known = volume.affine is not None and any(codes)
        axes, flips = canonical_axes(volume.affine) if known else ((0, 1, 2), [False] * 3)
        if tuple(axes) != (0, 1, 2) or flips[0] != flips[1] or flips[2]:  # ITK saves it as it is with both mirrored
            raise AnnotationError(f"{path}: its axes are turned or mirrored; save it as TIFF, or as the image lies")
        mask = volume.array.T  # of a stack (S, H, W) and of an image ITK's programs save (W, H, S)
        return mask[0] if record["axis"] is None and len(mask) == 1 else mask, None
    if record["axis"] == 2:
        raise AnnotationError(f"{path}: a mask of a volume is not kept in pages; save it as NIfTI or NRRD")
    mask, image = read_pixels(path), np.moveaxis(read_image(path), 0, -1)
    if record["axis"] == 0 and record["shape"][0] == 1:
        mask, image = mask[None], image[None]
    return mask, image if image.shape == (*mask.shape, 3) else None


def on_grid(path, record):
    """The array of a volume's mask, its axes turned as the image's; AnnotationError where it lies elsewhere."""
    volume, shape = read_volume(path), tuple(record["shape"])
    if volume.affine is None or volume.array.ndim != 3:
        return volume.array
    place = np.linalg.inv(np.diag([*(record["spacing"] or (1, 1, 1)), 1])) @ volume.affine  # in the image's voxels
    axes, flips = canonical_axes(place)
    array = orient(volume.array, axes, flips)
    for corner in np.ndindex(2, 2, 2) if array.shape == shape else ():
        voxel, stored = np.array(corner) * (np.array(shape) - 1), np.ones(4)
        stored[list(axes)] = np.where(flips, np.array(shape) - 1 - voxel, voxel)
        if abs((place @ stored)[:3] - voxel).max() > 0.1:
            raise AnnotationError(f"{path}: lies elsewhere than {record['images'][0]}; save it on the grid of that")
    return array


def by_palette(values, colors, table):
    """`values` (1, N), or the `colors` (1, N, 3) in which a palette shows them where not all values are a class's.

    ClassError where both are classes', but not the same ones: a program has numbered the colours anew.
    """
    used, first = np.unique(values, return_index=True)
    if not set(used.tolist()) <= set(table.values):
        return colors
    check_shown(used, colors[0, first], table)
    return values
