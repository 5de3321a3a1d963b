import os

# One thread here and in every process started from here: results are compared bit for bit.
os.environ["OMP_NUM_THREADS"] = "1"

import contextlib
import dataclasses
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

torch.set_num_threads(1)

# Under nohup, or behind &, a process inherits that these signals are ignored; those that are sent them here do not.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

COMPILER = shlex.split(os.environ.get("CC") or "cc")[0]
needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs a C compiler: {COMPILER}")

# Flags of a training on make_data's volumes, whose folder is called as LA's is.
TINY = {"n_filters": 2, "num_workers": 0, "patch_size": "16 16 16", "stride_xy": 8, "stride_z": 8, "progress": 0}
TINY |= {"dataset_name": "LA"}
# BCP mixes halves of the labelled patches: here one, of which batch norm could not normalise the single voxel at the
# bottom.
TINY_OF = {"BCP": {"batch_size": 4, "labeled_bs": 2, "consistency_warmup": 1, "normalization": "groupnorm"}}

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
only_on_the_cpu = pytest.mark.parametrize("device", ["cpu"], indirect=True)


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """Each device of this machine in turn. In the CPU's turn no script finds the GPU."""
    if request.param == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for the processes that a test starts
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    return torch.device(request.param)


def on(device, function):
    """`function` computed on `device`: tensors and networks go there before a call, and come back after it."""

    def moved(value, to):
        if isinstance(value, (torch.Tensor, torch.nn.Module)):
            return value.to(to)
        if isinstance(value, (list, tuple)):
            return type(value)(moved(entry, to) for entry in value)
        if isinstance(value, dict):
            return {key: moved(entry, to) for key, entry in value.items()}
        if dataclasses.is_dataclass(value):
            return type(value)(
                **{field.name: moved(getattr(value, field.name), to) for field in dataclasses.fields(value)}
            )
        return value

    def called(*arguments, **keywords):
        try:
            return moved(function(*moved(arguments, device), **moved(keywords, device)), "cpu")
        finally:
            moved((arguments, keywords), "cpu")  # networks are moved where they are

    return function if device.type == "cpu" else called


def write_case(root, case, image, label):
    folder = Path(root) / "data" / case
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / "mri_norm2.h5", "w") as file:
        file.create_dataset("image", data=image)
        if label is not None:
            file.create_dataset("label", data=label)


def ball(shape, centre, radius):
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    return ((grid - np.asarray(centre)) ** 2).sum(axis=-1) <= radius**2


def make_data(root, train=6, test=2, channels=None):
    """A tiny data set in the LA layout: a bright ball in noise, one side of each volume smaller than the patch."""
    names = [f"case_{number}" for number in range(train + test)]
    for number, case in enumerate(names):
        rng = np.random.default_rng(number)
        label = ball((24, 20, 14), rng.uniform(7, 13, 3), 4).astype(np.uint8)
        image = (label + 0.3 * rng.standard_normal(label.shape)).astype(np.float32)
        write_case(root, case, image if channels is None else np.stack([image] * channels), label)
    (root / "train.list").write_text("\n".join(names[:train]) + "\n")
    (root / "test.list").write_text("\n".join(names[train:]) + "\n")
    return root


# Flags of a training on make_images's images and make_stacks's slices.
TINY_2D = {"n_filters": 2, "num_workers": 0, "patch_size": "16 16", "stride_xy": 8, "progress": 0, "dims": 2}
PHASES = {
    "classes": [
        {"name": "matrix", "value": 0, "color": [0, 0, 0]},
        {"name": "pore", "value": 10, "color": [255, 0, 0]},
        {"name": "grain", "value": 200, "color": [0, 0, 255]},
    ],
    "background": 0,
}


def two_discs(shape, number):
    """(image with values around 0, 1 and 2, class numbers) with a disc of class 1 and one of class 2 in it."""
    rng = np.random.default_rng(number)
    label = ball(shape, rng.uniform(6, 10, 2), 4).astype(np.uint8)
    label[ball(shape, rng.uniform(14, 18, 2), 4)] = 2
    return label + 0.3 * rng.standard_normal(shape), label


def make_images(root, train=6, test=2, classes=PHASES, shape=(26, 23)):
    """A tiny folder of 8-bit images with masks of values, as classes.json names them."""
    from PIL import Image

    values = np.array([entry["value"] for entry in classes["classes"]], np.uint8)
    names = [f"image_{number}" for number in range(train + test)]
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for number, name in enumerate(names):
        image, label = two_discs(shape, number)
        Image.fromarray(np.clip(80 * image + 50, 0, 255).astype(np.uint8)).save(root / f"images/{name}.png")
        Image.fromarray(values[label]).save(root / f"masks/{name}.png")
    (root / "classes.json").write_text(json.dumps(classes))
    (root / "train.list").write_text("\n".join(names[:train]) + "\n")
    (root / "test.list").write_text("\n".join(names[train:]) + "\n")
    return root


def make_stacks(root, train=6, test=2, slices=3):
    """A tiny data set of stacks (S, H, W) in the layout of ACDC."""
    names = [f"patient{number:03d}_frame01" for number in range(train + test)]
    (root / "data").mkdir(parents=True)
    for number, name in enumerate(names):
        pairs = [two_discs((22, 25), 100 * number + k) for k in range(slices + number % 2)]
        with h5py.File(root / f"data/{name}.h5", "w") as file:
            file["image"] = np.float32([image for image, _ in pairs])
            file["label"] = np.stack([label for _, label in pairs])
    (root / "classes.json").write_text(json.dumps(PHASES))
    (root / "train.list").write_text("\n".join(names[:train]) + "\n")
    (root / "test.list").write_text("\n".join(names[train:]) + "\n")
    return root


class KilledError(Exception):
    pass


@contextlib.contextmanager
def killed_after_saving(monkeypatch):
    """A context in which a run of a training script ends abruptly, once it has written its first latest.pth."""
    from mtseg.script.state import RunState

    def save_and_die(keeper, iteration, progress, save=RunState.save):
        save(keeper, iteration, progress)
        raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(RunState, "save", save_and_die)
        yield


def start_python(*words, out, err):
    """A process `python <words>` in a session of its own, which writes to the files `out` and `err`."""
    with open(out, "ab") as to_out, open(err, "ab") as to_err:
        command = [sys.executable, *map(str, words)]
        return subprocess.Popen(command, stdout=to_out, stderr=to_err, start_new_session=True)


def finish_after_kills(words, folder, events):
    """Run `python <words>` in `folder` once for each of `events`, patterns of files there, killed with SIGKILL as soon
    as there is such a file, and then to its end."""
    output = {"out": folder / "said", "err": folder / "bad"}
    for event in events:
        process = start_python(*words, **output)
        while not list(folder.glob(event)):
            assert process.poll() is None, output["err"].read_text()
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert start_python(*words, **output).wait() == 0, output["err"].read_text()


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path / "tiny")


def named_root(variable, what):
    root = os.environ.get(variable)
    if not root:
        pytest.skip(f"{variable} names no {what}")
    return Path(root)


@pytest.fixture(scope="session")
def la_root():
    return named_root("MTSEG_LA_ROOT", "LA data")


@pytest.fixture(scope="session")
def acdc_root():
    return named_root("MTSEG_ACDC_ROOT", "ACDC data")


@pytest.fixture(scope="session")
def images_root():
    return named_root("MTSEG_IMAGES_ROOT", "folder with the image sets uhcs, ebc, superalloy and em")
