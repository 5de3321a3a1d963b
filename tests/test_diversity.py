"""Choice by features against brute force, SciPy's distances and trees, and in clouds that lie far from each other."""

import itertools
import math

import numpy as np
import pytest
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from mtseg import diversity
from mtseg.diversity import (
    DiversityError,
    distance_to_labeled,
    k_center,
    k_center_of_unsure,
    k_means,
    prepared,
    prob_cover,
    pure_radius,
    squared_distances,
    typicality,
    typiclust,
)


def seeded(seed=0):
    return np.random.default_rng(seed)


def clouds(sizes=(30, 50, 20, 8), spread=0.05, dims=6, seed=0):
    """(points, cloud of each) in random order; the clouds lie far from each other."""
    rng = seeded(seed)
    cloud = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return np.eye(dims)[cloud] + spread * rng.standard_normal((len(cloud), dims)), cloud


CHOICES = {
    "k_center": lambda x, n, labeled=(), seed=0: k_center(x, n, labeled),
    "k_means": lambda x, n, labeled=(), seed=0: k_means(x, n, seeded(seed), labeled),
    "typiclust": lambda x, n, labeled=(), seed=0: typiclust(x, n, seeded(seed), labeled),
    "prob_cover": lambda x, n, labeled=(), seed=0: prob_cover(x, n, 0.3, seeded(seed), labeled),
    "k_center_of_unsure": lambda x, n, labeled=(), seed=0: k_center_of_unsure(x[:, 0], x, n, labeled),
}
every_choice = pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)


