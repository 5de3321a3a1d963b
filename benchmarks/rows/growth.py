"""Rows: how long a script takes to start, and what grows with the length of a run or the size of a volume."""

import csv
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from measure import by_turns, fact, grown_by, row
from torch import nn

from mtseg import metrics
from mtseg.sliding_window import test_single_case
from rows.case_metrics import blobs
from rows.volumes import make_la

ROOT = Path(__file__).resolve().parents[2]


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
        raise RuntimeError((scratch / "growth.log").read_text().strip().splitlines()[-1])
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
    times, grown = grown_by(lambda: by_turns({"": lambda _: way()}, 1, warm_up=0))
    return times[""][0], grown


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
