"""Plans of data sets, as data/plan.py and prepare_nifti.py make them and the training scripts take them."""

import json

import h5py
import numpy as np
import pretrain_masked
import pytest
import torch
from conftest import ball, make_data, make_images, make_stacks
from plan import main as make_plan
from prepare_nifti import main as prepare_nifti

import inference
import train_mean_teacher
import train_sup
from mtseg.nnunet_plans import to_nnunet

nibabel = pytest.importorskip("nibabel", reason='pip install -e ".[test]"')

TINY = ["--memory_gb", "0.01", "--n_filters", "2"]


def make_ct(root, cases=5, told=False, tests=0, spacing=(1.0, 1.0, 5.0), lowest=-1000):
    """Made-up CT in nnU-Net's layout: a body in air, an organ of 50 HU in it, slices of 5 mm."""
    for number in range(cases + tests):
        rng, part = np.random.default_rng(number), "Tr" if number < cases else "Ts"
        shape, affine = (44 + 2 * number, 40, 11), np.diag([*spacing, 1.0])
        label = ball(shape, rng.uniform((18, 16, 4), (26, 24, 7)), 5).astype(np.uint8)
        image = np.full(shape, lowest, np.int16)
        image[4:-4, 4:-4] = rng.normal(-80, 15, (shape[0] - 8, 32, 11))
        image[label > 0] = rng.normal(50, 10, int(label.sum()))
        for folder, name, array in (("images", f"ct_{number}_0000", image), ("labels", f"ct_{number}", label)):
            (root / f"{folder}{part}").mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, affine), root / f"{folder}{part}" / f"{name}.nii.gz")
    if told:
        channel = told if isinstance(told, str) else "CT"
        content = {"labels": {"background": 0, "organ": 1}, "channel_names": {"0": channel}}
        (root / "dataset.json").write_text(json.dumps(content))
    return root


def organ(root, numbers):
    """The values inside the labels of these cases."""
    pairs = [(root / f"imagesTr/ct_{n}_0000.nii.gz", root / f"labelsTr/ct_{n}.nii.gz") for n in numbers]
    pairs = [[np.asarray(nibabel.load(path).dataobj) for path in pair] for pair in pairs]
    return [image[label > 0] for image, label in pairs]


def refused(capsys, main, *words):
    """The sentence that a command ends in."""
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, words)])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("error: ") == 1 and "Traceback" not in err
    return err


# ------------------------------------------------------------------------------------------------------- making plans
@pytest.mark.parametrize("told", [True, False])
def test_a_plan_of_ct_scans(tmp_path, capsys, told):
    root = make_ct(tmp_path / "CT", told=told, tests=1)
    made = make_plan([str(root), *TINY, "--nnunet", str(tmp_path / "nnUNetPlans.json")])
    assert json.loads((root / "plan.json").read_text()) == json.loads(json.dumps(made))
    assert made["dims"] == 3 and made["num_classes"] == 2 and made["made_from"]["cases"] == 5
    assert made["spacing"] == [1, 1, 5] and made["made_from"]["shape"] == [48, 40, 11]
    assert made["kernel_sizes"][0] == [3, 3, 1] and made["strides"][0] == [2, 2, 1]
    ((low, high, mean, std),) = made["by_channel"]
    values = organ(root, range(5))  # a case counts as much as another, however many voxels it has
    assert abs(mean - np.mean([v.mean() for v in values])) < 0.1
    assert min(map(np.min, values)) <= low < 30 < 70 < high <= max(map(np.max, values)) and 9 < std < 11
    out = " ".join(capsys.readouterr().out.split())
    assert "5 for training, with 1 channel and 2 classes" in out
    assert ("dataset.json says so" if told else "values go below -500") in out
    theirs = json.loads((tmp_path / "nnUNetPlans.json").read_text())["configurations"]["3d_fullres"]
    assert theirs["patch_size"] == made["patch_size"][::-1] and theirs["normalization_schemes"] == ["CTNormalization"]


def test_other_images_are_normalised_one_by_one(tmp_path):
    assert make_plan([str(make_ct(tmp_path / "MR", lowest=0)), *TINY])["by_channel"] == ["zscore"]
    assert make_plan([str(make_ct(tmp_path / "told", told="T1")), *TINY])["by_channel"] == ["zscore"]


