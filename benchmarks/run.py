"""Measure mtseg beside the family's plain way of doing the same, and beside MONAI where that is installed.

    python benchmarks/run.py                               # everything, about half an hour on two CPU cores
    python benchmarks/run.py --quick                       # tiny sizes, less than two minutes: does it all still run?
    python benchmarks/run.py --only loader --only metrics  # some rows
    python benchmarks/run.py --out benchmarks/run.json     # every single time, with machine and versions
    python benchmarks/run.py --figures benchmarks/run.json # its table, into docs/speed.md

All ways of one row run by turns, for several rounds, those of steps and windows in a process each; printed are the
median over the rounds, the smallest and the largest time, the median over the rounds of the ratio to mtseg's time, and
whether the row's goals are reached. Their results are compared: where they are not the same the row says so, a row that
fails says why, the rows behind it are measured all the same, and the exit code is 1. Real volumes are used where
MTSEG_LA_ROOT names a folder with LA data of full size; otherwise volumes of LA's size and grey levels are made up. GPU
rows are added where there is a GPU. Steps and windows of mtseg are as with --fast, and without Winograd's convolutions.
"""

import argparse
import functools
import json
import os
import platform
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from measure import GPU, fact, has  # noqa: E402
from rows import active, case_metrics, growth, loading, methods, pretraining, steps, windows  # noqa: E402
from tables import put_figures, show, table  # noqa: E402

from mtseg.checkpoint import write_whole  # noqa: E402

CPU_ROWS = {
    "loader": loading.loader,
    "loader_2d": loading.loader_2d,
    "memory": loading.memory,
    "cpu_step": steps.cpu_step,
    "cpu_step_2d": steps.cpu_step_2d,
    "pretraining_step": pretraining.pretraining_step,
    "method_steps": methods.method_steps,
    "convolutions": steps.convolution_rates,
    "ema": steps.ema,
    "sliding_window": windows.sliding_window,
    "sliding_window_2d": windows.sliding_window_2d,
    "metrics": case_metrics.case_metrics,
    "start_up": growth.start_up,
    "growth": growth.growth,
    "choosing": active.choosing,
    "scoring": active.scoring,
}
GPU_ROWS = {"gpu_step": steps.gpu_step, "gpu_ema": functools.partial(steps.ema, device=GPU)}
GPU_ROWS |= {"gpu_sliding_window": functools.partial(windows.sliding_window, device=GPU)}


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
        "--figures", type=Path, metavar="FILE.json", help="measure nothing: put its table into docs/speed.md"
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
            for entry in measured(rows.get(name), name, args.quick, Path(scratch)):
                if args.quick:
                    entry["goals"] = dict.fromkeys(entry["goals"])
                report["rows"].append({"name": name, **entry})
                report["minutes"] = (time.monotonic() - start) / 60
                show(entry)
                if args.out:
                    write_whole(args.out, f"{json.dumps(report, indent=1)}\n".encode())
    if not has("monai"):
        print("\nMONAI was not measured: pip install monai")
    print(f"\n{report['minutes']:.1f} minutes")
    return report


def measured(rows, name, quick, scratch):
    """The entries of `rows`, a function, or None on a machine without a GPU; one that fails ends in an entry, too."""
    if rows is None:
        yield fact(name, "not measured: there is no GPU")
        return
    try:
        yield from rows(quick, scratch)
    except Exception as error:
        traceback.print_exc()
        words = " ".join(f"{type(error).__name__}: {error}".split())
        yield {**fact(name, f"failed: {words}"), "failed": True}


def figures(path, parser):
    """Print the table of the report `path`, and put it into docs/speed.md. A mistake ends with exit code 2."""
    try:
        report = json.loads(path.read_text())
        text = table(report)
    except (OSError, ValueError, LookupError, TypeError) as error:
        parser.error(f"{path}: not a report of this script ({error}); write one with --out")
    print(text, end="")
    try:
        put_figures(ROOT / "docs/speed.md", text)
    except ValueError as error:
        parser.error(str(error))
    return report


if __name__ == "__main__":
    entries = main()["rows"]
    raise SystemExit(any(entry.get("failed") or entry.get("differs") for entry in entries))
