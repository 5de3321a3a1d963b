"""Rows: a whole volume, and a large image, in windows."""

import functools
import math

import family
import numpy as np
import torch
import torch.nn.functional as F
from measure import CPU, apart, by_turns, differences, grown_by, has, row

from mtseg.allocator import keep_freed_memory
from mtseg.networks.unet import UNetSSL4MIS
from mtseg.networks.vnet import VNet
from mtseg.sliding_window import optimize_for_inference, test_single_case
from mtseg.winograd import winograd_convolutions
from rows.steps import CLASSES, PLAIN, compiler_error
from rows.volumes import LA_PATCH, SMALL_PATCH


def sliding_window(quick, scratch, device=CPU):
    """A whole volume in windows with the strides of the protocol, 18 and 4."""
    if quick:
        yield windows_row((40, 36, 20), (32, 32, 16), 2, device, rounds=2)
    elif device.type == "cpu":
        yield windows_row((96, 70, 44), SMALL_PATCH, 16, device, rounds=3)
        yield windows_row((130, 130, 84), LA_PATCH, 16, device, rounds=2)  # a part of LA's size: a window takes seconds
    else:
        yield windows_row((183, 140, 88), LA_PATCH, 16, device, rounds=5)


def sliding_window_2d(quick, scratch):
    """An image in windows that overlap by a quarter, by SSL4MIS's U-Net; the family shrinks images instead."""
    yield windows_row((200, 150), (64, 64), 16, CPU, 2) if quick else windows_row((4096, 4096), (256, 256), 16, CPU, 2)


def windows_row(shape, patch_size, n_filters, device, rounds):
    """One volume or image of `shape` with every way of segmenting it."""
    results, peaks, dims = {}, {}, len(shape)
    no_compiler = compiler_error() if device.type == "cpu" else "on a GPU there is no --winograd"
    names = ["mtseg", *([PLAIN] if no_compiler is None else []), *(["family"] if dims == 3 else [])]
    names += ["MONAI"] if has("monai") else []
    with apart(
        {name: (windows_way, name, shape, patch_size, n_filters, device, not no_compiler) for name in names}
    ) as ways:

        def listen(name, turn):
            label_map, score_map, grown = ways[name](turn)
            results[name] = label_map, score_map
            peaks[name] = max(peaks.get(name, 0), math.nan if grown is None else grown)

        times = by_turns({name: functools.partial(listen, name) for name in ways}, rounds, warm_up=0)
    label_map, score_map = results["mtseg"]
    differing, differs = {}, []
    for name, (labels, scores) in results.items():
        differs += differences(f"scores of mtseg and {name}", score_map, scores, atol=1e-5)
        differing[name] = int((labels != label_map).sum())
    what = f"sliding window, {'x'.join(map(str, shape))} in windows of {'x'.join(map(str, patch_size))}"
    note = f"{no_compiler or 'with --winograd'}; voxels labelled differently: {differing}"
    if dims == 2:
        grown = ", ".join(f"{name} {peak / 2**20:.0f} MiB" for name, peak in peaks.items())
        held = (4 * CLASSES + 8) * math.prod(shape) / 2**20
        note += f"; scores and label map take {held:.0f} MiB, and the process grew by {grown}"
        return row(what, times, note, {"MONAI": 2}, differs)
    return row(what, times, note, {"family": 1.5 if device.type == "cpu" else 6}, differs)


def windows_way(name, shape, patch_size, n_filters, device, compiled):
    """One way of `windows_row`, warmed up on two windows: a function that returns label map and score map, of images
    every seventh pixel of the latter, and the bytes by which the process grew at the most."""
    torch.manual_seed(0)
    dims, classes = len(shape), 2 if len(shape) == 3 else CLASSES
    strides = (18, 18, 4) if dims == 3 else tuple(3 * side // 4 for side in patch_size)
    kind = VNet if dims == 3 else UNetSSL4MIS
    net = kind(1, classes, n_filters, "batchnorm", has_dropout=True).to(device).eval()
    image = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    if name.startswith("mtseg") and device.type == "cpu":
        keep_freed_memory()  # as inference.py does
    folded = optimize_for_inference(net)
    if name == "mtseg" and compiled:
        winograd_convolutions(folded)

    def ours(image):
        return test_single_case(folded, image, strides[0], strides[-1], patch_size, classes)

    def familys(image):
        return family.test_single_case(net, image, 18, 4, patch_size, 2, device)

    def monais(image):
        from monai.inferers import sliding_window_inference

        overlap = [1 - (stride + 0.5) / side for stride, side in zip(strides, patch_size, strict=True)]
        volume = torch.from_numpy(image)[None, None].to(device)
        with torch.no_grad():
            score = sliding_window_inference(volume, patch_size, 4, lambda x: F.softmax(net(x), dim=1), overlap)[0]
        return score.argmax(dim=0).cpu().numpy(), score.cpu().numpy()

    way = {"mtseg": ours, PLAIN: ours, "family": familys, "MONAI": monais}[name]
    way(image[tuple(map(slice, (patch_size[0] + strides[0], *patch_size[1:])))])

    def told(turn):
        (labels, scores), grown = grown_by(lambda: way(image))
        return (labels, scores, grown) if dims == 3 else (labels.astype(np.uint8), scores[:, ::7, ::7], grown)

    return told
