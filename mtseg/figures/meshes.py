"""Masks as surfaces in three dimensions. Needs Matplotlib and scikit-image."""

import numpy as np
from scipy import ndimage

VIEWS = ((20, -60), (20, 120))


class MeshError(ValueError):
    """A surface that cannot be drawn; the message is one sentence with the remedy."""


def surface(mask, spacing=(1, 1, 1), smooth=0.8):
    """(vertices (N, 3) in the unit of `spacing`, faces (M, 3)) of a mask by marching cubes; needs scikit-image.

    The mask is blurred by `smooth` voxels first, so that the surface shows the shape and not the voxels' steps; a mask
    that the blur would make vanish is taken as it is. Raises MeshError for an empty mask.
    """
    try:
        from skimage.measure import marching_cubes
    except ImportError as error:
        raise MeshError('surfaces need scikit-image: pip install "mtseg[plot]"') from error
    mask = np.pad(np.asarray(mask) > 0, 3).astype(np.float32)
    if not mask.any():
        raise MeshError("an empty mask has no surface; choose another case by --case")
    blurred = ndimage.gaussian_filter(mask, smooth)
    # About 30 thousand triangles are as many as a printed panel shows and Matplotlib draws in seconds.
    step = max(1, round((np.count_nonzero(mask) ** (2 / 3) / 2500) ** 0.5))
    volume = blurred if blurred.max() > 0.5 else mask
    # "ascent": the triangles' normals point outwards, as shading needs them.
    how = {"spacing": tuple(map(float, spacing)), "step_size": step, "gradient_direction": "ascent"}
    vertices, faces, _, _ = marching_cubes(volume, 0.5, **how)
    return vertices - 3 * np.asarray(spacing, dtype=float), faces


def surfaces(label, predictions, captions=None, spacing=(1, 1, 1), unit="voxel", views=VIEWS, width=7.0):
    """Label and predictions as surfaces: a column for the label and for each method, a row for each of the `views`
    (elevation, azimuth in degrees). Each prediction is coloured by the distance to the label's surface, in `unit`. All
    classes are one surface.

    `predictions`: {method: mask (W, H, D)}; `captions`: {method: text}.
    """
    from matplotlib import pyplot as plt
    from matplotlib.colors import LightSource
    from mpl_toolkits.mplot3d.art3d import Poly3DCollection

    label = np.asarray(label) > 0
    distance = sum(ndimage.distance_transform_edt(mask, sampling=spacing) for mask in (label, ~label))
    # From the centre of a voxel on either side, the surface between them is half a voxel away.
    distance -= 0.5 * min(spacing)

    shapes = {"label": (*surface(label, spacing), None)}
    for name, mask in predictions.items():
        vertices, faces = surface(mask, spacing)
        centres = vertices[faces].mean(axis=1) / np.asarray(spacing)
        shapes[name] = (vertices, faces, ndimage.map_coordinates(distance, centres.T, order=1, mode="nearest"))
    limit = max([np.percentile(d, 99) for _, _, d in shapes.values() if d is not None] + [1.0])
    texts = [f"{name}\n{(captions or {}).get(name, '')}".rstrip() for name in shapes]
    low = np.min([v.min(axis=0) for v, _, _ in shapes.values()], axis=0)
    high = np.max([v.max(axis=0) for v, _, _ in shapes.values()], axis=0)

    columns = len(shapes)
    side, above, below = width / columns, 0.12 + 0.17 * (1 + max(t.count("\n") + 1 for t in texts)), 0.7
    row_height = 0.66 * side
    total = above + len(views) * row_height + below
    figure = plt.figure(figsize=(width, total))
    colours, norm = plt.get_cmap("YlGnBu"), plt.Normalize(0, limit)
    for row, (elevation, azimuth) in enumerate(views):
        for column, (vertices, faces, distances) in enumerate(shapes.values()):
            # Matplotlib keeps a wide margin inside three-dimensional axes: they are drawn larger than their place.
            middle = ((column + 0.5) * side, below + (len(views) - row - 0.5) * row_height)
            box = [middle[0] - 0.61 * side, middle[1] - 0.61 * side, 1.22 * side, 1.22 * side]
            box = [value / length for value, length in zip(box, (width, total, width, total), strict=True)]
            axes = figure.add_axes(box, projection="3d", facecolor="none")
            base = np.full((len(faces), 3), 0.85) if distances is None else colours(norm(distances))
            # Matplotlib's azimuth of a light is a compass's. The light comes from beside the viewer.
            light = LightSource(90 - (azimuth + 20), elevation + 15)
            # Edges in the faces' own colours close the hairlines between neighbouring triangles.
            style = {"facecolors": base, "edgecolors": base, "linewidths": 0.4}
            drawn = Poly3DCollection(vertices[faces], shade=True, lightsource=light, **style)
            axes.add_collection3d(drawn)
            drawn.set_clip_on(False)
            for setter, a, b in zip((axes.set_xlim, axes.set_ylim, axes.set_zlim), low, high, strict=True):
                setter(a, b)
            axes.set_box_aspect(high - low)
            axes.view_init(elevation, azimuth)
            axes.set_axis_off()
            axes.set_in_layout(False)
    for column, text in enumerate(texts):
        figure.text((column + 0.5) / columns, 1 - 0.05 / total, text, ha="center", va="top")
    bar = figure.add_axes((0.25, 0.28 / total, 0.5, 0.12 / total))
    scale = plt.cm.ScalarMappable(norm, colours)
    figure.colorbar(scale, cax=bar, orientation="horizontal", extend="max")
    bar.set_title(f"distance to the label's surface ({unit})", fontsize=8.5, pad=3)
    return figure
