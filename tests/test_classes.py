"""Class tables from files, and masks turned into class numbers, against loops over pixels."""

import json

import numpy as np
import pytest

from mtseg.classes import IGNORED, OKABE_ITO, SNAP, ClassError, ClassTable, read_classes, to_index

STEEL = {
    "classes": [
        {"name": "ferrite", "value": 3, "color": [54, 1, 84]},
        {"name": "cementite", "value": 300, "color": [49, 102, 141]},
        {"name": "pore", "value": 0, "color": [0, 0, 0]},
    ],
    "background": 0,
    "ignore": 255,
    "pixel_size": [0.1, 0.25, "um"],
}
OVERLAY = {
    "classes": [
        {"name": "matrix", "value": 0, "color": "other"},
        {"name": "secondary", "value": 1, "color": [255, 0, 0]},
        {"name": "tertiary", "value": 2, "color": [0, 0, 255]},
    ],
    "background": None,
}
EM = {"classes": [{"name": "cell", "value": 0}, {"name": "membrane", "value": 1, "color": [255, 255, 255]}]}


def table(content):
    return ClassTable.from_dict(content)


def written(tmp_path, content, name="classes.json"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def draw(index, colors):
    return np.array(colors, dtype=np.uint8)[index]


def numbers(count, shape=(7, 9), seed=0):
    return np.random.default_rng(seed).integers(0, count, shape).astype(np.uint8)


# ---- tables


def test_a_table_from_its_file_and_back(tmp_path):
    steel = read_classes(written(tmp_path, STEEL))
    assert steel.names == ("pore", "ferrite", "cementite")  # the background first
    assert steel.values == (0, 3, 300)
    assert steel.colors == ((0, 0, 0), (54, 1, 84), (49, 102, 141))
    assert (steel.background, steel.ignore, steel.other, steel.pixel_size) == (0, 255, None, (0.1, 0.25, "um"))
    overlay = table(OVERLAY)
    assert (overlay.background, overlay.other, overlay.colors[0]) == (None, 0, None)
    for this in steel, overlay, table(EM):
        assert json.loads(json.dumps(this.to_dict())) == this.to_dict()
        assert table(this.to_dict()) == this
        assert read_classes(written(tmp_path, this.to_dict())) == this


@pytest.mark.parametrize(
    "values, given, names, background",
    [
        ([0, 1], {}, ("a", "b"), 0),
        ([1, 0], {}, ("b", "a"), 0),
        ([1, 2], {}, ("a", "b"), None),
        ([0, 1], {"background": None}, ("a", "b"), None),
        ([0, 1], {"background": 1}, ("b", "a"), 0),
    ],
)
def test_which_class_is_the_background(values, given, names, background):
    classes = [{"name": name, "value": value} for name, value in zip("ab", values, strict=True)]
    found = table({"classes": classes, **given})
    assert (found.names, found.background) == (names, background)


def test_a_class_without_a_value_has_its_place():
    colors = [[0, 0, 255], [0, 255, 255], [255, 126, 126]]
    classes = [{"name": name, "color": color} for name, color in zip("abc", colors, strict=True)]
    assert table({"classes": classes, "background": None}).values == (0, 1, 2)


@pytest.mark.parametrize(
    "labels, expected",
    [
        ({"background": 0, "tumor": 2, "edema": 1}, (("background", "edema", "tumor"), (0, 1, 2), None)),
        ({"0": "Hintergrund", "1": "Krebs"}, (("Hintergrund", "Krebs"), (0, 1), None)),
        ({"background": 0, "a": 1, "ignore": 2}, (("background", "a"), (0, 1), 2)),
        (
            {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]},
            (("background", "label 1", "label 2", "enhancing"), (0, 1, 2, 3), None),
        ),
        ({"a": 1}, (("background", "a"), (0, 1), None)),
    ],
)
def test_classes_of_nnunet_and_the_decathlon(tmp_path, labels, expected):
    found = read_classes(written(tmp_path, {"labels": labels, "channel_names": {"0": "CT"}}, "dataset.json"))
    assert ((found.names, found.values, found.ignore), found.background) == (expected, 0)


def test_palettes():
    steel = table(STEEL)
    assert steel.palette().shape == (256, 3) and steel.palette().dtype == np.uint8
    np.testing.assert_array_equal(steel.palette()[:4], [[0, 0, 0], [54, 1, 84], [49, 102, 141], [255, 255, 255]])
    by_value = steel.palette(by_value=True)
    np.testing.assert_array_equal(by_value[[0, 3]], [[0, 0, 0], [54, 1, 84]])
    assert (np.delete(by_value, [0, 3], axis=0) == 255).all()
    np.testing.assert_array_equal(table(OVERLAY).palette()[:3], [[0, 0, 0], [255, 0, 0], [0, 0, 255]])
    # Defaults are distinct, also from colours that are given; black is the background's only if nobody else's.
    many = [{"name": f"class {value}", "value": value} for value in range(255)]
    many[7]["color"], many[8]["color"] = list(OKABE_ITO[0]), [97, 151, 211]
    palette = table({"classes": many}).palette()
    assert palette[0].tolist() == [0, 0, 0] and palette[1].tolist() == list(OKABE_ITO[1])
    assert len(np.unique(palette[:255], axis=0)) == 255
    many[7]["color"] = [0, 0, 0]
    assert len(np.unique(table({"classes": many}).palette()[:255], axis=0)) == 255


