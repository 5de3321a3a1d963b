import math

import h5py
import numpy as np
import pytest
import torch
from conftest import ball
from scipy import ndimage

from mtseg import metrics

binary = pytest.importorskip("medpy.metric.binary", reason='the oracle is missing: pip install -e ".[test]"')

OVERLAP = [
    (metrics.dice, binary.dc),
    (metrics.jaccard, binary.jc),
    (metrics.precision, binary.precision),
    (metrics.recall, binary.recall),
    (metrics.specificity, binary.specificity),
]
DISTANCES = [
    (metrics.hd95, binary.hd95),
    (metrics.asd, binary.asd),
    (metrics.assd, binary.assd),
    (metrics.hd, binary.hd),
]
SHAPE = (17, 12, 14)


def one_voxel(*place):
    mask = np.zeros(SHAPE, bool)
    mask[place] = True
    return mask


def pairs():
    rng = np.random.default_rng(0)
    blob = ndimage.gaussian_filter(rng.standard_normal((6, *SHAPE)), (0, 2, 2, 2))
    yield "noise", rng.random(SHAPE) > 0.5, rng.random(SHAPE) > 0.5
    yield "sparse noise", rng.random(SHAPE) > 0.99, rng.random(SHAPE) > 0.99
    for i in range(0, 6, 2):
        yield f"blobs {i}", blob[i] > 0.1, blob[i + 1] > 0.1
    yield "corners", one_voxel(0, 0, 0), one_voxel(16, 11, 13)
    yield "same", ball(SHAPE, (8, 6, 7), 4), ball(SHAPE, (8, 6, 7), 4)
    yield "inside", ball(SHAPE, (8, 6, 7), 2), ball(SHAPE, (8, 6, 7), 5)
    yield "full", np.ones(SHAPE, bool), one_voxel(3, 4, 5)
    yield "plane", np.eye(17, 12, dtype=bool)[..., None] & np.ones(SHAPE, bool), one_voxel(0, 11, 0)
    yield "two dimensions", blob[0, 0] > 0, blob[1, 0] > 0
    yield "one dimension", blob[0, 0, 0] > 0, blob[1, 0, 0] > 0
    yield "four dimensions", blob[:3] > 0.2, blob[3:] > 0.2
    yield "island", ball((28,) * 3, (8, 8, 8), 6) | ball((28,) * 3, (24, 24, 24), 2), ball((28,) * 3, (7, 8, 9), 6)


PAIRS = {name: (a, b) for name, a, b in pairs()}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(("ours", "medpys"), OVERLAP)
def test_overlap_equals_medpy(name, ours, medpys):
    a, b = PAIRS[name]
    assert ours(a, b) == pytest.approx(medpys(a, b), abs=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_the_scores_medpy_lacks(name):
    a, b = PAIRS[name]
    share, found = binary.precision(a, b), binary.recall(a, b)
    assert metrics.f1(a, b) == pytest.approx(2 * share * found / (share + found) if share + found else 0, abs=1e-12)
    assert metrics.accuracy(a, b) == pytest.approx((a == b).mean(), abs=1e-12)
    assert metrics.volume_similarity(a, b) == pytest.approx(1 - abs(int(a.sum()) - b.sum()) / (a.sum() + b.sum()))


@pytest.mark.parametrize("spacing", [None, 0.625, (1.25, 0.7, 2.0, 3.0), (0.3, 0.3, 6.0, 0.3)])
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(("ours", "medpys"), DISTANCES)
def test_distances_equal_medpy(name, ours, medpys, spacing):
    a, b = PAIRS[name]
    spacing = spacing[: a.ndim] if isinstance(spacing, tuple) else spacing
    assert ours(a, b, voxelspacing=spacing) == pytest.approx(medpys(a, b, voxelspacing=spacing), abs=1e-9)
    assert ours(b, a, spacing, a.ndim) == pytest.approx(medpys(b, a, spacing, a.ndim), abs=1e-9)


def test_distances_equal_medpy_whatever_the_masks():
    rng = np.random.default_rng(1)
    for _ in range(80):
        shape = rng.integers(1, 15, rng.integers(1, 4))
        a, b = (rng.random(shape) < rng.choice([0.03, 0.3, 0.9]) for _ in range(2))
        a.flat[rng.integers(a.size)] = b.flat[rng.integers(b.size)] = True
        spacing = rng.uniform(0.2, 4, len(shape))
        expected = binary.hd95(a, b, spacing), binary.asd(a, b, spacing), binary.assd(a, b, spacing)
        ours = metrics.hd95(a, b, spacing), metrics.asd(a, b, spacing), metrics.assd(a, b, spacing)
        assert ours == pytest.approx(expected, abs=1e-9)


def test_the_order_of_the_distances_is_that_of_the_array():
    a, b = PAIRS["blobs 2"]
    inner = ndimage.binary_erosion(b)
    expected = ndimage.distance_transform_edt(~(b & ~inner))[a & ~ndimage.binary_erosion(a)]
    for order in "CF":
        ours = metrics.surface_distances(np.asarray(a, order=order), np.asarray(b, order=order))
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "maps"), [("same", 0), ("island", 0), ("full", 1)])
def test_a_distance_map_is_made_only_where_it_is_the_cheaper_way(name, maps, monkeypatch):
    made, distance_map = [], ndimage.distance_transform_edt
    monkeypatch.setattr(ndimage, "distance_transform_edt", lambda *a, **k: made.append(1) or distance_map(*a, **k))
    metrics.surface_distances(*PAIRS[name])
    assert len(made) == maps


