import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import wave_input
from scipy import ndimage, special, stats

from mtseg.postprocess import largest_component, largest_components
from mtseg.pseudo import pseudo_label_statistics, pseudo_labels, settled_labels, sharpen

LOGITS = 2 * wave_input((3, 4, 5, 6, 7), 0.59)
SOFT = special.softmax(LOGITS.numpy().astype(np.float64), axis=1)


def test_threshold_and_entropy_limit():
    sure, ordered = SOFT.max(axis=1) >= 0.6, stats.entropy(SOFT, axis=1, base=4) <= 0.5
    assert 0 < (sure & ordered).sum() < sure.sum() < sure.size
    for limit, used in ((None, sure), (0.5, sure & ordered), (1, sure)):
        labels = pseudo_labels(LOGITS, threshold=0.6, max_entropy=limit)
        assert labels.dtype == torch.int64
        np.testing.assert_array_equal(labels, np.where(used, SOFT.argmax(axis=1), 255))
    assert torch.equal(pseudo_labels(LOGITS, 0, ignore_index=-1), LOGITS.argmax(dim=1))
    assert (pseudo_labels(LOGITS, 1.0) == 255).all()
    for classes in range(2, 20):  # alike: the entropy divided by its largest value is 1, or a rounding above it
        assert (pseudo_labels(torch.zeros(1, classes, 4, 4), 0, max_entropy=1) == 0).all()


def test_volumes_outside_the_foreground_limits_are_left_out_whole():
    argmax = torch.zeros(4, 10, 10, dtype=torch.long)
    argmax[1, :1] = 2
    argmax[2, :5] = 1
    argmax[3] = 1
    logits = 20 * F.one_hot(argmax, 3).movedim(-1, 1).float()
    labels = pseudo_labels(logits, foreground=(0.1, 0.5))
    assert (labels[[0, 3]] == 255).all()
    assert torch.equal(labels[[1, 2]], argmax[[1, 2]])
    # The share counts what the teacher is unsure of as well.
    logits[1, :, 0] *= 0.01
    labels = pseudo_labels(logits, foreground=(0.1, 0.5))
    assert (labels[1, 0] == 255).all()
    assert (labels[1, 1:] == 0).all()


def test_voxels_that_mean_nothing_are_neither_used_nor_counted_as_foreground():
    argmax = torch.zeros(1, 10, 10, dtype=torch.long)
    argmax[0, 5:] = 1
    seen = torch.zeros(1, 10, 10, dtype=torch.bool)
    seen[0, :6] = True  # of these a sixth is foreground, of all a half
    logits = 20 * F.one_hot(argmax, 3).movedim(-1, 1).float()
    assert (pseudo_labels(logits, foreground=(0.1, 0.2)) == 255).all()
    labels = pseudo_labels(logits, foreground=(0.1, 0.2), seen=seen)
    assert torch.equal(labels, argmax.masked_fill(~seen, 255))
    assert (pseudo_labels(logits, foreground=(0.0, 1.0), seen=seen & False) == 255).all()


def test_half_precision_and_logits_that_are_no_numbers():
    logits = LOGITS.bfloat16()
    for threshold in np.linspace(0.5, 0.8, 31):
        expected = pseudo_labels(logits.float(), threshold, 0.6)
        assert (expected != 255).any()
        assert torch.equal(pseudo_labels(logits, threshold, 0.6), expected)
    broken = (1e4 * LOGITS.sign()).half()
    broken[0, 1] = float("nan")
    labels = pseudo_labels(broken, 0.3, max_entropy=1)
    assert (labels[0] == 255).all()
    assert (labels[1:] != 255).any()


def test_a_loss_that_ignores_unused_voxels_trains_the_student_alone():
    teacher, student = LOGITS.clone().requires_grad_(), (0.1 * LOGITS).requires_grad_()
    labels = pseudo_labels(teacher, 0.6)
    F.cross_entropy(student, labels, ignore_index=255).backward()
    assert not labels.requires_grad
    assert torch.equal(student.grad.abs().sum(dim=1) > 0, labels != 255)


