"""What the test cases and the seeds say of a metric: mean, two deviations, bootstrap interval, signed-rank test.

NaN is what is not defined, such as the distance to an empty mask.
"""

import math

import numpy as np
from scipy import stats

from mtseg.results import share_of

RESAMPLES = 10000


def bootstrap_interval(values, patients=None):
    """95 % percentile bootstrap interval of the mean of `values` (1-D, no NaN); (NaN, NaN) of fewer than two.

    `patients`: whose each value is (default: of another each). Whole patients are drawn, with all their values, since
    the scans of one patient are alike; (NaN, NaN) of fewer than two patients.
    """
    values = np.asarray(values, dtype=float)
    _, whose = np.unique(np.arange(len(values)) if patients is None else patients, return_inverse=True)
    sums, counts = np.bincount(whose, values), np.bincount(whose)
    if len(sums) < 2:
        return math.nan, math.nan
    rng, at_once = np.random.default_rng(0), max(10**7 // len(sums), 1)  # which 160 MB hold
    draws = (min(at_once, RESAMPLES - first) for first in range(0, RESAMPLES, at_once))
    drawn = (rng.integers(len(sums), size=(n, len(sums))) for n in draws)
    means = np.concatenate([sums[draw].sum(axis=1) / counts[draw].sum(axis=1) for draw in drawn])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def paired_test(values, baseline, patients=None):
    """What {case: value} has more than {case: value}, as a dict, and why there is no p, or "".

    `patients`: {case: patient}, default: each case is another's. 'pairs': the patients of the cases in both with no
    NaN; 'difference', 'difference_low', 'difference_high': mean over the cases and `bootstrap_interval` of it; 'p': of
    the two-sided Wilcoxon signed-rank test of the patients, the mean of whose cases counts, absent where fewer than six
    of them differ: it cannot be below 0.05 then, whatever they show.
    """
    shared = [c for c in values if c in baseline and not math.isnan(values[c]) and not math.isnan(baseline[c])]
    differences = np.array([values[case] - baseline[case] for case in shared])
    if not shared:
        return {"pairs": 0}, "no case was tested by both"
    names, whose = np.unique([(patients or {}).get(case, case) for case in shared], return_inverse=True)
    low, high = bootstrap_interval(differences, whose)
    test = {"pairs": len(names), "difference": float(differences.mean())}
    test |= {"difference_low": low, "difference_high": high}
    # Rounded: what is alike but for float's last digits is a tie, or no difference, in whatever unit it is measured.
    of_patients = np.round(np.bincount(whose, differences) / np.bincount(whose), 9)
    if np.count_nonzero(of_patients) < 6:
        return test, f"of {len(names)} pairs fewer than 6 differ"
    return test | {"p": float(stats.wilcoxon(of_patients).pvalue)}, ""


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


def statistics(values, patients=None):
    """What a table says of (seeds, cases), as a dict; NaN is what cannot be said. `patients`: of each case.

    'mean': of the seeds' means over the cases; 'sd_seeds': deviation of these means (n - 1); 'sd_cases': deviation over
    the cases (n), averaged over the seeds; 'low', 'high': `bootstrap_interval` over the patients, each case averaged
    over the seeds; 'undefined': how many values are NaN, and left out of all of these.
    """
    values = np.asarray(values, dtype=float)
    seeds = [seed[~np.isnan(seed)] for seed in values]
    seeds = [seed for seed in seeds if len(seed)]
    means = [seed.mean() for seed in seeds]
    averaged = average_seeds(values)
    known = ~np.isnan(averaged)
    low, high = bootstrap_interval(averaged[known], None if patients is None else np.asarray(patients)[known])
    return {
        "mean": float(np.mean(means)) if means else math.nan,
        "sd_seeds": float(np.std(means, ddof=1)) if len(means) > 1 else math.nan,
        "sd_cases": float(np.mean([seed.std() for seed in seeds])) if means else math.nan,
        "low": low,
        "high": high,
        "undefined": int(np.isnan(values).sum()),
    }


def pooled_statistics(parts, patients):
    """As `statistics`, of the score of all pixels of a seed together, from `parts` (seeds, cases, classes, 3), those of
    results.pooled_parts: 'low' and 'high' are of resampled patients; cases have no such score, and no deviation."""
    seeds, cases = parts.shape[:2]
    names, whose = np.unique(patients, return_inverse=True)

    def scores(draws):
        """(draws, seeds): the mean over the classes, each case as often as `draws` (draws, cases) says."""
        return share_of(np.tensordot(draws, parts, axes=(1, 1))).mean(axis=-1)

    (of_seeds,), low, high = scores(np.ones((1, cases))), math.nan, math.nan
    if (count := len(names)) > 1:
        draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
        low, high = np.percentile(scores(draws[:, whose].astype(float)).mean(axis=1), [2.5, 97.5]).tolist()
    sd = float(of_seeds.std(ddof=1)) if seeds > 1 else math.nan
    return {"mean": float(of_seeds.mean()), "sd_seeds": sd, "low": low, "high": high}
