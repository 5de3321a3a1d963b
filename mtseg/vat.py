"""The small perturbation of an input that changes a network's output most, for virtual adversarial training.

Miyato et al., "Virtual Adversarial Training", TPAMI 2019 (arXiv:1704.03976), section 3.3: power iteration. To second
order a divergence D(f(x), f(x + r)) is r'Hr / 2, and the gradient at a short r is H r: normalised again and again, r
turns to the eigenvector of H's largest eigenvalue.
"""

import torch


def virtual_adversarial_noise(net, divergence, clean, x, radius, probe=10.0, steps=1):
    """r with the shape of `x` (N, ...), of L2 norm `radius` in each sample, towards the largest divergence.

    The divergence is divergence(net(x + r), clean), a scalar, `clean` being what it compares with. `probe`: the length
    of r at which its gradient is taken. `steps` of power iteration: in each a forward and a backward pass, which
    reaches the input alone and no weights. The start is drawn from PyTorch's generator. Where the gradient of a sample
    is 0, so is its r. Running statistics of batch norm follow the perturbed inputs, unless the caller freezes them.
    """
    x = x.detach()
    r = unit(torch.rand_like(x) - 0.5)
    for _ in range(steps):
        r.requires_grad_()
        with torch.enable_grad():
            # Times the number of entries: the gradient of a mean over many would be 0 in float16.
            (gradient,) = torch.autograd.grad(divergence(net(x + probe * r), clean) * x.numel(), r)
        r = unit(gradient)
    return radius * r


def unit(r):
    """`r` (N, ...) with each sample divided by its L2 norm."""
    norms = r.flatten(1).norm(dim=1).clamp_min(max(1e-12, torch.finfo(r.dtype).tiny))
    return r / norms.view(-1, *[1] * (r.dim() - 1))
