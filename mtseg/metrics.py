"""Overlap and surface distance of binary masks, equal to MedPy's; without its exceptions on empty masks.

`result` and `reference` are arrays of the same shape with any number of dimensions, non-zero (or True) inside.
Distances are in the unit of `voxelspacing` (one number, or one per axis; millimetres where that is the spacing in
millimetres), or in voxels without it. A surface voxel is a voxel of the mask with a neighbour across a face outside
the mask; the array's border counts as outside.

Empty masks: where one mask is empty, Dice and Jaccard are 0 and the distances NaN. Where both are, Dice and Jaccard
are 1, as MedPy has it, and the distances NaN. Neither kind of case says what the others say: count them (`is_empty`).
"""

import numpy as np
from scipy import ndimage


def _masks(result, reference):
    result, reference = np.asarray(result).astype(bool), np.asarray(reference).astype(bool)
    if result.shape != reference.shape:
        raise ValueError(f"masks of different shape: {result.shape} and {reference.shape}")
    return result, reference


def is_empty(result, reference):
    """True if at least one of the masks has no voxel, so that distances between them are NaN."""
    return not (np.any(result) and np.any(reference))


def dice(result, reference):
    """2 |A and B| / (|A| + |B|), in [0, 1]; 1.0 where both masks are empty (MedPy: dc)."""
    result, reference = _masks(result, reference)
    total = np.count_nonzero(result) + np.count_nonzero(reference)
    return 2.0 * np.count_nonzero(result & reference) / total if total else 1.0


def jaccard(result, reference):
    """|A and B| / |A or B|, in [0, 1]; 1.0 where both masks are empty (MedPy: jc)."""
    result, reference = _masks(result, reference)
    union = np.count_nonzero(result | reference)
    return np.count_nonzero(result & reference) / union if union else 1.0


def surface_distances(result, reference, voxelspacing=None, connectivity=1):
    """For each surface voxel of `result`, the distance to the nearest one of `reference`; both must not be empty.

    `connectivity`: which neighbours make a voxel a surface voxel: 1 across faces, up to ndim across corners too.
    """
    result, reference = _masks(result, reference)
    # Neither surfaces nor distances between them depend on what lies outside the masks' common bounding box.
    box = ndimage.find_objects((result | reference).astype(np.uint8))[0]
    result, reference = result[box], reference[box]
    neighbours = ndimage.generate_binary_structure(result.ndim, connectivity)
    surface = result & ~ndimage.binary_erosion(result, neighbours)
    target = reference & ~ndimage.binary_erosion(reference, neighbours)
    distance = ndimage.distance_transform_edt(~target, sampling=voxelspacing)
    return distance[surface]


def hd(result, reference, voxelspacing=None, connectivity=1):
    """Hausdorff distance: the largest surface distance, in either direction; >= 0, NaN where a mask is empty."""
    if is_empty(result, reference):
        return float("nan")
    there = surface_distances(result, reference, voxelspacing, connectivity)
    back = surface_distances(reference, result, voxelspacing, connectivity)
    return float(max(there.max(), back.max()))


def hd95(result, reference, voxelspacing=None, connectivity=1):
    """The 95th percentile of the surface distances of both directions taken together; NaN where a mask is empty."""
    if is_empty(result, reference):
        return float("nan")
    there = surface_distances(result, reference, voxelspacing, connectivity)
    back = surface_distances(reference, result, voxelspacing, connectivity)
    return float(np.percentile(np.hstack((there, back)), 95))


def asd(result, reference, voxelspacing=None, connectivity=1):
    """Average distance from the surface of `result` to that of `reference`, not symmetric; NaN where one is empty."""
    if is_empty(result, reference):
        return float("nan")
    return float(surface_distances(result, reference, voxelspacing, connectivity).mean())


def assd(result, reference, voxelspacing=None, connectivity=1):
    """The mean of the surface distances of both directions taken together, as in MedPy; NaN where a mask is empty."""
    if is_empty(result, reference):
        return float("nan")
    there = surface_distances(result, reference, voxelspacing, connectivity)
    back = surface_distances(reference, result, voxelspacing, connectivity)
    return float(np.hstack((there, back)).mean())


def calculate_metric_percase(pred, gt, voxelspacing=None):
    """(dice, jaccard, hd95, asd) of one case, as in UA-MT's tables; NaN distances where a mask is empty."""
    if is_empty(pred, gt):
        return dice(pred, gt), jaccard(pred, gt), float("nan"), float("nan")
    there, back = surface_distances(pred, gt, voxelspacing), surface_distances(gt, pred, voxelspacing)
    return dice(pred, gt), jaccard(pred, gt), float(np.percentile(np.hstack((there, back)), 95)), float(there.mean())
