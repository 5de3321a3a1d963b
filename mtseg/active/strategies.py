"""Strategies: which `n` regions of a candidates.Pool to annotate next.

A strategy is a function of (pool, n, rng) that gives the indices of the chosen candidates, in the order of choice, or
their query.Windows. `rng`: a numpy.random.Generator, its only source of chance. One's own is such a function in a file,
--strategy FILE.py:NAME. It may give more than n: of what it gives the first n are taken that do not overlap, and of a
case no more than pool.per_case, see `choose`.
"""

import numpy as np

from mtseg import diversity, query, uncertainty
from mtseg.query import QueryError, Windows
from mtseg.script.networks import load_own

FACTOR = 4  # as many candidates as this times the budget are put in order, as some overlap


def random(pool, n, rng):
    """Chance: every candidate alike."""
    return query.top_windows(rng.random(len(pool.windows.case)), pool.windows, n, pool.annotated, pool.per_case)


def strided(pool, n, rng):
    """Every k-th candidate that is left, as the slices of a volume."""
    return query.every_kth(len(pool.windows.case), n, pool.labeled())


def foreground(share):
    def strategy(pool, n, rng):
        how = {"foreground": share, "background": pool.cases.no_class}
        return query.foreground_random(
            pool.cases.sides, pool.labels_of, pool.size, n, rng, annotated=pool.annotated, **how
        )

    strategy.__doc__ = (
        f"Chance, {share:.0%} of it around a class or on its border: true classes of an oracle, else predicted."
    )
    return strategy


def unsure(name):
    def strategy(pool, n, rng):
        return query.top_windows(pool.scores(name), pool.windows, n, pool.annotated, pool.per_case)

    strategy.__doc__ = f"The highest {name.replace('_', ' ')}."
    return strategy


def noisy(kind):
    def strategy(pool, n, rng):
        scores = query.noisy(pool.scores("entropy"), kind, rng)
        return query.top_windows(scores, pool.windows, n, pool.annotated, pool.per_case)

    strategy.__doc__ = f"Entropy with {kind} noise, so that a batch is not the same region many times."
    return strategy


def clasp_pe(pool, n, rng):
    """Two thirds by the entropy of each class in turn, the rest by entropy, all with noise that falls by the rounds."""
    beta = query.power_beta(min(pool.round, pool.rounds - 1), pool.rounds)
    scores = pool.class_scores(), pool.scores("entropy")
    return query.clasp_pe(*scores, pool.windows, n, beta, rng, pool.annotated, pool.per_case)


def features_of(pool, rng):
    return diversity.prepared(pool.features(), rng)


def core_set(pool, n, rng):
    """k-centre greedy: again and again what is farthest, by the network's features, from all that is labelled."""
    return diversity.k_center(features_of(pool, rng), FACTOR * n, pool.labeled())


def k_means(pool, n, rng):
    """The middle of each of n clusters."""
    return diversity.k_means(features_of(pool, rng), n, rng, pool.labeled())


def typiclust(pool, n, rng):
    """The most typical of each of many clusters, those of fewest labels first."""
    return diversity.typiclust(features_of(pool, rng), n, rng, pool.labeled(), len(pool.annotated.case))


def prob_cover(pool, n, rng):
    """What covers most candidates that no labelled one covers."""
    x = features_of(pool, rng)
    classes = 2 if pool.network is None else pool.network.num_classes
    return diversity.prob_cover(x, n, diversity.pure_radius(x, classes, rng), rng, pool.labeled())


def unsure_core_set(pool, n, rng):
    """k-centre greedy among the 5 n of highest entropy."""
    return diversity.k_center_of_unsure(pool.scores("entropy"), features_of(pool, rng), n, pool.labeled())


def ranks(pool, n, rng):
    """The sum of two ranks: of the entropy, and of half the distance to what is labelled."""
    labeled = pool.labeled()
    far = diversity.distance_to_labeled(features_of(pool, rng), labeled)
    scores = query.weighted_ranks([pool.scores("entropy"), np.minimum(far, np.finfo(float).max)], [1, 0.5])
    return query.top_windows(scores, pool.windows, n, pool.annotated, pool.per_case)


STRATEGIES = {
    "clasp_pe": clasp_pe,
    "random": random,
    "foreground33": foreground(1 / 3),
    "foreground66": foreground(2 / 3),
    "strided": strided,
    **{name: unsure(name) for name in (*uncertainty.OF_THE_MEAN, *uncertainty.OF_MEMBERS)},
    **{f"{kind}_entropy": noisy(kind) for kind in ("power", "softrank", "gibbs")},
    "core_set": core_set,
    "k_means": k_means,
    "typiclust": typiclust,
    "prob_cover": prob_cover,
    "unsure_core_set": unsure_core_set,
    "ranks": ranks,
}


