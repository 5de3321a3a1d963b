"""Which cases a run trains on, what it says of them, and where it lies."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import make_data, write_case

import inference
import train_mean_teacher
import train_sup
from mtseg import report
from mtseg.script import flags, sources
from mtseg.script.data import drawn, training_set


def train(script, data, out, *more, labelnum=3):
    """The folder of a short run, and its log."""
    words = ["--root_path", data, "--output_dir", out, "--labelnum", labelnum, "--max_iterations", 2, "--n_filters", 2]
    words += ["--patch_size", 16, 16, 16, "--num_workers", 0, "--progress", 0, *more]
    folder = script.main(words)
    return folder, (folder / "log.txt").read_text()


def config(folder):
    return json.loads((folder / "config.json").read_text())


def refused(capsys, *arguments):
    """The sentence with which a run ends that was not to begin."""
    with pytest.raises(SystemExit) as stopped:
        train(*arguments)
    assert stopped.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    return line


# -------------------------------------------------------------------------------------- who learns from which case
def test_test_cases_among_the_unlabelled_are_said_and_count_as_trained_on(data, tmp_path, capsys):
    (data / "unlabeled.list").write_text("case_6\n")
    folder, log = train(train_mean_teacher, data, tmp_path / "runs")
    assert "1 case (case_6) of test.list too: their images are TRAINED ON" in log
    assert config(folder)["unlabeled_cases"] == ["case_6"]
    result = inference.main(["--model_path", str(folder / "iter_2.pth"), "--stride_xy", "16", "--stride_z", "16"])
    assert result["trained_on"] == ["case_6"]
    assert "1 of the measured cases" in capsys.readouterr().out
    written = json.loads((folder / "iter_2_test" / "metrics.json").read_text())
    assert written["trained_on"] == ["case_6"]
    _, log = train(train_sup, data, tmp_path / "runs")  # learns from labelled cases alone
    assert "TRAINED ON" not in log


def test_a_class_that_no_labelled_case_has_is_said(data, tmp_path):
    said = "no labelled case has a voxel of class 2: look at --num_classes"
    assert said not in train(train_mean_teacher, data, tmp_path / "two")[1]
    assert said in train(train_mean_teacher, data, tmp_path / "three", "--num_classes", 3)[1]
    with h5py.File(data / "data/case_2/mri_norm2.h5", "r+") as file:
        file["label"][0, 0, 0] = 2
    assert said not in train(train_mean_teacher, data, tmp_path / "labelled", "--num_classes", 3)[1]
    assert said in train(train_mean_teacher, data, tmp_path / "less", "--num_classes", 3, labelnum=2)[1]


def test_a_patch_that_no_volume_can_fill_is_said(data, tmp_path):
    said = "--patch_size 16 x 16 x 16: no volume is so large (the largest is 24 x 20 x 14); each is padded to it"
    assert said in train(train_sup, data, tmp_path / "runs")[1]
    label = np.zeros((24, 20, 16), np.uint8)
    label[9:15, 9:15, 6:10] = 1
    write_case(data, "case_1", label + np.random.default_rng(0).normal(0, 0.3, label.shape).astype(np.float32), label)
    assert said not in train(train_sup, data, tmp_path / "others")[1]


def test_a_dataset_name_without_a_root_path_is_a_folder_in_data(tmp_path, monkeypatch):
    monkeypatch.setattr(flags, "HOME", tmp_path)
    make_data(tmp_path / "data/LA")
    make_data(tmp_path / "data/Liver")
    for words, folder in (("--dataset_name Liver", "Liver"), ("", "LA"), ("--dataset_name Phantom", "Phantom")):
        args = flags.parse(train_sup.PARSER, words.split())
        assert (args.root_path, args.dataset_name) == (str(tmp_path / "data" / folder), folder)
    with pytest.raises(flags.FlagError, match=r"phantom: there is no .*Electrode or LA or Liver or Phantom"):
        flags.parse(train_sup.PARSER, ["--dataset_name", "phantom"])
    args = flags.parse(train_sup.PARSER, ["--dataset_name", "mine", "--root_path", str(tmp_path / "data/LA")])
    assert args.dataset_name == "mine"
    # Of a run's settings, too; a name of no folder there is a name for the run's own data.
    (tmp_path / "config.json").write_text(json.dumps({"root_path": str(tmp_path / "data/LA"), "dataset_name": "LA"}))
    for name, folder in (("Liver", "Liver"), ("Phantom", "Phantom"), ("mine", "LA")):
        args = flags.parse(train_sup.PARSER, ["--config", str(tmp_path / "config.json"), "--dataset_name", name])
        assert (args.root_path, args.dataset_name) == (str(tmp_path / "data" / folder), name)


def test_test_cases_of_an_unlabeled_root_are_said(data, tmp_path):
    other = make_data(tmp_path / "other", train=8, test=1)
    (other / "train.list").write_text("case_6\ncase_7\n")
    folder, log = train(train_mean_teacher, data, tmp_path / "runs", "--unlabeled_root", other)
    assert "2 cases (case_6, case_7) of test.list too" in log
    assert config(folder)["unlabeled_cases"] == ["case_6", "case_7"]


def test_an_unlabeled_root_within_the_data_set_is_not_taken_for_its_cases(data, tmp_path, capsys):
    """LASeg's --root_path may be the folder of the cases, whose lists lie above; another folder there is none."""
    image = np.zeros((20, 18, 16), np.float32)
    write_case(data / "extra", "more_0", image, None)
    (data / "extra/data/more_0").rename(data / "extra/more_0")
    (data / "extra/data").rmdir()
    said = refused(capsys, train_mean_teacher, data, tmp_path / "runs", "--unlabeled_root", data / "extra")
    assert f"--unlabeled_root {data / 'extra'}" in said and "unlabeled.list" in said


