"""Pictures of a case for an annotator, drawn with NumPy: what is predicted, how unsure it is, and where to look.

`spatial`, `axis` and boxes are as in annotators.py.
"""

import numpy as np

from mtseg.script.snapshot import in_colors

PLANE = {None: (0, 1), 0: (1, 2), 2: (1, 0)}  # by axis: which axes run down and to the right in a picture of a slice
VIRIDIS = ((68, 1, 84), (71, 45, 123), (59, 82, 139), (44, 114, 142), (33, 145, 140), (40, 174, 128))
VIRIDIS += ((94, 201, 98), (173, 220, 48), (253, 231, 37))
DIGITS = (0o75557, 0o26227, 0o71747, 0o71717, 0o55711, 0o74717, 0o74757, 0o71111, 0o75757, 0o75717)  # rows of 3 dots
SIDE = 256  # pixels: slices of which both sides are at most half as large are shown larger


def grey(channel):
    """uint8: all but the darkest and the brightest 0.5 % of the values spread over 0 to 255."""
    low, high = np.percentile(channel, (0.5, 99.5))
    return (255 * np.clip((channel - low) / max(high - low, 1e-12), 0, 1)).astype(np.uint8)


def slice_of(array, axis, number):
    """Slice `number` of `array` (*spatial), the rows of a picture first; of an image the whole."""
    return array if axis is None else array[number] if axis == 0 else array[:, :, number].T


def colours(channels, prediction, axis, table):
    """The function that draws slice `number` of an image (C, *spatial): the first channel in grey, or three of an image
    in their colours, and over it the `prediction`, class numbers (*spatial) or None, in the colours of the `table`."""
    palette, shown = table.palette(), channels if len(channels) == 3 and axis is None else channels[:1]
    shown = [grey(channel) for channel in shown]

    def draw(number):
        picture = np.stack([slice_of(channel, axis, number) for channel in shown] * (3 // len(shown)), -1)
        if prediction is None:
            return picture
        return in_colors(picture, slice_of(prediction, axis, number), palette, table.background, opacity=0.45)

    return draw


def heat(values):
    """uint8 (..., 3): the colours of numbers from 0, dark blue, over green to 1, yellow: Matplotlib's viridis."""
    places = np.linspace(0, 1, len(VIRIDIS))
    parts = [np.interp(values, places, part).round() for part in zip(*VIRIDIS, strict=True)]
    return np.stack(parts, -1).astype(np.uint8)


def shown_slices(axis, boxes):
    """The numbers of the slices that are shown: of a thin box every one, else three through its middle; [None] of an
    image."""
    if axis is None:
        return [None]
    spans = [(start[axis], stop[axis]) for start, stop in boxes]
    return sorted({first + (last - first) * k // 4 for first, last in spans for k in (1, 2, 3)})


def montage(shape, axis, boxes, draw, scale=False):
    """A picture (H, W, 3) of a case's slices side by side, their numbers, from 1, above them, and the boxes framed.

    `shape`: of the case. `draw(number)`: the picture of a slice. `scale`: with a bar from 0 to 1.
    """
    tiles, (down, right) = [], PLANE[axis]
    times = max(1, SIDE // max(shape[down], shape[right]))
    for number in shown_slices(axis, boxes):
        tile = draw(number).repeat(times, 0).repeat(times, 1)
        thick = 1 + max(tile.shape) // 500
        for start, stop in boxes:
            if number is None or start[axis] <= number < stop[axis]:
                for inset, brightness in (0, 255), (thick, 0):  # seen on bright and on dark
                    ends = [(times * start[a] + inset, max(times * stop[a] - inset, 0)) for a in (down, right)]
                    frame = tile[slice(*ends[0]), slice(*ends[1])]
                    for side in frame[:thick], frame[-thick:], frame[:, :thick], frame[:, -thick:]:
                        side[...] = brightness
        if number is not None:
            title = np.zeros((14, tile.shape[1], 3), np.uint8)
            stamp(title, number + 1, 2, 2)
            tile = np.concatenate([title, tile])
        tiles.append(np.pad(tile, ((0, 4), (0, 4), (0, 0)), constant_values=255))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % 4 if len(tiles) > 4 else 0)
    picture = np.concatenate([np.concatenate(tiles[row : row + 4], 1) for row in range(0, len(tiles), 4)])
    if scale:
        bar = np.zeros((len(picture), 28, 3), np.uint8)
        bar[:, :16] = heat(np.linspace(1, 0, len(picture)))[:, None]
        stamp(bar, 1, 2, 18)
        stamp(bar, 0, len(picture) - 12, 18)
        picture = np.concatenate([picture, bar], 1)
    return picture


def stamp(picture, number, top, left):
    """Draw a number in white into `picture`, 10 pixels high."""
    for place, digit in enumerate(map(int, str(number))):
        dots = np.array([DIGITS[digit] >> bit & 1 for bit in range(14, -1, -1)]).reshape(5, 3, 1)
        corner = picture[top : top + 10, left + 8 * place : left + 8 * place + 6]
        corner[...] = 255 * dots.repeat(2, 0).repeat(2, 1)[: len(corner), : corner.shape[1]]
