"""Scans through inference.py: their own grid, other formats, what is asked for besides, long jobs, mistakes.

Where a test says "seen", the network is replaced by one that knows the answer from the image's brightness: what comes
out is then the label itself if, and only if, everything that was done to the scan was undone.
"""

import csv
import gc
import json
import math
import sys
import weakref

import h5py
import numpy as np
import prepare_nifti
import pytest
import torch
from conftest import PHASES, make_stacks, needs_compiler
from reference import fill
from scipy import stats
from test_prepare_nifti import AFFINE, SHAPE, make_brats, make_decathlon, save, scan, words

import inference
import train_mean_teacher
import train_sup
from mtseg.metrics import all_metrics
from mtseg.networks.unet import UNet
from mtseg.networks.vnet import VNet
from mtseg.results import OF_LARGEST
from mtseg.script import scans, windows
from mtseg.sliding_window import test_single_case as single_case
from mtseg.winograd import convolutions as winograd

nibabel = pytest.importorskip("nibabel", reason='pip install -e ".[test]"')

SETTINGS = {"orientation": "RAS", "crop": "nonzero", "normalization": "zscore", "window": None}
SETTINGS |= {"spacing": None, "labels": [0, 2, 4], "channels": None}
TURNED = np.array([[0.1, 0.2, -1.4, 9], [-0.9, 0.1, -0.2, 3], [0, -0.9, -0.2, -40], [0, 0, 0, 1]])
BRIGHT = {0: 100, 2: 200, 4: 300}


def make_run(folder, seeds=(0,), **changes):
    """A run's folder with untrained weights w<seed>.pth and a config.json; returns the weights' paths."""
    config = {"n_filters": 2, "num_classes": 3, "n_channels": 1, "has_dropout": True, "patch_size": [16, 16, 16]}
    config |= {"stride_xy": 16, "stride_z": 16, "model": "MT", "labelnum": 4, "seed": 7, "preprocessing": SETTINGS}
    config |= changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for seed in seeds:
        torch.manual_seed(seed)
        net = VNet(config["n_channels"], config["num_classes"], 2, normalization="batchnorm", has_dropout=True)
        net.out_conv.weight.data *= 30  # so that the classes differ from place to place
        torch.save(net.state_dict(), folder / f"w{seed}.pth")
    return [folder / f"w{seed}.pth" for seed in seeds]


def make_scans(folder, number=2, affine=AFFINE, ending=".nii.gz", shape=SHAPE):
    """Scans in <folder>/in whose brightness tells the label, 0 outside a box, and labels in <folder>/labels."""
    for index in range(number):
        _, label = scan(index, values=(2, 4), shape=shape)
        image = np.zeros(shape, np.float32)
        image[2:-2, 1:-1, 1:-1] = np.vectorize(BRIGHT.get)(label)[2:-2, 1:-1, 1:-1]
        for part, array in (("in", image), ("labels", label)):
            if ending == ".nrrd":
                nrrd = pytest.importorskip("nrrd")
                (folder / part).mkdir(parents=True, exist_ok=True)
                lps = np.diag([-1, -1, 1]) @ affine[:3]
                header = {"space": "left-posterior-superior", "space origin": lps[:, 3]}
                nrrd.write(str(folder / part / f"c{index}.nrrd"), array, header | {"space directions": lps[:, :3].T})
            else:
                save(folder / part / f"c{index}{ending}", array, affine)
    return folder / "in"


def seen(net, image, stride_xy, stride_z, patch_size, num_classes, **_):
    """As test_single_case, of a network that knows: the three brightnesses of `make_scans`, in their order."""
    levels = np.unique(image.round(3))[-3:]
    distance = np.abs(image - levels.reshape(-1, 1, 1, 1))
    score = (distance == distance.min(axis=0)).astype(np.float32)
    return score.argmax(axis=0), score


def infer(weights, path, *arguments, **flags):
    return inference.main(words("--model_path", *np.atleast_1d(weights), "--input", path, *arguments, **flags))


def read(path):
    return np.asarray(nibabel.load(path).dataobj)


# ----------------------------------------------------------------------------------------------------- its own grid


@pytest.mark.parametrize("affine", [AFFINE, TURNED], ids=["flipped", "oblique"])
@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd"])
def test_seen_scans_come_back_on_their_own_grid(tmp_path, monkeypatch, affine, ending):
    monkeypatch.setattr(windows, "test_single_case", seen)
    source = make_scans(tmp_path, affine=affine, ending=ending)
    (weights,) = make_run(tmp_path / "run")
    result = infer(weights, source, labels=tmp_path / "labels", output_dir=tmp_path / "out")
    assert (result["unit"], result["method"], result["labelnum"], result["seed"]) == ("mm", "MT", 4, 7)
    assert [row["dice"] for row in result["cases"]] == [1] * 4
    for index in range(2):
        name = f"c{index}{ending}"
        if ending == ".nrrd":
            sitk = pytest.importorskip("SimpleITK")
            written, label = (sitk.ReadImage(str(tmp_path / p / name)) for p in ("out/predictions", "labels"))
            assert written.GetDirection() == label.GetDirection() and written.GetOrigin() == label.GetOrigin()
            arrays = map(sitk.GetArrayFromImage, (written, label))
        else:
            written = nibabel.load(tmp_path / "out/predictions" / name)
            assert (written.affine == nibabel.load(source / name).affine).all()
            arrays = (read(tmp_path / "out/predictions" / name), read(tmp_path / "labels" / name))
        prediction, label = arrays
        assert prediction.dtype == np.uint8
        assert set(np.unique(prediction)) == {0, 2, 4}
        np.testing.assert_array_equal(prediction, label)


def test_with_another_spacing_the_shape_is_the_scans_own(tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "test_single_case", seen)
    source = make_scans(tmp_path, affine=TURNED)
    (weights,) = make_run(tmp_path / "run", preprocessing={**SETTINGS, "spacing": [1.2, 0.7, 0.8]})
    result = infer(weights, source / "c0.nii.gz", output_dir=tmp_path / "out")
    written = nibabel.load(tmp_path / "out/predictions/c0.nii.gz")
    assert written.shape == SHAPE and (written.affine == nibabel.load(source / "c0.nii.gz").affine).all()
    assert result["cases"] == [] and result["segmented"] == 1
    assert set(np.unique(read(tmp_path / "out/predictions/c0.nii.gz"))) <= {0, 2, 4}


def test_distances_are_in_the_unit_that_is_named(tmp_path):
    source = make_scans(tmp_path)
    (weights,) = make_run(tmp_path / "run")
    for unit, spacing in (("mm", np.linalg.norm(AFFINE[:3, :3], axis=0)), ("voxel", None)):
        out = tmp_path / unit
        result = infer(weights, source, labels=tmp_path / "labels", output_dir=out, unit=unit)
        prediction, label = read(out / "predictions/c1.nii.gz"), read(tmp_path / "labels/c1.nii.gz")
        for row, value in zip(result["cases"][2:], (2, 4), strict=True):
            expected = all_metrics(prediction == value, label == value, spacing)
            np.testing.assert_allclose([row[name] for name in expected], list(expected.values()), rtol=1e-6)
        assert json.loads((out / "metrics.json").read_text())["unit"] == unit


