"""UniMatch against its equations, written out once more in plain steps: the weights after some iterations."""

import pytest
import torch
import torch.nn.functional as F
from test_recipe import batches, column, run, supervised_loss, weights
from test_ua_mt_and_cps import close, descend

from mtseg.augment import intensity_view
from mtseg.mixing import cutmix_boxes
from mtseg.networks.vnet import VNet
from mtseg.samplers import TwoStreamBatchSampler
from mtseg.seeding import seed_iteration


def dice_of_all_classes(logits, label, sure):
    """1 - 2 sum(p y) / (sum p^2 + sum y^2) for background and foreground, over voxels that count; their mean."""
    p, losses = F.softmax(logits, dim=1), []
    for c in (0, 1):
        score, target = p[:, c][sure], (label == c)[sure].float()
        losses.append(1 - (2 * (score * target).sum() + 1e-5) / ((score**2).sum() + (target**2).sum() + 1e-5))
    return sum(losses) / 2


@pytest.mark.parametrize(("normalization", "iterations", "threshold"), [("batchnorm", 2, 0.6), ("none", 3, 0.52)])
def test_unimatch_computes_its_equations(data, tmp_path, normalization, iterations, threshold):
    """With batch norm over the four values at the bottom, differences in rounding grow too fast for a third."""
    settings = {"max_iterations": iterations, "normalization": normalization, "pseudo_threshold": threshold}
    folder = run("UniMatch", data, tmp_path, labelnum=2, lr_schedule="constant", **settings)
    seed_iteration(1337, -1)
    net = VNet(1, 2, 2, normalization, has_dropout=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=0.0001)
    sampler = TwoStreamBatchSampler(range(2), range(2, 6), 6, 4, seed=1337)
    shares = []
    for t, (volumes, labels) in enumerate(batches(data, sampler, iterations)):
        seed_iteration(1337, t + 1)
        x, w, other = volumes.split(2)
        boxes = [cutmix_boxes(2, (16, 16, 16)) for _ in range(2)]
        strong = []
        for box in boxes:
            view = intensity_view(volumes[2:], bias=1.0, gamma=0.5, blur=2.0)
            strong.append(view[:2] * ~box + view[2:] * box)
        net.eval()
        with torch.no_grad():
            p_other = F.softmax(net(other), dim=1)
        net.train()

        features = net.encode(torch.cat([x, w]))
        dropped = [F.dropout3d(level, 0.5) for level in features]
        logits = net.classify(net.decode([torch.cat(pair) for pair in zip(features, dropped, strict=True)]))
        x_logits, w_logits, _, dropped_logits = logits.split(2)
        strong_logits = net(torch.cat(strong)).split(2)

        p = F.softmax(w_logits.detach(), dim=1)
        confidence, y = p.amax(1), p.argmax(1)
        shares.append((confidence >= threshold).float().mean().item())
        loss = supervised_loss(x_logits, labels[:2])
        loss = loss + dice_of_all_classes(dropped_logits, y, confidence >= threshold) / 2
        for box, s_logits in zip(boxes, strong_logits, strict=True):
            y_mixed = torch.where(box[:, 0], p_other.argmax(1), y)
            sure = torch.where(box[:, 0], p_other.amax(1), confidence) >= threshold
            loss = loss + dice_of_all_classes(s_logits, y_mixed, sure) / 4
        descend(optimizer, loss / 2)
    assert 0.1 < min(shares) and max(shares) < 0.9, "a mask that masks nothing shows nothing"
    torch.testing.assert_close(column(folder, "pseudo_voxels_used"), shares, rtol=1e-3, atol=1e-4)
    close(weights(folder, f"iter_{iterations}.pth"), net.state_dict())


@pytest.mark.parametrize("more", [{"batch_size": 5}, {"batch_size": 4, "accumulation_steps": 2}])
def test_unlabelled_patches_without_a_partner_are_refused(data, tmp_path, capsys, more):
    with pytest.raises(SystemExit) as stopped:
        run("UniMatch", data, tmp_path / "runs", **more)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and all(f"--{name} {value}" in error for name, value in more.items())
    assert not (tmp_path / "runs").exists()
