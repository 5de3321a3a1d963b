"""What the test cases and the seeds say of a metric: mean, two deviations, bootstrap interval, signed-rank test.

NaN is what is not defined, such as the distance to an empty mask.
"""

import math

import numpy as np
from scipy import stats

from mtseg.results import share_of

RESAMPLES = 10000


def bootstrap_interval(values, resamples=RESAMPLES, seed=0):
    """95 % percentile bootstrap interval of the mean of `values` (1-D, no NaN); (NaN, NaN) of fewer than two."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return math.nan, math.nan
    rng, at_once = np.random.default_rng(seed), max(10**7 // len(values), 1)  # which 80 MB hold
    draws = (min(at_once, resamples - first) for first in range(0, resamples, at_once))
    means = np.concatenate([values[rng.integers(len(values), size=(n, len(values)))].mean(axis=1) for n in draws])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def paired_test(values, baseline):
    """What {case: value} has more than {case: value}, as a dict, and why there is no p, or "".

    'pairs': the cases in both with no NaN; 'difference', 'difference_low', 'difference_high': mean and
    `bootstrap_interval` of theirs; 'p': of the two-sided Wilcoxon signed-rank test, absent where fewer than six pairs
    differ: it cannot be below 0.05 then, whatever they show.
    """
    shared = [c for c in values if c in baseline and not math.isnan(values[c]) and not math.isnan(baseline[c])]
    differences = np.array([values[case] - baseline[case] for case in shared])
    if not shared:
        return {"pairs": 0}, "no case was tested by both"
    low, high = bootstrap_interval(differences)
    test = {"pairs": len(shared), "difference": float(differences.mean())}
    test |= {"difference_low": low, "difference_high": high}
    if np.count_nonzero(differences) < 6:
        return test, f"of {len(shared)} pairs fewer than 6 differ"
    return test | {"p": float(stats.wilcoxon(differences).pvalue)}, ""


def holm(p):
    """The p-values `p` of several tests, corrected by Holm's step-down method: where those below 0.05 are called
    differences, the chance that any of them is none is at most 5 %, however the tests depend on each other."""
    p = np.asarray(p, dtype=float)
    order = np.argsort(p)
    corrected = np.empty_like(p)
    corrected[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return corrected


def average_seeds(values):
    """(cases,): the mean of (seeds, cases) over the seeds for which it is defined; NaN where it is for none."""
    values = np.asarray(values, dtype=float)
    counts = np.maximum((~np.isnan(values)).sum(axis=0), 1)
    return np.where(np.isnan(values).all(axis=0), np.nan, np.nansum(values, axis=0) / counts)


def statistics(values):
    """What a table says of (seeds, cases), as a dict; NaN is what cannot be said.

    'mean': of the seeds' means over the cases; 'sd_seeds': deviation of these means (n - 1); 'sd_cases': deviation over
    the cases (n), averaged over the seeds; 'low', 'high': `bootstrap_interval` over the cases, each averaged over the
    seeds; 'undefined': how many values are NaN, and left out of all of these.
    """
    values = np.asarray(values, dtype=float)
    seeds = [seed[~np.isnan(seed)] for seed in values]
    seeds = [seed for seed in seeds if len(seed)]
    means = [seed.mean() for seed in seeds]
    averaged = average_seeds(values)
    low, high = bootstrap_interval(averaged[~np.isnan(averaged)])
    return {
        "mean": float(np.mean(means)) if means else math.nan,
        "sd_seeds": float(np.std(means, ddof=1)) if len(means) > 1 else math.nan,
        "sd_cases": float(np.mean([seed.std() for seed in seeds])) if means else math.nan,
        "low": low,
        "high": high,
        "undefined": int(np.isnan(values).sum()),
    }


def pooled_statistics(parts):
    """As `statistics`, of the score of all pixels of a seed together, from `parts` (seeds, cases, classes, 3), those of
    results.pooled_parts: 'low' and 'high' are of resampled cases; cases have no such score, and no deviation."""
    seeds, cases = parts.shape[:2]

    def scores(draws):
        """(draws, seeds): the mean over the classes, each case as often as `draws` (draws, cases) says."""
        return share_of(np.tensordot(draws, parts, axes=(1, 1))).mean(axis=-1)

    (of_seeds,), low, high = scores(np.ones((1, cases))), math.nan, math.nan
    if cases > 1:
        draws = np.random.default_rng(0).multinomial(cases, np.full(cases, 1 / cases), size=RESAMPLES)
        low, high = np.percentile(scores(draws.astype(float)).mean(axis=1), [2.5, 97.5]).tolist()
    sd = float(of_seeds.std(ddof=1)) if seeds > 1 else math.nan
    return {"mean": float(of_seeds.mean()), "sd_seeds": sd, "low": low, "high": high}