def test_prepared_files_go_back_to_the_scan_too(tmp_path, monkeypatch):
    """HDF5 that prepare_nifti made: measured on its own grid, written on the scan's."""
    monkeypatch.setattr(windows, "test_single_case", seen)
    source = make_scans(tmp_path, affine=TURNED)
    prepare_nifti.main(words(source, tmp_path / "data", labels=tmp_path / "labels"))
    (weights,) = make_run(tmp_path / "run", root_path=str(tmp_path / "data"))
    result = infer(weights, tmp_path / "data/data", output_dir=tmp_path / "out")
    assert [row["dice"] for row in result["cases"]] == [1] * 4
    np.testing.assert_array_equal(read(tmp_path / "out/predictions/c1.nii.gz"), read(tmp_path / "labels/c1.nii.gz"))
    np.testing.assert_allclose(nibabel.load(tmp_path / "out/predictions/c1.nii.gz").affine, TURNED, rtol=1e-6)


def test_a_label_beside_a_prepared_file_lies_where_its_scan_does(tmp_path, monkeypatch):
    """Mirrored and turned, so that its voxels lie in another order than the prepared file's."""
    monkeypatch.setattr(windows, "test_single_case", seen)
    source = make_scans(tmp_path, affine=TURNED)
    prepare_nifti.main(words(source, tmp_path / "data", labels=tmp_path / "labels"))
    (weights,) = make_run(tmp_path / "run", root_path=str(tmp_path / "data"))
    result = infer(weights, tmp_path / "data/data", labels=tmp_path / "labels", output_dir=tmp_path / "out")
    assert [row["dice"] for row in result["cases"]] == [1] * 4 and result["unit"] == "mm"


@pytest.mark.parametrize(
    ("attribute", "value", "said"),
    [
        ("original_affine", np.eye(3), "4 x 4"),
        ("original_affine", np.zeros((4, 4)), "4 x 4"),
        ("grid_shape", [4, 4, 4], ""),
        ("grid_original_shape", [10**6, 10**6, 10**6], "more than 1073741824 voxels"),
    ],
)
def test_a_prepared_file_whose_grid_is_wrong_costs_only_itself(tmp_path, monkeypatch, attribute, value, said):
    monkeypatch.setattr(windows, "test_single_case", seen)
    prepare_nifti.main(words(make_scans(tmp_path), tmp_path / "data", labels=tmp_path / "labels"))
    (weights,) = make_run(tmp_path / "run", root_path=str(tmp_path / "data"))
    with h5py.File(tmp_path / "data/data/c0/mri_norm2.h5", "a") as file:
        file.attrs[attribute] = value
    with pytest.raises(SystemExit) as stopped:
        infer(weights, tmp_path / "data/data", output_dir=tmp_path / "out")
    assert stopped.value.code == 1
    written = json.loads((tmp_path / "out/metrics.json").read_text())
    assert written["failures"].keys() == {"c0"} and f"{attribute} " in written["failures"]["c0"]
    assert said in written["failures"]["c0"] and {row["case"] for row in written["cases"]} == {"c1"}


# ------------------------------------------------------------------------------------------ what is asked for besides


def test_flips_and_several_checkpoints_are_averaged(tmp_path):
    source = make_scans(tmp_path, 1)
    weights = make_run(tmp_path / "run", seeds=(0, 1))
    flags = {"output_dir": tmp_path / "out", "weighting": "gaussian", "stride_xy": 8}
    result = infer(weights, source, "--tta", "--save_probabilities", **flags)
    assert result["protocol"]["tta"] == "flips of W and H" and result["protocol"]["weighting"] == "gaussian"
    assert len(result["checkpoint_sha256"]) == 2
    with h5py.File(tmp_path / "out/probabilities/c0.h5") as file:
        found = file["probabilities"][...]
    assert found.dtype == np.float16

    settings = {**SETTINGS, "orientation": "file"}
    image = scans.prepare(read(source / "c0.nii.gz"), None, None, settings).image
    total = 0
    for path in weights:
        net = VNet(1, 3, 2, normalization="batchnorm", has_dropout=True).eval()
        net.load_state_dict(torch.load(path))
        for axes in (), (0,), (1,), (0, 1):
            # In the scan's own axes: over all flips of W the mirrored axis of RAS makes no difference.
            _, score = single_case(net, np.flip(image, axes), 8, 16, (16, 16, 16), 3, weighting="gaussian")
            total = total + np.flip(score, [axis + 1 for axis in axes]) / 8
    expected = np.zeros((3, *SHAPE), np.float32)
    expected[0] = 1
    expected[:, 2:-2, 1:-1, 1:-1] = total
    np.testing.assert_allclose(found, expected, atol=2e-3)
    clear = np.abs(np.diff(np.sort(expected, axis=0)[-2:], axis=0))[0] > 1e-4
    prediction = read(tmp_path / "out/predictions/c0.nii.gz")
    np.testing.assert_array_equal(prediction[clear], np.array([0, 2, 4])[expected.argmax(axis=0)][clear])
    assert result["parameters"] == 2 * sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("channels", [1, 3])
def test_images_in_the_familys_files_are_mirrored_in_their_plane(tmp_path, capsys, channels):
    """`mri_norm2.h5`, whose slices would be the last axis, can hold an image of two axes."""
    rng, data = np.random.default_rng(0), tmp_path / "data"
    for case in ("c0", "c1"):
        (data / "data" / case).mkdir(parents=True)
        with h5py.File(data / "data" / case / "mri_norm2.h5", "w") as file:
            file["image"] = rng.normal(size=(channels, 20, 24)[channels == 1 :]).astype(np.float32)
            file["label"] = rng.integers(0, 3, (20, 24)).astype(np.uint8)
    (data / "test.list").write_text("c0\nc1\n")
    (weights,) = make_run(tmp_path / "run", n_channels=channels, dims=2, patch_size=[16, 16], root_path=str(data))
    net = VNet(channels, 3, 2, "batchnorm", has_dropout=True, dims=2).eval()
    torch.save(net.state_dict(), weights)
    taken = {"n_channels": 3 * channels, "context": 1, "dims": 2, "patch_size": [16, 16], "root_path": str(data)}
    (of_stacks,) = make_run(tmp_path / "stacks", **taken)
    torch.save(VNet(3 * channels, 3, 2, "batchnorm", has_dropout=True, dims=2).state_dict(), of_stacks)
    with pytest.raises(SystemExit):  # an image has no neighbours
        inference.main(["--model_path", str(of_stacks)])
    assert "an image, and the network takes slices with 1 neighbours" in capsys.readouterr().err
    words = [
        "--model_path",
        weights,
        "--tta",
        "--save_probabilities",
        "--intensity",
        "none",
        "--output_dir",
        tmp_path / "out",
    ]
    inference.main([str(word) for word in words])
    with h5py.File(data / "data/c1/mri_norm2.h5") as file:
        image = file["image"][...]
    expected = 0
    for axes in (), (-2,), (-1,), (-2, -1):
        _, score = single_case(net, np.flip(image, axes), 16, None, (16, 16), 3)
        expected = expected + np.flip(score, axes) / 4
    with h5py.File(tmp_path / "out/probabilities/c1.h5") as file:
        np.testing.assert_allclose(file["probabilities"][...], expected, atol=2e-3)


