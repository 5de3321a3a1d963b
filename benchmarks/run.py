"""Measure mtseg beside the family's plain way of doing the same, and beside MONAI where that is installed.

    python benchmarks/run.py                               # everything, about eighteen minutes on two CPU cores
    python benchmarks/run.py --quick                       # tiny sizes, less than two minutes: does it all still run?
    python benchmarks/run.py --only loader --only metrics  # some rows
    python benchmarks/run.py --out benchmarks/run.json     # every single time, with machine and versions
    python benchmarks/run.py --figures benchmarks/run.json # its table, into both README.md

All ways of one row run by turns, for several rounds, those of steps and windows in a process each; printed are the
median over the rounds, the smallest and the largest time, the median over the rounds of the ratio to mtseg's time, and
whether the row's goals are reached. Their results are compared. Real volumes are used where MTSEG_LA_ROOT names a
folder with LA data of full size; otherwise volumes of LA's size and grey levels are made up. GPU rows are added where
there is a GPU. Steps and windows of mtseg are with --winograd, where there is a C compiler, and without.
"""

import argparse
import contextlib
import copy
import csv
import functools
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import nn
from torch.utils.data import DataLoader, Dataset

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import family  # noqa: E402

from mtseg import metrics  # noqa: E402
from mtseg.allocator import keep_freed_memory  # noqa: E402
from mtseg.cache import CachedDataset, ResidentLoader  # noqa: E402
from mtseg.datasets import LAHeart  # noqa: E402
from mtseg.ema import update_ema_variables  # noqa: E402
from mtseg.losses import multiclass_dice_loss, softmax_mse_loss  # noqa: E402
from mtseg.networks.vnet import VNet  # noqa: E402
from mtseg.samplers import IterationSampler, ShuffledBatchSampler, TwoStreamBatchSampler  # noqa: E402
from mtseg.sliding_window import optimize_for_inference, test_single_case  # noqa: E402
from mtseg.transforms import Compose, RandomCrop, RandomRotFlip, ToTensor  # noqa: E402
from mtseg.winograd import WinogradError, convolve, weight_gradient, winograd_convolutions  # noqa: E402

LA_PATCH = (112, 112, 80)
SMALL_PATCH = (48, 48, 32)
CPU, GPU = torch.device("cpu"), torch.device("cuda")


# ----------------------------------------------------------------------------------------------------------- measuring


def by_turns(ways, rounds, device=CPU, warm_up=1):
    """Seconds of each call: {name: [one a round]}; `ways`: {name: function of the round's number}."""
    times = {name: [] for name in ways}
    for turn in range(warm_up + rounds):
        # Each way comes after another one in every second round: what the one leaves in the caches is the other's luck.
        for name, way in list(ways.items())[:: 1 - 2 * (turn % 2)]:
            start = time.perf_counter()
            way(turn)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= warm_up:
                times[name].append(time.perf_counter() - start)
    return times


@contextlib.contextmanager
def apart(makes):
    """Ways for `by_turns`, each in a process of its own: {name: (make, *arguments)}, of which make gives the way there.

    For what sets up a whole process, as mtseg's scripts do with its memory. Each way returns what it returns there.
    """
    context, pipes, processes = multiprocessing.get_context("spawn"), {}, []
    for name, words in makes.items():
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(theirs, *words), daemon=True))
        processes[-1].start()
        theirs.close()

    def way(pipe, turn):
        pipe.send(turn)
        return pipe.recv()

    try:
        for pipe in pipes.values():
            pipe.recv()
        yield {name: functools.partial(way, pipe) for name, pipe in pipes.items()}
    finally:
        for process in processes:
            process.terminate()
            process.join()


def serve(pipe, make, *words):
    way = make(*words)
    pipe.send("ready")
    while True:
        pipe.send(way(pipe.recv()))


def row(what, times, note="", faster_than=None, **goals):
    """A row of timed ways, mtseg's under 'mtseg'.

    `faster_than`: {way: so many times as fast is mtseg to be}. `goals`: {words: reached}, other goals.
    """
    named = {f"{least:g} x {way}": (way, least) for way, least in (faster_than or {}).items()}
    reached = {words: ratio(times, way) >= least if way in times else None for words, (way, least) in named.items()}
    return {"what": what, "goals": reached | goals, "note": note, "seconds": times}


def fact(what, value, goals=None, **more):
    """A row that is no comparison of times; `value` says it in words, `more` in numbers."""
    return {"what": what, "goals": goals or {}, "note": value, **more}


