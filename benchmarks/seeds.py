"""Train a method with several seeds, test each run, and print the table.

    python benchmarks/seeds.py --out runs/phantom_MT_4 train_mean_teacher.py --dataset_name Phantom --labelnum 4
    python benchmarks/seeds.py --out runs/LA_8 --weights teacher train_mean_teacher.py --root_path /data/LA --labelnum 8
    python benchmarks/seeds.py --out runs/mine recipes/train_mine.py --labelnum 8          # any training script

What follows the script goes to the script. Runs are done two at a time, one thread each, and lie in <out>/seed<seed>;
what is finished is not done again, and what was cut off goes on, so the same command prints the same table a second
time at once. The table is that of `python -m mtseg.report <out>`, with a line for each class.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mtseg.report import read_result, report, to_text
from mtseg.script.flags import HOME, one_sentence
from mtseg.script.methods import find_script, trained_weights


class BenchmarkError(Exception):
    """A run that failed, or that lacks what was asked for; the message is one sentence with the remedy."""


def check_ended(script, code, log):
    """BenchmarkError where a script failed, with the last line of its output, which is in the file `log`."""
    if code:
        last = "".join(log.read_text(errors="replace").strip().splitlines()[-1:])
        raise BenchmarkError(f"{script} ended with exit code {code} ({last}); all its output is in {log}")


def run(words, log):
    """Run a script on one thread, its output in the file `log`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        done = subprocess.run([sys.executable, *map(str, words)], stdout=file, stderr=file, env=environment)
    check_ended(words[0], done.returncode, log)


def train_and_test(args, script, seed):
    """The metrics.json of one seed, trained and tested unless that was done before."""
    out = args.out / f"seed{seed}"
    if trained_weights(out) is None:
        run([script, "--seed", seed, "--output_dir", out, "--resume", *args.flags], out / "train.log")
    weights = trained_weights(out, args.weights, ended=True)
    if weights is None or not weights.is_file():
        raise BenchmarkError(f"{out}: has no weights of a {args.weights}; take other --weights, or another script")
    result = weights.parent / f"{weights.stem}_test" / "metrics.json"
    strides = {name: getattr(args, name) for name in ("stride_xy", "stride_z") if getattr(args, name)}
    tested = read_result(result) if result.is_file() else None
    if tested is None or tested.replaced or not strides.items() <= tested.protocol.items():
        flags = [word for name, value in strides.items() for word in (f"--{name}", value)]
        run([HOME / "inference.py", "--model_path", weights, *flags], out / "test.log")
    return result


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1, 2], help="default: 1337 1 2")
    parser.add_argument("--weights", default="student", help="student, teacher, or another network of the script")
    parser.add_argument("--stride_xy", type=int, help="of the test windows, in voxels (default: the run's)")
    parser.add_argument("--stride_z", type=int, help="of the test windows, in voxels (default: the run's)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("script", help="a training script: its file, or its method, such as MT")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="flags of the script")
    args = parser.parse_args(argv)

    with one_sentence(BenchmarkError):
        script = find_script(args.script)
        name = script.relative_to(HOME) if HOME in script.parents else script
        asked, record = {"script": str(name), "flags": args.flags}, args.out / "command.json"
        if record.exists() and json.loads(record.read_text()) != asked:
            parser.error(f"{record} says that other runs lie in {args.out}: {record.read_text()}; name another --out")
        args.out.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(asked))
        with ThreadPoolExecutor(args.jobs) as pool:
            results = list(pool.map(lambda seed: train_and_test(args, script, seed), args.seeds))
        print(to_text(report(results, per_class=True)[0]), end="")


if __name__ == "__main__":
    main()