@needs_compiler
def test_winograds_convolutions_change_the_last_digits_alone(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(winograd, "convolve", lambda *given, own=winograd.convolve: calls.append(1) or own(*given))
    make_scans(tmp_path, number=1)
    run, found = tmp_path / "run", {}
    make_run(run, n_filters=16)
    torch.manual_seed(0)
    torch.save(VNet(1, 3, 16, "batchnorm", has_dropout=True).state_dict(), run / "w0.pth")
    for name, more in (("plain", []), ("winograd", ["--winograd"])):
        arguments = ["--model_path", run / "w0.pth", "--input", tmp_path / "in", "--output_dir", tmp_path / name]
        inference.main([*map(str, arguments), "--save_probabilities", *more])
        (file,) = (tmp_path / name / "probabilities").iterdir()
        with h5py.File(file) as stored:
            found[name] = stored["probabilities"][:].astype(float)
        assert bool(calls) == bool(more)
    np.testing.assert_allclose(found["winograd"], found["plain"], atol=1e-3)  # they are stored in float16


@pytest.mark.parametrize("method", ["ensemble", "teacher", "mc_dropout"])
def test_uncertainty(tmp_path, method):
    source = make_scans(tmp_path, 4)
    weights = make_run(tmp_path / "run", seeds=(0, 1))
    weights[1].rename(tmp_path / "run/ema_w0.pth")
    given = [weights[0], tmp_path / "run/ema_w0.pth"] if method == "ensemble" else weights[:1]
    flags = {"uncertainty": method, "labels": tmp_path / "labels"} | ({"mc_samples": 3} if "mc" in method else {})
    result = infer(given, source, "--save_probabilities", output_dir=tmp_path / "out", **flags)
    again = infer(given, source, output_dir=tmp_path / "again", **flags)
    assert again["uncertainty"] == result["uncertainty"]

    found = nibabel.load(tmp_path / "out/uncertainty/c1.nii.gz")
    assert found.get_data_dtype() == np.float32 and (found.affine == nibabel.load(source / "c1.nii.gz").affine).all()
    entropy = np.asarray(found.dataobj)
    assert 0 <= entropy.min() and 0.01 < entropy.max() <= math.log(3) + 1e-6
    prediction = read(tmp_path / "out/predictions/c1.nii.gz")
    assert result["uncertainty"]["cases"]["c1"] == pytest.approx(entropy[prediction > 0].mean(), rel=1e-4)
    if method == "ensemble":
        with h5py.File(tmp_path / "out/probabilities/c1.h5") as file:
            probabilities = file["probabilities"][...].astype(float)
        np.testing.assert_allclose(entropy, stats.entropy(probabilities, axis=0), atol=5e-3)
    dices = np.array([row["dice"] for row in result["cases"]]).reshape(4, 2).mean(axis=1)
    expected = stats.spearmanr(list(result["uncertainty"]["cases"].values()), 1 - dices).statistic
    assert result["uncertainty"]["rank_correlation"] == pytest.approx(expected, nan_ok=True)


def test_cleaning_up_is_done_and_recorded(tmp_path, monkeypatch):
    def noisy(*arguments, **keywords):
        _, score = seen(*arguments, **keywords)
        score[:, 0, 0, 0], score[:, 0, 0, 1] = np.eye(3)[[1, 2]]
        return score.argmax(axis=0), score

    monkeypatch.setattr(windows, "test_single_case", noisy)
    source = make_scans(tmp_path, 1)
    (weights,) = make_run(tmp_path / "run")
    for arguments, right in (([], False), (["--largest_component", "--fill_holes"], True)):
        result = infer(weights, source, *arguments, labels=tmp_path / "labels", output_dir=tmp_path / "out")
        assert (min(row["dice"] for row in result["cases"]) == 1) == right
    assert result["protocol"]["postprocessing"] == ["largest_component", "fill_holes"]
    # The largest piece measured beside is what its clean-up alone gives, and the rest is untouched.
    results = {}
    for flag in ("--no-keep_memory", "--largest_component", "--measure_largest"):
        out = tmp_path / f"out{flag}"
        results[flag] = infer(weights, source, flag, labels=tmp_path / "labels", output_dir=out)["cases"]
    for plain, cleaned, both in zip(*results.values(), strict=True):
        assert plain["dice"] < cleaned["dice"]
        assert both == plain | {f"{metric}_largest": cleaned[metric] for metric in OF_LARGEST}


# -------------------------------------------------------------------------------------------------------- long jobs


def test_a_broken_file_costs_only_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(windows, "test_single_case", seen)
    source = make_scans(tmp_path, 4)
    good = (source / "c1.nii.gz").read_bytes()
    (source / "c1.nii.gz").write_bytes(good[:300])
    save(source / "c2.nii.gz", np.zeros(SHAPE, np.float32))
    (weights,) = make_run(tmp_path / "run")
    arguments = (weights, source)
    flags = {"labels": tmp_path / "labels", "output_dir": tmp_path / "out"}
    with pytest.raises(SystemExit) as stopped:
        infer(*arguments, **flags)
    assert stopped.value.code == 1
    said = capsys.readouterr().out
    assert "2 of 4 cases failed" in said and "c2: " in said and "0 everywhere" in said
    written = json.loads((tmp_path / "out/metrics.json").read_text())
    assert written["failures"].keys() == {"c1", "c2"} and "c1.nii.gz" in written["failures"]["c1"]
    assert {p.name for p in (tmp_path / "out/predictions").iterdir()} == {"c0.nii.gz", "c3.nii.gz"}
    assert [row["case"] for row in written["cases"]] == ["c0", "c0", "c3", "c3"]

    # Once they are repaired, the same call does what is left, and reports all.
    (source / "c1.nii.gz").write_bytes(good)
    save(source / "c2.nii.gz", read(source / "c1.nii.gz"))
    calls = []
    monkeypatch.setattr(windows, "test_single_case", lambda *a, **k: calls.append(1) or seen(*a, **k))
    result = infer(*arguments, "--continue", **flags)
    assert len(calls) == 2
    assert [row["case"] for row in result["cases"]] == [f"c{n}" for n in range(4) for _ in range(2)]
    infer(*arguments, "--continue", **flags)
    assert len(calls) == 2
    (tmp_path / "out/predictions/c2.nii.gz").unlink()
    assert infer(*arguments, "--continue", **flags)["segmented"] == 4
    assert len(calls) == 3


def test_a_killed_job_goes_on_and_only_as_it_was(tmp_path, monkeypatch, capsys):
    calls = []

    def killed(*arguments, **keywords):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return seen(*arguments, **keywords)

    monkeypatch.setattr(windows, "test_single_case", killed)
    source = make_scans(tmp_path, 4)
    (weights,) = make_run(tmp_path / "run")
    with pytest.raises(SystemExit) as stopped:
        infer(weights, source, output_dir=tmp_path / "out")
    assert stopped.value.code == 130
    with open(tmp_path / "out/cases.jsonl", "a") as file:
        file.write('{"case": "c2", "rows"')  # as a crash in the middle of a line leaves it
    for arguments, said in (["--tta"], "protocol"), (["--uncertainty", "mc_dropout"], "mc_dropout"):
        with pytest.raises(SystemExit) as stopped:
            infer(weights, source, "--continue", *arguments, output_dir=tmp_path / "out")
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err
    calls[:] = [1]
    monkeypatch.setattr(windows, "test_single_case", lambda *a, **k: calls.append(1) or seen(*a, **k))
    assert infer(weights, source, "--continue", output_dir=tmp_path / "out")["segmented"] == 4
    assert len(calls) == 3


def test_what_is_to_be_saved_is_saved_of_cases_that_were_done_before(data, tmp_path, capsys):
    (weights,) = make_run(tmp_path / "run", num_classes=2, root_path=str(data))
    saved = ["--continue", "--save_result", tmp_path / "saved"]
    inference.main(words("--model_path", weights, "--continue"))
    said = refused(capsys, "--model_path", weights, *saved)
    assert "was begun with other settings (save_" in said and not (tmp_path / "saved").exists()
    inference.main(words("--model_path", weights, *saved, output_dir=tmp_path / "out"))
    first, second = sorted((tmp_path / "saved").iterdir())
    before = first.stat().st_mtime_ns
    second.unlink()
    inference.main(words("--model_path", weights, *saved, output_dir=tmp_path / "out"))
    assert second.is_file() and first.stat().st_mtime_ns == before


def test_a_test_without_continue_forgets_the_files_of_one_with_it(data, tmp_path):
    (weights,) = make_run(tmp_path / "run", num_classes=2, root_path=str(data))
    settings = "--model_path", weights, "--save_probabilities", "--output_dir", tmp_path / "out"
    out = tmp_path / "out/probabilities/case_6.h5"
    inference.main(words(*settings, "--continue"))
    before = out.read_bytes()
    inference.main(words(*settings, "--tta"))
    assert out.read_bytes() != before
    inference.main(words(*settings, "--continue"))
    assert out.read_bytes() == before


def test_a_folder_of_the_same_name_does_not_pass_for_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(windows, "test_single_case", seen)
    for site in ("A", "B"):
        make_scans(tmp_path / site).rename(tmp_path / site / "imagesTs")
    (weights,) = make_run(tmp_path / "run")
    infer(weights, tmp_path / "A/imagesTs")
    predictions = sorted((tmp_path / "run/w0_imagesTs/predictions").iterdir())
    before = [path.stat().st_mtime_ns for path in predictions]
    for arguments in ([], ["--continue"]):
        with pytest.raises(SystemExit) as stopped:
            infer(weights, tmp_path / "B/imagesTs", *arguments)
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        assert "A/imagesTs" in said and "B/imagesTs" in said and "--output_dir" in said
    assert [path.stat().st_mtime_ns for path in predictions] == before
    infer(weights, tmp_path / "A/imagesTs")  # the same job may begin anew


def test_what_changed_since_is_done_again(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(windows, "test_single_case", lambda *a, **k: calls.append(1) or seen(*a, **k))
    source = make_scans(tmp_path, 3)
    flags = {"labels": tmp_path / "labels", "output_dir": tmp_path / "out", "uncertainty": "mc_dropout"}
    flags["mc_samples"] = 1
    (weights,) = make_run(tmp_path / "run")
    infer(weights, source, **flags)
    calls.clear()
    infer(weights, source, "--continue", **flags)
    assert not calls
    save(source / "c0.nii.gz", read(source / "c1.nii.gz"))
    save(tmp_path / "labels/c0.nii.gz", read(tmp_path / "labels/c1.nii.gz"))
    (tmp_path / "out/uncertainty/c2.nii.gz").unlink()
    result = infer(weights, source, "--continue", **flags)
    assert len(calls) == 2 * 2  # scores and one sample, of c0 and of c2
    assert [row["dice"] for row in result["cases"]] == [1] * 6
    assert (tmp_path / "out/uncertainty/c2.nii.gz").is_file()


def test_full_memory_costs_only_the_case(tmp_path, monkeypatch):
    calls = []

    def full(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 1:
            torch.empty(2**60)  # what PyTorch raises on a CPU
        return seen(*arguments, **keywords)

    monkeypatch.setattr(windows, "test_single_case", full)
    (weights,) = make_run(tmp_path / "run")
    with pytest.raises(SystemExit) as stopped:
        infer(weights, make_scans(tmp_path), output_dir=tmp_path / "out")
    assert stopped.value.code == 1
    written = json.loads((tmp_path / "out/metrics.json").read_text())
    assert written["failures"].keys() == {"c0"} and written["segmented"] == 1


def test_a_case_with_other_files_costs_only_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "test_single_case", seen)
    source = make_scans(tmp_path, 4)
    (source / "c0.nii.gz").rename(source / "c0_0000.nii.gz")
    save(source / "c0_0001.nii.gz", read(source / "c1.nii.gz"))
    save(source / "c2.nii", read(source / "c2.nii.gz"))
    (weights,) = make_run(tmp_path / "run")
    with pytest.raises(SystemExit) as stopped:
        infer(weights, source, output_dir=tmp_path / "out")
    assert stopped.value.code == 1
    failures = json.loads((tmp_path / "out/metrics.json").read_text())["failures"]
    assert "c0 has 0000, 0001 where the data set has one file a case" in failures["c0"]
    assert "c2 has this file with another ending too" in failures["c2"]
    assert {path.name for path in (tmp_path / "out/predictions").iterdir()} == {"c1.nii.gz", "c3.nii.gz"}


@pytest.mark.parametrize("width", [1e-30, 1e-5, 5e3, 1e9])
def test_an_absurd_spacing_costs_only_its_case(tmp_path, width):
    source = make_scans(tmp_path, 3)
    save(source / "c1.nii.gz", read(source / "c1.nii.gz"), np.diag([1, width, 1, 1]))
    (weights,) = make_run(tmp_path / "run", preprocessing={**SETTINGS, "spacing": [1.2, 0.7, 0.8]})
    with pytest.raises(SystemExit) as stopped:
        infer(weights, source, output_dir=tmp_path / "out")
    assert stopped.value.code == 1
    failures = json.loads((tmp_path / "out/metrics.json").read_text())["failures"]
    assert failures.keys() == {"c1"} and "mm wide" in failures["c1"] and str(source / "c1.nii.gz") in failures["c1"]
    assert {path.name for path in (tmp_path / "out/predictions").iterdir()} == {"c0.nii.gz", "c2.nii.gz"}


def test_numbers_in_names_and_labels_beside(tmp_path, monkeypatch):
    """PANCREAS_0001 is a case and no channel; <case>_seg is the label of <case>."""
    monkeypatch.setattr(windows, "test_single_case", seen)
    source = make_scans(tmp_path)
    for index in range(2):
        (source / f"c{index}.nii.gz").rename(source / f"PANCREAS_000{index + 1}.nii.gz")
        (tmp_path / f"labels/c{index}.nii.gz").rename(source / f"PANCREAS_000{index + 1}_seg.nii.gz")
    (weights,) = make_run(tmp_path / "run")
    result = infer(weights, source, output_dir=tmp_path / "out")
    assert result["segmented"] == 2
    assert [row["case"] for row in result["cases"]] == ["PANCREAS_0001"] * 2 + ["PANCREAS_0002"] * 2
    assert [row["dice"] for row in result["cases"]] == [1] * 4
    one = infer(weights, source / "PANCREAS_0002.nii.gz", output_dir=tmp_path / "one")
    assert one["segmented"] == 1 and (tmp_path / "one/predictions/PANCREAS_0002.nii.gz").is_file()


@pytest.mark.parametrize(("case", "join"), [("BraTS20_Training_007", "_"), ("BraTS-GLI-00005-000", "-")])
def test_a_single_brats_case_is_segmented_by_its_folder_or_a_file_of_it(tmp_path, monkeypatch, case, join):
    monkeypatch.setattr(windows, "test_single_case", lambda net, image, *rest, **more: seen(net, image[0], *rest))
    source, channels = make_scans(tmp_path, 1), ["t1", "t2"]
    folder = tmp_path / "BraTS" / case
    for name in channels:
        save(folder / f"{case}{join}{name}.nii.gz", read(source / "c0.nii.gz"))
    save(folder / f"{case}{join}seg.nii.gz", read(tmp_path / "labels/c0.nii.gz"))
    (weights,) = make_run(tmp_path / "run", n_channels=2, preprocessing={**SETTINGS, "channels": channels})
    monkeypatch.chdir(folder)
    for number, path in enumerate((folder, ".", folder / f"{case}{join}t2.nii.gz", folder.parent)):
        result = infer(weights, path, output_dir=tmp_path / f"out{number}")
        assert [(row["case"], row["dice"]) for row in result["cases"]] == [(case, 1)] * 2
        assert [path.name for path in (tmp_path / f"out{number}/predictions").iterdir()] == [f"{case}.nii.gz"]


@pytest.mark.parametrize("part", ["Tr", "Ts"])
@pytest.mark.parametrize("name", ["la_007_0000", "la_007"])
def test_a_single_file_of_nnunets_images_finds_its_label(tmp_path, monkeypatch, part, name):
    monkeypatch.setattr(windows, "test_single_case", seen)
    source = make_scans(tmp_path, 1)
    save(tmp_path / f"set/images{part}/{name}.nii.gz", read(source / "c0.nii.gz"))
    save(tmp_path / f"set/labels{part}/la_007.nii.gz", read(tmp_path / "labels/c0.nii.gz"))
    (weights,) = make_run(tmp_path / "run")
    result = infer(weights, tmp_path / f"set/images{part}/{name}.nii.gz", output_dir=tmp_path / "out")
    assert [(row["case"], row["dice"]) for row in result["cases"]] == [("la_007", 1)] * 2


@pytest.mark.parametrize("what", ["scan", "label"])
def test_nothing_is_written_over_what_is_read(tmp_path, capsys, what):
    source = make_scans(tmp_path)
    (weights,) = make_run(tmp_path / "run")
    (tmp_path / "out").mkdir()
    place = tmp_path / "out/predictions"
    if what == "scan":
        arguments = {"path": source.rename(place) / "c0.nii.gz"}
    else:
        arguments = {"path": source, "labels": (tmp_path / "labels").rename(place)}
    before = {path: path.read_bytes() for path in place.iterdir()}
    with pytest.raises(SystemExit) as stopped:
        infer(weights, output_dir=tmp_path / "out", **arguments)
    assert stopped.value.code == 2 and "would replace the input" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in place.iterdir()} == before


def test_memory_holds_one_case_at_a_time(tmp_path, monkeypatch):
    alive, most = [], []
    whole = scans.read_channels

    def watched(*arguments):
        gc.collect()
        most.append(sum(reference() is not None for reference in alive))
        volume = whole(*arguments)
        alive.append(weakref.ref(volume.array))
        return volume

    def segmented(*arguments, **keywords):
        label, score = seen(*arguments, **keywords)
        alive.append(weakref.ref(score))
        return label, score

    monkeypatch.setattr(scans, "read_channels", watched)
    monkeypatch.setattr(windows, "test_single_case", segmented)
    source = make_scans(tmp_path, 8)
    infer(make_run(tmp_path / "run"), source, output_dir=tmp_path / "out", labels=tmp_path / "labels")
    assert len(alive) == 16 and max(most) == 0


# ----------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "changes", "said"),
    [
        ([], {"preprocessing": {}}, "recorded neither in"),
        ([], {"preprocessing": {**SETTINGS, "labels": [0, 1]}}, "the network has 3 classes, the preprocessing 2"),
        ([], {"preprocessing": {**SETTINGS, "crop": "some"}}, "cannot have crop 'some'"),
        ([], {"preprocessing": {**SETTINGS, "channels": ["t1", "t2"]}}, "has one file where the data set has t1, t2"),
        (["--uncertainty", "teacher"], {}, "there is no ema_w0.pth"),
        (["--uncertainty", "ensemble"], {}, "several checkpoints"),
        (["--labels", "nowhere"], {}, "nowhere: no such folder"),
        (["--save_result", "there"], {}, "--save_result is for the cases of a list"),
        (["--save_format", "png"], {}, "--save_format without --save_result changes nothing"),
        (["--mc_samples", 4], {}, "--mc_samples without --uncertainty mc_dropout changes nothing"),
        (["--save_colors"], {}, "--save_colors is for images: a volume has no one colour picture"),
        (["--preprocessing", "nowhere.json"], {}, "nowhere.json: no such preprocessing"),
    ],
)
def test_mistakes_are_sentences(tmp_path, capsys, monkeypatch, arguments, changes, said):
    monkeypatch.chdir(tmp_path)
    source = make_scans(tmp_path, 1)
    (weights,) = make_run(tmp_path / "run", root_path=str(tmp_path), **changes)
    with pytest.raises(SystemExit) as stopped:
        infer(weights, source, *arguments, output_dir=tmp_path / "out")
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.count("error: ") == 1 and said in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("ending", "package"), [(".nii.gz", "nibabel"), (".nrrd", "nrrd")])
def test_without_the_extras_it_says_what_to_install(tmp_path, capsys, monkeypatch, ending, package):
    source = make_scans(tmp_path, 3, ending=ending)
    (weights,) = make_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as stopped:
        infer(weights, source, output_dir=tmp_path / "out")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count(f"pip install {'pynrrd' if package == 'nrrd' else 'nibabel'}") == 1


