import csv
import json
import math
from statistics import mean, pstdev

import numpy as np
import pytest
from medpy.metric import binary

from mtseg import metrics
from mtseg.results import summarize, table, to_csv, without_nan

NAN = math.nan
ROWS = [
    {"case": "a", "class": 1, "dice": 0.9, "jaccard": 0.8, "hd95": 3.0, "asd": 1.0},
    {"case": "b", "class": 1, "dice": 0.5, "jaccard": 0.4, "hd95": 8.0, "asd": 2.5},
    {"case": "c", "class": 1, "dice": 0.0, "jaccard": 0.0, "hd95": NAN, "asd": NAN},
]
SEVERAL = [
    {"case": "a", "class": 1, "nsd": 0.5, "dice": 0.9, "hd95": 3.0, "entropy": 7.0},
    {"case": "a", "class": 2, "nsd": 0.5, "dice": 0.7, "hd95": NAN},
    {"case": "b", "class": 1, "nsd": 0.5, "dice": 0.5, "hd95": 4.0, "entropy": 9.0},
    {"case": "b", "class": 2, "nsd": 0.5, "dice": 0.2, "hd95": 8.0},
]


def test_mean_and_deviation_over_cases_leave_out_what_is_not_defined_and_count_it():
    (entry,) = summarize(ROWS)
    assert list(entry) == ["class", "cases", "empty", "dice", "jaccard", "hd95", "asd"]
    assert (entry["class"], entry["cases"], entry["empty"]) == (1, 3, 1)
    assert entry["dice"] == pytest.approx({"mean": mean((0.9, 0.5, 0)), "std": pstdev((0.9, 0.5, 0))})
    assert entry["hd95"] == {"mean": 5.5, "std": 2.5}
    (entry,) = summarize(ROWS[2:])
    assert math.isnan(entry["asd"]["mean"]) and math.isnan(entry["asd"]["std"])


def test_several_classes_get_the_mean_over_classes_of_each_case():
    one, two, both = summarize(SEVERAL)
    assert (one["class"], two["class"], both["class"]) == (1, 2, "mean")
    assert (both["cases"], both["empty"], one["empty"], two["empty"]) == (2, 1, 0, 1)
    # The means over the classes are 0.8 and 0.35; a has no mean distance, as its class 2 has none, and that of b is 6.
    assert both["dice"] == pytest.approx({"mean": 0.575, "std": 0.225})
    assert both["hd95"] == {"mean": 6, "std": 0}
    assert one["entropy"] == both["entropy"] == {"mean": 8, "std": 1}
    assert math.isnan(two["entropy"]["mean"])


@pytest.mark.parametrize("unit", ["voxel", "mm"])
def test_the_table_names_the_unit_of_the_distances_and_of_nothing_else(unit):
    lines = table(ROWS, unit).splitlines()
    assert lines[0].split() == ["case", "Dice", "%", "Jaccard", "%", "HD95", unit, "ASD", unit]
    assert lines[1].split() == ["a", "90.00", "80.00", "3.00", "1.00"]
    assert lines[3].split() == ["c", "0.00", "0.00", "nan", "nan"]
    assert lines[4].split() == "mean (std) 46.67 (36.82) 40.00 (32.66) 5.50 (2.50) 1.75 (0.75)".split()
    assert lines[5].startswith("1 of 3 cases have an empty mask:")
    assert len({len(line) for line in lines[:5]}) == 1


def test_the_table_of_several_classes():
    lines = table(SEVERAL).splitlines()
    assert lines[0].split() == ["case", "class", "Dice", "%", "HD95", "voxel", "NSD", "%", "entropy"]
    assert lines[2].split() == ["a", "2", "70.00", "nan", "50.00", "nan"]
    assert lines[7].split() == "mean (std) mean 57.50 (22.50) 6.00 (0.00) 50.00 (0.00) 8.00 (1.00)".split()
    assert lines[8:] == [line for line in lines if line.startswith("1 of 2 cases have an empty mask of class 2:")]


def test_a_class_in_neither_label_nor_prediction_is_said_to_count_in_full():
    rows = [{"case": case, "class": 1, "dice": dice, "hd95": math.nan} for case, dice in (("a", 1.0), ("b", 0.0))]
    said = "2 of 2 cases have an empty mask: they count in Dice and the like (1 with 100 %, as label and prediction are"
    assert table(rows).splitlines()[-1].startswith(said)


CLASSES = ("matrix", "carbide", "1, <network>")


