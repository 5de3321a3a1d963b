"""Losses for segmentation and for consistency between two networks.

Shapes: logits and scores (N, C, *spatial) or (N, *spatial) as each function says, integer labels (N, *spatial), with
any number of spatial dimensions. Each function says over what it reduces. Gradients flow to the first argument only;
the second is a target and is detached here. Losses of float16 and bfloat16 are computed in float32, since a sum over a
volume exceeds 65504, the largest float16, and are float32. Every loss and its gradient are finite for finite logits,
also where a class is missing, where the target is empty or full, and where every voxel is ignored (then both are 0).

`ignore_index`: the label of voxels that do not count, for example 255; None means that there are none.
`class_weights`: C numbers of at least 0, a tensor or a sequence; with None all classes weigh the same.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

SMOOTH = 1e-5
NO_LABEL = -(2**63)  # PyTorch's own default, -100, would leave out a mistake


def dice_loss(score, target):
    """1 - (2 sum(s t) + 1e-5) / (sum(s s) + sum(t t) + 1e-5), a scalar in [0, 1].

    Milletari et al., "V-Net", 3DV 2016 (arXiv:1606.04797), section 3, smoothed: the squared denominator.
    `score` in [0, 1] (one class's probability) and `target` 0 or 1 (or bool) have the same shape, any; the sums run
    over everything, the batch included, as in UA-MT. ValueError for other shapes, which would be spread over another.
    """
    if score.shape != target.shape:
        raise ValueError(f"the target is {tuple(target.shape)} and the score {tuple(score.shape)}: give them one shape")
    score = _widened(score)
    target = target.detach().to(score.dtype)
    intersection = (score * target).sum()
    return 1 - (2 * intersection + SMOOTH) / ((score * score).sum() + (target * target).sum() + SMOOTH)


def multiclass_dice_loss(input_logits, target, include_background=False, ignore_index=None):
    """The mean of `dice_loss` over classes, each on that class's softmax probability over the whole batch; in [0, 1].

    `input_logits` (N, C, *spatial), `target` integer (N, *spatial) with values 0 .. C - 1 or `ignore_index`; nobody
    checks here, and others are of no class. Class 0 counts only with `include_background`; with C = 2 and without
    background this is the family's dice_loss(softmax(x)[:, 1], y == 1).
    """
    return _mean_over_classes(dice_loss, input_logits, target, include_background, ignore_index)


def tversky_loss(input_logits, target, alpha=0.3, beta=0.7, include_background=False, ignore_index=None):
    """1 - TP / (TP + alpha FP + beta FN), 1e-5 added above and below the bar, the mean over classes; in [0, 1].

    Salehi et al., "Tversky loss function for image segmentation using 3D fully convolutional deep networks", MLMI
    2017 (arXiv:1706.05721), equation 4, with the alpha and beta that they found best: a missed voxel costs more than a
    false alarm. For a class's softmax probability p and its 0/1 target t, over the whole batch, TP = sum(p t),
    FP = sum(p (1 - t)), FN = sum((1 - p) t). alpha = beta = 0.5 is Dice with p and t not squared in the denominator.
    Shapes and background as in `multiclass_dice_loss`.
    """

    def one_class(score, target):
        target = target.to(score.dtype)
        hit = (score * target).sum()
        miss, false_alarm = target.sum() - hit, score.sum() - hit
        return 1 - (hit + SMOOTH) / (hit + alpha * false_alarm + beta * miss + SMOOTH)

    return _mean_over_classes(one_class, input_logits, target.detach(), include_background, ignore_index)


def _mean_over_classes(loss, input_logits, target, include_background, ignore_index):
    """The mean of loss(probability, is this class) over classes, with both 0 on ignored voxels. ValueError for a target
    of another shape, such as (N, 1, *spatial)."""
    if target.shape != input_logits.shape[:1] + input_logits.shape[2:]:
        shapes = tuple(target.shape), tuple(input_logits.shape)
        raise ValueError("the target is {} for logits of {}: give (N, *spatial)".format(*shapes))
    probabilities = F.softmax(_logits(input_logits), dim=1)
    if ignore_index is not None:
        ignored = target == ignore_index
        probabilities = probabilities.masked_fill(ignored.unsqueeze(1), 0)
        target = target.long().masked_fill(ignored, -1)
    classes = range(0 if include_background else 1, input_logits.shape[1])
    return sum(loss(probabilities[:, c], target == c) for c in classes) / len(classes)


def cross_entropy_loss(input_logits, target, class_weights=None, ignore_index=None):
    """F.cross_entropy, in nats: the mean over voxels, or sum(w loss) / sum(w) with w the weight of a voxel's class.

    `input_logits` (N, C, *spatial), `target` integer (N, *spatial). Unlike F.cross_entropy it is 0, not NaN, where
    every voxel is ignored or has a class of weight 0.
    """
    # On a GPU, F.cross_entropy adds its mean up in any order: the same numbers give another one in the last digits.
    if class_weights is None and ignore_index is None and not input_logits.is_cuda:
        return F.cross_entropy(_logits(input_logits), target.detach().long(), ignore_index=NO_LABEL)
    loss = _voxel_cross_entropy(input_logits, target, ignore_index)
    return _weighted_mean(loss, target, input_logits.shape[1], class_weights, ignore_index)


def focal_loss(input_logits, target, gamma=2.0, class_weights=None, ignore_index=None):
    """(1 - p)^gamma (-log p), p the softmax probability of the voxel's class: easy voxels weigh little, hard ones much.

    Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017 (arXiv:1708.02002), equation 4; their alpha is
    `class_weights`. Shapes and mean as in `cross_entropy_loss`, which it equals for gamma = 0. The gradient flows
    through both p, as in the paper; implementations that take (1 - p)^gamma as a constant weight give other gradients.
    """
    if gamma < 0:
        raise ValueError(f"gamma is {gamma}: the focal loss takes one of at least 0")
    loss = _voxel_cross_entropy(input_logits, target, ignore_index)
    # Not 0: there the slope of x^gamma is infinite for gamma < 1, and infinity times the loss 0 is NaN.
    doubt = (-torch.expm1(-loss)).clamp_min(torch.finfo(loss.dtype).tiny)
    return _weighted_mean(doubt**gamma * loss, target, input_logits.shape[1], class_weights, ignore_index)


def dice_ce_loss(input_logits, target):
    """0.5 (cross-entropy + Dice): the supervised loss of UA-MT and LASeg, a scalar.

    Cross-entropy is the mean over all voxels of the batch, in nats; Dice is `multiclass_dice_loss` without background.
    """
    return 0.5 * (cross_entropy_loss(input_logits, target) + multiclass_dice_loss(input_logits, target))


def linear_dice_loss(input_logits, target, include_background=False, ignore_index=None):
    """1 - 2 sum(p t) / (sum(p) + sum(t)), nothing squared below the bar, the mean over classes; in [0, 1].

    The Dice of MC-Net's and SS-Net's code: `tversky_loss` with alpha = beta = 0.5, whose 1e-5 is 1e-8 there.
    """
    return tversky_loss(input_logits, target, 0.5, 0.5, include_background, ignore_index)


TERMS = {"ce": cross_entropy_loss, "dice": multiclass_dice_loss, "focal": focal_loss, "tversky": tversky_loss}
TERMS["linear_dice"] = linear_dice_loss


def parse_loss(text):
    """'dice:1.0,focal:0.5' as {'dice': 1.0, 'focal': 0.5}; a term without a number weighs 1.

    The terms are those of `TERMS`; a ValueError is one sentence that names the mistake and the remedy.
    """
    terms = {}
    for part in text.split(","):
        name, colon, number = (piece.strip() for piece in part.partition(":"))
        if name not in TERMS:
            raise ValueError(f"unknown term {name!r} in the loss {text!r}: the terms are {', '.join(TERMS)}")
        if name in terms:
            raise ValueError(f"the loss {text!r} has {name} twice: give it once, with the sum of the weights")
        try:
            terms[name] = float(number) if colon else 1.0
        except ValueError:
            terms[name] = math.nan
        if not 0 <= terms[name] < math.inf:
            raise ValueError(
                f"the weight {number!r} of {name} in the loss {text!r} is not a finite number of at least 0"
            )
    if not any(terms.values()):
        raise ValueError(f"all weights of the loss {text!r} are 0: give one term a weight above 0")
    return terms


class SupervisedLoss(nn.Module):
    """A weighted sum of the losses above; calling it gives `loss, parts`.

    `spec` as in `parse_loss`; 'ce:0.5,dice:0.5' is `dice_ce_loss`. `class_weights` apply to ce and focal (in the others
    all foreground classes weigh the same), `ignore_index` to all terms. `include_background`: class 0 counts in the
    others too, as where no class is a background.

        supervised = SupervisedLoss("dice:1.0,focal:0.5").to(device)
        loss, parts = supervised(outputs, target)

    `outputs`: logits (N, C, *spatial), or a list of them with deep supervision, finest first; `target` integer
    (N, *spatial) in the finest resolution, of which a coarser output sees the voxels nearest to its own centres.
    `deep_supervision_weights`: one number an output, divided by their sum; by default 1, 1/2, 1/4, ... `loss` is a
    scalar; `parts` holds a scalar without a graph for each term, before its weight: 'loss_ce', 'loss_dice', ...
    Raises ValueError where spec, weights or shapes do not fit.
    """

    def __init__(
        self,
        spec="ce:0.5,dice:0.5",
        class_weights=None,
        ignore_index=None,
        deep_supervision_weights=None,
        include_background=False,
    ):
        super().__init__()
        self.terms = parse_loss(spec)
        self.include_background = include_background
        self.ignore_index = ignore_index
        self.deep_supervision_weights = None
        if class_weights is not None:
            class_weights = torch.tensor(_checked_weights(class_weights, "class weights"))
        if deep_supervision_weights is not None:
            self.deep_supervision_weights = _checked_weights(deep_supervision_weights, "deep supervision weights")
        # Not in the state dict: it is a setting, and checkpoints keep fitting when it changes.
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, outputs, target):
        outputs = levels(outputs)
        weights = self.deep_supervision_weights
        if weights is None:
            weights = [0.5**level for level in range(len(outputs))]
        if len(weights) != len(outputs):
            raise ValueError(f"{len(weights)} deep supervision weights for {len(outputs)} outputs: give one for each")
        if (outputs[0].shape[0], *outputs[0].shape[2:]) != tuple(target.shape):
            raise ValueError(f"logits of shape {tuple(outputs[0].shape)} against labels of {tuple(target.shape)}")
        parts = {}
        for logits, weight in zip(outputs, weights, strict=True):
            labels = nearest_labels(target, logits.shape[2:])
            for name in self.terms:
                part = self._term(name, logits, labels) * (weight / sum(weights))
                parts[name] = parts[name] + part if name in parts else part
        loss = sum(weight * parts[name] for name, weight in self.terms.items())
        return loss, {f"loss_{name}": part.detach() for name, part in parts.items()}

    def _term(self, name, logits, target):
        by_voxel = name in ("ce", "focal")
        more = {"class_weights": self.class_weights} if by_voxel else {"include_background": self.include_background}
        return TERMS[name](logits, target, ignore_index=self.ignore_index, **more)


def levels(outputs):
    """The outputs of a network as a list, finest first: a network without deep supervision gives a single tensor."""
    return [outputs] if isinstance(outputs, torch.Tensor) else outputs


def nearest_labels(target, size):
    """`target` (N, *spatial) in the resolution `size`: each voxel gets the label of the voxel nearest to its centre.

    This is 'nearest-exact' of F.interpolate (its 'nearest' is half a voxel off and more), for integers of any type and
    any number of spatial dimensions.
    """
    for axis, (new, old) in enumerate(zip(size, target.shape[1:], strict=True), start=1):
        if new != old:
            centres = (2 * torch.arange(new, device=target.device) + 1) * old // (2 * new)
            target = target.index_select(axis, centres)
    return target


def softmax_mse_loss(input_logits, target_logits, reduction="mean"):
    """(softmax(input) - softmax(target))^2, the consistency cost of Tarvainen and Valpola (arXiv:1703.01780), eq. 1.

    Both (N, C, *spatial). `reduction`: 'mean' and 'sum' run over all entries, classes included; 'none' keeps
    (N, C, *spatial), as UA-MT weighs voxels by it.
    """
    input_logits, target_logits = _pair(input_logits, target_logits)
    return F.mse_loss(F.softmax(input_logits, dim=1), F.softmax(target_logits, dim=1), reduction=reduction)


def softmax_kl_loss(input_logits, target_logits, reduction="mean"):
    """KL(softmax(target) || softmax(input)), in nats: its terms are t (log t - log s).

    Both (N, C, *spatial). `reduction`: 'mean' and 'sum' run over all terms, classes included (so 'mean' is the
    divergence per voxel divided by C, as in the family); 'none' keeps (N, C, *spatial).
    """
    input_logits, target_logits = _pair(input_logits, target_logits)
    terms = F.kl_div(F.log_softmax(input_logits, dim=1), F.softmax(target_logits, dim=1), reduction="none")
    # Reduced here, since kl_div warns that the meaning of its reduction 'mean' will change.
    return _reduced(terms, reduction)


def softmax_ce_loss(input_logits, target_logits, reduction="mean"):
    """Soft cross-entropy of softmax(input) under softmax(target), in nats: its terms are -t log s.

    Both (N, C, *spatial). `reduction`: 'mean' and 'sum' run over all terms, classes included (so 'mean' is the
    cross-entropy per voxel divided by C, as `softmax_kl_loss` has it); 'none' keeps (N, C, *spatial). It exceeds
    `softmax_kl_loss` by the entropy of the target, which is constant here: both have the same gradient.
    """
    input_logits, target_logits = _pair(input_logits, target_logits)
    terms = -F.softmax(target_logits, dim=1) * F.log_softmax(input_logits, dim=1)
    return _reduced(terms, reduction)


def confidence_mask(target_logits, threshold):
    """Bool (N, *spatial): where the largest softmax probability is at least `threshold` (0 to 1). No gradient flows.

    FixMatch's mask (Sohn et al., NeurIPS 2020, arXiv:2001.07685, equation 4); `target_logits` (N, C, *spatial).
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"a confidence threshold of {threshold}: take one between 0 and 1")
    return F.softmax(_logits(target_logits.detach()), dim=1).amax(dim=1) >= threshold


