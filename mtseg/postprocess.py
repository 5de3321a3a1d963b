"""Cleaning up a segmentation. Both functions take a label map of integers, 0 for background, and return a new one."""

import numpy as np
from scipy import ndimage


def largest_component(label_map):
    """Of each class only its largest connected piece; what is taken away becomes background.

    Voxels are connected across faces, edges and corners (26 neighbours in a volume), as in LASeg's clean-up. Of pieces
    of the same size the first in the array's order stays.
    """
    result = np.zeros_like(label_map)
    neighbours = np.ones((3,) * label_map.ndim)
    for value in np.unique(label_map[label_map > 0]):
        pieces, _ = ndimage.label(label_map == value, neighbours)
        result[pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:])] = value
    return result


def fill_holes(label_map):
    """Background that one class encloses on all sides becomes that class; other classes in it stay what they are.

    Enclosed means that no path across faces leads from there through anything but the class to the array's border.
    """
    result = label_map.copy()
    for value in np.unique(label_map[label_map > 0]):
        filled = ndimage.binary_fill_holes(label_map == value)
        result[filled & (label_map == 0)] = value
    return result
