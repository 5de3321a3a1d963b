"""Choice by scores and by chance: distributions by chi-square, windows against a greedy choice voxel by voxel."""

import itertools
import math

import numpy as np
import pytest
from scipy import ndimage, stats

from mtseg.query import (
    QueryError,
    Windows,
    clasp_pe,
    every_kth,
    first_windows,
    foreground_random,
    noisy,
    power_beta,
    top,
    top_windows,
    weighted_ranks,
)

KINDS = ("power", "softrank", "gibbs")


def seeded(seed=0):
    return np.random.default_rng(seed)


def grid(cases=3, sides=(12, 9), size=(4, 3), stride=2):
    """Windows of equal cases that overlap their neighbours."""
    starts = [
        *itertools.product(*(range(0, side - width + 1, stride) for side, width in zip(sides, size, strict=True)))
    ]
    starts = np.array(starts)
    case = np.repeat(np.arange(cases), len(starts))
    starts = np.tile(starts, (cases, 1))
    return Windows(case, starts, starts + size)


def apart(count):
    """Windows that overlap none of the others."""
    starts = np.arange(count)[:, None]
    return Windows(np.zeros(count, int), starts, starts + 1)


def test_the_highest_scores_the_first_of_equals():
    assert top([1, 3, 2, 3], 3).tolist() == [1, 3, 2]
    assert top([1, 3, 2, 3], 3, labeled=[1]).tolist() == [3, 2, 0]
    assert top([1, -np.inf], 5).tolist() == [0, 1]
    for nothing in (top([], 3), top([1, 2], 0), top([1, 2], 2, [0, 1])):
        assert nothing.tolist() == [] and nothing.dtype == np.int64


