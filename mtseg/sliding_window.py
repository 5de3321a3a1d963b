"""Segmentation of whole volumes and images by overlapping windows, the protocol of UA-MT and LASeg."""

import copy
import functools
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class NotFiniteScoresError(ArithmeticError):
    """A network whose output is NaN or infinite; the message is one sentence."""


@torch.inference_mode()
def test_single_case(net, image, stride_xy, stride_z, patch_size, num_classes=2, weighting="uniform", batch_size=None):
    """Average softmax scores over all windows of `image`; returns (label_map, score_map).

    `image`: (*spatial) or (C, *spatial) array; spatial are W, H, D, or H, W where `patch_size` has two numbers.
    `net`: logits (N, num_classes, *patch_size) for (N, C, *patch_size), in the mode and on the device it is in (call
    net.eval() first: in training mode, batch normalization would mix the windows of a batch;
    `optimize_for_inference(net)` is faster). Windows of `patch_size` voxels start every `stride_xy` voxels along W and
    H and every `stride_z` along D (unused in 2-D, where it may be None); the last of each row is moved back to end with
    the volume. Strides are never larger than the patch (see `covering_strides`), so that a window covers every voxel.
    A volume smaller than the patch is padded with 0 on both sides and cut back afterwards.

    `weighting`: 'uniform', the papers' protocol, or 'gaussian': a window's scores count less towards its border, as in
    nnU-Net (Isensee et al., Nature Methods 2021), by a Gaussian with a deviation of an eighth of the patch.
    `batch_size`: windows that the network sees at a time; by default 2 on the CPU, where more are no faster, of images
    up to 2^18 pixels, and on a GPU as many as have 4 million voxels. The scores do not depend on it but for rounding.
    Beside image and scores, memory holds one batch and, at the end, the label map and what one class's scores take. Of
    a volume whose scores a GPU has no room for, image and scores stay in the computer's memory.

    `label_map`: int64 (*spatial), the class of the highest score; `score_map`: float32 (num_classes, *spatial), each
    voxel's (weighted) mean softmax over the windows that cover it; over the classes it sums to 1.
    Raises ValueError for strides or batches below 1, one class, an unknown weighting, an image of another number of
    dimensions or logits of another shape, and NotFiniteScoresError where the network gives NaN or infinity.
    """
    image, dims = np.asarray(image), len(patch_size)
    if image.ndim not in (dims, dims + 1):
        sides = "W, H, D" if dims == 3 else "H, W"
        raise ValueError(f"an image is ({sides}) or (C, {sides}), not of shape {image.shape}")
    stride_xy, stride_z = covering_strides(stride_xy, stride_z, patch_size)
    strides = (stride_xy, stride_xy, stride_z)[:dims]
    if min(strides) < 1:
        raise ValueError(f"strides are at least 1 voxel, not stride_xy={stride_xy} and stride_z={stride_z}")
    if weighting not in ("uniform", "gaussian"):
        raise ValueError(f"weighting is 'uniform' or 'gaussian', not {weighting!r}")
    if num_classes < 2:
        raise ValueError("the softmax of one class is 1 everywhere: give every class a channel, the background too")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"a batch has at least 1 window, not batch_size={batch_size}")
    image = image[None] if image.ndim == dims else image
    original = image.shape[1:]

    missing = [max(p - s, 0) for p, s in zip(patch_size, original, strict=True)]
    before = [m // 2 for m in missing]
    if any(missing):
        image = np.pad(image, [(0, 0)] + [(b, m - b) for b, m in zip(before, missing, strict=True)])

    starts, weights, totals = [], [], []
    for size, patch, stride in zip(image.shape[1:], patch_size, strides, strict=True):
        windows = math.ceil((size - patch) / stride) + 1
        starts.append([min(stride * i, size - patch) for i in range(windows)])
        gaussian = np.exp(-0.5 * ((np.arange(patch) - patch // 2) / (patch / 8)) ** 2)
        weights.append(gaussian if weighting == "gaussian" else np.ones(patch))
        totals.append(np.zeros(size))
        for start in starts[-1]:
            totals[-1][start : start + patch] += weights[-1]

    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    if batch_size is None:
        voxels = math.prod(patch_size)
        batch_size = max(1, 2**22 // voxels)
        if device.type == "cpu":
            batch_size = 2 if dims == 3 else max(2, 2**18 // voxels)

    host = place_of_scores(device, math.prod(image.shape[1:]), len(image) + 2 * num_classes + 2)

    def outer(vectors):
        # The windows are all combinations of starts, so that what holds along each axis, multiplied, holds in space.
        vectors = (torch.from_numpy(vector.astype(np.float32)).to(host) for vector in vectors)
        return functools.reduce(lambda product, vector: product[..., None] * vector, vectors)

    volume = torch.from_numpy(np.require(image, np.float32, "CW")).to(host)
    score = torch.zeros((num_classes, *image.shape[1:]), device=host)
    weight = outer(weights) if weighting == "gaussian" else None
    places = itertools.product(*starts)
    while batch := list(itertools.islice(places, batch_size)):
        windows = [(slice(None), *(slice(s, s + p) for s, p in zip(start, patch_size, strict=True))) for start in batch]
        logits = net(torch.stack([volume[window] for window in windows]).to(device))
        if logits.shape[1:] != (num_classes, *patch_size):
            wanted = (len(batch), num_classes, *patch_size)
            raise ValueError(f"the network gives {tuple(logits.shape)} for these windows, and not logits {wanted}")
        probabilities = F.softmax(logits.float(), dim=1).to(host)  # in bf16 they would not add up to 1
        if weight is not None:
            probabilities = probabilities * weight
        for window, scores_of_window in zip(windows, probabilities, strict=True):
            score[window] += scores_of_window

    if not torch.isfinite(score.sum()):
        raise NotFiniteScoresError(
            "the network gives NaN or infinity: its weights are damaged, or the image's values are far from those that "
            "it was trained on; look at both"
        )
    score /= outer(totals)
    inside = tuple(slice(b, b + s) for b, s in zip(before, original, strict=True))
    score = score[(slice(None), *inside)].contiguous()
    # On the CPU, score.argmax(dim=0) gives the same in thirty times the time.
    return score.max(dim=0).indices.cpu().numpy(), score.cpu().numpy()


def covering_strides(stride_xy, stride_z, patch_size):
    """(stride_xy, stride_z), each made no larger than the patch: between larger ones, voxels would lie in no window.

    Of a `patch_size` of two numbers `stride_z` comes back as it is."""
    return min(stride_xy, *patch_size[:2]), min([stride_z, *patch_size[2:]])


def place_of_scores(device, voxels, arrays):
    """`device` if it is the CPU or a GPU with room for so many float32 `arrays` of `voxels` each, else the CPU.

    Half of a GPU's free memory is left to the network.
    """
    if device.type != "cuda":
        return device
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    room = torch.cuda.mem_get_info(device)[0] + unused
    return device if 4 * voxels * arrays <= room / 2 else torch.device("cpu")


test_single_case.__test__ = False  # the family's name for it; not a test, whatever pytest thinks


def _pointwise(x, weight, bias):
    """What a 1x1x1 nn.Conv3d computes, as a matrix product over the channels of features in channels_last_3d."""
    return F.linear(x.permute(0, 2, 3, 4, 1), weight.flatten(1), bias).permute(0, 4, 1, 2, 3)


def optimize_for_inference(net):
    """A copy of `net` that computes the same but for rounding, faster; for evaluation only.

    Convolutions do the work of the batch normalization that follows them at once, in whose place is nn.Identity: in an
    nn.Sequential, and where a module's `folds` has the two names as a pair. On the CPU, features are in channels last,
    which its convolutions need not rearrange, and convolutions of one voxel of a volume are matrix products, at which
    the library that computes the others is slow.
    `net` must be in eval mode, else ValueError. The copy's state dict is another one; save that of `net`.
    """
    if net.training:
        raise ValueError("a network is optimized for inference in eval mode alone: call net.eval() first")
    net = copy.deepcopy(net)
    convolutions = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    for block in list(net.modules()):
        names = (
            itertools.pairwise(list(block._modules)) if type(block) is nn.Sequential else getattr(block, "folds", ())
        )
        for first, second in names:
            layer, norm = getattr(block, first), getattr(block, second)
            foldable = type(layer) in convolutions and not (layer.transposed and layer.groups > 1)
            fixed = isinstance(norm, (nn.BatchNorm2d, nn.BatchNorm3d)) and norm.running_var is not None
            if foldable and fixed and not norm.training:
                setattr(block, first, fuse_conv_bn_eval(layer, norm, transpose=layer.transposed))
                setattr(block, second, nn.Identity())
    if all(parameter.device.type == "cpu" for parameter in net.parameters()):
        layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
        for parameter in net.parameters():
            parameter.data = parameter.data.to(memory_format=layouts.get(parameter.dim(), torch.preserve_format))
        for layer in net.modules():
            if type(layer) is nn.Conv3d and {*layer.kernel_size, *layer.stride, layer.groups} == {1}:
                if layer.padding in ((0, 0, 0), "valid", "same"):
                    layer._conv_forward = _pointwise
    return net