BAD = [
    ({"classes": [{"name": "a", "value": 0}]}, r"has 1 classes; give 2 to 255"),
    ({"classes": [{"name": str(n), "value": n} for n in range(256)]}, r"has 256 classes; give 2 to 255"),
    ({"classes": []}, r"has 0 classes"),
    ({"classes": {"a": 1}}, r"has no list of classes; give \{\"classes\": \["),
    ([1, 2], r"has no list of classes"),
    ({"classes": ["a", "b"]}, r"holds '[ab]', which is not known; known are color, name, value"),
    ({"classes": [{"name": "a"}, {"name": "a"}]}, r"two classes have the name 'a'; give each its own"),
    ({"classes": [{"name": "a", "value": 1}, {"name": "b", "value": 1}]}, r"two classes have the value 1; give each"),
    ({"classes": [{"name": "a"}, {"name": "b"}], "ignore": 1}, r"two classes have the value 1"),
    (
        {"classes": [{"name": "a", "color": [1, 2, 3]}, {"name": "b", "color": [1, 2, 3]}]},
        r"two classes have the color \(1, 2, 3\)",
    ),
    (
        {"classes": [{"name": "a", "color": "other"}, {"name": "b", "color": "other"}]},
        r"two classes have the color \"other\"; let one take the rest",
    ),
    (
        {"classes": [{"name": "a", "color": "other"}, {"name": "b"}]},
        r"a class has the color \"other\", and no class an",
    ),
    (
        {"classes": [{"name": "a"}, {"name": "mean"}]},
        r"a class is called 'mean'; .*'mean' is the mean over the classes",
    ),
    *(
        ({"classes": [{"name": "a"}, {"name": name}]}, r"a class is called .*; give it a")
        for name in ("", " ", "\n", 3, None)
    ),
    *(
        (
            {"classes": [{"name": "a"}, {"name": "b", "value": value}]},
            r"is the value of a class; give whole numbers from 0",
        )
        for value in (-1, 2**16, 1.5, "1", True, None, [1])
    ),
    ({"classes": [{"name": "a"}, {"name": "b"}], "ignore": -1}, r"-1 is the value of a class; give whole numbers"),
    *(
        (
            {"classes": [{"name": "a"}, {"name": "b", "color": color}]},
            r"is the color of a class; give \[r, g, b\], 0 to 255",
        )
        for color in ([1, 2], [1, 2, 256], [0.5, 0, 0], "red", 7)
    ),
    (
        {"classes": [{"name": "a"}, {"name": "b"}], "background": 5},
        r"background is 5, the value of no class; give one's",
    ),
    (
        {"classes": [{"name": "a"}, {"name": "b"}], "backgroud": 0},
        r"holds backgroud, which is not known; known are back",
    ),
    *(
        (
            {"classes": [{"name": "a"}, {"name": "b"}], "pixel_size": size},
            r"pixel_size .*; give \[height, width, \"unit\"\]",
        )
        for size in (
            [1, 2],
            [1, "um"],
            [0, 1, "um"],
            [1, -1, "um"],
            [1, 1, ""],
            [1, 1, 3],
            ["1", 1, "um"],
            [True, 1, "um"],
        )
    ),
    ({"classes": [{"name": "a"}, {"name": "b"}], "pixel_size": 3}, r"pixel_size is 3; give"),
    ('{"classes": ', r"not a file of classes \(Expecting value.*\); repair it"),
    ("[" * 10**5, r"not a file of classes \(.*\); repair it"),
    ('{"classes": [{"name": "a"}, {"name": "b"}], "pixel_size": [1, Infinity, "um"]}', r"pixel_size .*; give \[height"),
    ({"labels": {"a": 1, "b": 1}}, r"two classes have the value 1"),
    ({"labels": {"a": "x", "b": 1}}, r"not a file of classes"),
    ({"labels": {"a": {}, "b": 1}}, r"not a file of classes"),
]


@pytest.mark.parametrize("content, message", BAD, ids=range(len(BAD)))
def test_tables_that_contradict_themselves(tmp_path, content, message):
    path = written(tmp_path, content)
    with pytest.raises(ClassError, match=message) as raised:
        read_classes(path)
    assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ClassError, match=r"none\.json: not a file of classes \(.*No such file.*\)"):
        read_classes(tmp_path / "none.json")


