"""Crops and augmentations on samples {'image', 'label'} of volumes and of images.

'image' is a float array (W, H, D) or (C, W, H, D), 'label' an integer array (W, H, D); of a 2-D image (H, W) or (C, H,
W), and (H, W). The label's axes say which it is; ValueError for an image that does not end in them, such as one with
its channels last. Every transform takes such a dict and returns a new one; other keys pass through. Random transforms
draw from `sample['rng']`, a numpy.random.Generator, where there is one; otherwise from NumPy's global random state, so
that numpy.random.seed governs them as in the UA-MT family. "The plane" is that of the first two spatial axes: W and H
of a volume, and of an image the whole.
"""

import numpy as np
import torch
from scipy import ndimage


def _generator(sample):
    rng = sample.get("rng")
    return np.random.default_rng(np.random.randint(2**31)) if rng is None else rng


def image_and_label(sample):
    """The arrays of a sample; ValueError where they do not fit together."""
    image, label = sample["image"], sample["label"]
    if tuple(image.shape[-label.ndim :]) != tuple(label.shape) or image.ndim > label.ndim + 1:
        shapes = tuple(image.shape), tuple(label.shape)
        raise ValueError("an image of shape {} for a label of shape {}: its channels come first".format(*shapes))
    return image, label


def pad_to(array, size, value=0):
    """Pad the last len(size) axes with `value`, evenly on both sides, to at least `size`; ValueError for a value that
    the array's type cannot hold."""
    missing = [max(wanted - side, 0) for side, wanted in zip(array.shape[-len(size) :], size, strict=True)]
    if not any(missing):
        return array
    if np.asarray(value).astype(array.dtype) != value:
        raise ValueError(f"{array.dtype} cannot hold {value}: give an array of another type")
    widths = [(0, 0)] * (array.ndim - len(size)) + [(m // 2, m - m // 2) for m in missing]
    return np.pad(array, widths, constant_values=value)


def _crop(sample, size, start, outside=0):
    """Cut `size` out of image and label, which are padded first, with 0 and with `outside`.

    `start(rooms)` gives the first voxel along each axis of what is padded, from 0 to that axis's room.
    """
    image, label = image_and_label(sample)
    image, label = pad_to(image, size), pad_to(label, size, outside)
    firsts = start([side - wanted for side, wanted in zip(label.shape, size, strict=True)])
    window = tuple(slice(first, first + wanted) for first, wanted in zip(firsts, size, strict=True))
    return {**sample, "image": image[(..., *window)], "label": label[window]}


def _turn(sample, turns, axes):
    """Rotate image and label by `turns` quarter turns of the plane, then mirror them along each of `axes`, those of the
    label."""
    image, label = image_and_label(sample)
    dims = label.ndim
    axes = [axis if axis < 0 else axis - dims for axis in axes]  # an image may have channels in front
    if not all(-dims <= axis < 0 for axis in axes):
        raise ValueError(f"a label of {dims} axes cannot be mirrored along others: give axes of its own")

    def turned(array):
        return np.flip(np.rot90(array, turns, axes=(-dims, 1 - dims)), axis=axes)

    return {**sample, "image": turned(image), "label": turned(label)}


class Compose:
    """Apply transforms one after the other."""

    def __init__(self, transforms):
        self.transforms = transforms

    def __call__(self, sample):
        for transform in self.transforms:
            sample = transform(sample)
        return sample


class RandomCrop:
    """A patch of `output_size` = (w, h, d) or (h, w) voxels at a random position; every position is equally likely.

    Smaller volumes are padded evenly on both sides and only to `output_size`: the image with 0 (the mean of a
    normalised one), the label with `outside` (0, the background, or the label of voxels that nobody labelled).

    With probability `foreground` the patch is drawn around a voxel, every one equally likely, of one of `classes`,
    drawn by lot among those that the label holds: nnU-Net's way to rare classes, with a third (Isensee et al., Nature
    Methods 2021). The voxel is the patch's middle, as near as the border allows. A sample whose 'labeled' is False has
    a label that nobody may look at: its patches lie anywhere.

    `unknown`: the label of voxels that nobody labelled. Patches of a sample that has a label in part are drawn around
    a voxel that has one, every one equally likely, as nnU-Net does with its ignore label; what pads them is no
    background, but `unknown`, too.

    UA-MT's RandomCrop differs: it never draws the last position of an axis, and where one axis is too small or just
    as large as the patch, it pads by about three voxels more on either side, so that the volume lies at random there.
    """

    def __init__(self, output_size, outside=0, foreground=0.0, classes=(), unknown=None):
        self.output_size = tuple(output_size)
        self.outside = outside
        self.foreground = foreground
        self.classes = list(classes)
        self.unknown = unknown

    def __call__(self, sample):
        rng, labeled, label = _generator(sample), sample.get("labeled", True), sample["label"]
        wanted = self.foreground and labeled and rng.random() < self.foreground
        known = np.asarray(label) != self.unknown if labeled and self.unknown is not None else np.zeros(0)
        in_part = 0 < np.count_nonzero(known) < known.size

        def start(rooms):  # an axis that is padded has no room: where in the padded label a voxel lies makes no odds
            middle = self._foreground_voxel(rng, np.asarray(label)) if wanted else None
            if middle is None and in_part:
                middle = np.unravel_index(rng.choice(np.flatnonzero(known)), known.shape)
            if middle is None:
                return [int(rng.integers(room + 1)) for room in rooms]
            sides = zip(middle, self.output_size, rooms, strict=True)
            return [int(np.clip(voxel - side // 2, 0, room)) for voxel, side, room in sides]

        return _crop(sample, self.output_size, start, self.outside or (0 if known.all() else self.unknown))

    def _foreground_voxel(self, rng, label):
        """A voxel of one of the classes, along each axis; None where the label has none of them."""
        for number in rng.permutation(self.classes):
            places = np.flatnonzero(label == number)
            if places.size:
                return np.unravel_index(rng.choice(places), label.shape)
        return None


class RandomRotFlip:
    """Rotate by 0, 90, 180 or 270 degrees in the plane, then always mirror along W or H, as UA-MT does.

    The result is one of the four mirror images of the plane (along W, along H, along either diagonal), each equally
    often. It is never the volume as it was: `RandomRot90Flip` and `RandomFlip` give that as well. The mirror images
    along a diagonal swap W and H of volumes that are not square.
    """

    def __call__(self, sample):
        rng = _generator(sample)
        turns, axis = int(rng.integers(4)), int(rng.integers(2))
        return _turn(sample, turns, [axis])


class RandomRot90Flip:
    """Rotate by 0, 90, 180 or 270 degrees in the plane, then mirror along its first axis with probability one half.

    The result is one of the eight symmetries of the plane, each equally often, the volume as it was among them. A
    quarter turn swaps W and H of volumes that are not square.
    """

    def __call__(self, sample):
        rng = _generator(sample)
        return _turn(sample, int(rng.integers(4)), [0] if rng.integers(2) == 0 else [])


class RandomFlip:
    """Mirror along each of `axes` with probability one half, without rotation; by default along those of the plane.

    The volume stays as it was with probability 1/4, or 1/8 with three axes. W, H and D are the axes 0, 1 and 2, and of
    an image H and W are 0 and 1; -1 is the last.
    """

    def __init__(self, axes=(0, 1)):
        self.axes = tuple(axes)

    def __call__(self, sample):
        rng = _generator(sample)
        return _turn(sample, 0, [axis for axis in self.axes if rng.integers(2) == 0])


class RandomGenerator:
    """SSL4MIS's augmentation of slices: `RandomRotFlip` with probability 1/2, else, with 1/2, a rotation in the plane
    by a whole number of degrees from -20 to 19, else nothing.

    Rotated voxels are the nearest ones; what comes from outside is 0 in the image and `outside` in the label.
    """

    def __init__(self, outside=0):
        self.outside = outside

    def __call__(self, sample):
        rng = _generator(sample)
        if rng.random() > 0.5:
            return RandomRotFlip()({**sample, "rng": rng})
        if rng.random() > 0.5:
            angle, (image, label) = int(rng.integers(-20, 20)), image_and_label(sample)
            plane = {"axes": (1 - label.ndim, -label.ndim), "reshape": False, "order": 0}
            image = ndimage.rotate(np.asarray(image), angle, **plane, cval=0)
            label = ndimage.rotate(np.asarray(label), angle, **plane, cval=self.outside)
            return {**sample, "image": image, "label": label}
        return sample


class Resize:
    """Image and label in `output_size` voxels along the last len(output_size) axes, by `resize_nearest`."""

    def __init__(self, output_size):
        self.output_size = tuple(output_size)

    def __call__(self, sample):
        image, label = (resize_nearest(array, self.output_size) for array in image_and_label(sample))
        return {**sample, "image": image, "label": label}


def resize_nearest(array, size):
    """The last len(size) axes of `array` in `size` voxels, each the nearest one: scipy.ndimage.zoom with order 0, the
    way of SSL4MIS and others with slices. The centres of the outer voxels stay the outer ones."""
    lead = array.ndim - len(size)
    for axis, new in enumerate(size, start=lead):
        old = array.shape[axis]
        if new != old:
            places = np.arange(new) * ((old - 1) / max(new - 1, 1))
            array = np.take(array, np.floor(places + 0.5).astype(int), axis=axis)
    return array


class ToTensor:
    """'image' as a float32 tensor (C, W, H, D) or (C, H, W), one channel added where there is none; 'label' as int64
    (W, H, D) or (H, W).

    `label_dtype`: another integer type of the label; 'uint8' is an eighth to write and to send to a device, where
    `.long()` makes it what the losses take. Labels are whole numbers that it holds: here nobody looks.
    """

    def __init__(self, label_dtype=np.int64):
        self.label_dtype = label_dtype

    def __call__(self, sample):
        image = np.ascontiguousarray(sample["image"], dtype=np.float32)
        label = np.ascontiguousarray(sample["label"], dtype=self.label_dtype)
        image = image[None] if image.ndim == label.ndim else image
        return {**sample, "image": torch.from_numpy(image), "label": torch.from_numpy(label)}
