import ast
import sys

import numpy as np
import pytest
import torch
from conftest import on
from reference import FAMILY, assert_digest, fill, wave_input
from scipy import ndimage, special
from torch import nn

from mtseg import sliding_window
from mtseg.networks.unet import UNet, UNetSSL4MIS
from mtseg.networks.vnet import VNet
from mtseg.sliding_window import (
    NotFiniteScoresError,
    covering_strides,
    optimize_for_inference,
    place_of_scores,
)
from mtseg.sliding_window import test_single_case as single_case


@pytest.fixture(autouse=True)
def on_every_device(device, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "single_case", on(device, single_case))


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


@pytest.mark.parametrize("shape", [(20, 9, 13), (5, 9, 6), (8, 8, 8), (37, 9), (5, 31)])
def test_a_pointwise_network_gives_its_own_softmax_whatever_the_windows(shape):
    torch.manual_seed(0)
    net = nn.Conv3d(2, 4, 1) if len(shape) == 3 else nn.Conv2d(2, 4, 1)
    image = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    stride_z = 5 if len(shape) == 3 else None
    label_map, score_map = single_case(net, image, 3, stride_z, (8, 8, 8)[: len(shape)], num_classes=4)
    weight, bias = net.weight.detach().numpy().reshape(4, 2), net.bias.detach().numpy()
    expected = special.softmax((np.tensordot(weight, image, 1).T + bias).T, axis=0)
    np.testing.assert_allclose(score_map, expected, atol=1e-6)
    np.testing.assert_array_equal(label_map, expected.argmax(axis=0))
    assert score_map.dtype == np.float32
    assert not net.weight.grad


def test_windows_lie_where_the_protocol_puts_them():
    """Starts every stride, the last one moved back to end with the volume."""
    seen, batches = [], []

    def net(x):
        seen.extend(tuple(int(v) for v in window[:, 0, 0, 0]) for window in x)
        batches.append(len(x))
        return torch.zeros(len(x), 2, *x.shape[2:])

    net.parameters = lambda: iter(())
    corners = np.stack(np.meshgrid(np.arange(11), np.arange(8), np.arange(9), indexing="ij"))
    for size, expected in ((1, [1] * 12), (5, [5, 5, 2]), (100, [12])):
        seen.clear(), batches.clear()
        single_case(net, corners, 3, 4, (4, 8, 4), batch_size=size)
        assert seen == [(x, 0, z) for x in (0, 3, 6, 7) for z in (0, 4, 5)]
        assert batches == expected


@pytest.mark.parametrize("weighting", ["uniform", "gaussian"])
@pytest.mark.parametrize("strides", [(18, 4), (100, 100), (3, 9)])
def test_strides_larger_than_the_patch_cover_every_voxel(strides, weighting):
    net = nn.Conv3d(1, 2, 1)
    image = np.random.default_rng(0).standard_normal((37, 21, 19)).astype(np.float32)
    label_map, score_map = single_case(net, image, *strides, (16, 8, 8), weighting=weighting)
    weight, bias = net.weight.detach().numpy().reshape(2, 1, 1, 1), net.bias.detach().numpy().reshape(2, 1, 1, 1)
    np.testing.assert_allclose(score_map, special.softmax(weight * image + bias, axis=0), atol=1e-6)
    np.testing.assert_array_equal(label_map, score_map.argmax(axis=0))
    assert covering_strides(*strides, (16, 8, 8)) == (min(strides[0], 8), min(strides[1], 8))


@pytest.mark.parametrize("weighting", ["uniform", "gaussian"])
def test_an_image_is_segmented_as_a_volume_of_one_slice(weighting):
    torch.manual_seed(0)
    flat, deep = nn.Conv2d(1, 3, 3, padding=1), nn.Conv3d(1, 3, (3, 3, 1), padding=(1, 1, 0))
    deep.load_state_dict({"weight": flat.weight.unsqueeze(-1), "bias": flat.bias})
    image = np.random.default_rng(0).integers(0, 255, (37, 30)).astype(np.uint8)[::-1]
    image.flags.writeable = False
    found = single_case(flat, image, 5, None, (16, 32), 3, weighting=weighting)
    expected = single_case(deep, image[..., None], 5, 1, (16, 32, 1), 3, weighting=weighting)
    np.testing.assert_allclose(found[1], expected[1][..., 0], rtol=0, atol=1e-6)
    assert found[0].shape == image.shape and (found[0] == expected[0][..., 0]).mean() > 0.999
    assert covering_strides(40, None, (16, 32)) == (16, None)


def test_in_bf16_scores_add_up_to_one():
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        _, score = single_case(nn.Conv2d(1, 4, 3, padding=1), wave_input((64, 64)).numpy(), 16, None, (32, 32), 4)
    np.testing.assert_allclose(score.sum(0), 1, rtol=0, atol=1e-5)


@pytest.mark.parametrize("damage", [float("nan"), 1e31])
def test_scores_that_are_no_numbers_are_an_error(damage):
    net = vnet()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.view(-1)[0] = damage
    with pytest.raises(NotFiniteScoresError, match="gives NaN or infinity"):
        single_case(net, wave_input((16, 16, 16)).numpy(), 8, 8, (16, 16, 16))


def test_score_maps_that_a_gpu_has_no_room_for_stay_in_the_computers_memory(monkeypatch):
    gpu, used = torch.device("cuda:0"), {"memory_reserved": 30e6, "memory_allocated": 10e6}
    for name, value in used.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60e6, 100e6))
    assert place_of_scores(gpu, 10**6, 10) == gpu  # 40 MB of the 80 that are free
    assert place_of_scores(gpu, 10**6, 11) == torch.device("cpu")
    assert place_of_scores(torch.device("cpu"), 10**12, 10) == torch.device("cpu")


