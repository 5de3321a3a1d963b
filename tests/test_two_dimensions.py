"""Images and slices of stacks through the scripts: what holds for volumes holds for them."""

import copy
import csv
import json
import math
import shutil

import h5py
import index_images
import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
from conftest import PHASES, TINY_2D, TINY_OF, killed_after_saving, make_data, make_images, make_stacks
from medpy.metric import binary
from PIL import Image
from plan import main as make_plan

import inference
import train_sup
from mtseg import report
from mtseg.classes import ClassTable
from mtseg.datasets import DataError, LAHeart
from mtseg.losses import multiclass_dice_loss
from mtseg.networks.unet import UNet
from mtseg.samplers import IterationSampler, TwoStreamBatchSampler
from mtseg.script import flags, methods, sources
from mtseg.seeding import seed_iteration

SCRIPTS = {methods.method_of(path): methods.load_script(path) for path in methods.training_scripts()}
SEMI_SUPERVISED = [name for name, script in SCRIPTS.items() if script.PARSER.get_default("labeled_bs")]
KINDS = {"images": make_images, "stacks": make_stacks}
NO_BACKGROUND = {**PHASES, "background": None}


@pytest.fixture(params=KINDS)
def data(request, tmp_path):
    return KINDS[request.param](tmp_path / request.param)


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images")


def run(model, data, out, *more, **changes):
    """Train for a few iterations; returns the run's folder."""
    return SCRIPTS[model].main([*words_of(data, out, model, **changes), *more])


def infer(folder, *more, name="iter_4.pth"):
    return inference.main(["--model_path", str(folder / name), *map(str, more)])


