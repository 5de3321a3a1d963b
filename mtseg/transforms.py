"""Crops and augmentations on samples {'image', 'label'}.

'image' is a float array (W, H, D) or (C, W, H, D), 'label' an integer array (W, H, D). Every transform takes such a
dict and returns a new one; other keys pass through. Random transforms draw from `sample['rng']`, a
numpy.random.Generator, where there is one; otherwise from NumPy's global random state, so that numpy.random.seed
governs them as in the UA-MT family.
"""

import numpy as np
import torch


def _generator(sample):
    rng = sample.get("rng")
    return np.random.default_rng(np.random.randint(2**31)) if rng is None else rng


def pad_to(array, size, value=0):
    """Pad the last three axes with `value`, evenly on both sides, to at least `size`."""
    missing = [max(wanted - side, 0) for side, wanted in zip(array.shape[-3:], size, strict=True)]
    if not any(missing):
        return array
    widths = [(0, 0)] * (array.ndim - 3) + [(m // 2, m - m // 2) for m in missing]
    return np.pad(array, widths, constant_values=value)


def _crop(sample, size, start):
    """Cut `size` out of image and label, both padded with 0 first; `start(room)` gives an axis's first voxel."""
    image, label = pad_to(sample["image"], size), pad_to(sample["label"], size)
    firsts = [start(side - wanted) for side, wanted in zip(label.shape, size, strict=True)]
    window = tuple(slice(first, first + wanted) for first, wanted in zip(firsts, size, strict=True))
    return {**sample, "image": image[(..., *window)], "label": label[window]}


def _turn(sample, turns, axes):
    """Rotate image and label by `turns` quarter turns from W to H, then mirror them along each of `axes`."""

    def turned(array):
        return np.flip(np.rot90(array, turns, axes=(-3, -2)), axis=axes)

    return {**sample, "image": turned(sample["image"]), "label": turned(sample["label"])}


class Compose:
    """Apply transforms one after the other."""

    def __init__(self, transforms):
        self.transforms = transforms

    def __call__(self, sample):
        for transform in self.transforms:
            sample = transform(sample)
        return sample


class RandomCrop:
    """A patch of `output_size` = (w, h, d) voxels at a random position; every position is equally likely.

    Smaller volumes are padded with 0 (the mean of a normalised image; background in the label), evenly on both sides
    and only to `output_size`.

    UA-MT's RandomCrop differs: it never draws the last position of an axis, and where one axis is too small or just
    as large as the patch, it pads by about three voxels more on either side, so that the volume lies at random there.
    """

    def __init__(self, output_size):
        self.output_size = tuple(output_size)

    def __call__(self, sample):
        rng = _generator(sample)
        return _crop(sample, self.output_size, lambda room: int(rng.integers(room + 1)))


class CenterCrop:
    """The patch of `output_size` = (w, h, d) voxels in the middle. Smaller volumes are padded with 0.

    Where the middle lies between two positions, it is the first of them. UA-MT's CenterCrop rounds half to even: it
    takes the second where an axis is 3, 7, 11, ... voxels longer than the patch.
    """

    def __init__(self, output_size):
        self.output_size = tuple(output_size)

    def __call__(self, sample):
        return _crop(sample, self.output_size, lambda room: room // 2)


class RandomRotFlip:
    """Rotate by 0, 90, 180 or 270 degrees in the W-H plane, then always mirror along W or H, as UA-MT does.

    The result is one of the four mirror images of the plane (along W, along H, along either diagonal), each equally
    often. It is never the volume as it was: `RandomRot90Flip` and `RandomFlip` give that as well. The mirror images
    along a diagonal swap W and H of volumes that are not square.
    """

    def __call__(self, sample):
        rng = _generator(sample)
        turns, axis = int(rng.integers(4)), int(rng.integers(2)) - 3
        return _turn(sample, turns, axis)


class RandomRot90Flip:
    """Rotate by 0, 90, 180 or 270 degrees in the W-H plane, then mirror along W with probability one half.

    The result is one of the eight symmetries of the plane, each equally often, the volume as it was among them. With
    `flip_d` it is also mirrored along D with probability one half. A quarter turn swaps W and H of volumes that are
    not square.
    """

    def __init__(self, flip_d=False):
        self.flip_axes = (-3, -1) if flip_d else (-3,)

    def __call__(self, sample):
        rng = _generator(sample)
        return _turn(sample, int(rng.integers(4)), [axis for axis in self.flip_axes if rng.integers(2) == 0])


class RandomFlip:
    """Mirror along each of `axes` with probability one half, without rotation; by default along W and along H.

    The volume stays as it was with probability 1/4, or 1/8 with three axes. W, H and D are the axes -3, -2 and -1.
    """

    def __init__(self, axes=(-3, -2)):
        self.axes = tuple(axes)

    def __call__(self, sample):
        rng = _generator(sample)
        return _turn(sample, 0, [axis for axis in self.axes if rng.integers(2) == 0])


class RandomNoise:
    """Add mu + clamp(sigma N(0, 1), -2 sigma, 2 sigma) to every voxel of the image."""

    def __init__(self, mu=0, sigma=0.1):
        self.mu = mu
        self.sigma = sigma

    def __call__(self, sample):
        image = sample["image"]
        noise = np.clip(self.sigma * _generator(sample).standard_normal(image.shape), -2 * self.sigma, 2 * self.sigma)
        return {**sample, "image": (image + noise + self.mu).astype(image.dtype)}


class ToTensor:
    """'image' as a float32 tensor (C, W, H, D), one channel added where there is none; 'label' as int64 (W, H, D).

    `label_dtype`: another integer type of the label; 'uint8' is an eighth to write and to send to a device, where
    `.long()` makes it what the losses take.
    """

    def __init__(self, label_dtype=np.int64):
        self.label_dtype = label_dtype

    def __call__(self, sample):
        image = np.ascontiguousarray(sample["image"], dtype=np.float32)
        label = np.ascontiguousarray(sample["label"], dtype=self.label_dtype)
        image = image[None] if image.ndim == 3 else image
        return {**sample, "image": torch.from_numpy(image), "label": torch.from_numpy(label)}
