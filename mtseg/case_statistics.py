"""Batch norm by the statistics of the case at hand, for cases that look unlike those of the training."""

import copy
import math

import torch
from torch import nn

AT_A_TIME = 2**22  # voxels of windows, whatever the device: a case's statistics must not depend on its memory
FEWEST = 16  # values of a channel, of which a variance says something


def batch_norms(net):
    """The batch norms of `net` that keep statistics of the training."""
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [norm for norm in norms if norm.running_mean is not None]


@torch.no_grad()
def with_case_statistics(net, windows, share):
    """A copy of `net` whose batch norms have the means and variances
        share * those of the case + (1 - share) * those of the training,
    as Schneider et al., "Improving robustness against common corruptions by covariate shift adaptation", NeurIPS 2020
    (arXiv:2006.16971), mix them, but with a share that is given instead of one by the number of samples. What a layer
    sees of the case has gone through the mixtures of those before it.

    `net`: in eval mode, so that nothing drops; it stays as it is. `windows`: float (N, C, *patch), patches that cover
    the case. At most 4 million voxels of them pass at a time, each such batch from all over the case; moments are those
    of all. `share`: in [0, 1]; 0 changes nothing, 1 forgets the training's. A layer with fewer than 16 values a channel
    keeps the training's, as that of a pooled image.
    """
    net = copy.deepcopy(net)
    moments = {norm: _Moments(norm, share) for norm in batch_norms(net)}
    hooks = [norm.register_forward_pre_hook(see) for norm, see in moments.items()]
    device = next((norm.running_mean.device for norm in moments), windows.device)
    batches = math.ceil(windows[:, 0].numel() / AT_A_TIME)
    for first in range(min(batches, len(windows))):
        net(windows[first::batches].to(device))
    for hook, see in zip(hooks, moments.values(), strict=True):
        hook.remove()
        see.use(see.total / max(see.count, 1), see.count)
    return net


class _Moments:
    """Of a batch norm: sees what goes into it, and sets its statistics."""

    def __init__(self, norm, share):
        self.norm, self.share = norm, share
        self.learned = norm.running_mean.clone(), norm.running_var.clone()
        self.total, self.count = torch.zeros_like(torch.stack(self.learned), dtype=torch.double), 0

    def __call__(self, _, inputs):
        values = inputs[0].float().transpose(0, 1).flatten(1)  # squares overflow float16
        variance, mean = (moment.double() for moment in torch.var_mean(values, 1, correction=0))
        moments, count = torch.stack([mean, variance + mean**2]), values.shape[1]
        self.use(moments, count)
        self.total, self.count = self.total + count * moments, self.count + count

    def use(self, moments, count):
        """Set the mixture with a mean and a mean square a channel, (2, C), over `count` values each."""
        mean, square = moments
        case = (mean, square - mean**2) if count >= FEWEST else self.learned
        for mixed, learned, own in zip(
            (self.norm.running_mean, self.norm.running_var), self.learned, case, strict=True
        ):
            mixed.copy_(torch.lerp(learned, own.to(learned), self.share))
