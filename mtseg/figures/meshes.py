"""Masks as surfaces in three dimensions. Needs Matplotlib and scikit-image."""

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from mtseg.figures.canvas import WIDTH, FigureError

VIEWS = ((20, -60), (20, 120))  # elevation and azimuth in degrees


def surface(mask, spacing=(1, 1, 1)):
    """(vertices (N, 3) in the unit of `spacing`, faces (M, 3)) of a mask by marching cubes; needs scikit-image.

    The mask is blurred a little first, so that the surface shows the shape and not the voxels' steps; a mask
    that the blur would make vanish is taken as it is. Raises FigureError for an empty mask.
    """
    try:
        from skimage.measure import marching_cubes
    except ImportError as error:
        raise FigureError('surfaces need scikit-image: pip install "mtseg[plot]"') from error
    mask = np.pad(np.asarray(mask) > 0, 3).astype(np.float32)
    if not mask.any():
        raise FigureError("an empty mask has no surface; choose another case by --case")
    blurred = ndimage.gaussian_filter(mask, 0.8)
    # About 30 thousand triangles are as many as a printed panel shows and Matplotlib draws in seconds.
    step = max(1, round((np.count_nonzero(mask) ** (2 / 3) / 2500) ** 0.5))
    volume = blurred if blurred.max() > 0.5 else mask
    # "ascent": the triangles' normals point outwards, as shading needs them.
    how = {"spacing": tuple(map(float, spacing)), "step_size": step, "gradient_direction": "ascent"}
    vertices, faces, _, _ = marching_cubes(volume, 0.5, **how)
    return vertices - 3 * np.asarray(spacing, dtype=float), faces


def distances_to(reference, found):
    """(M,) the distance of the middle of each triangle of the surface `found` to the nearest corner, or middle, of one
    of the surface `reference`, both (vertices, faces) as `surface` gives them and in its unit."""
    (points, triangles), (vertices, faces) = reference, found
    nearest = cKDTree(np.concatenate([points, points[triangles].mean(axis=1)]))
    return nearest.query(vertices[faces].mean(axis=1))[0]


def surfaces(label, predictions, captions, spacing=(1, 1, 1), unit="voxel"):
    """Label and predictions as surfaces: a column for the label and for each method, a row for each of the VIEWS. Each
    prediction is coloured by the distance to the label's surface, in `unit`. All classes are one surface; an empty
    prediction is an empty place.

    `predictions`: {method: mask (W, H, D)}; `captions`: {method: text}.
    """
    from matplotlib import pyplot as plt
    from matplotlib.colors import LightSource
    from mpl_toolkits.mplot3d.art3d import Poly3DCollection

    reference = surface(label, spacing)
    shapes = [("label", *reference, None)]
    for name, mask in predictions.items():
        if not np.any(mask):
            shapes.append((f"{name}\n{captions[name]}\nempty", None, None, None))
            continue
        vertices, faces = surface(mask, spacing)
        shapes.append((f"{name}\n{captions[name]}", vertices, faces, distances_to(reference, (vertices, faces))))
    limit = max([np.percentile(distances, 99) for *_, distances in shapes if distances is not None] + [1.0])
    low = np.min([vertices.min(axis=0) for _, vertices, _, _ in shapes if vertices is not None], axis=0)
    high = np.max([vertices.max(axis=0) for _, vertices, _, _ in shapes if vertices is not None], axis=0)

    side, below = WIDTH / len(shapes), 0.7
    above = 0.12 + 0.17 * (2 + max(text.count("\n") for text, *_ in shapes))
    row_height = 0.66 * side
    height = above + len(VIEWS) * row_height + below
    figure = plt.figure(figsize=(WIDTH, height))
    colours, norm = plt.get_cmap("YlGnBu"), plt.Normalize(0, limit)
    for column, (text, vertices, faces, distances) in enumerate(shapes):
        figure.text((column + 0.5) / len(shapes), 1 - 0.05 / height, text, ha="center", va="top")
        if vertices is None:
            continue
        base = np.full((len(faces), 3), 0.85) if distances is None else colours(norm(distances))
        for row, (elevation, azimuth) in enumerate(VIEWS):
            # Matplotlib keeps a wide margin inside three-dimensional axes: they are drawn larger than their place.
            x, y = (column + 0.5) * side, below + (len(VIEWS) - row - 0.5) * row_height
            box = ((x - 0.61 * side) / WIDTH, (y - 0.61 * side) / height, 1.22 * side / WIDTH, 1.22 * side / height)
            axes = figure.add_axes(box, projection="3d", facecolor="none")
            # Matplotlib's azimuth of a light is a compass's. The light comes from beside the viewer.
            light = LightSource(90 - (azimuth + 20), elevation + 15)
            # Edges in the faces' own colours close the hairlines between neighbouring triangles.
            style = {"facecolors": base, "edgecolors": base, "linewidths": 0.4}
            drawn = Poly3DCollection(vertices[faces], shade=True, lightsource=light, **style)
            axes.add_collection3d(drawn)
            drawn.set_clip_on(False)
            axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), zlim=(low[2], high[2]))
            axes.set_box_aspect(high - low)
            axes.view_init(elevation, azimuth)
            axes.set_axis_off()
            axes.set_in_layout(False)
    bar = figure.add_axes((0.25, 0.28 / height, 0.5, 0.12 / height))
    scale = plt.cm.ScalarMappable(norm, colours)
    figure.colorbar(scale, cax=bar, orientation="horizontal", extend="max")
    bar.set_title(f"distance to the label's surface ({unit})", fontsize=8.5, pad=3)
    return figure
