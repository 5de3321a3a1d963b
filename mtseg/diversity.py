"""What to annotate next, by features: k-centre greedy, k-means, TypiClust, ProbCover, and k-centre among the unsure.

Features are float (N, D), a row a candidate, close where candidates look alike, as `prepared` gives them; distances are
Euclidean. Functions return the indices of the chosen, int64 and none twice, in the order of choice: `n` of them, or as
many as there are. `labeled`: indices of rows that are annotated already, which are not chosen. `rng`: a
numpy.random.Generator; the same state gives the same choice. Of equals the first is chosen; else the order of the rows
does not matter. Memory does not grow with n, and with N as the features do. All raise DiversityError for features of
another shape or not finite, a budget below 0 and indices of no row.
"""

import warnings

import numpy as np
from scipy.cluster.vq import kmeans2
from scipy.spatial.distance import cdist

BLOCK = 2**22  # distances in memory at a time
SAMPLE = 10_000  # of more rows so many, drawn by lot, stand for all, where a docstring says so


class DiversityError(ValueError):
    """Candidates among which nothing can be chosen as asked; the message is one sentence."""


def checked(features, n=0, labeled=()):
    """(features, bool (N,): True where a row is not labelled)."""
    x, labeled = np.ascontiguousarray(features, dtype=float), np.asarray(labeled, dtype=int)
    if x.ndim != 2 or not np.isfinite(x).all():
        broken = int((~np.isfinite(x)).sum())
        raise DiversityError(f"features are (N, D), not of shape {x.shape} with {broken} not finite; mend them")
    if n < 0:
        raise DiversityError(f"the budget is {n} candidates; give 0 or more")
    if labeled.size and not 0 <= labeled.min() <= labeled.max() < len(x):
        raise DiversityError(f"rows have the indices 0 to {len(x) - 1}, not {labeled.min()} to {labeled.max()}")
    still = np.full(len(x), True)
    still[labeled] = False
    return x, still


def prepared(features, rng, dims=64):
    """float (N, min(D, dims)): every dimension standardised, each row then scaled to length 1, then reduced to `dims`
    by a Gaussian projection drawn from `rng`, which nearly keeps distances (Johnson and Lindenstrauss 1984).

    Dimensions and rows of equal values become 0.
    """
    x, _ = checked(features)
    if not len(x):
        return x[:, :dims]
    deviation = x.std(axis=0)
    x = (x - x.mean(axis=0)) / np.where(deviation > 0, deviation, np.inf)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    x /= np.where(length > 0, length, 1)
    if x.shape[1] <= dims:
        return x
    return x @ (rng.standard_normal((x.shape[1], dims)) / np.sqrt(dims))


# ------------------------------------------------------------------------------------------------- distances in blocks


