"""Optimizers and learning-rate schedules by name: PyTorch's own classes, put together."""

import torch
from torch.optim import lr_scheduler

SCHEDULES = ("step", "constant", "poly", "cosine", "cosine_restarts", "exponential", "plateau", "warmup", "sawtooth")
PEAK = 0.1  # of the rate from scratch, in fine-tuning
RISE = 0.05  # of all iterations: how long the rate of the whole network rises, and, before, how long a sawtooth's is


def make_optimizer(name, parameters, lr, momentum=0.9, nesterov=False, weight_decay=1e-4, betas=(0.9, 0.999)):
    """`sgd` (with `momentum`, `nesterov`), `adam` or `adamw` (with `betas`); `weight_decay` goes to each of them.

    adam adds weight decay to the gradient; adamw takes it off the weights (Loshchilov and Hutter, arXiv:1711.05101).
    """
    if name == "sgd":
        return torch.optim.SGD(parameters, lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    return kind(parameters, lr, betas=tuple(betas), weight_decay=weight_decay)


class Schedule:
    """The learning rate of an optimizer over `max_iterations` iterations; call `step()` after each.

    `name`: `constant`; `step`, times `gamma` every `lr_step` iterations; `exponential`, `gamma` per `lr_step`
    iterations, evenly; `poly`, (1 - i / max_iterations)^power; `cosine`, half a cosine down to 0; `cosine_restarts`,
    the same every `lr_step` iterations (Loshchilov and Hutter, arXiv:1608.03983, equation 5); `plateau`, times `gamma`
    after more than `patience` calls of `validated` without a better score. For fine-tuning (Wald et al., "Revisiting
    MAE pre-training for 3D medical image segmentation", CVPR 2025, arXiv:2410.23132, and its code): `warmup`, a linear
    rise to PEAK of the rate over RISE of the iterations, then poly; `sawtooth`, before that as long a rise and fall,
    for which the encoder is to be frozen, see `sawtooth_end`.
    `warmup_iterations`: the rate rises linearly over so many iterations first. `hold`: the schedule begins after so
    many iterations only, and the rate stays until then. The schedule covers those that are left.
    """

    def __init__(
        self,
        optimizer,
        name,
        max_iterations,
        lr_step=2500,
        gamma=0.1,
        power=0.9,
        patience=5,
        warmup_iterations=0,
        hold=0,
    ):
        self.begins = max(warmup_iterations, hold)
        length = max(max_iterations - self.begins, 1)
        main = {
            "constant": lambda: lr_scheduler.ConstantLR(optimizer, factor=1.0),
            "step": lambda: lr_scheduler.StepLR(optimizer, lr_step, gamma),
            "exponential": lambda: lr_scheduler.ExponentialLR(optimizer, gamma ** (1 / lr_step)),
            "poly": lambda: lr_scheduler.PolynomialLR(optimizer, length, power),
            "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, length),
            "cosine_restarts": lambda: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, lr_step),
            "plateau": lambda: lr_scheduler.ConstantLR(optimizer, factor=1.0),
            "warmup": lambda: lr_scheduler.LambdaLR(optimizer, lambda i: rise_and_fall(i, length, power)),
            "sawtooth": lambda: lr_scheduler.LambdaLR(optimizer, lambda i: sawtooth(i, length, power)),
        }[name]
        self.optimizer = optimizer
        self.plateau = None
        before = {}  # what comes before the schedule, by the iteration at which it ends
        if warmup_iterations:
            warmup = lr_scheduler.LinearLR(optimizer, 1 / (warmup_iterations + 1), total_iters=warmup_iterations)
            before[warmup_iterations] = warmup
        if hold > warmup_iterations:
            before[hold] = lr_scheduler.ConstantLR(optimizer, factor=1.0)
        schedules = [*before.values(), main()]
        self.scheduler = lr_scheduler.SequentialLR(optimizer, schedules, [*before]) if before else schedules[0]
        if name == "plateau":
            self.plateau = lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=gamma, patience=patience)

    @property
    def lr(self):
        return self.optimizer.param_groups[0]["lr"]

    def step(self):
        self.scheduler.step()

    def validated(self, score):
        """Tell the schedule a validation's score (more is better); only `plateau` listens, once it has begun."""
        if self.plateau is not None and self.scheduler.last_epoch >= self.begins:
            self.plateau.step(score)

    def state_dict(self):
        state = {"scheduler": self.scheduler.state_dict()}
        return state if self.plateau is None else {**state, "plateau": self.plateau.state_dict()}

    def load_state_dict(self, state):
        self.scheduler.load_state_dict(state["scheduler"])
        if self.plateau is not None:
            self.plateau.load_state_dict(state["plateau"])


def rise_and_fall(i, length, power, rise=None):
    """The factor of iteration i, from 0: PEAK after a linear rise over `rise` iterations, then poly down to 0."""
    rise = max(round(RISE * length), 1) if rise is None else rise
    return PEAK * ((i + 1) / rise if i < rise else (1 - (i - rise) / max(length - rise, 1)) ** power)


def sawtooth_end(length):
    """The iterations of a run of `length` in which the decoder of a sawtooth learns alone."""
    return max(round(RISE * length), 2)


def sawtooth(i, length, power):
    """The factor of iteration i, from 0: a rise and a fall of the decoder's, then those of the whole network's."""
    end = sawtooth_end(length)
    return rise_and_fall(i, end, power, end // 2) if i < end else rise_and_fall(i - end, length - end, power)


class Updater:
    """A step of `optimizer` with what belongs to it: scaled gradients, clipping to the norm `clip`, the `schedule`.

    `steps`: how many were made here. `skipped`: how many of a run were left out because float16 overflowed. `lr`: the
    rate of the last step.
    """

    def __init__(self, optimizer, schedule, scaler, clip=0.0):
        self.optimizer = optimizer
        self.schedule = schedule
        self.scaler = scaler
        self.clip = clip
        self.steps = self.skipped = 0
        self.lr = schedule.lr

    def step(self, loss):
        """Carry the scalar `loss` back and move the weights once."""
        self.steps += 1
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        if self.clip:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.clip)
        scale, self.lr = self.scaler.get_scale(), self.schedule.lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() < scale:  # float16 overflowed: the weights did not move
            self.skipped += 1
        self.schedule.step()

    def parts(self):
        """What has a state to save, by name."""
        return {"optimizer": self.optimizer, "schedule": self.schedule, "scaler": self.scaler}


def gradient_scaler(device, amp):
    """The scaler that keeps float16 gradients (`amp` 'fp16') from vanishing; for anything else it does nothing."""
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    return torch.cuda.amp.GradScaler(enabled=amp == "fp16")  # PyTorch 2.2