def test_hdf5_needs_no_extra(tmp_path, monkeypatch):
    for package in ("nibabel", "nrrd"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(windows, "test_single_case", seen)
    _, label = scan(0, values=(1, 2))
    (tmp_path / "in").mkdir()
    with h5py.File(tmp_path / "in/c0.h5", "w") as file:
        file["image"], file["label"] = label.astype(np.float32), label
    (weights,) = make_run(tmp_path / "run", preprocessing={})
    result = infer(weights, tmp_path / "in", "--uncertainty", "mc_dropout", output_dir=tmp_path / "out")
    assert [row["dice"] for row in result["cases"]] == [1, 1] and result["unit"] == "voxel"
    with h5py.File(tmp_path / "out/predictions/c0.h5") as file:
        np.testing.assert_array_equal(file["prediction"][...], label)


def test_labels_of_another_grid_or_value_cost_the_measurement_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "test_single_case", seen)
    source = make_scans(tmp_path, 3)
    save(tmp_path / "labels/c0.nii.gz", read(tmp_path / "labels/c0.nii.gz"), TURNED)
    save(tmp_path / "labels/c1.nii.gz", np.full(SHAPE, 3, np.uint8))
    with pytest.raises(SystemExit):
        infer(make_run(tmp_path / "run"), source, labels=tmp_path / "labels", output_dir=tmp_path / "out")
    written = json.loads((tmp_path / "out/metrics.json").read_text())
    assert "mm from its image" in written["failures"]["c0"] and "a voxel of value 3" in written["failures"]["c1"]
    assert {row["case"] for row in written["cases"]} == {"c2"}
    assert len(list((tmp_path / "out/predictions").iterdir())) == written["segmented"] == 3


