"""How the UA-MT / LASeg / SSL4MIS family does it, written anew: what run.py measures mtseg against.

Deliberately plain: a sample reads its whole file, turns the whole volume and crops last; a step is float32, with a
loop over the teacher's tensors and a wait for the loss in each iteration; a window goes to the device and back alone
and is added up in NumPy. Where draws are made, they are made as mtseg makes them, so that results can be compared. The
U-Net has the layers and the names of SSL4MIS's.
"""

import itertools
import math

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

CHANNELS = (16, 32, 64, 128, 256)
DROPOUT = (0.05, 0.1, 0.2, 0.3, 0.5)


def double_conv(before, after, dropout=0.0):
    one = [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.LeakyReLU(), nn.Dropout(dropout)]
    two = [nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after), nn.LeakyReLU()]
    return nn.ModuleDict({"conv_conv": nn.Sequential(*one, *two)})


class UNet(nn.Module):
    """SSL4MIS's U-Net for images (code/networks/unet.py there), with the upsampling that takes effect in its code."""

    def __init__(self, n_channels, n_classes):
        super().__init__()
        self.encoder = nn.ModuleDict({"in_conv": double_conv(n_channels, CHANNELS[0], DROPOUT[0])})
        self.decoder = nn.ModuleDict()
        for level in range(1, 5):
            layers = double_conv(CHANNELS[level - 1], CHANNELS[level], DROPOUT[level])
            self.encoder[f"down{level}"] = nn.ModuleDict({"maxpool_conv": nn.Sequential(nn.MaxPool2d(2), layers)})
            below, above = CHANNELS[5 - level], CHANNELS[4 - level]
            layers = {"conv1x1": nn.Conv2d(below, above, 1), "conv": double_conv(2 * above, above)}
            self.decoder[f"up{level}"] = nn.ModuleDict(layers)
        self.decoder["out_conv"] = nn.Conv2d(CHANNELS[0], n_classes, 3, padding=1)

    def forward(self, x):
        features = [self.encoder["in_conv"]["conv_conv"](x)]
        for level in range(1, 5):
            pool, layers = self.encoder[f"down{level}"]["maxpool_conv"]
            features.append(layers["conv_conv"](pool(features[-1])))
        x = features.pop()
        for level in range(1, 5):
            layers = self.decoder[f"up{level}"]
            x = F.interpolate(layers["conv1x1"](x), scale_factor=2, mode="bilinear", align_corners=True)
            x = layers["conv"]["conv_conv"](torch.cat([features.pop(), x], dim=1))
        return self.decoder["out_conv"](x)


def sample(path, patch_size, rng):
    """A training sample of the HDF5 file `path`: read, rotate and flip the volume, crop, make tensors."""
    with h5py.File(path, "r") as file:
        image, label = file["image"][:], file["label"][:]
    turns, axis = int(rng.integers(4)), int(rng.integers(2))
    image, label = np.rot90(image, turns), np.rot90(label, turns)
    image, label = np.flip(image, axis=axis).copy(), np.flip(label, axis=axis).copy()
    missing = [max(wanted - side, 0) for side, wanted in zip(label.shape, patch_size, strict=True)]
    if any(missing):
        widths = [(m // 2, m - m // 2) for m in missing]
        image, label = np.pad(image, widths), np.pad(label, widths)
    w, h, d = (int(rng.integers(side - wanted + 1)) for side, wanted in zip(label.shape, patch_size, strict=True))
    window = (slice(w, w + patch_size[0]), slice(h, h + patch_size[1]), slice(d, d + patch_size[2]))
    image = image[window].reshape(1, *patch_size).astype(np.float32)
    return {"image": torch.from_numpy(image), "label": torch.from_numpy(label[window].copy()).long()}


def dice_loss(score, target):
    target = target.float()
    intersection = torch.sum(score * target)
    return 1 - (2 * intersection + 1e-5) / (torch.sum(score * score) + torch.sum(target * target) + 1e-5)


def update_ema_variables(model, ema_model, alpha, global_step):
    alpha = min(1 - 1 / (global_step + 1), alpha)
    for ema_param, param in zip(ema_model.parameters(), model.parameters(), strict=True):
        ema_param.data.mul_(alpha).add_(param.data, alpha=1 - alpha)


def mean_teacher_step(model, ema_model, optimizer, volume, label, noise, weight, iteration, classes=(1,)):
    """One iteration on a batch whose first half is labelled, in float32; returns the loss as a number.

    `classes`: those in the Dice loss, on LA the foreground alone, in SSL4MIS all.
    """
    labeled_bs = len(label)
    outputs = model(volume)
    with torch.no_grad():
        ema_output = ema_model(volume[labeled_bs:] + noise)
    soft = F.softmax(outputs, dim=1)
    dice = sum(dice_loss(soft[:labeled_bs, c], label == c) for c in classes) / len(classes)
    supervised = 0.5 * (F.cross_entropy(outputs[:labeled_bs], label) + dice)
    consistency = torch.mean((soft[labeled_bs:] - F.softmax(ema_output, dim=1)) ** 2)
    loss = supervised + weight * consistency
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    update_ema_variables(model, ema_model, 0.99, iteration)
    return loss.item()


def test_single_case(net, image, stride_xy, stride_z, patch_size, num_classes, device):
    """(label_map, score_map) of an image (W, H, D) that is not smaller than the patch, one window at a time."""
    sizes = image.shape
    strides = (stride_xy, stride_xy, stride_z)
    steps = [math.ceil((s - p) / t) + 1 for s, p, t in zip(sizes, patch_size, strides, strict=True)]
    score_map = np.zeros((num_classes, *sizes), dtype=np.float32)
    cnt = np.zeros(sizes, dtype=np.float32)
    for x, y, z in itertools.product(*map(range, steps)):
        xs, ys = min(stride_xy * x, sizes[0] - patch_size[0]), min(stride_xy * y, sizes[1] - patch_size[1])
        zs = min(stride_z * z, sizes[2] - patch_size[2])
        window = (slice(xs, xs + patch_size[0]), slice(ys, ys + patch_size[1]), slice(zs, zs + patch_size[2]))
        patch = torch.from_numpy(image[window][None, None].astype(np.float32)).to(device)
        with torch.no_grad():
            y1 = F.softmax(net(patch), dim=1)
        score_map[(slice(None), *window)] += y1.cpu().numpy()[0]
        cnt[window] += 1
    score_map = score_map / cnt[None]
    return np.argmax(score_map, axis=0), score_map


test_single_case.__test__ = False  # the family's name for it; not a test, whatever pytest thinks
