"""Stacks of few slices: networks with strides and kernels of their own along each axis, padding that no loss counts,
files with the slices first, from the flags to the scores."""

import copy
import json
import math
import shutil

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, TINY_OF, ball, make_data, make_stacks, only_on_the_cpu, write_case
from test_recipe import batches

import inference
import train_mean_teacher
from mtseg.losses import SupervisedLoss
from mtseg.networks import UNet, VNet
from mtseg.samplers import ShuffledBatchSampler, TwoStreamBatchSampler
from mtseg.script import methods
from mtseg.seeding import seed_iteration

SCRIPTS = {methods.method_of(path): methods.load_script(path) for path in methods.training_scripts()}
SIZES = {"patch_size": "16 16 4", "strides": "2,2,1 2,2,2 2,1,1 1,1,1", "kernel_sizes": "3,3,1 3,3,1 3 3 1,1,3"}
SIZES |= {"stride_z": 4}


def flags(data, out, **changes):
    given = {**TINY, "root_path": data, "output_dir": out, "labelnum": 3, "max_iterations": 2, **SIZES, **changes}
    return [word for name, value in given.items() if value is not None for word in (f"--{name}", *str(value).split())]


@pytest.fixture
def stacks(tmp_path):
    """Stacks of five slices."""
    root = make_data(tmp_path / "stacks")
    for number in range(8):
        rng = np.random.default_rng(number)
        label = ball((24, 20, 5), rng.uniform(7, 13, 3) * (1, 1, 0.2), 4).astype(np.uint8)
        write_case(root, f"case_{number}", label + 0.3 * rng.standard_normal(label.shape, np.float32), label)
    return root


@pytest.mark.parametrize("model", SCRIPTS)
def test_every_method_trains_a_thin_network(model, stacks, tmp_path, capsys):
    changes = {"max_filters": 6} | TINY_OF.get(model, {})
    if SCRIPTS[model].PARSER.get_default("batch_size") > 4:
        changes |= {"batch_size": 4}
    words = flags(stacks, tmp_path / "out", **changes)
    if model == "SASSNet":  # whose discriminator halves a patch four times
        with pytest.raises(SystemExit) as stopped:
            SCRIPTS[model].main(words)
        assert stopped.value.code == 2
        assert "discriminator" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        return
    folder = SCRIPTS[model].main(words)
    config = json.loads((folder / "config.json").read_text())
    assert config["strides"] == [[2, 2, 1], [2, 2, 2], [2, 1, 1], [1, 1, 1]]
    assert config["kernel_sizes"] == [[3, 3, 1], [3, 3, 1], 3, 3, [1, 1, 3]]
    told = VNet.settings_of(torch.load(folder / "iter_2.pth", weights_only=True))
    assert told["strides"] == [(2, 2, 1), (2, 2, 2), (2, 1, 1), (1, 1, 1)]
    assert told["kernel_sizes"] == [(3, 3, 1), (3, 3, 1), (3, 3, 3), (3, 3, 3), (1, 1, 3)]
    assert told["max_filters"] == 6


def test_a_checkpoint_alone_tells_its_network(stacks, tmp_path):
    """Of a U-Net with three levels; a settings file holds the sizes as lists."""
    settings = {"strides": [[2, 2, 1], [2, 2, 2]], "kernel_sizes": [[3, 3, 1], 3, 3], "deep_supervision": True}
    (tmp_path / "settings.json").write_text(json.dumps(settings | {"network": "unet", "patch_size": [16, 12, 4]}))
    words = flags(stacks, tmp_path, exp="unet", strides=None, kernel_sizes=None, patch_size=None)
    folder = train_mean_teacher.main([*words, "--config", str(tmp_path / "settings.json")])
    weights = torch.load(folder / "iter_2.pth", weights_only=True)
    assert UNet.settings_of(weights)["strides"] == [(2, 2, 1), (2, 2, 2)]
    words = ["--stride_xy", "8", "--stride_z", "4", "--save_probabilities"]
    inference.main(["--model_path", str(folder / "iter_2.pth"), *words, "--output_dir", str(tmp_path / "a")])
    (tmp_path / "alone").mkdir()
    shutil.copy(folder / "iter_2.pth", tmp_path / "alone")
    words += ["--network", "unet", "--n_filters", "2", "--root_path", str(stacks), "--patch_size", "16", "12", "4"]
    inference.main(["--model_path", str(tmp_path / "alone/iter_2.pth"), *words, "--output_dir", str(tmp_path / "b")])
    for case in ("case_6", "case_7"):
        a, b = (tmp_path / name / f"probabilities/{case}.h5" for name in "ab")
        assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patch_size": "16 16 5"}, ["--patch_size 16 16 5", "5 is no", "multiple of 2", "--strides"]),
        ({"patch_size": "16 18 4"}, ["18 is no", "multiple of 4"]),
        ({"strides": "2 2 2"}, ["--strides gives 3", "four"]),
        ({"strides": "2,2 2 2 2"}, ["--strides 2,2 with --dims 3", "3 numbers"]),
        ({"strides": "2,2,0 2 2 2"}, ["--strides", "0 is below 1"]),
        ({"strides": "2,x,2 2 2 2"}, ["--strides", "'x' is no whole number"]),
        ({"kernel_sizes": "3 3 3 3"}, ["--kernel_sizes gives 4", "5 levels"]),
        ({"kernel_sizes": "3 3 3 3 3,3,2"}, ["--kernel_sizes", "2 is not odd"]),
        ({"network": "unet", "strides": "2 2"}, ["--kernel_sizes gives 5", "3 levels", "give 3"]),
        ({"network": "unet_ssl4mis"}, ["--strides", "unet_ssl4mis"]),
        ({"max_filters": 1}, ["--max_filters 1", "--n_filters 2"]),
    ],
)
def test_sizes_that_do_not_fit_end_in_a_sentence(capsys, stacks, tmp_path, changes, words):
    with pytest.raises(SystemExit) as stopped:
        train_mean_teacher.main(flags(stacks, tmp_path / "out", **changes))
    assert stopped.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert all(word in said[0] for word in words), said
    assert not (tmp_path / "out").exists()