def find_strategy(word):
    """The function that `word` names: of STRATEGIES, or FILE.py:NAME. QueryError where there is none."""
    if word in STRATEGIES:
        return STRATEGIES[word]
    if ".py:" not in word:
        raise QueryError(f"there is no strategy {word}; there are {', '.join(STRATEGIES)}, or give FILE.py:NAME")
    path, strategy = load_own("--strategy", word)
    if not callable(strategy):
        raise QueryError(f"--strategy {word}: {path} has no function of this name; mend it")
    return strategy


def choose(pool, strategy, n, rng):
    """query.Windows of the `n` regions that the function `strategy` chooses from `pool`.

    No case has more than `pool.per_case` of them; with None as many as are needed when all cases with something left
    have equally many, and one more, again and again, where that is too few. A network is unsure of whole stretches of a
    case, and what lies side by side teaches the same twice. QueryError where there are not so many regions that overlap
    neither each other nor what is annotated.
    """
    before, sides = pool.annotated, np.array(pool.cases.sides)
    offered = found = query.windows_of([], len(pool.size))
    asked_limit = pool.per_case
    if asked_limit is None:
        left = np.unique(pool.windows.case[query.opened(pool.windows, 0, before)])
        pool.per_case = -(-n // max(len(left), 1))
    try:
        while len(found.case) < n:  # a strategy that knows nothing of these limits is asked again for what it has lost
            full = np.flatnonzero(np.bincount(found.case, minlength=len(sides)) >= (pool.per_case or n + 1))
            closed = query.windows_of([(number, 0 * sides[number], sides[number]) for number in full], len(pool.size))
            pool.annotated = Windows(*map(np.concatenate, zip(before, found, closed, strict=True)))
            chosen = strategy(pool, n - len(found.case), rng)
            if not isinstance(chosen, Windows):
                order = np.asarray(chosen)
                if order.size and (order.ndim != 1 or order.dtype.kind not in "iu"):
                    what = f"a {order.dtype} array of shape {order.shape}"
                    raise QueryError(f"a strategy gives whole numbers, the indices of its choice, not {what}; mend it")
                order = order.astype(int)
                query.unlabeled(len(pool.windows.case), n, order)  # QueryError for an index of no candidate
                chosen = Windows(*(part[order] for part in pool.windows))
            case, start, stop = chosen = Windows(*(np.asarray(part, dtype=int) for part in chosen))
            inside = np.isin(case, range(len(sides))).all() and (0 <= start).all() and (start < stop).all()
            if not (inside and (stop <= sides[case]).all()):
                raise QueryError("the strategy chose a region that does not lie in its case; mend it")
            asked, offered = len(found.case), Windows(*map(np.concatenate, zip(offered, chosen, strict=True)))
            kept = query.top_windows(-np.arange(len(offered.case), dtype=float), offered, n, before, pool.per_case)
            found = Windows(*(part[kept] for part in offered))
            if len(found.case) == asked:
                if asked_limit is None and len(full):
                    pool.per_case += 1
                    continue
                if query.opened(pool.windows, 0, pool.annotated).any():
                    more = "ask for so many, or let it give more than it is asked for, best first"
                    raise QueryError(f"--budget {n}: the strategy gives only {asked} without overlap; {more}")
                limit = f", --per_case {pool.per_case}" if len(full) else ""
                raise QueryError(f"--budget {n}{limit}: only {asked} regions are left to choose; ask for so many")
    finally:
        pool.annotated, pool.per_case = before, asked_limit
    return found


def selection_of(pool, chosen, strategy, why=None, **told):
    """What selection.json says of the regions `chosen`, query.Windows, by the name of a `strategy`; `why`: in words."""
    known = {name: scores for name, scores in pool.known.items() if isinstance(name, str)}
    keys = zip(pool.windows.case.tolist(), map(tuple, pool.windows.start.tolist()), strict=True)
    place_of, regions = {key: place for place, key in enumerate(keys)}, []
    for rank, (number, start, stop) in enumerate(zip(*map(np.ndarray.tolist, chosen), strict=True), start=1):
        place = place_of.get((number, tuple(start)))
        scores = {} if place is None else {name: round(float(values[place]), 6) for name, values in known.items()}
        regions.append({"case": pool.cases.names[number], "start": start, "stop": stop, "rank": rank, "scores": scores})
    why = why or find_strategy(strategy).__doc__ or ""
    return {
        "strategy": strategy,
        "why": " ".join(why.split()),
        "of": pool.of,
        "per_case": pool.per_case,
        **told,
        "regions": regions,
    }
