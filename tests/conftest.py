import os

# One thread here and in every process started from here: results are compared bit for bit.
os.environ["OMP_NUM_THREADS"] = "1"

import shlex
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

torch.set_num_threads(1)

COMPILER = shlex.split(os.environ.get("CC") or "cc")[0]
needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs a C compiler: {COMPILER}")


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
