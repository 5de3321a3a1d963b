"""The volumes that rows are measured on: LA's, or made up in its size and grey levels."""

import os
from pathlib import Path

import h5py
import numpy as np
from scipy import ndimage

from mtseg.datasets import LAHeart
from mtseg.transforms import Compose, RandomCrop, RandomRotFlip, ToTensor

LA_PATCH = (112, 112, 80)
SMALL_PATCH = (48, 48, 32)


def make_la(root, cases, side=1.0):
    """Volumes of LA's size (times `side`), of 8 bits normalised to float32, gzipped as UA-MT's files are."""
    for number in range(cases):
        rng = np.random.default_rng(number)
        shape = [int(side * n) for n in (rng.integers(171, 217), rng.integers(132, 149), 88)]
        coarse = rng.standard_normal([n // 8 + 2 for n in shape]).astype(np.float32)
        smooth = ndimage.zoom(coarse, 8, order=1)[tuple(slice(n) for n in shape)]
        raw = np.clip(60 + 30 * smooth + 5 * rng.standard_normal(shape), 0, 255).astype(np.uint8).astype(np.float32)
        folder = root / "data" / f"case_{number}"
        folder.mkdir(parents=True)
        with h5py.File(folder / "mri_norm2.h5", "w") as file:
            file.create_dataset("image", data=(raw - raw.mean()) / raw.std(), compression="gzip")
            file.create_dataset("label", data=(smooth > 1).astype(np.uint8), compression="gzip")
    (root / "train.list").write_text("".join(f"case_{number}\n" for number in range(cases)))
    return root


def la_volumes(quick, scratch):
    """(root, patch_size, words) of volumes of LA's full size: real ones where there are, else such as are made up."""
    real = real_volumes()
    if real and real[1] == LA_PATCH and not quick:
        return real
    root = scratch / "la"
    if not root.exists():
        make_la(root, 3 if quick else 8, 0.3 if quick else 1.0)
    return (root, (32, 32, 16), "made up, a third of LA's size") if quick else (root, LA_PATCH, "made up")


def real_volumes():
    """(root, patch_size, words) of MTSEG_LA_ROOT, None where that is not set."""
    root = os.environ.get("MTSEG_LA_ROOT")
    if not root:
        return None
    dataset = LAHeart(root, num=1)
    with h5py.File(dataset.path(dataset.image_list[0])) as file:
        full = all(side >= wanted for side, wanted in zip(file["label"].shape, LA_PATCH, strict=True))
    return (Path(root), LA_PATCH, "LA") if full else (Path(root), SMALL_PATCH, "LA, halved")


def training_set(root, patch_size, num=None):
    return LAHeart(root, transform=chain(patch_size), num=num, num_classes=2)


def chain(patch_size, label_dtype=np.uint8):
    return Compose([RandomRotFlip(), RandomCrop(patch_size), ToTensor(label_dtype)])
