"""Predictions of inference.py with their scans and labels, what is measured of them, and which of them to show.

A case is a dict: 'image', 'label' and 'prediction', arrays (W, H, D), the label None where there is none; 'spacing',
the voxels' size; 'unit', of distances; and 'classes', {class: its name, or the value that stands for it in files}.
Where 'flat' is True, the arrays are (H, W), or a stack (S, H, W) of such, and three channels in front of the image's
are red, green and blue. 'background' is the class that does not count, 0 or None; 'palette' the classes' colours.
"""

import json
import math
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from mtseg.classes import IGNORED, ClassError, ClassTable
from mtseg.datasets import read_hdf5, some
from mtseg.figures.canvas import FigureError
from mtseg.images import ENDINGS as IMAGES
from mtseg.images import read_image
from mtseg.layouts import find_cases, stem
from mtseg.metrics import dice, hd95
from mtseg.preprocess import PreprocessError, to_classes
from mtseg.script.snapshot import PALETTE
from mtseg.script.sources import plain_table, read_label
from mtseg.volumes import ENDINGS, read_channels, read_on_grid, read_volume

RECORDED = ("num_classes", "ignore_index", "spacing", "classes", "unit", "axis")  # of how a case was measured
WORST = ("worst", "2nd worst", "3rd worst", "4th worst", "5th worst")  # places in a gallery


def classes_of(case):
    """{class: the value that stands for it}: those that were measured, or without a record those that are there."""
    masks = [case[name] for name in ("label", "prediction") if case.get(name) is not None]
    return case.get("classes") or {n: n for n in range(1, 1 + max([1, *(int(mask.max()) for mask in masks)]))}


def _voxels(file, name):
    dataset = read_hdf5(file, name)
    if dataset is None:
        raise KeyError(f"no {name}")
    return dataset[...]


def read_case(path):
    """The case in a <case>.h5 of `inference.py --save_result`."""
    try:
        with h5py.File(path, "r") as file:
            case = {name: _voxels(file, name) for name in ("image", "label", "prediction")}
            record = json.loads(file.attrs.get("case", "{}"))
            record = {name: record[name] for name in RECORDED if name in record}
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        lacks = f"{path}: holds no image, label and prediction ({' '.join(str(error).split())})"
        raise FigureError(f"{lacks}; write it again with inference.py --save_result") from error
    return checked(case, path, **record)


def checked(case, path, num_classes=None, values=None, ignore_index=None, spacing=None, classes=None, unit="", axis=2):
    """`case`, read from `path`, with what a case holds beside the arrays; FigureError where it cannot be drawn.

    Of an image with channels in front the first is kept, of flat ones all three colours. `classes`: what ClassTable's
    to_dict gave, or None. `axis`: along which the slices of a stack follow each other, 0; 2 of a volume. As when it is
    measured, voxels of the label `ignore_index` are of no class that counts in label and prediction.
    """
    image, label, prediction = (case[name] for name in ("image", "label", "prediction"))
    flat = prediction.ndim == 2 or axis == 0
    if image.ndim > prediction.ndim and not (flat and len(image) == 3):
        image = case["image"] = image[0]
    shapes = [image.shape[-prediction.ndim :], prediction.shape if label is None else label.shape]
    if prediction.ndim not in (2, 3) or any(shape != prediction.shape for shape in shapes):
        raise FigureError(f"{path}: image, label and prediction have different shapes; write it again")
    if min(image.shape) < 2 and not flat:
        raise FigureError(f"{path}: its shape {image.shape} is no volume: there is no contour to draw; leave it out")
    try:
        table = ClassTable.from_dict(classes) if classes else None
    except ClassError as error:
        raise FigureError(f"{path}: {error}; write it again") from error
    background = table.background if table else 0
    if label is not None and ignore_index is not None:
        ignored, none = label == ignore_index, IGNORED if background is None else background
        case["label"], case["prediction"] = np.where(ignored, none, label), np.where(ignored, none, prediction)
    if num_classes is not None:
        words = table.names if table else values or range(num_classes)
        numbers = range(0 if background is None else 1, min(num_classes, len(words)))
        case["classes"] = {number: words[number] for number in numbers if number != ignore_index}
    unit = unit or ("mm" if spacing else "voxel" if prediction.ndim == 3 else "pixel")
    drawn = {"flat": flat, "background": background, "palette": table.palette() if table else PALETTE}
    return case | drawn | {"unit": unit, "spacing": spacing or (1.0,) * prediction.ndim}


