"""A case as pixels, without Matplotlib: the image in grey, and classes in colour over it."""

import numpy as np

from mtseg.classes import IGNORED, OKABE_ITO

# The colours of class numbers where nobody has chosen any; that of the background is not drawn.
PALETTE = np.array([(0, 0, 0), *OKABE_ITO * 37][:256], dtype=np.uint8)
OPACITY = 0.6
LARGEST = 700  # pixels of a panel's longer side


def case_picture(image, label, prediction, palette=None, axis=2, background=0):
    """Image, label and prediction side by side, uint8 (H, W', 3); large ones are thinned to LARGEST pixels a panel.

    `image`: (H, W) or (C, H, W), a volume (W, H, D) or a stack (S, H, W), or with channels in front; three channels are
    red, green and blue, else the first is drawn. `label`, `prediction`: class numbers, without channels; IGNORED has no
    colour. Of volume and stack the slice across `axis` with most labelled voxels is drawn: 2 of a volume, 0 of a stack.
    `palette`: uint8 (256, 3), the colour of each class number. `background`: the class without a colour, or None.
    """
    image, label, prediction = map(np.asarray, (image, label, prediction))
    if label.ndim == 3:
        index = largest_section(label, background)[axis]
        image, label, prediction = (upright(array, axis, index) for array in (image, label, prediction))
    step = -(-max(label.shape) // LARGEST)
    image, label, prediction = (array[..., ::step, ::step] for array in (image, label, prediction))
    picture, palette = grey(image), PALETTE if palette is None else visible(palette)
    panels = [picture, *(in_colors(picture, mask, palette, background) for mask in (label, prediction))]
    gap = np.full((len(picture), 4, 3), 255, dtype=np.uint8)
    return np.concatenate([panels[0], gap, panels[1], gap, panels[2]], axis=1)


def largest_section(label, background=0):
    """Along each axis of a mask the slice in which most voxels are of a class, but `background`; else the middle."""
    labelled = is_drawn(label, background)
    if not labelled.any():
        return tuple(side // 2 for side in label.shape)
    others = ((1, 2), (0, 2), (0, 1))
    return tuple(int(labelled.sum(axis=axes).argmax()) for axes in others)


def is_drawn(mask, background):
    return (mask != IGNORED) & (mask != (IGNORED if background is None else background))


def upright(array, axis, index):
    """Slice `index` across `axis` of a stack (.., S, H, W), axis 0, as it is, or of a volume (.., W, H, D) with its
    first axis from left to right and its second from below."""
    cut = np.take(array, index, axis=axis - 3)
    return cut if axis == 0 else np.swapaxes(cut, -2, -1)[..., ::-1, :]


def grey(image):
    """An image (H, W) or (C, H, W) as uint8 (H, W, 3), from black at its 1st percentile to white at its 99.5th.

    Three channels are red, green and blue; of others the first is drawn.
    """
    channels = image if image.ndim == 3 else image[None]
    image = np.moveaxis(channels if len(channels) == 3 else channels[:1], 0, -1)
    low, high = np.percentile(image, [1, 99.5])
    scaled = (image.astype(np.float32) - low) * (255 / max(high - low, 1e-9))
    return np.broadcast_to(np.clip(scaled, 0, 255).astype(np.uint8), (*image.shape[:2], 3))


def visible(palette):
    """`palette` with colours in place of greys, which would not show over an image; that of class 0 stays."""
    palette = np.array(palette)
    is_grey = (palette == palette[:, :1]).all(axis=1)
    is_grey[0] = False
    free = [color for color in OKABE_ITO if color not in set(map(tuple, palette[~is_grey].tolist()))] or OKABE_ITO
    palette[is_grey] = np.resize(free, (np.count_nonzero(is_grey), 3))
    return palette


def in_colors(picture, mask, palette, background=0, opacity=OPACITY):
    """A picture (H, W, 3) with the colours of the classes in `mask` (H, W) over it, where they are not `background`."""
    drawn = is_drawn(mask, background)
    colors = palette[np.where(drawn, mask, 0)]
    mixed = np.rint((1 - opacity) * picture + opacity * colors).astype(np.uint8)
    return np.where(drawn[..., None], mixed, picture)
