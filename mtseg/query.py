"""What to annotate next, by scores or at random: noise for batches, windows without overlap, ClaSP PE, the baselines.

A candidate is a case, a slice or a patch; its score is a number, larger where it should be chosen sooner. Functions
return the indices of the chosen, int64 and none twice, in the order of choice: `n` of them, or as many as there are.
`labeled`: indices of candidates that are annotated already, which are not chosen. `rng`: a numpy.random.Generator; the
same state gives the same choice. Of equals the first is chosen; else the order of the candidates does not matter. All
raise QueryError for a budget below 0, scores that are NaN or not one a candidate, and indices of no candidate.
"""

import itertools
from typing import NamedTuple

import numpy as np
from scipy.ndimage import binary_erosion


class QueryError(ValueError):
    """Candidates among which nothing can be chosen as asked; the message is one sentence."""


class Windows(NamedTuple):
    """Parts of cases: `case` (N,), a number or a name each; `start` and `stop`, int (N, dims), in voxels."""

    case: np.ndarray
    start: np.ndarray
    stop: np.ndarray


def checked_scores(scores):
    scores = np.asarray(scores, dtype=float)
    if scores.ndim != 1 or np.isnan(scores).any():
        unknown = int(np.isnan(scores).sum())
        raise QueryError(
            f"scores are one number a candidate, not of shape {scores.shape} with {unknown} NaN; mend them"
        )
    return scores


def check_budget(n):
    if n < 0:
        raise QueryError(f"the budget is {n} candidates; give 0 or more")


def unlabeled(count, n, labeled=()):
    """Indices of the candidates that are not labelled."""
    labeled = np.asarray(labeled, dtype=int)
    check_budget(n)
    if labeled.size and not 0 <= labeled.min() <= labeled.max() < count:
        raise QueryError(f"candidates have the indices 0 to {count - 1}, not {labeled.min()} to {labeled.max()}")
    return np.delete(np.arange(count), labeled)


# ---------------------------------------------------------------------------------------------------------- by a score


def top(scores, n, labeled=()):
    """The `n` candidates of the highest `scores` (N,)."""
    scores = checked_scores(scores)
    free = unlabeled(len(scores), n, labeled)
    return free[np.argsort(-scores[free], kind="stable")[:n]]


def noisy(scores, kind, rng, beta=1.0):
    """The `scores` (N,) with Gumbel noise of scale 1 / beta, so that a batch is not the same candidate many times.

    The n highest are drawn without replacement, each in proportion to, by `kind`: 'power', s^beta of scores from 0 up;
    'softrank', rank^-beta, the highest having rank 1; 'gibbs', e^(beta s). Kirsch et al., "Stochastic Batch
    Acquisition", TMLR 2023 (arXiv:2106.12059). Towards beta 0 that is chance, towards infinity the n highest.
    QueryError for an unknown kind, a beta that is not above 0, and 'power' of scores below 0.
    """
    scores = checked_scores(scores)
    if not beta > 0:
        raise QueryError(f"beta is above 0, not {beta}; give 1")
    order = np.argsort(-scores, kind="stable")
    keys = scores.copy()
    if kind == "power":
        if (scores < 0).any():
            raise QueryError(
                f"power noise is for scores from 0 up, but one is {scores.min():g}; take softrank or gibbs"
            )
        with np.errstate(divide="ignore"):
            keys = np.log(scores)
    elif kind == "softrank":
        keys[order] = -np.log(np.arange(1, len(scores) + 1))
    elif kind != "gibbs":
        raise QueryError(f"there is no noise {kind!r}; choose among power, softrank, gibbs")
    keys[order] += rng.gumbel(scale=1 / beta, size=len(scores))  # by rank, whatever the candidates' order
    return keys


def weighted_ranks(scores, weights):
    """(N,): the sum over several `scores` (K, N) of weight times rank, from 0, the lowest, to 1; equals share the mean
    of their ranks. Ranks, because scores have different units. QueryError for other than K weights."""
    from scipy.stats import rankdata  # slow to import

    scores = [checked_scores(each) for each in scores]
    lengths = [len(each) for each in scores]
    if len(scores) != len(weights) or len(set(lengths)) != 1:
        raise QueryError(f"there are scores of {lengths} candidates and {len(weights)} weights; give a weight for each")
    ranks = [(rankdata(each) - 1) / max(len(each) - 1, 1) for each in scores]
    return sum(weight * each for weight, each in zip(weights, ranks, strict=True))