def squared_distances(a, b):
    """Yields (rows, the squared distances of these rows of `a` to all of `b`): a slice, and an array of about BLOCK
    numbers, which may be changed."""
    # |a - b|^2 as one product: (-2 a, 1, |a|^2) with (b, |b|^2, 1).
    right = np.column_stack([b, (b * b).sum(axis=1), np.ones(len(b))]).T
    rows = max(BLOCK // max(len(b), 1), 1)
    for first in range(0, len(a), rows):
        part = a[first : first + rows]
        squared = np.column_stack([-2 * part, np.ones(len(part)), (part * part).sum(axis=1)]) @ right
        yield slice(first, first + len(part)), np.maximum(squared, 0, out=squared)


def distance_to_labeled(features, labeled):
    """float (N,): the distance of each row to the nearest of the `labeled` rows; infinite without any."""
    x, still = checked(features, 0, labeled)
    nearest = np.full(len(x), np.inf)
    for rows, squared in squared_distances(x, x[~still]) if len(labeled) else ():
        nearest[rows] = np.sqrt(squared.min(axis=1))
    nearest[~still] = 0  # without the rounding of differences
    return nearest


def within(x, others, delta):
    """int (N,): how many rows of `others` are closer than `delta` to each row of `x`."""
    counts = np.zeros(len(x), dtype=int)
    for rows, squared in squared_distances(x, others) if len(others) else ():
        counts[rows] = (squared < delta**2).sum(axis=1)
    return counts


def sample_of(x, rng):
    """Indices of at most SAMPLE rows of `x`, drawn by lot after sorting, so that the rows' order does not matter."""
    order = np.lexsort(x.T)
    return order if len(x) <= SAMPLE else order[np.sort(rng.choice(len(x), SAMPLE, replace=False))]


def clusters(x, k, rng):
    """(cluster of each row of `x`, its distance to the centre): k-means from the seeds of k-means++ (Arthur and
    Vassilvitskii, SODA 2007); at most `k`, fewer of fewer different rows. Centres are fitted to SAMPLE rows."""
    fit = x[sample_of(x, rng)]
    seeds, nearest = [int(rng.integers(len(fit)))], np.inf
    while len(seeds) < k:
        nearest = np.minimum(nearest, cdist(fit, fit[seeds[-1:]], "sqeuclidean")[:, 0])
        chances = nearest.cumsum()
        if chances[-1] == 0:
            break
        seeds.append(int(np.searchsorted(chances[:-1], rng.random() * chances[-1], side="right")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a cluster that gets empty keeps its centre
        centres, _ = kmeans2(fit, fit[seeds], iter=20, minit="matrix")
    cluster, distance = np.empty(len(x), dtype=int), np.empty(len(x))
    for rows, squared in squared_distances(x, centres):
        cluster[rows], distance[rows] = squared.argmin(axis=1), np.sqrt(squared.min(axis=1))
    return cluster, distance


# -------------------------------------------------------------------------------------------------------------- choice


def k_center(features, n, labeled=()):
    """Core-set: again and again the row that is farthest from all that are labelled or chosen.

    Sener and Savarese, ICLR 2018 (arXiv:1708.00489), the greedy algorithm. Without labels the first is the farthest
    from the mean. One pass over the rows a choice.
    """
    x, still = checked(features, n, labeled)
    nearest, chosen = distance_to_labeled(x, labeled), []
    while len(chosen) < n and still.any():
        key = nearest if len(labeled) or chosen else cdist(x, x.mean(axis=0, keepdims=True))[:, 0]
        chosen.append(np.where(still, key, -1).argmax())
        still[chosen[-1]] = False
        np.minimum(nearest, cdist(x, x[chosen[-1:]])[:, 0], out=nearest)
    return np.array(chosen, dtype=int)


def filled(x, n, labeled, chosen):
    """`chosen`, and by `k_center` what is missing to `n`."""
    chosen, labeled = np.array(chosen, dtype=int), np.asarray(labeled, dtype=int)
    return np.concatenate([chosen, k_center(x, n - len(chosen), np.concatenate([labeled, chosen]))])


def k_means(features, n, rng, labeled=()):
    """Of each of `n` clusters of the rows that are not labelled the one nearest to the centre.

    Where there are fewer clusters, because rows are alike, the rest is chosen by `k_center`.
    """
    x, still = checked(features, n, labeled)
    rows = np.flatnonzero(still)
    if n == 0 or not rows.size:
        return np.array([], dtype=int)
    cluster, distance = clusters(x[rows], min(n, len(rows)), rng)
    nearest_first = np.lexsort((distance, cluster))
    _, first = np.unique(cluster[nearest_first], return_index=True)
    return filled(x, n, labeled, rows[nearest_first[first]])


def typicality(x):
    """float (N,): 1 / the mean distance of a row of `x` to its 20 nearest others, at most half of all; 0 of one row."""
    k, result = min(20, len(x) // 2), np.zeros(len(x))
    for rows, squared in squared_distances(x, x) if k else ():
        squared[np.arange(len(squared)), np.arange(rows.start, rows.stop)] = np.inf
        result[rows] = 1 / (np.sqrt(np.partition(squared, k - 1, axis=1)[:, :k]).mean(axis=1) + 1e-5)
    return result


def typiclust(features, n, rng, labeled=(), labels=None):
    """Typical rows of many clusters, for the first labels: Hacohen et al., ICML 2022 (arXiv:2202.02794).

    All rows are put into as many clusters as there are `labels` (by default each `labeled` row is one; of windows that
    overlap, one label covers many) and choices, 500 at most. In turns each cluster chooses
    its most typical row (of SAMPLE, where it has more); those of fewest labels come first, and the largest of these.
    Clusters of five rows or fewer choose when the others are used up.
    """
    x, still = checked(features, n, labeled)
    chosen = []
    if n == 0 or not still.any():
        return np.array(chosen, dtype=int)
    k = min((len(labeled) if labels is None else labels) + n, 500, len(x))
    cluster, _ = clusters(x, k, rng)
    size, known = np.bincount(cluster, minlength=k), np.bincount(cluster[~still], minlength=k)
    order = np.lexsort((-size, known))
    for turns in (order[size[order] > 5], order[size[order] <= 5]):
        while len(chosen) < n and len(turns := turns[np.isin(turns, cluster[still])]):
            for number in turns[: n - len(chosen)]:
                rows = np.flatnonzero(still & (cluster == number))
                if rows.size > SAMPLE:
                    rows = np.sort(rows[sample_of(x[rows], rng)])
                chosen.append(rows[typicality(x[rows]).argmax()])
                still[chosen[-1]] = False
    return np.array(chosen, dtype=int)


def pure_radius(features, classes, rng, purity=0.95):
    """The largest radius within which a share `purity` of the rows have only rows of their own pseudo-label.

    The delta of ProbCover; pseudo-labels are `classes` clusters. Without a search, because the ball around a row is
    pure as far as the nearest row of another label. Judged by SAMPLE rows. DiversityError for a purity outside (0, 1],
    fewer than two classes or rows that are all the same.
    """
    x, _ = checked(features)
    if not 0 < purity <= 1:
        raise DiversityError(f"the purity is above 0 and at most 1, not {purity}; give 0.95")
    if classes < 2 or (x == x[:1]).all():
        raise DiversityError(f"{len(x)} rows do not part into {classes} classes; give 2 or more, and unlike rows")
    cluster, _ = clusters(x, classes, rng)
    judged, nearest = sample_of(x, rng), []
    for label in np.unique(cluster):
        own = x[judged[cluster[judged] == label]]
        nearest += [squared.min(axis=1) for _, squared in squared_distances(own, x[cluster != label])]
    nearest = np.sort(np.concatenate(nearest))
    return float(np.sqrt(nearest[int((1 - purity) * len(nearest) + 1e-9)]))


def prob_cover(features, n, delta, rng, labeled=()):
    """Again and again the row that has the most rows nearer than `delta` which no labelled or chosen one covers yet.

    Yehuda et al., "Active Learning Through a Covering Lens", NeurIPS 2022 (arXiv:2205.11320); delta, above 0, by
    `pure_radius`. The rows to cover are SAMPLE of all. When all are covered, the rest is chosen by `k_center`.
    """
    x, still = checked(features, n, labeled)
    if not delta > 0:
        raise DiversityError(f"delta is a distance above 0, not {delta}; take pure_radius")
    rows = sample_of(x, rng)
    bare = x[rows[distance_to_labeled(x, labeled)[rows] >= delta]]
    covers, chosen = within(x, bare, delta), []
    while len(chosen) < n and still.any() and len(bare):
        chosen.append(np.where(still, covers, -1).argmax())
        still[chosen[-1]] = False
        hit = cdist(bare, x[chosen[-1:]])[:, 0] < delta
        covers -= within(x, bare[hit], delta)
        bare = bare[~hit]
    return filled(x, n, labeled, chosen)


def k_center_of_unsure(scores, features, n, labeled=(), factor=5):
    """What `k_center` chooses of the `factor` times `n`, rounded down, rows of the highest `scores` (N,).

    They are unsure, and unlike each other and what is labelled, without a weight between the two. DiversityError for
    other than one score a row and for a factor below 1 or infinite.
    """
    x, still = checked(features, n, labeled)
    scores = np.asarray(scores, dtype=float)
    if scores.shape != (len(x),) or np.isnan(scores).any() or not 1 <= factor < np.inf:
        raise DiversityError(
            f"scores have shape {scores.shape} with {int(np.isnan(scores).sum())} NaN, of {len(x)} rows, and the "
            f"factor is {factor}; give a number a row, and 1 or more"
        )
    known, free = np.flatnonzero(~still), np.flatnonzero(still)
    kept = np.concatenate([known, free[np.argsort(-scores[free], kind="stable")[: int(factor * n)]]])
    return kept[k_center(x[kept], n, np.arange(len(known)))]