def refused(capsys, *arguments):
    """The one sentence with which inference.py ends."""
    with pytest.raises(SystemExit) as stopped:
        inference.main(list(map(str, arguments)))
    progress, _, sentence = capsys.readouterr().err.rpartition("error: ")
    assert stopped.value.code == 2 and sentence.count("\n") == 1 and "Traceback" not in progress, sentence
    return sentence


@pytest.mark.parametrize("damage", [math.nan, 1e31])
def test_weights_that_are_not_finite_or_absurd_never_reach_a_table(data, tmp_path, capsys, damage):
    (weights,) = make_run(tmp_path / "run", num_classes=2, root_path=str(data))
    state = torch.load(weights)
    state["block_three.conv.0.weight"].view(-1)[5] = damage
    torch.save(state, weights)
    assert f"block_three.conv.0.weight holds {damage:.3g}" in refused(capsys, "--model_path", weights)
    assert not list((tmp_path / "run").glob("*_test"))


@pytest.mark.parametrize("flag", ["--pretrained", "--teacher_checkpoint"])
def test_nothing_is_trained_from_weights_that_are_not_finite(data, tmp_path, capsys, flag):
    (weights,) = make_run(tmp_path / "run", num_classes=2)
    state = torch.load(weights)
    state["out_conv.bias"][0] = math.inf
    torch.save(state, weights)
    flags = {"root_path": data, "output_dir": tmp_path, "labelnum": 2, "max_iterations": 1, "n_filters": 2}
    with pytest.raises(SystemExit) as stopped:
        train_mean_teacher.main(words(flag, weights, num_workers=0, patch_size="16 16 16", **flags))
    assert stopped.value.code == 2 and "w0.pth: is of a training that went wrong" in capsys.readouterr().err
    assert not list(tmp_path.glob("model/*/*/*.pth"))


