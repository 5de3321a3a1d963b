"""Row: whether a step of each method takes as long as its arithmetic says, beside one of Mean Teacher."""

import contextlib
import csv
import io
import os
import subprocess
import sys
from statistics import median

from measure import fact
from torch.utils.flop_counter import FlopCounterMode

from mtseg.script import methods

MOST = 1.3  # times as long as the operations would take at Mean Teacher's rate


def method_steps(quick, scratch):
    """A step of each method, V-Net with 8 filters, 4 patches (BCP 8), on one thread: time and floating-point operations
    of its convolutions, both over Mean Teacher's."""
    scripts = sorted(methods.training_scripts(), key=lambda path: path.stem != "train_mean_teacher")
    size, count = ("16 16 16", 4) if quick else ("48 48 32", 12)
    found = {}
    for script in scripts:
        words = f"--dataset_name Phantom --labelnum 8 --n_filters 8 --patch_size {size} --num_workers 0".split()
        words += ["--progress", "0", "--overwrite", "--output_dir", str(scratch / script.stem)]
        if methods.parser_of(script).get_default("consistency_warmup"):  # labels alone in the first iteration
            words += ["--consistency_warmup", "1"]
        totals = [operations(script, [*words, "--max_iterations", str(n)]) for n in (2, 3)]
        command = [sys.executable, str(script), *words, "--max_iterations", str(count)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rows = list(csv.DictReader(next((scratch / script.stem).glob("model/*/*/metrics.csv")).open(newline="")))
        seconds = median(float(row["step_seconds"]) for row in rows[2:])
        found[methods.method_of(script)] = seconds, totals[1] - totals[0]
    first, *_ = found.values()
    for name, (seconds, work) in found.items():
        time, arithmetic = seconds / first[0], work / first[1]
        yield fact(
            f"a step of {name}",
            f"{1000 * seconds:.0f} ms; {time:.2f} x the time of Mean Teacher's, {arithmetic:.2f} x its operations",
            {f"at most {MOST} x as long as they say": time <= MOST * arithmetic},
            step_seconds=seconds,
            operations=work,
        )


def operations(script, words):
    """The floating-point operations of a run of a training script, as PyTorch counts them."""
    counter, said = FlopCounterMode(display=False), io.StringIO()
    try:
        with counter, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            methods.load_script(script).main(words)
    except SystemExit as error:
        raise RuntimeError(f"{script.name}: {said.getvalue().strip().splitlines()[-1]}") from error
    return counter.get_total_flops()
