"""The built-in data: synthetic volumes and images to try everything on, without downloading anything.

Phantom, in three dimensions: each volume of 48 x 48 x 32 voxels holds a chamber with three to five veins, which is
the label (like a left atrium), other chambers and vessels of nearly the same brightness that touch it, a thin wall
between them that fades in places, textured tissue, a bias field and noise. Shape, position, brightness and contrast
differ from case to case, so that a few labelled cases do not show everything that occurs.

Electrode, in two dimensions: each image of 128 x 128 pixels shows a section of a battery electrode as an electron
microscope sees it, with three phases and no background: bright grains of active material, carbon between them, and
the electrolyte in the pores. Sizes and shares of the phases, contrast, blur, noise, stripes and shadows differ from
image to image, and the grey values of carbon and electrolyte overlap.

The layout is that of LA (datasets.py); 'image' has zero mean and unit variance. The same seed gives the same data.
"""

import json
import os
import tempfile
from pathlib import Path

import h5py
import numpy as np
from scipy import ndimage

SHAPE, IMAGE_SHAPE = (48, 48, 32), (128, 128)
TRAIN, TEST = {3: 123, 2: 60}, {3: 31, 2: 20}  # cases, by the number of dimensions
# Electrode's classes.json
PHASES = {
    "classes": [
        {"name": "carbon", "value": 0, "color": [0, 0, 255]},
        {"name": "electrolyte", "value": 1, "color": [0, 255, 255]},
        {"name": "active material", "value": 2, "color": [255, 126, 126]},
    ],
    "background": None,
}
GRID = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in SHAPE), indexing="ij"), axis=-1)


class PhantomError(OSError):
    """The data set cannot be written; the message is one sentence with the folder and the remedy."""