@pytest.mark.parametrize("beta", [0.5, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_noise_draws_without_replacement_in_proportion(kind, beta):
    """The first two of four candidates, in their order, against the twelve chances of sampling without replacement."""
    scores = np.array([0.4, 1.0, 0.7, 0.2])
    weight = {"power": scores**beta, "softrank": np.array([3.0, 1, 2, 4]) ** -beta, "gibbs": np.exp(beta * scores)}[
        kind
    ]
    rng, draws = seeded(3), 6000
    first_two = [tuple(top(noisy(scores, kind, rng, beta), 2).tolist()) for _ in range(draws)]
    pairs = [*itertools.permutations(range(4), 2)]
    chances = [weight[i] / weight.sum() * weight[j] / (weight.sum() - weight[i]) for i, j in pairs]
    assert stats.chisquare([first_two.count(pair) for pair in pairs], np.multiply(chances, draws)).pvalue > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_noise_does_not_depend_on_the_order_and_ends_in_the_highest(kind):
    scores = seeded().random(50)
    order = seeded(1).permutation(50)
    np.testing.assert_array_equal(noisy(scores[order], kind, seeded(2)), noisy(scores, kind, seeded(2))[order])
    assert (noisy(scores, kind, seeded(2)) != noisy(scores, kind, seeded(3))).all()
    np.testing.assert_array_equal(top(noisy(scores, kind, seeded(2), 1e9), 10), top(scores, 10))
    assert noisy([], kind, seeded()).shape == (0,)


def test_a_score_of_zero_comes_last_under_power_noise():
    assert set(top(noisy([0, 1e-9, 0, 1e-9], "power", seeded()), 2).tolist()) == {1, 3}


def test_weighted_ranks():
    ranks = weighted_ranks([[5.0, 7, 7, 9, 1], [0.1, 0.2, 0.3, 0.4, 0.5]], [2, 1])
    np.testing.assert_allclose(ranks, [2 * 0.25, 2 * 0.625 + 0.25, 2 * 0.625 + 0.5, 2 + 0.75, 1])
    assert weighted_ranks([[3.0]], [1]).tolist() == [0]


# ------------------------------------------------------------------------------------------------------------- windows


def greedy(scores, windows, n, annotated, per_case, sides):
    """The choice by masks of what is taken, voxel by voxel."""
    taken = {case: np.zeros(sides, bool) for case in np.unique(windows.case)}
    chosen, counts = [], dict.fromkeys(taken, 0)
    for case, start, stop in zip(*annotated, strict=True):
        taken[case][tuple(map(slice, start, stop))] = True
    for index in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        case, start, stop = (part[index] for part in windows)
        box = taken[case][tuple(map(slice, start, stop))]
        if len(chosen) < n and not box.any() and counts[case] < per_case:
            box[...] = True
            counts[case] += 1
            chosen.append(index)
    return chosen


@pytest.mark.parametrize("per_case", [1, 3, None])
@pytest.mark.parametrize("seed", range(5))
def test_windows_against_masks(seed, per_case):
    windows = grid()
    scores = seeded(seed).integers(0, 20, len(windows.case)) / 20  # with ties
    annotated = Windows(np.array([0, 2]), np.array([[5, 3], [0, 0]]), np.array([[6, 4], [4, 9]]))
    for n in (0, 1, 6, 100):
        wanted = greedy(scores, windows, n, annotated, per_case or 100, (12, 9))
        assert top_windows(scores, windows, n, annotated, per_case).tolist() == wanted
    assert top_windows(scores, windows, 0).dtype == np.int64


def test_cases_may_have_names_and_nothing_may_be_left():
    windows = Windows(np.array(["a", "b", "b"]), np.zeros((3, 2), int), np.ones((3, 2), int))
    assert top_windows([1, 2, 3], windows, 5).tolist() == [2, 0]
    assert top_windows([1, 2, 3], windows._replace(case=["a", "b", "b"]), 5, per_case=1).tolist() == [2, 0]
    assert top_windows([1, 2, 3], windows, 5, annotated=windows).tolist() == []
    empty = Windows(np.array([], int), np.zeros((0, 2), int), np.zeros((0, 2), int))
    assert top_windows([], empty, 5).tolist() == [] == clasp_pe([[]], [], empty, 5, 1, seeded()).tolist()


def test_the_schedule_of_power_noise():
    assert [power_beta(t, 5) for t in range(5)] == pytest.approx([1, 10**0.5, 10, 10**1.5, 100])
    assert power_beta(0, 1) == 1 and power_beta(2, 3, 2, 8) == pytest.approx(8)


def test_clasp_pe_splits_the_budget_over_the_classes():
    """Each of three classes is unsure in 40 windows of its own, and nobody but the total in 80 others."""
    class_scores = np.zeros((3, 200))
    for number in range(3):
        class_scores[number, 40 * number : 40 * (number + 1)] = 1
    scores = np.repeat([0.0, 1], [120, 80])
    for seed in range(20):
        chosen = clasp_pe(class_scores, scores, apart(200), 50, 1.0, seeded(seed))
        assert len({*chosen.tolist()}) == 50
        assert np.bincount(chosen // 40, minlength=5)[:3].tolist() == [11, 11, 11]  # int(0.66 x 50) = 33
    # int(0.66 x 8) = 5: one each, and two classes get one more, each pair by lot.
    extra = []
    for seed in range(300):
        counts = np.bincount(clasp_pe(class_scores, scores, apart(200), 8, 1.0, seeded(seed)) // 40, minlength=5)
        assert sorted(counts[:3].tolist()) == [1, 2, 2]
        extra.append(int(counts[:3].argmin()))
    assert stats.chisquare(np.bincount(extra, minlength=3)).pvalue > 0.01


def test_clasp_pe_without_noise_and_without_room():
    scores, class_scores = seeded().random(60), seeded(1).random((2, 60))
    chosen = clasp_pe(class_scores, scores, apart(60), 10, 1e9, seeded())
    best = [set(top(each, 3).tolist()) for each in class_scores]
    assert not best[0] & best[1]
    assert {*chosen[:3].tolist()} in best and {*chosen[3:6].tolist()} in best  # int(0.66 x 10) = 6
    np.testing.assert_array_equal(chosen[6:], top(scores, 4, chosen[:6]))

    windows = grid()  # classes and total want the same places: no overlap, and the limit holds for all together
    scores = seeded().random(len(windows.case))
    chosen = clasp_pe([scores, scores], scores, windows, 9, 1.0, seeded(), annotated=Windows(*(p[:1] for p in windows)))
    again = clasp_pe([scores, scores], scores, windows, 9, 1.0, seeded(), annotated=Windows(*(p[:1] for p in windows)))
    np.testing.assert_array_equal(chosen, again)
    for i, j in itertools.combinations([0, *chosen.tolist()], 2):
        apart_along = (windows.start[i] >= windows.stop[j]) | (windows.start[j] >= windows.stop[i])
        assert windows.case[i] != windows.case[j] or apart_along.any()
    limited = clasp_pe([scores, scores], scores, windows, 9, 1.0, seeded(), per_case=2)
    assert np.bincount(windows.case[limited]).tolist() == [2, 2, 2]
    assert len(clasp_pe([scores], scores, apart(len(scores)), 1000, 1.0, seeded())) == len(scores)


# ------------------------------------------------------------------------------------------------------------ by chance


def test_every_kth_slice():
    for count, k in ((10, 2), (12, 3), (20, 5), (7, 1), (9, 9)):
        assert every_kth(count, count // k).tolist() == [*range(k // 2, count, k)]
    assert every_kth(10, 4).tolist() == [1, 3, 6, 8]
    assert every_kth(6, 2, labeled=[0, 1]).tolist() == [3, 5]
    assert every_kth(3, 9).tolist() == [0, 1, 2] and every_kth(0, 9).tolist() == [] == every_kth(4, 0).tolist()


LABELS = np.zeros((24, 24), int)
LABELS[6:15, 6:15], LABELS[16:19, 16:20] = 1, 2


@pytest.mark.parametrize("foreground", [0, 1 / 3, 2 / 3])
def test_where_foreground_random_centres_its_windows(foreground):
    """Against the chance of each kind of voxel, in 1500 cases of a large and a small class."""
    windows = foreground_random([LABELS.shape] * 1500, lambda case: LABELS, (5, 5), 1500, seeded(), foreground)
    assert sorted(windows.case.tolist()) == [*range(1500)]
    inner = [ndimage.distance_transform_cdt(LABELS == label, metric="taxicab") > 1 for label in (1, 2)]
    kinds = LABELS * 2 - (inner[0] | inner[1])  # 1 and 3 inside of a class, 2 and 4 on its border
    everywhere = np.bincount(kinds[2:22, 2:22].ravel(), minlength=5)  # centres of windows inside of the case
    voxels = np.bincount(kinds.ravel(), minlength=5)
    chances = (1 - foreground) * everywhere / everywhere.sum()
    for inside, border in ((1, 2), (3, 4)):
        of_class = voxels[[inside, border]] / voxels[[inside, border]].sum()
        chances[[inside, border]] += foreground / 4 * of_class
        chances[border] += foreground / 4
    found = np.bincount(kinds[tuple((windows.start + 2).T)], minlength=5)
    assert stats.chisquare(found, 1500 * chances).pvalue > 0.01


def test_foreground_random_fills_what_room_there_is_and_no_more():
    sides = [(24, 24), (10, 30), (3, 4)]
    labels = [LABELS, np.zeros((10, 30), int), np.full((3, 4), 7)]
    annotated = Windows(np.array([0]), np.array([[0, 0]]), np.array([[12, 24]]))
    windows = foreground_random(sides, labels.__getitem__, (5, 6), 1000, seeded(), annotated=annotated)
    taken = [np.zeros(each, int) for each in sides]
    for case, start, stop in (*zip(*annotated, strict=True), *zip(*windows, strict=True)):
        assert (start >= 0).all() and (stop <= sides[case]).all()
        taken[case][tuple(map(slice, start, stop))] += 1
    assert (windows.stop - windows.start == np.minimum(np.array(sides)[windows.case], (5, 6))).all()
    assert max(each.max() for each in taken) == 1 and taken[2].all()
    again = foreground_random(sides, labels.__getitem__, (5, 6), 1000, seeded(), annotated=annotated)
    assert all((a == b).all() for a, b in zip(windows, again, strict=True)) and 5 < len(windows.case) < 30


def test_foreground_random_without_a_foreground():
    def empty(case):
        return np.array([[0, 255]])

    nothing = foreground_random([(1, 2)], empty, (1, 1), 3, seeded(), foreground=1, background=(0, 255))
    assert [part.shape for part in nothing] == [(0,), (0, 2), (0, 2)]
    assert len(foreground_random([(1, 2)], empty, (1, 1), 3, seeded(), 1 / 2, (0, 255)).case) == 2  # anywhere
    assert len(foreground_random([(1, 2)], None, (1, 1), 3, seeded(), foreground=0).case) == 2  # labels are not read
    assert len(foreground_random([], empty, (1, 1), 3, seeded()).case) == 0
    without = foreground_random([(1, 2)], empty, (1, 1), 3, seeded(), foreground=1, background=())
    assert len(without.case) == 2


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda: top([1, math.nan], 1), r"one number a candidate, not of shape \(2,\) with 1 NaN; mend them"),
        (lambda: top([[1, 2]], 1), r"not of shape \(1, 2\) with 0 NaN"),
        (lambda: top([1, 2], -1), "the budget is -1 candidates; give 0 or more"),
        (lambda: top_windows([1, 2], apart(2), -1), "the budget is -1"),
        (lambda: foreground_random([], None, (1,), -1, seeded()), "the budget is -1"),
        (lambda: top([1, 2], 1, [0, 2]), "candidates have the indices 0 to 1, not 0 to 2"),
        (lambda: every_kth(2, 1, [-1]), "candidates have the indices 0 to 1, not -1 to -1"),
        (lambda: noisy([1], "power", seeded(), 0), "beta is above 0, not 0; give 1"),
        (lambda: noisy([1], "gauss", seeded()), "no noise 'gauss'; choose among power, softrank, gibbs"),
        (lambda: noisy([1, -2], "power", seeded()), "scores from 0 up, but one is -2; take softrank or gibbs"),
        (lambda: weighted_ranks([[1, 2], [1]], [1, 1]), r"scores of \[2, 1\] candidates and 2 weights; give a weight"),
        (lambda: weighted_ranks([[1, 2]], [1, 1]), r"scores of \[2\] candidates and 2 weights"),
        (lambda: top_windows([1], apart(2), 1), r"windows have \[2, 2, 2, 1\] cases, starts, stops and scores; give"),
        (lambda: clasp_pe([[1.0]], [1, 2], apart(2), 1, 1, seeded()), r"windows have \[2, 2, 2, 1, 2\] cases"),
        (
            lambda: clasp_pe([[1.0]], [1.0], apart(1), 1, 1, seeded(), share=66),
            "share of the classes is from 0 to 1, not 66",
        ),
        (lambda: power_beta(3, 3), "round 3 is none of 3, which are counted from 0"),
        (
            lambda: foreground_random([], None, (1,), 1, seeded(), 1.5),
            "the classes is from 0 to 1, not 1.5; give 0.667",
        ),
    ],
)
def test_what_cannot_be_chosen_ends_in_a_sentence(wrong, sentence):
    with pytest.raises(QueryError, match=sentence):
        wrong()


def test_first_windows_of_every_class():
    """Each class has its windows, centred in it as far as the border allows, and none overlaps another."""
    labels = [LABELS, np.zeros((10, 30), int), np.where(np.indices((20, 20))[0] < 5, 3, LABELS[:20, :20])]
    sides = [each.shape for each in labels]
    for seed in range(20):
        windows = first_windows(sides, labels.__getitem__, (3, 4), 9, seeded(seed))
        taken = [np.zeros(each, int) for each in sides]
        for case, start, stop in zip(*windows, strict=True):
            assert (start >= 0).all() and (stop <= sides[case]).all() and (stop - start == (3, 4)).all()
            taken[case][tuple(map(slice, start, stop))] += 1
        assert len(windows.case) == 9 and max(each.max() for each in taken) == 1
        near = [set(labels[c][s[0] : s[0] + 3, s[1] : s[1] + 4].ravel()) for c, s in zip(*windows[:2], strict=True)]
        for place, number in enumerate((2, 2, 3, 3, 1, 1)):  # the rarest first
            assert number in near[place]


def test_first_windows_of_whole_cases_and_of_few_that_have_a_class():
    labels = [np.full((6, 6), number) for number in (0, 0, 2, 0, 1, 1, 255)]
    sides, whole = [each.shape for each in labels], (2**31 - 1,) * 2
    windows = first_windows(sides, labels.__getitem__, whole, 6, seeded(), (0, 255))
    assert windows.case[0] == 2 and set(windows.case[1:3].tolist()) == {4, 5} and len(set(windows.case.tolist())) == 6
    assert (windows.start == 0).all() and (windows.stop == 6).all()
    # One case alone has the class: both windows are of it, as long as there is room.
    windows = first_windows(sides, labels.__getitem__, (2, 6), 4, seeded(), (0, 255))
    assert windows.case[:2].tolist() == [2, 2] and abs(windows.start[0] - windows.start[1])[0] >= 2
    assert len(first_windows(sides, labels.__getitem__, whole, 1, seeded(), (0, 255)).case) == 1
    assert len(first_windows(sides, labels.__getitem__, whole, 50, seeded(), (0, 255)).case) == 7
