"""Batch norm by the statistics of the case at hand, for cases that look unlike those of the training."""

import copy
import math

import torch
from torch import nn

AT_A_TIME = 16  # windows, whatever the device: what a case's statistics are must not depend on its memory


@torch.no_grad()
def with_case_statistics(net, windows, share):
    """A copy of `net`, in eval mode, whose batch norms have the means and variances
        share * those of the case + (1 - share) * those of the training,
    as Schneider et al., "Improving robustness against common corruptions by covariate shift adaptation", NeurIPS 2020
    (arXiv:2006.16971), mix them, but with a share that is given instead of one by the number of samples.

    `net`: in eval mode, so that nothing drops; its weights stay as they are. `windows`: float (N, C, *patch), patches
    that cover the case; at most 16 pass at a time, and of several such batches the statistics are averaged. `share`: in
    [0, 1]; 0 changes nothing, 1 forgets the training's. Raises ValueError where the network has no batch norm, and
    where there is one window alone that has a single voxel on a level, and so no variance.
    """
    net = copy.deepcopy(net)
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]
    if not norms:
        raise ValueError("the network has no batch norm")
    device = norms[0].running_mean.device
    learned = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    for batch in windows.tensor_split(math.ceil(len(windows) / AT_A_TIME)):
        try:
            net(batch.to(device))
        except ValueError as error:
            raise ValueError("of one window alone, a level of one voxel has no variance") from error
    for norm, (mean, variance) in zip(norms, learned, strict=True):
        norm.eval()
        norm.running_mean.lerp_(mean, 1 - share)
        norm.running_var.lerp_(variance, 1 - share)
    return net