def test_windows_that_the_strides_of_the_weights_do_not_divide_end_in_a_sentence(capsys, stacks, tmp_path):
    torch.save(VNet(1, 2, 2, "batchnorm", strides=[2, 2, 2, (2, 2, 1)]).state_dict(), tmp_path / "net.pth")
    words = ["--model_path", str(tmp_path / "net.pth"), "--n_filters", "2", "--root_path", str(stacks)]
    words += ["--output_dir", str(tmp_path / "out"), "--patch_size", "16", "16", "12"]
    with pytest.raises(SystemExit) as stopped:
        inference.main(words)
    assert stopped.value.code == 2
    assert "12 is no positive multiple of 8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------- padding


# Over the two values at the bottom batch norm amplifies, step by step, what is rounded otherwise; but without it no
# untrained network is certain anywhere.
NORMALIZATION = {"supervised": "none", "MT": "none", "UAMT": "batchnorm", "CPS": "none", "PL": "none"}


def padded_weights(model, root, consistency, iterations):
    """The weights after iterations whose losses see the ten slices of the outputs that are no padding: all that
    is computed of outputs is computed of outputs[..., 3:13]. The network itself sees the padded patch."""
    seed_iteration(1337, -1)
    nets = [VNet(1, 2, 2, NORMALIZATION[model], has_dropout=True)]
    nets += [VNet(1, 2, 2, NORMALIZATION[model], has_dropout=True)] if model == "CPS" else []
    if model == "UAMT":
        with torch.no_grad():
            nets[0].out_conv.weight.mul_(20)
            nets[0].out_conv.bias.copy_(torch.tensor([2.0, 0.0]))
    torch.save(nets[0].state_dict(), root / "start.pth")
    teacher = copy.deepcopy(nets[0]).requires_grad_(False)
    optimizer = torch.optim.SGD([p for net in nets for p in net.parameters()], lr=0.01, momentum=0.9, weight_decay=1e-4)
    sampler = TwoStreamBatchSampler(range(3), range(3, 6), 4, 2, seed=1337)
    sampler = ShuffledBatchSampler(range(3), 2, seed=1337) if model == "supervised" else sampler

    def inner(tensor):
        assert tensor.shape[-1] == 16
        return tensor[..., 3:13]

    for t, (volumes, labels) in enumerate(batches(root, sampler, iterations)):
        assert not volumes[..., :3].any() and not volumes[..., 13:].any() and volumes[..., 3:13].any()
        seed_iteration(1337, t + 1)

        def perturbed(x):
            return x + (torch.randn_like(x) * 0.1).clamp(-0.2, 0.2)

        x, rise = volumes[2:], math.exp(-5 * (1 - t / iterations) ** 2)
        noisy = perturbed(x) if model in ("MT", "PL") else None  # drawn before the student's dropout, or after it
        outputs = [inner(net(volumes)) for net in nets]
        supervised = SupervisedLoss()  # which test_losses.py compares with its formula
        loss = sum(supervised(output[:2], inner(labels[:2]))[0] for output in outputs)
        student, other = outputs[0][2:], outputs[-1][2:]
        if model == "CPS":
            unlabelled = F.cross_entropy(student, other.argmax(1)) + F.cross_entropy(other, student.argmax(1))
        elif model in ("MT", "PL"):
            target = inner(teacher(noisy))
            unlabelled = (student.softmax(1) - target.softmax(1)).square().mean()
            if model == "PL":
                unlabelled = supervised(student, target.argmax(1))[0]
        elif model == "UAMT":
            target = inner(teacher(perturbed(x)))
            mean = sum(inner(teacher(perturbed(torch.cat([x, x])))).softmax(1).view(2, 2, 2, 16, 16, 10) for _ in "ab")
            mean = mean.mean(0) / 2
            certain = -(mean * torch.log(mean + 1e-6)).sum(1) < (3 / 4 + rise / 4) * math.log(2)
            assert 0.1 < certain.float().mean() < 0.9
            squares = (student.softmax(1) - target.softmax(1)).square().sum(1)
            unlabelled = (certain * squares).sum() / (2 * certain.sum()).clamp_min(1)
        if model != "supervised":
            loss = loss + consistency * math.exp(-5) * unlabelled
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        alpha = min(1 - 1 / (t + 1), 0.99)
        for average, parameter in zip(teacher.parameters(), nets[0].parameters(), strict=True):
            average.copy_(alpha * average + (1 - alpha) * parameter.detach())
    return nets[0].state_dict()