def test_a_plan_of_prepared_volumes_stacks_and_images(tmp_path, capsys):
    volumes = make_data(tmp_path / "volumes")
    made = make_plan([str(volumes), *TINY])
    assert made["made_from"]["cases"] == 6 and made["made_from"]["shape"] == [24, 20, 14]
    assert made["intensity"] == "zscore" and made["num_classes"] == 2 and made["spacing"] == [1, 1, 1]
    assert "assumed, since the files do not say" in capsys.readouterr().out
    said = make_plan([str(volumes), *TINY, "--spacing", "1", "1", "4"])
    assert said["kernel_sizes"][0] == [3, 3, 1] and "as was said" in said["why"]["spacing"]
    for case in range(8):
        with h5py.File(volumes / f"data/case_{case}/mri_norm2.h5", "a") as file:
            file.attrs["spacing"] = [1.0, 1.0, 4.0]
    assert make_plan([str(volumes), *TINY])["strides"] == said["strides"]
    assert make_plan([str(volumes), *TINY, "--dims", "2"])["patch_size"] == [24, 20]
    stacks = make_plan([str(make_stacks(tmp_path / "stacks")), *TINY])
    assert stacks["made_from"]["shape"] == [22, 25, 3.5] and stacks["num_classes"] == 3
    assert stacks["slices_first"] and stacks["patch_size"] == [24, 28, 4] and stacks["in_plane"]
    images = make_plan([str(make_images(tmp_path / "images")), *TINY])
    assert images["dims"] == 2 and images["patch_size"] == [28, 24] and images["made_from"]["cases"] == 6


def test_test_cases_are_never_read(tmp_path):
    root = make_data(tmp_path / "data")
    (root / "data/case_7/mri_norm2.h5").write_bytes(b"no HDF5")
    make_plan([str(root), *TINY])
    (root / "train.list").unlink()
    make_plan([str(root), *TINY])
    scans = make_ct(tmp_path / "CT", tests=1)
    (scans / "imagesTs/ct_5_0000.nii.gz").write_bytes(b"no NIfTI")
    make_plan([str(scans), *TINY])


def test_the_same_plan_in_another_memory(tmp_path):
    root = make_data(tmp_path / "data")
    small, large = (make_plan([str(root), "--memory_gb", gb, "--n_filters", "8"]) for gb in ("0.02", "8"))
    assert np.prod(small["patch_size"]) <= np.prod(large["patch_size"]) and small["batch_size"] <= large["batch_size"]
    default = make_plan([str(root)])  # for this machine
    asked = default["made_from"]["memory_gb"], default["n_filters"]
    assert asked == ((8, 32) if torch.cuda.is_available() else (1, 8))
    four = make_plan([str(root), "--network", "vnet", "--memory_gb", "0.1"])
    assert (len(four["strides"]), four["network"], four["n_filters"]) == (4, "vnet", 16)


def test_mistakes_in_making_a_plan_write_nothing(tmp_path, capsys):
    root = make_data(tmp_path / "data")
    with h5py.File(root / "data/case_3/mri_norm2.h5", "a") as file:
        file.attrs["spacing"] = [1.0, 0.0, 1.0]
    assert "case_3/mri_norm2.h5: its voxels are" in refused(capsys, make_plan, root, *TINY)
    assert "memory_gb 1e-06" in refused(capsys, make_plan, make_data(tmp_path / "b"), "--memory_gb", "1e-6")
    assert "the cases have 3 axes" in refused(capsys, make_plan, tmp_path / "b", "--spacing", 1, 2)
    assert "no 3-D plan" in refused(capsys, make_plan, make_images(tmp_path / "images"), "--dims", 3)
    assert "nowhere" in refused(capsys, make_plan, tmp_path / "nowhere")
    scans = make_ct(tmp_path / "CT")
    assert "leave it out" in refused(capsys, make_plan, scans, "--spacing", 1, 1, 5)
    damaged = scans / "imagesTr/ct_2_0000.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:900])
    assert "ct_2_0000.nii.gz: not a whole" in refused(capsys, make_plan, scans)
    assert not list(tmp_path.rglob("*plan.json*"))