@pytest.mark.parametrize("odd", ["sparse", "on no device", "of no volume", "of another kind"])
def test_odd_tensors_are_one_sentence(data, tmp_path, capsys, odd):
    (weights,) = make_run(tmp_path / "run", num_classes=2, root_path=str(data))
    state, name = torch.load(weights), "block_one_dw.conv.0.weight"
    if odd == "sparse":
        state[name] = state[name].to_sparse()
    elif odd == "on no device":
        state[name] = state[name].to("meta")
    else:
        state[name] = torch.zeros(3) if odd == "of no volume" else {"a": 3}
    torch.save(state, weights)
    assert "w0.pth: " in refused(capsys, "--model_path", weights)


def test_outputs_that_are_no_numbers_never_reach_a_table(data, tmp_path, capsys):
    (weights,) = make_run(tmp_path / "run", num_classes=2, root_path=str(data))
    state = torch.load(weights)
    for name in state:
        if name.endswith("conv.0.weight"):
            state[name] *= 1e11
    torch.save(state, weights)
    assert "the network gives NaN or infinity" in refused(capsys, "--model_path", weights)
    assert not list((tmp_path / "run").glob("*_test/metrics*"))


def test_several_model_paths_may_be_given_by_several_flags(data, tmp_path):
    weights = make_run(tmp_path / "run", seeds=(0, 1), num_classes=2, root_path=str(data))
    both = inference.main(words("--model_path", *weights, output_dir=tmp_path / "both"))
    each = inference.main([*words("--model_path", weights[0]), *words("--model_path", weights[1])])
    assert each["checkpoint_sha256"] == both["checkpoint_sha256"] and each["cases"] == both["cases"]


def test_ensembles_do_not_replace_each_other(data, tmp_path, capsys):
    a, b, c = make_run(tmp_path / "run", seeds=(0, 1, 2), num_classes=2, root_path=str(data))
    inference.main(words("--model_path", a, b))
    assert "holds the results of other weights" in refused(capsys, "--model_path", a, c)
    inference.main(words("--model_path", a, b))


def test_a_result_of_more_cases_is_not_replaced_by_one_of_fewer(data, tmp_path, capsys):
    (weights,) = make_run(tmp_path / "run", num_classes=2, root_path=str(data))
    inference.main(words("--model_path", weights, num=1))
    inference.main(words("--model_path", weights))
    written = (tmp_path / "run/w0_test/metrics.json").read_bytes()
    said = refused(capsys, "--model_path", weights, "--num", 1)
    assert "holds results of 1 case (case_7) that are not tested now" in said
    assert (tmp_path / "run/w0_test/metrics.json").read_bytes() == written
    assert len(inference.main(words("--model_path", weights, num=1, output_dir=tmp_path / "one"))["cases"]) == 1


def test_data_that_is_not_there_from_another_folder_is_said_with_the_file_that_names_it(data, tmp_path, capsys):
    (weights,) = make_run(tmp_path / "run", num_classes=2, root_path="elsewhere/LA")
    said = refused(capsys, "--model_path", weights)
    assert f"{tmp_path / 'run/config.json'}: the run's data was elsewhere/LA, which is not there from " in said
    inference.main(words("--model_path", weights, root_path=data, split="test.list"))
    assert (tmp_path / "run/w0_test/metrics.json").is_file()


def test_data_that_was_prepared_otherwise_is_said(data, tmp_path, capsys):
    (weights,) = make_run(tmp_path / "run", num_classes=2, root_path=str(data), preprocessing=SETTINGS)
    for normalization, said in (("zscore", ""), ("minmax", "normalization minmax; there normalization zscore")):
        (data / "preprocessing.json").write_text(json.dumps({**SETTINGS, "normalization": normalization}))
        inference.main(words("--model_path", weights, output_dir=tmp_path / "out"))
        printed = capsys.readouterr().out
        assert said in printed and ("was prepared otherwise" in printed) == bool(said)


