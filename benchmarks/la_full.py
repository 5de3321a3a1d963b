"""The papers' protocol on LA from end to end: train, segment the test cases, print the table.

    python benchmarks/la_full.py --root_path data/LA --out runs/LA
    python benchmarks/la_full.py --root_path data/LA --out runs/LA --methods train_sup train_mean_teacher \\
        --labels 8 16 --seeds 1337 1 2 --minutes 9

Works for at most `--minutes`, saves, and says what is left; the same command goes on from there, until it prints the
table of everything at once. Exit code 0: all is done; 3: there is more to do; 2: a mistake. So, in a shell:

    while python benchmarks/la_full.py --root_path data/LA --out runs/LA; [ $? -eq 3 ]; do :; done

Trained is with the scripts' defaults (6000 iterations, patches of 112 x 112 x 80 voxels), tested is the student of the
last iteration with windows of strides 18 and 4; what follows `--flags` goes to the training scripts. --methods takes
any of them: a recipe, by its file or its method's name, or a script of yours. A run lies in
<out>/<script>_<labels>/seed<seed>, with the result of each test case beside its weights. The table is that of
`python -m mtseg.report <out>`; it is in <out>/table.md too.
"""

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seeds import BenchmarkError, check_ended

import inference
from mtseg.checkpoint import file_sha256, write_whole
from mtseg.datasets import find_root, read_list
from mtseg.report import report, to_markdown, to_text
from mtseg.results import summarize, without_nan
from mtseg.script.flags import one_sentence
from mtseg.script.methods import find_script, trained_weights

MORE_TO_DO = 3
TO_STOP = 30  # seconds that a training may need to finish its iteration and save


class OutOfTime(Exception):
    """The time of this call is used up; the message says what was going on."""


def train(script, run, flags, deadline):
    """The weights of the run in folder `run`: trained to the end, or OutOfTime, saved so that it goes on."""
    if weights := trained_weights(run):
        return weights
    seconds = deadline - time.monotonic() - TO_STOP
    if seconds <= 0:
        raise OutOfTime(f"{run} is to be trained")
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "train.log", "ab") as log:
        words = [sys.executable, str(script), *flags, "--output_dir", str(run), "--resume"]
        process = subprocess.Popen(words, stdout=log, stderr=log)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise OutOfTime(f"{run} is being trained") from None
        finally:
            stop(process)
    check_ended(script, code, run / "train.log")
    weights = trained_weights(run, ended=True)
    if not weights:
        raise BenchmarkError(f"{run}: {script} left no weights there; its output is in {run / 'train.log'}")
    return weights


def stop(process):
    """End a training that still runs: on SIGTERM it finishes its iteration, saves and stops."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(TO_STOP)
    process.kill()
    process.wait()


def test(weights, root, lists, deadline):
    """The metrics.json of all test cases, beside the weights; each case is segmented once, and its result kept."""
    sha256, results, longest = file_sha256(weights), [], 0
    for case in read_list(root / "test.list"):
        kept = weights.parent / "cases" / f"{case}.json"
        result = json.loads(kept.read_text()) if kept.exists() else {}
        if result.get("checkpoint_sha256") != sha256:
            if deadline - time.monotonic() < 1.5 * longest:
                raise OutOfTime(f"{weights} is being tested")
            (lists / f"{case}.list").write_text(f"{case}\n")
            words = ["--model_path", weights, "--root_path", lists, "--split", case]
            start = time.monotonic()
            with contextlib.ExitStack() as stack:
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                log = stack.enter_context(open(weights.parent / "test.log", "a"))
                stack.enter_context(contextlib.redirect_stdout(log))
                result = without_nan(inference.main([*map(str, words), "--output_dir", folder]))
            write_whole(kept, json.dumps(result).encode())
            longest = max(longest, time.monotonic() - start)
        results.append(result)
    rows = [row for result in results for row in result["cases"]]
    every = results[0] | {"split": "test", "cases": rows, "summary": without_nan(summarize(rows))}
    every["trained_on"] = [case for result in results for case in result["trained_on"]]
    every["inference_seconds"] = sum(result["inference_seconds"] for result in results)
    path = weights.parent / f"{weights.stem}_test" / "metrics.json"
    write_whole(path, json.dumps(every, indent=1).encode())
    return path


def lists_of_single_cases(root, out):
    """A data folder of the LA layout in `out`, for a list with one test case each; the volumes stay where they are."""
    lists = out / "lists"
    lists.mkdir(parents=True, exist_ok=True)
    if not (lists / "data").exists():
        (lists / "data").symlink_to((root / "data").resolve(), target_is_directory=True)
    return lists


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--root_path", type=Path, required=True, help="folder with train.list, test.list and data/")
    flag("--out", type=Path, required=True, help="folder for the runs")
    flag("--methods", nargs="+", default=["train_sup", "train_mean_teacher"], help="training scripts, or methods")
    flag("--labels", nargs="+", type=int, default=[8, 16], help="numbers of labelled cases (default: 8 16)")
    flag("--seeds", nargs="+", type=int, default=[1337], help="default: 1337")
    flag("--minutes", type=float, default=9, help="to work in this call (default: 9)")
    flag("--flags", nargs=argparse.REMAINDER, default=[], help="all that follows goes to the training scripts")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * args.minutes

    with one_sentence(BenchmarkError):
        root, scripts = find_root(args.root_path), [find_script(word) for word in args.methods]
        for name in ("train.list", "test.list", "data"):
            if not (root / name).exists():
                parser.error(f"{root / name}: no such file or folder; give the folder of the LA data")
        record, asked = args.out / "flags.json", json.dumps(args.flags)
        if record.exists() and record.read_text() != asked:
            parser.error(
                f"{record}: the runs there have the flags {record.read_text()}; give the same or another --out"
            )
        lists = lists_of_single_cases(root, args.out)
        record.write_text(asked)

        results, left = [], list(itertools.product(args.seeds, args.labels, scripts))
        try:
            while left:
                seed, labels, script = left[0]
                run = args.out / f"{script.stem}_{labels}" / f"seed{seed}"
                flags = ["--root_path", str(root), "--labelnum", str(labels), "--seed", str(seed), *args.flags]
                results.append(test(train(script, run, flags, deadline), root, lists, deadline))
                left.pop(0)
                print(f"done: {run}", flush=True)
        except OutOfTime as reason:
            print(
                f"{args.minutes:g} minutes are over: {reason}, {len(left)} of {len(left) + len(results)} runs are left"
            )
        if results:
            table, _ = report(results, per_class=True)
            print(to_text(table), end="")
            write_whole(args.out / "table.md", to_markdown(table).encode())
    return MORE_TO_DO if left else 0


if __name__ == "__main__":
    sys.exit(main())
