"""Rows: a training sample, and the memory of the cached training set."""

import argparse
import copy
import functools
import itertools
import time
from pathlib import Path
from statistics import median

import family
import numpy as np
import torch
from measure import by_turns, differences, fact, has, row
from torch.utils.data import DataLoader, Dataset

from mtseg.cache import CachedDataset
from mtseg.datasets import LAHeart, read_list
from mtseg.script.sources import Source
from rows.volumes import chain, image_folder, la_volumes, real_volumes, training_set


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
    filling, differs = (time.perf_counter() - start) / len(cached), []
    for index in range(len(cached)):
        theirs = family.sample(plain.path(plain.image_list[index]), patch_size, np.random.default_rng((1, index)))
        ours = cached[(index, (1, index))]
        differs += [line for key in theirs for line in differences(f"{key}s of case {index}", ours[key], theirs[key])]

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
        ways["MONAI"] = monais_samples(plain, patch_size)
    times = sample_times(ways, len(plain), 2 if quick else 9)
    rate = 1 / median(times["mtseg"])
    note = f"{words}; {rate:.0f} samples per second and core; filling the cache took {filling:.3f} s a case, once"
    what = "loader: a sample of " + "x".join(map(str, patch_size))
    return row(what, times, note, {"family": 30, "MONAI": 1}, differs)


def monais_samples(plain, patch_size):
    """The same augmentation as `chain` by MONAI: a function of an index, and of a seed that it does not use."""
    from monai.data import CacheDataset
    from monai.transforms import Compose as Chain
    from monai.transforms import EnsureTyped, RandFlipd, RandRotate90d, RandSpatialCropd

    keys = ["image", "label"]
    volumes = [{key: value[None] for key, value in plain.read(case).items()} for case in plain.image_list]
    theirs = [EnsureTyped(keys), RandSpatialCropd(keys, patch_size, random_size=False)]
    theirs += [RandRotate90d(keys, prob=0.75, spatial_axes=(0, 1)), RandFlipd(keys, prob=0.5, spatial_axis=0)]
    monais = CacheDataset(volumes, Chain(theirs), progress=False)
    return lambda index, seed: monais[index]


def sample_times(ways, count, rounds):
    """Seconds a sample of each way on one core, one number a round."""

    def one_pass(way, turn):
        for index in range(count):
            way(index, (2, turn, index + 1))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a DataLoader's worker
    times = by_turns({name: functools.partial(one_pass, way) for name, way in ways.items()}, rounds)
    torch.set_num_threads(threads)
    return {name: [seconds / count for seconds in values] for name, values in times.items()}


def loader_2d(quick, scratch):
    """An augmented training sample of 256 x 256 pixels on one core, of images of 1024 x 1024."""
    root, words = image_folder(quick, scratch)
    source, patch_size = Source(root), (64, 64) if quick else (256, 256)
    settings = argparse.Namespace(
        intensity="zscore", snap=False, num_classes=len(source.table.names), ignore_index=None
    )
    plain = source.dataset(settings, read_list(root / "train.list")[:8])
    plain.transform = chain(patch_size)
    start = time.perf_counter()
    cached = CachedDataset(plain)
    filling, differs = (time.perf_counter() - start) / len(cached), []
    for index in range(len(cached)):
        ours, theirs = cached[(index, (1, index))], plain[(index, (1, index))]
        differs += [line for key in theirs for line in differences(f"{key}s of case {index}", ours[key], theirs[key])]
    ways = {
        "mtseg": lambda index, seed: cached[(index, seed)],
        "mtseg, uncached": lambda index, seed: plain[(index, seed)],
    }
    if has("monai"):
        ways["MONAI"] = monais_samples(plain, patch_size)
    times = sample_times(ways, len(plain), 2 if quick else 9)
    note = f"{words}; filling the cache took {filling:.3f} s a case, once"
    what = "loader: a sample of " + "x".join(map(str, patch_size))
    yield row(what, times, note, {"MONAI": 1}, differs, **{"1 ms": median(times["mtseg"]) <= 1e-3})


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