@pytest.mark.parametrize("ignored", [0, 1, 300])
def test_what_is_ignored_is_no_class_that_is_tested(data, tmp_path, capsys, ignored):
    (weights,) = make_run(tmp_path / "run", num_classes=2, root_path=str(data))
    assert f"--ignore_index {ignored}" in refused(capsys, "--model_path", weights, "--ignore_index", ignored)


@pytest.mark.parametrize(
    ("changes", "words_of_it"),
    [
        ({"intensity": "zscore"}, '--intensity "none" and "zscore"'),
        ({"slices_first": True}, "--slices_first false and true"),
        ({"normalization": "instancenorm"}, '--normalization "batchnorm" and "instancenorm"'),  # a U-Net's fit either
        ({"classes": {**PHASES, "classes": PHASES["classes"][::-1]}}, "classes "),
    ],
    ids=str,
)
def test_runs_that_saw_other_images_or_classes_are_not_averaged(data, tmp_path, capsys, changes, words_of_it):
    settings = {"root_path": str(data), "intensity": "none", "slices_first": False, "classes": PHASES}
    settings["normalization"] = "batchnorm"
    (one,) = make_run(tmp_path / "one", **settings)
    (other,) = make_run(tmp_path / "other", **{**settings, **changes})
    line = refused(capsys, "--model_path", one, other)
    assert str(one) in line and f"{other} were trained with {words_of_it}" in line and "cannot be averaged" in line


def test_an_output_folder_that_cannot_be_written_to_is_found_before_the_first_case(data, tmp_path, capsys, monkeypatch):
    (weights,) = make_run(tmp_path / "run", num_classes=2, root_path=str(data))
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(inference, "infer_case", None)
    line = refused(capsys, "--model_path", weights, "--output_dir", tmp_path / "file" / "out")
    assert f"--output_dir {tmp_path / 'file' / 'out'}: cannot be written to (Not a directory)" in line


@pytest.mark.parametrize(
    "changes",
    [
        {"patch_size": "big"},
        {"patch_size": 16},
        {"n_filters": [2, 2]},
        {"n_filters": 10**30},
        {"num_classes": True},
        {"has_dropout": "yes"},
        {"dataset_name": 3},
        {"network": {"a": 1}},
        {"train_cases": 3},
        {"val_cases": [1]},
    ],
    ids=json.dumps,
)
def test_a_config_of_wrong_types_is_a_sentence_that_names_the_setting(data, tmp_path, capsys, changes):
    (weights,) = make_run(tmp_path / "run", num_classes=2, root_path=str(data))
    config = json.loads((tmp_path / "run/config.json").read_text())
    (tmp_path / "run/config.json").write_text(json.dumps(config | changes))
    assert next(iter(changes)) in refused(capsys, "--model_path", weights)


def test_the_folder_of_a_run_is_no_output_dir(data, tmp_path, capsys):
    (weights,) = make_run(tmp_path / "run", num_classes=2, root_path=str(data))
    (tmp_path / "run/metrics.csv").write_text("iteration,loss\n")
    said = refused(capsys, "--model_path", weights, "--output_dir", tmp_path / "run")
    assert "a run lies there" in said
    assert (tmp_path / "run/metrics.csv").read_text() == "iteration,loss\n"


def test_a_strangers_weights_are_tested_again_beside_their_results(data, tmp_path):
    """Their folder is no run's, so a metrics.csv in it says nothing of their training: here it is the first test's."""
    (weights,) = make_run(tmp_path / "run", num_classes=2, root_path=str(data))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    weights = weights.rename(theirs / "weights.pth")
    settings = ["--root_path", data, "--n_filters", 2, "--patch_size", 16, 16, 16, "--output_dir", theirs]
    results = [inference.main(words("--model_path", weights, *settings)) for _ in range(2)]
    assert (theirs / "metrics.csv").is_file() and results[0]["cases"] == results[1]["cases"]
    assert results[1]["training_seconds"] is None


def test_a_damaged_metrics_csv_of_a_run_is_found_before_the_first_case(data, tmp_path, capsys, monkeypatch):
    (weights,) = make_run(tmp_path / "run", num_classes=2, root_path=str(data))
    (tmp_path / "run/metrics.csv").write_text("iteration,loss\n1,0.5\n")
    monkeypatch.setattr(inference, "infer_case", lambda *_: pytest.fail("a case was segmented"))
    said = refused(capsys, "--model_path", weights, "--output_dir", tmp_path / "out")
    assert "run/metrics.csv" in said and "iterations_per_second" in said


def test_what_is_saved_never_replaces_the_cases(tmp_path, capsys):
    """The flat layout of ACDC, <root>/data/<case>.h5, is how --save_result names its files too."""
    data = make_stacks(tmp_path / "stacks")
    (weights,) = make_run(tmp_path / "run", num_classes=3, dims=3, root_path=str(data))
    before = {path: path.read_bytes() for path in (data / "data").iterdir()}
    said = refused(capsys, "--model_path", weights, "--dims", 3, "--save_result", data / "data")
    assert "--save_result" in said and "the cases themselves lie there" in said
    assert {path: path.read_bytes() for path in (data / "data").iterdir()} == before


# ------------------------------------------------------------------------------------------ settings of runs and data


def test_default_strides_cover_every_voxel_of_small_patches(data, tmp_path):
    """Of 18 voxels, between windows of 16: two would lie in none."""
    (weights,) = make_run(tmp_path / "run", num_classes=2, root_path=str(data), stride_xy=None, stride_z=None)
    result = inference.main(words("--model_path", weights, "--save_probabilities", output_dir=tmp_path / "out"))
    assert result["protocol"]["stride_xy"] == 16 and result["protocol"]["stride_z"] == 4
    for path in (tmp_path / "out/probabilities").iterdir():
        with h5py.File(path) as file:
            np.testing.assert_allclose(file["probabilities"][...].astype(float).sum(axis=0), 1, atol=2e-3)


@pytest.mark.parametrize("settings", [["--deep_supervision"], ["--residual"], ["--deep_supervision", "--residual"]])
def test_runs_with_deep_supervision_and_residual_blocks_are_tested(data, tmp_path, settings):
    flags = {"root_path": data, "output_dir": tmp_path, "labelnum": 2, "max_iterations": 1, "n_filters": 2}
    flags |= {"num_workers": 0, "patch_size": "16 16 16", "stride_xy": 16, "stride_z": 16, "network": "unet"}
    folder = train_sup.main([*words(**flags), *settings])
    result = inference.main(words("--model_path", folder / "iter_1.pth"))
    net = UNet(1, 2, 2, "batchnorm", **{name[2:]: True for name in settings})
    assert result["parameters"] == sum(parameter.numel() for parameter in net.parameters())
    assert {row["case"] for row in result["cases"]} == {"case_6", "case_7"}
    assert all(result["network"][name[2:]] for name in settings)


