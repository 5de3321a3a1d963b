"""From a scan's own grid and brightness to what a network sees, and from the network's output back onto that grid.

What is done is a dict of settings that JSON can hold:

    orientation     "RAS": axes are permuted and mirrored (never interpolated) so that W runs to the right, H to the
                    front, D upwards, as nearly as the scan allows; "file": as they lie in the file
    crop            "nonzero": to the box outside which all channels are 0; "none"
    normalization   "zscore", "percentile", "ct" or "minmax": see `normalization`; "by_channel"
    by_channel      for that, of each channel: one of these words but "ct", or [low, high, shift, scale], the same for
                    every scan of a data set
    over            "nonzero" or "all": the voxels that statistics are over; no such key: "nonzero" with that crop
    window          [centre, width] for "ct", in the image's unit (Hounsfield), else None
    spacing         [x, y, z] millimetres along the axes after orientation, None keeps the scan's own
    coarse_axis     "nearest": an axis that is more than 3 times coarser than the finest is resampled apart, see
                    `coarse_axis`; None, or no such key: all axes alike
    labels          the value that each class has in label files, ascending, background first: [0, 1, 2, 4]
    ignore          the value that label files have where nobody labelled, which becomes IGNORED; None, or no such
                    key: there is none
    channels        the name's part by which a case's files differ, one a channel: ["0000", "0001"]; None: one file

Every step is known by its Grid alone, so that `restore` undoes it.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import optimize

IGNORED = 255  # in prepared labels: a voxel that nobody labelled

# Of a resampled scan: 4 GiB a channel, a hundred times the scan's own, or a hundredth along an axis. What goes beyond
# is a mistake in a header.
MOST_VOXELS, LARGEST_CHANGE = 2**30, 100

CHOICES = {
    "orientation": ("RAS", "file"),
    "crop": ("nonzero", "none"),
    "normalization": ("zscore", "percentile", "ct", "minmax", "by_channel"),
}


class PreprocessError(ValueError):
    """A scan that cannot be prepared as the settings say; the message is one sentence, without the file's name."""


class Grid(NamedTuple):
    """How a prepared volume lies in its scan; shapes are (W, H, D).

    `original_shape`: the scan's. `axes`: its axis that became W, H and D; `flips`: 1 for those mirrored after that.
    `box`: first and past-the-last voxel of the crop along each of them. `shape`: the prepared volume's. `coarse`: the
    axis of it that was resampled apart, -1 for none.
    """

    original_shape: tuple
    axes: tuple
    flips: tuple
    box: tuple
    shape: tuple
    coarse: int = -1


class Prepared(NamedTuple):
    """`image` float32 (W, H, D) or (C, W, H, D); `label` uint8 (W, H, D) or None; `spacing` 3 mm or None;
    `normalization` (C, 4), a row (low, high, shift, scale) a channel; `cut`: labelled voxels outside the crop."""

    image: np.ndarray
    label: np.ndarray | None
    grid: Grid
    spacing: np.ndarray | None
    normalization: np.ndarray
    cut: int


def check_settings(settings):
    """`settings` if they are of the kind described above; PreprocessError names the first that is not."""

    def numbers(value, count):
        plain = isinstance(value, list) and all(isinstance(v, (int, float)) and np.isfinite(v) for v in value)
        return plain and len(value) == count

    if not isinstance(settings, dict):
        raise PreprocessError("the preprocessing is no JSON object")
    for name in ("spacing", "channels"):
        if name not in settings:
            raise PreprocessError(f"the preprocessing does not say {name}; write it anew with data/prepare_nifti.py")
    problems = [f"{name} {settings.get(name)!r}" for name in CHOICES if settings.get(name) not in CHOICES[name]]
    spacing, window, labels, channels = (settings.get(name) for name in ("spacing", "window", "labels", "channels"))
    if spacing is not None and not (numbers(spacing, 3) and min(spacing) > 0):
        problems.append(f"spacing {spacing!r}")
    if settings.get("coarse_axis") not in (None, "nearest"):
        problems.append(f"coarse_axis {settings['coarse_axis']!r}")
    if settings.get("over", "all") not in ("nonzero", "all"):
        problems.append(f"over {settings['over']!r}")
    rows = settings.get("by_channel")
    rows = rows if rows and isinstance(rows, list) else [rows]
    for row in rows if settings.get("normalization") == "by_channel" else ():
        if row not in ("zscore", "percentile", "minmax") and not (numbers(row, 4) and row[0] < row[1] and row[3] > 0):
            problems.append(f"by_channel {row!r}")
    if settings.get("normalization") == "ct" and not (numbers(window, 2) and window[1] > 0):
        problems.append(f"window {window!r}")
    whole = isinstance(labels, list) and all(type(v) is int for v in labels)
    if not (whole and 2 <= len(labels) <= 256 and labels == sorted(set(labels)) and labels[0] == 0):
        problems.append(f"labels {labels!r}")
    ignore = settings.get("ignore")
    if ignore is not None and (type(ignore) is not int or ignore in (labels or ()) or len(labels or ()) > IGNORED):
        problems.append(f"ignore {ignore!r} beside the labels {labels!r}")
    if channels is not None and not (isinstance(channels, list) and all(isinstance(c, str) for c in channels)):
        problems.append(f"channels {channels!r}")
    if problems:
        raise PreprocessError(f"the preprocessing cannot have {problems[0]}; write it anew with data/prepare_nifti.py")
    return settings


