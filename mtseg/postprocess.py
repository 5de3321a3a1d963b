"""Cleaning up a segmentation. All functions take label maps of integers from 0, the background, and return new ones."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy import ndimage


def largest_component(label_map):
    """Of each class only its largest connected piece; what is taken away becomes background.

    Voxels are connected across faces, edges and corners (26 neighbours in a volume), as in LASeg's clean-up. Of pieces
    of the same size the first in the array's order stays.
    """
    result = np.zeros_like(label_map)
    numbers = label_map.astype(np.uint8) if label_map.dtype == bool else label_map
    for value, box in enumerate(ndimage.find_objects(numbers), start=1):
        if box is not None:
            pieces, _ = ndimage.label(label_map[box] == value, np.ones((3,) * label_map.ndim))
            result[box][pieces == 1 + np.bincount(pieces.ravel())[1:].argmax()] = value
    return result


def largest_components(labels):
    """`largest_component` of each sample of a tensor of labels (N, *spatial), each below 256, on its device.

    BCP's cleaning of pseudo-labels (Bai et al., CVPR 2023, arXiv:2305.00673, section 3). SciPy does it on the CPU, on a
    copy of a byte a voxel, for which a GPU is waited for; several samples side by side.
    """
    samples = labels.to("cpu", torch.uint8).numpy()
    with ThreadPoolExecutor() as threads:
        cleaned = np.stack([*threads.map(largest_component, samples)])
    return torch.from_numpy(cleaned).to(labels, non_blocking=True)


def fill_holes(label_map):
    """Background that one class encloses on all sides becomes that class; other classes in it stay what they are.

    Enclosed means that no path across faces leads from there through anything but the class to the array's border. Of
    classes that enclose each other, and it, it becomes the innermost.
    """
    result, pieces = label_map.copy(), []
    for value in np.unique(label_map[label_map > 0]):
        filled, _ = ndimage.label(ndimage.binary_fill_holes(label_map == value))
        for number, box in enumerate(ndimage.find_objects(filled), start=1):
            piece = filled[box] == number
            if (hole := piece & (label_map[box] == 0)).any():
                pieces.append((np.count_nonzero(piece), value, box, hole))
    for _, value, box, hole in sorted(pieces, key=lambda piece: -piece[0]):  # what is enclosed is smaller
        result[box][hole] = value
    return result
