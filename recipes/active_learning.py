"""Active learning: which cases, slices or patches to annotate next, by the network so far, and whether choosing pays.

    python recipes/active_learning.py next --root_path data/mine --unit slice --budget 10     # makes active/round_01
    python recipes/active_learning.py take          # once the masks are in active/round_01/masks, as TODO.txt says
    python recipes/active_learning.py train --script train_mean_teacher.py --flags --max_iterations 2000
    python recipes/active_learning.py next --budget 10              # by the network of that run; and so on
    python recipes/active_learning.py status
    python recipes/active_learning.py simulate --root_path data/LA --unit slice --budget 20 --output_dir runs/active \\
        --strategies random foreground66 clasp_pe --seeds 1 2 3 4 --rounds 5 --flags --max_iterations 2000

`next` waits for nobody, changes no file of yours, and asks for training cases alone. `take` checks what came back; a
round is added as a whole or not at all. `train` learns from all rounds so far with any training script: of a case that
is annotated in part the rest counts as unlabelled. `simulate` answers from the labels that are there: every strategy,
with every seed, from the same start; it prints label-efficiency curves' areas, and draws them (with Matplotlib).
Strategies: mtseg/active/strategies.py; none beats chance everywhere (docs/active_learning.md).
"""

import json
from pathlib import Path

from mtseg.script import flags
from mtseg.script.parser import Parser

PARSER = Parser(description=__doc__, usage="%(prog)s next|take|train|status|simulate [ROUND] [flags]")
ACTIONS = ("next", "take", "train", "status", "simulate")
PARSER.add_argument("action", choices=ACTIONS, help="what to do")
PARSER.add_argument("round", nargs="?", type=Path, metavar="ROUND", help="folder of a round (default: the last one)")
flag, _ = PARSER.group("loop")
flag("--output_dir", type=Path, default=Path("active"), help="folder of all rounds, or of a simulation")
flag("--root_path", help="folder of the data; what `next` first gets of this group holds for all rounds")
flag("--unit", choices=("case", "slice", "patch"), help="what is annotated at a time (default: case)")
flag("--region", type=flags.positive, nargs="+", metavar="SIDE", help="of a patch: its sides in voxels")
flag("--stride", type=flags.positive, help="voxels between candidate patches (default: half of a side)")
flag("--num_classes", type=flags.classes, help="classes, background included (default: classes.json's, else 2)")
flag("--rounds", type=flags.positive, help="rounds that a network is to choose, by which noise falls (default: 5)")
flag("--val_list", metavar="FILE", help="cases that are never asked for, and monitored in `train`")
flag, _ = PARSER.group("next")
flag("--seed", type=flags.natural, help="of all chance, for all rounds (default: 1337)")
flag("--strategy", help="how to choose (default: clasp_pe, and typiclust before there is a network), or FILE.py:NAME")
flag("--run", type=Path, nargs="+", help="weights, or folders of runs, to choose by (default: the last round's run)")
flag("--labelnum", type=flags.positive, help="cases that have labels already: the first ones of train.list")
flag, _ = PARSER.group("next, simulate")
flag("--budget", type=flags.positive, default=10, help="regions to annotate in a round")
most = "regions of a case in a round at most, 0 for any number (default: as few as the budget allows)"
flag("--per_case", type=flags.natural, metavar="N", help=most)
flag("--network", help="of the run, where it is FILE.py:CLASS")
flag("--members", choices=("network", "teacher", "flips", "dropout"), default="network", help="what is averaged")
flag("--samples", type=flags.positive, default=10, help="masks of --members dropout")
of = "a region's score: mean, or of its top twentieth, predicted boundary or foreground (without any: mean)"
flag("--of", choices=("mean", "top", "boundary", "foreground"), default="mean", help=of)
flag, _ = PARSER.group("take")
flag("--snap", action="store_true", help="take the nearest class for colours and values that are none")
flag("--allow_empty", action="store_true", help="masks without any class are meant so")
flag, _ = PARSER.group("next, train, simulate")
flag("--weights", choices=("student", "teacher"), default="student", help="whose, of a run")
flag("--gpu", default="0", metavar="N", help="number of the GPU; without one the CPU is used")
flag, _ = PARSER.group("train, simulate")
flag("--script", default="train_sup.py", help="training script: a file, or a method's name")
flag("--flags", nargs="...", default=[], help="all that follows goes to the training script")
flag, _ = PARSER.group("simulate")
compared = ("random", "foreground33", "foreground66", "entropy", "margin", "core_set", "clasp_pe")
flag("--strategies", nargs="+", default=compared, metavar="NAME", help="which to compare")
flag("--seeds", type=flags.natural, nargs="+", default=[1, 2, 3, 4], metavar="N", help="which to repeat it with")
flag("--jobs", type=flags.positive, default=2, help="chains of rounds at a time, one thread each")
flags.answer_help(PARSER, __name__)

import numpy as np
from tqdm import tqdm

from mtseg.active import rounds, tasks
from mtseg.active.annotators import changed_share, check_folder, read_mask, read_prediction, write_case, write_todo
from mtseg.active.candidates import Cases, Pool
from mtseg.active.simulation import simulate_all
from mtseg.active.strategies import choose, find_strategy, selection_of
from mtseg.checkpoint import write_whole
from mtseg.report import Table, to_text
from mtseg.script import methods
from mtseg.script.processes import run_script


