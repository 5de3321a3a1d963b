"""A simulation of active learning: hidden labels answer at once, so that strategies can be compared.

Of each seed all strategies begin with the same first round and the same weights. Every round's network is trained from
scratch, and tested on the test cases, which no strategy sees. All steps of a chain of rounds are done once: what is
there is not done again, and what was cut off goes on to the same bits.
"""

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import torch

from mtseg import figures
from mtseg.active import results
from mtseg.active.candidates import Cases, Network, Oracle, Pool
from mtseg.active.rounds import RoundError, begin_round, end_round, is_taken, order, regions_asked, rounds_of
from mtseg.active.strategies import STRATEGIES, choose, find_strategy, selection_of
from mtseg.active.tasks import script_flags
from mtseg.checkpoint import file_sha256, write_whole
from mtseg.query import first_windows
from mtseg.report import read_result, to_markdown, to_text
from mtseg.script import flags, methods, processes
from mtseg.script.processes import run_script

START = "start"  # the chain of the first round alone, which the others begin with
CEILING = "all labels"
REFERENCE = "foreground66"  # what every strategy is compared with
one_chooses = threading.Lock()  # dropout's masks come from one generator for all threads


def simulate_chain(args, words, oracle, strategy, seed):
    """Do the rounds of a `strategy` with a `seed`, those of START alone; yields their records, in order.

    `args`: the flags of recipes/active_learning.py. `words`: the flags of the training script. `oracle`: the Oracle.
    """
    chain = args.output_dir / f"seed{seed}" / folder_of(strategy)
    weights = None
    for number in range(1 if strategy == START else args.rounds + 1):
        folder = chain / f"round_{number + 1:02}"
        record = folder / "record.json"
        if number == 0 and strategy != START:
            adopt(chain.with_name(START) / folder.name, folder)
        if not record.is_file():
            if not folder.is_dir():
                with one_chooses:
                    ask(args, oracle, folder, number, strategy, seed, weights)
            if not is_taken(folder):
                regions = regions_asked([folder])
                end_round(folder, oracle.answers(regions), oracle.cases.background)
            labels = ["--annotations", folder / "annotations"]
            dice = dice_of(args, args.script, [*words, *labels], folder / "run", folder, seed, args.weights)
            write_whole(record, json.dumps(measured(folder, seed, number, dice)).encode())
        run = folder if number or strategy == START else chain.with_name(START) / folder.name
        weights = methods.trained_weights(run / "run", args.weights)
        yield flags.read_config(record) | {"strategy": strategy}


def folder_of(strategy):
    """The name of the folder of its rounds, for one's own, FILE.py:NAME, FILE.NAME: that of no other in STRATEGIES."""
    return Path(strategy.replace(".py:", ".")).name


def adopt(first, folder):
    """Take over the first round of a seed, without its run, which stays where it is."""
    if not folder.is_dir():
        unfinished = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(first, unfinished, ignore=shutil.ignore_patterns("run", ".*"))
        unfinished.rename(folder)


def ask(args, oracle, folder, number, strategy, seed, weights):
    """Make the round in `folder`, whose regions the `strategy` chooses by the network of the round before."""
    cases = oracle.cases
    rng, before = np.random.default_rng([seed, number]), regions_asked(rounds_of(folder.parent))
    network = None if weights is None else Network(cases, [weights], args.members, args.samples, args.gpu, args.network)
    how = {"round": max(number - 1, 0), "rounds": args.rounds, "of": args.of, "per_case": args.per_case}
    pool = Pool(cases, args.unit, args.region, args.stride, before, network, oracle.label, **how)
    if number == 0:
        chosen = first_windows(cases.sides, oracle.label, pool.size, args.budget, rng, cases.no_class)
    else:
        chosen = choose(pool, find_strategy(strategy), args.budget, rng)
    why = None if number else "Every class, then a third by chance around classes."
    begin_round(folder, selection_of(pool, chosen, strategy if number else START, why), lambda _: None)


def dice_of(args, script, words, run, logs, seed, weights="student"):
    """Train from scratch into `run`, and test the `weights` of the last iteration, each unless that was done before;
    returns the mean Dice, 0..1, of all classes of all test cases. The scripts' output goes into the folder `logs`."""
    if methods.trained_weights(run) is None:
        words = [script, *words, *script_flags(vars(args) | {"seed": seed}), "--output_dir", run, "--resume"]
        run_script(words, logs / "train.log", OMP_NUM_THREADS="1")
    weights = methods.trained_weights(run, weights)
    result = weights.parent / f"{weights.stem}_test" / "metrics.json"
    if not result.is_file():
        how = ["--model_path", weights, "--root_path", args.root_path, "--split", "test", "--continue"]
        how += ["--gpu", args.gpu, *(["--network", args.network] if args.network else [])]
        run_script([flags.HOME / "inference.py", *how], logs / "test.log", OMP_NUM_THREADS="1")
    found = read_result(result)
    if found.trained_on:
        print(f"note: {len(found.trained_on)} of the cases of {result} were learned from, unlabelled", flush=True)
    return float(np.mean([*found.values("dice").values()]))


