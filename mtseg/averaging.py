"""Averages over networks, mirrored images and dropout masks, and how unsure they are.

A score map is a float array (num_classes, *spatial) of probabilities, over the classes summing to 1. Spatial are W, H
and D of a volume, H and W of an image.
"""

import contextlib
import itertools
import math

import numpy as np
from torch import nn

NO_FLIPS = ((),)


def all_flips(axes):
    """Every choice of some of `axes` to mirror, none among them: of two axes four."""
    return tuple(itertools.chain.from_iterable(itertools.combinations(axes, n) for n in range(len(axes) + 1)))


def plane_flips(through):
    """The four choices of the axes of a plane: all of (-3, -2, -1) but `through`.

    That is -1 for volumes, since along D no network of this family ever saw one mirrored, and is worse on one
    (docs/inference.md); for stacks the axis along which slices follow each other; -3 for images.
    """
    return all_flips([a for a in (-3, -2, -1) if a != through])


def mean_score(predict, nets, image, flips=NO_FLIPS):
    """The mean over all `nets` and `flips` of the score maps of `image`, float32.

    `predict(net, image)`: the score map of an image (*spatial) or (C, *spatial). `flips`: tuples of axes to mirror,
    counted from the last, `plane_flips` for those of test-time augmentation; each score map is mirrored back before it
    is added.
    """
    total = None
    for net in nets:
        for axes in flips:
            score = np.flip(predict(net, np.ascontiguousarray(np.flip(image, axes))), axes)
            total = np.array(score) if total is None else np.add(total, score, out=total)
    total /= len(nets) * len(flips)
    return total


def label_map(scores):
    """uint8 (*spatial): the class of the highest score, the lowest of equals, as argmax.

    `scores`: a score map, or an iterable of its classes (*spatial), at most 256, which is used up one by one.
    """
    for label, score in enumerate(scores):
        if label == 0:
            best, result = np.array(score), np.zeros(score.shape, np.uint8)
        else:
            result[score > best] = label
            np.maximum(best, score, out=best)
    return result


@contextlib.contextmanager
def dropout_on(nets):
    """In this context the dropout layers of `nets` drop, and all else is in eval mode; afterwards all is as before.

    Gal and Ghahramani, "Dropout as a Bayesian Approximation", ICML 2016 (arXiv:1506.02142). Yields the number of
    dropout layers, 0 where the networks have none and all samples would be alike.
    """
    modes = [(module, module.training) for net in nets for module in net.modules()]
    layers = [module for module, _ in modes if isinstance(module, nn.modules.dropout._DropoutNd)]
    for module, _ in modes:
        module.training = module in layers
    try:
        yield len(layers)
    finally:
        for module, mode in modes:
            module.training = mode


def entropy(probabilities):
    """The predictive entropy -sum_c p_c ln p_c, float32 (*spatial), from 0 (sure) to ln(num_classes) (all alike).

    `probabilities`: a score map, or an iterable of its classes (*spatial), which is used up one by one. Of an average
    of networks or samples it holds both what they are unsure of and what they disagree on.
    """
    total = 0.0
    for p in probabilities:
        total = total - p * np.log(np.maximum(p, np.finfo(np.float32).tiny))
    return np.maximum(total, 0).astype(np.float32)


def case_uncertainty(entropy_map, label_map, background=0):
    """One number a case: the mean entropy over the voxels predicted as foreground, NaN where there are none.

    Over the foreground alone, because a mean over the volume would mostly say how much background the scan shows; over
    all voxels where no class is the `background` (None).
    """
    foreground = np.full(label_map.shape, True) if background is None else label_map != background
    return float(entropy_map[foreground].mean(dtype=float)) if foreground.any() else math.nan


def rank_correlation(uncertainties, dices):
    """Spearman's correlation between uncertainty and 1 - Dice, in [-1, 1]; 1 where the less sure is always the worse.

    Pairs with a NaN are left out. NaN for fewer than three pairs, or where one side is the same everywhere.
    """
    from scipy import stats  # slow to import, and seldom needed

    pairs = np.array([(u, 1 - d) for u, d in zip(uncertainties, dices, strict=True) if math.isfinite(u + d)])
    if len(pairs) < 3 or (np.ptp(pairs, axis=0) == 0).any():
        return math.nan
    return float(stats.spearmanr(*pairs.T).statistic)
