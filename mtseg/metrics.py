"""Overlap and surface distance of binary masks: MedPy's numbers in a fraction of its time, no exceptions where empty.

`result` and `reference` are arrays of the same shape with any number of dimensions, non-zero (or True) inside. TP, FP,
FN and TN are numbers of voxels: inside both masks, inside `result` alone, inside `reference` alone, inside neither.
Distances are in the unit of `voxelspacing` (one number, or one per axis; millimetres where that is the spacing in
millimetres), or in voxels without it. A surface voxel is a voxel of the mask with a neighbour across a face outside
the mask (`connectivity` above 1: across an edge, a corner, too); the array's border counts as outside.

Empty masks: where one mask is empty, every score in [0, 1] made of TP, FP and FN or of surfaces is 0; where both are,
it is 1, as MedPy's Dice and Jaccard. Specificity has the same rule for what lies outside the masks, accuracy needs
none. Distances are NaN in both cases. Neither says what the others say: count such cases (`is_empty`).

Masks of different shapes, masks of arrays without a voxel, and spacings that are not positive raise ValueError.
"""

import itertools
import math

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

# Distances up to REACH voxels are looked up at the NEAR nearest places: all of a ball in three dimensions.
REACH, NEAR = 3, 123


def _masks(result, reference):
    result, reference = (np.atleast_1d(mask).astype(bool, copy=False) for mask in (result, reference))
    if result.shape != reference.shape:
        raise ValueError(f"masks of different shape: {result.shape} and {reference.shape}")
    if not result.size:
        raise ValueError(f"masks of shape {result.shape} hold no voxel: there is nothing to measure")
    return result, reference


def _spacing(voxelspacing, ndim):
    spacing = np.asarray(1.0 if voxelspacing is None else voxelspacing, dtype=float)
    if spacing.shape not in ((), (ndim,)) or not np.all((spacing > 0) & np.isfinite(spacing)):
        raise ValueError(f"voxelspacing is a positive number or {ndim} of them, one per axis, not {voxelspacing}")
    return np.broadcast_to(spacing, ndim)


def _counts(result, reference):
    """(TP, FP, FN, TN)."""
    result, reference = _masks(result, reference)
    both = int(np.count_nonzero(result & reference))
    result_only, reference_only = np.count_nonzero(result) - both, np.count_nonzero(reference) - both
    return both, int(result_only), int(reference_only), int(result.size - both - result_only - reference_only)


def _ratio(part, whole, empty):
    """part / whole; where whole is 0 the case is one of empty masks: 1 if there is nothing to find or find wrong."""
    return part / whole if whole else float(empty)


def is_empty(result, reference):
    """True if at least one of the masks has no voxel, so that distances between them are NaN."""
    return not (np.any(result) and np.any(reference))


# ------------------------------------------------------------------------------------------------------------ overlap
def dice(result, reference):
    """2 TP / (2 TP + FP + FN) = 2 |A and B| / (|A| + |B|), in [0, 1]; one mask empty: 0, both: 1 (MedPy: dc)."""
    tp, fp, fn, _ = _counts(result, reference)
    return _ratio(2 * tp, 2 * tp + fp + fn, empty=True)


def jaccard(result, reference):
    """TP / (TP + FP + FN) = |A and B| / |A or B|, in [0, 1]; one mask empty: 0, both: 1 (MedPy: jc)."""
    tp, fp, fn, _ = _counts(result, reference)
    return _ratio(tp, tp + fp + fn, empty=True)


def precision(result, reference):
    """TP / (TP + FP), in [0, 1]: the share of `result` that is right; one mask empty: 0, both: 1 (MedPy: 0)."""
    tp, fp, fn, _ = _counts(result, reference)
    return _ratio(tp, tp + fp, empty=fn == 0)


def recall(result, reference):
    """TP / (TP + FN), in [0, 1]: the share of `reference` that was found; one mask empty: 0, both: 1 (MedPy: 0)."""
    tp, fp, fn, _ = _counts(result, reference)
    return _ratio(tp, tp + fn, empty=fp == 0)


def specificity(result, reference):
    """TN / (TN + FP), in [0, 1]: the share of what is outside `reference` that `result` leaves out, too.

    It depends on how much background the array has around the masks, and is near 1 where that is much. Empty masks are
    no special case; where `reference` fills the array, it is 1 if `result` does so as well, else 0.
    """
    _, fp, fn, tn = _counts(result, reference)
    return _ratio(tn, tn + fp, empty=fn == 0)