# ------------------------------------------------------------------------------------------------------ parts of cases


def overlapping(windows, case, start, stop):
    """Indices of the windows of `case` that share a voxel with the box from `start` to `stop`."""
    here = np.flatnonzero(np.asarray(windows.case) == case)
    return here[((windows.start[here] < stop) & (start < windows.stop[here])).all(axis=1)]


def opened(windows, n, annotated, *scores):
    """bool (N,): the windows that overlap none of the Windows `annotated`."""
    lengths = [len(part) for part in (*windows, *scores)]
    if len(set(lengths)) != 1:
        raise QueryError(f"windows have {lengths} cases, starts, stops and scores; give equally many")
    check_budget(n)
    still = np.full(lengths[0], True)
    for case, start, stop in zip(*annotated, strict=True) if annotated else ():
        still[overlapping(windows, case, start, stop)] = False
    return still


def take(chosen, n, scores, windows, still, per_case):
    """Appends to the list `chosen` up to `n` windows of the highest scores among those `still` open, and closes what
    they overlap, and a case once `per_case` of its windows are chosen."""
    for _ in range(n):
        places = np.flatnonzero(still)
        if not places.size:
            return
        best = places[scores[places].argmax()]
        chosen.append(best)
        case = windows.case[best]
        still[overlapping(windows, case, windows.start[best], windows.stop[best])] = False
        same = np.asarray(windows.case) == case
        if per_case and same[chosen].sum() >= per_case:
            still[same] = False


def top_windows(scores, windows, n, annotated=None, per_case=None):
    """The best `n` of Windows by `scores` (N,), over all cases, one by one.

    Each overlaps neither one before nor the Windows `annotated`, and no case has more than `per_case` of them, however
    many are annotated; None and 0 are no limit. Whole cases are windows, too.
    """
    scores = checked_scores(scores)
    still, chosen = opened(windows, n, annotated, scores), []
    take(chosen, n, scores, windows, still, per_case)
    return np.array(chosen, dtype=int)


def power_beta(number, rounds, first=1.0, last=100.0):
    """beta of round `number`, from 0, of `rounds`: exponential from `first` to `last`; QueryError for no such round."""
    if not 0 <= number < rounds:
        raise QueryError(f"round {number} is none of {rounds}, which are counted from 0; give one of them")
    return first * (last / first) ** (number / max(rounds - 1, 1))