# ---- masks of values


@pytest.mark.parametrize("dtype", ["uint16", "int16", "uint32", "int64", "float32", "float64"])
@pytest.mark.parametrize("shape", [(7, 9), (3, 7, 9), (7, 3)])
def test_masks_of_values(dtype, shape):
    steel, index = table(STEEL), numbers(3, shape)
    index.flat[0] = IGNORED
    mask = np.array([steel.ignore if number == IGNORED else steel.values[number] for number in index.flat])
    found, snapped = to_index(mask.reshape(shape).astype(dtype), steel)
    assert found.dtype == np.uint8 and snapped == 0
    np.testing.assert_array_equal(found, index)
    values = steel.to_values(index)
    assert values.dtype == np.uint16
    np.testing.assert_array_equal(values.ravel(), mask)


@pytest.mark.parametrize("ignore, dtype", [(None, np.uint8), (255, np.uint8), (256, np.uint16)])
def test_numbers_become_values_of_the_smallest_type(ignore, dtype):
    this = table({**EM, "ignore": ignore})
    index = np.array([[0, 1, IGNORED]], dtype=np.uint8)
    values = this.to_values(index)
    assert values.dtype == dtype and values.tolist() == [[0, 1, ignore or IGNORED]]
    if ignore is not None:
        np.testing.assert_array_equal(to_index(values, this)[0], index)


def test_masks_of_one_bit():
    mask = numbers(2).astype(bool)
    for values in (0, 1), (0, 255), (7, 3):
        this = ClassTable(("a", "b"), values, (None, None))
        expected = [[this.values.index(max(values) if pixel else min(values)) for pixel in row] for row in mask]
        np.testing.assert_array_equal(to_index(mask, this)[0], expected)
    three = ClassTable(("a", "b", "c"), (1, 0, 2), (None,) * 3)
    np.testing.assert_array_equal(to_index(mask, three)[0], 1 - mask)


@pytest.mark.parametrize(
    "mask, message",
    [
        (
            [[0, 3, 3, 5, 5, 7]],
            r"2 pixels have the value 5 \(and others 1 more\), which is no class's, .* is 'ferr",
        ),
        ([[0, 250]], r"1 pixels have the value 250, which .* nearest is ignore; correct .* with --snap"),
        ([[0, -1]], r"holds the value -1; save values from 0 to 65535"),
        ([[0, 70000]], r"holds the value 70000; save values from 0 to 65535"),
        ([[0.5, 1]], r"holds values that are no whole numbers; save the values"),
        ([[np.nan, 1]], r"holds values that are no whole numbers"),
        ([[np.inf, 1]], r"holds the value inf"),
        ([["a"]], r"holds values that are no whole numbers"),
        ([[1j]], r"holds values that are no whole numbers"),
    ],
)
def test_values_that_are_no_class(mask, message):
    with pytest.raises(ClassError, match=message):
        to_index(np.array(mask), table(STEEL))


def test_snapping_values():
    """Values 0, 3, 255 (ignored) and 300."""
    mask = np.array([[1, 2, 3, 128, 130, 277, 278, 65535]], dtype=np.uint16)
    found, snapped = to_index(mask, table(STEEL), snap=True)
    assert found.tolist() == [[0, 1, 1, 1, IGNORED, IGNORED, 2, 2]]
    assert snapped == 7


# ---- masks of colours


@pytest.mark.parametrize("shape", [(7, 9), (2, 7, 9)])
def test_masks_of_colours(shape):
    steel, index = table(STEEL), numbers(3, shape)
    found, snapped = to_index(draw(index, steel.colors), steel)
    np.testing.assert_array_equal(found, index)
    assert (found.dtype, snapped) == (np.uint8, 0)


def test_a_class_that_takes_every_other_colour():
    overlay, index = table(OVERLAY), numbers(3)
    mask = np.random.default_rng(1).integers(0, 256, (*index.shape, 3)).astype(np.uint8)
    mask[index > 0] = draw(index, [(9, 9, 9), (255, 0, 0), (0, 0, 255)])[index > 0]
    np.testing.assert_array_equal(to_index(mask, overlay)[0], index)
    grey = np.repeat(numbers(256)[..., None], 3, axis=-1)
    assert not to_index(grey, overlay)[0].any()
    # Snapping pulls what is near a class's colour to it, and leaves the rest.
    mask = np.array(
        [[[255, 0, 0], [255 - SNAP, 0, 0], [254 - SNAP, 0, 0], [0, 0, 250], [200, 200, 200]]], dtype=np.uint8
    )
    found, snapped = to_index(mask, overlay, snap=True)
    assert (found.tolist(), snapped) == ([[1, 1, 0, 2, 0]], 2)
    assert to_index(mask, overlay)[0].tolist() == [[1, 0, 0, 0, 0]]


