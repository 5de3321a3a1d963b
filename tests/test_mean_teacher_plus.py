"""Mean Teacher plus against its equations, written out once more in plain steps; and it begins as Mean Teacher."""

import copy

import pytest
import torch
from scipy import ndimage
from test_recipe import batches, run, same, supervised_loss, weights
from test_ua_mt_and_cps import close, descend

from mtseg.networks.vnet import VNet
from mtseg.samplers import TwoStreamBatchSampler
from mtseg.seeding import seed_iteration

CONSISTENCY, ITERATIONS = 50.0, 4


@pytest.mark.parametrize("words", [(), ("--ignore_padding",)], ids=" ".join)
def test_with_nothing_of_it_it_is_mean_teacher_to_the_bit(data, tmp_path, words):
    settings = {"consistency": CONSISTENCY, "patch_size": "32 32 16" if words else "16 16 16"}
    one, other = (run(model, data, tmp_path, *words, **settings) for model in ("MT", "MTplus"))
    for name in ("iter_4.pth", "ema_iter_4.pth"):
        assert same(weights(one, name), weights(other, name))


@pytest.mark.parametrize(
    ("words", "needed"), [(["--mask_ratio", "0.5"], "--paste"), (["--largest_component"], "--targets hard")]
)
def test_a_flag_that_would_change_nothing_is_refused(data, tmp_path, capsys, words, needed):
    with pytest.raises(SystemExit) as ended:
        run("MTplus", data, tmp_path / "runs", *words)
    assert ended.value.code == 2 and f"{words[0]} without {needed} changes nothing" in capsys.readouterr().err


@pytest.mark.parametrize("targets", ["hard", "soft"])
def test_it_computes_its_equations(data, tmp_path, targets):
    seed_iteration(1337, -1)
    student = VNet(1, 2, 2, "none", has_dropout=True)
    with torch.no_grad():  # so that both classes are found
        student.out_conv.weight.mul_(20)
        student.out_conv.bias.zero_()
    torch.save(student.state_dict(), tmp_path / "sharp.pth")
    settings = {"consistency": CONSISTENCY, "pretrained": tmp_path / "sharp.pth", "pretrained_parts": "network"}
    settings |= {"max_iterations": ITERATIONS, "targets": targets, "normalization": "none"}
    folder = run("MTplus", data, tmp_path, "--paste", "--second_teacher", **settings)

    teachers = [copy.deepcopy(student).requires_grad_(False) for _ in range(2)]
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=0.0001)
    sampler = TwoStreamBatchSampler(range(3), range(3, 6), 4, 2, seed=1337)
    weight = CONSISTENCY * torch.exp(torch.tensor(-5.0))  # the ramp's beginning
    for t, (x, y) in enumerate(batches(data, sampler, ITERATIONS)):
        seed_iteration(1337, t + 1)
        noise = (torch.randn(2, 1, 16, 16, 16) * 0.1).clamp(-0.2, 0.2)
        i, j, k = (int(torch.randint(16 - 10 + 1, ())) for _ in range(3))
        box = torch.zeros(16, 16, 16)
        box[i : i + 10, j : j + 10, k : k + 10] = 1
        pasted = torch.stack([box, 1 - box])  # a labelled box in the one, an unlabelled one in the other
        mixed = pasted[:, None] * x[:2] + (1 - pasted[:, None]) * x[2:]
        logits = student(torch.cat([x[:2], mixed]))
        p = sum(teacher(x[2:] + noise).softmax(1) for teacher in teachers) / 2
        if targets == "hard":
            q = (p[:, 1] > p[:, 0]).long()
            for sample in q:
                pieces, _ = ndimage.label(sample, torch.ones(3, 3, 3))
                largest = max(range(1, pieces.max() + 1), key=lambda n: (pieces == n).sum(), default=1)
                sample.copy_(torch.from_numpy(pieces == largest))
            distance = supervised_loss(logits[2:], (pasted * y[:2] + (1 - pasted) * q).long())
        else:
            known = torch.stack([y[:2] == 0, y[:2] == 1], dim=1).float()
            wanted = pasted[:, None] * known + (1 - pasted[:, None]) * p
            distance = (logits[2:].softmax(1) - wanted).square().mean()
        descend(optimizer, supervised_loss(logits[:2], y[:2]) + weight * distance)
        step = t // 2
        alpha = min(1 - 1 / (step + 1), 0.99)
        for average, parameter in zip(teachers[t % 2].parameters(), student.parameters(), strict=True):
            average.copy_(alpha * average + (1 - alpha) * parameter.detach())
    close(weights(folder, f"iter_{ITERATIONS}.pth"), student.state_dict())
    close(weights(folder, f"ema_iter_{ITERATIONS}.pth"), teachers[0].state_dict())
    close(weights(folder, f"teacher_two_iter_{ITERATIONS}.pth"), teachers[1].state_dict())
