"""Ramps for weights and rates over the course of training.

Every ramp takes the current step and its length in the same unit (iterations, epochs or blocks of 150 iterations, as
the caller likes) and returns a multiplier between 0 and 1. Steps outside the ramp are clipped to it.
"""

import math


def sigmoid_rampup(current, rampup_length):
    """exp(-5 (1 - t)^2) with t = current / rampup_length: exp(-5) at the start, 1 from the ramp's end on.

    Laine and Aila, "Temporal Ensembling for Semi-Supervised Learning", ICLR 2017 (arXiv:1610.02242), section 3.1.
    A ramp of length 0 is over at once: 1.0.
    """
    return math.exp(-5.0 * (1.0 - linear_rampup(current, rampup_length)) ** 2)


def linear_rampup(current, rampup_length):
    """current / rampup_length: 0 at the start, 1 from the ramp's end on. A ramp of length 0 is over at once: 1.0."""
    if rampup_length == 0:
        return 1.0
    return min(max(current / rampup_length, 0.0), 1.0)


def cosine_rampup(current, rampup_length):
    """(1 - cos(pi t)) / 2 with t = current / rampup_length: 0 at the start, 1 from the ramp's end on.

    1 - `cosine_rampdown`: level at both ends, steepest in the middle. A ramp of length 0 is over at once: 1.0.
    """
    return 1.0 - cosine_rampdown(current, rampup_length)


def constant(current, rampup_length):
    """1.0 at every step: no ramp."""
    return 1.0


def cosine_rampdown(current, rampdown_length):
    """(cos(pi t) + 1) / 2 with t = current / rampdown_length: 1 at the start, 0 from the ramp's end on.

    Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017 (arXiv:1608.03983),
    equation 5 without restarts. A ramp of length 0 is over at once: 0.0.
    """
    return 0.5 * (math.cos(math.pi * linear_rampup(current, rampdown_length)) + 1.0)


RAMPUPS = {"sigmoid": sigmoid_rampup, "linear": linear_rampup, "cosine": cosine_rampup, "constant": constant}


def rampup(shape, current, rampup_length):
    """The ramp-up named `shape`, a key of RAMPUPS, at `current`; ValueError for another name."""
    if shape not in RAMPUPS:
        raise ValueError(f"unknown ramp {shape!r}: take one of {', '.join(RAMPUPS)}")
    return RAMPUPS[shape](current, rampup_length)


def consistency_weight(iteration, weight, shape="sigmoid", length=40.0, warmup=0, block=150):
    """(the weight in `iteration`, which counts from 1; the phase: 'warm-up', 'ramp' or 'stable'), as in UA-MT.

    The weight is 0 for `warmup` iterations. It then rises to `weight` along the ramp `shape`, which is `length` blocks
    of `block` iterations long; within a block it is constant.
    """
    now = (iteration - 1 - warmup) // block
    if now < 0:
        return 0.0, "warm-up"
    return weight * rampup(shape, now, length), "ramp" if now < length and shape != "constant" else "stable"