# ------------------------------------------------------------------------------------------------ preparing by a plan
def test_scans_are_prepared_by_their_plan(tmp_path, capsys):
    root, out = make_ct(tmp_path / "CT", cases=6), tmp_path / "data"
    split = prepare_nifti([str(root), str(out), "--plan", *TINY])
    made = json.loads((out / "plan.json").read_text())
    settings = json.loads((out / "preprocessing.json").read_text())
    assert len(split["test"]) == 1 and made["labelnum"] == 5 == made["made_from"]["cases"]
    assert (settings["normalization"], settings["by_channel"]) == ("by_channel", made["by_channel"])
    assert settings["spacing"] == made["spacing"] and made["intensity"] == "none"
    low, high, mean, std = made["by_channel"][0]
    for case in (*split["train"], *split["test"]):
        with h5py.File(out / "data" / case / "mri_norm2.h5") as file:
            prepared, attributes = file["image"][...], dict(file.attrs)
        scan = np.asarray(nibabel.load(root / f"imagesTr/{case}_0000.nii.gz").dataobj)
        np.testing.assert_allclose(prepared, (scan.clip(low, high) - mean) / std, atol=1e-4)
        np.testing.assert_allclose(attributes["normalization"], [[low, high, mean, std]], rtol=1e-6)
    # A plan that is there gives the same, and statistics of the hidden labels are not looked at.
    prepare_nifti([str(root), str(tmp_path / "again"), "--plan", str(out / "plan.json"), "--test", "1"])
    assert json.loads((tmp_path / "again/preprocessing.json").read_text()) == settings
    (tmp_path / "nnUNetPlans.json").write_text(json.dumps(to_nnunet(made)))
    prepare_nifti([str(root), str(tmp_path / "theirs"), "--plan", str(tmp_path / "nnUNetPlans.json"), "--test", "1"])
    assert json.loads((tmp_path / "theirs/preprocessing.json").read_text())["spacing"] == made["spacing"]
    few = prepare_nifti([str(root), str(tmp_path / "few"), "--plan", *TINY, "--labelnum", "2"])
    made = json.loads((tmp_path / "few/plan.json").read_text())
    values = organ(root, [int(case[-1]) for case in few["train"][:2]])
    assert abs(made["by_channel"][0][2] - np.mean([v.mean() for v in values])) < 0.1 and made["labelnum"] == 2
    assert f"train with --plan {tmp_path / 'few/plan.json'}" in capsys.readouterr().out


def test_mistakes_in_preparing_by_a_plan(tmp_path, capsys):
    root, out = make_ct(tmp_path / "CT"), tmp_path / "out"
    made, path = make_plan([str(root), *TINY]), tmp_path / "other.json"
    for change, said in (
        ({"num_classes": 3}, "is of data with 3 classes, here are 2"),
        ({"by_channel": ["zscore"] * 2}, "ct_0_0000.nii.gz: has 1 channels, its preprocessing or plan 2"),
        ({"spacing": [1, 0, 5]}, "cannot have spacing [1, 0, 5]"),
        ({"spacing": None}, "has the spacing None"),
        ({"by_channel": [[1, 0, 0, 1]]}, "cannot have by_channel [1, 0, 0, 1]"),
        ({"patch_size": 16}, "is no plan, its patch_size is 16"),
    ):
        path.write_text(json.dumps({**made, **change}))
        assert said in refused(capsys, prepare_nifti, root, out, "--plan", path)
    assert "no such file" in refused(capsys, prepare_nifti, root, out, "--plan", tmp_path / "nowhere.json")
    assert "leave that out" in refused(capsys, prepare_nifti, root, out, "--spacing", 1, 1, 1, "--plan")
    assert "add --plan" in refused(capsys, prepare_nifti, root, out, "--memory_gb", 1)
    assert not out.exists() and sorted(p.name for p in tmp_path.iterdir()) == ["CT", "other.json"]


# ------------------------------------------------------------------------------------------------ training by a plan
SHORT = ["--max_iterations", "2", "--num_workers", "0", "--progress", "0"]


def test_from_scans_to_a_table_in_three_commands(tmp_path, monkeypatch, capsys):
    """Those of docs/data.md, whose only numbers here make it short."""
    monkeypatch.chdir(tmp_path)
    make_ct(tmp_path / "CT", cases=6)
    for number in (6, 7):  # scans without a label
        (tmp_path / "CT/imagesTs").mkdir(exist_ok=True)
        image = nibabel.load(tmp_path / f"CT/imagesTr/ct_{number - 6}_0000.nii.gz")
        nibabel.save(image, tmp_path / f"CT/imagesTs/ct_{number}_0000.nii.gz")
    prepare_nifti(["CT", "data", "--plan", *TINY])
    folder = train_mean_teacher.main(["--root_path", "data", "--plan", "data/plan.json", *SHORT])
    assert folder.parts[-2:] == ("data_plan_5_labeled", "MT")
    made, config = (json.loads(path.read_text()) for path in (tmp_path / "data/plan.json", folder / "config.json"))
    flags = ("patch_size", "strides", "kernel_sizes", "network", "n_filters", "normalization", "intensity", "stride_z")
    assert {name: config[name] for name in flags} == {name: made[name] for name in flags}
    assert len(config["unlabeled_cases"]) == 2 and config["labeled_bs"] == made["labeled_bs"]
    capsys.readouterr()
    result = inference.main(["--model_path", str(folder / "iter_2.pth")])
    assert len(result["cases"]) == 1 and "Dice %" in capsys.readouterr().out
    # A new scan is prepared as the training data was, by the numbers of the data set.
    new = inference.main(["--model_path", str(folder / "iter_2.pth"), "--input", "CT/imagesTs", "--output_dir", "new"])
    assert (
        len(list((tmp_path / "new/predictions").iterdir())) == 2
        and new["preprocessing"]["by_channel"] == made["by_channel"]
    )


