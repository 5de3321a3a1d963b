"""SS-Net against its equations, written out once more in plain steps: the weights after some iterations."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_recipe import batches, column, run, weights
from test_ua_mt_and_cps import CONSISTENCY, ITERATIONS, close, descend
from torch import nn

from mtseg.networks.vnet import VNet
from mtseg.samplers import TwoStreamBatchSampler
from mtseg.seeding import seed_iteration


def perceptron(channels, out, activation):
    return nn.Sequential(nn.Linear(channels, 32), nn.BatchNorm1d(32), activation, nn.Linear(32, out))


def dice(p, q):
    return 1 - (2 * (p * q).sum() + 1e-8) / (p.sum() + q.sum() + 1e-8)


@pytest.mark.parametrize("best", [False, True])
def test_ss_net_computes_its_equations(data, tmp_path, best):
    """Without normalization, which amplifies rounding over so few values at the bottom of small patches."""
    seed_iteration(1337, -1)
    net = VNet(1, 2, 4, "none", has_dropout=True)
    with torch.no_grad():  # foreground is where the features are large
        net.out_conv.weight.copy_(torch.tensor([0.0, 20.0]).view(2, 1, 1, 1, 1))
        net.out_conv.bias.copy_(torch.tensor([2.0, 0.0]))
    torch.save(net.state_dict(), tmp_path / "both.pth")
    heads = nn.ModuleList([perceptron(4, 32, nn.ReLU()), perceptron(32, 32, nn.ReLU())])
    heads.extend([perceptron(32, 1, nn.LeakyReLU(0.2)) for _ in range(2)])
    projection, prediction, selector, memory_selector = heads
    settings = {"n_filters": 4, "consistency": CONSISTENCY, "normalization": "none"}
    settings |= {"pretrained": tmp_path / "both.pth", "pretrained_parts": "network", "max_iterations": ITERATIONS}
    switches = ["--best_prototypes"] if best else []
    folder = run("SSNet", data, tmp_path, *switches, **settings)
    optimizer = torch.optim.SGD([*net.parameters(), *heads.parameters()], lr=0.01, momentum=0.9, weight_decay=0.0001)

    def forward(x):
        x9 = net.decode(net.encode(x))[0]
        return net.out_conv(x9), x9.permute(0, 2, 3, 4, 1).reshape(len(x), -1, 4)

    def separation(vectors, labels, memory):
        g = prediction(projection(vectors))[labels == 1]
        a, b = torch.sigmoid(selector(g.detach())), torch.sigmoid(memory_selector(memory))
        a, b = len(g) * a / a.sum(), len(memory) * b / b.sum()
        distances = 1 - F.cosine_similarity(g[:, None], memory[None], dim=2)
        return (distances * a * b.T).mean() / 2  # of two classes, of which the background counts 0

    sampler, class_losses = TwoStreamBatchSampler(range(3), range(3, 6), 4, 2, seed=1337), []
    for t, (volumes, labels) in enumerate(batches(data, sampler, ITERATIONS)):
        seed_iteration(1337, t + 1)
        logits, e = forward(volumes)
        with torch.no_grad():
            p0 = F.softmax(forward(volumes)[0], dim=1)
        d = torch.rand_like(volumes) - 0.5
        d = (d / d.square().sum((1, 2, 3, 4), keepdim=True).sqrt()).requires_grad_()
        (g,) = torch.autograd.grad(dice(F.softmax(forward(volumes + 10 * d)[0], dim=1), p0), d)
        r = 10 * g / g.square().sum((1, 2, 3, 4), keepdim=True).add(1e-24).sqrt()
        smooth = dice(F.softmax(forward(volumes + r)[0], dim=1), p0)

        truth, called = labels[:2].flatten(), logits.argmax(1).flatten(1)
        labeled = e[:2].flatten(0, 1)
        with torch.no_grad():
            heads.eval()
            m = projection(labeled[(called[:2].flatten() == truth) & (truth == 1)])
            m = m[torch.sigmoid(selector(m))[:, 0].argsort(descending=best)[:32]]
            heads.train()
        assert len(m) == 32
        classes = separation(labeled, truth, m) + separation(e[2:].flatten(0, 1), called[2:].flatten(), m)
        class_losses.append(classes.item())
        supervised = dice(F.softmax(logits[:2], dim=1)[:, 1], (labels[:2] == 1).float())
        descend(optimizer, supervised + CONSISTENCY * math.exp(-5) * (smooth + 0.1 * classes))
    torch.testing.assert_close(column(folder, "class_loss"), class_losses, rtol=1e-4, atol=1e-5)
    close(weights(folder, f"iter_{ITERATIONS}.pth"), net.state_dict())
    kept = dict(zip(heads.state_dict(), weights(folder, "latest.pth")["heads"].values(), strict=True))
    close(kept, heads.state_dict())


def test_perturbed_passes_leave_no_trace_in_running_statistics(data, tmp_path):
    state = weights(run("SSNet", data, tmp_path, max_iterations=1), "iter_1.pth")
    assert state["block_nine.conv.1.num_batches_tracked"] == 2  # the pass that learns, and the clean one


@pytest.mark.parametrize("flag", ["prototypes", "prototype_voxels"])
def test_one_vector_is_too_few(data, tmp_path, capsys, flag):
    with pytest.raises(SystemExit) as stopped:
        run("SSNet", data, tmp_path / "runs", **{flag: 1})
    assert stopped.value.code == 2 and f"--{flag}" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
