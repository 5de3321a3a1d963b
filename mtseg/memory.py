"""Less memory for the same gradients: batches in parts, and activations recomputed instead of stored."""

import contextlib
import functools

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


@contextlib.contextmanager
def frozen_statistics(net):
    """A context in which forward passes leave the running statistics of `net`'s batch norms as they are."""
    layers = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    kept = [(layer.momentum, layer.num_batches_tracked.clone()) for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, (momentum, batches) in zip(layers, kept, strict=True):
            layer.momentum = momentum
            layer.num_batches_tracked.copy_(batches)


def recomputed(function, net):
    """`function`, a forward pass through `net`, that stores its input alone and is run again in the backward pass.

    Dropout draws the same again, and running statistics are updated once, as without it.
    """

    def contexts():
        return contextlib.nullcontext(), frozen_statistics(net)

    return functools.partial(checkpoint, function, use_reentrant=False, context_fn=contexts)


def checkpoint_blocks(net):
    """Make every block of `net`, a child of several layers, recompute its activations; returns `net`.

    Chen et al., "Training Deep Nets with Sublinear Memory Cost" (arXiv:1604.06174): about a third more time. Names and
    shapes of the state_dict stay. Copy a network before, not after: a copy would run the layers of the original.
    """
    for child in net.children():
        # A list of blocks, or a network, an encoder or a decoder of blocks.
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) or hasattr(child, "decode") or hasattr(child, "stem"):
            checkpoint_blocks(child)
        elif len(list(child.modules())) > 1:
            child.forward = recomputed(child.forward, child)
    return net


class InParts(nn.Module):
    """`net` on a batch in `parts` parts, one after the other, the activations of one part in memory at a time.

    The outputs of all parts come joined in the batch's order, so that any loss over the batch, also one that is no mean
    over samples like the Dice of a batch, has the gradient it has with `parts=1`, if the normalization does not depend
    on the batch and nothing drops. (Batch norm normalises every part by itself, and dropout draws other masks.) Part k
    holds the samples k, k + parts, ...: labelled and unlabelled ones alike; where `parts` does not divide the batch,
    the first parts have a sample more. The price is a second forward pass of every part, in the backward pass.
    """

    def __init__(self, net, parts):
        super().__init__()
        self.net = net
        self.parts = parts
        self.part = recomputed(net, net) if parts > 1 else net

    def forward(self, batch):
        outputs = [self.part(batch[k :: self.parts]) for k in range(min(self.parts, len(batch)))]
        if isinstance(outputs[0], (list, tuple)):
            return [join(level) for level in zip(*outputs, strict=True)]
        return join(outputs)


def join(parts):
    """One batch of what went apart as batch[0::n], batch[1::n], ..."""
    if len(parts) == 1:
        return parts[0]
    shortest = len(parts[-1])
    rows = torch.stack([part[:shortest] for part in parts], dim=1).flatten(0, 1)
    longer = [part[shortest:] for part in parts if len(part) > shortest]
    return torch.cat([rows, *longer]) if longer else rows
