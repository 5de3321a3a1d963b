"""Learning without labels by reconstruction: hidden blocks, sparse convolutions, and the corruptions of Models Genesis.

Images are float (N, C, *spatial) with two or three spatial dimensions, and should have mean 0, which hidden voxels get.
All that is random is drawn from PyTorch's CPU generator, so that it is the same on every device.
"""

import contextlib
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

# Probabilities of the corruptions of Models Genesis; the last is that of painting around the image instead of in it.
CURVED, SHUFFLED, PAINTED, AROUND = 0.9, 0.5, 0.9, 0.8


def hidden_blocks(number, size, block, ratio, device=None):
    """Bool (number, 1, *size), True where a voxel is hidden: of the blocks of `block` voxels a side exactly int(ratio x
    blocks) in each mask, drawn without replacement.

    He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022 (arXiv:2111.06377), section 3; in volumes
    Wald et al., CVPR 2025 (arXiv:2410.23132). ValueError for a block that does not divide the sides, and for a ratio
    that hides no block or all of them.
    """
    hidden, blocks = hidden_count(size, block, ratio)
    count = math.prod(blocks)
    if any(side % block for side in size) or not 0 < hidden < count:
        raise ValueError(f"{hidden} of {count} blocks of {block} voxels a side in {tuple(size)}: hide some, not all")
    order = torch.rand(number, count).argsort(1).argsort(1)
    return resized((order < hidden).view(number, 1, *blocks).to(device, non_blocking=True), size)


def hidden_count(size, block, ratio):
    """(how many blocks of `block` voxels a side are hidden in `size`, the numbers of blocks along its sides)."""
    blocks = [side // block for side in size]
    return int(ratio * math.prod(blocks) + 1e-6), blocks


def resized(mask, size):
    """A bool `mask` (N, 1, *blocks) at `size`; True everywhere where that is smaller than the mask along some axis:
    features that are coarser than a block see into hidden ones anyway."""
    if any(side < blocks for side, blocks in zip(size, mask.shape[2:], strict=True)):
        return mask.new_ones(len(mask), 1, *size)
    return F.interpolate(mask.float(), tuple(size), mode="nearest") > 0.5


def corrupted(images, pretext, block, ratio):
    """(input of a Reconstructor, hidden) of `images`: with the `pretext` 'masked' what is in hidden blocks is 0, and
    `hidden` says where that is; 'genesis' corrupts them, 'autoencoder' leaves them as they are; `hidden` is None then.
    """
    if pretext == "masked":
        hidden = hidden_blocks(len(images), images.shape[2:], block, ratio, images.device)
        return torch.cat([images.masked_fill(hidden, 0), hidden.to(images)], dim=1), hidden
    seen = genesis(images) if pretext == "genesis" else images
    return torch.cat([seen, torch.zeros_like(images[:, :1])], dim=1), None


def squared_errors(output, image, counted=None):
    """(N,): of each sample the mean over channels and voxels of (output - image)^2, where `counted`, bool (N, 1,
    *spatial), is True; by default everywhere."""
    errors = (output - image).square().mean(1).flatten(1)
    if counted is None:
        return errors.mean(1)
    counted = counted.flatten(1)
    return (errors * counted).sum(1) / counted.sum(1)


class Reconstructor(nn.Module):
    """A network as it is trained to reconstruct images: `net`, with the methods encode, decode and classify.

    Input: (N, C + 1, *spatial), as `corrupted` gives it: the image as the network may see it, and in the last channel 1
    where it is hidden. Output: (N, C, *spatial), of a `net` with C classes; no channel is dropped. `skips=False`: the
    decoder gets the coarsest features alone, so that it cannot copy. `sparse`: voxels in hidden blocks of `block` a
    side stay hidden through the encoder, see `visible_only`, and in the features that the decoder gets a learned token
    stands in their place, one of `tokens` a level (Tian et al., "Designing BERT for Convolutional Networks", ICLR
    2023, arXiv:2301.03580). The weights of `net` are those of the plain network, which can be fine-tuned.
    """

    def __init__(self, net, skips=True, sparse=False, block=16):
        super().__init__()
        self.net, self.skips, self.block, self.tokens = net, skips, block, None
        if sparse:
            channels = getattr(net.encoder, "channels", net.channels) if hasattr(net, "encoder") else net.channels
            self.tokens = nn.ParameterList(nn.init.trunc_normal_(torch.empty(c, 1), std=0.02) for c in channels)

    def forward(self, x):
        image, visible = x[:, :-1], x[:, -1:] < 0.5
        if self.tokens is None:
            features = self.net.encode(image, turnoff_drop=True)
        else:
            features = self.sparse_features(image, visible[(..., *[slice(None, None, self.block)] * (x.dim() - 2))])
        if not self.skips:
            features = [*map(torch.zeros_like, features[:-1]), features[-1]]
        output = self.net.classify(self.net.decode(features, turnoff_drop=True))
        return output if isinstance(output, torch.Tensor) else output[0]

    @torch.compiler.disable  # it would not see the hooks
    def sparse_features(self, image, visible):
        """The encoder's features, finest first, with the level's token where `visible`, (N, 1, *blocks), is False."""
        with visible_only(self.net, visible):
            features = self.net.encode(image, turnoff_drop=True)
        return [
            torch.where(resized(visible, level.shape[2:]), level, token.view(-1, *[1] * (level.dim() - 2)))
            for level, token in zip(features, self.tokens, strict=True)
        ]


@contextlib.contextmanager
def visible_only(net, visible):
    """A context in which forward passes of `net`, on images with 0 in hidden places, see none of these anywhere, though
    all convolutions are dense.

    `visible`: bool (N, 1, *blocks). What convolutions, pooling and normalizations give is set to 0 in hidden places,
    and the latter have the mean and variance of the visible ones, at every level as far as it is not coarser than a
    block (Tian et al., section 3.1: the same as sparse convolution). Layer norm is not among them.
    """

    def hide(_, __, output):
        return output * resized(visible, output.shape[2:])

    hooks, kinds = [], (nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm)
    norms = [module for module in net.modules() if isinstance(module, kinds)]
    try:
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.MaxPool2d, nn.MaxPool3d)):
                hooks.append(module.register_forward_hook(hide))
        for module in norms:
            module.forward = functools.partial(normalized, module, visible)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in norms:
            module.__dict__.pop("forward", None)


