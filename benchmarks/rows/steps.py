"""Rows: a Mean Teacher iteration, on the CPU and on a GPU, its convolutions and the teacher's update."""

import copy
import functools
import math
import os
from pathlib import Path
from statistics import median

import family
import numpy as np
import torch
import torch.nn.functional as F
from measure import CPU, GPU, apart, by_turns, differences, fact, matmul_rate, resident, row
from torch import nn
from torch.utils.data import DataLoader

from mtseg.allocator import keep_freed_memory
from mtseg.cache import CachedDataset
from mtseg.ema import update_ema_variables
from mtseg.losses import multiclass_dice_loss, softmax_mse_loss
from mtseg.networks.unet import UNetSSL4MIS
from mtseg.networks.vnet import VNet
from mtseg.samplers import IterationSampler, ShuffledBatchSampler, TwoStreamBatchSampler
from mtseg.winograd import WinogradError, check_compiler, winograd_convolutions
from mtseg.winograd.convolutions import convolve, input_gradient, weight_gradient
from rows.volumes import LA_PATCH, SMALL_PATCH, la_volumes, training_set

PLAIN = "mtseg without --winograd"
CLASSES = 4  # of images, as ACDC has
LAYOUTS = (torch.contiguous_format, torch.channels_last_3d, torch.channels_last_3d)


def compiler_error():
    """None where Winograd's loops can be compiled, else why not."""
    try:
        check_compiler()
    except WinogradError as error:
        return f"without --winograd: {error}"


