"""Stages: runs of training scripts, each of which may begin with the weights of an earlier one, by one command.

    python recipes/stages.py stages.json --dry_run    # print the plan, and check all that can be checked before
    python recipes/stages.py stages.json              # train what is not trained yet, test, print the matrix

stages.json says which, in their order:
    {"defaults": {"max_iterations": 2000, "labelnum": 4},
     "stages": [{"name": "pretrain", "script": "recipes/pretrain_masked.py", "flags": {"root_path": "data/many"}},
                {"name": "coarse", "script": "train_sup.py", "flags": {"root_path": "data/other", "labelnum": 40},
                 "from": "pretrain", "parts": "encoder"},
                {"name": "target", "script": "train_mean_teacher.py", "flags": {"root_path": "data/mine"},
                 "from": "coarse", "weights": "last"}]}
A stage has its own flags, and of the defaults those that its script has. "from" is an earlier stage or a file of
weights; without it a stage begins from scratch. "parts": all of it but the last layer (the default), its encoder, or
the whole network; "weights": of a stage its last (the default) or, with --val_list, its best. A stage is an ordinary
run in <output_dir>/<name>; what is finished is not done again, and what was cut off goes on to the same bits. Scripts,
and a network FILE.py:CLASS, are code, which --dry_run loads, too: read a stranger's file before you run it.

At the end the last weights of each stage are tested on the test cases of every stage's data that has the same classes.
The matrix of these Dice shows what is forgotten: it is in <output_dir>/stages.md too; "test": false leaves it out.
"""

import zlib
from pathlib import Path

from mtseg.script import flags
from mtseg.script.parser import Parser

PARSER = Parser(description=__doc__, usage="%(prog)s STAGES.json [flags]")
PARSER.add_argument("stages", type=Path, metavar="STAGES.json", help="the stages")
flag, _ = PARSER.group("run")
flag("--output_dir", type=Path, help="folder of the stages' runs (default: the file's name without .json)")
flag("--dry_run", action="store_true", help="print the plan and check all stages, and start none")
flags.answer_help(PARSER, __name__)

import numpy as np

from mtseg.checkpoint import file_sha256, write_whole
from mtseg.report import Table, read_result, to_markdown, to_text
from mtseg.script import methods
from mtseg.script.build import WEIGHTS_OF
from mtseg.script.processes import run_script
from mtseg.script.stages import check_descent, data_sets, kind_of, read_stages


def show(stages):
    """Print the plan, and beneath it what each stage begins with."""
    rows, starts = [], []
    for stage in stages:
        start = stage.first_weights()
        origin = "scratch" if start is None else str(start)
        if start != stage.origin:
            origin = f"{stage.origin.name}, {stage.weights}"
        words = [stage.name, stage.script.name, stage.args.dataset_name, str(stage.args.max_iterations), origin]
        rows.append([[word] for word in [*words, "-" if start is None else stage.parts]])
        if start is not None:
            sha256 = f"SHA-256 {file_sha256(start)[:12]}..." if start.is_file() else "once it is there"
            loaded = f"{stage.loaded or 'the'} weights {WEIGHTS_OF[stage.parts]}"
            starts.append(f"{stage.name} begins with {loaded}: {start} ({sha256})\n")
    print(to_text(Table(["stage", "script", "data", "iterations", "from", "parts"], rows, [], [], [])), *starts, sep="")


def train(stages):
    """Run every stage that has not ended yet, each when those before it have."""
    for stage in stages:
        check_descent(stage)
        if methods.trained_weights(stage.folder) is None:
            log, start = stage.folder / "train.log", stage.first_weights()
            begins = f"with {start}" if start else "from scratch"
            print(f"{stage.name}: begins {begins}; its output goes to {log}", flush=True)
            stage.begin()
            run_script(stage.command(), log)
        print(f"done: {stage.name}, {methods.trained_weights(stage.folder)}", flush=True)


def test(stages):
    """The matrix, stages x data sets, of the mean Dice in percent of each stage's last weights."""
    sets, rows = data_sets(stages), []
    for stage in stages:
        if stage.args.labelnum == 0:  # its network gives images
            continue
        weights, row = methods.trained_weights(stage.folder), [[stage.name]]
        kind = kind_of(stage.args), flags.read_config(weights.parent / "config.json")["n_channels"]
        for root, (name, other, channels) in sets.items():
            own = root == Path(stage.args.root_path).resolve()  # its folder is where inference.py puts it by itself
            of_other = f"_{name}_{zlib.crc32(str(root).encode()):08x}"  # others may be called alike
            result = weights.parent / f"{weights.stem}{'' if own else of_other}_test/metrics.json"
            fits = own or kind == (kind_of(other.args), channels * (2 * stage.args.context + 1))
            if fits and not result.is_file():
                how = stage if own else other
                run_script(stage.test_command(weights, how, result.parent), stage.folder / "test.log")
            row.append([cell_of(read_result(result)) if fits else "-"])
        rows.append(row)
    notes = ["Dice in percent, mean of the test cases of each data set, by the stages' last weights; -: other classes"]
    notes += ["*: some of these cases, by name, were learned from or chosen by, in this stage or in one before it"]
    return Table(["stage", *(name for name, *_ in sets.values())], rows, [], notes, [])


def cell_of(result):
    """The mean Dice of a result in percent, marked where the network knew its cases."""
    mark = "*" if result.trained_on or result.selection == "test set" else ""
    return f"{100 * np.mean([*result.values('dice').values()]):.2f}{mark}"


def main(argv=None):
    with flags.one_sentence():
        args = PARSER.parse_args(argv)
        out = args.output_dir or Path(args.stages.stem)
        stages, tested = read_stages(args.stages, out)
        show(stages)
        if args.dry_run:
            return
        train(stages)
        if tested:
            matrix = test(stages)
            print(to_text(matrix), end="")
            write_whole(out / "stages.md", to_markdown(matrix).encode())


if __name__ == "__main__":
    main()
