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
from itertools import chain
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree

IGNORED = 255  # the number, among class numbers, of pixels that nobody labelled
VALUES = 2**16
SNAP = 64  # the farthest in RGB at which a colour is taken for a class's where another class takes the rest
# Okabe and Ito, "Color Universal Design" (2008), told apart by the colour-blind, too; the lighter ones first.
OKABE_ITO = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (204, 121, 167), (213, 94, 0), (0, 114, 178))
KEYS = ({"classes", "background", "ignore", "pixel_size"}, {"name", "value", "color"})


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
        values = [*self.values, *([] if self.ignore is None else [self.ignore])]
        colors = [color for color in self.colors if color is not None]
        if not 2 <= len(self.names) <= IGNORED:
            raise ClassError(f"has {len(self.names)} classes; give 2 to {IGNORED}")
        for name in self.names:
            if not _is_text(name) or name == "mean":
                raise ClassError(f"a class is called {name!r}; give it a name ('mean' is the mean over the classes)")
        for value in values:
            if not _is_whole(value, VALUES):
                raise ClassError(f"{value!r} is the value of a class; give whole numbers from 0 to {VALUES - 1}")
        for color in colors:
            if not (isinstance(color, tuple) and len(color) == 3 and all(_is_whole(part, 256) for part in color)):
                raise ClassError(f'{color!r} is the color of a class; give [r, g, b], 0 to 255, or "other"')
        for what, given in ("name", self.names), ("value", values), ("color", colors):
            for entry in given:
                if given.count(entry) > 1:
                    raise ClassError(f"two classes have the {what} {entry!r}; give each its own")
        if self.other is not None and not colors:
            raise ClassError('a class has the color "other", and no class another; give the others theirs')
        size = self.pixel_size
        sides = size[:2] if isinstance(size, tuple) and len(size) == 3 and _is_text(size[2]) else [None]
        if size is not None and not all(type(side) in (int, float) and 0 < side < math.inf for side in sides):
            raise ClassError(f'pixel_size is {size!r}; give [height, width, "unit"], both above 0')

    @classmethod
    def from_dict(cls, content):
        """The ClassTable of what a classes.json holds, or `to_dict` gave; ClassError."""
        if not isinstance(content, dict) or not isinstance(content.get("classes"), list):
            raise ClassError('has no list of classes; give {"classes": [{"name": ..., "value": ...}, ...]}')
        for entry, keys in (content, KEYS[0]), *((entry, KEYS[1]) for entry in content["classes"]):
            unknown = set(entry) - keys if isinstance(entry, dict) else {repr(entry)}
            if unknown:
                raise ClassError(f"holds {min(unknown)}, which is not known; known are {', '.join(sorted(keys))}")
        classes = [
            (entry.get("name"), entry.get("value", place), _as_tuple(entry.get("color")))
            for place, entry in enumerate(content["classes"])
        ]
        values = [value for _, value, _ in classes]
        background = content.get("background", 0 if 0 in values else None)
        if background is not None:
            if background not in values:
                raise ClassError(f"background is {background!r}, the value of no class; give one's value, or null")
            classes.insert(0, classes.pop(values.index(background)))
        names, values, colors = zip(*classes, strict=True) if classes else ((), (), ())
        if colors.count("other") > 1:
            raise ClassError('two classes have the color "other"; let one take the rest')
        other = colors.index("other") if "other" in colors else None
        colors = tuple(None if color == "other" else color for color in colors)
        rest = {"ignore": content.get("ignore"), "pixel_size": _as_tuple(content.get("pixel_size"))}
        return cls(names, values, colors, None if background is None else 0, other=other, **rest)

    def to_dict(self):
        """What `from_dict` takes, ready for JSON."""
        colors = ["other" if number == self.other else color for number, color in enumerate(self.colors)]
        classes = zip(self.names, self.values, colors, strict=True)
        content = {
            "classes": [{"name": name, "value": value, "color": color} for name, value, color in classes],
            "background": None if self.background is None else self.values[0],
            "ignore": self.ignore,
            "pixel_size": self.pixel_size,
        }
        return json.loads(json.dumps(content))  # as it comes back from a file: lists, no tuples

    def palette(self, by_value=False):
        """(256, 3) uint8: the colour of each class number or, with `by_value`, of each value up to 255.

        Classes without a colour get one that no other has, black for the background and for the class that takes the
        rest, then those of OKABE_ITO. What is no class is white.
        """
        more = ((97 * number % 256, 151 * number % 256, 211 * number % 256) for number in range(1, 256))
        free = (color for color in chain(OKABE_ITO, more) if color not in self.colors)
        colors = list(self.colors)
        for number in {self.background, self.other} - {None}:
            colors[number] = colors[number] or (None if (0, 0, 0) in colors else (0, 0, 0))
        palette = np.full((VALUES, 3), 255, dtype=np.uint8)
        palette[list(self.values if by_value else range(len(colors)))] = [color or next(free) for color in colors]
        return palette[:256]

    def to_values(self, index):
        """The mask, uint8 or uint16, that `to_index` turns into these class numbers; IGNORED stays without `ignore`."""
        last = IGNORED if self.ignore is None else self.ignore
        values = np.full(256, last, dtype=np.uint8 if max(*self.values, last) < 256 else np.uint16)
        values[: len(self.values)] = self.values
        return values[index]