def test_snapping_colours():
    steel = table(STEEL)
    mask = np.random.default_rng(1).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    mask[0, 0] = steel.colors[1]
    distances = np.linalg.norm(mask[:, :, None].astype(float) - np.array(steel.colors), axis=-1)
    found, snapped = to_index(mask, steel, snap=True)
    np.testing.assert_array_equal(found, distances.argmin(-1))
    assert snapped == 6 * 8 - 1


def test_colours_that_are_no_class():
    steel = table(STEEL)
    mask = draw(numbers(3), steel.colors)
    mask[2, 3], mask[2, 4], mask[3, 3] = (50, 100, 140), (50, 100, 140), (9, 0, 0)
    with pytest.raises(
        ClassError, match=r"2 pixels have the color \(50, 100, 140\) \(and others 1 more\), .* 'cementite';"
    ):
        to_index(mask, steel)
    plain = ClassTable(("a", "b"), (0, 1), (None, None))
    with pytest.raises(ClassError, match=r"is in colours, but no class has one; give each class its color, or save"):
        to_index(mask, plain)


def test_values_that_a_program_widened_to_grey():
    steel = table({**STEEL, "classes": [{**entry, "value": place} for place, entry in enumerate(STEEL["classes"])]})
    index = numbers(3)
    np.testing.assert_array_equal(
        to_index(np.repeat(index[..., None], 3, axis=-1), steel)[0], to_index(index, steel)[0]
    )
    # All are colours of classes: colours they are.
    this = ClassTable(("a", "b", "c"), (0, 255, 1), ((0, 0, 0), (1, 1, 1), (255, 255, 255)))
    assert to_index(np.array([[[0] * 3, [1] * 3, [255] * 3]], dtype=np.uint8), this)[0].tolist() == [[0, 1, 2]]
    assert to_index(np.array([[0, 1, 255]], dtype=np.uint8), this)[0].tolist() == [[0, 2, 1]]


def test_colours_that_a_program_narrowed_to_grey():
    this = table({"classes": [{"name": "cell", "value": 0, "color": [0, 0, 0]}, EM["classes"][1]]})
    assert to_index(np.array([[0, 255]], dtype=np.uint8), this)[0].tolist() == [[0, 1]]
    with pytest.raises(ClassError, match=r"1 pixels have the value 254, .* the nearest is 'membrane'"):
        to_index(np.array([[0, 254]], dtype=np.uint8), this)


def test_one_class_alone_whose_value_is_the_grey_of_another_is_told_by_nothing():
    """Of a tile of one class in 8 bits nobody knows whether its 0 is the first class, or black; of 1 bit neither."""
    swapped = table({"classes": [{"name": "a", "color": [255] * 3}, {"name": "b", "color": [0] * 3}]})
    assert to_index(np.uint8([[0, 255]]), swapped)[0].tolist() == [[1, 0]]
    for mask in (np.zeros((2, 2), np.uint8), np.array([[False, True]])):
        with pytest.raises(ClassError, match=r"by value and by colour of different classes; save it as RGB"):
            to_index(mask, swapped)
    assert to_index(np.zeros((2, 2, 3), np.uint8), swapped)[0].tolist() == [[1, 1]] * 2
    alike = table({"classes": [{"name": "a", "color": [0] * 3}, {"name": "b", "color": [255] * 3}]})
    assert to_index(np.zeros((2, 2), np.uint8), alike)[0].tolist() == [[0, 0]] * 2
    assert to_index(np.array([[False, True]]), alike)[0].tolist() == [[0, 1]]


def test_masks_without_pixels():
    for shape in (0, 5), (0, 5, 3):
        assert to_index(np.zeros(shape, np.uint8), table(STEEL))[0].shape == (0, 5)


# ---- real images


@pytest.mark.parametrize(
    "name, shares",
    [("uhcs", (0.74, 0.13, 0.10, 0.03)), ("ebc", (0.814, 0.184, 0.003)), ("superalloy", None), ("em", None)],
)
def test_real_masks(images_root, name, shares):
    from mtseg.images import image_size, read_mask

    root = images_root / name
    this = read_classes(root / "classes.json")
    counts = np.zeros(len(this.names))
    for path in sorted((root / "masks").glob("*.png")):
        index, snapped = to_index(read_mask(path), this)
        assert (1, *index.shape) == image_size(root / "images" / path.name) and snapped == 0
        counts += np.bincount(index.ravel(), minlength=len(counts))[: len(counts)]
        assert index.max() < len(counts)
    assert (counts > 0).all()
    if shares:
        np.testing.assert_allclose(counts / counts.sum(), shares, atol=0.006)
