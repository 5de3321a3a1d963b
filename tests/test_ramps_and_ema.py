import copy
import math
import sys

import pytest
import torch
from conftest import on, only_on_the_cpu
from reference import FAMILY
from torch import nn

from mtseg.ema import relative_distance, update_ema_variables
from mtseg.ramps import RAMPUPS, cosine_rampdown, cosine_rampup, linear_rampup, rampup, sigmoid_rampup


@pytest.mark.parametrize("key", FAMILY["sigmoid_rampup(current, length)"])
def test_sigmoid_rampup_gives_the_familys_values(key):
    current, length = map(float, key.split("/"))
    assert sigmoid_rampup(current, length) == pytest.approx(FAMILY["sigmoid_rampup(current, length)"][key], rel=1e-9)


@pytest.mark.parametrize(
    ("ramp", "first", "last"), [(linear_rampup, 0, 1), (cosine_rampup, 0, 1), (cosine_rampdown, 1, 0)]
)
def test_other_ramps(ramp, first, last):
    assert ramp(0, 8) == first
    assert ramp(4, 8) == pytest.approx(0.5)
    assert ramp(8, 8) == ramp(80, 8) == ramp(0, 0) == pytest.approx(last)
    assert ramp(-3, 8) == first


def test_cosine_is_a_cosine():
    assert cosine_rampdown(2, 8) == pytest.approx((math.cos(math.pi / 4) + 1) / 2)
    assert cosine_rampup(2, 8) == pytest.approx((1 - math.cos(math.pi / 4)) / 2)


def test_a_ramp_by_its_name():
    assert [rampup(shape, 2, 8) for shape in ("sigmoid", "linear", "cosine", "constant")] == [
        sigmoid_rampup(2, 8),
        linear_rampup(2, 8),
        cosine_rampup(2, 8),
        1.0,
    ]
    for shape in RAMPUPS:
        values = [rampup(shape, step, 8) for step in range(-2, 12)]
        assert values == sorted(values)
        assert values[-1] == rampup(shape, 0, 0) == 1.0
    with pytest.raises(ValueError, match=r"'exp'.*sigmoid, linear, cosine, constant"):
        rampup("exp", 2, 8)


@pytest.fixture
def on_every_device(device, monkeypatch):
    for function in (update_ema_variables, relative_distance):
        monkeypatch.setattr(sys.modules[__name__], function.__name__, on(device, function))


def networks():
    student = nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2))
    return student, copy.deepcopy(student)


def test_first_steps_are_the_true_average_then_alpha_holds(on_every_device):
    student, teacher = networks()
    seen = []
    for step in range(5):
        nn.init.constant_(student[0].weight, float(step**2))
        seen.append(float(step**2))
        update_ema_variables(student, teacher, 0.99, step)
        assert teacher[0].weight[0].item() == pytest.approx(sum(seen) / len(seen))
    nn.init.constant_(student[0].weight, 1.0)
    nn.init.constant_(teacher[0].weight, 0.0)
    update_ema_variables(student, teacher, 0.75, 1000)
    assert teacher[0].weight[0].item() == pytest.approx(0.25)


def test_buffers_stay_the_teachers_own_unless_averaged(on_every_device):
    student, teacher = networks()
    student[1].running_mean.fill_(1.0)
    student[1].num_batches_tracked.fill_(7)
    update_ema_variables(student, teacher, 0.75, 1000)
    assert teacher[1].running_mean[0].item() == 0
    update_ema_variables(student, teacher, 0.75, 1000, average_buffers=True)
    assert teacher[1].running_mean[0].item() == pytest.approx(0.25)
    assert teacher[1].num_batches_tracked.item() == 7


@only_on_the_cpu
def test_the_update_is_that_of_a_loop_over_tensors_bit_for_bit(on_every_device):
    student, teacher = (nn.Sequential(nn.Conv3d(3, 5, 3), nn.Linear(7, 300)) for _ in range(2))
    expected = copy.deepcopy(teacher)
    for step in range(3):
        alpha = min(1 - 1 / (step + 1), 0.99)
        update_ema_variables(student, teacher, 0.99, step)
        for mean, weight in zip(expected.parameters(), student.parameters(), strict=True):
            mean.data.mul_(alpha).add_(weight.data, alpha=1 - alpha)
            weight.data.mul_(1.1)
    assert all(map(torch.equal, teacher.parameters(), expected.parameters()))


def test_networks_that_do_not_match_are_refused(on_every_device):
    student, _ = networks()
    with pytest.raises(ValueError, match="zip"):
        update_ema_variables(student, nn.Conv3d(1, 2, 1), 0.99, 3)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_teacher_in_half_precision_which_would_never_move_is_refused(half):
    with pytest.raises(ValueError, match="keep its weights in float32"):
        update_ema_variables(nn.Linear(1, 2).to(half), nn.Linear(1, 2).to(half), 0.999, 1000)
    student, teacher = nn.Linear(1, 2).to(half), nn.Linear(1, 2)
    update_ema_variables(student, teacher, 0.999, 0)
    assert torch.equal(teacher.weight, student.weight.float())


def test_the_students_gradients_are_left_alone(on_every_device):
    student, teacher = networks()
    student[0](torch.ones(1, 1, 1, 1, 1)).sum().backward()
    before = student[0].weight.grad.clone()
    update_ema_variables(student, teacher.requires_grad_(False), 0.99, 3)
    assert torch.equal(student[0].weight.grad, before)


def test_the_distance_of_teacher_and_student_is_relative_to_the_student(on_every_device):
    student, teacher = nn.Linear(1, 2), nn.Linear(1, 2)
    for net, weight, bias in ((student, (3.0, 0.0), (0.0, 4.0)), (teacher, (3.0, 2.0), (0.0, 3.0))):
        net.weight.data[:, 0], net.bias.data[:] = torch.tensor(weight), torch.tensor(bias)
    assert relative_distance(student, teacher).item() == pytest.approx(math.sqrt(5) / 5)
