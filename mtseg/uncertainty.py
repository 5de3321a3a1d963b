"""How unsure probabilities are: a score a voxel, and from it a number a case, a slice or a patch.

A score map is a float array (C, *spatial) of probabilities in [0, 1] that sum to 1 over the classes. Members are score
maps of one image: of several networks, dropout masks, flips, or of student and teacher. They are an iterable, used up
one by one, so that memory holds a few maps however many members there are. Every voxel score is float32 (*spatial), 0
where it is sure and larger where it is less so, never below 0, whatever the rounding. With a single member BALD and the
variance are 0: one network disagrees with nobody.
"""

import numpy as np
from scipy.ndimage import binary_dilation
from scipy.special import entr

TOLERANCE = 0.01  # by which the probabilities of a voxel may miss 1; those kept in 16 bits do by less


class UncertaintyError(ValueError):
    """Score maps or regions of which no uncertainty can be told; the message is one sentence."""


def checked(scores):
    """`scores` as an array; UncertaintyError where it is no score map, as logits are none."""
    scores = np.asarray(scores)
    if scores.ndim < 2 or not scores.size:
        raise UncertaintyError(f"a score map is (classes, *spatial), not of shape {scores.shape}; give one")
    total = scores.sum(axis=0, dtype=np.float32)
    if not (scores.min() >= 0 and abs(total - 1).max() <= TOLERANCE):
        low, high = float(total.min()), float(total.max())
        raise UncertaintyError(
            f"probabilities are at least 0 and sum to 1 over the classes, but the least is {float(scores.min()):g} and "
            f"they sum to {low:g} to {high:g}; give the softmax of the network's logits"
        )
    return scores


def members_of(members):
    """The members, checked, one by one; UncertaintyError where there is none or two differ in shape."""
    shape = None
    for scores in members:
        scores = checked(scores)
        if shape not in (None, scores.shape):
            raise UncertaintyError(f"members have the shapes {shape} and {scores.shape}; give score maps of one image")
        shape = scores.shape
        yield scores
    if shape is None:
        raise UncertaintyError("there is no member; give the score map of one network at least")


def mean_map(members):
    """The mean score map of the members, float32 (C, *spatial)."""
    total, count = np.float32(0), 0
    for scores in members_of(members):
        total, count = total + scores.astype(np.float32), count + 1
    return total / np.float32(count)


def entropy(scores):
    """The predictive entropy -sum_c p_c ln p_c in nats, from 0 to ln C; 0 ln 0 is 0. Shannon 1948."""
    return np.maximum(sum(entr(p.astype(np.float32)) for p in checked(scores)), 0)


def least_confidence(scores):
    """1 - max_c p_c, from 0 to 1 - 1 / C. Lewis and Gale, SIGIR 1994."""
    return np.maximum(1 - checked(scores).max(axis=0).astype(np.float32), 0)


def margin(scores):
    """1 - (p_1 - p_2) of the two likeliest classes, from 0 to 1. Scheffer et al., IDA 2001."""
    first = second = np.float32(0)
    for p in checked(scores):
        p = p.astype(np.float32)
        second = np.maximum(second, np.minimum(first, p))
        first = np.maximum(first, p)
    return np.maximum(1 - (first - second), 0)


def bald(members):
    """The members' mutual information: entropy of their mean less the mean of their entropies, from 0 to ln C.

    Houlsby et al. 2011 (arXiv:1112.5745); Gal et al., ICML 2017 (arXiv:1703.02910).
    """
    total, expected, count = np.float32(0), np.float32(0), 0
    for scores in members_of(members):
        total, expected, count = total + scores.astype(np.float32), expected + entropy(scores), count + 1
    return np.maximum(entropy(total / np.float32(count)) - expected / np.float32(count), 0)


def variance(members):
    """sum_c of the variance of p_c over the members, divided by their number M and not by M - 1; from 0 to 1 - 1 / M.

    One by one, as Welford, Technometrics 1962.
    """
    mean = total = np.float32(0)
    for count, scores in enumerate(members_of(members), start=1):
        away = scores.astype(np.float32) - mean
        mean = mean + away / np.float32(count)
        total = total + (away * (scores - mean)).sum(axis=0)
    return np.maximum(total / np.float32(count), 0)


