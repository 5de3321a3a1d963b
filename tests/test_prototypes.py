import math

import pytest
import torch
from conftest import on
from reference import wave_input

from mtseg.networks.unet import UNet
from mtseg.prototypes import ClassPrototypes, WithFeatures, draw_voxels

VECTORS = 2 * wave_input((90, 4), 0.37)
LABELS = torch.arange(90) % 4  # class 0 is background, and -1 and 7 are no classes
LABELS[::11], LABELS[::13] = -1, 7


def made():
    torch.manual_seed(0)
    return ClassPrototypes(4, num_classes=5, classes=[1, 2, 3, 4], size=6)


@pytest.mark.parametrize("best", [False, True])
def test_the_lowest_or_the_highest_scores_make_prototypes(device, best):
    heads = made()
    heads(VECTORS, LABELS, [torch.randn(3, 6)] * 4)  # running statistics that are no 0 and 1
    before = {name: value.clone() for name, value in heads.state_dict().items()}
    chosen = on(device, lambda heads, *more: heads.choose(*more))(heads, VECTORS, LABELS, 5, best)
    assert heads.training and all(torch.equal(value, before[name]) for name, value in heads.state_dict().items())
    heads.eval().choose(VECTORS, LABELS)
    assert not heads.training
    for number, selector, kept in zip((1, 2, 3, 4), heads.selectors, chosen, strict=True):
        scored = []
        for vector, label in zip(VECTORS, LABELS, strict=True):
            if label == number:
                projected = heads.projection(vector[None])
                scored.append((selector(projected).sigmoid().item(), projected[0].detach()))
        scored.sort(key=lambda pair: pair[0], reverse=best)
        expected = [projected for _, projected in scored[:5]]
        assert len(kept) == len(expected) == (0 if number == 4 else 5)  # there are none of class 4
        torch.testing.assert_close(kept, torch.stack(expected) if expected else torch.empty(0, 6))


def test_the_loss_is_the_mean_over_all_pairs(device):
    """Pair by pair, with a_i = n s_i / sum(s); class 2 has one prototype, class 4 no vectors: they count 0."""
    heads = made()
    prototypes = [torch.randn(n, 6) for n in (3, 1, 7, 5)]
    loss = on(device, lambda heads, *more: heads(*more))(heads, VECTORS, LABELS, prototypes)
    predicted = heads.prediction(heads.projection(VECTORS))
    expected = 0.0
    for number in (1, 3):
        mine, kept = predicted[LABELS == number], prototypes[number - 1]
        s = heads.selectors[number - 1](mine).sigmoid().flatten().tolist()
        t = heads.prototype_selectors[number - 1](kept).sigmoid().flatten().tolist()
        pairs = 0.0
        for g, s_i in zip(mine.tolist(), s, strict=True):
            for m, t_j in zip(kept.tolist(), t, strict=True):
                cosine = sum(x * y for x, y in zip(g, m, strict=True)) / math.hypot(*g) / math.hypot(*m)
                pairs += len(s) * s_i / sum(s) * len(t) * t_j / sum(t) * (1 - cosine)
        expected += pairs / len(s) / len(t)
    assert loss.item() == pytest.approx(expected / 5, rel=1e-4)


def test_gradients_reach_vectors_and_selectors_but_not_the_scores_vectors():
    heads, vectors = made(), VECTORS.clone().requires_grad_()
    prototypes = heads.choose(vectors, LABELS)
    assert not any(kept.requires_grad for kept in prototypes)
    heads(vectors, LABELS, prototypes).backward()
    assert vectors.grad.abs().sum() > 0
    for part in (heads.projection, heads.prediction, heads.selectors[:3], heads.prototype_selectors[:3]):
        assert all(parameter.grad is not None for parameter in part.parameters())
    nothing = heads(vectors, torch.zeros_like(LABELS), prototypes)  # background alone
    assert nothing.item() == 0


def test_voxels_are_drawn_with_what_belongs_to_them(device):
    features = wave_input((3, 4, 5, 6, 7), 0.59)
    labels = torch.arange(3 * 5 * 6 * 7).view(3, 5, 6, 7)
    rows = features.movedim(1, -1).reshape(-1, 4)
    draw = on(device, draw_voxels)
    vectors, places, doubled = draw(630, features.half(), labels, 2 * labels)
    assert vectors.dtype == torch.float32 and torch.equal(vectors, rows.half().float())
    assert torch.equal(places, labels.flatten()) and torch.equal(doubled, 2 * places)
    torch.manual_seed(0)
    vectors, places = draw(400, features, labels)
    assert vectors.shape == (400, 4) and torch.equal(vectors, rows[places])
    often = torch.bincount(torch.cat([draw(629, features, labels)[1] for _ in range(200)]), minlength=630)
    assert often.min() > 120 and often.max() < 290  # 200 each, six standard deviations


def test_maps_of_another_shape_are_refused():
    for wrong in ((1, 8, 8, 8), (2, 2, 4, 4, 4)):
        with pytest.raises(ValueError, match=r"for features of \(1, 3, 4, 4, 4\): give \(N, \*spatial\)"):
            draw_voxels(9, torch.zeros(1, 3, 4, 4, 4), torch.zeros(wrong))


def test_a_network_with_its_features():
    net = UNet(1, 3, 2, "batchnorm", dims=2, strides=(2, 2), deep_supervision=True)
    *outputs, features = WithFeatures(net)(torch.randn(2, 1, 8, 8))
    assert len(outputs) == 2 and features.shape == (2, net.channels[0], 8, 8)
    torch.testing.assert_close(net.out_conv[0](features), outputs[0])
