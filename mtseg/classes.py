"""The classes of a data set, their names and their values or colours in masks, and masks turned into class numbers.

A data set's classes.json; all but the names may be left out:

    {
        "classes": [{"name": "matrix", "value": 0, "color": [0, 0, 0]}, {"name": "pore", "value": 1, "color": "other"}],
        "background": 0,
        "ignore": 255,
        "pixel_size": [0.1, 0.1, "um"]
    }

Classes are numbered in the file's order, the background first. `value`: in masks of numbers; a class's place in the
list where it is missing. `color`: in masks of colours; "other" for the one class that takes every colour which is no
other class's. `background`: the value of the class that metrics and losses leave out, null where all classes count;
where it is missing, 0 if a class has that value. `ignore`: the value of pixels that nobody labelled. `pixel_size`:
height, width and their unit.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

IGNORED = 255  # the number, in an array of class numbers, of pixels that nobody labelled
VALUES = 2**16
SNAP = 64  # farthest distance in RGB at which a colour is still taken for a class's where another class takes the rest
# Okabe and Ito, "Color Universal Design" (2008): told apart by the colour-blind, too.
OKABE_ITO = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
KEYS = {"classes", "background", "ignore", "pixel_size"}


class ClassError(ValueError):
    """Classes that contradict each other, or a mask that does not fit them; the message is one sentence."""


@dataclass(frozen=True)
class ClassTable:
    """The classes of a data set, by number; ClassError where they contradict each other.

    `names`, `values`, `colors`: a tuple each. A colour is (r, g, b), 0 to 255, or None. `background`: 0, or None where
    no class is one. `ignore`: a value, or None. `other`: the number of the class that takes the colours that are no
    other's, or None. `pixel_size`: (height, width, unit), or None.
    """

    names: tuple
    values: tuple
    colors: tuple
    background: int | None = None
    ignore: int | None = None
    other: int | None = None
    pixel_size: tuple | None = None

    def __post_init__(self):
        if not 2 <= len(self.names) <= IGNORED:
            raise ClassError(f"has {len(self.names)} classes; give 2 to {IGNORED}")
        for name in self.names:
            if not (isinstance(name, str) and name.strip() and name.isprintable()):
                raise ClassError(f"a class is called {name!r}; give it a name")
            if name == "mean":
                raise ClassError("a class is called 'mean', as the mean over the classes is in tables; rename it")
        for name, value in zip((*self.names, "ignore"), (*self.values, self.ignore), strict=True):
            if not (_whole(value, VALUES) or (value is None and name == "ignore")):
                raise ClassError(f"the value of {name!r} is {value!r}; give a whole number from 0 to {VALUES - 1}")
        for name, color in zip(self.names, self.colors, strict=True):
            if not (color is None or (len(color) == 3 and all(_whole(part, 256) for part in color))):
                raise ClassError(f'the color of {name!r} is {color!r}; give [r, g, b], each from 0 to 255, or "other"')
        for what, entries in ("name", self.names), ("value", (*self.values, self.ignore)), ("color", self.colors):
            given = [entry for entry in entries if entry is not None]
            twice = [entry for entry in given if given.count(entry) > 1]
            if twice:
                raise ClassError(f"two classes have the {what} {twice[0]!r}; give each its own")
        if self.pixel_size is not None:
            *sides, unit = self.pixel_size
            known = isinstance(unit, str) and unit.strip() and unit.isprintable()
            if not (known and len(sides) == 2 and all(map(_length, sides))):
                raise ClassError(f'pixel_size is {list(self.pixel_size)}; give [height, width, "unit"]')

    @classmethod
    def from_dict(cls, content):
        """The ClassTable of what classes.json holds (see above), or `to_dict` gave."""
        if not isinstance(content, dict) or not isinstance(content.get("classes"), list):
            raise ClassError('has no list "classes"; give {"classes": [{"name": ..., "value": ...}, ...]}')
        entries = content["classes"]
        for entry, keys in (content, KEYS), *((entry, {"name", "value", "color"}) for entry in entries):
            unknown = set(entry) - keys if isinstance(entry, dict) else {str(entry)}
            if unknown:
                raise ClassError(f"{min(unknown)!r} is not known; known are {', '.join(sorted(keys))}")
        classes = [(entry.get("name"), entry.get("value", i), entry.get("color")) for i, entry in enumerate(entries)]
        values = [value for _, value, _ in classes]
        background = content.get("background", 0 if 0 in values else None)
        if background is not None:
            if background not in values or isinstance(background, bool):
                raise ClassError(f"background is {background!r}, which is the value of no class; give one's, or null")
            classes.insert(0, classes.pop(values.index(background)))
        takes_rest = [number for number, (*_, color) in enumerate(classes) if color == "other"]
        if len(takes_rest) > 1:
            raise ClassError('two classes have the color "other"; one can take the rest')
        names, values, colors = zip(*classes, strict=True) if classes else ((), (), ())
        colors = [None if color == "other" else tuple(color) if isinstance(color, list) else color for color in colors]
        size = content.get("pixel_size")
        return cls(
            names,
            values,
            tuple(colors),
            None if background is None else 0,
            content.get("ignore"),
            takes_rest[0] if takes_rest else None,
            tuple(size) if isinstance(size, (list, tuple)) else size,
        )

    def to_dict(self):
        """What `from_dict` takes, ready for JSON."""
        classes = []
        for number, (name, value, color) in enumerate(zip(self.names, self.values, self.colors, strict=True)):
            color = "other" if number == self.other else color and list(color)
            classes.append({"name": name, "value": value, **({"color": color} if color else {})})
        return {
            "classes": classes,
            "background": None if self.background is None else self.values[0],
            "ignore": self.ignore,
            "pixel_size": self.pixel_size and list(self.pixel_size),
        }

    def foreground(self):
        """The numbers of the classes that metrics and losses count: all but the background."""
        return list(range(0 if self.background is None else 1, len(self.names)))

    def palette(self, by_value=False):
        """(256, 3) uint8: the colour of each class number, or, with `by_value`, of each value up to 255.

        Classes without a colour get one that the colour-blind can tell from the others, the background and the class
        that takes the rest black where no other class is. What is no class is white.
        """
        taken = {color for color in self.colors if color}
        free = (color for color in ((0, 0, 0), *OKABE_ITO, *_hues()) if color not in taken)
        colors = list(self.colors)
        first = {self.background, self.other} - {None}
        for number in sorted(range(len(colors)), key=lambda number: number not in first):
            if colors[number] is None:
                colors[number] = next(free)
        palette = np.full((VALUES, 3), 255, dtype=np.uint8)
        palette[list(self.values if by_value else range(len(colors)))] = colors
        return palette[:256]

    def to_values(self, index):
        """An array of class numbers as a mask's values, uint8 or uint16: what `to_index` turns back."""
        values = np.zeros(256, dtype=np.uint8 if max(*self.values, self.ignore or 0) < 256 else np.uint16)
        values[: len(self.values)] = self.values
        values[IGNORED] = self.ignore or 0
        return values[index]


