"""Scans in the layouts that data sets come in, into the layout that is trained on; and the whole way, BraTS-shaped."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import ball
from prepare_nifti import main

from mtseg.datasets import LAHeart
from mtseg.images import png_bytes

nibabel = pytest.importorskip("nibabel", reason='pip install -e ".[test]"')

AFFINE = np.array([[-0.9, 0.1, 0, 20], [0.1, 0.9, 0, -30], [0, 0, 1.5, 5], [0, 0, 0, 1]])
BRATS = ("flair", "t1", "t1ce", "t2")
SHAPE = (26, 22, 18)


def save(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def scan(number, channels=1, values=(1,), shape=SHAPE):
    """A scan of `channels` channels, 0 outside a box, and nested balls with the values of its label."""
    rng = np.random.default_rng(number)
    centre = rng.uniform((11, 9, 7), (14, 12, 10))
    label = np.zeros(shape, np.uint8)
    for value, radius in zip(values, (5, 3.5, 2), strict=False):
        label[ball(shape, centre, radius)] = value
    image = np.zeros((channels, *shape), np.float32)
    inside = (slice(2, -2), slice(1, -1), slice(1, -1))
    for channel in range(channels):
        bright = 100 + 40 * np.take([0, 1, -1, 2, -2], label) * (1 + channel / 3)
        image[(channel, *inside)] = (bright + 10 * rng.standard_normal(shape))[inside]
    return image, label


def make_brats(root, cases=6, unlabeled=1, values=(2, 1, 4)):
    for number in range(cases + unlabeled):
        case = f"BraTS_{number:03}"
        image, label = scan(number, 4, values)
        for name, channel in zip(BRATS, image, strict=True):
            save(root / case / f"{case}_{name}.nii.gz", channel)
        if number < cases:
            save(root / case / f"{case}_seg.nii.gz", label)
    return root


def make_decathlon(root, train=4, test=2, version=1, test_labels=False):
    """Version 1: the Decathlon, a file a case; 2: nnU-Net, numbered files, two channels."""
    content = {"labels": {"0": "background", "1": "a", "2": "b"}, "modality": {"0": "MRI"}}
    if version == 2:
        content = {"labels": {"background": 0, "a": 1, "b": 2}, "channel_names": {"0": "T1", "1": "T2"}}
    for number in range(train + test):
        part, case = "Tr" if number < train else "Ts", f"heart_{number}"
        image, label = scan(number, version, (1, 2))
        for channel, name in enumerate([case] if version == 1 else [f"{case}_0000", f"{case}_0001"]):
            save(root / f"images{part}" / f"{name}.nii.gz", image[channel])
        if part == "Tr" or test_labels:
            save(root / f"labels{part}" / f"{case}.nii.gz", label)
    (root / "imagesTr/._heart_0.nii.gz").write_bytes(b"what a Mac leaves in an archive")
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def words(*arguments, **flags):
    return [*map(str, arguments), *(w for name, value in flags.items() for w in (f"--{name}", *str(value).split()))]


def read(root, case):
    with h5py.File(root / "data" / case / "mri_norm2.h5") as file:
        return {name: file[name][...] for name in file}, dict(file.attrs)


@pytest.mark.parametrize("version", [1, 2])
def test_the_decathlons_and_nnunets_layout(tmp_path, version, capsys):
    source = make_decathlon(tmp_path / "Task02", version=version)
    main(words(source, tmp_path / "out", val=1, labelnum=2))
    lists = {p.name: p.read_text().split() for p in (tmp_path / "out").glob("*.list")}
    assert sorted(lists["train.list"] + lists["val.list"]) == [f"heart_{n}" for n in range(4)]
    assert lists["unlabeled.list"] == ["heart_4", "heart_5"]
    assert lists.keys() == {"train.list", "val.list", "unlabeled.list"}
    datasets, attributes = read(tmp_path / "out", "heart_0")
    image, label = scan(0, version, (1, 2))
    assert datasets["label"].dtype == np.uint8
    # The affine runs to the left along the first axis: it is mirrored; the crop leaves the 0 outside away.
    expected = np.flip(label, 0)[2:-2, 1:-1, 1:-1]
    np.testing.assert_array_equal(datasets["label"], expected)
    body = np.flip(image, 1)[:, 2:-2, 1:-1, 1:-1]
    body = np.stack([(c - c.mean()) / c.std() for c in body.astype(float)])
    np.testing.assert_allclose(datasets["image"], body[0] if version == 1 else body, atol=1e-4)
    np.testing.assert_allclose(attributes["spacing"], np.linalg.norm(AFFINE[:3, :3], axis=0), rtol=1e-6)
    np.testing.assert_allclose(attributes["original_affine"], AFFINE, rtol=1e-6)
    assert tuple(attributes["grid_original_shape"]) == SHAPE
    assert "label" not in read(tmp_path / "out", "heart_5")[0]
    assert "--num_classes 3" in capsys.readouterr().out
    assert len(LAHeart(tmp_path / "out", num_classes=3)) == 3


def test_labelled_test_images_are_the_test_cases(tmp_path):
    source = make_decathlon(tmp_path / "Task02", test_labels=True)
    main(words(source, tmp_path / "out"))
    assert (tmp_path / "out/test.list").read_text().split() == ["heart_4", "heart_5"]
    with pytest.raises(SystemExit):
        main(words(source, tmp_path / "other", patient_id="heart"))
    assert not (tmp_path / "other").exists()


def test_a_label_whose_scan_is_missing_is_refused(tmp_path, capsys):
    source = make_decathlon(tmp_path / "Task02", train=4, test=0)
    (source / "imagesTr/heart_1.nii.gz").unlink()
    with pytest.raises(SystemExit) as stopped:
        main(words(source, tmp_path / "out"))
    assert stopped.value.code == 2 and not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    assert "heart_1.nii.gz: a label without an image; add the image, remove it, or say by --labels where" in said


def test_labels_of_other_folders_and_pictures_are_passed_over(tmp_path):
    source = make_decathlon(tmp_path / "Task02", train=3, test=2)
    (source / "labelsTr/heart_0.png").write_bytes(png_bytes(np.zeros((4, 4), np.uint8)))
    main(words(source, tmp_path / "out"))
    main(words(source / "imagesTs", tmp_path / "test", like=tmp_path / "out/preprocessing.json"))
    assert len(list((tmp_path / "test/data").iterdir())) == 2


def test_scans_that_nobody_labelled_yet_are_prepared(tmp_path):
    for number in range(3):
        save(tmp_path / f"scans/s{number}.nii.gz", scan(number)[0])
    main(words(tmp_path / "scans", tmp_path / "out"))
    settings = json.loads((tmp_path / "out/preprocessing.json").read_text())
    assert settings["labels"] == [0, 1] and len((tmp_path / "out/unlabeled.list").read_text().split()) == 3


def test_labels_beside_the_images_of_an_nnunet_folder_are_taken(tmp_path):
    source = make_decathlon(tmp_path / "Task02", train=3, test=0)
    for path in (source / "labelsTr").iterdir():
        path.rename(source / "imagesTr" / path.name.replace(".nii.gz", "_seg.nii.gz"))
    for given in (source, source / "imagesTr"):
        main(words(given, tmp_path / f"from_{given.name}"))
        assert len((tmp_path / f"from_{given.name}/train.list").read_text().split()) == 3


def test_patients_are_recognised_in_the_names_and_said(tmp_path, capsys):
    """Two time points of each patient, called as in BraTS 2023; and names from which nobody could tell."""
    for case in (f"BraTS-GLI-{patient:05}-{time:03}" for patient in range(4) for time in range(2)):
        image, label = scan(0, 2)
        for name, channel in zip(("t1n", "t2w"), image, strict=True):
            save(tmp_path / f"brats/{case}/{case}-{name}.nii.gz", channel)
        save(tmp_path / f"brats/{case}/{case}-seg.nii.gz", label)
    main(words(tmp_path / "brats", tmp_path / "out", test=2, labelnum=1))
    lists = {name: (tmp_path / f"out/{name}.list").read_text().split() for name in ("train", "test")}
    patients = {name: {case[:15] for case in cases} for name, cases in lists.items()}
    assert len(lists["test"]) == 4 and len(patients["test"]) == 2 and not patients["test"] & patients["train"]
    out = capsys.readouterr().out
    assert "4 patients in 8 cases" in out and "BraTS-GLI-00000 has BraTS-GLI-00000-000, BraTS-GLI-00000-001" in out
    assert json.loads((tmp_path / "out/splits.json").read_text())["patient_id"].startswith("^(BraTS")
    for name in ("Healthy_1", "Healthy_2", "Sick_1"):
        save(tmp_path / f"some/{name}.nii.gz", scan(0)[0][0])
        save(tmp_path / f"labels/{name}.nii.gz", scan(0)[1])
    with pytest.raises(SystemExit) as stopped:
        main(words(tmp_path / "some", tmp_path / "none", labels=tmp_path / "labels", test=1))
    assert stopped.value.code == 2 and "whether Healthy_1 and Healthy_2 are of one patient" in capsys.readouterr().err
    main(words(tmp_path / "some", tmp_path / "each", labels=tmp_path / "labels", test=1, patient_id=".+"))
    assert "every case is taken for another patient" in capsys.readouterr().out


@pytest.mark.parametrize("told", ["dataset.json", "--ignore"])
def test_voxels_that_nobody_labelled_become_255(tmp_path, capsys, told):
    source = make_decathlon(tmp_path / "in", version=2)
    labels = {}
    for path in sorted((source / "labelsTr").iterdir()):
        label = np.asarray(nibabel.load(path).dataobj).copy()
        label[10:13] = 3
        save(path, label)
        labels[path.name[:-7]] = label
    content = {"labels": {"background": 0, "a": 1, "b": 2, "ignore": 3}, "channel_names": {"0": "T1", "1": "T2"}}
    if told == "--ignore":
        (source / "dataset.json").unlink()
    else:
        (source / "dataset.json").write_text(json.dumps(content))
    main(words(source, tmp_path / "out", **({"ignore": 3} if told == "--ignore" else {})))
    assert "train with --num_classes 3 --ignore_index 255" in capsys.readouterr().out
    settings = json.loads((tmp_path / "out/preprocessing.json").read_text())
    assert (settings["labels"], settings["ignore"]) == ([0, 1, 2], 3)
    for case, label in labels.items():
        expected = np.flip(np.where(label == 3, 255, label), 0)[2:-2, 1:-1, 1:-1]
        np.testing.assert_array_equal(read(tmp_path / "out", case)[0]["label"], expected)
    assert len(LAHeart(tmp_path / "out", num_classes=3, ignore_index=255)) == 4


def test_several_channels_in_one_file_and_a_spacing(tmp_path):
    image, label = scan(0, 3)
    save(tmp_path / "in/a.nii.gz", np.moveaxis(image, 0, -1))
    save(tmp_path / "in/b.nii.gz", np.moveaxis(image, 0, -1))
    save(tmp_path / "labels/a.nii.gz", label.astype(np.float32))
    main(
        words(
            tmp_path / "in",
            tmp_path / "out",
            labels=tmp_path / "labels",
            spacing="1.8 1.8 1.5",
            normalization="percentile",
        )
    )
    datasets, attributes = read(tmp_path / "out", "a")
    assert datasets["image"].shape == (3, 11, 10, 16)
    assert set(np.unique(datasets["label"])) == {0, 1}
    assert attributes["spacing"].tolist() == [1.8, 1.8, 1.5]
    assert attributes["normalization"].shape == (3, 4) and np.isfinite(attributes["normalization"]).all()
    assert json.loads((tmp_path / "out/preprocessing.json").read_text())["labels"] == [0, 1]
    # More scans, without any label, in the same way.
    main(words(tmp_path / "in", tmp_path / "more", like=tmp_path / "out/preprocessing.json"))
    np.testing.assert_array_equal(read(tmp_path / "more", "b")[0]["image"], datasets["image"])
    assert (tmp_path / "more/unlabeled.list").read_text().split() == ["a", "b"]
    assert not (tmp_path / "more/train.list").exists()


def test_a_ct_window(tmp_path):
    source = make_decathlon(tmp_path / "Task09", train=2, test=0)
    main(words(source, tmp_path / "out", normalization="ct", window="100 50", crop="none", orientation="file"))
    image, _ = scan(1, 1, (1, 2))
    np.testing.assert_allclose(
        read(tmp_path / "out", "heart_1")[0]["image"], (image[0].clip(75, 125) - 75) / 50, atol=1e-5
    )


MISTAKES = {
    "no such folder": "nowhere: no such file or folder",
    "no volumes": "no volumes in it",
    "there already": "exists already",
    "a channel missing": "case BraTS_002 has flair, t1, t1ce where the data set has flair, t1, t1ce, t2",
    "a name of its own": "W39_Segm.nii.gz: in a case's folder every file is called BraTS_002_<channel>",
    "another shape": "BraTS_002_t1.nii.gz: has shape",
    "another place": "BraTS_002_seg.nii.gz: lies up to 30 mm from its image",
    "truncated": "BraTS_002_t2.nii.gz: not a whole .nii.gz file",
    "nan": "BraTS_002_flair.nii.gz: the image holds NaN",
    "no label": "BraTS_002_seg.nii.gz: is no label",
    "too many": "--test 9",
    "twice": "with another ending too",
}


@pytest.mark.parametrize(("mistake", "said"), MISTAKES.items())
def test_mistakes_leave_nothing_behind(tmp_path, capsys, mistake, said):
    source, out = make_brats(tmp_path / "in", cases=3, unlabeled=0), tmp_path / "out"
    case, flags = source / "BraTS_002", {}
    image, label = scan(2, 4, (2, 1, 4))
    if mistake == "no such folder":
        source = tmp_path / "nowhere"
    elif mistake == "no volumes":
        source = tmp_path / "empty"
        source.mkdir()
    elif mistake == "there already":
        out.mkdir()
    elif mistake == "a channel missing":
        (case / "BraTS_002_t2.nii.gz").unlink()
    elif mistake == "a name of its own":
        (case / "BraTS_002_seg.nii.gz").rename(case / "W39_Segm.nii.gz")
    elif mistake == "another shape":
        save(case / "BraTS_002_t1.nii.gz", image[0][1:])
    elif mistake == "another place":
        save(case / "BraTS_002_seg.nii.gz", label, AFFINE + np.array([[0, 0, 0, 30], *[[0] * 4] * 3]))
    elif mistake == "truncated":
        path = case / "BraTS_002_t2.nii.gz"
        path.write_bytes(path.read_bytes()[:2000])
    elif mistake == "nan":
        image[0, 5, 5, 5] = np.nan
        save(case / "BraTS_002_flair.nii.gz", image[0])
    elif mistake == "no label":
        save(case / "BraTS_002_seg.nii.gz", label + np.float32(0.5))
    elif mistake == "too many":
        flags["test"] = 9
    elif mistake == "twice":
        (case / "BraTS_002_t2.nii").write_bytes(gzip.decompress((case / "BraTS_002_t2.nii.gz").read_bytes()))
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(SystemExit) as stopped:
        main(words(source, out, **flags))
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.count("error: ") == 1 and err.count("\n") == 1
    assert said in err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"spacing": "1 1"}, "--spacing takes three"),
        ({"spacing": "1 1 x"}, "--spacing takes three"),
        ({"normalization": "ct"}, "--window"),
        ({"window": "40 400"}, "--window"),
        ({"normalization": "ct", "window": "40 0"}, "--window"),
        ({"test": -1}, "--test"),
        ({"like": "preprocessing.json", "spacing": "1 1 1"}, "--like decides --spacing"),
        ({"like": "preprocessing.json", "ignore": 1}, "--like decides --ignore"),
    ],
)
def test_flags_that_make_no_sense(tmp_path, capsys, flags, said):
    with pytest.raises(SystemExit) as stopped:
        main(words(tmp_path, tmp_path / "out", **flags))
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_without_nibabel_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    source = make_decathlon(tmp_path / "in")
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(SystemExit) as stopped:
        main(words(source, tmp_path / "out"))
    assert stopped.value.code == 2
    assert "pip install nibabel" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"labels": {"a": "x"}}',
        '{"labels": {"ignore": [3, 4], "a": 1}}',
        '{"labels": {"ignore": 1, "a": 1}}',
        '{"labels": {"a": 1}, "modality": {"0": "T1"}}',
    ],
)
def test_a_dataset_json_that_is_none(tmp_path, capsys, content):
    source = make_decathlon(tmp_path / "in", version=2)
    (source / "dataset.json").write_text(content)
    with pytest.raises(SystemExit):
        main(words(source, tmp_path / "out"))
    assert "dataset.json" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["prepare_nifti", "make_splits"])
def test_the_scripts_run_from_anywhere(tmp_path, script):
    path = Path(__file__).resolve().parents[1] / "data" / f"{script}.py"
    done = subprocess.run([sys.executable, path, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--patient_id REGEX" in done.stdout