def trained(script, data, out, *more):
    words = ["--root_path", data, "--output_dir", out, "--labelnum", 3, *SHORT, *more]
    return json.loads((script.main([*map(str, words)]) / "config.json").read_text())


def test_the_command_line_wins_then_config_then_the_plan(tmp_path, data):
    made, path = make_plan([str(data), *TINY]), data / "plan.json"
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"n_filters": 4, "stride_xy": 9}))
    got = trained(train_mean_teacher, data, tmp_path, "--plan", path, "--config", config, "--n_filters", 3)
    assert (got["n_filters"], got["stride_xy"], got["stride_z"]) == (3, 9, made["stride_z"])
    assert got["max_filters"] == 320 and got["batch_size"] == made["batch_size"] and got["plan"] == str(path)
    # The run's own record is a --config, whether or not its plan is still there.
    path.rename(tmp_path / "moved.json")
    record = next(tmp_path.glob("model/*/MT/config.json"))
    assert trained(train_mean_teacher, data, tmp_path / "again", "--config", record)["strides"] == made["strides"]


def test_the_network_of_a_plan_decides_on_dropout_as_that_of_a_flag(tmp_path, data):
    """A U-Net drops only where that is asked for: docs/images.md says what dropout costs it."""
    for network, drops in (("unet", False), ("vnet", True)):
        make_plan([str(data), *TINY, "--network", network])
        for name, more in (("alone", []), ("said", ["--network", network])):
            got = trained(train_sup, data, tmp_path / network / name, "--plan", data / "plan.json", *more)
            assert (got["network"], got["has_dropout"]) == (network, drops)


def test_a_batch_holds_no_more_labelled_cases_than_there_are(tmp_path, data):
    made = make_plan([str(data), *TINY, "--batch_cap", "9", "--max_patch", "16"])
    assert made["batch_size"] > 9
    assert trained(train_sup, data, tmp_path, "--plan", data / "plan.json")["batch_size"] == 3
    made["batch_size"] = 6
    (data / "plan.json").write_text(json.dumps(made))
    got = trained(train_mean_teacher, data, tmp_path, "--plan", data / "plan.json", "--labelnum", 2)
    assert (got["labeled_bs"], got["batch_size"]) == (2, 5)


def test_pretraining_takes_of_a_plan_what_is_not_about_labels(tmp_path, data, capsys):
    """Of the training that follows it is the same plan, whether or not that says how many cases are labelled."""
    made = make_plan([str(data), *TINY])
    words = ["--root_path", data, "--output_dir", tmp_path, "--plan", data / "plan.json", *SHORT, "--mask_block", 2]
    for exp, labels in (("without", {}), ("with", {"labelnum": 2, "ignore_padding": True})):
        (data / "plan.json").write_text(json.dumps({**made, **labels, "batch_size": 3}))
        folder = pretrain_masked.main([*map(str, [*words, "--exp", exp])])
        got = json.loads((folder / "config.json").read_text())
        for name in ("patch_size", "strides", "kernel_sizes", "network", "n_filters", "normalization"):
            assert got[name] == made[name]
        assert (got["batch_size"], got["labelnum"], got["ignore_padding"]) == (3, 0, False)
    assert "instead of" not in capsys.readouterr().out


def test_images_and_slices_are_trained_by_their_plans(tmp_path):
    for root, more in ((make_images(tmp_path / "images"), []), (make_stacks(tmp_path / "stacks"), ["--dims", "2"])):
        made = make_plan([str(root), "--memory_gb", "0.1", "--n_filters", "2", *more])
        got = trained(train_sup, root, tmp_path / root.name, "--plan", root / "plan.json")
        assert got["dims"] == 2 and got["patch_size"] == made["patch_size"] and got["strides"] == made["strides"]