def masked_mean(loss_map, mask):
    """The mean of `loss_map` over the voxels in `mask` and over classes; 0 with gradient 0 where the mask is empty.

    `loss_map` (N, C, *spatial), a consistency loss with reduction 'none'; `mask` bool, (N, *spatial) or
    (N, 1, *spatial). A mask that is True everywhere gives loss_map.mean(). Raises ValueError for other masks.
    """
    loss_map = _widened(loss_map)
    if mask.dim() == loss_map.dim() - 1:
        mask = mask.unsqueeze(1)
    if mask.dtype != torch.bool or mask.shape != (loss_map.shape[0], 1, *loss_map.shape[2:]):
        raise ValueError(
            f"a {mask.dtype} mask of shape {tuple(mask.shape)} for a loss of {tuple(loss_map.shape)}: give a bool "
            f"mask with one value a voxel"
        )
    voxels = mask.sum() * loss_map.shape[1]
    return loss_map.masked_fill(~mask, 0).sum() / voxels.clamp_min(1)


def _reduced(terms, reduction):
    return {"mean": terms.mean, "sum": terms.sum, "none": lambda: terms}[reduction]()


def _widened(tensor):
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _logits(tensor):
    if tensor.shape[1] < 2:  # whose softmax is 1 everywhere, and every loss of it a constant
        raise ValueError("logits of one class: give every class a channel, the background too")
    return _widened(tensor)


