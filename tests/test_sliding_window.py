import ast

import numpy as np
import pytest
import torch
from reference import FAMILY, assert_digest, fill, wave_input
from scipy import special
from torch import nn

from mtseg.sliding_window import test_single_case as single_case


class ReferenceNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.Conv3d(1, 3, 3, padding=1)
        self.d = nn.Conv3d(3, 2, 5, padding=2)

    def forward(self, x):
        return self.d(torch.relu(self.c(x))) * 3


@pytest.mark.parametrize("key", FAMILY["sliding_window"]["values"])
def test_the_familys_values(key):
    shape, patch, stride_xy, stride_z = (ast.literal_eval(part) for part in key.split("|"))
    image = wave_input(shape, 0.031).numpy()
    label_map, score_map = single_case(fill(ReferenceNet()), image, stride_xy, stride_z, patch)
    expected = FAMILY["sliding_window"]["values"][key]
    assert label_map.sum() == expected["label_sum"]
    assert list(label_map.shape) == expected["shape"]
    assert_digest(score_map, expected["score"])


@pytest.mark.parametrize("shape", [(20, 9, 13), (5, 9, 6), (8, 8, 8)])
def test_a_pointwise_network_gives_its_own_softmax_whatever_the_windows(shape):
    torch.manual_seed(0)
    net = nn.Conv3d(2, 4, 1)
    image = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    label_map, score_map = single_case(net, image, 3, 5, (8, 8, 8), num_classes=4)
    weight, bias = net.weight.detach().numpy()[..., 0, 0, 0], net.bias.detach().numpy()
    expected = special.softmax(np.einsum("oc,cwhd->owhd", weight, image) + bias[:, None, None, None], axis=0)
    np.testing.assert_allclose(score_map, expected, atol=1e-6)
    np.testing.assert_array_equal(label_map, expected.argmax(axis=0))
    assert score_map.dtype == np.float32
    assert not net.weight.grad


def test_windows_lie_where_the_protocol_puts_them():
    """Starts every stride, the last one moved back to end with the volume."""
    seen = []

    def net(x):
        seen.append(tuple(int(v) for v in x[0, :, 0, 0, 0]))
        return torch.zeros(1, 2, *x.shape[2:])

    net.parameters = lambda: iter(())
    corners = np.stack(np.meshgrid(np.arange(11), np.arange(8), np.arange(9), indexing="ij"))
    single_case(net, corners, 3, 4, (4, 8, 4))
    assert seen == [(x, 0, z) for x in (0, 3, 6, 7) for z in (0, 4, 5)]


def test_bad_arguments_say_so():
    with pytest.raises(ValueError, match="not of shape"):
        single_case(nn.Identity(), np.zeros((4, 4)), 1, 1, (4, 4, 4))
    with pytest.raises(ValueError, match="at least 1 voxel"):
        single_case(nn.Identity(), np.zeros((4, 4, 4)), 0, 1, (4, 4, 4))


def test_it_is_no_test():
    assert single_case.__test__ is False