@pytest.mark.parametrize("block", [1, 100, 2**22])
def test_distances_in_blocks(monkeypatch, block):
    monkeypatch.setattr(diversity, "BLOCK", block)
    a, b = seeded().standard_normal((50, 7)), seeded(1).standard_normal((30, 7)) + 3
    found = [squared for _, squared in squared_distances(a, b)]
    assert len(found) == math.ceil(50 / max(block // 30, 1))
    np.testing.assert_allclose(np.concatenate(found), cdist(a, b, "sqeuclidean"), rtol=1e-12)
    labeled = [3, 8, 41]
    np.testing.assert_allclose(distance_to_labeled(a, labeled), cdist(a, a[labeled]).min(axis=1), rtol=1e-12)
    assert np.isinf(distance_to_labeled(a, [])).all()


# ------------------------------------------------------------------------------------------------------------ features


def test_features_are_standardised_then_of_length_one():
    x = seeded().standard_normal((40, 5)) * [1, 10, 0.1, 1, 0] + [0, 100, 0, 1e-3, 7]
    x[:, 4] = 7
    found = prepared(x, seeded())
    wanted = (x - x.mean(axis=0))[:, :4] / x.std(axis=0)[:4]
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(found[:, :4], wanted, rtol=1e-9)
    assert not found[:, 4].any()
    assert not prepared(np.ones((3, 2)), seeded()).any() and prepared(np.ones((0, 80)), seeded()).shape == (0, 64)


def test_reduced_features_keep_distances():
    x = seeded().standard_normal((60, 3)) @ seeded(1).standard_normal((3, 900)) + 0.01 * seeded(2).random((60, 900))
    whole = cdist(prepared(x, seeded(), dims=900), prepared(x, seeded(), dims=900))
    apart = whole > 0.1
    projected = prepared(x, seeded())
    assert projected.shape == (60, 64)
    assert np.abs(cdist(projected, projected)[apart] / whole[apart] - 1).mean() < 0.15
    np.testing.assert_array_equal(prepared(x, seeded()), projected)
    assert (prepared(x, seeded(5)) != projected).any()


# -------------------------------------------------------------------------------------------------- each against theory


@pytest.mark.parametrize("labeled", [(), (4,), (7, 0, 33)])
def test_k_center_against_brute_force(labeled):
    x = seeded(2).standard_normal((60, 5))
    distances = cdist(x, x)
    centres, wanted = list(labeled), []
    for _ in range(12):
        if centres:
            nearest = [-1 if i in centres else distances[i, centres].min() for i in range(60)]
        else:
            nearest = np.linalg.norm(x - x.mean(axis=0), axis=1)
        centres.append(int(np.argmax(nearest)))
        wanted.append(centres[-1])
    assert k_center(x, 12, labeled).tolist() == wanted


def test_k_center_covers_at_most_twice_as_badly_as_the_best():
    """The bound of the greedy algorithm (Gonzalez 1985), against every choice of three centres."""
    for seed in range(5):
        x = seeded(seed).standard_normal((14, 2))
        distances = cdist(x, x)
        best = min(distances[:, list(three)].min(axis=1).max() for three in itertools.combinations(range(14), 3))
        assert distances[:, k_center(x, 3)].min(axis=1).max() <= 2 * best


def test_k_means_chooses_the_middle_of_every_cloud():
    x, cloud = clouds()
    for seed in range(5):
        chosen = k_means(x, 4, seeded(seed))
        assert sorted(cloud[chosen].tolist()) == [0, 1, 2, 3]
        for index in chosen:
            members = np.flatnonzero(cloud == cloud[index])
            away = np.linalg.norm(x[members] - x[members].mean(axis=0), axis=1)
            assert index == members[away.argmin()]


def test_typicality_against_a_tree():
    for count in (50, 13, 2):
        x = seeded(count).standard_normal((count, 4))
        k = min(20, count // 2)
        distances = cKDTree(x).query(x, k + 1)[0][:, 1:]
        np.testing.assert_allclose(typicality(x), 1 / (distances.mean(axis=1) + 1e-5), rtol=1e-6)
    assert typicality(np.ones((1, 4))).tolist() == [0]


def test_typiclust_begins_with_large_clouds_without_labels():
    x, cloud = clouds()
    chosen = typiclust(x, 4, seeded())
    assert cloud[chosen].tolist() == [1, 0, 2, 3]  # the largest first
    for index in chosen:
        members = np.flatnonzero(cloud == cloud[index])
        assert index == members[typicality(x[members]).argmax()]
    labeled = [int(np.flatnonzero(cloud == 1)[0]), int(np.flatnonzero(cloud == 2)[0])]
    assert cloud[typiclust(x, 2, seeded(), labeled)].tolist() == [0, 3]
    covered = np.flatnonzero(cloud == 1)[:9].tolist()  # windows of one region, which is one label
    assert sorted(cloud[typiclust(x, 3, seeded(), covered, 1)].tolist()) == [0, 2, 3]
    x, cloud = clouds((30, 20, 5))  # a cloud of five is left out as long as there are others
    assert cloud[typiclust(x, 3, seeded())].tolist() == [0, 1, 0]
    assert sorted(cloud[typiclust(x, 55, seeded())].tolist()) == [0] * 30 + [1] * 20 + [2] * 5


@pytest.mark.parametrize("purity", [1.0, 0.95, 0.8, 0.5])
def test_the_radius_of_prob_cover_is_the_largest_that_is_pure(purity):
    x, _ = clouds(spread=0.3, dims=4)
    label, _ = diversity.clusters(x, 4, seeded(1))
    distances = cdist(x, x)

    def share_pure(radius):
        return np.mean([(label[row < radius] == own).all() for row, own in zip(distances, label, strict=True)])

    radius = pure_radius(x, 4, seeded(1), purity)
    assert share_pure(radius * (1 - 1e-9)) >= purity > share_pure(radius * (1 + 1e-9))


@pytest.mark.parametrize("labeled", [(), (5, 40)])
def test_prob_cover_against_brute_force(labeled):
    x, _ = clouds(spread=0.2)
    near = cdist(x, x) < 0.5
    bare, wanted = ~near[list(labeled)].any(axis=0), []
    while bare.any():
        gain = (near & bare).sum(axis=1)
        gain[[*labeled, *wanted]] = -1
        wanted.append(int(gain.argmax()))
        bare &= ~near[wanted[-1]]
    chosen = prob_cover(x, len(wanted) + 3, 0.5, seeded(), labeled)
    assert chosen[: len(wanted)].tolist() == wanted
    np.testing.assert_array_equal(chosen[len(wanted) :], k_center(x, 3, [*labeled, *wanted]))


def test_k_center_among_the_unsure():
    x, labeled = seeded().standard_normal((80, 5)), [3, 9]
    scores = seeded(1).random(80)
    scores[labeled] = 2
    best = [i for i in np.argsort(-scores) if i not in labeled][:15]
    wanted = k_center(x[[*labeled, *best]], 5, [0, 1]) - 2
    for factor in (3, 3.1):
        assert k_center_of_unsure(scores, x, 5, labeled, factor=factor).tolist() == np.array(best)[wanted].tolist()
    assert {*k_center_of_unsure(scores, x, 5, labeled, factor=1).tolist()} == {*best[:5]}


# ---------------------------------------------------------------------------------------------------- what all have


@pytest.mark.parametrize("name", CHOICES)
def test_same_seed_same_choice_whatever_the_order(name):
    choice, n = CHOICES[name], 2 if name == "prob_cover" else 25  # whose counts are equal sooner or later
    x = seeded(4).standard_normal((300, 5)) / 3
    labeled = [5, 17, 200]
    chosen = choice(x, n, labeled)
    np.testing.assert_array_equal(choice(x, n, labeled), chosen)
    order = seeded(9).permutation(len(x))
    place = np.argsort(order)
    np.testing.assert_array_equal(order[choice(x[order], n, place[labeled])], chosen)


@every_choice
@pytest.mark.parametrize("sample", [40, 10_000])
def test_no_candidate_twice_and_none_that_is_labelled(choice, sample, monkeypatch):
    monkeypatch.setattr(diversity, "SAMPLE", sample)
    monkeypatch.setattr(diversity, "BLOCK", 500)
    x, labeled = seeded().standard_normal((120, 3)) / 4, [0, 7, 119]
    for n, size in ((0, 0), (1, 1), (30, 30), (117, 117), (500, 117)):
        chosen = choice(x, n, labeled)
        assert chosen.dtype == np.int64 and len({*chosen.tolist()} - {*labeled}) == len(chosen) == size


@every_choice
def test_equal_and_missing_candidates(choice):
    alike = np.ones((9, 3))
    assert sorted(choice(alike, 4, [0]).tolist()) == [1, 2, 3, 4]
    for nothing in (choice(np.zeros((0, 3)), 4), choice(alike, 4, range(9)), choice(alike, 0)):
        assert nothing.tolist() == [] and nothing.dtype == np.int64
    twins = np.repeat(np.eye(3), 4, axis=0)
    assert len({*choice(twins, 12).tolist()}) == 12


@every_choice
@pytest.mark.parametrize(
    ("x", "n", "labeled", "sentence"),
    [
        (
            [[1.0, math.nan], [1, 2]],
            1,
            (),
            r"features are \(N, D\), not of shape \(2, 2\) with 1 not finite; mend them",
        ),
        (np.zeros((2, 1, 1)), 1, (), r"not of shape \(2, 1, 1\) with 0 not finite"),
        ([[1.0, 2]], -1, (), "the budget is -1 candidates; give 0 or more"),
        ([[1.0, 2]], 1, (1,), "rows have the indices 0 to 0, not 1 to 1"),
        ([[1.0, 2]], 1, (-1,), "rows have the indices 0 to 0, not -1 to -1"),
    ],
)
def test_what_cannot_be_chosen_ends_in_a_sentence(choice, x, n, labeled, sentence):
    with pytest.raises(DiversityError, match=sentence):
        choice(np.array(x), n, labeled)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda x: pure_radius(x, 2, seeded(), 0), "the purity is above 0 and at most 1, not 0; give 0.95"),
        (lambda x: pure_radius(x, 1, seeded()), "4 rows do not part into 1 classes; give 2 or more, and unlike rows"),
        (lambda x: pure_radius(x[:1], 2, seeded()), "1 rows do not part into 2 classes"),
        (lambda x: prob_cover(x, 1, 0, seeded()), "delta is a distance above 0, not 0; take pure_radius"),
        (
            lambda x: k_center_of_unsure([1, 2], x, 1),
            r"scores have shape \(2,\) with 0 NaN, of 4 rows, and the factor is 5",
        ),
        (lambda x: k_center_of_unsure([1, 2, 3, math.nan], x, 1), r"shape \(4,\) with 1 NaN, of 4 rows"),
        (lambda x: k_center_of_unsure([1] * 4, x, 1, factor=0.9), "the factor is 0.9; give a number a row, and 1"),
        (lambda x: k_center_of_unsure([1] * 4, x, 1, factor=math.inf), "the factor is inf"),
        (lambda x: k_center_of_unsure([1] * 4, x, 1, factor=math.nan), "the factor is nan"),
    ],
)
def test_settings_that_make_no_sense_end_in_a_sentence(wrong, sentence):
    with pytest.raises(DiversityError, match=sentence):
        wrong(np.eye(4))
