"""CrossMatch against its equations, written out once more in plain steps: the weights after some iterations."""

import json

import pytest
import torch
import torch.nn.functional as F
from test_recipe import SCRIPTS, batches, column, run, supervised_loss, weights
from test_ua_mt_and_cps import close, descend

from mtseg.augment import intensity_view
from mtseg.mixing import cutmix_boxes
from mtseg.networks.vnet import VNet
from mtseg.samplers import TwoStreamBatchSampler
from mtseg.script import flags
from mtseg.seeding import seed_iteration


def dice(logits, target, threshold):
    """Dice of the foreground with a label and its confidence, over the voxels where that reaches the threshold."""
    label, confidence = target
    sure = confidence >= threshold
    p, y = F.softmax(logits, dim=1)[:, 1][sure], label[sure].float()
    return 1 - (2 * (p * y).sum() + 1e-5) / ((p**2).sum() + (y**2).sum() + 1e-5)


@pytest.mark.parametrize(("normalization", "iterations", "threshold"), [("batchnorm", 2, 0.6), ("none", 3, 0.52)])
def test_crossmatch_computes_its_equations(data, tmp_path, normalization, iterations, threshold):
    settings = {"max_iterations": iterations, "normalization": normalization, "pseudo_threshold": threshold}
    settings |= {"optimizer": "sgd", "base_lr": 0.01, "lr_schedule": "constant"}  # adamw makes 1 of a rounded gradient
    folder = run("CrossMatch", data, tmp_path, labelnum=2, **settings)
    seed_iteration(1337, -1)
    net = VNet(1, 2, 2, normalization, has_dropout=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=0.0001)
    sampler = TwoStreamBatchSampler(range(2), range(2, 6), 6, 4, seed=1337)

    def decoded(a, b):
        """p(a), p(b), m(b), h(b), two patches each."""
        features = []
        for level in net.encode(torch.cat([a, b])):
            features.append(torch.cat([level, F.dropout3d(level[2:], 0.25), F.dropout3d(level[2:], 0.75)]))
        net.has_dropout = False  # before the last convolution
        logits = net.classify(net.decode(features)).split(2)
        net.has_dropout = True
        return logits

    def labelled(logits):
        confidence, label = F.softmax(logits.detach(), dim=1).max(1)
        return label, confidence

    shares = []
    for t, (volumes, labels) in enumerate(batches(data, sampler, iterations)):
        seed_iteration(1337, t + 1)
        x, w, other = volumes.split(2)
        box1, box2 = (cutmix_boxes(2, (16, 16, 16)) for _ in range(2))
        views = [intensity_view(volumes[2:], bias=1.0, gamma=0.5, blur=2.0) for _ in range(2)]
        s1, s2 = (view[:2] * ~box + view[2:] * box for view, box in zip(views, (box1, box2), strict=True))
        net.eval()
        pasted = labelled(net(other))
        net.train()
        p_x, p_w, m_w, h_w = decoded(x, w)
        p_s1, p_s2, m_s2, h_s2 = decoded(s1, s2)
        y, ym, yh = labelled(p_w), labelled(m_w), labelled(h_w)

        def boxed(target, box, pasted=pasted):
            return [torch.where(box[:, 0], there, here) for there, here in zip(pasted, target, strict=True)]

        def D(*pair):
            return dice(*pair, threshold)

        ip = D(p_s1, boxed(y, box1)) + D(p_s2, boxed(y, box2))
        tkd = D(m_w, y) + D(h_w, y) + D(m_s2, boxed(y, box2)) + D(h_s2, boxed(y, box2))
        dkd = D(m_s2, boxed(ym, box2)) + D(h_s2, boxed(yh, box2))
        loss = (supervised_loss(p_x, labels[:2]) + ip / 4 + 0.7 * tkd / 4 + 0.3 * dkd / 2) / 2
        descend(optimizer, loss)
        shares.append((y[1] >= threshold).float().mean().item())
    assert 0.05 < min(shares) and max(shares) < 0.95, "a mask that masks nothing shows nothing"
    torch.testing.assert_close(column(folder, "pseudo_voxels_used"), shares, rtol=1e-3, atol=1e-4)
    close(weights(folder, f"iter_{iterations}.pth"), net.state_dict())


@pytest.mark.parametrize("more", [{"batch_size": 5}, {"batch_size": 4, "accumulation_steps": 2}])
def test_unlabelled_patches_without_a_partner_are_refused(data, tmp_path, capsys, more):
    with pytest.raises(SystemExit) as stopped:
        run("CrossMatch", data, tmp_path / "runs", **more)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and all(f"--{name} {value}" in error for name, value in more.items())
    assert not (tmp_path / "runs").exists()


def test_the_rate_of_the_built_in_data_is_for_sgd_alone():
    rates = [flags.parse(SCRIPTS[name].PARSER, ["--dataset_name", "Phantom"]).base_lr for name in ("MT", "CrossMatch")]
    assert rates == [0.03, 0.001]


def test_a_rate_of_sgd_in_a_config_is_refused(tmp_path):
    """As configs for all methods of a data set have one: AdamW would take it for its own."""
    path = tmp_path / "config.json"

    def rate(script, config, *more):
        path.write_text(json.dumps(config))
        return flags.parse(SCRIPTS[script].PARSER, ["--dataset_name", "Phantom", "--config", str(path), *more]).base_lr

    assert rate("MT", {"base_lr": 0.05}) == 0.05
    with pytest.raises(flags.FlagError, match=r"its base_lr 0\.05 names no optimizer, and this script.s is adamw, at"):
        rate("CrossMatch", {"base_lr": 0.05})
    assert rate("CrossMatch", {"base_lr": 0.05}, "--base_lr", "0.002") == 0.002
    assert rate("CrossMatch", {"base_lr": 0.05}, "--optimizer", "sgd") == 0.05
    assert rate("CrossMatch", {"base_lr": 0.004, "optimizer": "adamw"}) == 0.004
