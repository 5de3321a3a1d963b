"""What recipes/active_learning.py needs beside rounds: a loop's settings, weights, flags of scripts, annotators' tasks.

`args` are always the flags of recipes/active_learning.py.
"""

import math
from pathlib import Path

import numpy as np

from mtseg import averaging, uncertainty
from mtseg.active import rounds
from mtseg.active.annotators import Task
from mtseg.active.candidates import Network, Oracle
from mtseg.datasets import read_list, training_cases
from mtseg.query import QueryError
from mtseg.script.checks import FlagError
from mtseg.script.methods import trained_weights
from mtseg.script.parser import given_flags
from mtseg.script.runfolder import numbered_weights
from mtseg.script.sources import plain_table

DEFAULTS = {"unit": "case", "rounds": 5, "seed": 1337}
SAID = ("root_path", "val_list", "num_classes", "seed", "gpu")  # to training scripts


def loop_of(args):
    """The settings that hold for all rounds; `next`, which begins a loop, writes them down."""
    names = ("root_path", "val_list", "unit", "region", "stride", "num_classes", "rounds", "seed")
    given = {name: getattr(args, name) for name in names}
    for name in names[:2]:
        given[name] = given[name] and str(Path(given[name]).resolve())
    loop = rounds.settings_of(args.output_dir, given)
    if loop is not given:
        return loop
    if args.action != "next" or not given["root_path"]:
        needed = "begin with `next --root_path ...`, or give the --output_dir of a loop"
        raise rounds.RoundError(f"{args.output_dir}: no loop of active learning has begun there; {needed}")
    return loop | {name: value for name, value in DEFAULTS.items() if loop[name] is None}


def check_used(parser, args, argv):
    """FlagError for a flag or a ROUND that the action does not know, which would be passed over without a word, and for
    one behind --flags that the recipe gives itself. A group of flags is called as the actions that know them."""
    given = given_flags(parser, argv)
    if args.round and args.action not in ("take", "train"):
        raise FlagError(f"{args.action} is not about one round: leave {args.round} out, or give --output_dir instead")
    for name in (str(word).partition("=")[0] for word in args.flags):
        if name.removeprefix("--") in (*SAID, "output_dir", "annotations", "labelnum"):
            raise FlagError(f"{name} behind --flags, where the recipe says it itself: leave it out or give it before")
    for group in parser._action_groups[2:]:
        known = group.title.split(", ")
        for name in (action.dest for action in group._group_actions if action.dest in given):
            if "loop" not in known and args.action not in known:
                raise FlagError(f"--{name} is a flag of {group.title}, not of {args.action}: leave it out")


def labelled_before(args, cases, loop, before):
    """[(case, its label)] of the first --labelnum cases of train.list, with which a loop begins."""
    if not args.labelnum:
        return []
    if before:
        first = before[0].name == "round_00" and rounds.regions_asked(before[:1])
        if not first or len(first) != args.labelnum:
            began = f"the loop in {args.output_dir} began with {len(first) if first else 'no'} labelled cases"
            raise rounds.RoundError(f"--labelnum {args.labelnum}, but {began}; leave it out, or begin another folder")
        return []
    names = training_cases(cases.source.root, read_list(loop["val_list"]) if loop["val_list"] else (), args.labelnum)
    if len(names) < args.labelnum:
        raise FlagError(f"--labelnum {args.labelnum}, but train.list has {len(names)} cases; lower it")
    oracle = Oracle(cases, loop["num_classes"] or 2, names)
    return [(case, oracle.dataset.read(case)["label"]) for case in names]


def table_of(cases, loop):
    """The ClassTable of the data, or that of so many classes."""
    return cases.table or plain_table(loop["num_classes"] or 2)


def script_flags(known):
    """The words of a training script's flags that are the recipe's own, `known`, {name: value or None}."""
    return [word for name in SAID if known.get(name) is not None for word in (f"--{name}", known[name])]


def weights_of(args, before):
    """The files of weights to choose by: those of --run, else of the last round that has a run; [] where none has."""
    paths, trained = [], [folder / "run" for folder in before if trained_weights(folder / "run")]
    for run in args.run or trained[-1:]:
        several = sorted(config.parent for config in run.glob("model/*/*/config.json"))
        if len(several) > 1:
            remedy = f"give one, such as --run {several[0]}, or move the others away"
            raise rounds.RoundError(f"{run}: holds {len(several)} runs; {remedy}")
        inside = numbered_weights(run, "ema_" if args.weights == "teacher" else "") if run.is_dir() else [run]
        path = (inside or [trained_weights(run, args.weights)])[-1]
        if path is None or not path.is_file():
            remedy = "give a run that has ended" + ", or --weights student" * (args.weights == "teacher")
            raise rounds.RoundError(f"{run}: no weights of a {args.weights} there; {remedy}")
        paths.append(path)
    return paths


def network_of(args, cases, paths, table):
    """The candidates.Network to choose by, None without weights; QueryError where it has other classes than `table`."""
    if not paths:
        return None
    network = Network(cases, paths, args.members, args.samples, args.gpu, args.network)
    names, theirs = table.names, network.args.table and network.args.table.names
    if network.num_classes != len(names):
        told = f"{paths[0]}: has {network.num_classes} classes, the data {len(names)} ({', '.join(names)})"
        begin = "" if cases.table else ", or begin a loop with --num_classes"
        raise QueryError(f"{told}; give a --run of its own{begin}")
    if cases.table and theirs not in (None, names):
        told = f"{paths[0]}: its classes are {', '.join(theirs)}, those of the data {', '.join(names)}"
        raise QueryError(f"{told}; give a --run of its own")
    return network


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
