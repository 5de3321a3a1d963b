import itertools
import json
import re

import h5py
import numpy as np
import pytest
from conftest import make_data
from make_splits import main

from mtseg import splits
from mtseg.splits import (
    SplitError,
    check_split,
    describe,
    known_patients,
    missing_classes,
    patient_of,
    recognise_patients,
    split_by_patient,
)

SIDES = {"train": 0, "unlabeled": 0, "val": 1, "test": 2}


def random_cases(rng):
    """Names like p07_s2, some patients with several scans, some scans without a label."""
    cases = [f"p{p:02}_s{s}" for p in range(rng.integers(6, 25)) for s in range(rng.integers(1, 5))]
    with_label = rng.random(len(cases)) < 0.7
    return [c for c, w in zip(cases, with_label, strict=True) if w], [
        c for c, w in zip(cases, with_label, strict=True) if not w
    ]


@pytest.mark.parametrize("seed", range(40))
def test_no_patient_is_ever_on_two_sides(seed):
    rng = np.random.default_rng(seed)
    labeled, without_label = random_cases(rng)
    patients = {case[:3] for case in labeled}
    test, val = rng.integers(0, len(patients) // 3 + 1, 2)
    asked = {"labelnum": 1, "val": int(val), "test": int(test), "seed": seed, "patient_id": r"p\d+"}
    split = split_by_patient(labeled, without_label, **asked)
    where = {}
    for name, side in SIDES.items():
        for case in split[name]:
            assert where.setdefault(case[:3], side) == side
    everything = sorted(case for name in (*SIDES, "left_out") for case in split[name])
    assert everything == sorted([*labeled, *without_label])
    assert not set(split["unlabeled"]) & set(labeled)
    assert len({case[:3] for case in split["test"]}) == test
    assert len({case[:3] for case in split["val"]}) == val
    assert {case[:3] for case in split["train"][: split["labelnum"]]} == {split["train"][0][:3]}


NAMES = {  # of cases: the patients among them
    "Decathlon, nnU-Net": (["la_003", "la_004", "la_010"], ["la_003", "la_004", "la_010"]),
    "BraTS 2021": (["BraTS2021_00000", "BraTS2021_00002"], ["BraTS2021_00000", "BraTS2021_00002"]),
    "BraTS 2023": (
        ["BraTS-GLI-00005-000", "BraTS-GLI-00005-001", "BraTS-GLI-00006-000", "BraTS-MET-00006-000"],
        ["BraTS-GLI-00005"] * 2 + ["BraTS-GLI-00006", "BraTS-MET-00006"],
    ),
    "ACDC in nnU-Net": (["patient001_frame01", "patient001_frame12", "patient002_frame01"], ["1", "1", "2"]),
    "BIDS": (["sub-07_ses-1", "sub-07_ses-2", "sub-8"], ["07", "07", "8"]),
    "scans by number": (["p07_1", "p07_2", "p08_1", "p9_1"], ["p07", "p07", "p08", "p9"]),
    "scans by number, two numbers": (["MR_001_1", "MR_001_2", "MR_002_1"], ["1", "1", "2"]),
    "scans by name": (["012-left", "012-right", "013-left"], ["012", "012", "013"]),
    "nothing in common": (["anna", "bob", "carl_2"], ["anna", "bob", "carl_2"]),
    "unlike series": (["liver_7", "la_3"], ["liver_7", "la_3"]),
}


@pytest.mark.parametrize("cases", NAMES.values(), ids=NAMES)
def test_patients_are_recognised_in_the_names_of_their_scans(cases):
    cases, patients = cases
    pattern = recognise_patients(cases)
    assert pattern is not None
    for a, x in zip(cases, patients, strict=True):
        for b, y in zip(cases, patients, strict=True):
            assert (patient_of(a, pattern) == patient_of(b, pattern)) == (x == y)


def test_two_scans_of_a_patient_are_never_on_two_sides_without_a_flag():
    cases = [f"p{patient:02}_{scan}" for patient in range(10) for scan in range(3)]
    for seed in range(20):
        split = split_by_patient(cases, labelnum=2, val=2, test=3, seed=seed)
        sides = [{case[:3] for case in split[name]} for name in ("train", "val", "test")]
        assert sum(map(len, sides)) == len(set.union(*sides)) == 10
        assert len(split["test"]) == 9 and split["labelnum"] == 6
    assert "10 patients in 30 cases" in describe(split) and "p00 has p00_0, p00_1, p00_2" in describe(split)
    assert "every case is taken for another patient" in describe(split_by_patient(["la_1", "la_2"], test=1))


def test_where_a_name_has_two_more_parts_the_last_alone_is_not_taken_away():
    """patient_visit_slice: what is left would be a visit, and a patient with two on both sides."""
    cases = [f"{patient:03}_{visit}_{number:02}" for patient in range(6) for visit in (1, 2) for number in (1, 2)]
    with pytest.raises(SplitError) as error:
        split_by_patient(cases, test=3)
    assert "'^[^_-]+' (both are of 000) or" in str(error.value) and "(both are of 000_1) or" in str(error.value)
    assert known_patients("nowhere", cases)[0]["000_1_01"] == "000_1"  # where nobody is asked, as far as is known
    assert len(split_by_patient(cases, test=3, patient_id="^[^_-]+")["patients"]) == 6


def test_a_record_with_numbers_for_names_is_understood(tmp_path):
    (tmp_path / "splits.json").write_text(json.dumps({"patients": {"p1": [1, 2], "p2": [3]}}))
    assert known_patients(tmp_path, ["1", "2", "3"])[0] == {"1": "p1", "2": "p1", "3": "p2"}


def test_where_names_do_not_tell_the_patient_nothing_is_guessed():
    cases = ["Healthy_1", "Healthy_2", "Sick_1"]
    assert recognise_patients(cases) is None
    with pytest.raises(SplitError, match=r"whether Healthy_1 and Healthy_2 are of one patient; say it by --patient_id"):
        split_by_patient(cases, test=1)
    assert len(split_by_patient(cases, test=1, patient_id=".+")["patients"]) == 3
    assert len(split_by_patient(cases)["train"]) == 3  # nothing is kept apart from anything


def test_a_split_with_a_patient_on_both_sides_is_refused():
    """Tried by test cases that a data set brings along, and by hand."""
    with pytest.raises(SplitError, match=r"patient p1 is both trained and tested on .*p1_a.*p1_b"):
        split_by_patient(["p1_a", "p2_a"], fixed_test=["p1_b"], patient_id="^(p.)_")
    split_by_patient(["p1_a", "p2_a"], fixed_test=["p1_b"], patient_id=".+")  # every case another patient
    for one, other in [("train", "test"), ("train", "val"), ("val", "test"), ("unlabeled", "test")]:
        split = {name: [] for name in SIDES} | {one: ["p1_a"], other: ["p1_b"]}
        with pytest.raises(SplitError, match="on two sides"):
            check_split(split, {"p1_a": "p1", "p1_b": "p1"})


def test_an_unlabelled_scan_of_a_tested_patient_is_left_out():
    split = split_by_patient(["a_1"], ["a_2", "b_1"], fixed_test=["c_1"], patient_id="^[a-z]")
    assert (split["train"], split["unlabeled"], split["test"]) == (["a_1"], ["a_2", "b_1"], ["c_1"])
    split = split_by_patient(["a_1"], ["c_2", "b_1"], fixed_test=["c_1"], patient_id="^[a-z]")
    assert (split["unlabeled"], split["left_out"]) == (["b_1"], ["c_2"])


def test_the_same_seed_the_same_split_and_nested_labels():
    cases = [f"c{n}" for n in range(20)]
    first = split_by_patient(cases, labelnum=4, test=5, seed=3)
    again = split_by_patient(cases[::-1], labelnum=8, test=5, seed=3)
    assert sorted(first["test"]) == sorted(again["test"])
    assert first["train"] == again["train"]
    assert split_by_patient(cases, test=5, seed=4)["test"] != first["test"]
    few = split_by_patient(cases, labelnum=4, unlabeled=3, test=5, seed=3)
    assert few["train"] == first["train"][:7]
    assert len(few["left_out"]) == 8


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"test": 6}, "--test 6"),
        ({"test": 3, "val": 3}, "some must be trained on"),
        ({"test": 3, "labelnum": 4}, "are 7 patients, but 6"),
        ({"patient_id": "(x)"}, "finds no patient in the name of case c0"),
        ({"patient_id": "("}, "not a regular expression"),
    ],
)
def test_splits_that_are_not_possible(asked, words):
    with pytest.raises(SplitError, match=re.escape(words)):
        split_by_patient([f"c{n}" for n in range(6)], **asked)
    assert patient_of("sub-07_ses-2", "sub-([0-9]+)") == "07"


