"""A case's scores from a network: by windows of a volume or an image, of a stack slice by slice.

`args` are the flags of a training script or of inference.py: both have what the windows depend on.
"""

import argparse

import numpy as np
import torch
from torch import nn

from mtseg.averaging import label_map
from mtseg.datasets import DataError, slice_of
from mtseg.sliding_window import test_single_case
from mtseg.transforms import resize_nearest


def is_stack(image, args):
    """Whether `image`, (*spatial) or (C, *spatial), is to be segmented slice by slice."""
    return args.dims == 2 and image.ndim - (args.n_channels > 2 * args.context + 1) == 3


def through(image, axis, args):
    """The axis of a case, counted from the last, that leads out of the plane; -3 where it is an image.

    Of a volume that is D, of a stack the spatial `axis` along which its slices follow each other."""
    return -1 if args.dims == 3 else axis - 3 if is_stack(image, args) else -3


def predict(net, image, axis, args, weighting="uniform"):
    """The score map, float32 (num_classes, *spatial), of `image`, (*spatial) or (C, *spatial), by `net` in eval mode.

    With --dims 2 a stack has three spatial axes; its slices along `axis` are segmented one by one, each in --resize
    pixels and back, with --context neighbours as channels.
    """

    def windows(part):
        size = part.shape[-args.dims :]
        part = resize_nearest(part, args.resize) if args.resize else part
        lay = (args.stride_xy, args.stride_z, args.patch_size, args.num_classes)
        _, score = test_single_case(net, part, *lay, weighting=weighting)
        return resize_nearest(score, size) if args.resize else score

    if not is_stack(image, args):
        return windows(image)
    slices = range(image.shape[axis - 3])
    return np.stack([windows(slice_of(image, k, axis, args.context)) for k in slices], axis=1 + axis)


class _Collector(nn.Module):
    """In the place of a network: keeps what it is to segment."""

    def __init__(self, classes):
        super().__init__()
        self.classes, self.windows = classes, []

    def forward(self, windows):
        self.windows.append(windows.clone())
        return windows.new_zeros(len(windows), self.classes, *windows.shape[2:])


def side_by_side(image, axis, args):
    """float (N, C, *patch_size): windows that cover `image`, with what pads it.

    They overlap as little as they can with one stride along the plane's two axes."""
    collector = _Collector(args.num_classes)
    strides = {"stride_xy": min(args.patch_size[:2]), "stride_z": args.patch_size[-1]}
    predict(collector, image, axis, argparse.Namespace(**vars(args) | strides))
    return torch.cat(collector.windows)


def label_and_prediction(net, sample, axis, args):
    """(label, prediction) of a case, {'image', 'label'}: class numbers; voxels of --ignore_index are such in both.

    `net` is in eval mode meanwhile.
    """
    training = net.training
    prediction = label_map(predict(net.eval(), sample["image"], axis, args))
    net.train(training)
    if args.ignore_index is not None:
        prediction[sample["label"] == args.ignore_index] = args.ignore_index
    return sample["label"], prediction


def counted_classes(args):
    """The numbers of the classes that metrics count: all but the background and what is to be ignored."""
    return [c for c in range(0 if args.background is None else 1, args.num_classes) if c != args.ignore_index]


def class_name(classes, number):
    """The name of a class in `classes`, args.classes, or its number where the data set names none."""
    return classes["classes"][number]["name"] if classes else number


def score_cases(net, samples, score, axis, args):
    """For each of `samples` the `score` of every counted class, a list.

    `score`: of two boolean arrays, prediction and label, a number, such as metrics.dice. Voxels with the label
    --ignore_index belong to no class in either.
    """
    scores = []
    for sample in samples:
        label, prediction = label_and_prediction(net, sample, axis, args)
        if (label == args.ignore_index).all():
            raise DataError("nobody labelled any pixel of a case of --val_list, so it has no Dice; leave it out")
        scores.append([float(score(prediction == c, label == c)) for c in counted_classes(args)])
    return scores
