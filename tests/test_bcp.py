"""BCP against its equations, written out once more in plain steps; its phases; weights of others; wrong flags."""

import copy

import pytest
import torch
from scipy import ndimage
from test_recipe import batches, column, run, same, weights
from test_ua_mt_and_cps import close, descend

from mtseg.networks.vnet import VNet
from mtseg.samplers import TwoStreamBatchSampler
from mtseg.seeding import seed_iteration

LABELS_ONLY, ITERATIONS = 1, 3


def masked_loss(logits, y, m):
    """(CE + Dice) / 2 of one patch where the mask is 1, both classes' Dice, sums as in the authors' code."""
    p, dice = logits.softmax(0), 0
    for c in range(2):
        of_class = (y == c).float()
        dice += 1 - (2 * (m * p[c] * of_class).sum() + 1e-5) / ((m * p[c]).sum() + (m * of_class).sum() + 1e-5)
    ce = -(m * ((y == 0) * logits.log_softmax(0)[0] + (y == 1) * logits.log_softmax(0)[1])).sum() / m.sum()
    return 0.5 * (ce + dice / 2)


@pytest.mark.parametrize("cleaned", [True, False])
def test_bcp_computes_its_equations(data, tmp_path, cleaned):
    seed_iteration(1337, -1)
    student = VNet(1, 2, 2, "none", has_dropout=True)
    with torch.no_grad():  # so that both classes are found
        student.out_conv.weight.mul_(20)
        student.out_conv.bias.zero_()
    torch.save(student.state_dict(), tmp_path / "sharp.pth")
    settings = {"max_iterations": ITERATIONS, "consistency_warmup": LABELS_ONLY, "normalization": "none"}
    switches = ["--pretrained", str(tmp_path / "sharp.pth"), *([] if cleaned else ["--no-largest_component"])]
    folder = run("BCP", data, tmp_path, *switches, **settings)

    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=0.0001)
    sampler, taken_away = TwoStreamBatchSampler(range(3), range(3, 6), 4, 2, seed=1337), 0
    for t, (x, y) in enumerate(batches(data, sampler, ITERATIONS)):
        seed_iteration(1337, t + 1)
        i, j, k = (int(torch.randint(16 - 10 + 1, ())) for _ in range(3))
        m = torch.ones(16, 16, 16)
        m[i : i + 10, j : j + 10, k : k + 10] = 0
        if t < LABELS_ONLY:
            mixed, labels = x[0] * m + x[1] * (1 - m), y[0] * m + y[1] * (1 - m)
            descend(optimizer, masked_loss(student(mixed[None])[0], labels, torch.ones_like(m)))
            teacher = copy.deepcopy(student).requires_grad_(False)
            continue
        q = teacher(x[2:])
        q = (q[:, 1] > q[:, 0]).long()
        for sample in q if cleaned else ():
            pieces, _ = ndimage.label(sample, torch.ones(3, 3, 3))
            largest = max(range(1, pieces.max() + 1), key=lambda n: (pieces == n).sum(), default=1)
            taken_away += ((pieces > 0) & (pieces != largest)).sum()
            sample.copy_(torch.from_numpy(pieces == largest))
        x1, x2 = x[0] * m + x[2] * (1 - m), x[3] * m + x[1] * (1 - m)
        f1, f2 = student(torch.stack([x1, x2]))
        loss = masked_loss(f1, y[0], m) + 0.5 * masked_loss(f1, q[0], 1 - m)
        loss += masked_loss(f2, y[1], 1 - m) + 0.5 * masked_loss(f2, q[1], m)
        descend(optimizer, loss)
        for average, parameter in zip(teacher.parameters(), student.parameters(), strict=True):
            average.copy_(0.99 * average + 0.01 * parameter.detach())
    assert taken_away > 0 or not cleaned
    close(weights(folder, f"iter_{ITERATIONS}.pth"), student.state_dict())
    close(weights(folder, f"ema_iter_{ITERATIONS}.pth"), teacher.state_dict())


def test_the_rate_falls_from_the_second_phase_on_and_the_teacher_begins_as_the_student(data, tmp_path):
    folder = run("BCP", data, tmp_path, consistency_warmup=2, lr_step=1)
    assert column(folder, "lr") == pytest.approx([0.01, 0.01, 0.01, 0.001])
    assert column(folder, "consistency_weight") == [0, 0, 0.5, 0.5]
    assert column(folder, "pseudo_loss")[:2] == column(folder, "teacher_distance")[:2] == [0, 0]
    assert min(column(folder, "pseudo_loss")[2:] + column(folder, "teacher_distance")[2:]) > 0


def test_weights_of_the_authors_code_are_taken_by_name(data, tmp_path):
    net = VNet(1, 2, 2, "groupnorm")
    encoder = ("block_one", "block_two", "block_three", "block_four", "block_five.")
    theirs = {f"{'encoder' if n.startswith(encoder) else 'decoder'}.{n}": w for n, w in net.state_dict().items()}
    theirs |= {"projection_head.0.weight": torch.ones(32, 16), "contrastive_class_selector_0.3.bias": torch.ones(1)}
    torch.save({"net": theirs, "opt": {"state": {}}}, tmp_path / "theirs.pth")
    settings = {"pretrained": tmp_path / "theirs.pth", "consistency_warmup": 0, "base_lr": 0, "max_iterations": 1}
    folder = run("BCP", data, tmp_path / "runs", **settings)
    assert same(weights(folder, "iter_1.pth"), net.state_dict())
    close(weights(folder, "ema_iter_1.pth"), net.state_dict())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labeled_bs": 3, "batch_size": 6}, ["--labeled_bs 3", "--batch_size 6", "multiple of 2"]),
        ({"labeled_bs": 2, "batch_size": 6}, ["--labeled_bs 2", "--batch_size 6", "twice it"]),
        ({"labelnum": 1}, ["--labelnum 1", "at least 2"]),
        ({"consistency_warmup": 4}, ["--consistency_warmup 4", "--max_iterations 4"]),
        ({"consistency_warmup": 0}, ["--consistency_warmup 0", "--pretrained"]),
        (
            {"consistency_warmup": 0, "pretrained": "a.pth", "pretrained_parts": "encoder"},
            ["--consistency_warmup 0", "the teacher would know nothing"],
        ),
        ({"normalization": "batchnorm"}, ["--patch_size 16 16 16", "1 patches"]),
        (  # of the four labelled patches two mixtures are made, and each passes by itself
            {"normalization": "batchnorm", "labeled_bs": 4, "batch_size": 8, "accumulation_steps": 2},
            ["--patch_size 16 16 16", "1 patches"],
        ),
    ],
)
def test_wrong_flags_end_in_a_sentence(data, tmp_path, capsys, changes, words):
    with pytest.raises(SystemExit) as stopped:
        run("BCP", data, tmp_path / "runs", **changes)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("error: ") == 1 and all(word in said for word in words)
    assert not (tmp_path / "runs").exists()