def test_the_script_rewrites_the_lists_of_a_prepared_data_set(tmp_path, capsys):
    root = make_data(tmp_path, train=9, test=3)
    for case, key in (("case_2", "label"), ("case_11", None)):
        with h5py.File(root / "data" / case / "mri_norm2.h5", "a") as file:
            if key:
                del file[key]
            else:
                file.attrs["fixed_test"] = True
    before = (root / "train.list").read_text()
    for arguments in (["--val", "2"], ["--val", "30", "--overwrite"], ["--patient_id", "(", "--overwrite"]):
        with pytest.raises(SystemExit) as stopped:
            main([str(root), *arguments])
        assert stopped.value.code == 2
        assert (root / "train.list").read_text() == before
    assert capsys.readouterr().err.count("error: ") == 3
    main([str(root), "--val", "2", "--labelnum", "3", "--overwrite"])
    assert "train with --labelnum 3" in capsys.readouterr().out
    lists = {name: (root / f"{name}.list").read_text().split() for name in SIDES}
    assert (lists["test"], lists["unlabeled"], len(lists["val"]), len(lists["train"])) == (
        ["case_11"],
        ["case_2"],
        2,
        8,
    )
    record = json.loads((root / "splits.json").read_text())
    assert record["train"] == lists["train"] and record["seed"] == 0
    main([str(root), "--overwrite"])
    assert not (root / "val.list").exists()


