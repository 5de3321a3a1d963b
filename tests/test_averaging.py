import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from mtseg.averaging import (
    all_flips,
    case_uncertainty,
    dropout_on,
    entropy,
    label_map,
    mean_score,
    plane_flips,
    rank_correlation,
)
from mtseg.postprocess import fill_holes, largest_component

RNG = np.random.default_rng(0)


def random_scores(classes=3, shape=(4, 5, 6), seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(classes), shape).transpose(3, 0, 1, 2).astype(np.float32)


@pytest.mark.parametrize("sides", [(4, 5, 6), (4, 5)])
@pytest.mark.parametrize("channels", [None, 2])
def test_each_flip_is_undone(channels, sides):
    """A pointwise network sees no direction: its mean over flips is itself. One that looks left is symmetrised."""
    dims = len(sides)
    image = RNG.standard_normal(sides if channels is None else (channels, *sides)).astype(np.float32)
    flips = all_flips(range(-dims, 0))

    def plain(image):
        return image if image.ndim == dims else image[0]

    def pointwise(net, image):
        return np.stack([plain(image)] * net)

    assert len(flips) == len(set(flips)) == 2**dims
    np.testing.assert_allclose(mean_score(pointwise, [3], image, flips), pointwise(3, image), rtol=1e-6)
    np.testing.assert_array_equal(mean_score(pointwise, [3], image), pointwise(3, image))

    def first_along(axis):
        return lambda net, image: np.stack([np.roll(plain(image), 1, axis)])

    for axis in range(dims):
        expected = (np.roll(plain(image), 1, axis) + np.roll(plain(image), -1, axis))[None] / 2
        np.testing.assert_allclose(mean_score(first_along(axis), [1], image, flips), expected, atol=1e-6)


def test_a_plane_has_four_mirror_images():
    assert set(plane_flips(-1)) == {(), (-3,), (-2,), (-3, -2)}
    assert set(plane_flips(-3)) == {(), (-2,), (-1,), (-2, -1)}
    assert set(plane_flips(-2)) == {(), (-3,), (-1,), (-3, -1)}


def test_several_networks_are_averaged():
    maps = [random_scores(seed=s) for s in range(3)]
    image = np.zeros((4, 5, 6), np.float32)
    mean = mean_score(lambda net, image: maps[net], range(3), image)
    np.testing.assert_allclose(mean, np.mean(maps, axis=0), rtol=1e-6)
    assert maps[0].sum() == pytest.approx(120, rel=1e-4)  # they themselves are left as they were


def test_dropout_alone_is_switched_on_and_off_again():
    net = nn.Sequential(nn.BatchNorm3d(2), nn.Dropout3d(0.5), nn.Sequential(nn.Dropout(0.5))).eval()
    for before in ([False] * 5, [True] * 5, [True, False, True, True, False]):
        for module, mode in zip(net.modules(), before, strict=True):
            module.training = mode
        with pytest.raises(KeyError), dropout_on([net]) as count:
            assert count == 2
            assert [m.training for m in net.modules()] == [False, False, True, False, True]
            raise KeyError
        assert [m.training for m in net.modules()] == before
    with dropout_on([nn.Conv3d(1, 1, 1)]) as count:
        assert count == 0


def test_entropy_is_scipys_and_knows_its_ends():
    scores = random_scores()
    scores[:, 0, 0, 0] = (1, 0, 0)
    scores[:, 0, 0, 1] = 1 / 3
    found = entropy(iter(scores))
    np.testing.assert_allclose(found, stats.entropy(scores.astype(float), axis=0), atol=1e-6)
    assert found[0, 0, 0] == 0
    assert found[0, 0, 1] == pytest.approx(math.log(3))
    labels = np.zeros((4, 5, 6), int)
    assert math.isnan(case_uncertainty(found, labels))
    labels[0, 0, :2] = (1, 2)
    assert case_uncertainty(found, labels) == pytest.approx(math.log(3) / 2)
    assert case_uncertainty(found, labels, None) == pytest.approx(stats.entropy(scores.astype(float), axis=0).mean())