# ------------------------------------------------------------------------------------- from the scan to the network


def prepare(image, affine, spacing, settings, label=None):
    """The Prepared of a scan: orientation, crop, normalisation, resampling, in this order.

    `image`: (W, H, D) or (C, W, H, D) numbers; `affine`, `spacing`: as in volumes.Volume, None where not known;
    `label`: (W, H, D) values of settings["labels"], or None. Images are resampled linearly (`resample`), labels class
    by class (`resample_label`). Raises PreprocessError.
    """
    channels = np.asarray(image, dtype=np.float32)
    channels = channels[None] if channels.ndim == 3 else channels
    original_shape = channels.shape[1:]
    if not channels.size:
        raise PreprocessError(f"the image is of shape {np.shape(image)}, that is no voxels; leave the case out")
    if not np.isfinite(channels).all():
        raise PreprocessError("the image holds NaN or infinity; repair it")
    if label is not None:
        if label.shape != original_shape:
            raise PreprocessError(f"the image is {original_shape} voxels and its label {label.shape}; they must agree")
        ignore = settings.get("ignore")
        label = to_classes(label, settings["labels"], None if ignore is None else IGNORED, ignore)

    axes, flips = (0, 1, 2), (0, 0, 0)
    if settings["orientation"] == "RAS":
        if affine is None:
            raise PreprocessError("the file does not say how the scan lies in space; prepare with --orientation file")
        axes, flips = canonical_axes(affine)
    channels = orient(channels, axes, flips)
    shape = channels.shape[1:]
    box = nonzero_box(channels) if settings["crop"] == "nonzero" else tuple((0, n) for n in shape)
    inside = tuple(slice(*side) for side in box)
    channels = channels[(slice(None), *inside)]

    kinds = [settings["normalization"]] * len(channels)
    if kinds[0] == "by_channel":
        kinds = settings["by_channel"]
        if len(kinds) != len(channels):
            raise PreprocessError(f"has {len(channels)} channels, its preprocessing or plan {len(kinds)}; take another")
    rows = [normalization(c, {**settings, "normalization": k}) for c, k in zip(channels, kinds, strict=True)]
    rows = np.array(rows)
    channels = np.stack([normalize(c, *row) for c, row in zip(channels, rows, strict=True)])

    size, coarse = channels.shape[1:], -1
    if spacing is not None:
        spacing = np.asarray(spacing, dtype=float)[list(axes)]
    if settings["spacing"] is not None:
        if spacing is None:
            raise PreprocessError("the file does not say how wide its voxels are; prepare with --spacing none")
        wanted = np.asarray(settings["spacing"], dtype=float)
        resampled = np.maximum(np.rint(np.array(size) * spacing / wanted), 1)
        grows = resampled.prod() > min(MOST_VOXELS, LARGEST_CHANGE * math.prod(size))
        if grows or (spacing * LARGEST_CHANGE < wanted).any():
            raise PreprocessError(
                f"its voxels are {spacing} mm wide, and at {wanted} mm it would have {resampled.prod():.3g} of them "
                f"instead of {math.prod(size):.3g}; repair the header, or leave the case out"
            )
        coarse = coarse_axis(spacing, wanted) if settings.get("coarse_axis") else -1
        size, spacing = tuple(int(n) for n in resampled), wanted
    channels = np.stack([resample(c, size, coarse) for c in channels])
    cut = 0
    if label is not None:
        label = orient(label, axes, flips)
        labelled = (label > 0) & (label != (IGNORED if settings.get("ignore") is not None else 0))
        cut = int(np.count_nonzero(labelled) - np.count_nonzero(labelled[inside]))
        label = resample_label(label[inside], size, coarse)
    grid = Grid(original_shape, axes, flips, box, size, coarse)
    return Prepared(channels[0] if np.ndim(image) == 3 else channels, label, grid, spacing, rows, cut)


