"""Rows: a step of masked reconstruction beside a supervised one of the same network and batch."""

import torch
import torch.nn.functional as F
from measure import CPU, apart, by_turns, ratio, row

from mtseg.allocator import keep_freed_memory
from mtseg.losses import multiclass_dice_loss
from mtseg.masking import Reconstructor, corrupted, squared_errors
from mtseg.networks.vnet import VNet
from rows.steps import batch_of
from rows.volumes import LA_PATCH, SMALL_PATCH


def pretraining_step(quick, scratch):
    """Hiding, reconstruction, loss and update, and the like of a supervised step, V-Net, batches of 4."""
    for size, rounds in [(SMALL_PATCH, 2)] if quick else [(SMALL_PATCH, 7), (LA_PATCH, 3)]:
        ways = {name: (step_way, name, size) for name in ("mtseg", "mtseg, sparse", "supervised")}
        with apart(ways) as ways:
            times = by_turns(ways, rounds)
        words = "x".join(map(str, size))
        goal = {"at most 1.1 x a supervised step": ratio(times, "supervised") >= 1 / 1.1}
        yield row(f"masked reconstruction on the CPU, patches of {words}", times, **goal)


def step_way(name, size):
    """One way of `pretraining_step`: a function of the turn."""
    keep_freed_memory()
    torch.manual_seed(0)
    volume, label, _ = batch_of(size, CPU, half=4)
    volume, supervised = volume[:4], name == "supervised"
    net = VNet(1, 2 if supervised else 1, 16, "batchnorm", has_dropout=True).to(memory_format=torch.channels_last_3d)
    net = net if supervised else Reconstructor(net, sparse=name.endswith("sparse"))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def way(turn):
        if supervised:
            output = net(volume)
            loss = 0.5 * (F.cross_entropy(output, label) + multiclass_dice_loss(output, label))
        else:
            seen, hidden = corrupted(volume, "masked", 16, 0.75)
            loss = squared_errors(net(seen), volume, hidden).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return way