def test_validation_cases_among_the_unlabelled_are_refused(data, tmp_path, capsys):
    (data / "unlabeled.list").write_text("case_4\ncase_5\n")
    (data / "val.list").write_text("case_5\n")
    line = refused(capsys, train_mean_teacher, data, tmp_path / "runs", "--val_list", data / "val.list")
    assert str(data / "unlabeled.list") in line and "case_5 is in --val_list too" in line
    assert not (tmp_path / "runs").exists()


def test_a_labelled_case_is_not_also_unlabelled(data, tmp_path):
    make_data(tmp_path / "more", train=10, test=1)
    for case in ("case_8", "case_9"):
        (tmp_path / "more" / "data" / case).rename(data / "data" / case)
    (data / "unlabeled.list").write_text("case_0\ncase_8\ncase_4\ncase_9\n")
    folder, log = train(train_mean_teacher, data, tmp_path / "runs")
    assert config(folder)["unlabeled_cases"] == ["case_8", "case_9"]
    assert "2 cases (case_0, case_4) of train.list too" in log
    assert "3 labelled and 5 unlabelled cases" in log


def test_a_draw_labels_other_patients_the_same_ones_for_every_method_and_seed(data, tmp_path):
    patients = {"a": ["case_0", "case_3"], "b": ["case_1", "case_4"], "c": ["case_2", "case_5"]}
    (data / "splits.json").write_text(json.dumps({"patients": patients}))
    labeled, orders, folders = {}, {}, []
    for draw in range(4):
        first, _ = train(train_sup, data, tmp_path / str(draw), "--labeled_draw", draw, labelnum=2)
        second, _ = train(
            train_mean_teacher, data, tmp_path / str(draw), "--labeled_draw", draw, "--seed", 3, labelnum=2
        )
        labeled[draw], orders[draw] = config(first)["train_cases"], config(second)["train_cases"]
        assert orders[draw][:2] == labeled[draw] and sorted(orders[draw]) == orders[0]
        folders.append(first)
    assert labeled[0] == ["case_0", "case_1"]  # the list's
    assert all(labeled[draw] in patients.values() for draw in (1, 2, 3))
    assert len({*map(tuple, labeled.values())}) > 2
    (data / "val.list").write_text("\n".join(labeled[1]))
    folder, _ = train(
        train_sup, data, tmp_path / "fewer", "--labeled_draw", 1, "--val_list", data / "val.list", labelnum=4
    )
    assert config(folder)["train_cases"] == orders[1][2:]  # whoever is kept out, the others' order stays

    for folder in folders:
        inference.main(["--model_path", str(folder / "iter_2.pth"), "--stride_xy", "16", "--stride_z", "16"])
    rows, _ = report.group_results(report.find_results([tmp_path])[0])
    assert [row.name for row in rows] == ["supervised", *(f"supervised (labeled_draw {draw})" for draw in (1, 2, 3))]
    baselines = report.find_baseline(rows, "supervised")
    assert all(report.baseline_of(row, baselines) is row for row in rows)
    assert report.find_baseline(rows, "supervised labeled_draw 2") == [rows[2]]