def weights(folder, name="iter_4.pth"):
    return torch.load(folder / name, weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def config(folder):
    return json.loads((folder / "config.json").read_text())


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def said(capsys, main, words):
    """The one sentence in which `main` ends with exit code 2."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    assert end.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    return line


def words_of(data, out, model="supervised", **changes):
    given = {**TINY_2D, "root_path": data, "output_dir": out, "labelnum": 3, "max_iterations": 4}
    given |= TINY_OF.get(model, {}) | changes
    return [word for name, value in given.items() for word in (f"--{name}", *str(value).split())]


def refused(capsys, model, data, out, **changes):
    line = said(capsys, SCRIPTS[model].main, words_of(data, out, model, **changes))
    assert not (out / "model").exists()
    return line


# ------------------------------------------------------------------------------------------- what every script does


@pytest.mark.parametrize("model", SCRIPTS)
def test_every_script_trains_on_images_and_slices_and_resumes_to_the_bit(data, tmp_path, monkeypatch, model):
    (data / "val.list").write_text((data / "test.list").read_text())
    more = {"val_list": data / "val.list", "val_freq": 2, "save_freq": 2, "rotflip": "ssl4mis"}
    strong = {"strong_rotation": 20, "strong_noise": 0.2, "strong_mixin": 0.2, "foreground_patches": 0.33}
    known = {action.dest for action in SCRIPTS[model].PARSER._actions}
    more |= {name: value for name, value in strong.items() if name in known}
    whole = run(model, data, tmp_path / "whole", **more)
    with killed_after_saving(monkeypatch):
        run(model, data, tmp_path / "parts", **more)
    parts = run(model, data, tmp_path / "parts", "--resume", **more)
    assert same(weights(whole), weights(parts))
    assert config(whole)["dims"] == 2 and config(whole)["num_classes"] == 3
    last = rows(parts)[-1]
    dice = [name for name in last if name.startswith("val_dice") and "/" not in name]
    for name in dice:
        of_classes = [float(last[f"{name}/{word}"]) for word in ("pore", "grain")]
        assert float(last[name]) == pytest.approx(np.mean(of_classes), abs=1e-7)
    result = infer(whole, "--stride_xy", 16)
    assert {row["class"] for row in result["cases"]} == {"pore", "grain"}


@pytest.mark.parametrize("network", ["vnet", "unet", "unet_ssl4mis"])
def test_every_network_takes_images(images, tmp_path, network):
    folder = run("MT", images, tmp_path, network=network)
    assert all(w.dim() != 5 for w in weights(folder).values())
    assert infer(folder)["network"]["network"] == network


@pytest.mark.parametrize("model", SEMI_SUPERVISED)
def test_hidden_labels_never_change_what_is_learned(tmp_path, model):
    """With foreground patches neither: around what would an unlabelled patch be drawn?"""
    data, other = make_images(tmp_path / "images"), make_images(tmp_path / "other")
    for name in ("image_3", "image_4", "image_5"):
        mask = np.zeros((26, 23), np.uint8)
        mask[:3, :3] = 200
        Image.fromarray(mask).save(other / f"masks/{name}.png")
    more = {"foreground_patches": 1, "max_iterations": 6}
    a, b = (run(model, root, tmp_path / root.name / "runs", dataset_name="A", **more) for root in (data, other))
    assert same(weights(a, "iter_6.pth"), weights(b, "iter_6.pth"))


def by_hand(data, iterations):
    """Mean Teacher on images, put together without the scripts' data sets, transforms and loaders."""
    seed_iteration(1337, -1)
    student = UNet(1, 3, 2, "batchnorm", has_dropout=True, dims=2)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=0.0001)
    cases = (data / "train.list").read_text().split()
    sampler = IterationSampler(TwoStreamBatchSampler(range(3), range(3, 6), 4, 2, seed=1337), 1337, 0, iterations)
    for iteration, batch in enumerate(sampler):
        patches = []
        for index, seed in batch:
            image = np.array(Image.open(data / f"images/{cases[index]}.png"), dtype=np.float32)
            image = (image - image.mean(dtype=float)) / image.std(dtype=float)
            label = np.searchsorted([0, 10, 200], np.array(Image.open(data / f"masks/{cases[index]}.png")))
            rng = np.random.default_rng(seed)
            turns, axis = rng.integers(4), rng.integers(2)
            image, label = (np.flip(np.rot90(array, turns), axis) for array in (image.astype(np.float32), label))
            y, x = (int(rng.integers(side - 16 + 1)) for side in label.shape)
            patches.append([array[y : y + 16, x : x + 16] for array in (image, label)])
        images = torch.from_numpy(np.stack([image for image, _ in patches]))[:, None]
        labels = torch.from_numpy(np.stack([label for _, label in patches]))
        seed_iteration(1337, iteration + 1)
        noise = torch.clamp(torch.randn_like(images[2:]) * 0.1, -0.2, 0.2)
        outputs = student(images)
        loss = 0.5 * (F.cross_entropy(outputs[:2], labels[:2]) + multiclass_dice_loss(outputs[:2], labels[:2]))
        target = F.softmax(teacher(images[2:] + noise), dim=1)
        ramp = math.exp(-5 * (1 - iteration // 150 / 40) ** 2)
        loss = loss + 0.1 * ramp * F.mse_loss(F.softmax(outputs[2:], dim=1), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        alpha = min(1 - 1 / (iteration + 1), 0.99)
        for average, parameter in zip(teacher.parameters(), student.parameters(), strict=True):
            average.data.mul_(alpha).add_(parameter.data, alpha=1 - alpha)
    return student.state_dict()


def test_mean_teacher_on_images_is_that_on_volumes(images, tmp_path):
    folder = run("MT", images, tmp_path / "runs", "--has_dropout")
    expected = by_hand(images, 4)
    for name, value in weights(folder).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------- what inference gives


def test_images_are_measured_as_medpy_does_and_pooled_over_all_pixels(images, tmp_path):
    folder = run("supervised", images, tmp_path / "runs")
    result = infer(folder, "--save_result", tmp_path / "saved")
    assert result["unit"] == "pixel"
    pairs = {}
    for name in ("image_6", "image_7"):
        with h5py.File(tmp_path / f"saved/{name}.h5") as file:
            pairs[name] = file["prediction"][:], file["label"][:]
            assert json.loads(file.attrs["case"])["classes"]["classes"][1]["name"] == "pore"
    for row in result["cases"]:
        prediction, label = pairs[row["case"]]
        number = {"pore": 1, "grain": 2}[row["class"]]
        assert row["dice"] == pytest.approx(binary.dc(prediction == number, label == number))
        assert row["jaccard"] == pytest.approx(binary.jc(prediction == number, label == number))
        assert row["pixel_accuracy"] == (prediction == label).mean()
    predictions, labels = (np.stack(arrays) for arrays in zip(*pairs.values(), strict=True))
    pooled = {entry["class"]: entry["pooled"] for entry in result["summary"]}
    for number, name in ((1, "pore"), (2, "grain")):
        assert pooled[name]["jaccard"] == pytest.approx(binary.jc(predictions == number, labels == number))


def test_a_mask_that_was_corrected_since_is_measured_anew(images, tmp_path, monkeypatch):
    folder, measured = run("supervised", images, tmp_path / "runs"), []
    monkeypatch.setattr(
        inference, "infer_case", lambda case, *rest, f=inference.infer_case: measured.append(case) or f(case, *rest)
    )
    infer(folder, "--continue")
    mask = images / "masks" / "image_7.png"
    Image.fromarray(np.array(Image.open(mask))[::-1]).save(mask)
    again = infer(folder, "--continue")
    assert measured == ["image_6", "image_7", "image_7"]
    assert again["cases"] == infer(folder)["cases"]


def test_predictions_are_index_images_with_the_palette_in_them(images, tmp_path):
    folder = run("supervised", images, tmp_path / "runs")
    infer(folder, "--save_result", tmp_path / "saved")
    out = tmp_path / "out"
    result = infer(
        folder, "--input", images / "images", "--output_dir", out, "--save_colors", "--labels", images / "masks"
    )
    assert len({row["case"] for row in result["cases"]}) == 8
    for name in ("image_6", "image_7"):
        with h5py.File(tmp_path / f"saved/{name}.h5") as file:
            expected = file["prediction"][:]
        picture = Image.open(out / f"predictions/{name}.png")
        assert picture.mode == "P"
        np.testing.assert_array_equal(np.array(picture), np.array([0, 10, 200])[expected])
        colors = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]])[expected]
        np.testing.assert_array_equal(np.array(picture.convert("RGB")), colors)
        np.testing.assert_array_equal(np.array(Image.open(out / f"colors/{name}_colors.png")), colors)
    infer(folder, "--save_result", tmp_path / "png", "--save_format", "png")
    np.testing.assert_array_equal(
        np.array(Image.open(tmp_path / "png/image_6_label.png")), np.array(Image.open(images / "masks/image_6.png"))
    )


