"""Preparing scans and undoing it, against SciPy, NumPy and NiBabel."""

import itertools
import json

import numpy as np
import pytest
from conftest import ball
from scipy import ndimage

from mtseg.preprocess import (
    PreprocessError,
    canonical_axes,
    check_settings,
    coarse_axis,
    grid_attributes,
    grid_from_attributes,
    orient,
    prepare,
    resample,
    resample_label,
    restore,
    restore_scores,
    to_classes,
)

SETTINGS = {"orientation": "RAS", "crop": "nonzero", "normalization": "zscore", "window": None}
SETTINGS |= {"spacing": None, "labels": [0, 1, 2], "channels": None}
SPACING = (0.8, 1.1, 2.3)


def scan(seed=0, shape=(21, 26, 15)):
    """An image that is 0 outside a box, its label, and an oblique, permuted, mirrored affine."""
    rng = np.random.default_rng(seed)
    image, label = np.zeros(shape, np.float32), np.zeros(shape, np.uint8)
    image[3:18, 2:22, 4:14] = 100 + 20 * rng.standard_normal((15, 20, 10))
    label[ball(shape, (10, 12, 9), 4)] = 1
    label[ball(shape, (10, 14, 9), 2)] = 2
    turn, _ = np.linalg.qr(np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]]) + 0.2 * rng.standard_normal((3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = turn * np.sign(turn[[1, 2, 0], [0, 1, 2]]) * (-1, -1, 1) * SPACING
    return image, label, affine


@pytest.mark.parametrize("signs", list(itertools.product((1, -1), repeat=3)))
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_axes_are_turned_as_nibabel_turns_them(order, signs):
    nibabel = pytest.importorskip("nibabel")
    affine = np.eye(4)
    affine[:3, :3] = (np.diag(signs) + 0.15 * np.random.default_rng(0).standard_normal((3, 3)))[:, order] * SPACING
    volume = np.random.default_rng(1).standard_normal((2, 3, 4))
    expected = nibabel.as_closest_canonical(nibabel.Nifti1Image(volume, affine)).get_fdata()
    np.testing.assert_array_equal(orient(volume, *canonical_axes(affine)), expected)


@pytest.mark.parametrize("orientation", ["RAS", "file"])
@pytest.mark.parametrize("crop", ["nonzero", "none"])
def test_without_resampling_everything_comes_back_exactly(orientation, crop):
    image, label, affine = scan()
    settings = {**SETTINGS, "orientation": orientation, "crop": crop}
    done = prepare(image, affine, SPACING, settings, label)
    assert done.image.shape == done.label.shape == done.grid.shape
    assert sorted(done.image.shape) == (sorted((15, 20, 10)) if crop == "nonzero" else sorted(image.shape))
    ((low, high, shift, scale),) = done.normalization
    assert (low, high) == (-np.inf, np.inf)
    background = -shift / scale
    np.testing.assert_allclose(restore(done.image, done.grid, background) * scale + shift, image, atol=1e-3)
    if orientation == "RAS":
        axes, _ = canonical_axes(affine)
        np.testing.assert_allclose(done.spacing, np.array(SPACING)[list(axes)])
    back = np.stack(list(restore_scores(np.eye(3, dtype=np.float32)[done.label].transpose(3, 0, 1, 2), done.grid)))
    np.testing.assert_array_equal(back.argmax(axis=0), label)
    np.testing.assert_array_equal(back.sum(axis=0), 1)
    assert grid_from_attributes(grid_attributes(done.grid)) == done.grid


@pytest.mark.parametrize("spacing", [(1, 1, 1), (1.7, 0.6, 2.3), (9, 9, 90)])
def test_resampled_volumes_come_back_to_the_same_place(spacing):
    image, label, affine = scan()
    done = prepare(image, affine, SPACING, {**SETTINGS, "spacing": list(spacing)}, label)
    extent = [side * own for side, own in zip((15, 20, 10), SPACING, strict=True)]
    axes, _ = canonical_axes(affine)
    assert done.image.shape == tuple(max(round(extent[a] / s), 1) for a, s in zip(axes, spacing, strict=True))
    assert done.spacing.tolist() == list(spacing)
    scores = np.stack([(done.label == c).astype(np.float32) for c in range(3)])
    back = np.stack(list(restore_scores(scores, done.grid)))
    assert back.shape == (3, *image.shape)
    np.testing.assert_allclose(back.sum(axis=0), 1, atol=1e-5)
    if max(spacing) < 3:
        there = np.array(ndimage.center_of_mass(back[1:].sum(axis=0)))
        assert np.abs(there - ndimage.center_of_mass(label > 0)).max() < 0.25
        overlap = ((back.argmax(axis=0) > 0) & (label > 0)).sum() / (label > 0).sum()
        assert overlap > 0.85


@pytest.mark.parametrize("shape", [(7, 18, 10), (30, 5, 11), (10, 10, 1)])
def test_resampling_is_scipys_on_voxels_that_are_boxes(shape):
    volume = np.random.default_rng(0).standard_normal((10, 12, 8)).astype(np.float32)
    zoom = [n / m for n, m in zip(shape, volume.shape, strict=True)]
    expected = ndimage.zoom(volume, zoom, order=1, mode="nearest", grid_mode=True)
    np.testing.assert_allclose(resample(volume, shape), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(17, 9, 31, 2), (9, 30, 20, 1), (5, 12, 25, 0), (7, 13, 12, 2)])
def test_a_coarse_axis_takes_the_nearest_of_interpolated_planes(shape):
    """By SciPy: each plane linearly, then along the axis order 0, both on voxels that are boxes."""
    *shape, axis = shape
    volume = np.random.default_rng(0).standard_normal((12, 15, 10)).astype(np.float32)

    def mapped(array, size, order):
        places = [(np.arange(n) + 0.5) * old / n - 0.5 for n, old in zip(size, array.shape, strict=True)]
        return ndimage.map_coordinates(array, np.meshgrid(*places, indexing="ij"), order=order, mode="nearest")

    planes = np.moveaxis(volume, axis, 0)
    flat = [side for other, side in enumerate(shape) if other != axis]
    planes = np.stack([mapped(plane, flat, 1) for plane in planes])
    nearest = mapped(planes, (shape[axis], *flat), 0)
    found = np.moveaxis(resample(volume, shape, axis), axis, 0)
    places = (np.arange(shape[axis]) + 0.5) * volume.shape[axis] / shape[axis] - 0.5
    alone = np.abs(places % 1 - 0.5) > 1e-6  # else two planes are as near
    assert alone.sum() >= shape[axis] / 2
    np.testing.assert_allclose(found[alone], nearest[alone], atol=1e-5)
    label = np.random.default_rng(1).integers(0, 3, (12, 15, 10)).astype(np.uint8)
    expected = np.stack([resample(label == value, shape, axis) for value in range(3)]).argmax(0)
    np.testing.assert_array_equal(resample_label(label, shape, axis), expected)


@pytest.mark.parametrize(
    ("old", "new", "axis"),
    [
        ((1, 1, 3.01), (1, 1, 1), 2),
        ((1, 1, 3), (1, 1, 1), -1),
        ((1, 1, 1), (4, 1, 1), 0),
        ((1, 5, 1.5), (1, 1, 4), 1),
        ((5, 1, 5), (1, 1, 5), -1),
    ],
)
def test_the_coarse_axis_is_of_the_scan_else_of_the_new_spacing(old, new, axis):
    assert coarse_axis(old, new) == axis


def test_a_stack_comes_back_to_its_own_slices_and_old_settings_resample_as_before():
    rng = np.random.default_rng(0)
    image = 100 + 20 * rng.standard_normal((24, 20, 9)).astype(np.float32)
    label = np.zeros(image.shape, np.uint8)
    label[6:18, 5:15, 2:7] = 1
    given = np.diag([1.5, 1.5, 8.0, 1.0]), (1.5, 1.5, 8.0)
    settings = {**SETTINGS, "orientation": "file", "spacing": [1.0, 1.0, 2.0]}
    before, done = (prepare(image, *given, {**settings, **more}, label) for more in ({}, {"coarse_axis": "nearest"}))
    assert before.grid.coarse == -1 and done.grid.coarse == 2 and done.image.shape == before.image.shape == (36, 30, 36)
    _, _, shift, scale = before.normalization[0]
    normal = (image - shift) / scale
    np.testing.assert_allclose(before.image, resample(normal, (36, 30, 36)), atol=1e-4)
    np.testing.assert_allclose(done.image, np.repeat(resample(normal, (36, 30, 9), 2), 4, axis=2), atol=1e-4)
    np.testing.assert_array_equal(done.label, np.repeat(resample_label(label, (36, 30, 9), 2), 4, axis=2))
    slices = resample(done.image[..., ::4], (24, 20, 9), 2)
    np.testing.assert_array_equal(restore(done.image, done.grid), slices)
    attributes = grid_attributes(done.grid)
    assert grid_from_attributes(attributes) == done.grid
    del attributes["grid_coarse"]
    assert grid_from_attributes(attributes) == done.grid._replace(coarse=-1)
    with pytest.raises(PreprocessError, match="grid_ attributes contradict"):
        grid_from_attributes({**attributes, "grid_coarse": np.int64(3)})
    with pytest.raises(PreprocessError, match="coarse_axis 'cubic'"):
        check_settings({**settings, "coarse_axis": "cubic"})


def test_labels_stay_labels():
    """Doubled, the label is where the larger share of the trilinear masks is, and has no values between the classes."""
    _, label, _ = scan()
    label[label == 2] = 200
    shape = [2 * n for n in label.shape]
    larger = resample_label(label, shape)
    assert set(np.unique(larger)) == {0, 1, 200}
    shares = [ndimage.zoom((label == v).astype(float), 2, order=1, mode="nearest", grid_mode=True) for v in (0, 1, 200)]
    clear = np.sort(shares, axis=0)[-2] < np.max(shares, axis=0) - 1e-4
    np.testing.assert_array_equal(larger[clear], np.array([0, 1, 200])[np.argmax(shares, axis=0)][clear])


@pytest.mark.parametrize("crop", ["nonzero", "none"])
def test_normalisations_in_closed_form(crop):
    image, _, affine = scan()
    ones = image[image != 0] if crop == "nonzero" else image
    low, high = np.percentile(ones, (0.5, 99.5))
    clipped = ones.clip(low, high)
    expected = {
        "zscore": (image - ones.mean()) / ones.std(),
        "percentile": (image.clip(low, high) - clipped.mean()) / clipped.std(),
        "ct": (image.clip(50, 130) - 50) / 80,
        "minmax": (image - ones.min()) / (ones.max() - ones.min()),
    }
    for name, whole in expected.items():
        settings = {**SETTINGS, "orientation": "file", "crop": crop, "normalization": name, "window": [90, 80]}
        done = prepare(np.stack([image, 3 * image + (image != 0)]), affine, SPACING, settings)
        assert done.image.dtype == np.float32
        inside = (slice(3, 18), slice(2, 22), slice(4, 14)) if crop == "nonzero" else ()
        np.testing.assert_allclose(done.image[0], whole[inside], atol=1e-4)
        if name != "ct":  # channel by channel
            np.testing.assert_allclose(done.image[1][done.image[0] > 0.1], done.image[0][done.image[0] > 0.1], rtol=0.2)
        assert done.normalization.shape == (2, 4)


def test_each_channel_by_numbers_of_the_data_set_or_by_its_own():
    image, _, affine = scan()
    channels, inside = np.stack([image, image + 7 * (image != 0)]), (slice(3, 18), slice(2, 22), slice(4, 14))
    settings = {
        **SETTINGS,
        "orientation": "file",
        "normalization": "by_channel",
        "by_channel": [[80, 120, 95, 11], "zscore"],
    }
    first, second = prepare(channels, affine, SPACING, check_settings(settings)).image
    np.testing.assert_allclose(first, (image[inside].clip(80, 120) - 95) / 11, atol=1e-5)
    np.testing.assert_allclose(second, (image - image[image != 0].mean())[inside] / image[image != 0].std(), atol=1e-4)
    with pytest.raises(PreprocessError, match="has 1 channels, its preprocessing or plan 2"):
        prepare(image, affine, SPACING, settings)


@pytest.mark.parametrize("crop", ["nonzero", "none"])
def test_statistics_are_over_what_the_settings_say(crop):
    image, _, affine = scan()
    image[5, 5, 5:9] = 0
    cut = image[3:18, 2:22, 4:14] if crop == "nonzero" else image
    for over, values in (("all", cut), ("nonzero", image[image != 0])):
        settings = check_settings({**SETTINGS, "crop": crop, "orientation": "file", "over": over})
        ((_, _, shift, scale),) = prepare(image, affine, SPACING, settings).normalization
        np.testing.assert_allclose((shift, scale), (values.mean(), values.std()), rtol=1e-5)


def test_a_constant_image_has_no_variance_and_stays_finite():
    for name in ("zscore", "percentile", "minmax"):
        image = np.full((4, 5, 6), 7.0)
        assert np.isfinite(prepare(image, np.eye(4), None, {**SETTINGS, "normalization": name}).image).all()


def test_label_values_become_classes_and_others_are_refused():
    label = np.array([[[0, 1, 2, 4]]])
    assert to_classes(label.astype(np.float64), [0, 1, 2, 4]).tolist() == [[[0, 1, 2, 3]]]
    for wrong in (3, 5, -1, 0.5, np.nan):
        with pytest.raises(PreprocessError, match="a voxel of value"):
            to_classes(np.where(label == 4, wrong, label), [0, 1, 2, 4])


def test_labelled_voxels_outside_the_crop_are_counted():
    image, label, affine = scan()
    label[0, 0, :3] = 1
    assert prepare(image, affine, SPACING, SETTINGS, label).cut == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("nan", "NaN or infinity"),
        ("empty", "0 everywhere"),
        ("other shape", "must agree"),
        ("no affine", "--orientation file"),
        ("no spacing", "--spacing none"),
    ],
)
def test_a_scan_that_cannot_be_prepared(change, words):
    image, label, affine = scan()
    spacing = SPACING
    if change == "nan":
        image[0, 0, 0] = np.nan
    elif change == "empty":
        image[...] = 0
    elif change == "other shape":
        label = label[1:]
    elif change == "no affine":
        affine = None
    else:
        spacing = None
    with pytest.raises(PreprocessError, match=words):
        prepare(image, affine, spacing, {**SETTINGS, "spacing": [1, 1, 1]}, label)