def accuracy(result, reference):
    """(TP + TN) / (TP + FP + FN + TN), in [0, 1]: the share of voxels on which the masks agree, empty ones included.

    It depends on how much background the array has around the masks, and is near 1 where that is much.
    """
    tp, fp, fn, tn = _counts(result, reference)
    return _ratio(tp + tn, tp + fp + fn + tn, empty=True)


def f1(result, reference):
    """The harmonic mean of precision and recall, in [0, 1]; one mask empty: 0, both: 1. Of voxels it is the Dice."""
    return dice(result, reference)


def pixel_accuracy(prediction, label, ignore_index=None):
    """The share of pixels whose class is right, in [0, 1]; both are arrays of class numbers, of the same shape.

    Pixels with the label `ignore_index` do not count. Where no pixel is left to count: ValueError.
    """
    prediction, label = np.asarray(prediction), np.asarray(label)
    if prediction.shape != label.shape:
        raise ValueError(f"label maps of different shape: {prediction.shape} and {label.shape}")
    right = prediction == label if ignore_index is None else (prediction == label)[label != ignore_index]
    if not right.size:
        raise ValueError(f"of {label.size} pixels none counts: there is nothing to measure")
    return float(np.count_nonzero(right) / right.size)


def volume_similarity(result, reference):
    """1 - |FN - FP| / (2 TP + FP + FN), in [0, 1]; one mask empty: 0, both: 1.

    It compares sizes alone: masks of the same volume have 1 wherever they lie (Taha and Hanbury, "Metrics for
    evaluating 3D medical image segmentation", BMC Medical Imaging 2015, equation 12).
    """
    tp, fp, fn, _ = _counts(result, reference)
    return 1 - _ratio(abs(fn - fp), 2 * tp + fp + fn, empty=False)


