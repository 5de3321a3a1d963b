"""Gradients of batches in parts and of recomputed activations are those of the plain batch."""

import copy
import itertools
import sys

import pytest
import torch
from conftest import on, only_on_the_cpu
from torch.profiler import ProfilerActivity, profile

from mtseg.losses import dice_ce_loss
from mtseg.memory import InParts, checkpoint_blocks
from mtseg.networks.unet import UNet, UNetSSL4MIS
from mtseg.networks.vnet import VNet
from mtseg.script.networks import NETWORKS


@pytest.fixture(autouse=True)
def on_every_device(device, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "step", on(device, step))


def networks(normalization):
    settings = {"n_channels": 1, "n_classes": 2, "n_filters": 4, "normalization": normalization, "has_dropout": True}
    torch.manual_seed(0)
    return VNet(**settings), UNet(**settings), UNetSSL4MIS(**settings, dims=3)


def step(net, forward, batch, labels):
    """Loss, gradients and buffers after one pass with the same dropout."""
    torch.manual_seed(1)
    net.train().zero_grad()
    loss = dice_ce_loss(forward(batch), labels)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in net.parameters()], [b.clone() for b in net.buffers()]


def sample(n):
    torch.manual_seed(2)
    return torch.randn(n, 1, 16, 32, 16), torch.randint(0, 2, (n, 16, 32, 16))


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("normalization", ["none", "groupnorm", "instancenorm"])
def test_parts_give_the_gradients_of_the_whole_batch(normalization, parts):
    batch, labels = sample(4)
    batch = batch.double()
    for net in networks(normalization):
        net.double()
        net.has_dropout = False
        net.dropout = torch.nn.Identity()
        loss, gradients, _ = step(net, net, batch, labels)
        loss_in_parts, in_parts, _ = step(net, InParts(net, parts), batch, labels)
        assert torch.allclose(loss, loss_in_parts, rtol=1e-12)
        assert all(torch.allclose(a, b, rtol=1e-7, atol=1e-12) for a, b in zip(gradients, in_parts, strict=True))


def test_parts_mix_labelled_and_unlabelled_samples_and_keep_the_order():
    seen = []

    class Recorder(torch.nn.Module):
        def forward(self, batch):
            seen.append(batch.flatten().tolist())
            return batch * 10

    batch = torch.arange(6.0).reshape(6, 1)
    with torch.no_grad():
        assert torch.equal(InParts(Recorder(), 3)(batch), batch * 10)
    assert seen == [[0, 3], [1, 4], [2, 5]]
    with torch.no_grad():
        assert all(torch.equal(InParts(Recorder(), parts)(batch), batch * 10) for parts in (4, 5, 7))
    assert seen[3:7] == [[0, 4], [1, 5], [2], [3]]


@pytest.mark.parametrize("index", [0, 1, 2])
def test_recomputed_blocks_change_nothing_but_memory(index):
    batch, labels = sample(2)
    net = networks("batchnorm")[index]
    other = checkpoint_blocks(copy.deepcopy(net))
    assert other.state_dict().keys() == net.state_dict().keys()
    plain, recomputed = step(net, net, batch, labels), step(other, other, batch, labels)
    assert torch.equal(plain[0], recomputed[0])
    for a, b in zip(plain[1] + plain[2], recomputed[1] + recomputed[2], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_recomputed_blocks_store_less(index):
    batch, labels = sample(2)
    net = networks("batchnorm")[index].train()

    def stored(forward):
        sizes = {}

        def keep(tensor):
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            dice_ce_loss(forward(batch), labels)
        return sum(sizes.values())

    plain = stored(net)
    assert stored(checkpoint_blocks(net)) < 0.5 * plain


@only_on_the_cpu
@pytest.mark.parametrize("name", ["resnet50_unet", "convnext_t_unet", "dinov2_vits14_unet", "efficientnet_b0_deeplab"])
def test_the_blocks_of_encoders_are_recomputed_one_by_one(name):
    """An encoder that is one block has all its activations back at once in the backward pass."""
    torch.manual_seed(0)
    net = NETWORKS[name](n_channels=1, n_classes=2, n_filters=16, normalization="batchnorm", has_dropout=False, dims=2)
    batch = torch.randn(2, 1, *[112 if "dinov2" in name else 128] * 2)

    def measured(net):
        """(the most bytes that one pass holds, its gradients)"""
        for parameter in net.train().parameters():
            parameter.grad = torch.zeros_like(parameter)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            net(batch).square().mean().backward()
        events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
        sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        return max(itertools.accumulate(sizes)), [parameter.grad for parameter in net.parameters()]

    plain, gradients = measured(copy.deepcopy(net))
    recomputed, same = measured(checkpoint_blocks(net))
    assert recomputed < 0.7 * plain
    assert all(map(torch.equal, gradients, same))