def to_classes(label, values, ignore_index=None, ignore=None):
    """uint8 class of each voxel: the index of its value in `values` (ascending).

    `ignore_index`: the class of voxels that nobody labelled, whose value is `ignore` (None: `ignore_index` itself).
    PreprocessError for other values.
    """
    label, ignore = np.asarray(label), ignore_index if ignore is None else ignore
    place = np.searchsorted(values, label).clip(max=len(values) - 1)
    ignored = np.zeros(label.shape, bool) if ignore is None else label == ignore
    wrong = label[(np.asarray(values)[place] != label) & ~ignored]
    if wrong.size:
        raise PreprocessError(f"the label has a voxel of value {wrong[0]}, but labels are {list(values)}; repair it")
    place[ignored] = ignore_index or 0
    return place.astype(np.uint8)


def canonical_axes(affine):
    """(axes, flips): which voxel axis runs most nearly to the right, the front and above, and which of them run back.

    Of the six assignments the one whose cosines have the largest sum.
    """
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    _, axes = optimize.linear_sum_assignment(-np.abs(cosines))
    return tuple(int(a) for a in axes), tuple(int(cosines[world, axis] < 0) for world, axis in enumerate(axes))


def orient(volume, axes, flips):
    """The last three axes of `volume` permuted, then those with a flip mirrored; the inverse is in `restore`."""
    lead = volume.ndim - 3
    volume = np.transpose(volume, (*range(lead), *(lead + axis for axis in axes)))
    return np.flip(volume, [lead + axis for axis in range(3) if flips[axis]])


def nonzero_box(channels):
    """((first, past the last), ...) of the smallest box that holds every voxel at which a channel is not 0."""
    mask = (channels != 0).any(axis=0)
    if not mask.any():
        raise PreprocessError("the image is 0 everywhere; leave the case out")
    sides = (np.flatnonzero(mask.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1)))
    return tuple((int(side[0]), int(side[-1]) + 1) for side in sides)


def normalization(channel, settings):
    """(low, high, shift, scale): the channel becomes (clip(x, low, high) - shift) / scale.

    zscore: zero mean and unit variance. percentile: clipped to the 0.5th and 99.5th percentile, then the same. ct:
    clipped to the window and brought to [0, 1]. minmax: brought to [0, 1]. Where it is a list, it is the result.
    Statistics are over the voxels that are not 0 where settings["over"] is "nonzero", and without it where
    settings["crop"] is, for 0 is then outside the body; else over all voxels.
    """
    if isinstance(settings["normalization"], list):
        return tuple(settings["normalization"])
    nonzero = settings.get("over", settings["crop"]) == "nonzero"
    inside = channel[channel != 0] if nonzero and channel.any() else channel
    low, high = -np.inf, np.inf
    if settings["normalization"] == "ct":
        centre, width = settings["window"]
        return centre - width / 2, centre + width / 2, centre - width / 2, width
    if settings["normalization"] == "minmax":
        return low, high, inside.min(), max(float(inside.max()) - float(inside.min()), 1e-8)
    if settings["normalization"] == "percentile":
        low, high = np.percentile(inside, (0.5, 99.5))
        inside = inside.clip(low, high)
    return low, high, inside.mean(dtype=float), max(inside.std(dtype=float), 1e-8)


def normalize(channel, low, high, shift, scale):
    """float32 (clip(channel, low, high) - shift) / scale."""
    return ((channel.clip(low, high) - shift) / scale).astype(np.float32)


def coarse_axis(*spacings):
    """The axis to be resampled apart: of the first of `spacings`, the scan's and the new one, whose largest is more
    than 3 times its smallest, the axis with the largest; -1 where none is so, or two axes share it. nnU-Net's rule."""
    for spacing in map(np.asarray, spacings):
        if spacing.max() > 3 * spacing.min():
            return int(spacing.argmax()) if (spacing == spacing.max()).sum() == 1 else -1
    return -1