@pytest.mark.parametrize("kind", ["LASeg", "MC-Net"])
def test_published_weights_are_tested_without_a_config(data, tmp_path, capsys, kind):
    strides = (2, 2, 2, (2, 2, 1)) if kind == "LASeg" else (2, 2, 2, 2)
    net = fill(VNet(1, 2, 2, "batchnorm", strides=strides)).eval()
    state = net.state_dict()
    if kind == "MC-Net":
        below = ("block_one", "block_two", "block_three", "block_four", "block_five.")
        state = {f"{'encoder' if name.startswith(below) else 'decoder1'}.{name}": state[name] for name in state}
    torch.save(state, tmp_path / "theirs.pth")
    flags = {"root_path": data / "data", "n_filters": 2, "patch_size": "16 16 16", "output_dir": tmp_path / "out"}
    result = inference.main(words("--model_path", tmp_path / "theirs.pth", "--save_probabilities", **flags))
    with (
        h5py.File(data / "data/case_6/mri_norm2.h5") as case,
        h5py.File(tmp_path / "out/probabilities/case_6.h5") as out,
    ):
        _, expected = single_case(net, case["image"][...], 16, 4, (16, 16, 16))
        np.testing.assert_allclose(out["probabilities"][...], expected, atol=1e-3)
    assert len(result["cases"]) == 2
    if kind == "LASeg":
        line = refused(
            capsys, *words("--model_path", tmp_path / "theirs.pth", dims=2, **flags | {"patch_size": "16 16"})
        )
        assert "theirs.pth: no network with 2 dimensions has its settings" in line and "give --dims" in line


def ignore_a_part(data, case):
    """Give a third of a case's voxels the label 255; returns which they are."""
    with h5py.File(data / f"data/{case}/mri_norm2.h5", "a") as file:
        label = file["label"][...]
        ignored = np.random.default_rng(0).random(label.shape) < 0.3
        file["label"][...] = np.where(ignored, 255, label)
    return ignored


def test_ignored_voxels_are_in_no_metric(data, tmp_path):
    ignored = {case: ignore_a_part(data, case) for case in ("case_5", "case_6", "case_7")}
    (data / "val.list").write_text("case_5\n")
    flags = {"root_path": data, "output_dir": tmp_path, "labelnum": 2, "max_iterations": 2, "n_filters": 2}
    flags |= {"num_workers": 0, "patch_size": "16 16 16", "stride_xy": 16, "stride_z": 16, "ignore_index": 255}
    flags |= {"val_list": data / "val.list", "val_freq": 1}
    folder = train_sup.main(words(**flags))
    result = inference.main(words("--model_path", folder / "iter_2.pth", save_result=tmp_path / "saved"))
    assert result["protocol"]["ignore_index"] == 255 and len(result["cases"]) == 2
    for row in result["cases"]:
        with h5py.File(tmp_path / f"saved/{row['case']}.h5") as file:
            counted = ~ignored[row["case"]]
            prediction, label = file["prediction"][...][counted], file["label"][...][counted]
        total = (prediction == 1).sum() + (label == 1).sum()
        assert row["dice"] == pytest.approx(2 * ((prediction == 1) & (label == 1)).sum() / total)
    assert 0 <= float(read_rows(folder / "metrics.csv")[-1]["val_dice"]) <= 1


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("value", [255, 3])
def test_ignored_voxels_of_scans_are_in_no_metric(tmp_path, monkeypatch, value):
    """As --ignore_index of the run says, or as the labels of the training data had them."""
    monkeypatch.setattr(windows, "test_single_case", seen)
    source = make_scans(tmp_path)
    label = read(tmp_path / "labels/c0.nii.gz").copy()
    label[3:5] = value
    save(tmp_path / "labels/c0.nii.gz", label)
    changes = {"ignore_index": 255} if value == 255 else {"preprocessing": {**SETTINGS, "ignore": 3}}
    (weights,) = make_run(tmp_path / "run", **changes)
    result = infer(weights, source, labels=tmp_path / "labels", output_dir=tmp_path / "out")
    assert [row["dice"] for row in result["cases"]] == [1] * 4


def test_the_folder_of_the_cases_is_a_root_path_as_in_laseg(data, tmp_path):
    flags = {"root_path": data / "data", "output_dir": tmp_path, "labelnum": 2, "max_iterations": 1, "n_filters": 2}
    flags |= {"num_workers": 0, "patch_size": "16 16 16", "stride_xy": 16, "stride_z": 16}
    for script in (train_mean_teacher, train_sup):
        folder = script.main(words(**flags))
        result = inference.main(words("--model_path", folder / "iter_1.pth"))
        assert {row["case"] for row in result["cases"]} == {"case_6", "case_7"}


# ------------------------------------------------------------------------------------------------------ the whole way


def test_a_brats_shaped_data_set_goes_all_the_way(tmp_path):
    """Four channels, labels 0, 1, 2 and 4, a case without a label; two iterations of both scripts."""
    source, root = make_brats(tmp_path / "brats"), tmp_path / "data"
    prepare_nifti.main(words(source, root, test=2, labelnum=2, spacing="1 1 1.5"))
    settings = json.loads((root / "preprocessing.json").read_text())
    assert settings["channels"] == ["flair", "t1", "t1ce", "t2"] and settings["labels"] == [0, 1, 2, 4]
    flags = {"root_path": root, "output_dir": tmp_path, "labelnum": 2, "num_classes": 4, "max_iterations": 2}
    flags |= {"n_filters": 2, "num_workers": 0, "patch_size": "16 16 16", "stride_xy": 16, "stride_z": 16}
    for script in (train_mean_teacher, train_sup):
        folder = script.main(words(**flags))
        listed = inference.main(words("--model_path", folder / "iter_2.pth"))
        assert {row["class"] for row in listed["cases"]} == {1, 2, 3}
        assert listed["unit"] == "voxel" and listed["training_seconds"] > 0 and listed["trained_on"] == []
        out = tmp_path / f"out_{folder.name}"
        result = infer(folder / "iter_2.pth", source, output_dir=out)
        assert len(list((out / "predictions").iterdir())) == result["segmented"] == 7
        assert len(result["cases"]) == 6 * 3 and result["unit"] == "mm"
        cases = (root / "train.list").read_text().split()
        assert result["trained_on"] == sorted(cases if script is train_mean_teacher else cases[:2])
        for path in (out / "predictions").iterdir():
            written, image = nibabel.load(path), nibabel.load(next((source / path.name[:-7]).glob("*_t1.nii.gz")))
            assert (written.affine == image.affine).all() and written.shape == image.shape
            assert set(np.unique(written.dataobj)) <= {0, 1, 2, 4}


def test_nnunets_test_images(tmp_path):
    source = make_decathlon(tmp_path / "Dataset", version=2, test_labels=True)
    prepare_nifti.main(words(source, tmp_path / "data"))
    settings = json.loads((tmp_path / "data/preprocessing.json").read_text())
    (weights,) = make_run(tmp_path / "run", n_channels=2, preprocessing=settings)
    result = infer(weights, source / "imagesTs", labels=source / "labelsTs", output_dir=tmp_path / "out")
    assert [row["case"] for row in result["cases"]] == ["heart_4"] * 2 + ["heart_5"] * 2
    one = infer(weights, source / "imagesTs/heart_5_0001.nii.gz", output_dir=tmp_path / "one")
    assert one["segmented"] == 1
    np.testing.assert_array_equal(*(read(tmp_path / out / "predictions/heart_5.nii.gz") for out in ("out", "one")))
