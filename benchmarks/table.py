"""One table of methods x numbers of labels x seeds x data sets: train, test, print.

    python benchmarks/table.py --out runs/phantom --methods train_sup MT CPS --labels 4 --flags --dataset_name Phantom
    python benchmarks/table.py --out runs/mine --data data/LA --methods recipes/train_mine.py --labels 8 16
    python benchmarks/table.py --out runs/half --grid benchmarks/grids/la_half.json --minutes 9

Runs are done two at a time, one thread each, and lie in <out>/<data>/<method>_<labels>/seed<seed>. What is finished is
not done again, and what was cut off, however that came, goes on: the same command prints the same table a second time
at once. Exit code 0: all is done; 3: --minutes are over and there is more to do; 2: a mistake. So, in a shell:

    while python benchmarks/table.py --out runs/half --grid GRID.json --minutes 9; [ $? -eq 3 ]; do :; done

A grid is a JSON file of these flags; what the command line says goes before it. --data and --methods are {name: words}
there, and NAME=WORDS on the command line. The words of a data set are its folder and flags; those of a method are its
script, where that is not its name, and flags; {seed} and {data} in a method's stand for those of the run. The
method '*', the default, is every training script that has no name of its own. Flags for all runs come first, then those
of the data, then those of the method; the last one counts.

The table is that of `python -m mtseg.report <out> --per_class`; it is in <out>/table.md too. Tested are the weights of
the last iteration. `--select_on_test N` also keeps and tests those of every N iterations: the column `inflation` says
what the best of them has more, which is what a table gains that selects on its test cases.
"""

import argparse
import itertools
import json
import math
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mtseg.checkpoint import write_whole
from mtseg.report import ReportError, published_beside, read_result, report, to_markdown, to_text
from mtseg.script import processes
from mtseg.script.flags import HOME, natural, one_sentence, positive, read_config
from mtseg.script.methods import find_script, trained_weights, training_scripts
from mtseg.script.runfolder import numbered_weights

MORE_TO_DO = 3


class BenchmarkError(Exception):
    """A run that failed, or that lacks what was asked for; the message is one sentence with the remedy."""


class OutOfTime(Exception):
    """The time of this call is used up; the message says what was going on."""


def call(words, log, deadline):
    """Run a script on one thread until the `deadline`, its output in the file `log`."""
    seconds = deadline - time.monotonic() - processes.TO_STOP
    if seconds <= 0:
        raise OutOfTime(f"{log.parent} is not done")
    try:
        processes.run_script(words, log, seconds, OMP_NUM_THREADS="1")
    except subprocess.TimeoutExpired:
        raise OutOfTime(f"{log.parent} is not done") from None
    except processes.ScriptError as error:
        raise BenchmarkError(str(error)) from error


def asked_of(folder, words, args):
    """What command.json of a job says; BenchmarkError where its run has begun with other flags."""
    script, record = Path(words[0]), folder / "command.json"
    shown = str(script.relative_to(HOME) if HOME in script.parents else script)
    asked = {"train": [shown, *words[1:]], "test": split(args.test_flags)}
    if (folder / "model").exists() and record.exists():  # else the flags of before were refused, and may be mended
        # In groups of a flag and its values, whose order makes no difference.
        had, asks = (
            {f"{name} {part}" for name in asked for part in re.split(" (?=--)", " ".join(run[name])) if part}
            for run in (read_config(record), asked)
        )
        odd = [f"{word} {', '.join(sorted(x))}" for word, x in (("with", had - asks), ("without", asks - had)) if x]
        if odd:
            raise BenchmarkError(f"{folder}: holds a run {' and '.join(odd)}; give its flags, or another --out")
    return asked