@pytest.mark.filterwarnings("ignore")
def test_nsd_equals_monai():
    monai = pytest.importorskip("monai.metrics", reason='the oracle is missing: pip install -e ".[test]"')
    for name, (a, b) in PAIRS.items():
        if a.ndim not in (2, 3):
            continue
        for spacing, tolerance in ((None, 1.0), (None, 0), ((1.25, 0.5, 2.0)[: a.ndim], 2.0)):
            masks = (torch.from_numpy(mask[None, None]) for mask in (a, b))
            expected = monai.compute_surface_dice(*masks, [tolerance], include_background=True, spacing=spacing)
            assert metrics.nsd(a, b, spacing, tolerance) == pytest.approx(expected.item(), abs=1e-6), name


def test_a_distance_of_the_tolerance_is_within_it():
    a, b = (np.arange(9) == place for place in (1, 4))
    assert 3 * 0.1 > 0.3
    assert metrics.nsd(a, b, 0.1, tolerance=0.3) == 1
    assert metrics.nsd(a, b, 0.1, tolerance=0.29) == 0


def test_all_metrics_are_the_single_ones():
    a, b = PAIRS["blobs 0"]
    spacing = (1.25, 0.7, 2.0)
    found = metrics.all_metrics(a.astype(np.uint8), b.astype(float), spacing, tolerance=1.5)
    names = "dice jaccard precision recall specificity accuracy f1 volume_similarity hd hd95 asd assd nsd".split()
    assert list(found) == [*names, "tp", "fp", "fn", "tn"]
    assert all(type(found[name]) is float for name in names)
    for name in names[:8]:
        assert found[name] == getattr(metrics, name)(a, b)
    for name in names[8:12]:
        assert found[name] == getattr(metrics, name)(a, b, spacing)
    assert found["nsd"] == metrics.nsd(a, b, spacing, 1.5) != metrics.nsd(a, b, spacing, 0.7)


def test_counts_are_those_of_the_confusion_matrix():
    a, b = PAIRS["blobs 0"]
    found = metrics.all_metrics(a, b)
    tn, fp, fn, tp = np.bincount(2 * b.ravel().astype(int) + a.ravel(), minlength=4).tolist()
    assert {name: found[name] for name in ("tp", "fp", "fn", "tn")} == {"tp": tp, "fp": fp, "fn": fn, "tn": tn}
    assert all(type(found[name]) is int for name in ("tp", "fp", "fn", "tn"))


def test_ignored_voxels_count_nowhere():
    """Overlap is that of the other voxels; surfaces are those of masks that ignored voxels are not in."""
    a, b = PAIRS["blobs 0"]
    ignored = np.zeros_like(a)
    ignored.ravel()[::3] = True
    found, rest = metrics.all_metrics(a, b, ignored=ignored), metrics.all_metrics(a[~ignored], b[~ignored])
    for name in "dice jaccard precision recall specificity accuracy f1 volume_similarity tp fp fn tn".split():
        assert found[name] == rest[name]
    assert sum(found[name] for name in ("tp", "fp", "fn", "tn")) == (~ignored).sum()
    assert metrics.all_metrics(a, b, ignored=ignored.astype(np.uint8)) == found
    assert found["hd95"] == pytest.approx(binary.hd95(a & ~ignored, b & ~ignored))
    assert metrics.all_metrics(a, b, ignored=np.zeros_like(a)) == metrics.all_metrics(a, b)
    with pytest.raises(ValueError, match="nothing to measure"):
        metrics.all_metrics(a, b, ignored=np.ones_like(a))