# ----------------------------------------------------------------------------------------------------------- surfaces
class _Surfaces:
    """The surfaces of two masks, neither of them empty, and the distances between them.

    Surfaces and the distances between them do not depend on what lies outside the masks' common bounding box. Within
    it, a surface is a flat array with so many zeros behind each axis, and before and behind the whole, that a step of
    up to REACH voxels in any direction is one number to add to an index, and never ends on another part of the mask.
    """

    def __init__(self, result, reference, connectivity):
        joint, box = result | reference, []
        for axis in range(joint.ndim):
            hit = np.flatnonzero(joint.any(axis=tuple(i for i in range(joint.ndim) if i != axis)))
            box.append(slice(hit[0], hit[-1] + 1))
            joint = joint[(slice(None),) * axis + (box[-1],)]
        self.size = joint.shape
        self.padded = tuple(side + min(REACH, max(side - 1, 1)) for side in self.size)
        self.strides = np.array([math.prod(self.padded[axis + 1 :]) for axis in range(joint.ndim)])
        self.length = math.prod(self.padded)
        self.lead = int(np.dot(self.strides, np.subtract(self.padded, self.size)))
        neighbours = np.argwhere(ndimage.generate_binary_structure(joint.ndim, connectivity)) - 1
        self.maps = [self._surface(mask[tuple(box)], neighbours) for mask in (result, reference)]
        self.voxels = [np.flatnonzero(self._shifted(flat, 0)) for flat in self.maps]

    def _shifted(self, flat, step):
        return flat[self.lead + step : self.lead + step + self.length]

    def _box(self, flat):
        return self._shifted(flat, 0).reshape(self.padded)[tuple(map(slice, self.size))]

    def _surface(self, mask, neighbours):
        flat = np.zeros(self.length + 2 * self.lead, dtype=bool)
        self._box(flat)[...] = mask
        inside = self._shifted(flat, 0).copy()
        for step in neighbours @ self.strides:
            inside &= self._shifted(flat, step)
        self._shifted(flat, 0)[...] ^= inside
        return flat

    def _steps(self, spacing):
        """Distances up to REACH voxels in ascending order, each with the steps along the flat array that are so long.

        No step of another distance that is not among them, nor one of more than REACH voxels, is shorter than these.
        """
        reach = np.minimum(np.subtract(self.size, 1), REACH)
        offsets = np.array(list(itertools.product(*(range(-r, r + 1) for r in reach))))
        length = np.sqrt(((offsets * spacing) ** 2).sum(axis=1))
        beyond = min(spacing[np.subtract(self.size, 1) > REACH] * (REACH + 1), default=math.inf)
        order = np.argsort(length, kind="stable")[:NEAR]
        order = order[length[order] < beyond]
        for distance, group in itertools.groupby(order, key=length.__getitem__):
            yield distance, [int(step) for step in offsets[list(group)] @ self.strides]

    def distances(self, spacing, source=0, target=1):
        """From each surface voxel of mask `source` to the nearest of mask `target`, in the order of the array."""
        voxels = self.voxels[source]
        distance, left = np.empty(len(voxels)), np.arange(len(voxels))
        # Most surface voxels of a usable prediction have their partner a few voxels away.
        for length, steps in self._steps(spacing):
            distance[left] = length
            hit = self._shifted(self.maps[target], steps[0]).take(voxels)
            for step in steps[1:]:
                hit |= self._shifted(self.maps[target], step).take(voxels)
            missed = np.flatnonzero(~hit)
            left, voxels = left[missed], voxels[missed]
            if not len(voxels):
                return distance
        distance[left] = self._far(voxels, target, spacing)
        return distance

    def _far(self, voxels, target, spacing):
        """From each of `voxels` (indices of the flat array) to the nearest surface voxel of mask `target`."""
        points = np.stack(np.unravel_index(voxels, self.padded), axis=1)
        # The search in a tree looks at all partners that are about as near as the nearest, which may be all there are
        # (from the middle of a ball to its surface). What it looks at for a sample of the points says if a distance
        # map is the cheaper way; the figures are microseconds of one core, where only the order of magnitude counts.
        map_cost = 0.09 * math.prod(self.size)
        if len(points) < map_cost:
            partners = np.stack(np.unravel_index(self.voxels[target], self.padded), axis=1)
            tree = cKDTree(partners * spacing, leafsize=32, balanced_tree=False, compact_nodes=False)
            sample = points[:: max(1, len(points) // 64)] * spacing
            around = tree.query(sample)[0] + 4 * math.prod(spacing) ** (1 / len(spacing))
            seen = tree.query_ball_point(sample, around, return_length=True).mean()
            if len(points) * (1 + 0.0125 * seen) < map_cost:
                return tree.query(points * spacing)[0]
        outside = ~self._box(self.maps[target])
        nearest = ndimage.distance_transform_edt(outside, spacing, return_distances=False, return_indices=True)
        return np.sqrt((((nearest[(slice(None), *points.T)].T - points) * spacing) ** 2).sum(axis=1))


def _both_ways(result, reference, voxelspacing, connectivity):
    """The surface distances from `result` to `reference` and back; (None, None) where one is empty."""
    result, reference = _masks(result, reference)
    spacing = _spacing(voxelspacing, result.ndim)
    if is_empty(result, reference):
        return None, None
    surfaces = _Surfaces(result, reference, connectivity)
    return surfaces.distances(spacing, 0, 1), surfaces.distances(spacing, 1, 0)


def _of_distances(forth, back):
    """{metric: value} of the surface distances there and back; None where a mask is empty."""
    if forth is None:
        return dict.fromkeys(("hd", "hd95", "asd", "assd"), math.nan)
    both = np.concatenate((forth, back))
    return {
        "hd": float(both.max()),
        "hd95": float(np.percentile(both, 95)),
        "asd": float(forth.mean()),
        "assd": float(both.mean()),
    }


def _nsd(forth, back, tolerance, both_empty):
    if not tolerance >= 0:
        raise ValueError(f"the tolerance of a surface Dice is a distance of at least 0, not {tolerance}")
    if forth is None:
        return float(both_empty)
    # Three voxels of 0.1 mm lie within 0.3 mm, whatever the rounding of 3 * 0.1.
    limit = tolerance * (1 + 1e-9)
    within = np.count_nonzero(forth <= limit) + np.count_nonzero(back <= limit)
    return float(within / (len(forth) + len(back)))


def surface_distances(result, reference, voxelspacing=None, connectivity=1):
    """For each surface voxel of `result`, the distance to the nearest one of `reference`; both must not be empty.

    `connectivity`: which neighbours make a voxel a surface voxel: 1 across faces, up to ndim across corners too.
    Returns a float64 array, in the order in which the surface voxels lie in `result`. An empty mask: ValueError.
    """
    result, reference = _masks(result, reference)
    spacing = _spacing(voxelspacing, result.ndim)
    if is_empty(result, reference):
        raise ValueError("there are no distances to or from an empty mask")
    return _Surfaces(result, reference, connectivity).distances(spacing)


def hd(result, reference, voxelspacing=None, connectivity=1):
    """Hausdorff distance: the largest surface distance, in either direction; >= 0, NaN where a mask is empty."""
    return _of_distances(*_both_ways(result, reference, voxelspacing, connectivity))["hd"]


def hd95(result, reference, voxelspacing=None, connectivity=1):
    """The 95th percentile of the surface distances of both directions taken together; >= 0, NaN where one is empty.

    MedPy's definition, the field's in tables of LA. MONAI's is the larger of the percentiles of the two directions.
    """
    return _of_distances(*_both_ways(result, reference, voxelspacing, connectivity))["hd95"]


def asd(result, reference, voxelspacing=None, connectivity=1):
    """Mean distance from the surface of `result` to that of `reference`, not symmetric; >= 0, NaN if one is empty."""
    if is_empty(*_masks(result, reference)):
        return math.nan
    return float(surface_distances(result, reference, voxelspacing, connectivity).mean())


def assd(result, reference, voxelspacing=None, connectivity=1):
    """The mean of the surface distances of both directions taken together; >= 0, NaN where a mask is empty."""
    return _of_distances(*_both_ways(result, reference, voxelspacing, connectivity))["assd"]


def nsd(result, reference, voxelspacing=None, tolerance=1.0, connectivity=1):
    """Normalized surface Dice: the share of both surfaces' voxels at most `tolerance` from the other; in [0, 1].

    `tolerance` is in the unit of `voxelspacing` (voxels without it). One mask empty: 0, both: 1 (MONAI: NaN).
    The voxels of the surfaces count alike and are those of the other distances here, as MONAI's compute_surface_dice
    has it (Seidlitz et al., Medical Image Analysis 2022). DeepMind's surface-distance weights pieces of a surface that
    runs between the voxels by their area (Nikolov et al., arXiv:1809.04430); at a tolerance of one voxel its values are
    clearly higher. Name the definition beside the number.
    """
    forth, back = _both_ways(result, reference, voxelspacing, connectivity)
    return _nsd(forth, back, tolerance, both_empty=not (np.any(result) or np.any(reference)))


# ------------------------------------------------------------------------------------------------- several at a time
def calculate_metric_percase(pred, gt, voxelspacing=None):
    """(dice, jaccard, hd95, asd) of one case, as in UA-MT's tables; NaN distances where a mask is empty."""
    pred, gt = _masks(pred, gt)
    distances = _of_distances(*_both_ways(pred, gt, voxelspacing, connectivity=1))
    return dice(pred, gt), jaccard(pred, gt), distances["hd95"], distances["asd"]


def all_metrics(result, reference, voxelspacing=None, tolerance=1.0, ignored=None):
    """A dict of every metric of two masks here by its function's name, for the price of one surface distance in each
    direction, and of the numbers of voxels 'tp', 'fp', 'fn' and 'tn'.

    `tolerance`: that of `nsd`, in the unit of `voxelspacing`. `ignored`: a mask of voxels that are in neither of the
    masks, nor outside them: they are no TN either.
    """
    result, reference = counted = _masks(result, reference)
    if ignored is not None:
        ignored = np.asarray(ignored, dtype=bool)
        if ignored.shape != result.shape:
            raise ValueError(f"what is ignored has shape {ignored.shape} and the masks have {result.shape}")
        counted = result[~ignored], reference[~ignored]
        result, reference = result & ~ignored, reference & ~ignored
    forth, back = _both_ways(result, reference, voxelspacing, connectivity=1)
    overlap = (dice, jaccard, precision, recall, specificity, accuracy, f1, volume_similarity)
    return {
        **{metric.__name__: metric(*counted) for metric in overlap},
        **_of_distances(forth, back),
        "nsd": _nsd(forth, back, tolerance, both_empty=not (result.any() or reference.any())),
        **dict(zip(("tp", "fp", "fn", "tn"), _counts(*counted), strict=True)),
    }