OF_THE_MEAN = {"entropy": entropy, "least_confidence": least_confidence, "margin": margin}
OF_MEMBERS = {"bald": bald, "variance": variance}


def voxel_scores(name, members):
    """The voxel scores of the members by the `name` of a function above; UncertaintyError for an unknown name."""
    if name in OF_MEMBERS:
        return OF_MEMBERS[name](members)
    if name in OF_THE_MEAN:
        return OF_THE_MEAN[name](mean_map(members))
    raise UncertaintyError(f"there is no uncertainty {name!r}; choose among {', '.join(OF_THE_MEAN | OF_MEMBERS)}")


# ------------------------------------------------------------------------------------------------- one number a region


def predicted_foreground(labels, background=0):
    """bool (*spatial): where the predicted `labels`, integer (*spatial), are not `background`; everywhere for None."""
    return np.full(labels.shape, True) if background is None else labels != background


def predicted_boundary(labels, widen=3):
    """bool (*spatial): the voxels of `labels` with another class across a face, and all within `widen` steps of them.

    A step goes across a face. The image's own edge is no boundary.
    """
    boundary = np.zeros(labels.shape, bool)
    for axis in range(labels.ndim):
        here, there = np.moveaxis(boundary, axis, 0), np.moveaxis(labels, axis, 0)
        differs = there[1:] != there[:-1]
        here[1:] |= differs
        here[:-1] |= differs
    return binary_dilation(boundary, iterations=widen) if widen > 0 else boundary


def top_mean(values, share=0.05):
    """The mean of the largest `share`, in (0, 1], of the voxel scores (*spatial), of one voxel at least.

    UncertaintyError for another share.
    """
    if not 0 < share <= 1:
        raise UncertaintyError(
            f"the share of voxels to average is above 0 and at most 1, not {share}; give 0.05 for 5 %"
        )
    largest = max(int(share * values.size + 1e-9), 1)
    return float(np.partition(values.ravel(), values.size - largest)[values.size - largest :].mean(dtype=float))


def corners_of(sides, size, stride):
    """(starts, stops), int (N, dims) each, in voxels: the windows of an image of these `sides`.

    `size` and `stride`: a number an axis, or one for all. Windows start every `stride` voxels, the last of each row
    ends with the image, and none is larger than the image: (W, H, 1) are the slices, the image's own size is one
    window. UncertaintyError for a size or stride below 1 or of another number of axes.
    """
    sides, given = np.array(sides), f"windows of {size} voxels every {stride}"
    try:
        size, stride = (np.broadcast_to(np.asarray(each, dtype=int), sides.shape) for each in (size, stride))
    except ValueError:
        raise UncertaintyError(f"{given} do not fit an image of {len(sides)} axes; give a number an axis") from None
    if min(*size, *stride) < 1:
        raise UncertaintyError(f"{given} are none: sizes and strides are at least 1; give larger ones")
    size = np.minimum(size, sides)
    rows = [np.unique([*range(0, last, step), last]) for last, step in zip(sides - size, stride, strict=True)]
    starts = np.stack(np.meshgrid(*rows, indexing="ij"), axis=-1).reshape(-1, len(sides))
    return starts, starts + size


def window_means(values, size, stride):
    """The mean of voxel scores (*spatial) in each window of `corners_of`: (means (N,), starts, stops).

    By running sums along one axis after the other: time and memory do not depend on the window's size.
    """
    starts, stops = corners_of(values.shape, size, stride)
    rows, size = [np.unique(row) for row in starts.T], stops[0] - starts[0]
    totals = values
    for first, width in zip(rows, size, strict=True):
        # Each turn sums along the first axis, and hands it to the end.
        sums = np.zeros((totals.shape[0] + 1, *totals.shape[1:]))
        np.cumsum(totals, axis=0, dtype=float, out=sums[1:])
        totals = np.moveaxis(sums[first + width] - sums[first], 0, -1)
    return totals.ravel() / size.prod(), starts, stops
