"""UA-MT and CPS against their equations, written out once more in plain steps: the weights after some iterations."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from test_recipe import batches, column, run, supervised_loss, weights

from mtseg.networks.vnet import VNet
from mtseg.samplers import TwoStreamBatchSampler
from mtseg.seeding import seed_iteration

ITERATIONS = 3
CONSISTENCY = 20.0  # so that the loss on unlabelled patches, after exp(-5), is no rounding


def descend(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def close(state, expected):
    assert state.keys() == expected.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_ua_mt_computes_its_equations(data, tmp_path):
    """Equations 2 to 4 of the paper, voxel sums as in the authors' code: of squares over both classes and 2 sum m."""
    seed_iteration(1337, -1)
    student = VNet(1, 2, 2, "batchnorm", has_dropout=True)
    with torch.no_grad():  # an untrained network is certain nowhere
        student.out_conv.weight.mul_(20)
        student.out_conv.bias.copy_(torch.tensor([2.0, 0.0]))
    torch.save(student.state_dict(), tmp_path / "sharp.pth")
    settings = {"consistency": CONSISTENCY, "uncertainty_passes": 4, "pretrained": tmp_path / "sharp.pth"}
    folder = run("UAMT", data, tmp_path, max_iterations=ITERATIONS, pretrained_parts="network", **settings)

    def perturbed(volume):
        return volume + (torch.randn(volume.shape) * 0.1).clamp(-0.2, 0.2)

    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=0.0001)
    sampler = TwoStreamBatchSampler(range(3), range(3, 6), 4, 2, seed=1337)
    shares = []
    for t, (volumes, labels) in enumerate(batches(data, sampler, ITERATIONS)):
        seed_iteration(1337, t + 1)
        x = volumes[2:]
        logits = student(volumes)
        with torch.no_grad():
            q = F.softmax(teacher(perturbed(x)), dim=1)
            samples = []
            for _ in range(2):  # passes of two copies each
                samples += F.softmax(teacher(perturbed(torch.cat([x, x]))), dim=1).split(2)
        mu = sum(samples) / len(samples)
        u = -(mu[:, 0] * torch.log(mu[:, 0] + 1e-6) + mu[:, 1] * torch.log(mu[:, 1] + 1e-6))
        rise = math.exp(-5 * (1 - t / ITERATIONS) ** 2)
        m = (u < (3 / 4 + 1 / 4 * rise) * math.log(2)).float()
        shares.append(m.mean().item())
        p = F.softmax(logits[2:], dim=1)
        squares = (p[:, 0] - q[:, 0]) ** 2 + (p[:, 1] - q[:, 1]) ** 2
        consistency = (m * squares).sum() / (2 * m.sum() + 1e-16)
        weight = CONSISTENCY * math.exp(-5)
        descend(optimizer, supervised_loss(logits[:2], labels[:2]) + weight * consistency)
        alpha = min(1 - 1 / (t + 1), 0.99)
        for average, parameter in zip(teacher.parameters(), student.parameters(), strict=True):
            average.copy_(alpha * average + (1 - alpha) * parameter.detach())
    assert 0.1 < min(shares) and max(shares) < 0.9, "a mask that masks nothing shows nothing"
    torch.testing.assert_close(column(folder, "compared_share"), shares, rtol=1e-3, atol=1e-4)
    close(weights(folder, f"iter_{ITERATIONS}.pth"), student.state_dict())
    close(weights(folder, f"ema_iter_{ITERATIONS}.pth"), teacher.state_dict())


def test_cps_computes_its_equations(data, tmp_path):
    """Equations 1 to 4 of the paper: each network's cross-entropy with the other's one-hot argmax, unlabelled only."""
    folder = run("CPS", data, tmp_path, max_iterations=ITERATIONS, consistency=CONSISTENCY)
    seed_iteration(1337, -1)
    networks = [VNet(1, 2, 2, "batchnorm", has_dropout=True) for _ in range(2)]
    weights_of = [parameter for net in networks for parameter in net.parameters()]
    optimizer = torch.optim.SGD(weights_of, lr=0.01, momentum=0.9, weight_decay=0.0001)
    sampler = TwoStreamBatchSampler(range(3), range(3, 6), 4, 2, seed=1337)
    for t, (volumes, labels) in enumerate(batches(data, sampler, ITERATIONS)):
        seed_iteration(1337, t + 1)
        f, g = (net(volumes) for net in networks)
        supervised = supervised_loss(f[:2], labels[:2]) + supervised_loss(g[:2], labels[:2])

        def cross(of, by):
            one_hot = (by.detach()[:, 1] > by.detach()[:, 0]).float()
            log_p = F.log_softmax(of, dim=1)
            return -(one_hot * log_p[:, 1] + (1 - one_hot) * log_p[:, 0]).mean()

        cps = cross(f[2:], g[2:]) + cross(g[2:], f[2:])
        descend(optimizer, supervised + CONSISTENCY * math.exp(-5) * cps)
    close(weights(folder, f"iter_{ITERATIONS}.pth"), networks[0].state_dict())
    close(weights(folder, f"second_iter_{ITERATIONS}.pth"), networks[1].state_dict())
    assert any(not torch.equal(a, b) for a, b in zip(*(net.parameters() for net in networks), strict=True))


def test_two_networks_do_not_start_from_the_same_weights(data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("CPS", data, tmp_path / "runs", pretrained=tmp_path / "any.pth")
    assert stopped.value.code == 2 and "--pretrained: both networks" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