@pytest.fixture
def micrographs():
    """(rows, {case: (prediction, label)}) of images of several sizes and two sets; carbide is not in all of them."""
    rng, rows, maps = np.random.default_rng(0), [], {}
    for number, shape in enumerate(((30, 20), (8, 9), (40, 7))):
        case, group = f"image_{number}", "steel" if number < 2 else "coating"
        label = rng.choice(3, shape, p=(0.6, 0.1, 0.3) if number else (0.7, 0.0, 0.3))
        prediction = np.where(rng.random(shape) < 0.3, rng.choice((0, 2), shape), label)
        maps[case] = prediction, label
        for value, name in enumerate(CLASSES):
            row = {"case": case, "set": group, "class": name, "pixel_accuracy": metrics.pixel_accuracy(*maps[case])}
            rows.append(row | metrics.all_metrics(prediction == value, label == value))
    return rows, maps


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("chosen", [(0, 1, 2), (0,), (1, 2)])
def test_pooled_scores_are_those_of_all_pixels_in_one_image(micrographs, chosen):
    """Against MedPy, on the pixels of all images laid end to end."""
    rows, maps = micrographs
    rows = [row for row in rows if int(row["case"][-1]) in chosen]
    prediction, label = (np.concatenate([maps[f"image_{n}"][i].ravel() for n in chosen]) for i in (0, 1))
    right = np.mean(prediction == label)
    expected = {}
    for value, name in enumerate(CLASSES):
        masks = prediction == value, label == value
        scores = {m: f(*masks) for m, f in (("dice", binary.dc), ("jaccard", binary.jc), ("recall", binary.recall))}
        scores |= {"precision": binary.precision(*masks), "pixel_accuracy": right}
        if not any(mask.any() for mask in masks):  # MedPy divides 0 by 0 there
            scores |= dict.fromkeys(("dice", "jaccard", "recall", "precision"), 1)
        expected[name] = scores
    over_classes = {metric: mean(scores[metric] for scores in expected.values()) for metric in scores}
    entries = [entry for entry in summarize(rows) if "set" not in entry]
    assert [entry["class"] for entry in entries] == [*CLASSES, "mean"]
    for entry, scores in zip(entries, [*expected.values(), over_classes], strict=True):
        assert entry["pooled"] == pytest.approx(scores)
        assert not {"tp", "fp", "fn", "tn"} & entry.keys()


def test_each_set_is_summed_up_before_all_of_them(micrographs):
    rows, _ = micrographs
    summary = summarize(rows)
    assert [entry.get("set") for entry in summary] == ["steel"] * 4 + ["coating"] * 4 + [None] * 4
    of_steel = summarize([row for row in rows if row["set"] == "steel"])
    assert [{"set": "steel", **entry} for entry in of_steel] == summary[:4]
    assert all("set" not in entry for entry in of_steel)
    assert [entry["cases"] for entry in summary[::4]] == [2, 1, 3]
    # Sets with other classes: the pixel accuracy of all is that of all pixels, each once.
    other = [row for row in rows if row["set"] == "steel" or row["class"] != "carbide"]
    assert summarize(other)[-1]["pooled"]["pixel_accuracy"] == summary[-1]["pooled"]["pixel_accuracy"]
    assert "pooled" not in summarize(ROWS)[0]


def test_the_table_of_images_names_how_scores_are_summed_up(micrographs):
    shown = ("case", "set", "class", "dice", "jaccard", "hd95", "tp", "fp", "fn", "tn")
    rows = [{key: row[key] for key in shown} for row in micrographs[0]]
    lines = table(rows, "um", pooled=True).splitlines()
    assert lines[0].split() == ["set", "case", "class", "Dice", "%", "IoU", "%", "HD95", "um"]
    assert len({len(line) for line in lines[: 1 + 9 + 3 * 8]}) == 1
    starts = [line.split()[:2] for line in lines[1 : 1 + 9 + 3 * 8]]
    means = ["mean", "pooled"] * 4
    assert [b for a, b in starts if a == "steel"] == ["image_0"] * 3 + ["image_1"] * 3 + means
    assert [b for a, b in starts if a == "coating"] == ["image_2"] * 3 + means
    assert [b for a, b in starts if a == "all"] == means
    assert starts == sorted(starts, key=lambda start: ("steel", "coating", "all").index(start[0]))
    pooled = summarize(rows)[-1]["pooled"]
    last = [line for line in lines if line.split()[:2] == ["all", "pooled"]][-1]
    assert last.split() == ["all", "pooled", "mean", f"{100 * pooled['dice']:.2f}", f"{100 * pooled['jaccard']:.2f}"]
    assert lines[-1] == "mean (std): over the images, each counts alike; pooled: of the pixels of all images together"
    assert "pooled" not in table(rows, "pixel") and "pooled" not in table(ROWS, "pixel", pooled=True)


def test_csv_is_unscaled_and_read_back_the_same():
    text = to_csv([*ROWS, {"case": "d,e", "class": 1, "dice": 1.0, "note": "text"}])
    back = list(csv.DictReader(text.splitlines()))
    assert text.splitlines()[0] == "case,class,dice,jaccard,hd95,asd"
    assert [row["case"] for row in back] == ["a", "b", "c", "d,e"]
    assert [float(row["dice"]) for row in back] == [0.9, 0.5, 0.0, 1.0]
    assert [row["hd95"] for row in back] == ["3.0", "8.0", "nan", "nan"]


def test_csv_holds_sets_names_and_whole_counts(micrographs):
    rows, _ = micrographs
    back = list(csv.DictReader(to_csv(rows).splitlines()))
    assert [(row["set"], row["case"], row["class"]) for row in back] == [
        (row["set"], row["case"], row["class"]) for row in rows
    ]
    assert [row["tp"] for row in back] == [str(row["tp"]) for row in rows]
    evil = [{"case": "a", "class": "=1+1", "set": "@b", "dice": 0.5}]
    assert to_csv(evil).splitlines()[1] == "'@b,a,'=1+1,0.5"


def test_rows_from_json_give_the_same_table():
    back = json.loads(json.dumps(without_nan(ROWS), allow_nan=False))
    assert table(back) == table(ROWS)
    assert summarize(back) == summarize(ROWS)


def test_csv_cells_that_a_spreadsheet_would_run_are_text():
    rows = [{"case": case, "class": 1, "dice": 0.5, "=1+1": 2.0} for case in ("=1+1", "-x", "@a", "+b", "-1.5", "a=1")]
    lines = list(csv.reader(to_csv(rows).splitlines()))
    assert lines[0] == ["case", "class", "dice", "'=1+1"]
    assert [line[0] for line in lines[1:]] == ["'=1+1", "'-x", "'@a", "'+b", "-1.5", "a=1"]
