"""Train with several seeds, test each, and print the mean and the deviation over seeds.

    python benchmarks/seeds.py --out runs/phantom_MT_4 train_mean_teacher.py --dataset_name Phantom --labelnum 4
    python benchmarks/seeds.py --out runs/LA_8 --weights teacher train_mean_teacher.py --root_path /data/LA --labelnum 8

What follows the script's name goes to the script. Runs are done two at a time, one thread each, and lie in
<out>/seed<seed>; what is finished is not done again, and what was cut off goes on, so the same command prints the same
table a second time at once. "over seeds" is the deviation of the seeds' means (n - 1); "over cases" is the deviation
over the test cases, averaged over the seeds.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = {"dice": ("Dice %", 100), "jaccard": ("Jaccard %", 100), "hd95": ("HD95", 1), "asd": ("ASD", 1)}


def run(words, log):
    """Run a script on one thread, its output in the file `log`; its words where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        done = subprocess.run([sys.executable, *map(str, words)], stdout=file, stderr=file, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))} ended with exit code {done.returncode}; its output is in {log}")


def train_and_test(args, seed):
    """The result (metrics.json) of one seed, trained and tested unless that was done before."""
    out = args.out / f"seed{seed}"
    prefix = {"student": "iter_", "teacher": "ema_iter_"}[args.weights]
    if not list(out.glob(f"model/*/*/{prefix}*.pth")):
        flags = ["--seed", seed, "--output_dir", out, "--resume", *args.flags]
        run([ROOT / args.script, *flags], out / "train.log")
    checkpoint = next(iter(out.glob(f"model/*/*/{prefix}*.pth")))
    results = checkpoint.parent / f"{checkpoint.stem}_test" / "metrics.json"
    strides = {name: getattr(args, name) for name in ("stride_xy", "stride_z") if getattr(args, name)}
    if not results.exists() or not strides.items() <= json.loads(results.read_text())["protocol"].items():
        flags = [word for name, value in strides.items() for word in (f"--{name}", value)]
        run([ROOT / "inference.py", "--model_path", checkpoint, *flags], out / "test.log")
    return json.loads(results.read_text())


def print_class(seeds, entries):
    """The table of one class: `entries` are its summaries (of metrics.json), one a seed."""

    def cells(values):
        return "".join(f"{scale * value:12.2f}" for value, (_, scale) in zip(values, COLUMNS.values(), strict=True))

    # None is what JSON has for NaN: no case of that seed had both masks.
    means = [[math.nan if e[key]["mean"] is None else e[key]["mean"] for key in COLUMNS] for e in entries]
    spreads = [[math.nan if e[key]["std"] is None else e[key]["std"] for key in COLUMNS] for e in entries]
    print(
        f"{'class ' + str(entries[0]['class']):14}"
        + "".join(f"{name:>12}" for name, _ in COLUMNS.values())
        + "   empty"
    )
    for seed, row, entry in zip(seeds, means, entries, strict=True):
        print(f"seed {seed:<9}{cells(row)}{entry['empty']:8}")
    print(f"{'mean':14}{cells(map(mean, zip(*means, strict=True)))}")
    if len(entries) > 1:
        print(f"{'over seeds':14}{cells(map(stdev, zip(*means, strict=True)))}")
    print(f"{'over cases':14}{cells(map(mean, zip(*spreads, strict=True)))}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1, 2], help="default: 1337 1 2")
    parser.add_argument("--weights", choices=("student", "teacher"), default="student", help="default: student")
    parser.add_argument("--stride_xy", type=int, help="of the test windows, in voxels (default: the run's)")
    parser.add_argument("--stride_z", type=int, help="of the test windows, in voxels (default: the run's)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("script", choices=("train_mean_teacher.py", "train_sup.py"))
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="flags of the script")
    args = parser.parse_args()

    asked, record = {"script": args.script, "flags": args.flags}, args.out / "command.json"
    if record.exists() and json.loads(record.read_text()) != asked:
        parser.error(f"{record} says that other runs lie in {args.out}: {record.read_text()}; name another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(asked))

    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(lambda seed: train_and_test(args, seed), args.seeds))
    for label in [entry["class"] for entry in results[0]["summary"]]:
        print_class(args.seeds, [e for result in results for e in result["summary"] if e["class"] == label])


if __name__ == "__main__":
    main()
