"""MC-Net and MC-Net+ against their equations, written out once more in plain steps: weights after some iterations."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_recipe import batches, run, weights
from test_ua_mt_and_cps import ITERATIONS, close, descend

from mtseg.networks.vnet import VNet
from mtseg.samplers import TwoStreamBatchSampler
from mtseg.seeding import seed_iteration

CONSISTENCY = 50.0  # so that the loss on unlabelled patches, after exp(-5), is no rounding
# Batch norm over the four values at the bottom would amplify what is rounded otherwise.
PLAIN = {"normalization": "none", "base_lr": 0.3}


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("decoders", [2, 3])
def test_mc_net_computes_its_equations(data, tmp_path, decoders, detach):
    """Half the Dice without squares of every decoder, and the squares between each and the others sharpened, with T."""
    switches = ["--detach_targets"] if detach else []
    settings = {"consistency": CONSISTENCY, "decoders": decoders, "temperature": 0.2, **PLAIN}
    folder = run("MCNet", data, tmp_path, *switches, max_iterations=ITERATIONS, **settings)

    seed_iteration(1337, -1)
    first = VNet(1, 2, 2, "none", has_dropout=True)
    nets = [first, *(first.another_decoder(how) for how in ("linear", "nearest")[: decoders - 1])]
    parameters = [parameter for net in nets for parameter in net.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.3, momentum=0.9, weight_decay=0.0001)
    sampler = TwoStreamBatchSampler(range(3), range(3, 6), 4, 2, seed=1337)
    for t, (volumes, labels) in enumerate(batches(data, sampler, ITERATIONS)):
        seed_iteration(1337, t + 1)
        features, loss, p, s = first.encode(volumes), 0, [], []
        for net in nets:
            p.append(F.softmax(net.classify(net.decode(features)), dim=1))
            foreground, y = p[-1][:2, 1], labels[:2].float()
            loss = loss + 0.5 * (1 - 2 * (foreground * y).sum() / (foreground.sum() + y.sum()))
            powers = p[-1] ** 5
            s.append(powers / (powers + (1 - p[-1]) ** 5))
        for i in range(decoders):
            for j in range(decoders):
                if i != j:
                    target = s[j].detach() if detach else s[j]
                    loss = loss + CONSISTENCY * math.exp(-5) * ((p[i] - target) ** 2).mean()
        descend(optimizer, loss)
    close(weights(folder, f"iter_{ITERATIONS}.pth"), first.state_dict())
    kept = torch.load(folder / "latest.pth", weights_only=True)["decoders"]  # under MC-Net's names
    close(kept, {f"decoder{n}.{name}": w for n, net in enumerate(nets[1:], 2) for name, w in net.state_dict().items()})


def test_deep_supervision_is_refused(data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("MCNet", data, tmp_path / "runs", "--deep_supervision", network="unet")
    assert stopped.value.code == 2 and "--deep_supervision: the decoders of MC-Net" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
