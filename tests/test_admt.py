"""AD-MT against its equations, written out once more in plain steps: the weights after some iterations."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from test_recipe import SCRIPTS, batches, column, run, supervised_loss, weights
from test_ua_mt_and_cps import close, descend

from mtseg.augment import intensity_view
from mtseg.mixing import centred_boxes
from mtseg.networks.vnet import VNet
from mtseg.samplers import TwoStreamBatchSampler
from mtseg.seeding import seed_iteration

ITERATIONS, THRESHOLD, COPIES, CONSISTENCY = 3, 0.6, 1, 40.0


@torch.no_grad()
def follow(teacher, student, alpha):
    """Parameters and statistics of batch norm alike; what counts batches is copied."""
    for name, value in teacher.state_dict().items():
        new = student.state_dict()[name]
        value.copy_(alpha * value + (1 - alpha) * new if value.is_floating_point() else new)


def test_admt_computes_its_equations(data, tmp_path):
    settings = {"pseudo_threshold": THRESHOLD, "ema_copies": COPIES, "longest_turn": 1, "consistency": CONSISTENCY}
    folder = run("ADMT", data, tmp_path, max_iterations=ITERATIONS, lr_schedule="constant", **settings)
    seed_iteration(1337, -1)
    student = VNet(1, 2, 2, "batchnorm", has_dropout=True)
    teachers = [copy.deepcopy(student), copy.deepcopy(student)]
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=0.0001)
    sampler = TwoStreamBatchSampler(range(3), range(3, 6), 4, 2, seed=1337)
    shares = []
    for t, (volumes, labels) in enumerate(batches(data, sampler, ITERATIONS)):
        seed_iteration(1337, t + 1)
        w, active = volumes[2:], t % 2
        view = intensity_view(w, brightness=0.5, contrast=0.5, noise=1.0) if active == 0 else w.clone()
        box = centred_boxes(2, (16, 16, 16))
        if active == 1:
            view = view * ~box + view[[1, 0]] * box
        x_logits, w_logits, s_logits = student(torch.cat([volumes, view])).split(2)
        with torch.no_grad():
            p = [F.softmax(net.train(k == active)(w), dim=1) for k, net in enumerate(teachers)]
            H = [-(q[:, 0] * torch.log2(q[:, 0] + 1e-10) + q[:, 1] * torch.log2(q[:, 1] + 1e-10)) for q in p]
            v = torch.exp(-H[0]) / (torch.exp(-H[0]) + torch.exp(-H[1]))
            foreground = v * p[0][:, 1] + (1 - v) * p[1][:, 1]
            own = F.softmax(w_logits, dim=1)[:, 1]
            conflict = ((p[0][:, 1] > 0.5) != (p[1][:, 1] > 0.5)) & ((own > 0.5) != (foreground > 0.5))
            surer = (own - 0.5).abs() > (foreground - 0.5).abs()
            foreground = torch.where(conflict & surer, own, foreground)
            if active == 1:
                foreground = torch.where(box[:, 0], foreground[[1, 0]], foreground)
            y, sure = (foreground > 0.5).long(), torch.maximum(foreground, 1 - foreground) >= THRESHOLD
        shares.append(sure.float().mean().item())
        pseudo = F.cross_entropy(s_logits.movedim(1, -1)[sure], y[sure])
        descend(optimizer, supervised_loss(x_logits, labels[:2]) + CONSISTENCY * math.exp(-5) * pseudo)
        updates = max(t - COPIES, 0) // 2
        follow(teachers[active], student, min(1 - 1 / (updates + 1), 0.99))
    assert 0.05 < min(shares) and max(shares) < 0.95, "a mask that masks nothing shows nothing"
    torch.testing.assert_close(column(folder, "pseudo_voxels_used"), shares, rtol=1e-3, atol=1e-4)
    close(weights(folder, f"iter_{ITERATIONS}.pth"), student.state_dict())
    for prefix, teacher in zip(("ema", "teacher_two"), teachers, strict=True):
        close(weights(folder, f"{prefix}_iter_{ITERATIONS}.pth"), teacher.state_dict())


def test_the_view_of_an_image_is_blurred_as_in_the_authors_code_and_has_no_noise(data, tmp_path, monkeypatch):
    seen, script = [], SCRIPTS["ADMT"]
    monkeypatch.setattr(
        script, "intensity_view", lambda x, **words: seen.append((x, words)) or intensity_view(x, **words)
    )
    settings = {"dims": 2, "network": "unet", "patch_size": "16 16", "labelnum": 2, "longest_turn": 1}
    run("ADMT", data, tmp_path, max_iterations=2, **settings)
    ((images, words),) = seen  # in the other turn there is none
    assert words == {"brightness": 0.5, "contrast": 0.5, "blur": 2.0, "shares": (0.8, 0.2, 0)}
    for n in range(30):  # a blur and a jitter keep an image within its range, noise does not
        torch.manual_seed(n)
        view = intensity_view(images, **words)
        assert images.min() - 1e-4 <= view.min() and view.max() <= images.max() + 1e-4


def test_turns_are_drawn_from_the_seed_alone_and_go_on_in_a_longer_run():
    turns = SCRIPTS["ADMT"].turns
    turn = turns(19, 5000, seed=3)
    assert turns(19, 700, seed=3) == turn[:700] and turns(19, 5000, seed=4) != turn
    changes = [t for t in range(1, 5000) if turn[t] != turn[t - 1]]
    lengths = [b - a for a, b in zip([0, *changes[:-1]], changes, strict=True)]
    assert {*lengths} == {*range(1, 20)} and turn[0] == 0
    assert turns(1, 5, seed=0) == [0, 1, 0, 1, 0]


def test_an_unlabelled_patch_without_a_partner_is_refused(data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("ADMT", data, tmp_path / "runs", batch_size=3)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "--batch_size 3 with --labeled_bs 2" in error
    assert not (tmp_path / "runs").exists()
