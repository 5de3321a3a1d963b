import os

# One thread here and in every process started from here: results are compared bit for bit.
os.environ["OMP_NUM_THREADS"] = "1"

import dataclasses
import shlex
import shutil
import signal
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


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path / "tiny")


@pytest.fixture(scope="session")
def la_root():
    root = os.environ.get("MTSEG_LA_ROOT")
    if not root:
        pytest.skip("MTSEG_LA_ROOT names no LA data")
    return Path(root)


@pytest.fixture(scope="session")
def images_root():
    root = os.environ.get("MTSEG_IMAGES_ROOT")
    if not root:
        pytest.skip("MTSEG_IMAGES_ROOT names no folder of image sets")
    return Path(root)