def test_flat_files_of_volumes_are_no_stacks(tmp_path):
    """<root>/data/<case>.h5 is how ACDC's stacks lie, and BraTS's volumes: the first side tells them apart."""
    for name, shape, first in (("volumes", (22, 24, 28), None), ("stacks", (6, 24, 28), True)):
        root = tmp_path / name
        (root / "data").mkdir(parents=True)
        for number in range(6):
            with h5py.File(root / f"data/case_{number}.h5", "w") as file:
                file["image"] = np.random.default_rng(number).standard_normal(shape).astype(np.float32)
                file["label"] = ball(shape, [side / 2 for side in shape], 2).astype(np.uint8)
        (root / "train.list").write_text("".join(f"case_{number}\n" for number in range(6)))
        made = make_plan([str(root), *TINY, "--dims", "3"])
        assert made.get("slices_first") is first and ("--slices_first" in made["why"].get("files", "")) == bool(first)


def test_stacks_are_trained_as_volumes_with_the_slices_last(tmp_path):
    root = make_stacks(tmp_path / "stacks")
    made = make_plan([str(root), *TINY, "--spacing", "1", "1", "4"])
    got = trained(train_sup, root, tmp_path, "--plan", root / "plan.json")
    assert got["slices_first"] and got["patch_size"] == made["patch_size"] and made["patch_size"][-1] <= 4


@pytest.mark.parametrize("dims", [2, 3])
def test_a_plan_of_nnunet_is_trained_by(tmp_path, data, dims):
    made = make_plan([str(data), *TINY, "--dims", str(dims)])
    path = tmp_path / "nnUNetPlans.json"
    path.write_text(json.dumps(to_nnunet(made)))
    got = trained(train_sup, data, tmp_path, "--plan", path, "--dims", dims)
    assert all(got[name] == made[name] for name in ("patch_size", "strides", "kernel_sizes", "n_filters"))


def test_a_plan_of_nnunet_for_stacks_as_volumes_is_compared_with_the_cases(tmp_path, capsys):
    root, path = make_stacks(tmp_path / "stacks"), tmp_path / "nnUNetPlans.json"
    made = make_plan([str(root), *TINY, "--spacing", "1", "1", "4"])
    path.write_text(json.dumps(to_nnunet({**made, "patch_size": [96, 64, 4]}, (1, 2, 0))))
    settings = ["--root_path", root, "--output_dir", tmp_path / "out", "--labelnum", 3, *SHORT, "--slices_first"]
    said = refused(capsys, train_mean_teacher.main, *settings, "--plan", path)
    assert "no case fills its patch of 96 x 64 x 4" in said


def test_plans_that_are_not_of_the_data(tmp_path, data, capsys):
    made = make_plan([str(data), *TINY])
    (data / "preprocessing.json").write_text(json.dumps({"labels": [0, 1]}))
    path, words = (
        tmp_path / "plan.json",
        ["--root_path", data, "--output_dir", tmp_path / "out", "--labelnum", 3, *SHORT],
    )
    for change, said in (
        ({"num_classes": 3}, "is of data with 3 classes, here are 2"),
        ({"made_from": {"channels": 2}}, "is of data with 2 channels, here are 1"),
        ({"patch_size": [96, 20, 16]}, "no case fills its patch of 96 x 20 x 16, the largest sides are 24 x 20 x 14"),
        ({"patch_size": "large"}, "is no plan, its patch_size is 'large'"),
        ({"patch_size": [16, 16, -16]}, "-16 is below 1"),
        ({"dims": 4}, "4"),
        ({"network": "transformer"}, "transformer"),
        ({"strides": [[5, 2, 2], *made["strides"][1:]]}, "is no positive multiple of"),
        ({"configurations": {}}, "no nnU-Net plan with a configuration 3d_fullres"),
    ):
        path.write_text(json.dumps({**made, **change}))
        assert said in refused(capsys, train_mean_teacher.main, *words, "--plan", path)
    assert "is for --dims 3, not 2" in refused(
        capsys, train_mean_teacher.main, *words, "--plan", data / "plan.json", "--dims", 2
    )
    path.write_text("{")
    assert "not a JSON file" in refused(capsys, train_mean_teacher.main, *words, "--plan", path)
    assert "nowhere.json: no such file" in refused(capsys, train_sup.main, *words, "--plan", tmp_path / "nowhere.json")
    assert not (tmp_path / "out").exists()