def _whole(value, below):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < below


def _length(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _hues():
    """Colours without end, the golden angle of hue apart, each third darker or paler than the one before."""
    for number in range(VALUES):
        turn = 2 * math.pi * (0.6180339887498949 * number + np.arange(3) / 3)
        yield tuple(int(part) for part in np.rint((128 + 127 * np.cos(turn)) * (1 - number % 3 / 4)))


def read_classes(path):
    """The ClassTable in a classes.json, or in a dataset.json of nnU-Net or the Decathlon; ClassError with the file.

    A dataset.json's value of "ignore" is that of pixels that nobody labelled. A value that stands only in regions of
    several values is called "label <value>".
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if isinstance(content, dict) and "classes" not in content and isinstance(content.get("labels"), dict):
            content = _of_labels(content["labels"])
        return ClassTable.from_dict(content)
    except ClassError as error:
        raise ClassError(f"{path}: {error}") from error
    except OSError as error:
        raise ClassError(f"{path}: {error.strerror or 'cannot be read'}; give the file with the classes") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ClassError(f"{path}: not a file of classes ({' '.join(str(error).split())}); repair it") from error


def _of_labels(labels):
    """What classes.json would hold, of a dataset.json's {name: value} (nnU-Net v2) or {value: name} (Decathlon)."""
    names, ignore = {0: "background"}, None
    for name, value in labels.items():
        if isinstance(value, str):
            name, value = value, name
        values = [int(entry) for entry in (value if isinstance(value, list) else [value])]
        if name.lower() == "ignore":
            (ignore,) = values
        elif len(values) == 1:
            names[values[0]] = name
        else:
            names = {**{value: f"label {value}" for value in values}, **names}
    classes = [{"name": names[value], "value": value} for value in sorted(names)]
    return {"classes": classes, "background": 0, "ignore": ignore}


def to_index(mask, table, snap=False):
    """(class numbers of a mask's pixels, uint8 and IGNORED where nobody labelled; how many pixels were snapped).

    `mask`: whole numbers of any type, (H, W) or (S, H, W), or uint8 colours, (..., 3). False and True are the lower and
    the higher value of two classes. A mask of colours that are all grey, of which some are no class's but all are
    values, is one of values that a program widened; greys that are not all values, but all colours, are taken as such.

    ClassError, without the file's name, for a value or colour that is no class's. With `snap` such a pixel goes to the
    class with the nearest value or colour (Euclidean, in RGB) instead; where a class takes every other colour, those
    farther than SNAP from all others stay with it.
    """
    mask = np.asarray(mask)
    if mask.dtype == bool and len(table.values) == 2:
        mask = np.where(mask, np.uint16(max(table.values)), np.uint16(min(table.values)))
    values = {value: number for number, value in enumerate(table.values)}
    if table.ignore is not None:
        values[table.ignore] = IGNORED
    greys = {color[0]: number for number, color in enumerate(table.colors) if color and len(set(color)) == 1}
    if mask.ndim > 2 and mask.shape[-1] == 3 and mask.dtype == np.uint8:
        grey = mask[..., 0]
        widened = (mask == mask[..., :1]).all() and not _all_in(grey, greys) and _all_in(grey, values)
        return _look_up(grey, values, table, snap) if widened else _of_colors(mask, table, snap)
    mask = _whole_numbers(mask)
    drawn = greys and not _all_in(mask, values) and _all_in(mask, greys)
    return _look_up(mask, greys if drawn else values, table, snap)


def _all_in(codes, known):
    present = np.zeros(VALUES, dtype=bool)
    present[codes] = True
    present[list(known)] = False
    return not present.any()


def _whole_numbers(mask):
    """A mask of any type as uint8 or uint16."""
    if mask.dtype == bool:
        return mask.astype(np.uint8)
    if mask.dtype in (np.uint8, np.uint16):
        return mask
    if mask.dtype.kind not in "iuf" or (mask.dtype.kind == "f" and not (mask == np.rint(mask)).all()):
        raise ClassError("holds values that are no whole numbers; a mask holds the values of classes")
    for value in (mask.min(initial=0), mask.max(initial=0)):
        if not 0 <= value < VALUES:
            raise ClassError(f"holds the value {value:.0f}, values go from 0 to {VALUES - 1}; correct the mask")
    return mask.astype(np.uint16)


def _of_colors(mask, table, snap):
    numbers = {(r << 16) + (g << 8) + b: n for n, (r, g, b) in ((n, c) for n, c in enumerate(table.colors) if c)}
    if not numbers:
        raise ClassError("is in colors, but the classes have none; give each its color, or save the mask by values")
    codes = mask[..., 0].astype(np.uint32)
    for part in (1, 2):
        codes = (codes << 8) | mask[..., part]
    return _look_up(codes, numbers, table, snap, colors=True)


def _look_up(codes, numbers, table, snap, colors=False):
    """As `to_index`, of an array of values, or of packed colours, and the class number of each that is known."""
    rest = table.other if colors else None
    known = np.array(list(numbers))
    lookup = np.full(2**24 if colors else VALUES, IGNORED if rest is None else rest, dtype=np.uint8)
    lookup[known] = list(numbers.values())
    if rest is not None and not snap:
        return lookup[codes], 0
    present = np.zeros(len(lookup), dtype=bool)
    present[codes] = True
    present[known] = False
    unknown = np.flatnonzero(present)
    if not unknown.size:
        return lookup[codes], 0
    shifts = np.array([16, 8, 0] if colors else [0])
    points, classes = (((given[:, None] >> shifts) & (255 if colors else VALUES - 1)) for given in (unknown, known))
    nearest, distance = np.zeros(len(unknown), dtype=int), np.full(len(unknown), np.inf)
    for place, point in enumerate(classes):
        to_this = np.sqrt(((points - point) ** 2).sum(1))
        nearest[to_this < distance] = place
        distance = np.minimum(distance, to_this)
    if not snap:
        counts = [np.count_nonzero(codes == code) for code in unknown[:1000]]
        most = int(np.argmax(counts))
        number = numbers[int(known[nearest[most]])]
        what = f"the color {tuple(points[most].tolist())}" if colors else f"the value {unknown[most]}"
        others = f" and others {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ClassError(
            f"{counts[most]} pixels have {what}{others}, which is no class's, the nearest is "
            f"{'ignore' if number == IGNORED else repr(table.names[number])}; correct the mask or the classes, or take "
            f"the nearest with --snap"
        )
    if rest is not None:
        unknown, nearest = unknown[distance <= SNAP], nearest[distance <= SNAP]
    lookup[unknown] = lookup[known[nearest]]
    present[:] = False
    present[unknown] = True
    return lookup[codes], int(np.count_nonzero(present[codes]))