def clasp_pe(class_scores, scores, windows, n, beta, rng, annotated=None, per_case=None, share=0.66):
    """`n` of Windows, of which every class has its part: ClaSP PE (arXiv:2601.13677).

    `class_scores` (K, N): each window's mean class entropy, of every foreground class; `scores` (N,): its mean
    predictive entropy. int(share n) windows are split evenly over the classes, the remainder by lot. The classes choose
    in random order, each by its own scores; the rest is chosen by `scores`. All have power noise of `beta`, see
    `power_beta`; overlap and limits are those of `top_windows`. What a class finds no room for goes to the rest.
    QueryError for a share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise QueryError(f"the share of the classes is from 0 to 1, not {share}; give 0.66")
    every = [checked_scores(each) for each in (*class_scores, scores)]
    still, chosen = opened(windows, n, annotated, *every), []
    each, more = divmod(int(share * n), max(len(every) - 1, 1))
    for turn, number in enumerate(rng.permutation(len(every) - 1)):
        take(chosen, each + (turn < more), noisy(every[number], "power", rng, beta), windows, still, per_case)
    take(chosen, n - len(chosen), noisy(every[-1], "power", rng, beta), windows, still, per_case)
    return np.array(chosen, dtype=int)


# ----------------------------------------------------------------------------------------------------------- by chance


def every_kth(count, n, labeled=()):
    """Every k-th of `count` candidates in their order, as the slices of a volume; k so that they are `n`, the first
    after k / 2."""
    free = unlabeled(count, n, labeled)
    return free if n >= len(free) else free[((np.arange(n) + 0.5) * len(free) / n).astype(int)]


def foreground_random(sides, labels_of, size, n, rng, foreground=2 / 3, background=0, annotated=None, tries=100):
    """Windows: `n` of `size` voxels at random, a share `foreground` of them drawn towards the classes.

    The baseline of nnActive (arXiv:2511.19183). With 2/3 a third of the windows lies anywhere, a third is centred in a
    voxel of a random class, a third on the border of such a class; with 1/3 they are 4, 1 and 1 of six; with 0 it is
    plain chance. `sides`: the size of each case; `labels_of(case)`: its classes, integer, read when they are needed:
    those an oracle knows, or predicted ones. `background`: the value, or values, that are no class to draw towards; ()
    for none. The cases take turns in random order. A window lies inside its case and overlaps none before nor the
    Windows `annotated`, whose `case` are numbers. The search ends when three rounds of all cases, with `tries` places
    each, find none. QueryError for a share outside [0, 1].
    """
    if not 0 <= foreground <= 1:
        raise QueryError(f"the share drawn towards the classes is from 0 to 1, not {foreground}; give 0.667 or 0.333")
    check_budget(n)
    before, found, missed = [*zip(*annotated, strict=True)] if annotated else [], [], 0
    for case in itertools.cycle(rng.permutation(len(sides))):
        if len(found) == n or missed == 3 * len(sides):
            break
        last = np.maximum(np.array(sides[case]) - size, 0)
        kind = rng.choice(3, p=[1 - foreground, foreground / 2, foreground / 2])
        if kind == 0:
            places = rng.integers(0, last + 1, size=(tries, len(size)))
        else:
            places = (
                class_voxels(labels_of(case), kind == 2, tries, rng, background) - np.minimum(size, sides[case]) // 2
            )
        starts, width = free_starts(places, case, sides, size, before + found)
        missed += 1
        if len(starts):
            found.append((case, starts[0], starts[0] + width))
            missed = 0
    return windows_of(found, len(size))


def first_windows(sides, labels_of, size, n, rng, background=0, per_class=2, tries=100):
    """Windows: `n` of `size` voxels to begin with, so that every class is among them.

    The start of nnActive (arXiv:2511.19183): `per_class` windows centred in a voxel of each class, the rarest first,
    then as foreground_random with 1/3. Arguments as there; all cases are read once to count the classes.
    """
    check_budget(n)
    counts, found = {}, []
    for case in range(len(sides)):
        for number, count in zip(*np.unique(labels_of(case), return_counts=True), strict=True):
            counts[number] = counts.get(number, 0) + int(count)
    for number in sorted(set(counts).difference(np.atleast_1d(background)), key=counts.get):
        wanted = min(len(found) + per_class, n)
        for case in [*rng.permutation(len(sides))] * per_class:  # several of a case only where too few have the class
            if len(found) == wanted:
                break
            inside = (labels_of(case) == number).astype(int)
            places = class_voxels(inside, False, tries, rng) - np.minimum(size, sides[case]) // 2
            starts, width = free_starts(places, case, sides, size, found)
            found += [(case, start, start + width) for start in starts[:1]]
    before = windows_of(found, len(size))
    more = foreground_random(sides, labels_of, size, n - len(found), rng, 1 / 3, background, before, tries)
    return Windows(*map(np.concatenate, zip(before, more, strict=True)))


def windows_of(places, dims):
    """Windows of (case, start, stop) each, in `dims` axes."""
    cases, starts, stops = zip(*places, strict=True) if places else ((), (), ())
    starts, stops = (np.array(corners, dtype=int).reshape(-1, dims) for corners in (starts, stops))
    return Windows(np.array(cases, dtype=int), starts, stops)


def free_starts(places, case, sides, size, taken):
    """(those of `places`, corners of windows of a case, that overlap nothing once they are moved into it; the windows'
    sides). `taken`: tuples (case, start, stop) not to overlap."""
    width = np.minimum(size, sides[case])
    starts = np.clip(places, 0, np.array(sides[case]) - width)
    for other, start, stop in taken:
        if other == case:
            starts = starts[((starts >= stop) | (starts + width <= start)).any(axis=1)]
    return starts, width


def class_voxels(labels, border, number, rng, background=0):
    """int (number, dims): voxels of a random class in `labels`, drawn with replacement; with `border` those that have
    another class across a face. (0, dims) where there are none."""
    classes = np.setdiff1d(labels, background)
    inside = labels == rng.choice(classes) if classes.size else np.zeros(labels.shape, bool)
    if border:
        inside &= ~binary_erosion(inside, border_value=1)
    places = np.flatnonzero(inside)
    drawn = rng.choice(places, number) if places.size else places
    return np.stack(np.unravel_index(drawn, labels.shape), axis=1)
