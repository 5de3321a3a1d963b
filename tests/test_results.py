import csv
import json
import math
from statistics import mean, pstdev

import pytest

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
    with pytest.raises(ValueError, match="'cm'"):
        table(SEVERAL, "cm")


def test_csv_is_unscaled_and_read_back_the_same():
    text = to_csv([*ROWS, {"case": "d,e", "class": 1, "dice": 1.0, "note": "text"}])
    back = list(csv.DictReader(text.splitlines()))
    assert text.splitlines()[0] == "case,class,dice,jaccard,hd95,asd"
    assert [row["case"] for row in back] == ["a", "b", "c", "d,e"]
    assert [float(row["dice"]) for row in back] == [0.9, 0.5, 0.0, 1.0]
    assert [row["hd95"] for row in back] == ["3.0", "8.0", "nan", "nan"]


def test_rows_from_json_give_the_same_table():
    back = json.loads(json.dumps(without_nan(ROWS), allow_nan=False))
    assert table(back) == table(ROWS)
    assert summarize(back) == summarize(ROWS)


def test_csv_cells_that_a_spreadsheet_would_run_are_text():
    rows = [{"case": case, "class": 1, "dice": 0.5, "=1+1": 2.0} for case in ("=1+1", "-x", "@a", "+b", "-1.5", "a=1")]
    lines = list(csv.reader(to_csv(rows).splitlines()))
    assert lines[0] == ["case", "class", "dice", "'=1+1"]
    assert [line[0] for line in lines[1:]] == ["'=1+1", "'-x", "'@a", "'+b", "-1.5", "a=1"]