def measured(folder, seed, number, dice):
    """The record of a round: what is annotated, and the `dice` of the test cases."""
    counts = flags.read_config(folder / "taken.json")
    regions = len(regions_asked(other for other in rounds_of(folder.parent) if order(other) <= order(folder)))
    names = {name: counts[name] for name in ("cases", "voxels", "foreground")}
    return {"seed": seed, "round": number, "regions": regions, **names, "dice": dice}


def ceiling_of(args, words, oracle, seed):
    """The Dice of train_sup.py with all labels of all training cases, by those of the flags `words` that it has."""
    script, run = flags.HOME / "train_sup.py", args.output_dir / f"seed{seed}" / "all_labels"
    words = [*flags_of(script, words), "--labelnum", len(oracle.cases.names)]
    return dice_of(args, script, words, run, run, seed)


def simulate_all(args):
    """All chains, --jobs at a time; then the tables and the picture of what there is."""
    args.script, args.rounds, args.unit = methods.find_script(args.script), args.rounds or 5, args.unit or "case"
    for strategy in args.strategies:
        find_strategy(strategy)
    chains = [START, *(folder_of(strategy) for strategy in args.strategies)]
    for flag, names in (("strategies", chains), ("seeds", args.seeds)):
        if twice := [name for name in names if names.count(name) > 1]:
            raise flags.FlagError(
                f"--{flag}: {twice[0]} is there twice, for the same folder; leave one out or rename it"
            )
    record, words = args.output_dir / "simulation.json", list(map(str, args.flags))
    torch.set_num_threads(1)  # of what chooses, too: the last digits depend on it
    if not args.root_path:
        raise flags.FlagError("simulate needs --root_path: give the folder of data whose labels are there")
    cases = Cases(args.root_path, args.val_list)
    oracle = Oracle(cases, args.num_classes)  # raises where a label is missing
    pool, wanted = Pool(cases, args.unit, args.region, args.stride, []), args.budget * (args.rounds + 1)
    if wanted > len(pool.windows.case):
        many = f"{args.rounds} rounds after the first of --budget {args.budget}"
        raise flags.FlagError(f"{many} need {wanted} regions, but there are {len(pool.windows.case)}; lower one")
    if args.per_case and args.budget > args.per_case * len(cases.names):
        most = f"--per_case {args.per_case} of {len(cases.names)} cases"
        raise flags.FlagError(f"--budget {args.budget} is more than {most}; lower it, or raise --per_case")
    kept = ("root_path", "unit", "region", "stride", "rounds", "budget", "members", "of", "weights", "script", "flags")
    kept += ("val_list", "num_classes", "samples", "network", "per_case")
    asked = {name: getattr(args, name) for name in kept} | {"script": args.script.name, "flags": words}
    asked["per_case"] = "even" if args.per_case is None else args.per_case  # a record's None was any number, once
    asked["root_path"] = str(Path(args.root_path).resolve())
    own = [strategy for strategy in args.strategies if strategy not in STRATEGIES]
    asked |= {folder_of(strategy): file_sha256(strategy.rpartition(":")[0])[:8] for strategy in own}
    asked, before = json.loads(json.dumps(asked)), flags.read_config(record)
    was = dict.fromkeys(kept) | before if before else asked  # what it was made without, before there was the flag
    if changed := [name for name in asked if was.get(name, asked[name]) != asked[name]]:
        words = "; ".join(f"{name} was {was[name]} and is {asked[name]}" for name in changed)
        raise RoundError(f"{args.output_dir}: holds another simulation ({words}); give its flags, or another folder")
    write_whole(record, json.dumps(before | asked, indent=1).encode())

    def do(job):
        strategy, seed = job
        if strategy == CEILING:
            return ceiling_of(args, words, oracle, seed)
        records = []
        for one in simulate_chain(args, words, oracle, strategy, seed):
            records.append(one)
            print(f"seed {seed}, {strategy}, {one['regions']} regions: Dice {100 * one['dice']:.2f}", flush=True)
        return records

    with processes.threads(args.jobs) as pool:
        list(pool.map(do, [(START, seed) for seed in args.seeds]))
        chains = list(pool.map(do, [(s, seed) for seed in args.seeds for s in args.strategies]))
        ceilings = list(pool.map(do, [(CEILING, seed) for seed in args.seeds]))
    show(args, oracle, [one for records in chains for one in records], ceilings)


def show(args, oracle, records, ceilings):
    """Print and write the tables of a simulation, its records, and, with Matplotlib, its curves."""
    foreground = sum(map(int, oracle.foreground()))
    reference = REFERENCE if REFERENCE in args.strategies else args.strategies[0]
    tables = [results.table(records, ceilings, reference, foreground), results.wins(records)]
    print(*map(to_text, tables), sep="\n", end="")
    write_whole(args.output_dir / "table.md", "\n".join(map(to_markdown, tables)).encode())
    write_whole(args.output_dir / "records.json", json.dumps({"records": records, "ceiling": ceilings}).encode())
    try:
        with figures.style():
            picture = figures.render(figures.label_curves(records, ceilings))
        write_whole(args.output_dir / "curves.png", picture)
    except figures.FigureError as error:
        print(f"no picture: {error}")


def flags_of(script, words):
    """Those of the flags `words`, with their values, that a `script` has."""
    known, kept, take = methods.parser_of(script)._option_string_actions, [], False
    for word in words:
        take = word.partition("=")[0] in known if word.startswith("--") else take
        kept += [word] if take else []
    return kept
