"""A simulation of active learning: hidden labels answer at once, so that strategies can be compared.

Of each seed all strategies begin with the same first round and the same weights. Every round's network is trained from
scratch, and tested on the test cases, which no strategy sees. All steps of a chain of rounds are done once: what is
there is not done again, and what was cut off goes on to the same bits.
"""

import argparse
import json
import shutil

import numpy as np

from mtseg.active.candidates import Cases, Network, Pool
from mtseg.active.rounds import asked_in, begin_round, end_round, is_taken, regions_asked, rounds_of
from mtseg.active.strategies import choose, find_strategy
from mtseg.checkpoint import write_whole
from mtseg.datasets import UNKNOWN, training_cases
from mtseg.query import first_windows
from mtseg.report import read_result
from mtseg.script import flags, methods
from mtseg.script.processes import run_script

START = "start"  # the chain of the first round alone, which the others begin with


class Oracle:
    """The hidden labels of `cases`, a candidates.Cases."""

    def __init__(self, cases):
        known = flags.data_settings(cases.source.root_path)
        how = {"num_classes": known.get("num_classes", 255), "ignore_index": UNKNOWN, "intensity": "none", "snap": False}
        self.cases, self.dataset = cases, cases.source.dataset(argparse.Namespace(**how), cases.names)

    def label(self, number):
        return self.dataset.read(self.cases.names[number])["label"]

    def whole_cases(self, count):
        """Yields (case, its label) of the first `count` cases of train.list."""
        for case in training_cases(self.cases.source.root, num=count):
            yield case, self.dataset.read(case)["label"]

    def answers(self, regions):
        """Yields (case, its label, UNKNOWN outside of the regions), for the cases of `regions`, (case, start, stop)."""
        for case in sorted({case for case, *_ in regions}):
            label = self.label(self.cases.names.index(case))
            answer = np.full_like(label, UNKNOWN)
            for other, *corners in regions:
                box = tuple(map(slice, *corners))
                if other == case:
                    answer[box] = label[box]
            yield case, answer


def selection_of(pool, chosen, strategy, **told):
    """What selection.json says of the regions `chosen`, query.Windows, by the name of a `strategy`."""
    known = {name: scores for name, scores in pool.known.items() if isinstance(name, str)}
    keys = zip(pool.windows.case.tolist(), map(tuple, pool.windows.start.tolist()), strict=True)
    place_of, regions = {key: place for place, key in enumerate(keys)}, []
    for rank, (number, start, stop) in enumerate(zip(*map(np.ndarray.tolist, chosen), strict=True), start=1):
        place = place_of.get((number, tuple(start)))
        scores = {} if place is None else {name: round(float(values[place]), 6) for name, values in known.items()}
        regions.append({"case": pool.cases.names[number], "start": start, "stop": stop, "rank": rank, "scores": scores})
    why = (find_strategy(strategy).__doc__ or "").strip().partition("\n")[0]
    return {"strategy": strategy, "why": why, "of": pool.of, **told, "regions": regions}


def simulate_chain(args, words, strategy, seed):
    """Do the rounds of a `strategy` with a `seed`, those of START alone; yields their records, in order.

    `args`: the flags of recipes/active_learning.py. `words`: the flags of the training script.
    """
    chain = args.output_dir / f"seed{seed}" / strategy
    cases, weights = Cases(args.root_path), None
    oracle = Oracle(cases)
    for number in range(1 if strategy == START else args.rounds + 1):
        folder = chain / f"round_{number + 1:02}"
        record = folder / "record.json"
        if number == 0 and strategy != START:
            adopt(chain.with_name(START) / folder.name, folder)
        if not record.is_file():
            if not folder.is_dir():
                ask(args, cases, oracle, folder, number, strategy, seed, weights)
            if not is_taken(folder):
                regions = regions_asked([folder])
                end_round(folder, oracle.answers(regions), cases.background)
            train(args, words, folder, seed)
            write_whole(record, json.dumps(measured(args, folder, strategy, seed, number)).encode())
        weights = methods.trained_weights(folder / "run", ended=True) or weights
        if number == 0 and strategy != START:
            weights = methods.trained_weights(chain.with_name(START) / folder.name / "run", ended=True)
        yield flags.read_config(record) | {"strategy": strategy}