def test_flips_and_gaussian_weights_average_over_the_four_mirror_images(images, tmp_path):
    folder = run("supervised", images, tmp_path / "runs")
    flags = ["--stride_xy", 8, "--tta", "--weighting", "gaussian", "--save_probabilities", "--output_dir"]
    infer(folder, *flags, tmp_path / "as_it_is")
    for folder_name in ("images", "masks"):
        for path in (images / folder_name).glob("*.png"):
            Image.fromarray(np.array(Image.open(path))[::-1]).save(path)
    infer(folder, *flags, tmp_path / "mirrored")
    found = []
    for name in ("as_it_is", "mirrored"):
        with h5py.File(tmp_path / name / "probabilities/image_6.h5") as file:
            found.append(file["probabilities"][:].astype(np.float32))
    np.testing.assert_allclose(found[0], found[1][:, ::-1], atol=2e-3)


def test_without_a_background_every_class_counts(tmp_path):
    data = make_images(tmp_path / "images", classes=NO_BACKGROUND)
    folder = run("MT", data, tmp_path / "runs", patch_size="32 32")  # larger than the images: what is padded is unknown
    result = infer(folder)
    assert [row["class"] for row in result["cases"][:3]] == ["matrix", "pore", "grain"]
    assert config(folder)["background"] is None
    # In the loss too: with a background the class 0 has no Dice.
    other = run("MT", make_images(tmp_path / "other"), tmp_path / "others", patch_size="32 32")
    assert rows(folder)[0]["loss_dice"] != rows(other)[0]["loss_dice"]


def test_an_ignore_value_counts_nowhere(tmp_path):
    """The loss and the metrics are those of the masks in which nobody labelled the same pixels."""
    data = make_images(tmp_path / "images", classes={**PHASES, "ignore": 77})
    for path in (data / "masks").glob("*.png"):
        mask = np.array(Image.open(path))
        mask[:5] = 77
        Image.fromarray(mask).save(path)
    (data / "val.list").write_text("image_7")
    folder = run("MT", data, tmp_path / "runs", val_list=data / "val.list", val_freq=4)
    assert config(folder)["ignore_index"] == 255
    result = infer(folder, "--save_result", tmp_path / "saved")
    row = next(row for row in result["cases"] if row["case"] == "image_7")
    assert row["tp"] + row["fp"] + row["fn"] + row["tn"] == 21 * 23
    with h5py.File(tmp_path / "saved/image_7.h5") as file:
        prediction, label = file["prediction"][5:], file["label"][:]
    assert (label[:5] == 255).all()
    assert row["dice"] == pytest.approx(binary.dc(prediction == 1, label[5:] == 1))
    dices = [binary.dc(prediction == number, label[5:] == number) for number in (1, 2)]
    assert float(rows(folder)[-1]["val_dice_student"]) == pytest.approx(np.mean(dices), abs=0.02)


# ------------------------------------------------------------------------------------------------- stacks of slices


def test_a_stack_in_single_slices_is_read_as_the_stack(tmp_path):
    """SSL4MIS's ACDC has both; whoever copied only the slices trains on the same."""
    data = make_stacks(tmp_path / "a")
    folder = run("supervised", data, tmp_path / "runs", dataset_name="A", labelnum=2)
    slices = shutil.copytree(data, tmp_path / "b")
    (slices / "data/slices").mkdir()
    for path in sorted(slices.glob("data/*.h5")):
        with h5py.File(path) as file:
            for k, (image, label) in enumerate(zip(file["image"][:], file["label"][:], strict=True), start=1):
                with h5py.File(slices / f"data/slices/{path.stem}_slice_{k}.h5", "w") as one:
                    one["image"], one["label"] = image, label
        path.unlink()
    other = run("supervised", slices, tmp_path / "others", dataset_name="A", labelnum=2)
    assert same(weights(folder), weights(other))
    assert infer(folder)["cases"] == infer(other)["cases"]
    assert "2 labelled cases (7 slices)" in (folder / "log.txt").read_text()
    assert len(LAHeart(slices, cases=["patient007_frame01"], num_classes=3).files("patient007_frame01")) == 4
    plan = make_plan([str(slices), "--memory_gb", "0.02", "--n_filters", "8"])
    assert plan["num_classes"] == 3 and plan["made_from"]["cases"] == 6