def test_pixel_accuracy():
    label = np.array([[0, 1, 2], [2, 1, 255]])
    prediction = np.array([[0, 1, 1], [2, 0, 1]])
    assert metrics.pixel_accuracy(prediction, label) == 3 / 6
    assert metrics.pixel_accuracy(prediction, label, ignore_index=255) == 3 / 5
    assert metrics.pixel_accuracy(label, label, ignore_index=0) == 1
    with pytest.raises(ValueError, match="of 4 pixels none counts"):
        metrics.pixel_accuracy(np.zeros((2, 2)), np.full((2, 2), 255), ignore_index=255)
    with pytest.raises(ValueError, match=r"different shape: \(2, 3\) and \(3, 2\)"):
        metrics.pixel_accuracy(prediction, label.T)


@pytest.mark.parametrize("empty", ["result", "reference", "both"])
def test_empty_masks_give_the_documented_values(empty):
    nothing, something = np.zeros(SHAPE), ball(SHAPE, (8, 6, 7), 3)
    a = nothing if empty != "reference" else something
    b = nothing if empty != "result" else something
    assert metrics.is_empty(a, b)
    # MedPy's jc; its dc means to give the same, but with NumPy 2 divides 0 by 0 without the error it waits for.
    assert metrics.dice(a, b) == metrics.jaccard(a, b) == binary.jc(a, b) == (1 if empty == "both" else 0)
    assert all(math.isnan(ours(a, b)) for ours, _ in DISTANCES)
    found = metrics.all_metrics(a, b)
    scores = {found[name] for name in "dice jaccard precision recall f1 volume_similarity nsd".split()}
    assert scores == {1 if empty == "both" else 0}
    assert all(math.isnan(found[name]) for name in ("hd", "hd95", "asd", "assd"))
    assert found["accuracy"] == (np.asarray(a) == b).mean()
    assert found["specificity"] == (1 - np.mean(a) if empty == "reference" else 1)
    assert metrics.calculate_metric_percase(a, b)[:2] == (metrics.dice(a, b), metrics.jaccard(a, b))
    assert all(map(math.isnan, metrics.calculate_metric_percase(a, b)[2:]))


def test_percase_is_the_four_of_the_tables():
    a, b = PAIRS["blobs 0"]
    expected = (binary.dc(a, b), binary.jc(a, b), binary.hd95(a, b), binary.asd(a, b))
    assert metrics.calculate_metric_percase(a.astype(int), b.astype(np.uint8)) == pytest.approx(expected, abs=1e-9)


def test_specificity_without_background():
    full, part = np.ones(SHAPE), ball(SHAPE, (8, 6, 7), 4)
    assert metrics.specificity(full, full) == 1
    assert metrics.specificity(part, full) == 0


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="different shape"):
        metrics.dice(np.ones(3), np.ones(4))
    for spacing in (0, -1, math.nan, (1, 2), (1, 2, 0)):
        with pytest.raises(ValueError, match="3 of them"):
            metrics.hd95(*PAIRS["same"], spacing)
    with pytest.raises(ValueError, match="not -1"):
        metrics.nsd(*PAIRS["same"], tolerance=-1)
    with pytest.raises(ValueError, match="what is ignored has shape"):
        metrics.all_metrics(*PAIRS["same"], ignored=np.zeros(SHAPE[:2]))
    with pytest.raises(ValueError, match="empty"):
        metrics.surface_distances(*PAIRS["same"][:1], np.zeros(SHAPE))


def test_real_labels_equal_medpy(la_root):
    for a, b in [((la_root / "test.list").read_text().split()[i] for i in pair) for pair in ((0, 1), (2, 3))]:
        with (
            h5py.File(la_root / "data" / a / "mri_norm2.h5") as f,
            h5py.File(la_root / "data" / b / "mri_norm2.h5") as g,
        ):
            shape = tuple(map(min, f["label"].shape, g["label"].shape))
            a, b = (file["label"][...][tuple(map(slice, shape))] for file in (f, g))
        expected = (binary.dc(a, b), binary.jc(a, b), binary.hd95(a, b), binary.asd(a, b))
        assert metrics.calculate_metric_percase(a, b) == pytest.approx(expected, abs=1e-9)


def test_a_case_of_zero_voxels_is_refused_and_not_dice_1():
    nothing = np.zeros((5, 0, 4), bool)
    for metric in (metrics.dice, metrics.jaccard, metrics.accuracy, metrics.hd95, metrics.nsd):
        with pytest.raises(ValueError, match="no voxel"):
            metric(nothing, nothing)
    with pytest.raises(ValueError, match="no voxel"):
        metrics.all_metrics(nothing, nothing)
