import math

import torch
from torch import nn

from mtseg.vat import unit, virtual_adversarial_noise


def squares(outputs, clean):
    return (outputs - clean).square().sum()


def test_of_a_linear_network_it_is_the_dominant_eigenvector():
    """|A (x + r) - A x|^2 = r'A'A r, whose largest eigenvector many steps reach; one step gives A'A d for the start."""
    torch.manual_seed(0)
    matrix, x = torch.randn(5, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    net = lambda batch: batch @ matrix.T  # noqa: E731
    r = virtual_adversarial_noise(net, squares, net(x), x, radius=2.5, steps=200)
    largest = torch.linalg.eigh(matrix.T @ matrix).eigenvectors[:, -1]
    torch.testing.assert_close((r @ largest).abs(), torch.full((3,), 2.5, dtype=torch.float64))

    torch.manual_seed(1)
    start = torch.rand_like(x) - 0.5
    torch.manual_seed(1)
    r = virtual_adversarial_noise(net, squares, net(x), x, radius=2.5)
    expected = start @ matrix.T @ matrix
    torch.testing.assert_close(r, 2.5 * expected / expected.norm(dim=1, keepdim=True))


def test_the_gradient_is_that_of_finite_differences_and_reaches_no_weights():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 1, 3)).double()
    x, probe, h = torch.randn(2, 1, 4, 5, dtype=torch.float64), 3.0, 1e-6
    clean = net(x).detach()
    torch.manual_seed(1)
    start = (torch.rand_like(x) - 0.5).flatten(1)
    at = x + probe * (start / start.norm(dim=1, keepdim=True)).view_as(x)
    torch.manual_seed(1)
    with torch.no_grad():  # the caller's context does not matter
        r = virtual_adversarial_noise(net, squares, clean, x, radius=1.0, probe=probe)
        differences = torch.zeros_like(x)
        for place in range(x.numel()):
            step = torch.zeros(x.numel(), dtype=torch.float64)
            step[place] = h
            step = step.view_as(x)
            up, down = squares(net(at + step), clean), squares(net(at - step), clean)
            differences.view(-1)[place] = (up - down) / (2 * h)
    expected = differences / differences.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(r, expected, rtol=1e-5, atol=1e-6)
    assert not r.requires_grad and all(parameter.grad is None for parameter in net.parameters())


def test_where_nothing_changes_there_is_no_noise():
    x = torch.ones(2, 1, 4, 4, 4)
    r = virtual_adversarial_noise(lambda batch: 0 * batch, squares, torch.zeros_like(x), x, radius=10.0)
    assert torch.equal(r, torch.zeros_like(x))
    assert torch.equal(unit(torch.zeros(1, 4, dtype=torch.float16)), torch.zeros(1, 4, dtype=torch.float16))
    assert unit(torch.full((1, 1000), 1e-25)).norm() < 1e-9  # whose squares are 0


def test_in_float16_the_gradient_of_a_mean_over_many_voxels_is_not_lost():
    x = torch.zeros(1, 1, 2**19)
    mean = lambda outputs, clean: (outputs.float() * 1e-3).square().mean()  # noqa: E731
    r = virtual_adversarial_noise(lambda batch: batch.half(), mean, None, x, radius=10.0)
    assert math.isclose(r.norm().item(), 10.0, rel_tol=1e-3)
