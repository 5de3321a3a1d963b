"""Losses for segmentation and for consistency between two networks.

Shapes: logits and scores (N, C, *spatial) or (N, *spatial) as each function says, integer labels (N, *spatial), with
any number of spatial dimensions. Each function says over what it reduces. Gradients flow to the first argument
only; the second is a target, detached here, whatever it comes from.
"""

import torch.nn.functional as F

SMOOTH = 1e-5


def dice_loss(score, target):
    """1 - (2 sum(s t) + 1e-5) / (sum(s s) + sum(t t) + 1e-5), a scalar in [0, 1].

    Milletari et al., "V-Net", 3DV 2016 (arXiv:1606.04797), section 3, smoothed: the squared denominator.
    `score` in [0, 1] (one class's probability) and `target` 0 or 1 (or bool) have the same shape, any; the sums run
    over everything, the batch included, as in UA-MT.
    """
    target = target.detach().to(score.dtype)
    intersection = (score * target).sum()
    return 1 - (2 * intersection + SMOOTH) / ((score * score).sum() + (target * target).sum() + SMOOTH)


def multiclass_dice_loss(input_logits, target, include_background=False):
    """The mean of `dice_loss` over classes, each on that class's softmax probability over the whole batch; in [0, 1].

    `input_logits` (N, C, *spatial), `target` integer (N, *spatial) with values 0 .. C - 1. Class 0 counts only with
    `include_background`; with C = 2 and without background this is the family's dice_loss(softmax(x)[:, 1], y == 1).
    """
    probabilities = F.softmax(input_logits, dim=1)
    classes = range(0 if include_background else 1, input_logits.shape[1])
    return sum(dice_loss(probabilities[:, c], target == c) for c in classes) / len(classes)


def dice_ce_loss(input_logits, target):
    """0.5 (cross-entropy + Dice): the supervised loss of UA-MT and LASeg, a scalar.

    Cross-entropy is the mean over all voxels of the batch, in nats; Dice is `multiclass_dice_loss` without background.
    """
    return 0.5 * (F.cross_entropy(input_logits, target.detach()) + multiclass_dice_loss(input_logits, target))


def softmax_mse_loss(input_logits, target_logits, reduction="mean"):
    """(softmax(input) - softmax(target))^2, the consistency cost of Tarvainen and Valpola (arXiv:1703.01780), eq. 1.

    Both (N, C, *spatial). `reduction`: 'mean' and 'sum' run over all entries, classes included; 'none' keeps
    (N, C, *spatial), as UA-MT weighs voxels by it.
    """
    _check(input_logits, target_logits)
    return F.mse_loss(F.softmax(input_logits, dim=1), F.softmax(target_logits.detach(), dim=1), reduction=reduction)


def softmax_kl_loss(input_logits, target_logits, reduction="mean"):
    """KL(softmax(target) || softmax(input)), in nats: its terms are t (log t - log s).

    Both (N, C, *spatial). `reduction`: 'mean' and 'sum' run over all terms, classes included (so 'mean' is the
    divergence per voxel divided by C, as in the family); 'none' keeps (N, C, *spatial).
    """
    _check(input_logits, target_logits)
    terms = F.kl_div(F.log_softmax(input_logits, dim=1), F.softmax(target_logits.detach(), dim=1), reduction="none")
    # Reduced here: kl_div's own 'mean' warns that its meaning will change.
    return {"mean": terms.mean, "sum": terms.sum, "none": lambda: terms}[reduction]()


def _check(input_logits, target_logits):
    if input_logits.shape != target_logits.shape:
        raise ValueError(f"logits of shape {tuple(input_logits.shape)} against {tuple(target_logits.shape)}")
