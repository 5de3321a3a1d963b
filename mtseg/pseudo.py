"""Pseudo-labels: the teacher's most probable class, where it is sure, as a label for the student; or a sharpened one.

Logits are (N, C, *spatial), labels int64 (N, *spatial) with any number of spatial dimensions. A voxel that is not used
has the label `ignore_index`, which the loss has to leave out. Only `sharpen` has a gradient. Every result is a tensor
on the device of its input, and nothing waits for the GPU.
"""

import math

import torch
import torch.nn.functional as F


def pseudo_labels(teacher_logits, threshold=0.8, max_entropy=None, foreground=None, ignore_index=255, seen=None):
    """The most probable class of each voxel where the teacher is sure of it, `ignore_index` elsewhere.

    A voxel is used if its largest softmax probability is at least `threshold` (0 to 1; FixMatch, Sohn et al., NeurIPS
    2020, arXiv:2001.07685) and, with `max_entropy`, if the entropy of its C probabilities is at most that share of the
    largest possible one, log C (0 to 1: 0 is certainty, 1 sets no limit).

    `foreground` (MIN, MAX), shares from 0 to 1: a volume (a patch, where the teacher sees patches) is left out as a
    whole unless MIN <= share <= MAX, where the share is that of its voxels, sure or not, whose most probable class is
    not 0. `seen`: bool (N, *spatial), the voxels that mean something; the others are not used and not counted. Voxels
    with NaN among their logits are not used. Raises ValueError for limits outside these ranges, fewer
    than two classes, and an `ignore_index` that is a class.
    """
    num_classes = teacher_logits.shape[1]
    if num_classes < 2:
        raise ValueError(f"pseudo-labels of {num_classes} class: the softmax needs two or more, background included")
    if 0 <= ignore_index < num_classes:
        raise ValueError(f"ignore_index {ignore_index} is one of the {num_classes} classes: take another, such as 255")
    for name, limit in (("threshold", threshold), ("entropy limit", 0 if max_entropy is None else max_entropy)):
        if not 0 <= limit <= 1:
            raise ValueError(f"the {name} of pseudo-labels is {limit}: take one between 0 and 1")
    if foreground is not None and not 0 <= foreground[0] <= foreground[1] <= 1:
        raise ValueError(f"the pseudo-foreground limits are {tuple(foreground)}: take 0 <= MIN <= MAX <= 1")

    logits = teacher_logits.detach()
    # In half precision, probabilities near the threshold are up to 0.004 apart.
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    probabilities = F.softmax(logits, dim=1)
    confidence, labels = probabilities.max(dim=1)
    used = confidence >= threshold
    if max_entropy is not None and max_entropy < 1:  # above 1 by rounding where all classes are alike
        used &= torch.special.entr(probabilities).sum(dim=1) / math.log(num_classes) <= max_entropy
    if foreground is not None:
        counted = torch.ones_like(used) if seen is None else seen
        share = ((labels != 0) & counted).flatten(1).sum(dim=1) / counted.flatten(1).sum(dim=1)
        accepted = (share >= foreground[0]) & (share <= foreground[1])
        used &= accepted.view(-1, *[1] * (labels.dim() - 1))
    if seen is not None:
        used &= seen
    return labels.masked_fill(~used, ignore_index)


def settled_labels(one, two, own, threshold=0.8, ignore_index=255):
    """(the labels on which two teachers and their student settle, where the teachers' most probable classes differ).

    AD-MT (Zhao et al., ECCV 2024, arXiv:2311.17325). The teachers' probabilities p, from the logits `one` and `two`,
    are averaged with weights proportional to exp(-H), H = -sum p log2 p. A voxel gets the most probable class of that
    mean or, where the teachers differ, that of the student's logits `own`, if it is another and more probable;
    `ignore_index` where this probability is below `threshold`.
    """
    p = torch.stack([one, two]).detach().float().softmax(2)
    weights = (p * torch.log2(p + 1e-10)).sum(2, keepdim=True).softmax(0)
    confidence, labels = (weights * p).sum(0).max(1)
    own_confidence, own_labels = own.detach().float().softmax(1).max(1)
    differ = torch.ne(*p.max(2).indices)
    overruled = differ & (own_labels != labels) & (own_confidence > confidence)
    used = torch.where(overruled, own_confidence, confidence) >= threshold
    return torch.where(overruled, own_labels, labels).masked_fill(~used, ignore_index), differ


def pseudo_label_statistics(labels, hidden_labels=None, ignore_index=255):
    """How much of a batch of `pseudo_labels` is used and, for monitoring only, how much of that is right.

    Returns a dict of scalar tensors, shares from 0 to 1, ready for a log:

    - 'pseudo_voxels_used': of all voxels of the batch;
    - 'pseudo_volumes_used': the volumes (or patches) with at least one voxel used;
    - 'pseudo_accuracy_monitoring_only', with `hidden_labels`: of the voxels used, those with the hidden label; NaN
      where no voxel is used.

    `hidden_labels` integer (N, *spatial), the true labels of cases that count as unlabelled; it is `ignore_index` where
    there are none, and these voxels do not count. Nothing in training may depend on this number, neither the loss nor
    the choice of a threshold or a checkpoint, or the cases are no longer unlabelled.
    """
    used = labels != ignore_index
    statistics = {
        "pseudo_voxels_used": used.float().mean(),
        "pseudo_volumes_used": used.flatten(1).any(dim=1).float().mean(),
    }
    if hidden_labels is not None:
        if hidden_labels.shape != labels.shape:
            raise ValueError(f"hidden labels of shape {tuple(hidden_labels.shape)} for {tuple(labels.shape)}")
        judged = used & (hidden_labels != ignore_index)
        statistics["pseudo_accuracy_monitoring_only"] = (judged & (labels == hidden_labels)).sum() / judged.sum()
    return statistics


def sharpen(probabilities, temperature):
    """p^(1/T) / (p^(1/T) + (1 - p)^(1/T)) for each value p from 0 to 1, in any shape: nearer to 0 or 1 for T < 1.

    MC-Net (Wu et al., MICCAI 2021, arXiv:2103.02911), section 2.2. Each class stands against all others together, so
    that three or more no longer sum to 1. The gradient flows through, and is finite at 0 and 1 too. ValueError for a
    `temperature` T that is not above 0 and at most 1.
    """
    if not 0 < temperature <= 1:
        raise ValueError(f"the temperature of sharpening is {temperature}: take one above 0, up to 1")
    # Divided by the larger of the two, which cancels, since 0.5^(1/T) is 0 in float32 for a T below 0.007.
    larger = torch.maximum(probabilities, 1 - probabilities).detach()
    one, rest = (probabilities / larger) ** (1 / temperature), ((1 - probabilities) / larger) ** (1 / temperature)
    return one / (one + rest)
