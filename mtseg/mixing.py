"""Images mixed from two: interpolated, or a box of one in the other.

Tensors are (N, C, *spatial) with any number of spatial dimensions. All that is random is drawn from PyTorch's CPU
generator, so that it is the same on every device. A box is a bool mask, True inside; what lies there is pasted by
`torch.where(box, there, elsewhere)`, of labels (N, *spatial) by `torch.where(box[:, 0], there, elsewhere)`.
"""

import torch


def mixup(a, b, weight):
    """weight a + (1 - weight) b, in the shape of `a` and `b`, (N, ...).

    Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018 (arXiv:1710.09412), section 1. `weight`, 0 to
    1, is a number or a tensor of N of them, one a sample.
    """
    if isinstance(weight, torch.Tensor) and weight.dim():
        kind = a.dtype if a.is_floating_point() else weight.dtype  # not rounded to the integers of labels
        weight = weight.to(a.device, kind, non_blocking=True).view(-1, *[1] * (a.dim() - 1))
    return weight * a + (1 - weight) * b


def inner_box(size, share, device=None):
    """Bool (1, 1, *size), True inside one box with sides floor(share * side), or 1, at a place where it fits, all
    equally likely.

    Bai et al., "Bidirectional Copy-Paste for Semi-Supervised Medical Image Segmentation", CVPR 2023 (arXiv:2305.00673),
    section 3.1, where share is 2/3 and the mask M is what lies outside. ValueError for a share outside 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"a box of {share} of each side: take a share from 0 to 1")
    # Two thirds of 96 are 64, however rounded; a patch one slice thick has boxes of one slice.
    edges = torch.tensor([[max(int(share * side + 1e-6), 1) if share else 0 for side in size]])
    corners = torch.stack([torch.randint(side - edge + 1, ()) for side, edge in zip(size, edges[0], strict=True)])
    return _boxes(corners[None], edges, size, device)


def cutmix_boxes(number, size, device=None, p=0.5, shares=(0.02, 0.4), aspects=(0.3, 1 / 0.3)):
    """Bool (number, 1, *size), True inside a random box in each mask, which is empty with probability 1 - `p`.

    CutMix (Yun et al., ICCV 2019, arXiv:1905.04899) with the boxes of UniMatch's code (Yang et al., CVPR 2023,
    arXiv:2208.09910): a box takes s of the volume, drawn evenly from `shares`, and has the aspect r, drawn evenly from
    `aspects`. Of d sides, its edges are (s/r)^(1/d) of the first, (s r)^(1/d) of the second and s^(1/d) of any other,
    rounded down, but to 1 at least. Aspect and corner are drawn again until the box lies inside. ValueError for shares
    outside 0 to 1, and where no box of these shares and aspects can.
    """
    if not 0 <= shares[0] <= shares[1] <= 1:
        raise ValueError(f"boxes of {shares[0]} to {shares[1]} of the volume: take shares from 0 to 1")
    squarest = min(max(aspects[0], 1), aspects[1])
    if shares[1] * max(squarest, 1 / squarest) > 1:
        raise ValueError(f"boxes of {shares[1]} of the volume with aspects {aspects} do not fit: take smaller ones")
    dims, sides = len(size), torch.tensor(size)
    volume = _evenly(number, shares)
    edges = corners = torch.zeros(number, dims, dtype=torch.long)
    misfit = torch.ones(number, 1, dtype=torch.bool)
    while misfit.any():
        aspect = _evenly(number, aspects)
        relative = torch.stack([volume / aspect, volume * aspect, *[volume] * (dims - 2)], dim=1) ** (1 / dims)
        edges = torch.where(misfit, (relative * sides).long().clamp_min(1), edges)
        corners = torch.where(misfit, (torch.rand(number, dims) * sides).long(), corners)
        misfit = (corners + edges > sides).any(dim=1, keepdim=True)
    return _boxes(corners, edges * (torch.rand(number, 1) < p), size, device)


def centred_boxes(number, size, device=None, alpha=4.0):
    """Bool (number, 1, *size), True inside one box in each mask, as far as the box lies inside the volume.

    CutMix with the boxes of AD-MT's code (Zhao et al., ECCV 2024, arXiv:2311.17325): its edges are sqrt(1 - l) of each
    side, rounded down, but to 1 at least, with l from Beta(alpha, alpha). Its centre lies beyond the first eighth of
    each side.
    """
    sides = torch.tensor(size)
    edges = ((1 - torch.distributions.Beta(alpha, alpha).sample((number, 1))).sqrt() * sides).long().clamp_min(1)
    centres = sides // 8 + (torch.rand(number, len(size)) * (sides - sides // 8)).long()
    return _boxes(centres - edges // 2, edges, size, device)


def _evenly(number, limits):
    """`number` draws from the uniform distribution between the `limits`."""
    return limits[0] + (limits[1] - limits[0]) * torch.rand(number)


def _boxes(corners, edges, size, device):
    """Bool (N, 1, *size), True inside the boxes with these `corners` and `edges`, both (N, len(size))."""
    inside, ends = torch.ones((), dtype=torch.bool, device=device), corners + edges
    for axis, side in enumerate(size):
        along = torch.arange(side)
        along = (along >= corners[:, axis, None]) & (along < ends[:, axis, None])
        along = along.view(-1, 1, *[side if axis == other else 1 for other in range(len(size))])
        inside = inside & along.to(device, non_blocking=True)
    return inside