def test_a_stack_with_an_axis_of_one_channel_is_one_without(tmp_path):
    data = make_stacks(tmp_path / "a")
    folder = run("supervised", data, tmp_path / "runs", dataset_name="A", labelnum=2)
    other = shutil.copytree(data, tmp_path / "b")
    for path in other.glob("data/*.h5"):
        with h5py.File(path, "r+") as file:
            image = file["image"][:]
            del file["image"]
            file["image"] = image[None]
    same_run = run("supervised", other, tmp_path / "others", dataset_name="A", labelnum=2)
    assert same(weights(folder), weights(same_run)) and infer(folder)["cases"] == infer(same_run)["cases"]


def test_stacks_are_tested_as_volumes_and_resized_back(tmp_path):
    data = make_stacks(tmp_path / "a")
    folder = run("MT", data, tmp_path / "runs", resize="16 32", patch_size="16 32", context=1)
    assert weights(folder)["encoder.0.conv1.weight"].shape[1] == 3
    result = infer(folder, "--save_result", tmp_path / "saved")
    assert result["unit"] == "voxel" and result["protocol"]["resize"] == [16, 32]
    for row in result["cases"]:
        with h5py.File(tmp_path / f"saved/{row['case']}.h5") as file:
            assert file["image"].shape == file["prediction"].shape == file["label"].shape
            number = {"pore": 1, "grain": 2}[row["class"]]
            pair = file["prediction"][:] == number, file["label"][:] == number
        assert row["dice"] == pytest.approx(binary.dc(*pair))
        if pair[0].any():
            assert row["hd95"] == pytest.approx(binary.hd95(*pair))
    # A file of the list is an --input too.
    alone = infer(folder, "--input", data / f"data/{row['case']}.h5", "--unit", "voxel", "--output_dir", tmp_path / "b")
    assert alone["cases"] == [one for one in result["cases"] if one["case"] == row["case"]]
    with h5py.File(data / f"data/{row['case']}.h5", "r+") as file:
        image = np.stack(2 * [file["image"][:]])
        del file["image"]
        file["image"] = image
    with pytest.raises(SystemExit):
        infer(folder, "--input", data / f"data/{row['case']}.h5", "--output_dir", tmp_path / "c")
    failures = json.loads((tmp_path / "c/metrics.json").read_text())["failures"]
    assert failures[row["case"]].endswith("has 2 channels (6 with --context 1), the network takes 3; name others")


def test_volumes_are_trained_on_slice_by_slice(tmp_path):
    data = make_data(tmp_path / "volumes")
    folder = run("MT", data, tmp_path / "runs")
    assert "3 labelled and 3 unlabelled cases (42 and 42 slices)" in (folder / "log.txt").read_text()
    assert {row["class"] for row in infer(folder)["cases"]} == {1}


def in_pages(hdf5, tiff):
    """The stacks of make_stacks, normalised in their files, and as the pages of TIFF files in the folder `tiff`."""
    tifffile = pytest.importorskip("tifffile")
    for name in ("images", "masks"):
        (tiff / name).mkdir(parents=True)
    for path in sorted(hdf5.glob("data/*.h5")):
        with h5py.File(path, "r+") as file:
            image = file["image"][:]
            file["image"][...] = image = (image - image.mean(dtype=float)) / image.std(dtype=float)
            mask = np.array([0, 10, 200], np.uint8)[file["label"][:]]
        for name, pages in (("images", np.float32(image)), ("masks", mask)):
            tifffile.imwrite(tiff / f"{name}/{path.stem}.tif", pages, photometric="minisblack")
    for name in ("train.list", "test.list", "classes.json"):
        shutil.copy(hdf5 / name, tiff / name)
    return tiff


def test_a_tiff_of_several_pages_is_a_stack(tmp_path):
    """The same slices in HDF5 and as the pages of TIFF files: the same training, and predictions in pages."""
    hdf5 = make_stacks(tmp_path / "hdf5")
    tiff = in_pages(hdf5, tmp_path / "tiff")
    a, b = (run("MT", root, tmp_path / f"{root.name}_runs", context=1, dataset_name="A") for root in (hdf5, tiff))
    for name, value in weights(a).items():
        torch.testing.assert_close(value, weights(b)[name], rtol=1e-3, atol=1e-4)
    infer(b, "--input", tiff / "images", "--labels", tiff / "masks", "--output_dir", tmp_path / "out")
    pages = pytest.importorskip("tifffile").imread(tmp_path / "out/predictions/patient006_frame01.tif")
    assert pages.shape == (3, 22, 25) and set(np.unique(pages)) <= {0, 10, 200}