def _is_text(name):
    return isinstance(name, str) and name.isprintable() and bool(name.strip())


def _is_whole(value, end):
    return type(value) is int and 0 <= value < end


def _as_tuple(entry):
    return tuple(entry) if isinstance(entry, list) else entry


def read_classes(path):
    """The ClassTable in a classes.json, or in a dataset.json of nnU-Net or the Decathlon; ClassError with the file.

    A dataset.json's "ignore" is the value of pixels that nobody labelled. A value that stands in regions of several
    values only is called "label <value>".
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        labels = content.get("labels") if isinstance(content, dict) else None
        return ClassTable.from_dict(_of_labels(labels) if isinstance(labels, dict) else content)
    except ClassError as error:
        raise ClassError(f"{path}: {error}") from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ClassError(f"{path}: not a file of classes ({' '.join(str(error).split())}); repair it") from error


def _of_labels(labels):
    """The content of a classes.json, of a dataset.json's {name: value} (nnU-Net) or {value: name} (Decathlon)."""
    classes, regions, ignore = [], {0}, None
    for name, value in labels.items():
        if isinstance(value, str):
            name, value = value, name
        values = [int(entry) for entry in (value if isinstance(value, list) else [value])]
        if name.lower() == "ignore":
            (ignore,) = values
        elif len(values) == 1:
            classes.append((values[0], name))
        else:
            regions.update(values)
    unnamed = regions - {value for value, _ in classes}
    classes += [(value, f"label {value}" if value else "background") for value in unnamed]
    return {"classes": [{"name": name, "value": value} for value, name in sorted(classes)], "ignore": ignore}


def to_index(mask, table, snap=False):
    """(class numbers of a mask's pixels, uint8 and IGNORED where nobody labelled; how many pixels were snapped).

    `mask`: whole numbers of any type, (H, W) or (S, H, W), or uint8 colours, (..., 3). False and True are the lower and
    the higher of two classes' values. Colours that are all grey, not all of them classes' but all of them values, are
    values that a program widened; values that are not all classes', but all a class's grey, are colours.

    ClassError, without the file's name, for a value or colour that is no class's. With `snap` such a pixel gets the
    class with the nearest value or colour (Euclidean, in RGB); where a class takes all other colours, only those no
    farther than SNAP from another's.
    """
    mask = np.asarray(mask)
    values = {value: number for number, value in enumerate(table.values)}
    if table.ignore is not None:
        values[table.ignore] = IGNORED
    colors = {number: color for number, color in enumerate(table.colors) if color is not None}
    greys = {color[0]: number for number, color in colors.items() if len(set(color)) == 1}
    if not (mask.ndim > 2 and mask.shape[-1] == 3 and mask.dtype == np.uint8):
        if mask.dtype == bool and {*greys} == {0, 255} and greys[255] != values.get(max(table.values)):
            raise ClassError("is black and white, by value and by colour of different classes; save it as RGB")
        mask = _whole_numbers(mask, table)
        found = _found(mask)
        of_values, of_greys = found <= values.keys(), found <= greys.keys()
        alone = min(found) if len(found) == 1 and of_values and of_greys else None
        if alone is not None and values[alone] != greys[alone]:  # of a tile within one class nothing tells which it is
            remedy = "save it as RGB, or leave the colors out of classes.json"
            raise ClassError(f"holds {alone} alone, by value and by colour of different classes; {remedy}")
        return _look_up(mask, greys if of_greys and not of_values else values, table, snap)
    red, green, blue = (mask[..., part] for part in range(3))
    grey = _found(red) if (red == green).all() and (red == blue).all() else set()
    if grey <= values.keys() and not grey <= greys.keys():
        return _look_up(red, values, table, snap)
    if not colors:
        raise ClassError("is in colours, but no class has one; give each class its color, or save the mask by values")
    packed = red + np.left_shift(green, 8, dtype=np.uint32) + np.left_shift(blue, 16, dtype=np.uint32)
    numbers = {r + (g << 8) + (b << 16): number for number, (r, g, b) in colors.items()}
    return _look_up(packed, numbers, table, snap, colors=True)


