"""Whether the training scripts compute the same weights, bit for bit, as those of another commit on this machine.

    python benchmarks/same_bits.py 371cded                     # Mean Teacher, supervised and pseudo-labels
    python benchmarks/same_bits.py HEAD --script train_sup.py -- --strong_noise 0.1

Trains each script of both commits for 20 iterations on the Phantom data with default flags (and what follows --), this
one with one and two data workers and once more interrupted after 10 iterations and resumed. Prints a line for each
comparison; the exit code is 1 where any weight differs. A method that depends on --max_iterations, such as UA-MT,
cannot be resumed under another one, and ends there.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train_mean_teacher.py", "train_sup.py", "recipes/train_pseudo_label.py")


def train(tree, script, data, out, *words):
    """The folder of a run of `script` as it is in the folder `tree`."""
    command = [sys.executable, tree / script, "--root_path", data, "--output_dir", out, "--dataset_name", "Phantom"]
    command += ["--patch_size", 32, 32, 32, "--n_filters", 8, "--labelnum", 4, "--progress", 0, *words]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, cwd=out.parent, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script} of {tree} ended with exit code {done.returncode}:\n{done.stderr}")
    return next(out.glob("model/*/*"))


def differences(a, b):
    """The names of the weights in the iter_20.pth of the folders `a` and `b`, student and teacher, that differ."""
    files, others = ({path.name for path in folder.glob("*iter_20.pth")} for folder in (a, b))
    if not files or files != others:
        raise SystemExit(f"of iteration 20 there are {sorted(files)} and {sorted(others)}: nothing to compare")
    names = []
    for file in sorted(files):
        first, second = (torch.load(folder / file, weights_only=True) for folder in (a, b))
        keys = first.keys() | second.keys()
        same = {key for key in first.keys() & second.keys() if torch.equal(first[key], second[key])}
        names += [f"{file}: {key}" for key in sorted(keys - same)]
    return names


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="what to compare with")
    parser.add_argument("--script", nargs="+", default=SCRIPTS, help="default: " + " ".join(SCRIPTS))
    parser.add_argument("flags", nargs="*", help="more flags for the scripts, after --")
    args = parser.parse_args()
    different = False
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        old, data = folder / "old", folder / "Phantom"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--detach", "-q", old, args.commit], check=True)
        try:
            subprocess.run(
                [sys.executable, ROOT / "data/make_phantom.py", data, "--train", "12", "--test", "2"], check=True
            )
            for script in args.script:
                name, twenty = Path(script).stem, ["--max_iterations", 20, *args.flags]
                before = train(old, script, data, folder / f"{name}_before", "--num_workers", 1, *twenty)
                for workers in (1, 2):
                    now = train(ROOT, script, data, folder / f"{name}_{workers}", "--num_workers", workers, *twenty)
                    different |= report(script, f"{workers} data workers", args.commit, differences(before, now))
                cut = folder / f"{name}_resumed"
                train(ROOT, script, data, cut, "--max_iterations", 10, *args.flags)
                now = train(ROOT, script, data, cut, "--resume", *twenty)
                different |= report(script, "resumed after 10", args.commit, differences(before, now))
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", old], check=True)
    raise SystemExit(int(different))


def report(script, how, commit, names):
    """Print a line on one comparison; whether it found a difference."""
    what = "the same bits" if not names else f"{len(names)} weights differ, first {names[0]}"
    print(f"{script}, 20 iterations, {how}, against {commit}: {what}", flush=True)
    return bool(names)


if __name__ == "__main__":
    main()