def resample(volume, shape, coarse=-1):
    """`volume` (W, H, D) linearly interpolated to `shape`, float32, over the same extent in space.

    Voxels are boxes: the outer faces of both grids meet, not the centres of the outer voxels. Beyond the outermost
    centres the nearest value goes on. No low-pass filter comes first, as in nnU-Net. Across the axis `coarse`, if it is
    not -1, planes are interpolated, and along it comes the nearest of them: between slices that lie far apart there is
    nothing to be seen of what lies between. So does nnU-Net, by splines of order 3 in the planes of images.
    """
    volume = np.ascontiguousarray(volume, dtype=np.float32)
    if volume.shape == tuple(shape):
        return volume
    tensor = torch.from_numpy(volume)
    if coarse < 0:
        return F.interpolate(tensor[None, None], size=tuple(shape), mode="trilinear", align_corners=False)[0, 0].numpy()
    old, new = volume.shape[coarse], shape[coarse]
    size = [side for axis, side in enumerate(shape) if axis != coarse]
    planes = F.interpolate(tensor.movedim(coarse, 0)[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    nearest = (2 * torch.arange(new) + 1) * old // (2 * new)
    return planes[nearest].movedim(0, coarse).contiguous().numpy()


def resample_label(label, shape, coarse=-1):
    """Each class's mask resampled as an image; every voxel gets the class with most of it, the lowest of equals."""
    if label.shape == tuple(shape):
        return np.ascontiguousarray(label)
    best, result = np.zeros(shape, np.float32), np.zeros(shape, label.dtype)
    for value in np.unique(label):
        share = resample(label == value, shape, coarse)
        result[share > best] = value
        np.maximum(best, share, out=best)
    return result


# ------------------------------------------------------------------------------------- from the network to the scan


def restore(volume, grid, outside=0.0):
    """A float volume (W, H, D) of the prepared grid on the scan's own grid, `outside` where it was cropped away."""
    size = tuple(b - a for a, b in grid.box)
    whole = np.full([grid.original_shape[axis] for axis in grid.axes], outside, dtype=np.float32)
    whole[tuple(slice(*side) for side in grid.box)] = resample(volume, size, grid.coarse)
    whole = np.flip(whole, [axis for axis in range(3) if grid.flips[axis]])
    return np.ascontiguousarray(np.transpose(whole, np.argsort(grid.axes)))


def restore_scores(scores, grid):
    """Yield the (W, H, D) probabilities of each class on the scan's own grid; what was cropped away is background.

    `scores`: (num_classes, W, H, D), over the classes summing to 1, which the yielded ones then do too. One class at a
    time: a whole-body scan with many classes would not fit into memory at once. A `grid` of None is the scan's own.
    """
    for label, score in enumerate(scores):
        yield score if grid is None else restore(score, grid, outside=float(label == 0))


def grid_attributes(grid):
    """A Grid as attributes of an HDF5 file."""
    return {f"grid_{name}": np.asarray(value, dtype=np.int64) for name, value in grid._asdict().items()}


def grid_from_attributes(attributes):
    """The Grid in attributes that `grid_attributes` made, None without them; PreprocessError for an impossible one."""
    fields = {name: attributes.get(f"grid_{name}") for name in Grid._fields[:-1]}
    if all(value is None for value in fields.values()):
        return None
    try:
        fields = {name: value.tolist() for name, value in fields.items()}
        fields["box"] = map(tuple, fields["box"])
        coarse = int(attributes.get("grid_coarse", -1))  # files that were prepared before have none
        grid = Grid(**{name: tuple(value) for name, value in fields.items()}, coarse=coarse)
        inside = all(0 <= a < b <= grid.original_shape[axis] for (a, b), axis in zip(grid.box, grid.axes, strict=True))
        if (
            not inside
            or sorted(grid.axes) != [0, 1, 2]
            or len(grid.flips) != 3
            or min(grid.shape) < 1
            or not -1 <= coarse < 3
        ):
            raise ValueError("the box lies outside the scan")
        if math.prod(grid.original_shape) > MOST_VOXELS:
            raise ValueError(f"grid_original_shape has more than {MOST_VOXELS} voxels")
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        raise PreprocessError(f"its grid_ attributes contradict each other ({error}); prepare it again") from error
    return grid
