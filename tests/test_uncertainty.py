"""Scores of voxels and of regions against closed forms, SciPy and brute force."""

import itertools
import math
import weakref

import numpy as np
import pytest
from scipy import stats
from scipy.ndimage import distance_transform_cdt

from mtseg.uncertainty import (
    UncertaintyError,
    bald,
    entropy,
    least_confidence,
    margin,
    mean_map,
    predicted_boundary,
    predicted_foreground,
    top_mean,
    variance,
    voxel_scores,
    window_means,
)

# Three voxels: sure, of two minds, of three minds.
TINY = np.array([[1, 0.5, 1 / 3], [0, 0.5, 1 / 3], [0, 0, 1 / 3]])
ALL = ("entropy", "least_confidence", "margin", "bald", "variance")


def score_maps(members, classes=3, shape=(4, 5, 6), seed=0):
    drawn = np.random.default_rng(seed).dirichlet(np.ones(classes), (members, *shape))
    return np.moveaxis(drawn, -1, 1).astype(np.float32)


def test_closed_forms_of_three_voxels():
    np.testing.assert_allclose(entropy(TINY), [0, math.log(2), math.log(3)], rtol=1e-6)
    np.testing.assert_allclose(least_confidence(TINY), [0, 1 / 2, 2 / 3], rtol=1e-6)
    np.testing.assert_allclose(margin(TINY), [0, 1, 1], rtol=1e-6)
    # Members that are sure of different classes are all mutual information, members that are alike none.
    np.testing.assert_allclose(bald([[[1.0], [0]], [[0.0], [1]]]), [math.log(2)], rtol=1e-6)
    np.testing.assert_allclose(variance([[[1.0], [0]], [[0.0], [1]]]), [1 / 2], rtol=1e-6)
    np.testing.assert_array_equal(bald([TINY, TINY]), 0)


@pytest.mark.parametrize("shape", [(4, 5, 6), (7, 3), (9,)])
def test_random_members_against_scipy_and_numpy(shape):
    members = score_maps(5, 4, shape)
    average = members.mean(axis=0)
    ordered = np.sort(average, axis=0)
    np.testing.assert_allclose(mean_map(members), average, rtol=1e-6)
    pe, expected = stats.entropy(average, axis=0), stats.entropy(members, axis=1).mean(axis=0)
    for name, wanted in zip(
        ALL,
        (pe, 1 - ordered[-1], 1 - ordered[-1] + ordered[-2], pe - expected, members.var(axis=0).sum(axis=0)),
        strict=True,
    ):
        found = voxel_scores(name, members)
        assert found.dtype == np.float32 and found.shape == shape
        np.testing.assert_allclose(found, wanted, atol=2e-6)
    np.testing.assert_allclose(voxel_scores("entropy", members.astype(np.float16)), pe, atol=2e-3)


def test_one_network_disagrees_with_nobody():
    members = score_maps(1)
    assert not voxel_scores("bald", members).any() and not voxel_scores("variance", members).any()
    np.testing.assert_array_equal(voxel_scores("entropy", members), entropy(members[0]))
    assert not entropy(np.ones((1, 4))).any() and not margin(np.ones((1, 4))).any()


@pytest.mark.parametrize("name", ALL)
def test_rounding_makes_no_score_negative(name):
    """Power noise takes logarithms, and a softmax may give a little more than 1."""
    sure = np.array([[1.0000001, 0.999], [0, 0]], np.float32)
    found = voxel_scores(name, [sure, sure * np.float32(1.0000002), sure[:, ::-1]])
    assert (found >= 0).all()


@pytest.mark.parametrize("name", ALL)
def test_members_are_in_memory_one_at_a_time(name):
    made = []

    def members():
        for seed in range(6):
            scores = score_maps(1, seed=seed)[0].copy()
            made.append(weakref.ref(scores))
            assert sum(each() is not None for each in made) <= 2
            yield scores
            del scores

    assert voxel_scores(name, members()).max() > 0


@pytest.mark.parametrize(
    ("scores", "sentence"),
    [
        ([1.0, 2], "a score map is (classes, *spatial), not of shape (2,); give one"),
        ([[3.0, 0.5], [-3, 0.5]], "the least is -3 and they sum to 0 to 1; give the softmax of the network's logits"),
        ([[0.9], [0.9]], "they sum to 1.8 to 1.8"),
        ([[math.nan], [1.0]], "they sum to nan to nan"),
    ],
)
def test_what_is_no_score_map_is_refused(scores, sentence):
    for name in ALL:
        with pytest.raises(UncertaintyError) as refused:
            voxel_scores(name, [scores])
        assert sentence in str(refused.value)


