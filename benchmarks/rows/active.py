"""Rows: choosing among many regions, and the scores of many volumes."""

import json
import multiprocessing
import os

import numpy as np
import torch
from measure import by_turns, fact, grown_by, row

from mtseg import diversity, query
from mtseg.active.candidates import Cases, Network, Pool
from mtseg.networks.vnet import VNet
from rows.volumes import make_la


def choosing(quick, scratch):
    """100 of 100,000 regions by each kind of strategy, features of 64 numbers each."""
    count, n = (2000, 10) if quick else (100_000, 100)
    rng = np.random.default_rng(0)
    case = np.repeat(np.arange(count // 100), 100)
    start = np.tile(np.arange(100), count // 100)[:, None] * 4
    windows = query.Windows(case, start, start + 8)  # each overlaps its neighbours
    scores, of_classes, x = rng.random(count), rng.random((3, count)), rng.standard_normal((count, 64))
    labels = np.repeat(np.arange(4), 101)
    ways = {
        "clasp_pe": lambda: query.clasp_pe(of_classes, scores, windows, n, 10.0, np.random.default_rng(0)),
        "entropy": lambda: query.top_windows(scores, windows, n),
        "foreground66": lambda: query.foreground_random(
            [(404,)] * (count // 100), lambda _: labels, (8,), n, np.random.default_rng(0)
        ),
        "core_set": lambda: diversity.k_center(x, n, range(n)),
        "k_means": lambda: diversity.k_means(x, n, np.random.default_rng(0), range(n)),
        "typiclust": lambda: diversity.typiclust(x, n, np.random.default_rng(0), range(n)),
    }
    for name, way in ways.items():
        times = by_turns({"mtseg": lambda _, way=way: way()}, 1, warm_up=0)
        goal = {"a minute": times["mtseg"][0] <= 60}
        yield row(f"active learning: {n} of {count:,} regions by {name}", times, **goal)


def scoring(quick, scratch):
    """What the process grows by while it scores the slices of many volumes, by a small network."""
    counts, grown = ((4, 8) if quick else (100, 1000)), []
    for count in counts:
        root = scratch / f"scoring_{count}"
        make_la(root, 2, 0.2)
        first, names = next(root.glob("data/*/mri_norm2.h5")), [f"case{number:04}" for number in range(count)]
        for name in names:
            (root / "data" / name).mkdir()
            os.link(first, root / "data" / name / first.name)
        (root / "train.list").write_text("\n".join(names))
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            grown.append(pool.apply(scores_of, [root]))
    known = None not in grown
    yield fact(
        f"active learning: MiB grown by at the most while the slices of {counts[0]} and {counts[1]} volumes are scored",
        " ".join(f"{value / 2**20:.0f}" for value in grown) if known else "not measured: needs Linux's /proc",
        {"flat: the last 1.1 x the first": grown[1] <= 1.1 * grown[0] if known else None},
        bytes=grown,
    )


def scores_of(root):
    """By how many bytes the process grows at the most while Pool scores the slices of the volumes in `root`."""
    torch.manual_seed(0)
    settings = {
        "n_filters": 2,
        "normalization": "batchnorm",
        "patch_size": [32, 32, 16],
        "stride_xy": 32,
        "stride_z": 16,
    }
    (root / "config.json").write_text(
        json.dumps(settings | {"network": "vnet", "num_classes": 2, "has_dropout": False})
    )
    torch.save(VNet(1, 2, 2, "batchnorm").state_dict(), root / "weights.pth")
    cases = Cases(root)
    pool = Pool(cases, "slice", None, None, [], Network(cases, [root / "weights.pth"]))
    return grown_by(pool.class_scores)[1]
