"""Signed distance maps: how far each voxel lies from the surface of a class, and a head that predicts it.

Everything stays on the device of its input, and nothing waits for a GPU.
"""

import torch
from torch import nn


def squared_distances(inside):
    """Exact squared Euclidean distance of each voxel to the nearest one that is not `inside`, infinite without any.

    `inside` bool (N, C, *spatial); float32 of the same shape, in voxels. One axis after the other, as Felzenszwalb and
    Huttenlocher, "Distance Transforms of Sampled Functions", Theory of Computing 2012: the minimum over the places q of
    a row of f(q) + (p - q)^2. Here it is sought plane by plane, which a device computes as a whole.
    """
    squared = torch.where(inside, torch.inf, 0.0)
    for axis in range(2, inside.dim()):
        places = torch.arange(inside.shape[axis], device=inside.device, dtype=torch.float32)
        offsets = (places[:, None] - places).square().view(len(places), -1, *[1] * (inside.dim() - 1 - axis))
        squared = torch.stack([(squared + offset).amin(axis) for offset in offsets], axis)
    return squared


def signed_distances(labels, num_classes):
    """The signed distance maps of the classes 1 .. num_classes - 1, float32 (N, num_classes - 1, *spatial).

    `labels` integer from 0, (N, *spatial); a voxel of no class, whose label is num_classes or more, may be of any: no
    class ends there, and its own distances are 0. Scaled as SASSNet and DTC scale them (Li et al., MICCAI 2020,
    arXiv:2007.10732; Luo et al., AAAI 2021, arXiv:2009.04448), each map by itself: outside the distance to the class by
    its largest value, in (0, 1]; inside minus the distance to what is not the class by its largest value, in [-1, 0); 0
    on the surface, the voxels of the class with a neighbour across a face outside it.
    A map without a surface, of a class that is nowhere or everywhere, is 0.
    """
    classes = torch.arange(1, num_classes, device=labels.device).view(-1, *[1] * (labels.dim() - 1))
    inside = labels.unsqueeze(1) == classes
    unknown = (labels >= num_classes).unsqueeze(1)
    depth, distance = squared_distances(torch.cat([inside | unknown, ~inside], 1)).sqrt().chunk(2, 1)
    depth, distance = depth.masked_fill(unknown, 0), distance.masked_fill(unknown, 0)
    spatial = tuple(range(2, inside.dim()))
    surface = depth == 1
    signed = distance / distance.amax(spatial, keepdim=True) - depth / depth.amax(spatial, keepdim=True)
    return torch.where(surface | ~surface.amax(spatial, keepdim=True), 0, signed)


class WithDistances(nn.Module):
    """The network `net` with a head for signed distances; what it gives is a list, the distances last.

    `net` has encode, decode, classify and channels, as VNet and UNet have. The head is a 1 x 1 convolution of the
    decoder's finest features, then tanh: (N, num_classes - 1, *spatial) in (-1, 1).
    """

    def __init__(self, net, num_classes, dims):
        super().__init__()
        self.net = net
        self.head = (nn.Conv2d, nn.Conv3d)[dims - 2](net.channels[0], num_classes - 1, 1)

    def forward(self, batch):
        decoded = self.net.decode(self.net.encode(batch))
        logits = self.net.classify(decoded)
        return [*(logits if isinstance(logits, list) else [logits]), torch.tanh(self.head(decoded[0]))]