def test_nnunets_layout_and_images_without_masks(tmp_path):
    images = make_images(tmp_path / "images")
    nnunet = tmp_path / "Dataset007_Steel"
    (nnunet / "imagesTr").mkdir(parents=True)
    (nnunet / "labelsTr").mkdir()
    for path in sorted((images / "images").glob("*.png")):
        shutil.copy(path, nnunet / f"imagesTr/{path.stem}_0000.png")
        mask = np.searchsorted([0, 10, 200], np.array(Image.open(images / "masks" / path.name))).astype(np.uint8)
        Image.fromarray(mask).save(nnunet / f"labelsTr/{path.name}")
    labels = {"labels": {"matrix": 0, "pore": 1, "grain": 2}, "channel_names": {"0": "SEM"}, "file_ending": ".png"}
    (nnunet / "dataset.json").write_text(json.dumps(labels))
    for name in ("train.list", "test.list"):
        shutil.copy(images / name, nnunet / name)
    a, b = (run("MT", root, tmp_path / f"{root.name}_runs", dataset_name="A") for root in (images, nnunet))
    assert same(weights(a), weights(b))
    assert {row["class"] for row in infer(b)["cases"]} == {"pore", "grain"}

    (images / "unlabeled").mkdir()
    for number in (4, 5):
        shutil.move(images / f"images/image_{number}.png", images / f"unlabeled/more_{number}.png")
        (images / f"masks/image_{number}.png").unlink()
    (images / "train.list").write_text("image_0\nimage_1\nimage_2\nimage_3\n")
    folder = run("MT", images, tmp_path / "third")
    assert config(folder)["unlabeled_cases"] == ["more_4", "more_5"]