def train_and_test(folder, words, args, deadline):
    """Yield the metrics.json of each of a run's weights, trained and tested unless that was done before."""
    asked = asked_of(folder, words, args)
    write_whole(folder / "command.json", json.dumps(asked).encode())
    if trained_weights(folder) is None:
        call([*words, "--output_dir", folder, "--resume"], folder / "train.log", deadline)
    last = [trained_weights(folder, name) for name in args.weights]
    last = [path for path in last if path and path.is_file()]
    if not last:
        raise BenchmarkError(f"{folder}: has no weights of a {' or '.join(args.weights)}; take other --weights")
    for path in last:
        prefix = path.name.partition("iter_")[0]
        for weights in numbered_weights(path.parent, prefix) if args.select_on_test else [path]:
            result = weights.parent / f"{weights.stem}_{args.split}" / "metrics.json"
            replaced = result.is_file() and read_result(result).replaced
            if replaced or not result.is_file():
                go_on = [] if replaced else ["--continue"]
                flags = ["--model_path", weights, "--split", args.split, *asked["test"], *go_on]
                call([HOME / "inference.py", *flags], folder / "test.log", deadline)
            yield result


def attempt(job, args, deadline):
    """(results, reason) of a job: its metrics.json files, and the exception that kept it from more, or None."""
    results = []
    try:
        results.extend(train_and_test(*job, args, deadline))  # what was yielded before an exception stays
        print(f"done: {job[0]}", flush=True)
        return results, None
    except (OutOfTime, BenchmarkError) as reason:
        return results, reason


def split(text):
    """The words of a command line, which a grid or a flag holds in one string."""
    problem = "no string"
    try:
        if isinstance(text, str):
            return shlex.split(text)
    except ValueError as error:
        problem = error
    raise BenchmarkError(f"{json.dumps(text)}: {problem}; write the words of a command in one string, as in a shell")


def named(word, known):
    """(name, words) of a row or a data set: of NAME=WORDS, of a name of the grid's, or of words, whose script or folder
    gives the name."""
    name, is_named, words = word.partition("=")
    if is_named and len(name.split()) == 1:
        return name, words
    return Path(next(iter(split(word)), "")).stem, known.get(word, word)


def chosen(given, known):
    """{name: words} of what a grid or the command line gives; a word of the latter may be a name of the grid's."""
    if isinstance(given, dict):
        return given
    pairs = [named(word, known) for word in given]
    names = Counter(name for name, _ in pairs)
    if twice := [name for name, count in names.items() if count > 1]:
        raise BenchmarkError(f"{twice[0]}: there are {names[twice[0]]} of this name; give others, as NAME=WORDS")
    return dict(pairs)


def jobs_of(args, grid):
    """[(folder, words of the training)] of all runs, one seed of all rows after the other."""
    general, data = [*split(grid.get("flags", "")), *args.flags], {}
    for name, words in chosen(args.data, grid.get("data", {})).items():
        data[name] = split(words)
        if data[name] and not data[name][0].startswith("-"):
            data[name].insert(0, "--root_path")
    methods = {}
    for name, words in chosen(args.methods, grid.get("methods", {})).items():
        words = split(words)
        if name != "*":
            script = words.pop(0) if words and not words[0].startswith("-") else name
            methods[name] = find_script(script), words
    if "*" in args.methods:
        named = {script for script, _ in methods.values()}
        methods |= {script.stem: (script, []) for script in training_scripts() if script not in named}
    kept = ["--save_freq", str(args.select_on_test), "--keep_last", "1000000"] if args.select_on_test else []
    jobs = []
    each = itertools.product(dict.fromkeys(args.seeds), data, dict.fromkeys(args.labels), methods)
    for seed, place, labels, method in each:
        script, flags = methods[method]
        flags = [word.replace("{seed}", str(seed)).replace("{data}", place) for word in flags]
        words = [*general, *data[place], *flags, *kept, "--labelnum", str(labels), "--seed", str(seed)]
        jobs.append((args.out / place / f"{method}_{labels}" / f"seed{seed}", [str(script), *words]))
    return jobs


def refuse(message):
    more = "; flags of the training scripts stand behind --flags" if message.startswith("unrecognized") else ""
    raise BenchmarkError(f"{message}{more} (--help lists the flags)")