def ratio(times, way):
    """How many times as long as mtseg a way takes, in the median of the rounds."""
    return median(a / b for a, b in zip(times[way], times["mtseg"], strict=True))


def has(package):
    return importlib.util.find_spec(package) is not None


PLAIN = "mtseg without --winograd"


def compiler_error():
    """None where Winograd's loops can be compiled, else why not."""
    try:
        winograd_convolutions(nn.Conv3d(16, 16, 3, padding=1))
    except WinogradError as error:
        return f"without --winograd: {error}"


VERDICTS = {True: "reached", False: "not reached", None: "not judged"}


def verdicts(entry):
    return "; ".join(f"{words}: {VERDICTS[reached]}" for words, reached in entry["goals"].items())


def show(entry):
    print(f"\n{entry['what']}")
    for name, times in entry.get("seconds", {}).items():
        low, middle, high = (1000 * value for value in (min(times), median(times), max(times)))
        print(f"  {name:22}{middle:12.3f} ms   [{low:.3f} .. {high:.3f}]   {ratio(entry['seconds'], name):9.2f} x")
    for line in filter(None, (entry["note"], verdicts(entry) and f"to reach: {verdicts(entry)}")):
        print(f"  {line}")
    sys.stdout.flush()


def table(report, short=False):
    """The rows of a report as a table in Markdown, below a line about the machine; `short`: medians, no notes."""

    def words(times):
        low, middle, high = (f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms" for value in spread(times))
        return middle if short else f"{middle} ({low} .. {high})"

    def spread(times):
        return min(times), median(times), max(times)

    lines = [
        f"`python benchmarks/run.py {' '.join(report['command'])}`, {report['minutes']:.0f} minutes; "
        + ", ".join(f"{name} {value}" for name, value in report["machine"].items()),
        "",
        f"| what | mtseg: median{'' if short else ' (smallest .. largest)'} "
        "| beside it, and mtseg is so many times as fast | to reach |",
        "|---|---|---|---|",
    ]
    for entry in report["rows"]:
        times = entry.get("seconds", {"mtseg": []})
        others = [f"{way} {words(times[way])}: {ratio(times, way):.2f} x" for way in times if way != "mtseg"]
        ours = words(times["mtseg"]) if times["mtseg"] else entry["note"]
        note = f" ({entry['note']})" if entry["note"] and times["mtseg"] and not short else ""
        lines.append(f"| {entry['what']}{note} | {ours} | {'; '.join(others)} | {verdicts(entry)} |")
    return "\n".join(lines) + "\n"


def write(path, text):
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def put_figures(path, text):
    """Put `text` between the marks in the file `path`; ValueError where it has none."""
    before, start, rest = path.read_text().partition("<!-- figures -->\n")
    _, end, after = rest.partition("<!-- end of figures -->")
    if not end:
        raise ValueError(f"{path}: no lines <!-- figures --> and <!-- end of figures -->; mark where the table goes")
    write(path, before + start + text + end + after)


# ---------------------------------------------------------------------------------------------------------------- data


def make_la(root, cases, side=1.0):
    """Volumes of LA's size (times `side`), of 8 bits normalised to float32, gzipped as UA-MT's files are."""
    for number in range(cases):
        rng = np.random.default_rng(number)
        shape = [int(side * n) for n in (rng.integers(171, 217), rng.integers(132, 149), 88)]
        coarse = rng.standard_normal([n // 8 + 2 for n in shape]).astype(np.float32)
        smooth = ndimage.zoom(coarse, 8, order=1)[tuple(slice(n) for n in shape)]
        raw = np.clip(60 + 30 * smooth + 5 * rng.standard_normal(shape), 0, 255).astype(np.uint8).astype(np.float32)
        folder = root / "data" / f"case_{number}"
        folder.mkdir(parents=True)
        with h5py.File(folder / "mri_norm2.h5", "w") as file:
            file.create_dataset("image", data=(raw - raw.mean()) / raw.std(), compression="gzip")
            file.create_dataset("label", data=(smooth > 1).astype(np.uint8), compression="gzip")
    (root / "train.list").write_text("".join(f"case_{number}\n" for number in range(cases)))
    return root


def la_volumes(quick, scratch):
    """(root, patch_size, words) of volumes of LA's full size: real ones where there are, else such as are made up."""
    real = real_volumes()
    if real and real[1] == LA_PATCH and not quick:
        return real
    root = scratch / "la"
    if not root.exists():
        make_la(root, 3 if quick else 8, 0.3 if quick else 1.0)
    return (root, (32, 32, 16), "made up, a third of LA's size") if quick else (root, LA_PATCH, "made up")


def real_volumes():
    """(root, patch_size, words) of MTSEG_LA_ROOT, None where that is not set."""
    root = os.environ.get("MTSEG_LA_ROOT")
    if not root:
        return None
    dataset = LAHeart(root, num=1)
    with h5py.File(dataset.path(dataset.image_list[0])) as file:
        full = all(side >= wanted for side, wanted in zip(file["label"].shape, LA_PATCH, strict=True))
    return (Path(root), LA_PATCH, "LA") if full else (Path(root), SMALL_PATCH, "LA, halved")


def training_set(root, patch_size, num=None):
    return LAHeart(root, transform=chain(patch_size), num=num, num_classes=2)


def chain(patch_size, label_dtype=np.uint8):
    return Compose([RandomRotFlip(), RandomCrop(patch_size), ToTensor(label_dtype)])


# ---------------------------------------------------------------------------------------------------------------- rows


def loader(quick, scratch):
    """An augmented training sample on one core."""
    volumes = la_volumes(quick, scratch)
    yield loader_row(*volumes, quick)
    if real_volumes() not in (None, volumes):
        yield loader_row(*real_volumes(), quick)


def loader_row(root, patch_size, words, quick):
    """A sample of the first eight cases in `root`, with every way of making it."""
    plain = training_set(root, patch_size, 8)
    start = time.perf_counter()
    cached = CachedDataset(plain)
    filling = (time.perf_counter() - start) / len(cached)
    for index in range(len(cached)):
        theirs = family.sample(plain.path(plain.image_list[index]), patch_size, np.random.default_rng((1, index)))
        ours = cached[(index, (1, index))]
        assert torch.equal(theirs["image"], ours["image"])
        assert torch.equal(theirs["label"], ours["label"].long())

    def familys(index, seed):
        return family.sample(plain.path(plain.image_list[index]), patch_size, np.random.default_rng(seed))

    wide, wide.dataset = copy.copy(cached), copy.copy(plain)
    wide.dataset.transform = chain(patch_size, np.int64)
    ways = {
        "mtseg": lambda index, seed: cached[(index, seed)],
        "mtseg, int64 labels": lambda index, seed: wide[(index, seed)],
        "family": familys,
        "LAHeart, uncached": lambda index, seed: plain[(index, seed)],
    }
    if has("monai"):
        from monai.data import CacheDataset
        from monai.transforms import Compose as Chain
        from monai.transforms import EnsureTyped, RandFlipd, RandRotate90d, RandSpatialCropd

        keys = ["image", "label"]
        volumes = [{key: value[None] for key, value in plain.read(case).items()} for case in plain.image_list]
        theirs = [EnsureTyped(keys), RandSpatialCropd(keys, patch_size, random_size=False)]
        theirs += [RandRotate90d(keys, prob=0.75, spatial_axes=(0, 1)), RandFlipd(keys, prob=0.5, spatial_axis=0)]
        monais = CacheDataset(volumes, Chain(theirs), progress=False)
        ways["MONAI"] = lambda index, seed: monais[index]

    def one_pass(way, turn):
        for index in range(len(plain)):
            way(index, (2, turn, index + 1))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a DataLoader's worker
    passes = {name: functools.partial(one_pass, way) for name, way in ways.items()}
    times = by_turns(passes, 2 if quick else 9)
    times = {name: [seconds / len(plain) for seconds in values] for name, values in times.items()}
    torch.set_num_threads(threads)
    rate = 1 / median(times["mtseg"])
    note = f"{words}; {rate:.0f} samples per second and core; filling the cache took {filling:.3f} s a case, once"
    return row("loader: a sample of " + "x".join(map(str, patch_size)), times, note, {"family": 30, "MONAI": 1})


def memory(quick, scratch):
    """Bytes of the cached training set, and what each worker adds to them."""
    root, _, words = la_volumes(quick, scratch)
    plain = LAHeart(root, num=8)
    cached = CachedDataset(plain)
    parts = [cached.stored(case, key)[0] for case in cached.image_list for key in ("image", "label")]
    data = sum(part.nbytes for part in parts)
    as_float = sum(part.size * 4 for part in parts[::2]) + sum(part.size for part in parts[1::2])
    yield fact(
        "memory: the cached training set",
        f"{words}; {cached.nbytes / 2**20:.1f} MiB, {cached.nbytes / data:.4f} x the data in the type it needs, "
        f"{cached.nbytes / as_float:.2f} x float32 images with uint8 labels",
        {"1.1 x": cached.nbytes <= 1.1 * data},
        bytes_cached=cached.nbytes,
        bytes_data=data,
    )
    if not Path("/proc/self/smaps").exists():
        yield fact("memory: added by a worker", "not measured: needs Linux's /proc")
        return
    for context in ("fork",) if quick else ("fork", "spawn"):
        grown = list(DataLoader(_Grown(cached), batch_size=None, num_workers=2, multiprocessing_context=context))
        yield fact(
            f"memory: what a worker ({context}) holds for itself after it read all {data / 2**20:.1f} MiB",
            ", ".join(f"{value / 2**20:.1f} MiB" for value in grown),
            {"shared: less than a quarter of it": max(grown) < 0.25 * data},
            bytes_private=grown,
        )


class _Grown(Dataset):
    """By how many bytes the memory of a worker's own grows when it reads every voxel of a cached data set.

    Counted is what it has written in mappings of no file: pages of the cache's file are the file's, whoever maps them.
    """

    def __init__(self, cached):
        self.cached = cached

    def __len__(self):
        return 2

    def __getitem__(self, _):
        self.read(self.cached.image_list[:1])  # so that what reading itself takes is there before
        before = self.private()
        self.read(self.cached.image_list)
        return max(self.private() - before, 0)

    def read(self, cases):
        for case, key in itertools.product(cases, ("image", "label")):
            self.cached.stored(case, key)[0].max()

    @staticmethod
    def private():
        total, of_no_file = 0, False
        for words in map(str.split, Path("/proc/self/smaps").read_text().splitlines()):
            if not words[0].endswith(":"):
                of_no_file = words[4] == "0"  # a mapping's first line: addresses, rights, offset, device, inode
            elif of_no_file and words[0] == "Private_Dirty:":
                total += 1024 * int(words[1])
        return total


def mean_teacher(n_filters, device, memory_format=torch.contiguous_format):
    """A student, its teacher and the optimizer, the same for the same arguments."""
    torch.manual_seed(0)
    model = VNet(1, 2, n_filters, "batchnorm", has_dropout=True).to(device).to(memory_format=memory_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    return model, copy.deepcopy(model).requires_grad_(False), optimizer


def step(model, ema_model, optimizer, volume, label, noise, weight, iteration, autocast=False):
    """The iteration of train_mean_teacher.py; the loss stays on the device."""
    labeled_bs = len(label)
    with torch.autocast(volume.device.type, torch.bfloat16, enabled=autocast):
        outputs = model(volume)
        with torch.no_grad():
            ema_outputs = ema_model(volume[labeled_bs:] + noise)
    outputs, ema_outputs = outputs.float(), ema_outputs.float()
    supervised = F.cross_entropy(outputs[:labeled_bs], label) + multiclass_dice_loss(outputs[:labeled_bs], label)
    loss = 0.5 * supervised + weight * softmax_mse_loss(outputs[labeled_bs:], ema_outputs)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    update_ema_variables(model, ema_model, 0.99, iteration)
    return loss.detach()


def batch_of(patch_size, device):
    """Two labelled and two unlabelled patches, and the noise on the latter."""
    rng = np.random.default_rng(0)
    volume = rng.standard_normal((4, 1, *patch_size)).astype(np.float32)
    noise = np.clip(0.1 * rng.standard_normal((2, 1, *patch_size)), -0.2, 0.2).astype(np.float32)
    return [torch.from_numpy(array).to(device) for array in (volume, (volume[:2, 0] > 1).astype(np.int64), noise)]


def cpu_step(quick, scratch):
    """A Mean Teacher iteration on the CPU, V-Net, 2 + 2 patches, same numbers to float32 rounding."""
    n_filters, no_compiler = 16, compiler_error()
    # Not smaller when quick: over the few values at the bottom of such patches, batch norm amplifies rounding.
    for patch_size, rounds in [(SMALL_PATCH, 2)] if quick else [(SMALL_PATCH, 7), (LA_PATCH, 3)]:
        told = {name: [] for name in (["mtseg", PLAIN, "family"] if no_compiler is None else ["mtseg", "family"])}
        with apart({name: (step_way, name, patch_size, n_filters, not no_compiler) for name in told}) as ways:

            def listen(name, turn, ways=ways, told=told):
                told[name].append(ways[name](turn))

            times = by_turns({name: functools.partial(listen, name) for name in ways}, rounds)
        told, system, size = ({name: [f[i] for f in found] for name, found in told.items()} for i in range(3))
        for name in told:
            np.testing.assert_allclose(told[name][:2], told["family"][:2], rtol=1e-4)
        batch = batch_of(patch_size, CPU)
        work = operations(mean_teacher(n_filters, CPU), *batch)
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
        yield row("step on the CPU, patches of " + "x".join(map(str, patch_size)), times, note, {"family": 1.8})


def step_way(name, patch_size, n_filters, compiled):
    """One way of `cpu_step`: a function of the turn that returns the loss, the seconds of CPU time that the system took
    meanwhile, and the GiB that the process had at the most so far."""
    volume, label, noise = batch_of(patch_size, CPU)
    if name == "family":
        networks, iteration = mean_teacher(n_filters, CPU), family.mean_teacher_step
    else:
        keep_freed_memory()  # as train_mean_teacher.py does
        networks, iteration = mean_teacher(n_filters, CPU, torch.channels_last_3d), step
        if name == "mtseg" and compiled:
            for net in networks[:2]:
                winograd_convolutions(net)

    def way(turn):
        before = os.times().system
        torch.manual_seed(turn + 1)
        told = float(iteration(*networks, volume, label, noise, 0.1, turn + 1))
        seconds = os.times().system - before
        return told, seconds, resident("VmHWM") / 2**30 if Path("/proc/self/status").exists() else math.nan

    return way


def convolution_rates(quick, scratch):
    """How fast V-Net's 3 x 3 x 3 convolutions are computed, by PyTorch and by Winograd's algorithm."""
    for patch_size in [(16, 16, 16)] if quick else [SMALL_PATCH, LA_PATCH]:
        rates = {}
        for level in range(5):
            channels, sides = 16 * 2**level, [side // 2**level for side in patch_size]
            shapes = [(4, channels, *sides), (channels, channels, 3, 3, 3), (4, channels, *sides)]
            x, weight, gradient = (torch.randn(shape).to(memory_format=torch.channels_last_3d) for shape in shapes)

            def backward(wanted, x=x, weight=weight, gradient=gradient):
                ones, none = [1] * 3, [0] * 3
                arguments = (gradient, x, weight, None, ones, ones, ones, False, none, 1)
                return lambda _: torch.ops.aten.convolution_backward(*arguments, wanted)

            ways = {
                "forward": lambda _, x=x, weight=weight: F.conv3d(x, weight, padding=1),
                "gradient of the input": backward((True, False, False)),
                "gradient of the weights": backward((False, True, False)),
            }
            if compiler_error() is None:
                turned = weight.transpose(0, 1).flip(2, 3, 4)
                ways |= {
                    "Winograd's forward": lambda _, x=x, weight=weight: convolve(x, weight),
                    "input": lambda _, gradient=gradient, turned=turned: convolve(gradient, turned),
                    "weights": lambda _, x=x, gradient=gradient: weight_gradient(x, gradient),
                }
            work = 2 * 27 * channels * x.numel()
            rates[channels] = {name: work / min(times) / 1e9 for name, times in by_turns(ways, 3).items()}
        yield fact(
            f"convolutions, 4 patches of {'x'.join(map(str, patch_size))}, GFLOP/s: channels: " + ", ".join(ways),
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


def matmul_rate(dtype, device, n):
    """Operations per second of a large matrix product: what the machine gives in practice."""
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(by_turns({"product": lambda _: a @ b}, 5, device)["product"])


def ema(quick, scratch, device=CPU):
    """The teacher's update, beside a loop over tensors, and its share of an iteration."""
    model, teacher, optimizer = mean_teacher(4 if quick else 16, device)
    expected, loop_teacher = copy.deepcopy(teacher), copy.deepcopy(teacher)
    for parameter in model.parameters():
        parameter.data.mul_(1.01)
    family.update_ema_variables(model, expected, 0.99, 5)
    update_ema_variables(model, teacher, 0.99, 5)
    assert all(map(torch.equal, teacher.parameters(), expected.parameters())) or device.type == "cuda"
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
    yield row("EMA update", times, note, **{"2 % of a step": share <= 0.02})


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
    differing = {}
    for name, (labels, scores) in results.items():
        np.testing.assert_allclose(score_map, scores, atol=1e-5)
        differing[name] = int((labels != label_map).sum())
    what = f"sliding window, {'x'.join(map(str, shape))} in windows of {'x'.join(map(str, patch_size))}"
    note = f"{no_compiler or 'with --winograd'}; scores equal to 1e-5; voxels labelled differently: {differing}"
    return row(what, times, note, {"family": 1.5 if device.type == "cpu" else 6})


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


def blobs(shape, seed):
    """Two masks that overlap mostly, a chamber of a tenth of the volume's side with a rough surface."""
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij", sparse=True)
    coarse = rng.standard_normal((2, *(n // 12 + 2 for n in shape))).astype(np.float32)
    masks = []
    for rough, shift in zip(coarse, (0.0, 0.05), strict=True):
        rough = F.interpolate(torch.from_numpy(rough)[None, None], shape, mode="trilinear", align_corners=True)
        masks.append(np.sqrt(sum((axis - shift) ** 2 for axis in grid)) + 0.06 * rough[0, 0].numpy() < 0.5)
    return masks


def case_metrics(quick, scratch):
    """Dice, Jaccard, HD95 and ASD of one case: as in LA, dense, far apart, large."""
    shape = (40, 36, 24) if quick else (183, 140, 88)
    yield metrics_row("of LA's size", blobs(shape, 0), {"MedPy": 10, "MONAI": 3}, 2 if quick else 7)
    noise = np.random.default_rng(0).random((2, *shape)) < 0.5
    yield metrics_row("dense, every voxel by chance", noise, {"MedPy": 1}, 2 if quick else 3)
    corners = np.zeros((2, *shape), dtype=bool)
    corners[0, 1:16, 1:16, 1:16] = corners[1, -16:-1, -16:-1, -16:-1] = True
    yield metrics_row("small, in opposite corners", corners, {"MedPy": 1}, 2 if quick else 3)
    full = np.ones((2, *shape), dtype=bool)
    full[1, 4:8, 4:8, 4:8] = False
    yield metrics_row("full but for a hole", full, {"MedPy": 1}, 2 if quick else 3)
    side = 48 if quick else 256
    yield metrics_row(f"of {side}^3 voxels", blobs((side, side, side), 0), {"MedPy": 1}, 2)


def metrics_row(words, masks, faster_than, rounds):
    """The metrics of one case, `masks` = (result, reference); beside MONAI where a goal names it."""
    result, reference = masks
    ways = {"mtseg": lambda _: metrics.calculate_metric_percase(result, reference)}
    if has("medpy"):
        from medpy.metric import binary

        def theirs(_=None):
            functions = (binary.dc, binary.jc, binary.hd95, binary.asd)
            return [function(result, reference) for function in functions]

        np.testing.assert_allclose(metrics.calculate_metric_percase(result, reference), theirs(), rtol=1e-9)
        ways["MedPy"] = theirs
    if has("monai") and "MONAI" in faster_than:
        from monai.metrics import (
            compute_average_surface_distance,
            compute_dice,
            compute_hausdorff_distance,
            compute_iou,
        )

        def monais(_):
            a, b = (torch.from_numpy(mask)[None, None].float() for mask in (result, reference))
            compute_dice(a, b), compute_iou(a, b)
            compute_hausdorff_distance(a, b, include_background=True, percentile=95)
            compute_average_surface_distance(a, b, include_background=True)

        ways["MONAI"] = monais
    times = by_turns(ways, rounds)
    note = "" if has("medpy") else "MedPy not measured: pip install medpy"
    return row(f"metrics: dice, jaccard, hd95, asd of masks {words}", times, note, faster_than)


def start_up(quick, scratch):
    """The help of a training script, in a process of its own."""

    def run(*words):
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL, cwd=scratch)

    ways = {
        "mtseg": lambda _: run(str(ROOT / "train_mean_teacher.py"), "--help"),
        "import torch": lambda _: run("-c", "import torch"),
        "python": lambda _: run("-c", "pass"),
    }
    times = by_turns(ways, 1 if quick else 5)
    yield row("start-up: train_mean_teacher.py --help", times, **{"0.5 s": median(times["mtseg"]) <= 0.5})


def growth(quick, scratch):
    """Time and memory over a long run of train_mean_teacher.py; metrics and windows over volumes of growing size."""
    yield from long_run(40 if quick else 6000, scratch)
    sides = (32, 64) if quick else (128, 256, 512)
    for what, prepare in (("metrics", metrics_of), ("windows", windows_of)):
        # Each in a new process: what this one has kept of earlier rows would not be seen to grow.
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            seconds, grown = zip(*pool.starmap(peak, [(prepare, side) for side in sides], chunksize=1), strict=True)
        for quantity, values in (("nanoseconds", [1e9 * value for value in seconds]), ("bytes at the most", grown)):
            each = [value / side**3 for value, side in zip(values, sides, strict=True) if value is not None]
            yield fact(
                f"growth: {what}, {quantity} a voxel at " + ", ".join(f"{side}^3" for side in sides),
                " ".join(f"{value:.1f}" for value in each) or "not measured: needs Linux's /proc",
                {"linear: the last 1.5 x the one before": each[-1] <= 1.5 * each[-2] if each else None},
                a_voxel=each,
            )


def long_run(iterations, scratch):
    """Time and resident memory of train_mean_teacher.py with a small network, from its beginning to its end."""
    root, run = scratch / "growth", scratch / f"run_{iterations}"
    make_la(root, 6, 0.2)
    flags = {"root_path": root, "output_dir": run, "labelnum": 3, "max_iterations": iterations, "n_filters": 2}
    flags |= {"patch_size": "16 16 16", "num_workers": 1, "save_freq": max(iterations // 6, 1)}
    words = [word for name, value in flags.items() for word in (f"--{name}", *str(value).split())]
    command = [sys.executable, str(ROOT / "train_mean_teacher.py"), *words]
    with open(scratch / "growth.log", "w") as log:
        # On so small tensors a second thread costs more than it saves.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    resident, status = [], Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        found = [line for line in status.read_text().splitlines() if "VmRSS" in line] if status.exists() else []
        resident += [int(found[0].split()[1]) / 1024] if found else []
        time.sleep(0.1 if iterations < 100 else 0.5)
    if process.returncode:
        raise SystemExit((scratch / "growth.log").read_text())
    with open(next(run.glob("model/*/*/metrics.csv")), newline="") as file:
        seconds = [1 / float(line["iterations_per_second"]) for line in csv.DictReader(file)]
    tenths = [1000 * float(median(part)) for part in np.array_split(seconds[len(seconds) // 20 :], 10)]
    # The first fifth of the time goes into starting.
    curve = [float(part[-1]) for part in np.array_split(resident[len(resident) // 5 :], 8) if len(part)]
    yield fact(
        f"growth: {iterations} iterations of train_mean_teacher.py, ms an iteration (median of each tenth)",
        " ".join(f"{value:.1f}" for value in tenths),
        {"flat: last three tenths 1.1 x the first three": median(tenths[-3:]) <= 1.1 * median(tenths[:3])},
        milliseconds=tenths,
    )
    yield fact(
        "growth: resident memory of the process over the run, MiB",
        " ".join(f"{value:.0f}" for value in curve) or "not measured: needs Linux's /proc",
        {"flat: last eighth 1.05 x the second": curve[-1] <= 1.05 * curve[1] if len(curve) == 8 else None},
        mebibytes=curve,
    )


def peak(prepare, side):
    """(seconds, bytes) of a call of prepare(side): how long it took, and by how much the process grew at the most, None
    where the system does not tell."""
    way = prepare(side)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the largest size so far is forgotten
        before = resident("VmRSS")
    except OSError:
        before = None
    seconds = by_turns({"": lambda _: way()}, 1, warm_up=0)[""][0]
    return seconds, None if before is None else resident("VmHWM") - before


def resident(key):
    """Bytes of this process in memory: now (VmRSS), or at the most so far (VmHWM). OSError without Linux's /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def metrics_of(side):
    masks = blobs((side, side, side), 0)
    return lambda: metrics.calculate_metric_percase(*masks)


def windows_of(side):
    """A volume in windows side by side, with a network that costs next to nothing."""

    class Net(nn.Module):
        def forward(self, x):
            return torch.cat((x, -x), dim=1)

    net = Net()
    image = np.zeros((side, side, side), dtype=np.float32)
    patch = min(side, 64)
    return lambda: test_single_case(net, image, patch, patch, (patch, patch, patch), 2)


def gpu_step(quick, scratch):
    """A Mean Teacher iteration on the GPU, with the time it waits for data."""
    root, patch_size, _ = la_volumes(quick, scratch)
    cached = CachedDataset(training_set(root, patch_size, 8))
    count = len(cached)
    batches = TwoStreamBatchSampler(range(count // 2), range(count // 2, count), 4, 2, seed=1)
    if count < 4:
        batches = ShuffledBatchSampler(range(count), 2, seed=1)
    feed = iter(ResidentLoader(cached, IterationSampler(batches, 1, 0, 10**6), patch_size, GPU))
    volume, label, noise = batch_of(patch_size, GPU)
    plain, fast = mean_teacher(16, GPU), mean_teacher(16, GPU, torch.channels_last_3d)
    ways = {
        "mtseg": lambda turn: step(*fast, next(feed)["image"], label, noise, 0.1, 9, autocast=True),
        "family": lambda turn: family.mean_teacher_step(*plain, volume, label, noise, 0.1, 9),
        "data alone": lambda turn: next(feed),
    }
    times = by_turns(ways, 20, GPU, warm_up=5)
    work = operations(plain, volume, label, noise)
    rate, peak = work / median(times["mtseg"]), matmul_rate(torch.bfloat16, GPU, 8192)
    moved = bytes_moved(fast[0], volume, element_size=2)
    note = (
        f"bf16, channels last; {work / 1e12:.2f} TFLOP at {rate / 1e12:.0f} TFLOP/s, {rate / peak:.0%} of a large "
        f"matrix product's; at least {moved / 1e9:.1f} GB moved, {moved / median(times['mtseg']) / 1e12:.2f} TB/s"
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


def gpu_ema(quick, scratch):
    """The teacher's update on the GPU."""
    return ema(quick, scratch, GPU)


def gpu_sliding_window(quick, scratch):
    """A whole volume in windows on the GPU."""
    return sliding_window(quick, scratch, GPU)


CPU_ROWS = {
    "loader": loader,
    "memory": memory,
    "cpu_step": cpu_step,
    "convolutions": convolution_rates,
    "ema": ema,
    "sliding_window": sliding_window,
    "metrics": case_metrics,
    "start_up": start_up,
    "growth": growth,
}
GPU_ROWS = {"gpu_step": gpu_step, "gpu_ema": gpu_ema, "gpu_sliding_window": gpu_sliding_window}


def machine():
    """Where and with what the figures were taken."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
    for package in ("monai", "medpy"):
        if has(package):
            from importlib.metadata import version

            versions[package] = version(package)
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0].split(": ")[1] if names else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load before": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **versions,
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a smoke test, its times mean nothing")
    parser.add_argument("--only", action="append", choices=[*CPU_ROWS, *GPU_ROWS], help="this row; may be repeated")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write all times there")
    parser.add_argument(
        "--figures", type=Path, metavar="FILE.json", help="measure nothing: put its table into both README.md"
    )
    args = parser.parse_args(argv)
    if args.figures:
        return figures(args.figures, parser)

    start = time.monotonic()
    report = {"command": sys.argv[1:] if argv is None else argv, "machine": machine(), "minutes": 0, "rows": []}
    print(", ".join(f"{name} {value}" for name, value in report["machine"].items()))
    rows = CPU_ROWS | (GPU_ROWS if torch.cuda.is_available() else {})
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.only or [*CPU_ROWS, *GPU_ROWS]:
            none = [fact(name, "not measured: there is no GPU")]
            for entry in rows[name](args.quick, Path(scratch)) if name in rows else none:
                if args.quick:
                    entry["goals"] = dict.fromkeys(entry["goals"])
                report["rows"].append({"name": name, **entry})
                report["minutes"] = (time.monotonic() - start) / 60
                show(entry)
                if args.out:
                    write(args.out, json.dumps(report, indent=1) + "\n")
    if not has("monai"):
        print("\nMONAI was not measured: pip install monai")
    print(f"\n{report['minutes']:.1f} minutes")
    return report


def figures(path, parser):
    """Print the table of the report `path`, and put it into benchmarks/README.md, and in short into README.md.

    A mistake ends with exit code 2.
    """
    try:
        report = json.loads(path.read_text())
        text, short = table(report), table(report, short=True)
    except (OSError, ValueError, LookupError, TypeError) as error:
        parser.error(f"{path}: not a report of this script ({error}); write one with --out")
    print(text, end="")
    try:
        put_figures(ROOT / "benchmarks" / "README.md", text)
        put_figures(ROOT / "README.md", short)
    except ValueError as error:
        parser.error(str(error))
    return report


if __name__ == "__main__":
    main()
