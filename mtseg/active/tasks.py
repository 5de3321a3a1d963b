"""What recipes/active_learning.py needs beside the rounds: the loop's settings, weights, an annotator's tasks.

`args` are always the flags of recipes/active_learning.py.
"""

import json
import math
from pathlib import Path

import numpy as np

from mtseg import averaging, uncertainty
from mtseg.active import rounds
from mtseg.active.annotators import Task
from mtseg.checkpoint import write_whole
from mtseg.script.methods import trained_weights
from mtseg.script.runfolder import numbered_weights
from mtseg.script.sources import plain_table

DEFAULTS = {"unit": "case", "rounds": 5, "seed": 1337}


def loop_of(args):
    """The settings that hold for all rounds; written down by `next`, which begins a loop."""
    names = ("root_path", "unit", "region", "stride", "num_classes", "rounds", "seed")
    given = {name: getattr(args, name) for name in names}
    if given["root_path"]:
        given["root_path"] = str(Path(given["root_path"]).resolve())
    loop = rounds.settings_of(args.output_dir, given)
    if loop is not given:
        return loop
    if args.action != "next" or not given["root_path"]:
        needed = "begin with `next --root_path ...`, or give the --output_dir of a loop"
        raise rounds.RoundError(f"{args.output_dir}: no loop of active learning has begun there; {needed}")
    loop |= {name: value for name, value in DEFAULTS.items() if loop[name] is None}
    write_whole(args.output_dir / "settings.json", json.dumps(loop, indent=1).encode())
    return loop


def table_of(cases, loop):
    """The ClassTable of the data, or that of so many classes."""
    return cases.table or plain_table(loop["num_classes"] or 2)


def weights_of(args, before):
    """The files of weights to choose by: those of --run, else of the last round that has a run; [] where none has."""
    found = [trained_weights(folder / "run", args.weights) for folder in before]
    if not args.run:
        return [path for path in found if path][-1:]
    paths = []
    for run in args.run:
        inside = numbered_weights(run, "ema_" if args.weights == "teacher" else "") if run.is_dir() else [run]
        path = (inside or [trained_weights(run, args.weights)])[-1]
        if path is None or not path.is_file():
            raise rounds.RoundError(f"--run {run}: no weights of a {args.weights} there; give a run that has ended")
        paths.append(path)
    return paths


def tasks_of(cases, regions, network):
    """Yields the annotators.Task of each case in `regions`, those of selection.json, best first."""
    for case in dict.fromkeys(region["case"] for region in regions):
        number, prediction, unsure = cases.names.index(case), None, None
        boxes = [(region["start"], region["stop"]) for region in regions if region["case"] == case]
        if network is not None:
            mean = uncertainty.mean_map(network.members(number))
            prediction = averaging.label_map(mean)
            unsure = uncertainty.entropy(mean) / np.float32(math.log(len(mean)))
        axis = None if len(cases.sides[number]) == 2 else cases.axis
        files = cases.source.files[case].images if cases.source.files else ()
        yield Task(case, cases.image(number), boxes, prediction, unsure, axis, cases.spacing(number), files)
