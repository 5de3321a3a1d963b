"""Winograd's convolutions beside PyTorch's own, in double precision."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mtseg import winograd
from mtseg.networks.vnet import VNet
from mtseg.sliding_window import optimize_for_inference
from mtseg.winograd import WinogradError, winograd_convolutions

try:
    winograd._library()
except WinogradError as error:
    pytest.skip(str(error), allow_module_level=True)

# Sides that tiles of four divide and sides that they do not, one slice, one voxel; enough columns for several chunks.
SHAPES = [(16, 16, 2, 8, 8, 8), (16, 32, 1, 5, 7, 9), (48, 16, 3, 4, 3, 2), (32, 32, 2, 1, 6, 5), (16, 16, 1, 1, 1, 1)]
SHAPES += [(16, 16, 4, 48, 24, 20), (64, 64, 1, 12, 12, 8)]


def close(ours, exact):
    """Equal to float32 rounding, which Winograd's transforms make about ten times as large."""
    return ours.shape == exact.shape and (ours - exact).abs().max() <= 3e-5 * exact.abs().max()


def net_of(ci, co, **how):
    torch.manual_seed(0)
    return nn.Conv3d(ci, co, 3, padding=1, **how)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_results_and_gradients_are_pytorchs(shape, memory_format, bias):
    ci, co, *size = shape
    layer = net_of(ci, co, bias=bias)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(size[0], ci, *size[1:]).to(memory_format=memory_format).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    y, exact_y = winograd_convolutions(layer)(x), exact(exact_x)
    assert close(y, exact_y) and y.is_contiguous(memory_format=torch.channels_last_3d)
    gradient = torch.randn(y.shape)
    y.backward(gradient)
    exact_y.backward(gradient.double())
    assert close(x.grad, exact_x.grad)
    for (name, ours), theirs in zip(layer.named_parameters(), exact.parameters(), strict=True):
        assert close(ours.grad, theirs.grad), name


@pytest.mark.parametrize("size", [(4, 6, 6, 4), (1, 3, 3, 2)], ids=str)
def test_the_functions_themselves(size):
    """Also where a layer would leave the work to PyTorch."""
    n, *sides = size
    x, weight, gradient = torch.randn(n, 128, *sides), torch.randn(64, 128, 3, 3, 3), torch.randn(n, 64, *sides)
    x, gradient = (tensor.contiguous(memory_format=torch.channels_last_3d) for tensor in (x, gradient))
    assert close(winograd.convolve(x, weight), F.conv3d(x.double(), weight.double(), padding=1))
    exact = nn.grad.conv3d_weight(x.double(), weight.shape, gradient.double(), padding=1)
    assert close(winograd.weight_gradient(x, gradient), exact)


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (torch.zeros(1, 16, 4, 4, 4).double(), torch.zeros(16, 16, 3, 3, 3), None),
        (torch.zeros(1, 16, 4, 4, 4), torch.zeros(16, 16, 3, 3, 3).double(), None),
        (torch.zeros(1, 16, 4, 4, 4), torch.zeros(16, 16, 3, 3, 3), torch.zeros(16).double()),
        (torch.zeros(1, 16, 4, 4, 4), torch.zeros(16, 16, 3, 3, 3), torch.zeros(8)),
        (torch.zeros(1, 16, 4, 4, 4), torch.zeros(16, 32, 3, 3, 3), None),
        (torch.zeros(1, 16, 4, 4, 4), torch.zeros(16, 16, 3, 3, 1), None),
        (torch.zeros(1, 16, 4, 4, 4), torch.zeros(24, 16, 3, 3, 3), None),
        (torch.zeros(1, 8, 4, 4, 4), torch.zeros(16, 8, 3, 3, 3), None),
        (torch.zeros(0, 16, 4, 4, 4), torch.zeros(16, 16, 3, 3, 3), None),
    ],
)
def test_what_does_not_fit_never_reaches_the_loops(monkeypatch, x, weight, bias):
    monkeypatch.setattr(winograd, "_library", None)
    with pytest.raises(ValueError, match=r"wanted|does not fit"):
        winograd.convolve(x, weight, bias)


def test_gradients_that_do_not_fit_never_reach_the_loops(monkeypatch):
    monkeypatch.setattr(winograd, "_library", None)
    x = torch.zeros(1, 16, 4, 4, 4)
    for gradient in (torch.zeros(1, 16, 4, 4, 5), torch.zeros(1, 24, 4, 4, 4), x.double(), torch.zeros(2, 16, 4, 4, 4)):
        with pytest.raises(ValueError, match="wanted"):
            winograd.weight_gradient(x, gradient)


def test_the_bits_do_not_depend_on_the_number_of_threads():
    found, threads = [], torch.get_num_threads()
    for number in (1, 3):
        torch.set_num_threads(number)
        torch.manual_seed(1)
        layer, x = winograd_convolutions(net_of(16, 32)), torch.randn(2, 16, 9, 10, 11).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        found.append([y, x.grad, layer.weight.grad])
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))


def test_a_network_keeps_its_names_and_its_copies_compute_with_their_own_weights():
    torch.manual_seed(0)
    net = VNet(1, 2, 16, "batchnorm").eval()
    plain = copy.deepcopy(net).to(memory_format=torch.channels_last_3d)
    assert winograd_convolutions(net) is net
    teacher = copy.deepcopy(net)
    assert list(teacher.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        for parameter in (*teacher.parameters(), *plain.parameters()):
            parameter.mul_(1.1)
    volume = torch.randn(2, 1, 32, 32, 32)
    assert close(teacher(volume), plain(volume)) and not close(net(volume), plain(volume))
    folded = optimize_for_inference(teacher)
    assert sum(isinstance(layer, nn.BatchNorm3d) for layer in folded.modules()) == 0
    with torch.no_grad():
        assert close(folded(volume), plain(volume))


def test_other_layers_and_other_inputs_are_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(winograd, "_call", None)
    others = [net_of(16, 16, stride=2), net_of(16, 16, groups=2), net_of(16, 16, padding_mode="reflect"), net_of(1, 16)]
    others += [nn.Conv3d(16, 16, 3), nn.Conv3d(16, 16, 1), net_of(16, 24), net_of(16, 16, dilation=1).double()]
    for layer in others:
        weight = layer.weight
        x = torch.randn(1, layer.in_channels, 4, 4, 4, dtype=weight.dtype)
        expected = layer(x)
        assert torch.allclose(winograd_convolutions(layer)(x), expected, atol=1e-6)
    layer = winograd_convolutions(net_of(16, 16))
    assert layer(torch.zeros(0, 16, 4, 4, 4)).shape == (0, 16, 4, 4, 4)
    assert layer(torch.zeros(16, 4, 4, 4)).shape == (16, 4, 4, 4)
    for wrong in (torch.zeros(1, 32, 4, 4, 4), torch.zeros(1, 16, 4, 4, 4).double()):
        with pytest.raises(RuntimeError, match=r"32|double"):
            layer(wrong)
    with pytest.raises(TypeError):  # _call, which is None here
        layer(torch.zeros(1, 16, 8, 8, 8))


def test_a_compiler_that_is_missing_or_fails_is_one_sentence(monkeypatch, tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no room left >&2\nexit 1\n")
    broken.chmod(0o755)
    for compiler, words in (("no-such-compiler", "install a C compiler"), (str(broken), "no room left")):
        monkeypatch.setenv("CC", compiler)
        winograd._library.cache_clear()
        with pytest.raises(WinogradError, match=words):
            winograd_convolutions(net_of(16, 16))
    winograd._library.cache_clear()