def test_frames_of_a_sequence_are_the_channels_of_an_image(tmp_path):
    """SRPU-Model's index: the middle frame is segmented, its neighbours are further channels."""
    images = make_images(tmp_path / "images")
    for path in (images / "masks").glob("*.png"):
        mask = np.array(Image.open(path))
        Image.fromarray(np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], np.uint8)[mask // 10 % 19]).save(path)
    frames = {n: [f"image_{min(max(k, 0), 7)}.png" for k in (n - 1, n, n + 1)] for n in range(8)}
    samples = [
        {"sample_id": f"s{n}", "dataset": "LInCl", "frames": frames[n], "mask_file": f"image_{n}.png"} for n in range(8)
    ]
    roots = {"raw_image_root": str(images / "images"), "mask_root": str(images / "masks")}
    (images / "srpu.json").write_text(json.dumps({"datasets_info": {"LInCl": roots}, "samples": samples}))
    (images / "train.list").write_text("\n".join(f"s{n}" for n in range(6)))
    (images / "test.list").write_text("s6\ns7")
    folder = run("MT", images / "srpu.json", tmp_path / "runs")
    assert weights(folder)["encoder.0.conv1.weight"].shape[1] == 3
    assert {row["case"] for row in infer(folder)["cases"]} == {"s6", "s7"}


# -------------------------------------------------------------------------------------------------- several data sets


def index_of_two(tmp_path, **names):
    """An index of two sets, of 6 + 2 and of 3 + 2 images, with the same classes in other values and colours."""
    a = make_images(tmp_path / "a")
    classes = copy.deepcopy(PHASES)
    for entry, value in zip(classes["classes"], (7, 3, 5), strict=True):
        entry["value"] = value
    b = make_images(tmp_path / "b", train=3, classes={**classes, "background": 7})
    index_images.main([str(a), str(b), "--out", str(tmp_path / "index.json")])
    return tmp_path / "index.json"


def test_several_sets_are_trained_on_together_and_have_rows_of_their_own(tmp_path, capsys):
    index = index_of_two(tmp_path)
    order = (tmp_path / "train.list").read_text().split()
    assert len(order) == 9 and order[0] == "a__image_0"
    (tmp_path / "train.list").write_text("\n".join(["a__image_0", "b__image_0", *order[1:6], *order[7:]]))
    folder = run("MT", index, tmp_path / "runs", labelnum=2, set_balance=1)
    capsys.readouterr()
    result = infer(folder)
    assert {row["set"] for row in result["cases"]} == {"a", "b"}
    printed = capsys.readouterr().out
    assert "a__image_6" in printed and "b__image_3" in printed
    rows_of, _ = report.group_results(report.find_results([tmp_path / "runs"])[0])
    assert {row.dataset for row in rows_of} >= {"a", "b"}


# ------------------------------------------------------------------------------------------------------ real images


def test_sixteen_bits_stay_sixteen_bits(tmp_path):
    """What the network sees of a 16-bit image is its z-score, to every one of its 65 536 values."""
    data = make_images(tmp_path / "images")
    image = np.random.default_rng(0).integers(0, 2**16, (26, 23)).astype(np.uint16)
    Image.fromarray(image).save(data / "images/image_0.png")
    args = flags.parse(train_sup.PARSER, ["--root_path", str(data)])
    seen = sources.Source(data).dataset(args, ["image_0"]).read("image_0")["image"]
    np.testing.assert_allclose(seen, (image - image.mean()) / image.std(), atol=1e-5)
    back = np.rint(seen * image.std() + image.mean())
    np.testing.assert_array_equal(back, image)


@pytest.mark.parametrize("name", ["uhcs", "ebc", "superalloy", "em"])
def test_real_images_through_the_whole_path(images_root, tmp_path, name):
    more = {"labelnum": 2, "max_iterations": 2, "patch_size": "32 32", "stride_xy": 32}
    folder = run("MT", images_root / name, tmp_path / "runs", **more)
    result = infer(folder, "--num", 1, "--stride_xy", 32, name="iter_2.pth")
    known = [entry["name"] for entry in json.loads((images_root / name / "classes.json").read_text())["classes"]]
    assert {row["class"] for row in result["cases"]} == {*(known if name in ("uhcs", "superalloy") else known[1:])}


def test_real_stacks_through_the_whole_path(acdc_root, tmp_path):
    more = {
        "labelnum": 2,
        "max_iterations": 2,
        "num_classes": 4,
        "max_samples": 4,
        "resize": "64 64",
        "patch_size": "64 64",
    }
    folder = run("MT", acdc_root, tmp_path / "runs", **more)
    result = infer(folder, "--split", "val", "--num", 2, name="iter_2.pth")
    assert len(result["cases"]) == 6


# -------------------------------------------------------------------------------------------------------- bad input


def test_mistakes_in_images_end_in_one_sentence(images, tmp_path, capsys):
    def damaged(name, change):
        root = shutil.copytree(images, tmp_path / "damaged", dirs_exist_ok=True)
        change(root)
        line = refused(capsys, "supervised", root, tmp_path / "out")
        shutil.rmtree(root)
        assert name in line
        return line

    def mask(array):
        return lambda root: Image.fromarray(array).save(root / "masks/image_0.png")

    small = np.zeros((26, 22), np.uint8)
    assert "is 26 x 22 pixels, its image 26 x 23 pixels" in damaged("image_0.png", mask(small))
    odd = np.zeros((26, 23), np.uint8)
    odd[:2, :3] = 9
    line = damaged("masks/image_0.png", mask(odd))
    assert "9" in line and "6 " in line and "pore" in line and "--snap" in line
    color = np.dstack([odd, odd, odd])
    line = damaged("image_1.png", lambda root: Image.fromarray(color).save(root / "images/image_1.png"))
    assert "case image_1 has 3" in line
    glass = np.dstack([odd, np.full((26, 23), 7, np.uint8)])
    line = damaged("image_1.png", lambda root: Image.fromarray(glass).save(root / "images/image_1.png"))
    assert "transparent" in line
    damaged("image_2.png", lambda root: (root / "images/image_2.png").write_bytes(b"\x89PNG\r\n\x1a\n"))
    damaged("image_1", lambda root: (root / "masks/image_1.png").unlink())
    damaged("image_1", lambda root: (root / "images/image_1.png").unlink())
    twice = {**PHASES, "classes": [{**entry, "name": "pore"} for entry in PHASES["classes"]]}
    assert "pore" in damaged("classes.json", lambda root: (root / "classes.json").write_text(json.dumps(twice)))
    names = "image_0.png\nimage_0.tif\nimage_1"
    assert "twice" in damaged("train.list", lambda root: (root / "train.list").write_text(names))
    two = lambda root: shutil.copy(root / "images/image_0.png", root / "images/image_0.tif")  # noqa: E731
    assert "another ending" in damaged("image_0", two)


def test_near_values_are_snapped_where_that_is_asked_for(images, tmp_path):
    plain = run("supervised", images, tmp_path / "plain")
    for path in (images / "masks").glob("*.png"):
        mask = np.array(Image.open(path))
        Image.fromarray(np.where(mask == 200, 198, mask).astype(np.uint8)).save(path)
    snapped = run("supervised", images, tmp_path / "snapped", "--snap")
    assert same(weights(plain), weights(snapped))
    pixels = sum(int((np.array(Image.open(images / f"masks/image_{n}.png")) == 198).sum()) for n in range(3))
    assert f"--snap: {pixels} pixels of 3 masks are no class's" in (snapped / "log.txt").read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dims": 3, "patch_size": "16 16 16"}, ("--dims 3", "images")),
        ({"patch_size": "16 16 16"}, ("--patch_size 16 16 16", "--dims 2")),
        ({"num_classes": 2}, ("--num_classes 2", "matrix, pore, grain")),
        ({"context": 1}, ("--context 1", "no neighbours")),
        ({"ignore_index": 1}, ("--ignore_index 1", "foreground class")),
        ({"root_path": "missing.json"}, ("missing.json",)),
        ({"root_path": "/nowhere/at_all"}, ("/nowhere/at_all: no such folder",)),
    ],
)
def test_flags_that_do_not_fit_images(images, tmp_path, capsys, changes, words):
    line = refused(capsys, "MT", images, tmp_path / "out", **changes)
    assert all(word in line for word in words), line


def test_pixels_that_nobody_labelled_need_no_classes_json(images, tmp_path, capsys):
    """255 in masks of class numbers is --ignore_index 255, not to be snapped to a class; another needs a table."""
    (images / "classes.json").unlink()
    for path in (images / "masks").glob("*.png"):
        mask = np.searchsorted([0, 10, 200], np.array(Image.open(path))).astype(np.uint8)
        mask[:5] = 255
        Image.fromarray(mask).save(path)
    assert "value 255" in said(capsys, SCRIPTS["supervised"].main, words_of(images, tmp_path / "a", num_classes=3))
    folder = run("supervised", images, tmp_path / "b", "--ignore_index", "255", "--snap", num_classes=3)
    assert "got the nearest class" not in (folder / "log.txt").read_text()
    for row in infer(folder)["cases"]:
        assert row["tp"] + row["fp"] + row["fn"] + row["tn"] == (26 - 5) * 23
    line = said(capsys, SCRIPTS["supervised"].main, words_of(images, tmp_path / "c", num_classes=3, ignore_index=200))
    assert "--ignore_index 200 of masks without a classes.json" in line