def normalized(module, visible, x):
    """What the normalization `module` makes of `x` (N, C, *spatial) with mean and variance over what is `visible`, bool
    (N, 1, *blocks), and 0 elsewhere. Batch norm's running statistics are not touched."""
    mask = resized(visible, x.shape[2:])
    groups = module.num_groups if isinstance(module, nn.GroupNorm) else x.shape[1]
    # (N, G, C / G, *spatial), in float32: half precision cannot count voxels.
    grouped, weights = x.float().unflatten(1, (groups, -1)), mask.float().unsqueeze(1)
    axes = [*range(2, grouped.dim())]
    axes = [0, *axes] if isinstance(module, nn.modules.batchnorm._BatchNorm) else axes
    count = weights.expand_as(grouped).sum(axes, keepdim=True)
    mean = (grouped * weights).sum(axes, keepdim=True) / count
    variance = ((grouped - mean).square() * weights).sum(axes, keepdim=True) / count
    y = ((grouped - mean) * (variance + module.eps).rsqrt()).flatten(1, 2)
    if module.weight is not None:
        shape = (-1, *[1] * (x.dim() - 2))
        y = y * module.weight.view(shape) + module.bias.view(shape)
    return (y * mask).to(x.dtype)


def genesis(images):
    """`images` corrupted as Models Genesis corrupts them, one by one; what is learned is to restore them.

    Zhou et al., "Models Genesis", MICCAI 2019 and MedIA 2021 (arXiv:2004.07882), section 3: a random curve over the
    intensities, voxels shuffled within small boxes, and boxes painted over with noise, in the image or around it.
    Their code draws the boxes in other numbers and sizes; those of a shuffle are here of one random grid, so that
    nothing loops over voxels.
    """
    results = []
    for image in images:
        low, high = image.amin(), image.amax()
        x = (image - low) / (high - low).clamp(min=1e-6)
        x = _curved(x) if torch.rand(()) < CURVED else x
        x = _shuffled(x) if torch.rand(()) < SHUFFLED else x
        x = _painted(x) if torch.rand(()) < PAINTED else x
        results.append(x * (high - low) + low)
    return torch.stack(results)


def _curved(x):
    """Values from 0 to 1 along a cubic Bezier curve with random control points, rising or falling."""
    t = torch.linspace(0, 1, 1001)
    (x1, x2), (y1, y2) = torch.rand(2, 2).sort(1).values
    along = 3 * t * (1 - t) ** 2 * x1 + 3 * t**2 * (1 - t) * x2 + t**3
    value = 3 * t * (1 - t) ** 2 * y1 + 3 * t**2 * (1 - t) * y2 + t**3
    value = value.flip(0) if torch.rand(()) < 0.5 else value
    place = torch.searchsorted(along, t).clamp(max=1000)
    return value[place].to(x.device, non_blocking=True)[(x * 1000).round().long()]


def _shuffled(x):
    """Voxels in disorder within half of the boxes of a grid, whose sides are at most a tenth of the image's."""
    spatial = x.shape[1:]
    sides = [min(int(torch.randint(2, max(side // 10, 2) + 1, ())), side) for side in spatial]
    cut = tuple(slice(0, side // edge * edge) for side, edge in zip(spatial, sides, strict=True))
    places = torch.arange(math.prod(spatial)).view(spatial)
    boxes = places[cut]
    for axis, edge in enumerate(sides):  # (boxes, edge, boxes, edge, ...)
        boxes = boxes.unflatten(2 * axis, (-1, edge))
    order = [*range(0, 2 * len(sides), 2), *range(1, 2 * len(sides), 2)]
    boxes = boxes.permute(order).flatten(0, len(sides) - 1).flatten(1)
    mixed = boxes.gather(1, torch.rand(boxes.shape).argsort(1))
    chosen = torch.rand(len(boxes), 1) < 0.5
    places.view(-1)[boxes.flatten()] = torch.where(chosen, mixed, boxes).flatten()
    return x.flatten(1)[:, places.flatten().to(x.device, non_blocking=True)].view(x.shape)


def _painted(x):
    """Noise in up to five boxes, or everywhere but in up to five larger ones."""
    around = bool(torch.rand(()) < AROUND)
    inside = torch.zeros(x.shape[1:], dtype=torch.bool)
    for _ in range(int(torch.randint(1, 6, ()))):
        shares = (3 / 7, 4 / 7) if around else (1 / 6, 1 / 3)
        edges = [max(int(side * (shares[0] + (shares[1] - shares[0]) * torch.rand(()))), 1) for side in inside.shape]
        corner = [int(torch.randint(side - edge + 1, ())) for side, edge in zip(inside.shape, edges, strict=True)]
        inside[tuple(slice(c, c + edge) for c, edge in zip(corner, edges, strict=True))] = True
    painted, noise = (drawn.to(x.device, non_blocking=True) for drawn in (inside != around, torch.rand(x.shape)))
    return torch.where(painted, noise, x)