def test_settings_survive_json_and_nonsense_is_named():
    assert check_settings(json.loads(json.dumps(SETTINGS))) == SETTINGS
    for name, value in [
        ("orientation", "LPS"),
        ("crop", None),
        ("normalization", "z"),
        ("spacing", [1, 1]),
        ("spacing", [1, 0, 1]),
        ("labels", [1, 2]),
        ("labels", [0, 2, 1]),
        ("labels", "012"),
        ("channels", "0000"),
        ("over", "body"),
    ]:
        with pytest.raises(PreprocessError, match=name):
            check_settings({**SETTINGS, name: value})
    for name in SETTINGS.keys() - {"window"}:
        with pytest.raises(PreprocessError, match=name):
            check_settings({key: value for key, value in SETTINGS.items() if key != name})
    for rows in (None, 1, [], ["ct"], [[0, 1, 2]], [[1, 0, 0, 1]], [[0, 1, 0, 0]], [[0, 1, 0, float("nan")]]):
        with pytest.raises(PreprocessError, match="by_channel"):
            check_settings({**SETTINGS, "normalization": "by_channel", "by_channel": rows})
    with pytest.raises(PreprocessError, match="window"):
        check_settings({**SETTINGS, "normalization": "ct"})


@pytest.mark.parametrize("name", ["grid_box", "grid_axes", "grid_original_shape"])
def test_grids_that_lie_are_refused(name):
    attributes = grid_attributes(prepare(*scan()[::2], SPACING, SETTINGS).grid)
    with pytest.raises(PreprocessError, match="grid_"):
        grid_from_attributes({**attributes, name: 7 - attributes[name]})
    attributes.pop(name)
    with pytest.raises(PreprocessError, match="grid_"):
        grid_from_attributes(attributes)
    assert grid_from_attributes({"spacing": np.ones(3)}) is None