def test_classes_that_do_not_follow_the_numbers_in_hdf5_files_are_refused(tmp_path, capsys):
    data = make_stacks(tmp_path / "stacks")
    names = [{"name": "grain", "value": 2}, {"name": "pore", "value": 1}, {"name": "matrix", "value": 0}]
    for table in ({"classes": names}, {"classes": names[::-1], "background": 2}, {**PHASES, "ignore": 7}):
        (data / "classes.json").write_text(json.dumps(table))
        assert "class numbers" in said(capsys, SCRIPTS["supervised"].main, words_of(data, tmp_path / "out"))
    (data / "classes.json").write_text(json.dumps({"classes": names[::-1]}))
    assert [row["class"] for row in infer(run("supervised", data, tmp_path / "out"))["cases"][:2]] == ["pore", "grain"]


def test_a_folder_that_is_not_prepared_is_told_how(images, tmp_path, capsys):
    (images / "train.list").unlink()
    line = said(capsys, SCRIPTS["supervised"].main, words_of(images, tmp_path / "out"))
    assert f"{images}: images without a train.list; write it: python data/make_splits.py {images}" in line
    (tmp_path / "scans/imagesTr").mkdir(parents=True)
    (tmp_path / "scans/imagesTr/a_0000.nii.gz").write_bytes(b"")
    line = said(capsys, SCRIPTS["supervised"].main, words_of(tmp_path / "scans", tmp_path / "out"))
    assert f"prepare them first: python data/prepare_nifti.py {tmp_path / 'scans'} NEW_FOLDER" in line


def test_masks_of_0_and_255_without_a_table_are_told_of_it(images, tmp_path, capsys):
    (images / "classes.json").unlink(missing_ok=True)
    line = said(capsys, SCRIPTS["supervised"].main, words_of(images, tmp_path / "out", num_classes=2))
    assert "no class's" in line and "or say in a classes.json what its values mean (docs/images.md)" in line


@pytest.mark.parametrize("kind", ["palette", "tiff"])
def test_a_mask_of_one_bit_whose_0_is_white_is_refused_where_the_colours_say_otherwise(tmp_path, kind):
    table = {"classes": [{"name": "grain", "color": [0] * 3}, {"name": "pore", "value": 255, "color": [255] * 3}]}
    white = np.zeros((8, 8), bool)
    white[2:4, 2:4] = True
    for turned in (False, True):
        path = tmp_path / f"{turned}.{'png' if kind == 'palette' else 'tif'}"
        if kind == "palette":
            picture = Image.fromarray((white ^ turned).astype(np.uint8), "P")
            picture.putpalette([255, 255, 255, 0, 0, 0] if turned else [0, 0, 0, 255, 255, 255])
            picture.save(path, bits=1)
        else:
            tifffile.imwrite(path, white ^ turned, photometric="miniswhite" if turned else "minisblack")
        assert (np.array(Image.open(path).convert("L")) > 0).sum() == 4
        if turned:
            with pytest.raises(DataError, match="the colours it shows are of different classes; save it as RGB"):
                sources.read_label(path, (8, 8), ClassTable.from_dict(table))
        else:
            assert sources.read_label(path, (8, 8), ClassTable.from_dict(table))[0].sum() == 4


def test_a_mask_whose_palette_shows_other_classes_than_its_values_is_refused(images, tmp_path, capsys):
    """Programs that save three colours with a palette number them anew; the numbers may be classes', but others."""
    colors = [[0, 0, 0], [255, 0, 0], [0, 0, 255]]
    table = {"classes": [{"name": name, "color": color} for name, color in zip("abc", colors, strict=True)]}
    (images / "classes.json").write_text(json.dumps(table))
    masks = {path: np.searchsorted([0, 10, 200], np.array(Image.open(path))) for path in (images / "masks").glob("*")}

    def save(order):
        for path, mask in masks.items():
            picture = Image.fromarray(np.argsort(order)[mask].astype(np.uint8), "P")
            picture.putpalette(np.uint8(colors)[order].tobytes())
            picture.save(path)

    save([0, 1, 2])
    plain = run("supervised", images, tmp_path / "plain")
    save([2, 0, 1])
    line = said(capsys, SCRIPTS["supervised"].main, words_of(images, tmp_path / "anew"))
    assert "its values and the colours it shows are of different classes; save it as RGB" in line
    for path, mask in masks.items():
        Image.fromarray(np.uint8(colors)[mask]).save(path)
    assert same(weights(run("supervised", images, tmp_path / "rgb")), weights(plain))