def ask(args):
    """Make the next round's folder, with what to annotate and with the annotator's files."""
    loop, before = tasks.loop_of(args), rounds.rounds_of(args.output_dir)
    if args.stride and loop["unit"] != "patch":
        raise rounds.RoundError(f"--unit {loop['unit']} with --stride, which is about patches: leave it out")
    cases = Cases(loop["root_path"], loop["val_list"])
    labels = tasks.labelled_before(args, cases, loop, before)
    folder, paths = rounds.next_round(args.output_dir), tasks.weights_of(args, before)
    strategy, table = args.strategy or ("clasp_pe" if paths else "typiclust"), tasks.table_of(cases, loop)
    chooses = find_strategy(strategy)
    network = tasks.network_of(args, cases, paths, table)
    print(f"{strategy}, by {', '.join(map(str, paths)) if paths else 'the images alone: there is no network yet'}")

    annotated = rounds.regions_asked(before) + [(case, [0] * label.ndim, label.shape) for case, label in labels]
    number = int(folder.name[6:])
    by_network = sum(bool(rounds.asked_in(earlier).get("weights")) for earlier in before)
    how = {"round": by_network, "rounds": loop["rounds"], "of": args.of, "per_case": args.per_case}
    pool = Pool(cases, loop["unit"], loop["region"], loop["stride"], annotated, network, **how)
    chosen = choose(pool, chooses, args.budget, np.random.default_rng([loop["seed"], number]))
    selection = selection_of(pool, chosen, strategy, weights=[str(path) for path in paths], members=args.members)

    def write(unfinished):
        shown = tqdm(tasks.tasks_of(cases, selection["regions"], network), unit="case")
        selection["cases"] = [write_case(unfinished, task, table) for task in shown]
        write_todo(unfinished, selection["cases"], table, folder)
        write_whole(args.output_dir / "settings.json", json.dumps(loop, indent=1).encode())
        if labels:
            rounds.begin_with(args.output_dir, labels, cases.background)

    rounds.begin_round(folder, selection, write)
    print(f"{folder / 'TODO.txt'} says what to annotate: {len(chosen.case)} regions in {len(selection['cases'])} cases")


def take(args):
    """Check the masks of a round and add them, all or none."""
    loop, folder = tasks.loop_of(args), args.round or rounds.last_round(args.output_dir)
    cases, selection = Cases(loop["root_path"]), rounds.asked_in(folder)
    if rounds.is_taken(folder):
        raise rounds.RoundError(f"{folder}: its masks are taken already; go on with `train`, or `next`")
    others = rounds.rounds_of(folder.parent)
    if waiting := [path for path in others if rounds.order(path) < rounds.order(folder) and not rounds.is_taken(path)]:
        raise rounds.RoundError(f"{waiting[0]}: waits for its masks, from which {folder.name} goes on; take it first")
    later = [path for path in others if rounds.order(path) > rounds.order(folder)]
    if later := [path.name for path in later if rounds.is_taken(path)]:  # which hold its labels as they were
        remedy = "remove taken.json and run/ there too, and take it anew afterwards"
        raise rounds.RoundError(f"{folder}: {later[0]} went on from its labels; {remedy}")
    if (folder / "run").exists():
        raise rounds.RoundError(f"{folder / 'run'}: learned from other labels; delete it, then take the masks")
    table, labels, changed, snapped = tasks.table_of(cases, loop), [], {}, 0
    check_folder(folder, selection["cases"])
    for record in selection["cases"]:
        label, moved = read_mask(folder, record, table, args.snap, args.allow_empty)
        labels.append((record["case"], label))
        changed[record["case"]] = changed_share(read_prediction(folder, record, table), label, record["boxes"])
        snapped += moved
    rounds.end_round(folder, labels, cases.background, changed={k: v for k, v in changed.items() if v == v})
    print(
        f"{len(labels)} masks are taken; {snapped} voxels were snapped to a class" if snapped else "all masks are taken"
    )
    for case, share in changed.items():
        print(f"{case}: {share:.1%} of the prediction was changed" if share == share else f"{case}: annotated anew")


def train(args):
    """Train with the labels of a round and of those before it, those that are not annotated as unlabelled."""
    loop, folder = tasks.loop_of(args), args.round or rounds.last_round(args.output_dir, taken=True)
    if not rounds.is_taken(folder):
        raise rounds.RoundError(f"{folder}: its masks are not taken yet; `take` it first")
    words = [methods.find_script(args.script), *tasks.script_flags(loop | {"gpu": args.gpu})]
    words += ["--annotations", folder / "annotations"]
    print(f"training; its output goes to {folder / 'train.log'}", flush=True)
    words += [*args.flags, "--output_dir", folder / "run", "--resume"]
    run_script(words, folder / "train.log")
    for path in tasks.weights_of(args, [folder]):
        print(f"trained: {path}")


def status(args):
    """Print what each round asked for and what came back."""
    tasks.loop_of(args)
    columns = ["round", "strategy", "regions", "cases", "voxels", "foreground", "changed", "network"]
    table = Table(columns, [rounds.row_of(folder) for folder in rounds.rounds_of(args.output_dir)], [], [], [])
    print(to_text(table).rstrip())


def main(argv=None):
    actions = {"next": ask, "take": take, "train": train, "status": status, "simulate": simulate_all}
    with flags.one_sentence():
        args = PARSER.parse_args(argv)
        tasks.check_used(PARSER, args, argv)
        if args.round:  # a path, or a name in --output_dir
            args.round = args.round if args.round.is_dir() else args.output_dir / args.round
            args.output_dir = args.round.parent
        actions[args.action](args)


if __name__ == "__main__":
    main()
