"""URPC against its equations, written out once more in plain steps: the weights after some iterations."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_mc_net import PLAIN
from test_recipe import SCRIPTS, batches, run, supervised_loss, weights
from test_ua_mt_and_cps import ITERATIONS, close, descend
from torch import nn

from mtseg.networks.vnet import VNet
from mtseg.samplers import TwoStreamBatchSampler
from mtseg.seeding import seed_iteration

CONSISTENCY = 200.0  # so that the loss on unlabelled patches, after exp(-5), is no rounding


def test_urpc_computes_its_equations(data, tmp_path):
    """Of the four levels: the mean of CE + Dice by 2, the squares from their mean by e^-K, and K."""
    folder = run("URPC", data, tmp_path, max_iterations=ITERATIONS, consistency=CONSISTENCY, **PLAIN)
    seed_iteration(1337, -1)
    net = VNet(1, 2, 2, "none", has_dropout=True)
    heads = [nn.Conv3d(channels, 2, 1) for channels in (4, 8, 16)]
    parameters = [*net.parameters(), *(parameter for head in heads for parameter in head.parameters())]
    optimizer = torch.optim.SGD(parameters, lr=0.3, momentum=0.9, weight_decay=0.0001)
    sampler = TwoStreamBatchSampler(range(3), range(3, 6), 4, 2, seed=1337)
    for t, (volumes, labels) in enumerate(batches(data, sampler, ITERATIONS)):
        seed_iteration(1337, t + 1)
        x9, x8, x7, x6 = net.decode(net.encode(volumes))
        outputs = [net.out_conv(x9)]
        for head, features, share, times in zip(heads, (x8, x7, x6), (0.2, 0.3, 0.5), (2, 4, 8), strict=True):
            small = head(F.dropout3d(features, share))
            outputs.append(F.interpolate(small, scale_factor=times, mode="trilinear"))
        loss = sum(supervised_loss(output[:2], labels[:2]) for output in outputs) / 4
        p = [F.softmax(output[2:], dim=1) for output in outputs]
        m = (p[0] + p[1] + p[2] + p[3]) / 4
        for q in p:
            k = (m * (torch.log(m) - torch.log(q))).sum(1)
            e = torch.exp(-k)
            consistency = (((m - q) ** 2).sum(1) * e / 2).mean() / (e.mean() + 1e-8) + k.mean()
            loss = loss + CONSISTENCY * math.exp(-5) * consistency / 4
        descend(optimizer, loss)
    close(weights(folder, f"iter_{ITERATIONS}.pth"), net.state_dict())
    kept = torch.load(folder / "latest.pth", weights_only=True)["heads"]
    close(kept, {f"{n}.1.{name}": w for n, head in enumerate(heads) for name, w in head.state_dict().items()})


def test_certain_levels_that_contradict_each_other_have_a_finite_loss():
    outputs = [torch.tensor([[-s, s]]).view(1, 2, 1, 1).requires_grad_() for s in (300.0, -300.0, 300.0, 0.0)]
    loss, uncertainty = SCRIPTS["URPC"].pyramid_loss(outputs)
    loss.backward()
    assert uncertainty > 100 and loss.isfinite() and all(output.grad.isfinite().all() for output in outputs)


def test_deep_supervision_is_refused(data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("URPC", data, tmp_path / "runs", "--deep_supervision", network="unet")
    assert stopped.value.code == 2 and "--deep_supervision: URPC has heads" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
