"""Areas, savings and wins against closed forms and SciPy."""

import math

import numpy as np
import pytest
from scipy import integrate, optimize, stats

from mtseg.label_curves import (
    CurveError,
    area_under,
    foreground_efficiency,
    labels_needed,
    paired_interval,
    paired_p,
    penalty_matrix,
)


def test_the_area_under_the_budget_curve():
    assert area_under([5, 10, 40], [0.7, 0.7, 0.7]) == pytest.approx(0.7)
    assert area_under([0, 10], [0.2, 0.8]) == pytest.approx(0.5)
    assert area_under([7], [0.3]) == 0.3
    budgets, dices = [4.0, 8, 9, 30], [0.5, 0.4, 0.8, 0.9]
    scaled = (np.array(budgets) - 4) / 26
    assert area_under(budgets, dices) == pytest.approx(integrate.trapezoid(dices, scaled))
    assert area_under(np.multiply(budgets, 1000), dices) == pytest.approx(area_under(budgets, dices))


def test_how_many_labels_another_curve_needs():
    budgets, dices = [10, 20, 40], [0.5, 0.7, 0.8]
    assert labels_needed(budgets, dices, 0.6) == pytest.approx(15)
    assert labels_needed(budgets, dices, 0.75) == pytest.approx(30)
    assert labels_needed(budgets, dices, 0.7) == pytest.approx(20)
    assert labels_needed(budgets, dices, 0.8) == pytest.approx(40)
    assert labels_needed(budgets, dices, 0.1) == 10  # or fewer: the curve begins above
    assert labels_needed(budgets, dices, 0.81) == math.inf
    assert labels_needed([1, 2, 3, 4], [0.5, 0.7, 0.4, 0.9], 0.6) == pytest.approx(1.5)  # the first time


def test_foreground_efficiency_is_the_rate_of_the_curve():
    shares = np.array([[0.001, 0.002, 0.004, 0.01], [0.001, 0.001, 0.005, 0.012]])
    for rate in (0, 0.5, 30, 300, -40):
        scores = 0.9 - 0.3 * np.exp(-rate * (shares - 0.001))
        assert foreground_efficiency(shares, scores, 0.9) == pytest.approx(rate, rel=1e-4, abs=1e-9)
        assert foreground_efficiency(1e9 * shares, scores, 0.9) == pytest.approx(rate / 1e9, rel=1e-4, abs=1e-9)
    scores = 0.9 - 0.3 * np.exp(-200 * (shares - 0.001)) + 0.02 * np.random.default_rng(0).standard_normal((2, 4))
    lacking = 0.9 - scores[:, 0].mean()

    def squares(b):
        return np.square(0.9 - lacking * np.exp(-b * (shares - 0.001)) - scores).sum()

    best = optimize.minimize_scalar(squares, bounds=(0, 2000), method="bounded", options={"xatol": 1e-6}).x
    assert foreground_efficiency(shares, scores, 0.9) == pytest.approx(best, rel=1e-3)
    for shares, scores in (
        ([[0.1, 0.2]], [[0.9, 0.8]]),
        ([[0.1], [0.2]], [[0.5], [0.6]]),
        ([[0.1, 0.1]], [[0.5, 0.6]]),
    ):
        assert math.isnan(foreground_efficiency(shares, scores, 0.9))


def test_paired_interval_against_scipy():
    for seed, count in ((0, 2), (1, 4), (2, 20)):
        a, b = np.random.default_rng(seed).random((2, count))
        expected = stats.ttest_rel(a, b).confidence_interval(0.95)
        assert paired_interval(a - b) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert paired_interval([0.5, 0.5]) == (0.5, 0.5) and np.isnan(paired_interval([0.5])).all()


def test_paired_p_against_scipy():
    for seed, count in ((0, 2), (1, 4), (2, 20)):
        a, b = np.random.default_rng(seed).random((2, count))
        assert paired_p(a - b) == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-9)
    assert paired_p([0.0, 0, 0]) == 1 and paired_p([0.5, 0.5, 0.5]) == 0


def test_the_penalty_matrix_counts_significant_rounds():
    rng = np.random.default_rng(0)
    scores = 0.5 + 0.01 * rng.standard_normal((3, 4, 4))
    scores[1, 2:] += 0.2  # better in two of four rounds
    matrix = penalty_matrix(scores)
    for i in range(3):
        for j in range(3):
            won = [
                stats.ttest_rel(scores[i, r], scores[j, r], alternative="greater").pvalue < 0.025
                for r in range(4)
                if i != j
            ]
            assert matrix[i, j] == (np.mean(won) if won else 0)
    assert matrix[1, 0] == matrix[1, 2] == 0.5 and matrix[0, 1] == 0
    assert not penalty_matrix(np.ones((2, 3, 4))).any()


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda: area_under([1, 2], [0.5]), "2 budgets and 1 scores; give a finite score for each budget"),
        (lambda: area_under([], []), "0 budgets and 0 scores"),
        (lambda: labels_needed([1], [math.nan], 0.5), "give a finite score for each budget"),
        (lambda: area_under([2, 2], [0.5, 0.5]), r"budgets rise from round to round, but these are \[2.0, 2.0\]; sort"),
        (lambda: labels_needed([1, math.inf], [0.1, 0.5], 0.3), "budgets rise from round to round"),
        (
            lambda: foreground_efficiency([[0.1]], [0.5], 1),
            r"not of shapes \(1, 1\) and \(1,\) with a ceiling of 1; mend",
        ),
        (lambda: foreground_efficiency([[0.1]], [[0.5]], math.nan), "with a ceiling of nan"),
        (lambda: penalty_matrix(np.ones((2, 3, 1))), r"2 seeds or more\) and finite, not of shape \(2, 3, 1\); mend"),
        (lambda: penalty_matrix([[[1, math.nan]]]), "2 seeds or more"),
    ],
)
def test_curves_that_cannot_be_compared(wrong, sentence):
    with pytest.raises(CurveError, match=sentence):
        wrong()
