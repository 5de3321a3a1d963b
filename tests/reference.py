"""The deterministic weights and inputs that the values in family.json were computed with."""

import json
import math
from pathlib import Path

import pytest
import torch

FAMILY = json.loads((Path(__file__).parent / "family.json").read_text())


@torch.no_grad()
def fill(net):
    """Write a fixed pattern into every floating-point entry of the state_dict, in its order."""
    for i, (name, tensor) in enumerate(net.state_dict().items()):
        if tensor.is_floating_point():
            wave = torch.sin(torch.arange(tensor.numel(), dtype=torch.float64) * 0.7311 + i).reshape(tensor.shape)
            if name.endswith("running_var"):
                tensor.copy_(1 + 0.1 * wave**2)
            elif name.endswith(("running_mean", "bias")):
                tensor.copy_(0.1 * wave)
            elif tensor.dim() == 1:
                tensor.copy_(1 + 0.1 * wave)
            else:
                tensor.copy_(wave * (2.0 / (tensor.numel() / tensor.shape[0])) ** 0.5)
    return net


def wave_input(shape, step=0.01):
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * step).reshape(shape).float()


def assert_digest(tensor, expected):
    """The sum, the sum of squares and seven probes of `tensor` are those expected."""
    flat = torch.as_tensor(tensor).detach().double().flatten()
    probe = flat[torch.linspace(0, flat.numel() - 1, 7).long()]
    assert flat.sum().item() == pytest.approx(expected["sum"], rel=1e-4)
    assert flat.square().sum().item() == pytest.approx(expected["sq"], rel=1e-4)
    assert probe.tolist() == pytest.approx(expected["probe"], rel=1e-4)