def _pair(input_logits, target_logits):
    if input_logits.shape != target_logits.shape:
        raise ValueError(f"logits of shape {tuple(input_logits.shape)} against {tuple(target_logits.shape)}")
    return _logits(input_logits), _logits(target_logits.detach())


def _voxel_cross_entropy(input_logits, target, ignore_index):
    ignored = NO_LABEL if ignore_index is None else ignore_index
    return F.cross_entropy(_logits(input_logits), target.detach().long(), reduction="none", ignore_index=ignored)


def _weighted_mean(voxel_loss, target, num_classes, class_weights, ignore_index):
    """The mean of `voxel_loss` (N, *spatial) over voxels that are not ignored, by the weights of their classes."""
    ignored = torch.zeros_like(target, dtype=torch.bool) if ignore_index is None else target == ignore_index
    if class_weights is None:
        weights = torch.ones_like(voxel_loss)
    else:
        class_weights = torch.as_tensor(class_weights, dtype=voxel_loss.dtype, device=voxel_loss.device)
        if class_weights.shape != (num_classes,):
            raise ValueError(f"{class_weights.numel()} class weights for {num_classes} classes: give one for each")
        weights = class_weights[target.masked_fill(ignored, 0).long()]
    weights = weights.masked_fill(ignored, 0)
    total = weights.sum()
    return (weights * voxel_loss).sum() / torch.where(total > 0, total, 1)


def _checked_weights(weights, name):
    weights = torch.as_tensor(weights).flatten().tolist()
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ValueError(f"{name} {weights}: give finite numbers of at least 0, not all of them 0")
    return [float(weight) for weight in weights]