def test_statistics_by_hand():
    labels = torch.tensor([[[0, 1], [255, 255]], [[255, 255], [255, 255]], [[1, 1], [1, 0]], [[1, 1], [1, 1]]])
    hidden = torch.tensor([[[0, 0], [1, 1]], [[1, 1], [1, 1]], [[1, 1], [0, 255]], [[255, 255], [255, 255]]])
    seen = {name: value.item() for name, value in pseudo_label_statistics(labels, hidden).items()}
    assert seen == pytest.approx(
        {"pseudo_voxels_used": 10 / 16, "pseudo_volumes_used": 3 / 4, "pseudo_accuracy_monitoring_only": 3 / 5}
    )
    assert list(pseudo_label_statistics(labels)) == ["pseudo_voxels_used", "pseudo_volumes_used"]
    nothing = pseudo_label_statistics(labels[1:2], hidden[1:2])
    assert nothing["pseudo_voxels_used"] == 0
    assert nothing["pseudo_accuracy_monitoring_only"].isnan()
    with pytest.raises(ValueError, match="hidden labels"):
        pseudo_label_statistics(labels, hidden[:1])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"threshold": 80}, "threshold .* 80"),
        ({"max_entropy": -0.1}, "entropy limit .* -0.1"),
        ({"foreground": (0.5, 0.1)}, "MIN <= MAX"),
        ({"ignore_index": 3}, "one of the 4 classes"),
    ],
)
def test_limits_out_of_range_are_named(given, says):
    with pytest.raises(ValueError, match=says):
        pseudo_labels(LOGITS, **given)
    with pytest.raises(ValueError, match="two or more"):
        pseudo_labels(LOGITS[:, :1])


def test_sharpening_is_the_sigmoid_of_the_logit_by_the_temperature():
    p = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    for temperature in (1, 0.5, 0.1, 0.01):
        expected = torch.sigmoid(torch.logit(p) / temperature)
        torch.testing.assert_close(sharpen(p, temperature), expected, rtol=1e-9, atol=0)
    ends = torch.tensor([0, 1e-30, 0.5, 1], requires_grad=True)
    for temperature in (0.1, 0.001):
        sharp = sharpen(ends, temperature)
        assert sharp.tolist() == [0, 0, 0.5, 1]
        (gradient,) = torch.autograd.grad(sharp.sum(), ends)
        assert gradient.tolist() == pytest.approx([0, 0, 1 / temperature, 0], rel=1e-5)
    assert torch.autograd.gradcheck(lambda q: sharpen(q, 0.1), p[::7].clone().requires_grad_())
    with pytest.raises(ValueError, match="temperature of sharpening is 0"):
        sharpen(p, 0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
@pytest.mark.parametrize("size", [(40, 36), (20, 24, 16)], ids=str)
def test_largest_components_are_those_of_each_sample_and_class(size, dtype, device):
    rng = np.random.default_rng(0)
    labels = np.stack([np.round(ndimage.zoom(rng.uniform(0, 3, [n // 4 for n in size]), 4)) for _ in range(3)])
    labels[2] = 0
    given = torch.from_numpy(labels).clamp(0, 3).to(device, dtype)
    before = given.clone()
    found = largest_components(given)
    assert torch.equal(given, before) and found.device == given.device and found.dtype == dtype
    np.testing.assert_array_equal(found.cpu(), [largest_component(sample) for sample in given.cpu().numpy()])
    assert 0 < (found > 0).sum() < (given > 0).sum()


def test_of_components_of_one_size_the_first_stays_and_corners_connect():
    labels = torch.tensor([[[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0], [2, 0, 1, 1]]])
    assert largest_components(labels).tolist() == [[[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [2, 0, 0, 0]]]


def test_two_teachers_and_a_student_settle_on_labels():
    """Voxel by voxel, in plain steps, with SciPy's entropy."""
    one, two, own = (3 * wave_input((2, 4, 5, 6), speed) for speed in (0.59, 0.83, 1.27))
    labels, differ = settled_labels(one, two, own, threshold=0.6)
    p, q, s = (special.softmax(logits.double().numpy(), axis=1) for logits in (one, two, own))
    overruled = agreed = 0
    for n, x, y in np.ndindex(2, 5, 6):
        a, b, c = p[n, :, x, y], q[n, :, x, y], s[n, :, x, y]
        u, v = np.exp(-stats.entropy(a, base=2)), np.exp(-stats.entropy(b, base=2))
        mean = (u * a + v * b) / (u + v)
        assert differ[n, x, y] == (a.argmax() != b.argmax())
        if a.argmax() != b.argmax() and c.argmax() != mean.argmax() and c.max() > mean.max():
            mean, overruled = c, overruled + 1
        agreed += mean.max() >= 0.6
        assert labels[n, x, y] == (mean.argmax() if mean.max() >= 0.6 else 255)
    assert overruled > 5 and 10 < agreed < 55
    assert torch.equal(settled_labels(one.bfloat16().double(), two, own)[1], one.bfloat16().argmax(1) != two.argmax(1))
