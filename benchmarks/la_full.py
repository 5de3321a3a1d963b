"""The papers' protocol on LA from end to end: train, segment the test cases, print the table.

    python benchmarks/la_full.py --root_path data/LA --out runs/LA
    python benchmarks/la_full.py --root_path data/LA --out runs/LA --methods train_sup train_mean_teacher \\
        --labels 8 16 --seeds 1337 1 2 --minutes 9

Works for at most `--minutes`, saves, and says what is left; the same command goes on from there, until it prints the
table of everything at once. Exit code 0: all is done; 3: there is more to do; 2: a mistake. So, in a shell:

    while python benchmarks/la_full.py --root_path data/LA --out runs/LA; [ $? -eq 3 ]; do :; done

Trained is with the scripts' defaults (6000 iterations, patches of 112 x 112 x 80 voxels), tested is the student of the
last iteration with windows of strides 18 and 4; what follows `--flags` goes to the training scripts. A run lies in
<out>/<method>_<labels>/seed<seed>, with the result of each test case beside its weights; the table is in
<out>/table.md too. "over seeds" is the deviation of the seeds' means (n - 1), "over cases" the deviation over the test
cases, averaged over the seeds.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

METRICS = {"dice": 100, "jaccard": 100, "hd95": 1, "asd": 1}
MORE_TO_DO = 3
TO_STOP = 30  # seconds that a training may need to finish its iteration and save


class OutOfTime(Exception):
    """The time of this call is used up; the message says what was going on."""


def train(script, run, flags, deadline):
    """The weights of the run in folder `run`: trained to the end, or OutOfTime, saved so that it goes on."""
    if weights := sorted(run.glob("model/*/*/iter_*.pth")):
        return weights[0]
    seconds = deadline - time.monotonic() - TO_STOP
    if seconds <= 0:
        raise OutOfTime(f"{run} is to be trained")
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "train.log", "ab") as log:
        words = [sys.executable, str(ROOT / f"{script}.py"), *flags, "--output_dir", str(run), "--resume"]
        process = subprocess.Popen(words, stdout=log, stderr=log)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise OutOfTime(f"{run} is being trained") from None
        finally:
            stop(process)
    weights = sorted(run.glob("model/*/*/iter_*.pth"))
    if code or not weights:
        last = (run / "train.log").read_text(errors="replace").strip().splitlines()[-1:]
        raise SystemExit(f"{script}.py ended with exit code {code} ({''.join(last)}); see {run / 'train.log'}")
    return weights[0]


def stop(process):
    """End a training that still runs: on SIGTERM it finishes its iteration, saves and stops."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(TO_STOP)
    process.kill()
    process.wait()


def test(weights, root, lists, deadline):
    """The rows of all test cases, {case: [a row per class]}; each case is done once, and kept beside the weights."""
    import inference  # here, as PyTorch takes seconds to load and a call may have nothing to test

    rows, longest = {}, 0
    for case in (root / "test.list").read_text().split():
        folder = weights.parent / "cases" / case
        if not (folder / "metrics.json").exists():
            if deadline - time.monotonic() < 1.5 * longest:
                raise OutOfTime(f"{weights} is being tested")
            (lists / f"{case}.list").write_text(f"{case}\n")
            arguments = ["--model_path", weights, "--root_path", lists, "--split", case, "--output_dir", folder]
            start = time.monotonic()
            with open(weights.parent / "test.log", "a") as log, contextlib.redirect_stdout(log):
                inference.main([str(word) for word in arguments])
            longest = max(longest, time.monotonic() - start)
        rows[case] = json.loads((folder / "metrics.json").read_text())["cases"]
    return rows


def lists_of_single_cases(root, out):
    """A data folder of the LA layout in `out`, for a list with one test case each; the volumes stay where they are."""
    lists = out / "lists"
    lists.mkdir(parents=True, exist_ok=True)
    if not (lists / "data").exists():
        (lists / "data").symlink_to((root / "data").resolve(), target_is_directory=True)
    return lists


def table(results):
    """The table as Markdown; `results`: {(method, labels, seed): rows as `test` gives them}."""
    lines = ["| method | labelled | class | seeds | Dice | Jaccard | HD95 | ASD | Dice over cases | empty |"]
    lines.append("|---" * 10 + "|")
    runs = sorted({key[:2] for key in results}, key=lambda key: (key[1], key[0]))
    for method, labels in runs:
        seeds = {key[2]: rows for key, rows in results.items() if key[:2] == (method, labels)}
        for number in sorted({row["class"] for rows in seeds.values() for case in rows.values() for row in case}):
            cells, spread, empty = [], [], 0
            for name, scale in METRICS.items():
                means = []
                for rows in seeds.values():
                    values = [row[name] for case in rows.values() for row in case if row["class"] == number]
                    there = [scale * value for value in values if value is not None]  # None: an empty mask
                    means.append(mean(there) if there else math.nan)
                    if name == "dice":
                        spread.append(stdev(there) if len(there) > 1 else 0.0)
                    if name == "hd95":
                        empty += len(values) - len(there)
                cells.append(f"{mean(means):.2f}" + (f" ± {stdev(means):.2f}" if len(means) > 1 else ""))
            named = ", ".join(map(str, seeds))
            lines.append(
                f"| {method} | {labels} | {number} | {named} | {' | '.join(cells)} | {mean(spread):.1f} | {empty} |"
            )
    return "\n".join(lines) + "\n"


def main(argv=None):
    scripts = sorted(path.stem for path in ROOT.glob("train_*.py"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--root_path", type=Path, required=True, help="folder with train.list, test.list and data/")
    flag("--out", type=Path, required=True, help="folder for the runs")
    flag("--methods", nargs="+", choices=scripts, default=["train_sup", "train_mean_teacher"], help="training scripts")
    flag("--labels", nargs="+", type=int, default=[8, 16], help="numbers of labelled cases (default: 8 16)")
    flag("--seeds", nargs="+", type=int, default=[1337], help="default: 1337")
    flag("--minutes", type=float, default=9, help="to work in this call (default: 9)")
    flag("--flags", nargs=argparse.REMAINDER, default=[], help="all that follows goes to the training scripts")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * args.minutes
    for name in ("train.list", "test.list", "data"):
        if not (args.root_path / name).exists():
            parser.error(f"{args.root_path / name}: no such file or folder; give the folder of the LA data")
    record, asked = args.out / "flags.json", json.dumps(args.flags)
    if record.exists() and record.read_text() != asked:
        parser.error(f"{record}: the runs there have the flags {record.read_text()}; give the same, or another --out")
    lists = lists_of_single_cases(args.root_path, args.out)
    record.write_text(asked)

    results, left = {}, list(itertools.product(args.seeds, args.labels, args.methods))
    try:
        while left:
            seed, labels, method = left[0]
            run = args.out / f"{method}_{labels}" / f"seed{seed}"
            flags = ["--root_path", str(args.root_path), "--labelnum", str(labels), "--seed", str(seed), *args.flags]
            results[method, labels, seed] = test(train(method, run, flags, deadline), args.root_path, lists, deadline)
            left.pop(0)
            print(f"done: {run}", flush=True)
    except OutOfTime as reason:
        print(f"{args.minutes:g} minutes are over: {reason}, {len(left)} of {len(left) + len(results)} runs are left")
    if results:
        text = table(results)
        print(text, end="")
        temporary = args.out / ".table.md.tmp"
        temporary.write_text(text)
        os.replace(temporary, args.out / "table.md")
    return MORE_TO_DO if left else 0


if __name__ == "__main__":
    sys.exit(main())