def case_readers(folder):
    """{case: function that reads it} of the predictions in `folder`, that of --save_result or the one with the results
    of `inference.py --input`. Raises FigureError where there are none."""
    folder = Path(folder)
    if folder.is_file():
        raise FigureError(f"{folder}: is a file; give its folder, {folder.parent}, and --case {stem(folder) or 'NAME'}")
    results = folder.parent if folder.name == "predictions" else folder
    readers = readers_of_scans(results)
    if readers is None:
        readers = {path.stem: partial(read_case, path) for path in sorted(folder.glob("*.h5"))}
    if not readers:
        remedy = f"write them with inference.py --save_result {folder} (as HDF5, the default), or by --input"
        raise FigureError(f"{folder}: holds no predictions; {remedy}")
    return readers


def readers_of_scans(results):
    """{case: function that reads it} of the scans that `inference.py --input` segmented into the folder `results`; None
    where its record is not there, or one of --continue, of the cases of a list."""
    path = results / "cases.jsonl"
    if not path.is_file():
        return None
    try:
        with open(path, encoding="utf-8") as file:
            record = json.loads(file.readline())["settings"]
        if record["input"].endswith(".list"):
            return None
        source, labels, preprocessing = Path(record["input"]), record["labels"], record["preprocessing"] or {}
        result = json.loads((results / "metrics.json").read_text(encoding="utf-8"))
        how = {"num_classes": result["network"]["num_classes"], "classes": result.get("classes")}
        how |= {"ignore_index": result["protocol"].get("ignore_index"), "unit": record["unit"]}
        classes, counted = how["classes"], (how["num_classes"], how["ignore_index"])
        table = ClassTable.from_dict(classes) if classes else plain_table(*counted)
        values, ignore = preprocessing.get("labels", list(range(how["num_classes"]))), preprocessing.get("ignore")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FigureError(f"{path}: not a whole record of inference.py --input ({error}); segment again") from error
    if not source.exists():
        raise FigureError(f"{path}: the scans were in {source}, which is gone; put them back, or segment again")
    cases, _ = find_cases(source, preprocessing.get("channels"), labels, broken={})
    written, readers = {stem(file): file for file in (results / "predictions").glob("*") if stem(file)}, {}
    for case in (case for case in cases if case.name in written):
        if case.images[0].suffix.lower() in IMAGES:
            readers[case.name] = partial(read_picture, case, written[case.name], how, table)
        else:
            readers[case.name] = partial(read_scan, case, written[case.name], how, values, ignore)
    return readers


def read_picture(case, path, how, table):
    """The case of images (layouts.Case), with its prediction in the file `path`; `how`: what is RECORDED."""
    image = np.concatenate([read_image(file) for file in case.images])
    files = {"label": case.label, "prediction": path}
    masks = {name: file and read_label(file, image.shape[1:], table, snap=True)[0] for name, file in files.items()}
    spacing = None if how["unit"] == "pixel" else table.pixel_size[:2]
    return checked({"image": image, **masks}, path, spacing=spacing, axis=0, **how)


def read_scan(case, path, how, values, ignore):
    """As `read_picture`, of a scan on its own grid. `values`: of its classes; `ignore`: of unlabelled voxels."""
    volume = read_channels(case.images)
    hdf5 = path.suffix in ENDINGS[-2:]
    if hdf5:
        values = list(range(how["num_classes"]))
        with h5py.File(path, "r") as file:
            prediction = _voxels(file, "prediction")
    else:
        prediction = to_classes(read_volume(path).array, values)
    if volume.array.shape[-3:] != prediction.shape:
        raise FigureError(f"{path}: is on the scan's own grid, {case.images[0]} was prepared; give --input the scans")
    label = volume.label if case.label is None else read_on_grid(case.label, volume)
    try:
        label = None if label is None else to_classes(label, values, how["ignore_index"], None if hdf5 else ignore)
    except PreprocessError as error:
        raise FigureError(f"{case.label or case.images[0]}: {error}") from error
    spacing = tuple(map(float, volume.spacing)) if how["unit"] == "mm" else None
    arrays = {"image": volume.array, "label": label, "prediction": prediction}
    return checked(arrays, path, values=values, spacing=spacing, **how)


