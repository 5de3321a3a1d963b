"""Rows: the metrics of a case."""

import numpy as np
import torch
import torch.nn.functional as F
from measure import by_turns, differences, has, row

from mtseg import metrics


def blobs(shape, seed):
    """Two masks that overlap mostly, a chamber of a tenth of the volume's side with a rough surface."""
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij", sparse=True)
    coarse = rng.standard_normal((2, *(n // 12 + 2 for n in shape))).astype(np.float32)
    masks = []
    for rough, shift in zip(coarse, (0.0, 0.05), strict=True):
        rough = F.interpolate(torch.from_numpy(rough)[None, None], shape, mode="trilinear", align_corners=True)
        masks.append(np.sqrt(sum((axis - shift) ** 2 for axis in grid)) + 0.06 * rough[0, 0].numpy() < 0.5)
    return masks


def case_metrics(quick, scratch):
    """Dice, Jaccard, HD95 and ASD of one case: as in LA, dense, far apart, large."""
    shape = (40, 36, 24) if quick else (183, 140, 88)
    yield metrics_row("of LA's size", blobs(shape, 0), {"MedPy": 10, "MONAI": 3}, 2 if quick else 7)
    noise = np.random.default_rng(0).random((2, *shape)) < 0.5
    yield metrics_row("dense, every voxel by chance", noise, {"MedPy": 1}, 2 if quick else 3)
    corners = np.zeros((2, *shape), dtype=bool)
    corners[0, 1:16, 1:16, 1:16] = corners[1, -16:-1, -16:-1, -16:-1] = True
    yield metrics_row("small, in opposite corners", corners, {"MedPy": 1}, 2 if quick else 3)
    full = np.ones((2, *shape), dtype=bool)
    full[1, 4:8, 4:8, 4:8] = False
    yield metrics_row("full but for a hole", full, {"MedPy": 1}, 2 if quick else 3)
    side = 48 if quick else 256
    yield metrics_row(f"of {side}^3 voxels", blobs((side, side, side), 0), {"MedPy": 1}, 2)


def metrics_row(words, masks, faster_than, rounds):
    """The metrics of one case, `masks` = (result, reference); beside MONAI where a goal names it."""
    result, reference = masks
    differs, ways = [], {"mtseg": lambda _: metrics.calculate_metric_percase(result, reference)}
    if has("medpy"):
        from medpy.metric import binary

        def theirs(_=None):
            functions = (binary.dc, binary.jc, binary.hd95, binary.asd)
            return [function(result, reference) for function in functions]

        ours = metrics.calculate_metric_percase(result, reference)
        differs = differences("metrics of mtseg and MedPy", ours, theirs(), rtol=1e-9)
        ways["MedPy"] = theirs
    if has("monai") and "MONAI" in faster_than:
        from monai.metrics import (
            compute_average_surface_distance,
            compute_dice,
            compute_hausdorff_distance,
            compute_iou,
        )

        def monais(_):
            a, b = (torch.from_numpy(mask)[None, None].float() for mask in (result, reference))
            compute_dice(a, b), compute_iou(a, b)
            compute_hausdorff_distance(a, b, include_background=True, percentile=95)
            compute_average_surface_distance(a, b, include_background=True)

        ways["MONAI"] = monais
    times = by_turns(ways, rounds)
    note = "" if has("medpy") else "MedPy not measured: pip install medpy"
    return row(f"metrics: dice, jaccard, hd95, asd of masks {words}", times, note, faster_than, differs)
