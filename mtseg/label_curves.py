"""Curves of a score, such as Dice, against labels: the area under them, who beats whom, and how many labels are saved.

Budgets are any measure of labels, cases or voxels, float (R,) and rising. NumPy and SciPy alone.
"""

import math

import numpy as np
from scipy.optimize import curve_fit
from scipy.special import stdtr, stdtrit


class CurveError(ValueError):
    """Curves that cannot be compared as asked; the message is one sentence."""


def checked(budgets, scores):
    budgets, scores = np.asarray(budgets, dtype=float), np.asarray(scores, dtype=float)
    if budgets.ndim != 1 or not budgets.size or budgets.shape != scores.shape or not np.isfinite(scores).all():
        raise CurveError(
            f"there are {budgets.size} budgets and {scores.size} scores; give a finite score for each budget"
        )
    if not (np.diff(budgets) > 0).all() or not np.isfinite(budgets).all():
        raise CurveError(f"budgets rise from round to round, but these are {budgets.tolist()}; sort them")
    return budgets, scores


def area_under(budgets, scores):
    """The area under a curve, scores (R,), by trapezoids over the budgets scaled to [0, 1]: the score's unit.

    Of a flat curve, and of a single round, it is the score. Zhan et al., IJCAI 2021. CurveError for budgets that do not
    rise and scores that are not finite.
    """
    budgets, scores = checked(budgets, scores)
    if len(budgets) == 1:
        return float(scores[0])
    return float(np.diff(budgets) @ (scores[1:] + scores[:-1]) / 2 / (budgets[-1] - budgets[0]))


def labels_needed(budgets, scores, score):
    """The least budget at which a curve, straight between its rounds, reaches `score`; infinite where it never does.

    The first budget where the curve begins at the score or above: fewer may do. How many labels chance needs for what a
    strategy has at its last round: labels_needed(budgets, of_chance, of_strategy[-1]). CurveError as `area_under`.
    """
    budgets, scores = checked(budgets, scores)
    if not (scores >= score).any():
        return math.inf
    after = int((scores >= score).argmax())
    if after == 0:
        return float(budgets[0])
    return float(np.interp(score, scores[after - 1 : after + 1], budgets[after - 1 : after + 1]))


def foreground_efficiency(shares, scores, ceiling):
    """b of the curve `ceiling` - a exp(-b (x - x0)) nearest to all `scores` (seeds, R), by squares; more is better.

    x is `shares` (seeds, R), how much of all foreground voxels is annotated, 0..1; x0 the least of them; a what the
    first round's mean score lacks of `ceiling`, the score with all labels. NaN where it lacks nothing, for a single
    round, and where the fit finds no end; just large where the second round reaches it. nnActive, TMLR 2025
    (arXiv:2511.19183). CurveError for what is not finite.
    """
    shares, scores = np.asarray(shares, dtype=float), np.asarray(scores, dtype=float)
    finite = np.isfinite(shares).all() and np.isfinite(scores).all() and math.isfinite(ceiling)
    if shares.ndim != 2 or not shares.size or shares.shape != scores.shape or not finite:
        raise CurveError(
            f"shares and scores are (seeds, rounds) and finite, not of shapes {shares.shape} and {scores.shape} with a "
            f"ceiling of {ceiling}; mend them"
        )
    x, lacking = shares - shares.min(), ceiling - scores[:, 0].mean()
    if shares.shape[1] == 1 or not x.any() or not lacking > 0:
        return math.nan

    def curve(x, b):
        return ceiling - lacking * np.exp(-b * x)

    try:  # x scaled to [0, 1]: b of small shares is far from where the fit begins
        (b,), _ = curve_fit(curve, x.ravel() / x.max(), scores.ravel(), method="trf")
    except RuntimeError:
        return math.nan
    return float(b / x.max())


def paired_interval(differences):
    """(low, high), the 95 % interval by Student's t of the mean of the `differences`, (pairs,); NaN of a single one."""
    differences = np.asarray(differences, dtype=float)
    mean, count = differences.mean(), len(differences)
    if count < 2:
        return math.nan, math.nan
    half = stdtrit(count - 1, 0.975) * differences.std(ddof=1) / math.sqrt(count)
    return float(mean - half), float(mean + half)


def paired_p(differences):
    """The two-sided p of the t-test that the `differences`, (pairs,), have mean 0; 0 where all are one other number."""
    differences = np.asarray(differences, dtype=float)
    mean, deviation, count = differences.mean(), differences.std(ddof=1), len(differences)
    if deviation == 0:
        return float(mean == 0)
    return float(2 * stdtr(count - 1, -abs(mean) / (deviation / math.sqrt(count))))


def penalty_matrix(scores):
    """float (S, S) of `scores` (S, R, seeds), of strategies, rounds and seeds: who beats whom how often, from 0 to 1.

    In row i and column j the share of rounds in which strategy i is better than j: the mean of the differences of their
    scores, seed by seed, is above 0, and their t-test's p below 0.05. The mean of column j without its diagonal says
    how often j is beaten. Ash et al., ICLR 2020 (arXiv:1906.03671). Seeds are paired: the same start, test cases and
    initial weights. CurveError for fewer than two seeds and scores that are not finite.
    """
    scores = np.asarray(scores, dtype=float)
    if scores.ndim != 3 or scores.shape[2] < 2 or not scores.shape[1] or not np.isfinite(scores).all():
        raise CurveError(
            f"scores are (strategies, rounds, 2 seeds or more) and finite, not of shape {scores.shape}; mend them"
        )
    matrix = np.zeros((len(scores), len(scores)))
    for i, better in enumerate(scores):
        for j, worse in enumerate(scores):
            won = [d.mean() > 0 and paired_p(d) < 0.05 for d in better - worse]
            matrix[i, j] = np.mean(won)
    return matrix