def test_label_map_is_argmax():
    scores = random_scores(5)
    scores[2, 0], scores[4, 0] = 2, 2  # of equals the first
    expected = torch.from_numpy(scores).argmax(dim=0).numpy()
    np.testing.assert_array_equal(label_map(scores), expected)
    np.testing.assert_array_equal(label_map(iter(scores)), expected)
    assert label_map(scores).dtype == np.uint8


def test_rank_correlation():
    u, d = RNG.random(20), RNG.random(20)
    assert rank_correlation(u, d) == pytest.approx(stats.spearmanr(u, 1 - d).statistic)
    assert rank_correlation([1, 2, 3], [0.9, 0.5, 0.1]) == pytest.approx(1)
    assert rank_correlation([1, math.nan, 2, 3], [0.1, 0, 0.5, 0.9]) == pytest.approx(-1)
    for few in ([[1, 2], [0, 1]], [[1, 1, 1], [0.1, 0.2, 0.3]], [[1, 2, math.nan], [0, 1, 0.5]]):
        assert math.isnan(rank_correlation(*few))


def test_the_largest_piece_of_each_class_stays():
    label = np.zeros((9, 6, 5), np.uint8)
    label[0:2, 0:2, 0:2] = 1  # 8 voxels, and one more at its corner: connected
    label[2, 2, 2] = 1
    label[6:8, 0:2, 0:2] = 1  # 8 voxels
    label[4, 4, :4], label[8, 5, 4] = 4, 4
    expected = label.copy()
    expected[6:8, 0:2, 0:2] = 0
    expected[8, 5, 4] = 0
    before = label.copy()
    np.testing.assert_array_equal(largest_component(label), expected)
    np.testing.assert_array_equal(label, before)
    assert largest_component(label).dtype == np.uint8
    assert not largest_component(np.zeros((3, 3, 3), int)).any()


def test_only_enclosed_background_is_filled():
    label = np.zeros((7, 7, 7), np.uint8)
    label[1:6, 1:6, 1:6] = 2
    label[2:5, 2:5, 2:5] = 0
    label[3, 3, 3] = 1
    closed = label.copy()
    closed[1:6, 1:6, 1:6] = 2
    closed[3, 3, 3] = 1
    np.testing.assert_array_equal(fill_holes(label), closed)
    label[1, 3, 3] = 0  # a way out
    np.testing.assert_array_equal(fill_holes(label), label)


def test_a_hole_becomes_the_innermost_class_around_it_whatever_their_numbers():
    rings = np.zeros((9, 9), int)
    rings[:9, :9], rings[1:8, 1:8], rings[2:7, 2:7], rings[3:6, 3:6] = 1, 0, 2, 0
    rings = np.pad(rings, ((0, 0), (0, 30)))
    rings[:, 20:] = 2  # more of the inner class elsewhere
    filled = rings.copy()
    filled[1:8, 1:8], filled[2:7, 2:7] = 1, 2
    for numbers in ([0, 1, 2], [0, 2, 1]):
        numbers = np.array(numbers)
        np.testing.assert_array_equal(fill_holes(numbers[rings]), numbers[filled])


def test_the_largest_piece_of_a_mask():
    mask = np.array([[1, 0, 1, 1]], bool)
    assert largest_component(mask).tolist() == [[False, False, True, True]]


def test_clean_up_of_an_image():
    """Pixels are connected across corners, but a corner is no way out of a hole."""
    rows = ["1100222", "0010202", "0000212", "1100220"]
    label = np.array([[int(digit) for digit in row] for row in rows])
    largest, filled = label.copy(), label.copy()
    largest[3, :2] = largest[2, 5] = 0
    np.testing.assert_array_equal(largest_component(label), largest)
    filled[1, 5] = 2
    np.testing.assert_array_equal(fill_holes(label), filled)
    label[1, 6] = 0
    np.testing.assert_array_equal(fill_holes(label), label)
