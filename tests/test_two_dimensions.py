"""Images and slices of stacks through the scripts: what holds for volumes holds for them."""

import copy
import csv
import json
import math
import shutil

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PHASES, TINY_2D, make_images, make_stacks
from medpy.metric import binary
from PIL import Image

import inference
from mtseg.losses import multiclass_dice_loss
from mtseg.networks.unet import UNet
from mtseg.samplers import IterationSampler, TwoStreamBatchSampler
from mtseg.script import methods
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
    given = {**TINY_2D, "root_path": data, "output_dir": out, "labelnum": 3, "max_iterations": 4, **changes}
    words = [word for name, value in given.items() for word in (f"--{name}", *str(value).split())]
    return SCRIPTS[model].main([*words, *more])


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


def refused(capsys, model, data, out, **changes):
    given = {**TINY_2D, "root_path": data, "output_dir": out, "labelnum": 3, "max_iterations": 4, **changes}
    words = [word for name, value in given.items() for word in (f"--{name}", *str(value).split())]
    line = said(capsys, SCRIPTS[model].main, words)
    assert not (out / "model").exists()
    return line


# ------------------------------------------------------------------------------------------- what every script does


@pytest.mark.parametrize("model", SCRIPTS)
def test_every_script_trains_on_images_and_slices_and_resumes_to_the_bit(data, tmp_path, model):
    (data / "val.list").write_text((data / "test.list").read_text())
    more = {"val_list": data / "val.list", "val_freq": 2, "save_freq": 2, "rotflip": "ssl4mis"}
    strong = {"strong_rotation": 20, "strong_noise": 0.2, "strong_mixin": 0.2, "foreground_patches": 0.33}
    known = {action.dest for action in SCRIPTS[model].PARSER._actions}
    more |= {name: value for name, value in strong.items() if name in known}
    whole = run(model, data, tmp_path / "whole", **more)
    run(model, data, tmp_path / "parts", **{**more, "max_iterations": 2})
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
    folder = run("MT", images, tmp_path / "runs")
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


def test_predictions_are_index_images_with_the_palette_in_them(images, tmp_path):
    folder = run("supervised", images, tmp_path / "runs")
    infer(folder, "--save_result", tmp_path / "saved")
    out = tmp_path / "out"
    result = infer(folder, "--input", images / "images", "--output_dir", out, "--save_colors", "--labels", images / "masks")
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
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "png/image_6_label.png")), np.array(Image.open(images / "masks/image_6.png")))


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


def test_an_ignore_value_counts_nowhere(tmp_path, capsys):
    a = make_images(tmp_path / "a", classes={**PHASES, "ignore": 77})
    b = make_images(tmp_path / "b", classes={**PHASES, "ignore": 77})
    for root in (a, b):
        for path in (root / "masks").glob("*.png"):
            mask = np.array(Image.open(path))
            mask[:5] = 77
            Image.fromarray(mask).save(path)
            if root == a:
                continue
            image = np.array(Image.open(root / "images" / path.name))
            Image.fromarray(image).save(root / "images" / path.name)
    folders = [run("supervised", root, tmp_path / root.name / "runs", dataset_name="A") for root in (a, b)]
    assert same(*(weights(folder) for folder in folders))
    result = infer(folders[0])
    row = result["cases"][0]
    assert row["tp"] + row["fp"] + row["fn"] + row["tn"] == 21 * 23
    assert config(folders[0])["ignore_index"] == 255
