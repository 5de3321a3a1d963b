"""Signed distance maps against SciPy's distances and closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from mtseg.distances import WithDistances, signed_distances, squared_distances
from mtseg.networks import NETWORKS


def blobs(shape, classes, seed):
    noise = np.random.default_rng(seed).standard_normal((2, *shape))
    smooth = np.stack([ndimage.gaussian_filter(one, 3) for one in noise])
    return np.digitize(smooth, np.quantile(smooth, np.linspace(0.6, 1, classes)[:-1]))


@pytest.mark.parametrize("shape", [(21, 17), (15, 12, 9), (1, 6, 5)])
def test_distances_are_scipys(shape, device):
    inside = blobs(shape, 2, seed=len(shape)) > 0
    expected = np.stack([ndimage.distance_transform_edt(one) for one in inside])
    squared = squared_distances(torch.from_numpy(inside).unsqueeze(1).to(device)).squeeze(1).cpu()
    assert torch.equal(squared, torch.from_numpy(expected**2).round().float())  # squares are whole numbers: exact


@pytest.mark.parametrize("shape", [(24, 20), (14, 12, 10)])
def test_each_class_has_its_map_in_the_authors_scaling(shape, device):
    labels = blobs(shape, 4, seed=0)
    maps = signed_distances(torch.from_numpy(labels).to(device), 4).cpu()
    assert maps.shape == (2, 3, *shape) and maps.dtype == torch.float32
    for label, of_label in zip(labels, maps.numpy(), strict=True):
        for number, signed in enumerate(of_label, start=1):
            mask = label == number
            depth, distance = ndimage.distance_transform_edt(mask), ndimage.distance_transform_edt(~mask)
            surface = mask & ndimage.binary_dilation(~mask)
            expected = distance / distance.max() - depth / depth.max()
            np.testing.assert_allclose(signed, np.where(surface, 0, expected), atol=1e-6)


def test_a_half_space_gives_two_straight_lines(device):
    labels = torch.zeros(1, 10, 4, 4, dtype=torch.int64, device=device)
    labels[:, 6:] = 1  # depths 1, 2, 3, 4; the first is the surface
    line = [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0, -2 / 4, -3 / 4, -1]
    maps = signed_distances(labels, 2)
    torch.testing.assert_close(maps, torch.tensor(line, device=device).view(1, 1, 10, 1, 1).expand_as(maps))


def test_what_has_no_surface_is_0_and_a_thin_class_has_no_inside(device):
    labels = torch.zeros(3, 8, 8, dtype=torch.int64, device=device)
    labels[1] = 1
    labels[2, 3] = 1
    maps = signed_distances(labels, 3)
    assert (maps[:2] == 0).all() and (maps[2, 1] == 0).all()
    assert (maps[2, 0, 3] == 0).all() and (maps[2, 0].amin(), maps[2, 0].amax()) == (0, 1)


def test_a_voxel_without_a_label_is_neither_inside_nor_outside(device):
    labels = torch.zeros(2, 9, 9, 6, dtype=torch.int64, device=device)
    labels[0, 1:8, 1:8], labels[1, 2:5, 3:9, 1:] = 1, 2
    maps = signed_distances(labels, 3)
    padded = torch.nn.functional.pad(labels, (5, 5), value=255)  # the first object reaches its border
    of_padded = signed_distances(padded, 3)
    assert torch.equal(of_padded[..., 5:-5], maps) and (of_padded[..., :5] == 0).all()
    labels[:, 4, 4, 3] = 255  # amid the first object: no surface is there
    line = torch.tensor([0.5**0.5, 0, -2 / 4, -3 / 4, 0, -3 / 4, -2 / 4, 0, 0.5**0.5], device=device)
    torch.testing.assert_close(signed_distances(labels, 3)[0, 0, 4, :, 3], line)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_head_leaves_the_network_what_it_is(network, dims, device):
    net = NETWORKS[network](n_channels=1, n_classes=3, n_filters=2, has_dropout=True, dims=dims).to(device)
    two_headed = WithDistances(net, 3, dims).to(device).eval()
    batch = torch.randn(2, 1, *[16] * dims, device=device)
    logits, distances = two_headed(batch)
    torch.testing.assert_close(logits, net(batch))
    features = net.decode(net.encode(batch))[0]
    slopes = torch.einsum("nc...,mc->nm...", features, two_headed.head.weight.flatten(1))
    slopes = slopes + two_headed.head.bias.view(-1, *[1] * dims)
    torch.testing.assert_close(distances, torch.tanh(slopes), atol=1e-5, rtol=1e-4)
    assert distances.shape == (2, 2, *[16] * dims) and distances.abs().max() < 1
    assert not any(math.isnan(value) for value in distances.flatten().tolist())
