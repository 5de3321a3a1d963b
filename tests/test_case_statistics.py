"""Batch norm by the statistics of a case, against NumPy's means and variances, and through inference.py."""

import argparse
import copy
import itertools

import h5py
import numpy as np
import pytest
import torch
from test_inference import SETTINGS, infer, make_run, make_scans, read
from torch import nn

from mtseg import case_statistics
from mtseg.case_statistics import with_case_statistics
from mtseg.networks.vnet import VNet
from mtseg.script import scans
from mtseg.script.windows import side_by_side
from mtseg.sliding_window import test_single_case as single_case


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("at_a_time", [2**22, 6 * 5 * 4])
def test_means_and_variances_are_mixed_layer_by_layer(monkeypatch, share, at_a_time):
    """Of a case that changes from window to window, all at once or in batches from all over it."""
    monkeypatch.setattr(case_statistics, "AT_A_TIME", at_a_time)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    learned = np.array([1.0, -2.0, 3.0])
    net[1].running_mean += torch.tensor(learned)
    net[1].running_var *= 5
    before = {name: value.clone() for name, value in net.state_dict().items()}
    windows = torch.randn(41, 3, 6, 5) * 2 + torch.arange(41).view(-1, 1, 1, 1)
    found = with_case_statistics(net, windows, share)

    values = windows.numpy().astype(float)
    mean = share * values.mean((0, 2, 3)) + (1 - share) * learned
    variance = share * values.var((0, 2, 3)) + (1 - share) * 5
    np.testing.assert_allclose(found[1].running_mean, mean, rtol=1e-5)
    np.testing.assert_allclose(found[1].running_var, variance, rtol=1e-5)
    if at_a_time == 2**22:
        normal = (values - mean[:, None, None]) / np.sqrt(variance + 1e-5)[:, None, None]
        kernel = net[2].weight.detach().numpy()[:, :, 0, 0]
        seen = np.einsum("oc,nchw->nohw", kernel, normal) + net[2].bias.detach().numpy()[:, None, None]
        np.testing.assert_allclose(found[3].running_mean, share * seen.mean((0, 2, 3)), atol=1e-5)
        np.testing.assert_allclose(found[3].running_var, share * seen.var((0, 2, 3)) + 1 - share, rtol=1e-4)
    assert not any(module.training for module in found.modules())
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    if share == 0:
        assert torch.equal(found(windows), net(windows))


def test_the_whole_network_computes_as_in_training_by_the_cases_statistics_alone():
    torch.manual_seed(0)
    net = VNet(1, 2, 2, "batchnorm", has_dropout=False).eval().requires_grad_(False)
    windows = torch.randn(8, 1, 32, 32, 32) + 3
    found, expected = with_case_statistics(net, windows, 1.0)(windows), copy.deepcopy(net).train()(windows)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
    assert (net(windows) - expected).std() > expected.std()


def test_large_activations_in_float16_have_a_variance():
    net = nn.Sequential(nn.BatchNorm2d(2)).eval()
    windows = torch.randn(4, 2, 32, 32, generator=torch.Generator().manual_seed(0)) * 400 + 3000
    found = with_case_statistics(net, windows.half(), 1.0)[0]
    torch.testing.assert_close(found.running_var, windows.transpose(0, 1).flatten(1).var(1), rtol=0.01, atol=0)


def test_a_layer_with_few_values_keeps_the_trainings_statistics():
    net = VNet(1, 2, 2, "batchnorm").eval()
    found = with_case_statistics(net, torch.randn(1, 1, 16, 16, 16), 1.0)
    assert torch.equal(found.block_five.conv[1].running_mean, net.block_five.conv[1].running_mean)  # of one voxel
    assert not torch.equal(found.block_three.conv[1].running_mean, net.block_three.conv[1].running_mean)


def test_inference_mixes_them_case_by_case_and_records_it(tmp_path):
    source = make_scans(tmp_path, 2, affine=np.eye(4), shape=(40, 20, 30))
    (weights,) = make_run(tmp_path / "run", seeds=(0,))
    flags = {"output_dir": tmp_path / "out", "stride_xy": 8, "case_statistics": 0.5}
    result = infer(weights, source, "--save_probabilities", **flags)
    assert result["protocol"]["case_statistics"] == 0.5
    net = VNet(1, 3, 2, normalization="batchnorm", has_dropout=True).eval()
    net.load_state_dict(torch.load(weights))
    for case in ("c0", "c1"):
        image = scans.prepare(read(source / f"{case}.nii.gz"), None, None, {**SETTINGS, "orientation": "file"}).image
        sides = [sorted({*range(0, side - 15, 16), side - 16}) for side in image.shape]
        cut = [image[tuple(slice(s, s + 16) for s in start)] for start in itertools.product(*sides)]
        own = with_case_statistics(net, torch.from_numpy(np.stack(cut)).float()[:, None], 0.5)
        _, score = single_case(own, image, 8, 16, (16, 16, 16), 3)
        with h5py.File(tmp_path / f"out/probabilities/{case}.h5") as file:
            found = file["probabilities"][...]
        inside = found[(slice(None), *map(slice, *box_of(found)))]
        np.testing.assert_allclose(inside, score, atol=3e-3)
        assert np.abs(inside - single_case(net, image, 8, 16, (16, 16, 16), 3)[1]).max() > 0.05
    assert "case_statistics" not in infer(weights, source, output_dir=tmp_path / "plain", stride_xy=8)["protocol"]


def box_of(scores):
    """The corners (starts, stops) of where the scores say anything but background for certain."""
    corners = np.argwhere(scores[0] < 1)
    return corners.min(0), corners.max(0) + 1


def test_a_network_without_batch_norm_ends_in_a_sentence(tmp_path, capsys):
    source = make_scans(tmp_path, 1)
    run = tmp_path / "run"
    make_run(run, normalization="groupnorm")
    torch.save(VNet(1, 3, 2, normalization="groupnorm", has_dropout=True).state_dict(), run / "w0.pth")
    infer(run / "w0.pth", source, output_dir=tmp_path / "out")
    with pytest.raises(SystemExit) as stopped:
        infer(run / "w0.pth", source, output_dir=tmp_path / "out", case_statistics=0.5)
    assert stopped.value.code == 2
    assert "w0.pth has no batch norm that keeps statistics; leave it out" in capsys.readouterr().err
    infer(run / "w0.pth", source, "--continue", output_dir=tmp_path / "out")  # nothing of the result before was lost


@pytest.mark.parametrize("axis", [0, 2])
def test_of_a_stack_all_slices_count(axis):
    stack = np.random.default_rng(0).normal(size=(6, 6, 6)).astype(np.float32)
    args = argparse.Namespace(dims=2, n_channels=1, context=0, resize=None, patch_size=[4, 6], num_classes=2)
    args.stride_xy, args.stride_z = 1, None
    slices = np.moveaxis(stack, axis, 0)
    found = side_by_side(stack, axis, args).numpy()
    np.testing.assert_array_equal(
        np.sort(found, 0), np.sort(np.concatenate([slices[:, :4], slices[:, 2:]])[:, None], 0)
    )
