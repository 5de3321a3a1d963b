"""ICT against its equations, written out once more in plain steps; wrong flags."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from test_recipe import batches, run, supervised_loss, weights
from test_ua_mt_and_cps import ITERATIONS, close, descend

from mtseg.networks.vnet import VNet
from mtseg.samplers import TwoStreamBatchSampler
from mtseg.seeding import seed_iteration

CONSISTENCY = 3e4  # so that the loss on unlabelled patches is no rounding


@pytest.mark.parametrize(("batch_size", "labeled_bs"), [(4, 2), (5, 1)])
def test_ict_computes_its_equations(data, tmp_path, batch_size, labeled_bs):
    """One pair, or two of which each has its own lambda."""
    # Without normalization: batch norm over the few values at the bottom would amplify rounding.
    settings = {"batch_size": batch_size, "labeled_bs": labeled_bs, "labelnum": 2, "normalization": "none"}
    settings |= {"max_iterations": ITERATIONS, "consistency": CONSISTENCY, "mix_alpha": 0.5}
    folder = run("ICT", data, tmp_path, **settings)
    seed_iteration(1337, -1)
    student = VNet(1, 2, 2, "none", has_dropout=True)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=0.0001)
    sampler = TwoStreamBatchSampler(range(2), range(2, 6), batch_size, batch_size - labeled_bs, seed=1337)
    pairs = (batch_size - labeled_bs) // 2
    for t, (volumes, labels) in enumerate(batches(data, sampler, ITERATIONS)):
        seed_iteration(1337, t + 1)
        lam = torch.distributions.Beta(0.5, 0.5).sample((pairs,)).tolist()
        u, v = volumes[labeled_bs : labeled_bs + pairs], volumes[labeled_bs + pairs :]
        mixed = torch.stack([lam[n] * u[n] + (1 - lam[n]) * v[n] for n in range(pairs)])
        logits = student(torch.cat([volumes[:labeled_bs], mixed]))
        q = F.softmax(teacher(torch.cat([u, v])), dim=1)
        p = F.softmax(logits[labeled_bs:], dim=1)
        squares = [(p[n] - lam[n] * q[n] - (1 - lam[n]) * q[pairs + n]) ** 2 for n in range(pairs)]
        weight = CONSISTENCY * math.exp(-5)
        supervised = supervised_loss(logits[:labeled_bs], labels[:labeled_bs])
        descend(optimizer, supervised + weight * torch.stack(squares).mean())
        alpha = min(1 - 1 / (t + 1), 0.99)
        for average, parameter in zip(teacher.parameters(), student.parameters(), strict=True):
            average.copy_(alpha * average + (1 - alpha) * parameter.detach())
    close(weights(folder, f"iter_{ITERATIONS}.pth"), student.state_dict())
    close(weights(folder, f"ema_iter_{ITERATIONS}.pth"), teacher.state_dict())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labeled_bs": 3}, ["--batch_size 4", "--labeled_bs 3", "taken in pairs", "not 1"]),
        ({"labeled_bs": 4}, ["--batch_size 4", "--labeled_bs 4"]),
        ({"mix_alpha": 0}, ["--mix_alpha 0", "above 0"]),
        (  # six patches in four parts: two of them pass by themselves
            {"normalization": "batchnorm", "labeled_bs": 4, "batch_size": 8, "accumulation_steps": 4},
            ["--patch_size 16 16 16", "1 patches"],
        ),
    ],
)
def test_wrong_flags_end_in_a_sentence(data, tmp_path, capsys, changes, words):
    with pytest.raises(SystemExit) as stopped:
        run("ICT", data, tmp_path / "runs", **changes)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("error: ") == 1 and all(word in said for word in words)
    assert not (tmp_path / "runs").exists()
