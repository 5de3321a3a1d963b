import math

import h5py
import numpy as np
import pytest
from conftest import ball
from scipy import ndimage

from mtseg import metrics

binary = pytest.importorskip("medpy.metric.binary", reason='the oracle is missing: pip install -e ".[test]"')

OVERLAP = [(metrics.dice, binary.dc), (metrics.jaccard, binary.jc)]
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


PAIRS = {name: (a, b) for name, a, b in pairs()}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(("ours", "medpys"), OVERLAP)
def test_overlap_equals_medpy(name, ours, medpys):
    a, b = PAIRS[name]
    assert ours(a, b) == pytest.approx(medpys(a, b), abs=1e-12)


@pytest.mark.parametrize("spacing", [None, 0.625, (1.25, 0.7, 2.0)])
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(("ours", "medpys"), DISTANCES)
def test_distances_equal_medpy(name, ours, medpys, spacing):
    a, b = PAIRS[name]
    spacing = spacing[: a.ndim] if isinstance(spacing, tuple) else spacing
    assert ours(a, b, voxelspacing=spacing) == pytest.approx(medpys(a, b, voxelspacing=spacing), abs=1e-9)
    assert ours(b, a, spacing, a.ndim) == pytest.approx(medpys(b, a, spacing, a.ndim), abs=1e-9)


@pytest.mark.parametrize("empty", ["result", "reference", "both"])
def test_empty_masks_give_the_documented_values(empty):
    nothing, something = np.zeros(SHAPE), ball(SHAPE, (8, 6, 7), 3)
    a = nothing if empty != "reference" else something
    b = nothing if empty != "result" else something
    assert metrics.is_empty(a, b)
    # MedPy's jc; its dc means to give the same, but with NumPy 2 divides 0 by 0 without the error it waits for.
    assert metrics.dice(a, b) == metrics.jaccard(a, b) == binary.jc(a, b) == (1 if empty == "both" else 0)
    assert all(math.isnan(ours(a, b)) for ours, _ in DISTANCES)
    assert metrics.calculate_metric_percase(a, b)[:2] == (metrics.dice(a, b), metrics.jaccard(a, b))
    assert all(map(math.isnan, metrics.calculate_metric_percase(a, b)[2:]))


def test_percase_is_the_four_of_the_tables():
    a, b = PAIRS["blobs 0"]
    expected = (binary.dc(a, b), binary.jc(a, b), binary.hd95(a, b), binary.asd(a, b))
    assert metrics.calculate_metric_percase(a.astype(int), b.astype(np.uint8)) == pytest.approx(expected, abs=1e-9)


def test_masks_of_different_shape_are_refused():
    with pytest.raises(ValueError, match="different shape"):
        metrics.dice(np.ones(3), np.ones(4))


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