def smooth_field(rng, sigma, shape=SHAPE):
    """A random field of this shape, smooth on the scale of `sigma` voxels, zero mean and unit variance."""
    # Drawn on a coarse grid and interpolated: after such a blur nobody sees the difference, and it is much faster.
    step = max(int(sigma // 2), 1)
    field = rng.standard_normal([n // step + 3 for n in shape]).astype(np.float32)
    field = ndimage.gaussian_filter(field, sigma / step, mode="wrap")
    for axis, n in enumerate(shape):
        whole, part = np.divmod(np.arange(n), step)
        part = np.float32(part / step).reshape([-1 if a == axis else 1 for a in range(len(shape))])
        field = field.take(whole, axis) * (1 - part) + field.take(whole + 1, axis) * part
    return (field - field.mean()) / field.std()


def ellipsoid(rng, centre, radii, roughness):
    """About 1 on the surface of a rotated and dented ellipsoid, less inside, more outside."""
    turn, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    x, y, z = ((GRID - np.float32(centre)) @ axis for axis in (turn / radii).T.astype(np.float32))
    return np.sqrt(x**2 + y**2 + z**2) + np.float32(roughness) * smooth_field(rng, 7)


def tube(start, middle, end, radius_start, radius_end):
    """The voxels within a bent tube (a quadratic Bezier curve whose radius changes evenly)."""
    inside = np.zeros(SHAPE, dtype=bool)
    for t in np.linspace(0, 1, 24):
        point = (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end
        radius = (1 - t) * radius_start + t * radius_end
        low = np.maximum(np.floor(point - radius).astype(int), 0)
        high = np.minimum(np.ceil(point + radius).astype(int) + 1, SHAPE)
        if (low >= high).any():
            continue
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        inside[box] |= ((GRID[box] - point.astype(np.float32)) ** 2).sum(axis=-1) <= radius**2
    return inside


def direction(rng):
    vector = rng.standard_normal(3) * (1, 1, 0.6)
    return vector / np.linalg.norm(vector)


def make_case(rng):
    """One volume: {'image': float32, 'label': uint8}, both of SHAPE."""
    centre = np.array(SHAPE) / 2 + rng.uniform(-6, 6, 3) * (1, 1, 0.6)
    radii = rng.uniform((7, 7, 5), (11, 11, 8))
    chamber = ellipsoid(rng, centre, radii, 0.12) < 1
    label = chamber.copy()
    for _ in range(rng.integers(3, 6)):
        way = direction(rng)
        start = centre + way * radii.mean() * 0.7
        end = centre + way * radii.mean() * rng.uniform(1.6, 2.1)
        label |= tube(
            start, (start + end) / 2 + rng.uniform(-3, 3, 3), end, rng.uniform(2.2, 3.2), rng.uniform(1.6, 2.2)
        )
    pieces, count = ndimage.label(label)
    if count > 1:
        label = pieces == 1 + np.argmax(ndimage.sum_labels(label, pieces, range(1, count + 1)))

    neighbours = np.zeros(SHAPE, dtype=bool)
    for _ in range(rng.integers(2, 5)):
        size = rng.uniform(4, 8, 3)
        place = centre + direction(rng) * (radii.mean() + size.mean() * rng.uniform(0.9, 1.3))
        neighbours |= ellipsoid(rng, place, size, 0.12) < 1
    for _ in range(rng.integers(1, 4)):
        place = centre + direction(rng) * radii.mean() * rng.uniform(1.3, 2.2)
        along = direction(rng) * rng.uniform(12, 28)
        neighbours |= tube(place - along, place + rng.uniform(-4, 4, 3), place + along, *rng.uniform(1.6, 3, 2))
    neighbours &= ~label
    wall = ndimage.binary_dilation(label) & ~label

    # All blood is nearly equally bright, the tissue darker and textured.
    contrast = rng.uniform(1.0, 1.8)
    image = 0.3 * smooth_field(rng, 2.5) + 0.3 * smooth_field(rng, 8)
    blood = contrast * (1 + 0.12 * smooth_field(rng, 4))
    image[label] = blood[label]
    image[neighbours] = (blood - rng.uniform(0.25, 0.8))[neighbours]
    faded = smooth_field(rng, 5) > 0.8
    image[wall & ~faded] -= rng.uniform(0.3, 0.7)
    image = ndimage.gaussian_filter(image, rng.uniform(0.5, 0.9))
    image *= 1 + rng.uniform(0.1, 0.3) * smooth_field(rng, 24)
    image = image + rng.uniform(0.15, 0.4) * rng.standard_normal(SHAPE)
    image = (image - image.mean()) / image.std()
    return {"image": image.astype(np.float32), "label": label.astype(np.uint8)}


def make_image(rng):
    """One section of an electrode: {'image': float32, 'label': uint8}, both of IMAGE_SHAPE; classes as in PHASES."""
    label = np.where(smooth_field(rng, rng.uniform(2.5, 4), IMAGE_SHAPE) > rng.uniform(-0.3, 0.4), 0, 1)
    y, x = np.indices(IMAGE_SHAPE, dtype=np.float32)
    dents, share, grains = smooth_field(rng, 4, IMAGE_SHAPE), rng.uniform(0.35, 0.55), np.zeros(IMAGE_SHAPE, bool)
    for _ in range(60):
        if grains.mean() >= share:
            break
        (cy, cx), turn = rng.uniform(0, IMAGE_SHAPE), rng.uniform(0, np.pi)
        long, short = np.array((1, rng.uniform(0.6, 1))) * rng.uniform(5, 18)
        u, v = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn), (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)
        grain = np.hypot(u / long, v / short) + np.float32(0.12) * dents < 1
        # Most grains do not touch: a thin seam of what lies between them stays.
        if rng.random() < 0.3 or not (ndimage.binary_dilation(grain, iterations=2) & grains).any():
            grains |= grain
    label[grains] = 2

    grey = np.array([rng.uniform(0.25, 0.4), rng.uniform(0.05, 0.2), rng.uniform(0.7, 1.0)])
    image = grey[label] + 0.06 * smooth_field(rng, 1.2, IMAGE_SHAPE) * (label == 0)
    image = ndimage.gaussian_filter(image, rng.uniform(0.6, 1.1))
    image *= 1 + rng.uniform(0.05, 0.25) * smooth_field(rng, 40, IMAGE_SHAPE)
    image += rng.uniform(0.0, 0.06) * ndimage.gaussian_filter1d(rng.standard_normal(IMAGE_SHAPE[1]), 1)  # stripes
    image += rng.uniform(0.05, 0.12) * rng.standard_normal(IMAGE_SHAPE)
    image = (image - image.mean()) / image.std()
    return {"image": image.astype(np.float32), "label": label.astype(np.uint8)}


def make_phantom(root, train=None, test=None, seed=2018, dims=3):
    """Write the data set to the folder `root` unless it is there already; returns `root`.

    `train`, `test`: cases (default: TRAIN, TEST). `dims`: 3 for Phantom, 2 for Electrode. It is built beside `root` and
    renamed, so that nothing half-made looks complete. Raises PhantomError where the folder cannot be made.
    """
    root, make, word = Path(root), *{3: (make_case, "phantom"), 2: (make_image, "electrode")}[dims]
    if (root / "train.list").is_file():
        return root
    train, test = train or TRAIN[dims], test or TEST[dims]
    cases = [f"{word}_{number:03d}" for number in range(train + test)]
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".phantom.", dir=root.parent, ignore_cleanup_errors=True) as temporary:
            folder = Path(temporary) / root.name
            for number, case in enumerate(cases):
                sample = make(np.random.default_rng([seed, number]))
                (folder / "data" / case).mkdir(parents=True)
                with h5py.File(folder / "data" / case / "mri_norm2.h5", "w") as file:
                    for key, value in sample.items():
                        file.create_dataset(key, data=value, compression="gzip", compression_opts=1)
            if dims == 2:
                (folder / "classes.json").write_text(json.dumps(PHASES, indent=1))
            (folder / "train.list").write_text("\n".join(cases[:train]) + "\n")
            (folder / "test.list").write_text("\n".join(cases[train:]) + "\n")
            os.replace(folder, root)
    except OSError as error:
        if not (root / "train.list").is_file():
            raise PhantomError(
                f"{root}: the built-in data cannot be made there ({error.strerror or error}); free space, remove the "
                f"folder if it is incomplete, or make the data elsewhere by data/make_phantom.py and give --root_path"
            ) from error
    return root