def can_have_all(held, sizes):
    """Whether patients can be dealt out to parts of `sizes` so that each part has every class: by trying them all."""
    every = set().union(*held.values())

    def dealt(patients, sizes):
        return not sizes or any(
            set().union(*(held[patient] for patient in part)) == every and dealt(patients - set(part), sizes[1:])
            for part in itertools.combinations(sorted(patients), sizes[0])
        )

    return dealt(set(held), sizes)


def test_every_class_is_in_every_part_where_that_is_possible():
    rng, possible = np.random.default_rng(0), 0
    for seed in range(250):
        cases = [f"p{patient}_{scan}" for patient in range(rng.integers(3, 8)) for scan in range(rng.integers(1, 3))]
        classes_of = {case: set(np.flatnonzero(rng.random(3) < rng.choice([0.3, 0.6, 0.9])).tolist()) for case in cases}
        held = {}
        for case in cases:
            held.setdefault(case[:2], set()).update(classes_of[case])
        sizes = tuple(int(size) for size in rng.integers(1, 3, 3))
        if sum(sizes) > len(held):
            continue
        asked = dict(zip(("test", "val", "labelnum"), sizes, strict=True))
        split = split_by_patient(cases, seed=seed, patient_id="^p.", classes_of=classes_of, **asked)
        assert [len({case[:2] for case in split[name]}) for name in ("test", "val")] == list(sizes[:2])
        assert len({case[:2] for case in split["train"][: split["labelnum"]]}) == sizes[2]
        assert (missing_classes(split, classes_of) == {}) == can_have_all(held, sizes)
        possible += can_have_all(held, sizes)
    assert 50 < possible < 200


def test_where_a_class_is_too_rare_training_has_it_first_then_the_test():
    cases = [f"c{number}" for number in range(30)]
    for seed in range(20):
        classes_of = {case: {"matrix"} for case in cases} | {"c7": {"matrix", "crack"}}
        split = split_by_patient(cases, test=5, val=5, labelnum=5, seed=seed, classes_of=classes_of)
        assert "c7" in split["train"][:5]
        assert missing_classes(split, classes_of) == {"test": ["crack"], "val": ["crack"]}
        classes_of["c9"] = {"crack"}
        split = split_by_patient(cases, test=5, val=5, seed=seed, classes_of=classes_of)
        assert {"c7", "c9"} & set(split["test"]) and {"c7", "c9"} & set(split["train"])
        assert missing_classes(split, classes_of) == {"val": ["crack"]}