def one_window_at_a_time(net, image, stride_xy, stride_z, patch, importance):
    """The family's loop, written out: scores and weights gathered in NumPy. `image` is no smaller than `patch`."""
    strides = (stride_xy, stride_xy, stride_z)
    counts = [-(-(size - p) // stride) + 1 for size, p, stride in zip(image.shape, patch, strides, strict=True)]
    score, total = np.zeros((2, *image.shape)), np.zeros(image.shape)
    for place in np.ndindex(*counts):
        start = [min(i * t, n - p) for i, t, n, p in zip(place, strides, image.shape, patch, strict=True)]
        window = tuple(slice(s, s + p) for s, p in zip(start, patch, strict=True))
        with torch.no_grad():
            probability = torch.softmax(net(torch.from_numpy(image[window])[None, None]), dim=1)[0].numpy()
        score[(slice(None), *window)] += probability * importance
        total[window] += importance
    return score / total


def gaussian_importance(patch):
    """nnU-Net's: a point in the middle of the patch, smoothed, its highest value 1."""
    point = np.zeros(patch)
    point[tuple(side // 2 for side in patch)] = 1
    smooth = ndimage.gaussian_filter(point, [side / 8 for side in patch], mode="constant")
    return smooth / smooth.max()


def vnet():
    torch.manual_seed(0)
    net = fill(VNet(1, 2, n_filters=4, normalization="batchnorm", has_dropout=True))
    return net.eval()


@pytest.mark.parametrize("weighting", ["uniform", "gaussian"])
@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_batches_and_the_optimized_network_change_nothing(weighting, batch_size):
    image = wave_input((40, 32, 35), 0.031).numpy()
    patch = (32, 32, 16)
    importance = gaussian_importance(patch) if weighting == "gaussian" else 1.0
    expected = one_window_at_a_time(vnet(), image, 6, 5, patch, importance)
    assert 0.05 < expected.argmax(axis=0).mean() < 0.95
    for net in (vnet(), optimize_for_inference(vnet())):
        label_map, score_map = single_case(net, image, 6, 5, patch, weighting=weighting, batch_size=batch_size)
        np.testing.assert_allclose(score_map, expected, rtol=0, atol=1e-5)
        certain = np.abs(expected[1] - expected[0]) > 1e-5
        np.testing.assert_array_equal(label_map[certain], expected.argmax(axis=0)[certain])
        assert score_map.flags.c_contiguous


def test_the_network_optimized_for_inference_computes_the_same_and_the_other_stays_as_it_was():
    net, x = vnet(), wave_input((2, 1, 16, 16, 16), 0.031)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fast = optimize_for_inference(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    torch.manual_seed(0)
    folded = (
        net,
        UNet(1, 3, 4, "batchnorm"),
        UNet(1, 3, 4, "batchnorm", residual=True, deep_supervision=True),
        *(kind(1, 3, 4, "batchnorm", dims=2) for kind in (VNet, UNet, UNetSSL4MIS)),
    )
    others = (
        VNet(1, 2, 4, "groupnorm"),
        nn.Sequential(
            nn.Conv3d(1, 3, 1), nn.BatchNorm3d(3), nn.Conv3d(3, 3, 1, groups=3), nn.Conv3d(3, 2, 1, padding=1)
        ),
        nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.ConvTranspose3d(4, 4, 2, groups=2), nn.BatchNorm3d(4)),
        nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4, track_running_stats=False)),
    )
    with torch.no_grad():
        for module in (*folded, *others):
            given = x[..., 0] if next(fill(module).eval().parameters()).dim() == 4 else x
            expected, fast = module(given), optimize_for_inference(module)
            assert (fast(given) - expected).abs().max() < 1e-5 * expected.abs().max()
            left = [layer for layer in fast.modules() if isinstance(layer, (nn.BatchNorm2d, nn.BatchNorm3d))]
            assert module in others or not left
    with pytest.raises(ValueError, match=r"net\.eval\(\)"):
        optimize_for_inference(net.train())


def test_bad_arguments_say_so():
    with pytest.raises(ValueError, match=r"\(W, H, D\) or \(C, W, H, D\), not of shape"):
        single_case(nn.Identity(), np.zeros((4, 4)), 1, 1, (4, 4, 4))
    with pytest.raises(ValueError, match=r"\(H, W\) or \(C, H, W\), not of shape"):
        single_case(nn.Identity(), np.zeros((4, 4, 4, 4)), 1, None, (4, 4))
    with pytest.raises(ValueError, match="at least 1 voxel, not stride_xy=0"):
        single_case(nn.Identity(), np.zeros((4, 4)), 0, None, (4, 4))
    with pytest.raises(ValueError, match="at least 1 voxel"):
        single_case(nn.Identity(), np.zeros((4, 4, 4)), 0, 1, (4, 4, 4))
    with pytest.raises(ValueError, match="'gauss'"):
        single_case(nn.Identity(), np.zeros((4, 4, 4)), 1, 1, (4, 4, 4), weighting="gauss")
    with pytest.raises(ValueError, match="the softmax of one class is 1 everywhere"):
        single_case(nn.Identity(), np.zeros((4, 4, 4)), 1, 1, (4, 4, 4), num_classes=1)
    with pytest.raises(ValueError, match="at least 1 window"):
        single_case(nn.Identity(), np.zeros((4, 4, 4)), 1, 1, (4, 4, 4), batch_size=0)
    with pytest.raises(ValueError, match=r"gives \(1, 1, 4, 4\) for these windows, and not logits \(1, 2, 4, 4\)"):
        single_case(nn.Identity(), np.zeros((4, 4)), 4, None, (4, 4))  # one logit, of which softmax makes 1


def test_it_is_no_test():
    assert sliding_window.test_single_case.__test__ is False