def test_the_intensity_is_recorded_and_nothing_goes_on_under_another(images, tmp_path, capsys):
    folder = run("supervised", images, tmp_path / "runs")
    assert "intensity" not in infer(folder, "--continue")["protocol"]  # zscore is what images have
    words = ["--model_path", folder / "iter_4.pth", "--continue", "--intensity", "none"]
    assert "was begun with other settings" in said(capsys, inference.main, words)
    assert infer(folder, "--intensity", "none")["protocol"]["intensity"] == "none"


def test_colours_of_stacks_are_refused_before_the_first_case(tmp_path, capsys):
    tiff = in_pages(make_stacks(tmp_path / "hdf5"), tmp_path / "tiff")
    folder = run("supervised", tiff, tmp_path / "runs", max_iterations=1)
    line = said(capsys, inference.main, ["--model_path", folder / "iter_1.pth", "--save_colors"])
    assert "--save_colors is for images" in line


def test_a_patch_larger_than_every_image_is_padded_and_said(images, tmp_path):
    folder = run("supervised", images, tmp_path / "runs", patch_size="32 32")
    text = (folder / "log.txt").read_text()
    assert "--patch_size 32 x 32: no image is so large (the largest is 26 x 23)" in text
    assert "--foreground_patches" not in text


def test_a_patch_that_is_all_of_every_image_is_drawn_around_nothing(images, tmp_path):
    for side, said in (32, True), (16, False):
        flags = {"patch_size": f"{side} {side}", "foreground_patches": 0.5}
        text = (run("supervised", images, tmp_path / f"{side}", **flags) / "log.txt").read_text()
        assert ("--foreground_patches: a patch of 32 x 32 is all of every image, so that it " in text) == said


def test_data_of_other_classes_is_not_measured(images, tmp_path, capsys):
    """Rows would stand under other names; a set of an index, that has a value to be ignored, decides for all."""
    folder = run("supervised", images, tmp_path / "runs")
    other = copy.deepcopy(PHASES)
    other["classes"][1]["name"], other["classes"][2]["name"] = "grain", "pore"
    other = make_images(tmp_path / "other", classes=other)
    line = said(capsys, inference.main, ["--model_path", folder / "iter_4.pth", "--root_path", other])
    assert "matrix, pore, grain" in line and "matrix, grain, pore" in line
    make_images(tmp_path / "a")
    make_images(tmp_path / "b", classes={**PHASES, "ignore": 77})
    index_images.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "index.json")])
    joint = run("supervised", tmp_path / "index.json", tmp_path / "joint")
    assert config(joint)["ignore_index"] == 255


def test_the_uncertainty_of_images_is_written(images, tmp_path):
    folder = run("supervised", images, tmp_path / "runs", "--has_dropout")
    out = tmp_path / "out"
    infer(folder, "--input", images / "images", "--uncertainty", "mc_dropout", "--mc_samples", 2, "--output_dir", out)
    with h5py.File(out / "uncertainty/image_6.h5") as file:
        assert file["uncertainty"].shape == (26, 23)


def test_stacks_of_input_are_cut_as_those_of_a_list(tmp_path):
    data = make_stacks(tmp_path / "a")
    folder = run("supervised", data, tmp_path / "runs")
    infer(folder, "--save_result", tmp_path / "saved")
    infer(folder, "--input", data / "data", "--output_dir", tmp_path / "out")
    with h5py.File(tmp_path / "saved/patient006_frame01.h5") as a:
        with h5py.File(tmp_path / "out/predictions/patient006_frame01.h5") as b:
            np.testing.assert_array_equal(a["prediction"][:], b["prediction"][:])


def test_cleaning_up_needs_a_background(tmp_path, capsys):
    folder = run("supervised", make_images(tmp_path / "images", classes=NO_BACKGROUND), tmp_path / "runs")
    line = said(capsys, inference.main, ["--model_path", folder / "iter_4.pth", "--fill_holes"])
    assert "--fill_holes" in line and "background" in line


def test_distances_are_in_the_unit_of_the_pixel_size(tmp_path, capsys):
    data = make_images(tmp_path / "images", classes={**PHASES, "pixel_size": [0.5, 0.25, "um"]})
    folder = run("supervised", data, tmp_path / "runs")
    result = infer(folder, "--unit", "um", "--save_result", tmp_path / "saved")
    assert result["unit"] == "um"
    row = result["cases"][0]
    with h5py.File(tmp_path / f"saved/{row['case']}.h5") as file:
        pair = file["prediction"][:] == 1, file["label"][:] == 1
    if pair[0].any():
        assert row["hd95"] == pytest.approx(binary.hd95(*pair, voxelspacing=(0.5, 0.25)))
    line = said(capsys, inference.main, ["--model_path", folder / "iter_4.pth", "--unit", "mm"])
    assert "--unit mm" in line and "um" in line


def test_a_network_of_volumes_is_not_given_images(images, tmp_path, capsys):
    folder = run("supervised", images, tmp_path / "runs")
    volumes = make_data(tmp_path / "volumes")
    words = ["--model_path", folder / "iter_4.pth", "--dims", 3, "--patch_size", 16, 16, 16, "--root_path", volumes]
    assert "--dims 2" in said(capsys, inference.main, words)