def test_members_that_do_not_fit_and_unknown_names_are_refused():
    with pytest.raises(UncertaintyError, match=r"shapes \(3, 3\) and \(3, 2\); give score maps of one image"):
        bald([TINY, TINY[:, :2]])
    with pytest.raises(UncertaintyError, match="there is no member; give the score map of one network"):
        voxel_scores("entropy", [])
    with pytest.raises(
        UncertaintyError, match="no uncertainty 'doubt'; choose among entropy, least_confidence, margin"
    ):
        voxel_scores("doubt", [TINY])


# ------------------------------------------------------------------------------------------------------------- regions


@pytest.mark.parametrize("widen", [0, 1, 3])
def test_the_boundary_is_within_so_many_steps_of_another_class(widen):
    labels = np.zeros((12, 9, 7), int)
    labels[3:6, 2:5, 2:4], labels[6:8, 3, 3] = 1, 2
    # Steps across faces to the nearest voxel of another class, of each voxel: one is the boundary itself.
    steps = np.zeros(labels.shape)
    for label in range(3):
        steps += distance_transform_cdt(labels == label, metric="taxicab")
    boundary = steps == 1
    wanted = distance_transform_cdt(~boundary, metric="taxicab") <= widen
    np.testing.assert_array_equal(predicted_boundary(labels, widen), wanted)
    assert not predicted_boundary(np.ones((4, 4), int), widen).any()


def test_foreground_is_what_is_not_the_background():
    labels = np.array([[0, 1], [2, 0]])
    np.testing.assert_array_equal(predicted_foreground(labels), [[False, True], [True, False]])
    np.testing.assert_array_equal(predicted_foreground(labels, background=1), [[True, False], [True, True]])
    assert predicted_foreground(labels, background=None).all()


def test_the_mean_of_the_largest_share():
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert top_mean(values, 0.25) == 10 and top_mean(values, 1e-9) == 11 and top_mean(values, 1) == 5.5
    assert top_mean(np.arange(100.0), 0.29) == 85  # of 29, though 0.29 x 100 is below 29 in floating point
    for share in (0, 1.5, math.nan):
        with pytest.raises(UncertaintyError, match="share of voxels to average is above 0 and at most 1, not"):
            top_mean(values, share)


@pytest.mark.parametrize(
    ("shape", "size", "stride"),
    [
        ((11, 8, 9), (4, 3, 5), (3, 2, 4)),
        ((11, 8, 9), (11, 8, 1), 1),  # slices
        ((11, 8), 50, 8),  # larger than the image: the image
        ((10, 7), (1, 1), 1),
        ((6,), 3, 5),
    ],
)
def test_windows_against_brute_force(shape, size, stride):
    values = np.random.default_rng(1).random(shape).astype(np.float32)
    means, starts, stops = window_means(values, size, stride)
    sizes, strides = (np.broadcast_to(given, len(shape)) for given in (size, stride))
    rows = [
        sorted({*range(0, max(side - width, 0) + 1, step), max(side - width, 0)})
        for side, width, step in zip(shape, sizes, strides, strict=True)
    ]
    assert starts.tolist() == [list(start) for start in itertools.product(*rows)]
    assert (stops - starts == np.minimum(sizes, shape)).all()
    for found, start, stop in zip(means, starts, stops, strict=True):
        assert found == pytest.approx(values[tuple(map(slice, start, stop))].mean(dtype=float), rel=1e-12)
    assert not window_means(np.zeros(shape), size, stride)[0].any()


@pytest.mark.parametrize(
    ("size", "stride", "sentence"),
    [
        ((2, 2), 1, "do not fit an image of 3 axes; give a number an axis"),
        (0, 1, "sizes and strides are at least 1"),
        (2, (1, 1, 0), "sizes and strides are at least 1"),
    ],
)
def test_impossible_windows_are_refused(size, stride, sentence):
    with pytest.raises(UncertaintyError, match=sentence):
        window_means(np.zeros((4, 4, 4)), size, stride)