def check_shown(values, shown, table):
    """ClassError where a palette shows the `values` (N,) in the colours `shown` (N, 3) of other classes of `table`: a
    program has numbered the colours anew."""
    values, shown = values.tolist(), [*map(tuple, shown.tolist())]
    if {*values} <= {*table.values} and {*shown} <= {*table.colors}:
        if shown != [table.colors[table.values.index(value)] for value in values]:
            raise ClassError("its values and the colours it shows are of different classes; save it as RGB")


def _found(mask):
    return set(np.flatnonzero(np.bincount(mask.ravel())).tolist())


def _whole_numbers(mask, table):
    """A mask of values of any type as uint8 or uint16."""
    if mask.dtype == bool and len(table.values) == 2:
        return np.where(mask, np.uint16(max(table.values)), np.uint16(min(table.values)))
    if mask.dtype.kind not in "biuf" or (mask.dtype.kind == "f" and not (mask == np.rint(mask)).all()):
        raise ClassError("holds values that are no whole numbers; save the values of its classes")
    for value in (mask.min(initial=0), mask.max(initial=0)):
        if not 0 <= value < VALUES:
            raise ClassError(f"holds the value {value:.0f}; save values from 0 to {VALUES - 1}")
    return mask.astype(np.uint8 if mask.dtype.itemsize == 1 else np.uint16, copy=False)


def _look_up(codes, numbers, table, snap, colors=False):
    """As `to_index`, of values or of packed `colors`; `numbers`: {code: class number} of those that are a class's."""
    rest, known = table.other if colors else None, np.array(list(numbers))
    lookup = np.full(2**24 if colors else VALUES, IGNORED if rest is None else rest, dtype=np.uint8)
    lookup[known] = list(numbers.values())
    if rest is not None and not snap:
        return lookup[codes], 0
    counts = np.bincount(codes.ravel(), minlength=len(lookup))
    counts[known] = 0
    unknown = np.flatnonzero(counts)
    if unknown.size == 0:
        return lookup[codes], 0
    shifts, ones = ([0, 8, 16], 255) if colors else ([0], VALUES - 1)
    points = unknown[:, None] >> shifts & ones
    distance, nearest = cKDTree(known[:, None] >> shifts & ones).query(points)
    if not snap:
        most = np.argmax(counts[unknown])
        what = f"color {tuple(points[most].tolist())}" if colors else f"value {unknown[most]}"
        others = f" (and others {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        number = numbers[int(known[nearest[most]])]
        near = "ignore" if number == IGNORED else repr(table.names[number])
        wrong = f"{counts[unknown[most]]} pixels have the {what}{others}, which is no class's, the nearest is {near}"
        raise ClassError(f"{wrong}; correct the mask or the classes, or take the nearest with --snap")
    near = distance <= (np.inf if rest is None else SNAP)
    lookup[unknown[near]] = lookup[known[nearest[near]]]
    return lookup[codes], int(counts[unknown[near]].sum())
