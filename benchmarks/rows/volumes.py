"""The volumes and images that rows are measured on: real ones, or made up in their size and grey levels."""

import json
import os
from pathlib import Path

import h5py
import numpy as np
from scipy import ndimage

from mtseg.datasets import LAHeart
from mtseg.images import png_bytes
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


def image_folder(quick, scratch):
    """(root, words) of a folder of 8-bit images of 1024 x 1024 pixels with masks: the set ebc of MTSEG_IMAGES_ROOT, or
    such as are made up."""
    real = os.environ.get("MTSEG_IMAGES_ROOT")
    if real and not quick:
        return Path(real) / "ebc", "ebc, 1024x1024"
    root, side = scratch / "grains", 128 if quick else 1024
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number in range(3 if quick else 8):
        coarse = np.random.default_rng(number).standard_normal((side // 32 + 2,) * 2).astype(np.float32)
        smooth = ndimage.zoom(coarse, 32, order=1)[:side, :side]
        for folder, pixels in (("images", np.clip(128 + 60 * smooth, 0, 255)), ("masks", smooth > 1)):
            (root / folder / f"case_{number}.png").write_bytes(png_bytes(pixels.astype(np.uint8)))
    table = {"classes": [{"name": "matrix", "value": 0}, {"name": "grain", "value": 1}], "background": 0}
    (root / "classes.json").write_text(json.dumps(table))
    (root / "train.list").write_text("".join(f"case_{number}\n" for number in range(3 if quick else 8)))
    return root, f"made up, {side}x{side}"


def training_set(root, patch_size, num=None):
    return LAHeart(root, transform=chain(patch_size), num=num, num_classes=2)


def chain(patch_size, label_dtype=np.uint8):
    return Compose([RandomRotFlip(), RandomCrop(patch_size), ToTensor(label_dtype)])
