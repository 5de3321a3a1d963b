"""Learning rates against closed forms, and schedules that go on where they were saved."""

import io
import math

import pytest
import torch

from mtseg.optim import SCHEDULES, Schedule, make_optimizer, sawtooth_end


def rates(name, iterations, lr=0.1, resume_at=None, scores=(), **settings):
    """The rate of each iteration; at `resume_at` everything is saved, read as weights only, and built anew."""

    def build():
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = make_optimizer("sgd", [parameter], lr)
        return parameter, optimizer, Schedule(optimizer, name, iterations, **settings)

    parameter, optimizer, schedule = build()
    seen = []
    for iteration in range(iterations):
        if iteration == resume_at:
            buffer = io.BytesIO()
            torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, buffer)
            state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
            parameter, optimizer, schedule = build()
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
        seen.append(schedule.lr)
        parameter.sum().backward()
        optimizer.step()
        schedule.step()
        if iteration < len(scores):
            schedule.validated(scores[iteration])
    return seen


CLOSED = {
    "constant": lambda i, n: 0.1,
    "step": lambda i, n: 0.1 * 0.5 ** (i // 4),
    "exponential": lambda i, n: 0.1 * 0.5 ** (i / 4),
    "poly": lambda i, n: 0.1 * (1 - i / n) ** 0.9,
    "cosine": lambda i, n: 0.05 * (1 + math.cos(math.pi * i / n)),
    "cosine_restarts": lambda i, n: 0.05 * (1 + math.cos(math.pi * (i % 4) / 4)),
}


@pytest.mark.parametrize(("warmup", "hold"), [(0, 0), (5, 0), (0, 4), (3, 7), (5, 2)])
@pytest.mark.parametrize("name", CLOSED)
def test_rates_follow_their_closed_forms(name, warmup, hold):
    expected = [0.1 * (i + 1) / (warmup + 1) for i in range(warmup)] + [0.1] * (hold - warmup)
    first = len(expected)
    expected += [CLOSED[name](i, 12) for i in range(12)]
    seen = rates(name, 12 + first, lr_step=4, gamma=0.5, warmup_iterations=warmup, hold=hold)
    assert seen == pytest.approx(expected, rel=1e-6)


def test_plateau_lowers_the_rate_after_enough_validations_without_a_better_score():
    seen = rates("plateau", 8, gamma=0.5, patience=2, scores=[0.5, 0.6, 0.6, 0.55, 0.6, 0.7, 0.7])
    assert seen == pytest.approx([0.1] * 5 + [0.05] * 3)


@pytest.mark.parametrize("begins", [{"hold": 6}, {"warmup_iterations": 6}])
def test_plateau_waits_until_the_schedule_has_begun(begins):
    """A rate that fell before would rise again when it begins."""
    seen = rates("plateau", 9, gamma=0.5, patience=0, scores=[0.5] * 9, **begins)
    assert seen[:6] == rates("constant", 6, **begins)
    assert seen[6:] == sorted(seen[6:], reverse=True) and seen[8] < seen[6] == pytest.approx(0.1)


@pytest.mark.parametrize(("n", "power"), [(1000, 0.9), (1000, 2.0), (310, 0.9), (20, 0.9), (7, 0.9)])
def test_warmup_rises_to_a_tenth_of_the_rate_and_falls(n, power):
    rise = max(round(0.05 * n), 1)
    expected = [0.01 * (i + 1) / rise for i in range(rise)]
    expected += [0.01 * (1 - i / (n - rise)) ** power for i in range(n - rise)]
    seen = rates("warmup", n, power=power)
    assert seen == pytest.approx(expected, rel=1e-9) and max(seen) == pytest.approx(0.01)


@pytest.mark.parametrize(("n", "power"), [(1000, 0.9), (1000, 2.0), (300, 0.9), (60, 0.9)])
def test_sawtooth_rises_and_falls_twice(n, power):
    """The decoder's tooth takes a twentieth of the run, then a warmup begins over what is left."""
    end = round(0.05 * n)
    half, left = end // 2, n - end
    rise = round(0.05 * left)
    expected = [0.01 * (i + 1) / half for i in range(half)]
    expected += [0.01 * (1 - i / (end - half)) ** power for i in range(end - half)]
    assert sawtooth_end(n) == end == len(expected)
    expected += [0.01 * (i + 1) / rise for i in range(rise)]
    expected += [0.01 * (1 - i / (left - rise)) ** power for i in range(left - rise)]
    assert rates("sawtooth", n, power=power) == pytest.approx(expected, rel=1e-9)


def test_schedules_of_fine_tuning_keep_the_ratio_of_the_groups_rates_and_a_rate_of_0():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (0.1, 0.05, 0.0)]
    optimizer = make_optimizer("sgd", groups, 0.1)
    schedule = Schedule(optimizer, "sawtooth", 50)
    for _ in range(50):
        first, second, third = (group["lr"] for group in optimizer.param_groups)
        assert first > 0 and second == pytest.approx(first / 2) and third == 0
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(("warmup", "hold"), [(0, 0), (5, 0), (2, 5)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_resumed_schedule_repeats_an_uninterrupted_one(name, warmup, hold):
    settings = {"lr_step": 3, "gamma": 0.5, "patience": 1, "warmup_iterations": warmup, "scores": [0.5, 0.4, 0.4, 0.4]}
    settings["hold"] = hold
    whole = rates(name, 14, **settings)
    for resume_at in (2, 5, 9):
        assert rates(name, 14, resume_at=resume_at, **settings) == whole


def test_optimizers_take_their_settings():
    parameter = torch.nn.Parameter(torch.zeros(1))
    sgd = make_optimizer("sgd", [parameter], 0.1, momentum=0.8, nesterov=True, weight_decay=0.01)
    assert {k: sgd.defaults[k] for k in ("momentum", "nesterov", "weight_decay")} == {
        "momentum": 0.8,
        "nesterov": True,
        "weight_decay": 0.01,
    }
    for name in ("adam", "adamw"):
        optimizer = make_optimizer(name, [parameter], 0.1, betas=[0.8, 0.9], weight_decay=0.01)
        assert type(optimizer).__name__.lower() == name
        assert optimizer.defaults["betas"] == (0.8, 0.9)
        assert optimizer.defaults["weight_decay"] == 0.01
