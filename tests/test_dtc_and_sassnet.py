"""DTC and SASSNet against their equations, written out once more in plain steps: the weights after some iterations."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from test_recipe import batches, column, run, weights
from test_ua_mt_and_cps import close, descend
from torch import nn

from mtseg.networks.vnet import VNet
from mtseg.samplers import TwoStreamBatchSampler
from mtseg.seeding import seed_iteration

ITERATIONS = 3
CONSISTENCY = 20.0  # so that the loss on unlabelled patches, after exp(-5), is no rounding
RAMP = np.exp(-5)


def dice(p, y):
    return 1 - (2 * (p * y).sum() + 1e-5) / ((p**2).sum() + (y**2).sum() + 1e-5)


def level_set(labels):
    """T(y) of one class: by SciPy, map by map."""
    maps = []
    for inside in labels.numpy() == 1:
        depth, distance = ndimage.distance_transform_edt(inside), ndimage.distance_transform_edt(~inside)
        surface = inside & ndimage.binary_dilation(~inside)
        maps.append(
            np.where(surface, 0, distance / distance.max() - depth / depth.max()) if surface.any() else 0 * depth
        )
    return torch.from_numpy(np.stack(maps)).float()


def both_heads(net, head, volumes):
    """p and d of the network's finest features, (N, W, H, D): with two classes softmax is sigmoid(z1 - z0)."""
    features = net.decode(net.encode(volumes))[0]
    z = net.out_conv(features)
    return torch.sigmoid(z[:, 1] - z[:, 0]), torch.tanh(head(features)).squeeze(1)


def start(normalization="batchnorm"):
    seed_iteration(1337, -1)
    net = VNet(1, 2, 2, normalization, has_dropout=True)
    head = nn.Conv3d(2, 1, 1)
    optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.01, momentum=0.9, weight_decay=0.0001)
    return net, head, optimizer, TwoStreamBatchSampler(range(3), range(3, 6), 4, 2, seed=1337)


def saved(folder, name):
    return torch.load(folder / "latest.pth", weights_only=True)[name]


def test_dtc_computes_its_equations(data, tmp_path):
    """k = 20, as with 1500 hardly a voxel of an untrained network has a gradient."""
    settings = {"consistency": CONSISTENCY, "steepness": 20}
    folder = run("DTC", data, tmp_path, max_iterations=ITERATIONS, **settings)
    net, head, optimizer, sampler = start()
    for t, (volumes, labels) in enumerate(batches(data, sampler, ITERATIONS)):
        seed_iteration(1337, t + 1)
        p, d = both_heads(net, head, volumes)
        supervised = dice(p[:2], (labels[:2] == 1).float()) + 0.3 * F.mse_loss(d[:2], level_set(labels[:2]))
        consistency = ((1 / (1 + torch.exp(20 * d)) - p) ** 2).mean()
        descend(optimizer, supervised + CONSISTENCY * RAMP * consistency)
    close(weights(folder, f"iter_{ITERATIONS}.pth"), net.state_dict())
    close(saved(folder, "distance_head"), head.state_dict())


# Adam makes a step of every rounded gradient, and batch norm over four values at the bottom much of that step.
@pytest.mark.parametrize(("normalization", "iterations"), [("batchnorm", 2), ("none", 3)])
def test_sassnet_computes_its_equations(data, tmp_path, normalization, iterations):
    settings = {"consistency": CONSISTENCY, "normalization": normalization}
    folder = run("SASSNet", data, tmp_path, max_iterations=iterations, **settings)
    net, head, optimizer, sampler = start(normalization)
    D = nn.ModuleDict({"maps": nn.Conv3d(1, 64, 4, 2, 1), "image": nn.Conv3d(1, 64, 4, 2, 1)})
    layers = [nn.LeakyReLU(0.2)]
    for width in (128, 256, 512):
        layers += [nn.Dropout3d(0.5), nn.Conv3d(width // 2, width, 4, 2, 1), nn.LeakyReLU(0.2)]
    D.update({"layers": nn.Sequential(*layers), "classify": nn.Linear(512, 2)})
    adam = torch.optim.Adam(D.parameters(), lr=1e-4, betas=(0.9, 0.99))

    def is_labeled(d, x):  # the log-probabilities of no and yes
        features = D["layers"](D["maps"](d.unsqueeze(1)) + D["image"](x))
        return F.log_softmax(D["classify"](F.adaptive_avg_pool3d(features, 1).flatten(1)), dim=1)

    for t, (volumes, labels) in enumerate(batches(data, sampler, iterations)):
        seed_iteration(1337, t + 1)
        D.eval()
        p, d = both_heads(net, head, volumes)
        supervised = dice(p[:2], (labels[:2] == 1).float()) + 0.3 * F.mse_loss(d[:2], level_set(labels[:2]))
        adversarial = -is_labeled(d[2:], volumes[2:])[:, 1].mean()
        descend(optimizer, supervised + CONSISTENCY * RAMP * adversarial)
        D.train()
        net.eval()
        with torch.no_grad():
            _, d = both_heads(net, head, volumes)
        net.train()
        said = is_labeled(d, volumes)
        descend(adam, -(said[0, 1] + said[1, 1] + said[2, 0] + said[3, 0]) / 4)
    close(weights(folder, f"iter_{iterations}.pth"), net.state_dict())
    close(saved(folder, "distance_head"), head.state_dict())
    for name, value in saved(folder, "discriminator").items():
        torch.testing.assert_close(value, D.state_dict()[name], rtol=1e-4, atol=1e-5)  # a step of Adam is 1e-4


@pytest.mark.parametrize("model", ["DTC", "SASSNet"])
def test_without_weights_both_are_supervised_by_dice(data, tmp_path, model):
    """What the further losses add, they add by their weights alone, and the student is the plain network."""
    settings = {"consistency": 0, "distance_weight": 0, "max_iterations": 2, "normalization": "none"}
    folder = run(model, data, tmp_path / "a", **settings)
    assert column(folder, "loss") == column(folder, "loss_dice") == column(folder, "supervised_loss")
    assert weights(folder, "iter_2.pth").keys() == VNet(1, 2, 2, "none").state_dict().keys()


@pytest.mark.parametrize(
    ("model", "flag", "value"),
    [("DTC", "distance_weight", -1), ("SASSNet", "distance_weight", -1), ("DTC", "steepness", 0)],
)
def test_values_that_make_no_sense_are_refused(data, tmp_path, capsys, model, flag, value):
    with pytest.raises(SystemExit) as stopped:
        run(model, data, tmp_path / "runs", **{flag: value})
    assert stopped.value.code == 2 and f"--{flag}" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