def test_a_draws_order_is_the_same_whoever_is_kept_out_and_whatever_their_names_suggest(tmp_path):
    cases = ["extra", *(f"p{patient}_{scan}" for patient in range(1, 9) for scan in (1, 2))]
    (tmp_path / "train.list").write_text("\n".join(cases))  # without `extra`, p1_1 and p1_2 were of one patient
    for number in (1, 2):
        order = drawn(tmp_path, cases, number)
        assert drawn(tmp_path, cases[1:], number) == [case for case in order if case != "extra"]


def test_a_labelled_case_alone_is_no_unlabelled_data(data, tmp_path, capsys):
    (data / "unlabeled.list").write_text("case_0\n")
    assert "leaves nothing unlabelled" in refused(
        capsys, train_mean_teacher, data, tmp_path / "runs", "--max_samples", 3
    )


def test_a_recipe_beside_another_copy_of_mtseg_is_refused(data, tmp_path):
    other = tmp_path / "other"
    (other / "mtseg/script").mkdir(parents=True)
    (other / "recipes").mkdir()
    recipe = shutil.copy(Path(train_sup.__file__).parent / "recipes/train_cps.py", other / "recipes")
    words = [sys.executable, recipe, "--root_path", data, "--output_dir", tmp_path / "runs"]
    environment = {**os.environ, "PYTHONPATH": str(Path(train_sup.__file__).parent)}
    done = subprocess.run(list(map(str, words)), env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and not (tmp_path / "runs").exists()
    assert f"not in {other}/mtseg beside the script; pip install -e {other}, or set PYTHONPATH={other}" in done.stderr


# ------------------------------------------------------------------------------------------------- what is said of it
@pytest.mark.parametrize("cache", ["--cache", "--no-cache"])
def test_images_that_are_constant_or_not_normalised_are_said_at_the_start(data, tmp_path, cache):
    for case, change in ((1, lambda image: 0 * image + 7), (2, lambda image: 100 * image + 500)):
        with h5py.File(data / "data" / f"case_{case}" / "mri_norm2.h5", "r+") as file:
            file["image"][...] = change(file["image"][...])
    _, log = train(train_sup, data, tmp_path / "runs", cache)
    assert "constant images (case_1: 7 everywhere) in 1 case" in log
    assert "not normalised (case_2: mean 5" in log
    _, log = train(train_sup, make_data(tmp_path / "good"), tmp_path / "runs", cache)
    assert "constant images" not in log and "not normalised" not in log


@pytest.mark.parametrize("given", ["pancreas", "pancreas/data", "pancreas/../pancreas"])
def test_the_data_is_called_as_its_folder(tmp_path, given):
    make_data(tmp_path / "pancreas")
    folder, _ = train(train_sup, tmp_path / given, tmp_path / "runs")
    assert folder == tmp_path / "runs" / "model" / "pancreas_vnet_3_labeled" / "supervised"
    assert config(folder)["dataset_name"] == "pancreas"
    weights = ["--model_path", str(folder / "iter_2.pth"), "--stride_xy", "16", "--stride_z", "16"]
    assert inference.main(weights)["dataset"] == "pancreas"
    other = make_data(tmp_path / "liver")
    assert inference.main([*weights, "--root_path", str(other)])["dataset"] == "liver"
    (folder / "config.json").unlink()
    settings = ["--n_filters", "2", "--patch_size", "16", "16", "16", "--root_path", str(other)]
    assert inference.main([*weights, *settings])["dataset"] == "liver"


def test_the_data_is_called_as_the_flag_says(data, tmp_path):
    folder, _ = train(train_sup, data, tmp_path / "runs", "--dataset_name", "Hearts")
    assert folder.parent.name == "Hearts_vnet_3_labeled"
    weights = ["--model_path", str(folder / "iter_2.pth"), "--stride_xy", "16", "--stride_z", "16"]
    assert inference.main([*weights, "--root_path", str(data)])["dataset"] == "Hearts"


def test_flips_mirror_without_rotation_and_show_the_volume_as_it_is(data):
    """The values of these volumes grow along W: a quarter turn would make them grow along H."""
    ramp = np.broadcast_to(np.linspace(-1, 1, 24)[:, None, None], (24, 20, 14))
    write_case(data, "case_0", ramp, np.zeros(ramp.shape, np.uint8))

    def directions(rotflip):
        args = flags.parse(
            train_sup.PARSER, ["--root_path", str(data), "--rotflip", rotflip, "--patch_size", *["16"] * 3]
        )
        source = sources.Source(data)
        dataset, _ = training_set(args, source, source.dataset(args, ["case_0"]))
        patches = [dataset[(0, (1, draw))]["image"][0, 2:14, 2:14, 7] for draw in range(40)]
        return {tuple(p.diff(dim=axis).mean().sign().item() for axis in (0, 1)) for p in patches}

    assert directions("none") == {(1, 0)}
    assert directions("flips") == {(1, 0), (-1, 0)}
    assert directions("mirror") == directions("all") == {(1, 0), (-1, 0), (0, 1), (0, -1)}


# ------------------------------------------------------------------------------------------------------- intensities
def test_volumes_normalised_anew_train_and_are_tested_as_files_normalised_by_hand(data, tmp_path):
    """Zero mean and unit variance over the whole of each case; the same weights, the same metrics, scans of --input
    too."""
    by_hand = tmp_path / "by_hand"
    (by_hand / "data").mkdir(parents=True)
    for name in ("train.list", "test.list"):
        (by_hand / name).write_text((data / name).read_text())
    for path in sorted((data / "data").glob("*/mri_norm2.h5")):
        with h5py.File(path) as file:
            image, label = file["image"][:].astype(float), file["label"][:]
        write_case(by_hand, path.parent.name, ((image - image.mean()) / image.std()).astype(np.float32), label)
    one, _ = train(train_mean_teacher, data, tmp_path / "one", "--intensity", "zscore", "--dataset_name", "LA")
    two, _ = train(train_mean_teacher, by_hand, tmp_path / "two", "--dataset_name", "LA")
    first, second = (torch.load(folder / "iter_2.pth", weights_only=True) for folder in (one, two))
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-4, atol=1e-5)
    strides = ["--stride_xy", "8", "--stride_z", "8"]
    results = [
        inference.main(["--model_path", str(one / "iter_2.pth"), *more, *strides])
        for more in ([], ["--root_path", str(by_hand), "--intensity", "none"])
    ]
    assert results[0]["protocol"]["intensity"] == "zscore" and "intensity" not in results[1]["protocol"]
    dices = [[row["dice"] for row in result["cases"]] for result in results]
    assert dices[0] == pytest.approx(dices[1], abs=0.02)
    scans = ["--input", str(data / "data/case_6/mri_norm2.h5"), "--output_dir", str(tmp_path / "scan"), *strides]
    scanned = inference.main(["--model_path", str(one / "iter_2.pth"), *scans])
    assert [row["dice"] for row in scanned["cases"]] == pytest.approx(dices[0][:1], abs=1e-6)
