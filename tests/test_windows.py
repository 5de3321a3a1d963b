"""A case's scores by windows: volumes, images, and stacks slice by slice."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from mtseg.metrics import dice
from mtseg.script.windows import predict, score_cases


def settings(dims, **more):
    common = {"dims": dims, "patch_size": [16] * dims, "stride_xy": 8, "stride_z": 8, "num_classes": 2, "n_channels": 1}
    return SimpleNamespace(**{**common, "resize": None, "context": 0, "background": 0, "ignore_index": None, **more})


def bright_or_dark():
    """A network that takes for class 1 what is brighter than 1/2."""
    net = nn.Conv3d(1, 2, 1)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1, 1))
        net.bias.copy_(torch.tensor([1.0, 0.0]))
    return net


def test_validation_leaves_out_the_voxels_that_are_to_be_ignored():
    label = np.zeros((16, 16, 16), np.uint8)
    label[:8] = 1
    image = label.astype(np.float32)
    image[:, :4] = 1 - image[:, :4]  # is segmented wrongly
    ignored = label.copy()
    ignored[:, :4] = 255
    case = bright_or_dark(), [{"image": image, "label": ignored}], dice, 2
    assert score_cases(*case, settings(3, ignore_index=255)) == [[1.0]]
    assert score_cases(*case, settings(3)) == [[pytest.approx(2 * 12 / (12 + 4 + 12))]]


def test_without_a_background_every_class_is_scored():
    label = np.zeros((16, 16, 16), np.uint8)
    label[:4] = 1
    samples = [{"image": np.float32(label), "label": np.roll(label, 2, axis=0)}]
    zero, one = 2 * 10 / (12 + 12), 2 * 2 / (4 + 4)
    scores = score_cases(bright_or_dark(), samples, dice, 2, settings(3, background=None))
    assert scores == [[pytest.approx(zero), pytest.approx(one)]]


class Sum(nn.Module):
    """Logits of class 1 are the weighted sum of the channels; records the shapes it is given."""

    def __init__(self, weights):
        super().__init__()
        self.weight, self.shapes = nn.Parameter(torch.tensor(weights)), []

    def forward(self, x):
        self.shapes.append(tuple(x.shape))
        one = (x * self.weight.view(1, -1, 1, 1)).sum(dim=1, keepdim=True)
        return torch.cat([torch.zeros_like(one), one], dim=1)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_stack_is_segmented_slice_by_slice_with_its_neighbours(axis, channels):
    rng = np.random.default_rng(0)
    shape = np.insert([20, 18], axis, 5)
    stack = rng.standard_normal((channels, *shape)).astype(np.float32)
    image = stack if channels > 1 else stack[0]
    weights = rng.standard_normal(3 * channels).astype(np.float32)
    args = settings(2, context=1, n_channels=3 * channels)
    found = predict(Sum(weights.tolist()), image, axis, args)
    # The weighted sum over the neighbours is a correlation along the axis; the outermost slice stands for those beyond.
    logit = sum(
        ndimage.correlate1d(stack[c], weights[c::channels].astype(float), axis=axis, mode="nearest")
        for c in range(channels)
    )
    np.testing.assert_allclose(found[1], 1 / (1 + np.exp(-logit)), atol=1e-5)
    assert found.shape == (2, *shape)


def test_slices_are_resized_as_the_network_takes_them_and_back():
    stack = np.random.default_rng(1).standard_normal((3, 24, 20)).astype(np.float32)
    net = Sum([1.0])
    found = predict(net, stack, 0, settings(2, resize=[32, 16], patch_size=[32, 16]))
    assert {shape[2:] for shape in net.shapes} == {(32, 16)}
    there = [ndimage.zoom(part, (32 / 24, 16 / 20), order=0) for part in stack]
    back = [ndimage.zoom(part, (24 / 32, 20 / 16), order=0) for part in there]
    np.testing.assert_allclose(found[1], 1 / (1 + np.exp(-np.stack(back))), atol=1e-6)