def adopt(first, folder):
    """Take over the first round of a seed, without its run, which stays where it is."""
    if not folder.is_dir():
        unfinished = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(first, unfinished, ignore=shutil.ignore_patterns("run", ".*"))
        unfinished.rename(folder)


def ask(args, cases, oracle, folder, number, strategy, seed, weights):
    """Make the round in `folder`, whose regions the `strategy` chooses by the network of the round before."""
    rng, before = np.random.default_rng([seed, number]), regions_asked(rounds_of(folder.parent))
    network = None if weights is None else Network(cases, [weights], args.members, args.samples, args.gpu)
    how = {"round": max(number - 1, 0), "rounds": args.rounds, "of": args.of}
    pool = Pool(cases, args.unit, args.region, args.stride, before, network, oracle.label, **how)
    if number == 0:
        background = () if cases.background is None else (0, UNKNOWN)
        chosen = first_windows(cases.sides, oracle.label, pool.size, args.budget, rng, background)
        selection = selection_of(pool, chosen, "foreground33")
    else:
        selection = selection_of(pool, choose(pool, find_strategy(strategy), args.budget, rng), strategy)
    begin_round(folder, selection, lambda _: None)


def train(args, words, folder, seed):
    """Train from scratch with all labels so far, and test the last weights, unless that was done before."""
    run = folder / "run"
    if methods.trained_weights(run) is None:
        told = ["--root_path", args.root_path, "--annotations", folder / "annotations", "--seed", seed]
        run_script([args.script, *words, *told, "--output_dir", run, "--resume"], folder / "train.log", OMP_NUM_THREADS="1")
    test(args, run, folder / "test.log")


def test(args, run, log):
    """Test the weights of the last iteration of a run; returns its metrics.json."""
    weights = methods.trained_weights(run, args.weights, ended=True)
    result = weights.parent / f"{weights.stem}_test" / "metrics.json"
    if not result.is_file():
        told = ["--model_path", weights, "--root_path", args.root_path, "--split", "test", "--continue", *args.network_words]
        run_script([flags.HOME / "inference.py", *told], log, OMP_NUM_THREADS="1")
    return result


def measured(args, folder, strategy, seed, number):
    """The record of a round: what is annotated, and the mean Dice of the test cases."""
    weights = methods.trained_weights(folder / "run", args.weights, ended=True)
    dice = read_result(weights.parent / f"{weights.stem}_test" / "metrics.json").values("dice")
    counts = flags.read_config(folder / "taken.json")
    regions = len(regions_asked(other for other in rounds_of(folder.parent) if other.name <= folder.name))
    names = {name: counts[name] for name in ("cases", "voxels", "foreground")}
    return {"seed": seed, "round": number, "regions": regions, **names, "dice": float(np.mean([*dice.values()]))}


def simulate_ceiling(args, words, seed):
    """The Dice of train_sup.py with all labels of all training cases, by those of the flags `words` that it has."""
    script, run = flags.HOME / "train_sup.py", args.output_dir / f"seed{seed}" / "all_labels"
    if methods.trained_weights(run) is None:
        told = [*flags_of(script, words), "--root_path", args.root_path, "--labelnum", len(Cases(args.root_path).names)]
        log = run / "train.log"
        run_script([script, *told, "--seed", seed, "--output_dir", run, "--resume"], log, OMP_NUM_THREADS="1")
    return float(np.mean([*read_result(test(args, run, run / "test.log")).values("dice").values()]))


def flags_of(script, words):
    """Those of the flags `words`, with their values, that a `script` has."""
    known, kept, take = methods.parser_of(script)._option_string_actions, [], False
    for word in words:
        take = word.partition("=")[0] in known if word.startswith("--") else take
        kept += [word] if take else []
    return kept