def mean_teacher(n_filters, device, memory_format=torch.contiguous_format, image=None):
    """A student, its teacher and the optimizer, the same for the same arguments.

    `image`: for images, 'family' for the family's own U-Net or 'mtseg' for this library's with the same weights.
    """
    torch.manual_seed(0)
    if image is None:
        model = VNet(1, 2, n_filters, "batchnorm", has_dropout=True)
    else:
        model = family.UNet(1, CLASSES)
        if image == "mtseg":
            weights, model = model.state_dict(), UNetSSL4MIS(1, CLASSES)
            model.load_state_dict(model.translate(weights))
    model = model.to(device).to(memory_format=memory_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    return model, copy.deepcopy(model).requires_grad_(False), optimizer


def step(model, ema_model, optimizer, volume, label, noise, weight, iteration, autocast=False):
    """The iteration of train_mean_teacher.py; the loss stays on the device. Of images, Dice is that of all classes."""
    labeled_bs, background = len(label), label.dim() == 3
    with torch.autocast(volume.device.type, torch.bfloat16, enabled=autocast):
        outputs = model(volume)
        with torch.no_grad():
            ema_outputs = ema_model(volume[labeled_bs:] + noise)
    outputs, ema_outputs = outputs.float(), ema_outputs.float()
    dice = multiclass_dice_loss(outputs[:labeled_bs], label, include_background=background)
    supervised = F.cross_entropy(outputs[:labeled_bs], label) + dice
    loss = 0.5 * supervised + weight * softmax_mse_loss(outputs[labeled_bs:], ema_outputs)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    update_ema_variables(model, ema_model, 0.99, iteration)
    return loss.detach()


def batch_of(patch_size, device, half=2):
    """`half` labelled and as many unlabelled patches, and the noise on the latter; images have CLASSES classes."""
    rng = np.random.default_rng(0)
    volume = rng.standard_normal((2 * half, 1, *patch_size)).astype(np.float32)
    noise = np.clip(0.1 * rng.standard_normal((half, 1, *patch_size)), -0.2, 0.2).astype(np.float32)
    label = np.digitize(volume[:half, 0], [1] if len(patch_size) == 3 else [-1, 0, 1])
    return [torch.from_numpy(array).to(device) for array in (volume, label, noise)]


def cpu_step(quick, scratch):
    """A Mean Teacher iteration on the CPU, V-Net, 2 + 2 patches, same numbers to float32 rounding."""
    no_compiler = compiler_error()
    # Not smaller when quick: over the few values at the bottom of such patches, batch norm amplifies rounding.
    for patch_size, rounds in [(SMALL_PATCH, 2)] if quick else [(SMALL_PATCH, 7), (LA_PATCH, 3)]:
        times, told = steps_by_turns(patch_size, 2, rounds, no_compiler)
        losses, system, size = ({name: [t[i] for t in found] for name, found in told.items()} for i in range(3))
        work = operations(mean_teacher(16, CPU), *batch_of(patch_size, CPU))
        peak = matmul_rate(torch.float32, CPU, 512 if quick else 1536)
        rate = work / median(times["mtseg"])
        note = (
            f"{no_compiler or 'with --winograd'}; {work / 1e9:.3g} GFLOP as PyTorch counts them, at {rate / 1e9:.3g} "
        )
        note += f"GFLOP/s, {rate / peak:.0%} of a large matrix product's; "
        ours, theirs = (f"{median(system[name][1:]):.2f} s" for name in ("mtseg", "family"))
        note += f"CPU time in the system, for new pages, {ours} (family {theirs}); "
        ours, theirs = (f"{size[name][-1]:.1f} GiB" for name in ("mtseg", "family"))
        note += f"the process had at the most {ours} (family {theirs})"
        words = "x".join(map(str, patch_size))
        yield row(f"step on the CPU, patches of {words}", times, note, {"family": 2}, losses_differ(losses))


def cpu_step_2d(quick, scratch):
    """A Mean Teacher iteration on images on the CPU, SSL4MIS's U-Net, 12 + 12 images of 256 x 256.

    The family draws other dropout masks, which depend on the memory format, so that the numbers are compared without
    dropout, on a smaller batch.
    """
    patch_size, half, rounds = ((64, 64), 2, 2) if quick else ((256, 256), 12, 5)
    no_compiler = compiler_error()
    ways = {name: step_way(name, (64, 64), 4, not no_compiler, dropout=False) for name in ways_there_are(no_compiler)}
    losses = {name: [way(turn)[0] for turn in range(2)] for name, way in ways.items()}
    times, told = steps_by_turns(patch_size, half, rounds, no_compiler)
    ours, theirs = (told[name][-1][2] for name in ("mtseg", "family"))
    note = f"{no_compiler or 'with --winograd'}; numbers compared without dropout; the process had at the most "
    note += f"{ours:.1f} GiB (family {theirs:.1f} GiB)"
    words = f"{2 * half} images of " + "x".join(map(str, patch_size))
    yield row(f"step on the CPU, SSL4MIS's U-Net, {words}", times, note, {"family": 1.5}, losses_differ(losses))


def ways_there_are(no_compiler):
    return ["mtseg", *([PLAIN] if no_compiler is None else []), "family"]


def steps_by_turns(patch_size, half, rounds, no_compiler):
    """(seconds of each way's iterations, as `by_turns`, {way: what `step_way` says of each}), a process a way."""
    told = {name: [] for name in ways_there_are(no_compiler)}
    with apart({name: (step_way, name, patch_size, half, not no_compiler) for name in told}) as ways:

        def listen(name, turn):
            told[name].append(ways[name](turn))

        return by_turns({name: functools.partial(listen, name) for name in ways}, rounds), told


def losses_differ(losses):
    """The `differences` of each way's first two `losses`, {way: numbers}, from the family's."""
    sentences = []
    for name, numbers in losses.items():  # the second follows a step, over which batch norm amplifies rounding
        for turn, tolerance in enumerate((1e-4, 1e-3)):  # sums over a million voxels in float32: 4e-5 was seen
            what = f"losses of iteration {turn + 1}, {name}, family,"
            sentences += differences(what, numbers[turn], losses["family"][turn], rtol=tolerance)
    return sentences


def step_way(name, patch_size, half, compiled, dropout=True):
    """One way of `cpu_step` and `cpu_step_2d`: a function of the turn that returns the loss, the seconds of CPU time
    that the system took meanwhile, and the GiB that the process had at the most so far."""
    batch, flat = batch_of(patch_size, CPU, half), len(patch_size) == 2
    if name == "family":
        networks = mean_teacher(16, CPU, image="family" if flat else None)
        iteration = functools.partial(family.mean_teacher_step, classes=range(CLASSES) if flat else (1,))
    else:
        if dropout:  # in a process of its own: as the scripts do
            keep_freed_memory()
        layout = torch.channels_last if flat else torch.channels_last_3d
        networks, iteration = mean_teacher(16, CPU, layout, "mtseg" if flat else None), step
        if name == "mtseg" and compiled:
            for net in networks[:2]:
                winograd_convolutions(net)
    for layer in (layer for net in networks[:2] for layer in net.modules() if isinstance(layer, nn.Dropout)):
        layer.p = layer.p if dropout else 0.0

    def way(turn):
        before = os.times().system
        torch.manual_seed(turn + 1)
        told = float(iteration(*networks, *batch, 0.1, turn + 1))
        seconds = os.times().system - before
        return told, seconds, resident("VmHWM") / 2**30 if Path("/proc/self/status").exists() else math.nan

    return way


def convolution_rates(quick, scratch):
    """How fast 3 x 3 (x 3) convolutions of V-Net and U-Net are computed, by PyTorch and by Winograd's algorithm."""
    for patch_size in [(16, 16, 16), (16, 16)] if quick else [SMALL_PATCH, LA_PATCH, (256, 256)]:
        rates, dims = {}, len(patch_size)
        count, conv = (4, F.conv3d) if dims == 3 else (24, F.conv2d)
        memory_format = torch.channels_last_3d if dims == 3 else torch.channels_last
        for level in range(5):
            channels, sides = 16 * 2**level, [side // 2**level for side in patch_size]
            shapes = [(count, channels, *sides), (channels, channels, *[3] * dims), (count, channels, *sides)]
            x, weight, gradient = (torch.randn(shape).to(memory_format=memory_format) for shape in shapes)

            def backward(wanted, x=x, weight=weight, gradient=gradient, dims=dims):
                ones, none = [1] * dims, [0] * dims
                arguments = (gradient, x, weight, None, ones, ones, ones, False, none, 1)
                return lambda _: torch.ops.aten.convolution_backward(*arguments, wanted)

            ways = {
                "forward": lambda _, x=x, weight=weight, conv=conv: conv(x, weight, padding=1),
                "gradient of the input": backward((True, False, False)),
                "gradient of the weights": backward((False, True, False)),
            }
            if compiler_error() is None:
                ways |= {
                    "Winograd's forward": lambda _, x=x, weight=weight: convolve(x, weight),
                    "input": lambda _, gradient=gradient, weight=weight: input_gradient(gradient, weight),
                    "weights": lambda _, x=x, gradient=gradient: weight_gradient(x, gradient),
                }
            work = 2 * 3**dims * channels * x.numel()
            rates[channels] = {name: work / min(times) / 1e9 for name, times in by_turns(ways, 3).items()}
        yield fact(
            f"convolutions, {count} patches of {'x'.join(map(str, patch_size))}, GFLOP/s: channels: " + ", ".join(ways),
            "; ".join(f"{channels}: {', '.join(f'{rate:.0f}' for rate in r.values())}" for channels, r in rates.items())
            + f"; a large matrix product: {matmul_rate(torch.float32, CPU, 512 if quick else 1536) / 1e9:.0f}",
            gigaflops=rates,
        )


def operations(networks, volume, label, noise):
    """Floating-point operations of an iteration, as PyTorch counts them (convolutions).

    Counted on a corner of the patches: V-Net has as many for each voxel, as the sides are multiples of 16.
    """
    from torch.utils.flop_counter import FlopCounterMode

    corner = [tensor[..., :16, :16, :16].contiguous() for tensor in (volume, label, noise)]
    with FlopCounterMode(display=False) as counter:
        step(*networks, *corner, 0.1, 1)
    return counter.get_total_flops() * volume.numel() / corner[0].numel()


def ema(quick, scratch, device=CPU):
    """The teacher's update, beside a loop over tensors, and its share of an iteration."""
    model, teacher, optimizer = mean_teacher(4 if quick else 16, device)
    expected, loop_teacher = copy.deepcopy(teacher), copy.deepcopy(teacher)
    for parameter in model.parameters():
        parameter.data.mul_(1.01)
    family.update_ema_variables(model, expected, 0.99, 5)
    update_ema_variables(model, teacher, 0.99, 5)
    differs = []
    for (name, ours), theirs in zip(teacher.named_parameters(), expected.parameters(), strict=True):
        tolerance = 0 if device.type == "cpu" else 1e-6
        differs += differences(f"averages {name}", ours.detach().cpu(), theirs.detach().cpu(), rtol=tolerance)
    ways = {
        "mtseg": lambda turn: update_ema_variables(model, teacher, 0.99, 500),
        "family": lambda turn: family.update_ema_variables(model, loop_teacher, 0.99, 500),
    }
    times = by_turns(ways, 5 if quick else 30, device, warm_up=3)
    patch_size = (16, 16, 16) if quick else SMALL_PATCH
    batch = batch_of(patch_size, device)
    whole = median(by_turns({"step": lambda turn: step(model, teacher, optimizer, *batch, 0.1, 9)}, 3, device)["step"])
    share = median(times["mtseg"]) / whole
    note = f"{share:.2%} of an iteration with patches of {'x'.join(map(str, patch_size))}"
    yield row("EMA update", times, note, differs=differs, **{"2 % of a step": share <= 0.02})


def gpu_step(quick, scratch):
    """A Mean Teacher iteration on the GPU, with the time it waits for data."""
    root, patch_size, _ = la_volumes(quick, scratch)
    cached = CachedDataset(training_set(root, patch_size, 8))
    count = len(cached)
    batches = TwoStreamBatchSampler(range(count // 2), range(count // 2, count), 4, 2, seed=1)
    if count < 4:
        batches = ShuffledBatchSampler(range(count), 2, seed=1)
    sampler = IterationSampler(batches, 1, 0, 10**6)
    feed = iter(DataLoader(cached, batch_sampler=sampler, num_workers=2, pin_memory=True))

    def next_volume(_=None):
        return next(feed)["image"].to(GPU, non_blocking=True)

    volume, label, noise = batch_of(patch_size, GPU)
    plain, fast, eager = (mean_teacher(16, GPU, layout) for layout in LAYOUTS)
    compiled = [torch.compile(net, options={"fallback_random": True}) for net in fast[:2]]
    ways = {  # as with --fast --amp bf16, and without the compiler's part of it
        "mtseg": lambda turn: step(*compiled, fast[2], next_volume(), label, noise, 0.1, 9, autocast=True),
        "mtseg, not compiled": lambda turn: step(*eager, next_volume(), label, noise, 0.1, 9, autocast=True),
        "family": lambda turn: family.mean_teacher_step(*plain, volume, label, noise, 0.1, 9),
        "data alone": next_volume,
    }
    times = by_turns(ways, 20, GPU, warm_up=5)
    work = operations(plain, volume, label, noise)
    rate, peak = work / median(times["mtseg"]), matmul_rate(torch.bfloat16, GPU, 8192)
    moved = bytes_moved(fast[0], volume, element_size=2)
    note = (
        f"bf16, channels last, compiled; {work / 1e12:.2f} TFLOP at {rate / 1e12:.0f} TFLOP/s, {rate / peak:.0%} of a "
        f"large matrix product's; at least {moved / 1e9:.1f} GB moved, {moved / median(times['mtseg']) / 1e12:.2f} TB/s"
    )
    waiting = median(times["data alone"]) / median(times["mtseg"])
    note += f"; making the data is {waiting:.1%} of it"
    goals = {"30 ms": median(times["mtseg"]) <= 0.03, "data 5 %": waiting <= 0.05}
    yield row("step on the GPU, patches of " + "x".join(map(str, patch_size)), times, note, {"family": 4}, **goals)


def bytes_moved(model, volume, element_size):
    """What an iteration moves at least: each layer's input and output, once forward in student and in half the batch
    in the teacher, twice backward."""
    moved = []

    def count(_module, inputs, output):
        moved.append(inputs[0].numel() + output.numel())

    leaves = [module for module in model.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(count) for module in leaves]
    with torch.no_grad():
        model(volume)
    for hook in hooks:
        hook.remove()
    return 3.5 * sum(moved) * element_size