@only_on_the_cpu  # where dropout is drawn as by hand
@pytest.mark.parametrize("model", NORMALIZATION)
def test_padding_counts_in_no_loss(model, tmp_path, device):
    root = make_data(tmp_path / "data")
    for number in range(8):
        rng = np.random.default_rng(number)
        label = ball((24, 20, 10), rng.uniform(7, 13, 3) * (1, 1, 0.5), 4).astype(np.uint8)
        write_case(root, f"case_{number}", label + 0.3 * rng.standard_normal(label.shape, np.float32), label)
    iterations = 1 if NORMALIZATION[model] == "batchnorm" else 3
    more = {"patch_size": "16 16 16", "strides": None, "kernel_sizes": None, "normalization": NORMALIZATION[model]}
    more |= {"max_iterations": iterations}
    if model != "supervised":
        more |= {"consistency": 20.0}
    more |= {"UAMT": {"uncertainty_passes": 4}, "PL": {"pseudo_threshold": 0}}.get(model, {})
    expected = padded_weights(model, root, 20.0, iterations)
    more |= {} if model == "CPS" else {"pretrained": root / "start.pth", "pretrained_parts": "network"}
    folder = SCRIPTS[model].main([*flags(root, tmp_path, **more), "--ignore_padding"])
    for name, value in torch.load(folder / f"iter_{iterations}.pth", weights_only=True).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--in_plane"], "--in_plane without --strong_rotation"),
        (
            ["--dims", "2", "--patch_size", "16", "16", "--strides", "2", "2", "2", "2", "--slices_first"],
            "--slices_first",
        ),
    ],
)
def test_flags_that_would_change_nothing(capsys, stacks, tmp_path, words, said):
    with pytest.raises(SystemExit) as stopped:
        train_mean_teacher.main(
            [*flags(stacks, tmp_path / "out", strides=None, patch_size=None, kernel_sizes=None), *words]
        )
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_padding_without_a_label_of_its_own_ends_in_a_sentence(capsys, stacks, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        train_mean_teacher.main([*flags(stacks, tmp_path / "out", ignore_index=254), "--ignore_padding"])
    assert stopped.value.code == 2
    assert "--ignore_padding" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------- slices first


def test_files_with_the_slices_first_give_what_volumes_with_the_slices_last_give(tmp_path):
    """The same stacks as (S, H, W) and as (H, W, S): the same weights, and the same scores, also in millimetres."""
    first = make_stacks(tmp_path / "first", slices=4)
    last = tmp_path / "last"
    shutil.copytree(first, last)
    for path in (last / "data").glob("*.h5"):
        with h5py.File(first / "data" / path.name, "a") as file:
            image, label = (np.moveaxis(file[name][:], 0, -1) for name in ("image", "label"))
            file.attrs["spacing"] = [8.0, 1.0, 1.5]
        path.unlink()
        write_case(last, path.stem, image, label)
        with h5py.File(last / "data" / path.stem / "mri_norm2.h5", "a") as file:
            file.attrs["spacing"] = [1.0, 1.5, 8.0]
    found = []
    for root, more in ((first, ["--slices_first"]), (last, [])):
        words = flags(root, tmp_path / f"out_{root.name}", dims=3, dataset_name="stacks", val_list=root / "test.list")
        folder = train_mean_teacher.main([*words, *more])
        scores = tmp_path / f"scores_{root.name}"
        inference.main(["--model_path", str(folder / "iter_2.pth"), "--output_dir", str(scores), "--unit", "mm"])
        found.append((torch.load(folder / "iter_2.pth", weights_only=True), (scores / "metrics.csv").read_text()))
        protocol = json.loads((scores / "metrics.json").read_text())["protocol"]  # other windows, in a table and anew
        assert protocol.get("slices_first") == (True if more else None)
        assert "need --slices_first" not in (folder / "log.txt").read_text()
    folder = train_mean_teacher.main(flags(first, tmp_path / "wrong", dims=3))
    assert (
        "the first side of every case is its shortest ((4, 22, 25)): files (S, H, W) need --slices_first"
        in (folder / "log.txt").read_text()
    )
    (weights, scores), (other_weights, other_scores) = found
    assert all(torch.equal(value, other_weights[name]) for name, value in weights.items())
    assert scores == other_scores
