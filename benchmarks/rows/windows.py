"""Rows: a whole volume in windows."""

import functools

import family
import numpy as np
import torch
import torch.nn.functional as F
from measure import CPU, GPU, apart, by_turns, differences, has, row

from mtseg.allocator import keep_freed_memory
from mtseg.networks.vnet import VNet
from mtseg.sliding_window import optimize_for_inference, test_single_case
from mtseg.winograd import winograd_convolutions
from rows.steps import PLAIN, compiler_error
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


def windows_row(shape, patch_size, n_filters, device, rounds):
    """One volume of `shape` with every way of segmenting it."""
    results = {}
    no_compiler = compiler_error() if device.type == "cpu" else "on a GPU there is no --winograd"
    names = ["mtseg", *([PLAIN] if no_compiler is None else []), "family", *(["MONAI"] if has("monai") else [])]
    with apart(
        {name: (windows_way, name, shape, patch_size, n_filters, device, not no_compiler) for name in names}
    ) as ways:

        def listen(name, turn):
            results[name] = ways[name](turn)

        times = by_turns({name: functools.partial(listen, name) for name in ways}, rounds, warm_up=0)
    label_map, score_map = results["mtseg"]
    differing, differs = {}, []
    for name, (labels, scores) in results.items():
        differs += differences(f"scores of mtseg and {name}", score_map, scores, atol=1e-5)
        differing[name] = int((labels != label_map).sum())
    what = f"sliding window, {'x'.join(map(str, shape))} in windows of {'x'.join(map(str, patch_size))}"
    note = f"{no_compiler or 'with --winograd'}; voxels labelled differently: {differing}"
    return row(what, times, note, {"family": 1.5 if device.type == "cpu" else 6}, differs)


def windows_way(name, shape, patch_size, n_filters, device, compiled):
    """One way of `windows_row`: a function that returns (label_map, score_map), warmed up on two windows."""
    torch.manual_seed(0)
    net = VNet(1, 2, n_filters, "batchnorm", has_dropout=True).to(device).eval()
    image = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    if name.startswith("mtseg") and device.type == "cpu":
        keep_freed_memory()  # as inference.py does
    folded = optimize_for_inference(net)
    if name == "mtseg" and compiled:
        winograd_convolutions(folded)

    def ours(image):
        return test_single_case(folded, image, 18, 4, patch_size, 2)

    def familys(image):
        return family.test_single_case(net, image, 18, 4, patch_size, 2, device)

    def monais(image):
        from monai.inferers import sliding_window_inference

        overlap = [1 - (stride + 0.5) / side for stride, side in zip((18, 18, 4), patch_size, strict=True)]
        volume = torch.from_numpy(image)[None, None].to(device)
        with torch.no_grad():
            score = sliding_window_inference(volume, patch_size, 4, lambda x: F.softmax(net(x), dim=1), overlap)[0]
        return score.argmax(dim=0).cpu().numpy(), score.cpu().numpy()

    way = {"mtseg": ours, PLAIN: ours, "family": familys, "MONAI": monais}[name]
    way(image[tuple(map(slice, (patch_size[0] + 18, *patch_size[1:])))])
    return lambda turn: way(image)


def gpu_sliding_window(quick, scratch):
    """A whole volume in windows on the GPU."""
    return sliding_window(quick, scratch, GPU)