def parse(argv):
    """(the flags, {flag: value} of the grid)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    flag = parser.add_argument
    flag("--out", type=Path, required=True, help="folder for the runs")
    flag("--grid", type=Path, help="JSON file with any of the other flags")
    flag("--data", nargs="+", default={"": ""}, help="data sets (default: the scripts')")
    flag("--methods", nargs="+", default={"*": ""}, help="training scripts, or methods (default: all there are)")
    flag("--labels", type=positive, nargs="+", default=[8], help="numbers of labelled cases (default: 8)")
    flag("--seeds", type=natural, nargs="+", default=[1337, 1, 2], help="default: 1337 1 2")
    flag("--weights", nargs="+", default=["student"], help="student, teacher, ...: those of them that a method has")
    flag("--split", default="test", help="list of the cases to test (default: test)")
    flag("--test_flags", default="", help='flags of inference.py in one word: --test_flags="--measure_largest"')
    flag("--select_on_test", type=positive, metavar="N", help="also test the weights of every N iterations")
    flag("--baseline", help="row to test all others against when all is done, as of mtseg.report")
    flag("--published", type=Path, help="figures to print beside, such as benchmarks/published.json")
    flag("--jobs", type=positive, default=2, help="runs at a time (default: 2)")
    flag("--minutes", type=float, default=math.inf, help="to work in this call (default: until all is done)")
    flag("--flags", nargs=argparse.REMAINDER, default=[], help="all that follows goes to the training scripts")
    args = parser.parse_args(argv)
    if args.grid is None:
        return args, {}
    if not args.grid.is_file():
        raise BenchmarkError(f"--grid {args.grid}: no such file; benchmarks/grids/ has some")
    grid, words = read_config(args.grid), []
    if wrong := grid.keys() - vars(args).keys():
        raise BenchmarkError(f"{args.grid}: has {', '.join(sorted(wrong))}; it takes {', '.join(vars(args))}")
    for name, value in grid.items():
        if name in ("data", "methods"):
            if not isinstance(value, dict):
                raise BenchmarkError(f"{args.grid}: {name} is {json.dumps(value)}; write {{name: words}} instead")
            parser.set_defaults(**{name: value})
        elif name != "flags":
            words += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return parser.parse_args([*words, *(sys.argv[1:] if argv is None else argv)]), grid


def main(argv=None):
    with one_sentence(BenchmarkError):
        args, grid = parse(argv)
        if 0 < 60 * args.minutes <= processes.TO_STOP:
            raise BenchmarkError(f"--minutes {args.minutes:g}: half a minute is kept for stopping a run; take more")
        deadline = time.monotonic() + 60 * args.minutes
        jobs = jobs_of(args, grid)
        for job in jobs:
            asked_of(*job, args)
        if args.published:  # a mistake there is better found before the work than after it
            published_beside(args.published)
        with processes.threads(args.jobs) as pool:
            done = list(pool.map(lambda job: attempt(job, args, deadline), jobs))
        results = [path for paths, _ in done for path in paths]
        left = [reason for _, reason in done if reason]
        problem = None
        if results:
            every = partial(report, results, published=args.published, per_class=True)
            try:
                table, _ = every(baseline=None if left else args.baseline)
            except ReportError as error:  # of a --baseline that names no row
                (table, _), problem = every(), error
            print(to_text(table), end="")
            write_whole(args.out / "table.md", to_markdown(table).encode())
        if problem:
            raise problem
        if failed := [reason for reason in left if isinstance(reason, BenchmarkError)]:
            raise BenchmarkError(f"{failed[0]}" + (f"; {len(failed)} runs failed" if len(failed) > 1 else ""))
        if left:
            print(f"{args.minutes:g} minutes are over: {left[0]}, {len(left)} of {len(jobs)} runs are left")
    return MORE_TO_DO if left else 0


if __name__ == "__main__":
    sys.exit(main())