def set_spacing(cases, spacing):
    """Give the `cases` voxels of `spacing` mm, where that is not None; FigureError of images."""
    for case in cases if spacing else ():
        if case["flat"]:
            raise FigureError("--spacing is that of voxels; the size of pixels stands in classes.json as pixel_size")
        case |= {"spacing": spacing, "unit": "mm"}


def mean_over_classes(metric, case, *arguments):
    """A metric of a case as tables have it: the mean over its classes, NaN where one has none."""
    label, prediction = case["label"], case["prediction"]
    values = [metric(prediction == number, label == number, *arguments) for number in classes_of(case)]
    return sum(values) / len(values)


def score(case):
    """The Dice of a case, None where it has no label."""
    return None if case["label"] is None else mean_over_classes(dice, case)


def scores_of(readers):
    """{case: Dice} of `case_readers`, without the cases that have no label."""
    scores = {name: score(read()) for name, read in readers.items()}
    return {name: dice for name, dice in scores.items() if dice is not None}


def caption(case):
    """Dice and HD95 of a case, a line each; of several classes the mean. '' where there is no label."""
    if case["label"] is None:
        return ""
    distance = mean_over_classes(hd95, case, case["spacing"])
    shown = "-" if math.isnan(distance) else f"{distance:.2f} {case['unit']}"
    mean = "mean " if len(classes_of(case)) > 1 else ""
    return f"{mean}Dice {100 * score(case):.2f} %\n{mean}HD95 {shown}"


def named_folders(words):
    """{name: folder} of words like MT=predictions/MT, or predictions/MT, whose name is that of the folder."""
    folders = {}
    for word in words:
        name, given, folder = str(word).partition("=")
        if not given or Path(word).exists():  # in whose own name an = may stand, as in runs/lr=0.1
            name, folder = "", word
        name = name or Path(folder).name
        if name in folders:
            raise FigureError(f"{word}: two folders are called {name!r}; name them, as in supervised=FOLDER MT=FOLDER")
        folders[name] = Path(folder)
    return folders


def read_everywhere(folders, name):
    """{method: case} of the case `name` from several folders, {method: folder}, whose labels must be the same."""
    cases = {}
    for method, folder in folders.items():
        readers = case_readers(folder)
        if name not in readers:
            raise FigureError(f"{folder}: holds no case {name}; there are {some([*readers])}")
        cases[method] = readers[name]()
    first = next(iter(cases.values()))
    for method, case in cases.items():
        other = f"is not that of {next(iter(folders.values()))}"
        if not np.array_equal(first["label"], case["label"]):
            raise FigureError(f"{folders[method]}: the label of {name} {other}; compare predictions of the same data")
        if first["image"].shape != case["image"].shape:
            raise FigureError(f"{folders[method]}: the scan of {name} {other}; compare predictions of the same data")
    return cases


def order_cases(scores):
    """Case names by falling score {case: Dice}; ties by name."""
    return sorted(scores, key=lambda case: (-scores[case], case))


def median_case(folder):
    """The case of median Dice in `folder`, or the first one where there are no labels."""
    readers = case_readers(folder)
    ordered = order_cases(scores_of(readers))
    return ordered[(len(ordered) - 1) // 2] if ordered else next(iter(readers))


def pick_for_gallery(scores):
    """[(place, case)]: the best, the median and the five worst cases by {case: Dice}, each case once."""
    ordered = order_cases(scores)
    places = {ordered[0]: "best"}
    places.setdefault(ordered[(len(ordered) - 1) // 2], "median")
    for place, case in zip(WORST, reversed(ordered[-5:]), strict=False):
        places.setdefault(case, place)
    return [(place, case) for case, place in places.items()]


def best_median_worst(folder):
    """[(place, name, case)] of the predictions in `folder`: `pick_for_gallery` by Dice; and how many have one.

    One case at a time is in memory, and those that are picked.
    """
    readers = case_readers(folder)
    scores = scores_of(readers)
    if not scores:
        raise FigureError(f"{folder}: its scans have no labels, so none is best or worst; draw the overlay of one")
    return [(place, name, readers[name]()) for place, name in pick_for_gallery(scores)], len(scores)
