"""Networks with strides and kernels of their own along each axis, from the flags to the scores."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_OF, ball, make_data, write_case

import inference
import train_mean_teacher
from mtseg.networks import UNet, VNet
from mtseg.script import methods

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