def test_classes_that_are_everywhere_change_no_split():
    cases = [f"c{number}" for number in range(12)]
    plain, same = (
        split_by_patient(cases, test=3, val=2, labelnum=2, seed=4, classes_of=classes)
        for classes in (None, {case: {0, 1} for case in cases})
    )
    assert plain == same


def test_patients_can_be_given():
    patients = {"a1": "a", "b1": "b", "x": "b", "c1": "c"}
    split = split_by_patient(["a1", "b1", "x", "c1"], test=1, seed=0, patients=patients)
    assert split["patients"] == {"a": ["a1"], "b": ["b1", "x"], "c": ["c1"]}
    with pytest.raises(SplitError, match="are 5 patients, but 3 have a label"):
        split_by_patient(["a1", "b1", "x", "c1"], test=5, patients=patients)
    with pytest.raises(SplitError, match="patient b is both trained and tested on"):
        split_by_patient(["a1", "b1"], fixed_test=["x"], patients=patients)


def test_lists_that_cannot_be_put_in_their_places_leave_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(splits.os, "replace", full)
    with pytest.raises(SplitError, match="its lists could not be written"):
        splits._write(tmp_path, {"train.list": "a\n", "test.list": "b\n"})
    assert not list(tmp_path.iterdir())


def test_the_script_splits_acdc_by_patient(tmp_path):
    """Its volumes lie in data/<case>.h5; two frames of a patient are never on two sides."""
    cases = [f"patient{patient:03}_frame{frame:02}" for patient in range(1, 11) for frame in (1, 9)]
    (tmp_path / "data").mkdir()
    for case in cases:
        with h5py.File(tmp_path / "data" / f"{case}.h5", "w") as file:
            file["image"] = file["label"] = np.zeros((2, 4, 4))
    main([str(tmp_path), "--test", "3", "--val", "1", "--labelnum", "2"])
    lists = {name: (tmp_path / f"{name}.list").read_text().split() for name in ("train", "val", "test")}
    assert sorted(itertools.chain.from_iterable(lists.values())) == cases
    assert [len(lists[name]) for name in ("train", "val", "test")] == [12, 2, 6]
    assert len({case[:10] for case in lists["test"]}) == 3


def test_the_script_leaves_equal_lists_alone_and_asks_before_others(tmp_path, capsys):
    root = make_data(tmp_path, train=9, test=3)
    main([str(root), "--test", "3", "--overwrite"])
    main([str(root), "--test", "3"])
    before = (root / "test.list").read_bytes()
    with pytest.raises(SystemExit):
        main([str(root), "--test", "3", "--seed", "1"])
    assert f"{root}: has another train.list, test.list already; replace with --overwrite" in capsys.readouterr().err
    assert (root / "test.list").read_bytes() == before


def test_the_script_splits_a_folder_of_images(tmp_path, capsys):
    """By specimen; images without a mask are unlabelled, and left out where their specimen is tested."""
    for name in [f"spot{spot}_{image}d" for spot in range(1, 6) for image in range(3)]:
        for folder in ("images", "masks") if not name.endswith("2d") else ("images",):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{name}.png").touch()
    main([str(tmp_path), "--test", "2", "--labelnum", "1", "--patient_id", "^(spot[0-9])"])
    lists = {name: (tmp_path / f"{name}.list").read_text().split() for name in ("train", "test", "unlabeled")}
    assert [len(names) for names in lists.values()] == [6, 4, 3]
    assert len({name[:5] for name in lists["test"]}) == 2
    assert {name[:5] for name in lists["unlabeled"]} == {name[:5] for name in lists["train"]}
    assert "2 left out" in capsys.readouterr().out


def test_the_script_does_not_split_scans_that_nobody_prepared(tmp_path, capsys):
    (tmp_path / "heart_1.nii.gz").touch()
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "heart_1.nii.gz: is no image; prepare volumes first" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["heart_1.nii.gz"]
