"""What inference.py leaves behind: metrics.csv, metrics.json, and what it prints.

`args` are always the flags of inference.py.
"""

import json
import math
import tempfile
from pathlib import Path

import torch

from mtseg.averaging import rank_correlation
from mtseg.checkpoint import write_whole
from mtseg.datasets import some
from mtseg.layouts import stem
from mtseg.results import case_means, one_or_all, summarize, table, to_csv, without_nan
from mtseg.script.config import LEARNED, read_config
from mtseg.script.flags import FlagError
from mtseg.script.inference_flags import listed_in
from mtseg.script.runfolder import RESULT_FOLDERS, holds_run, selection_of
from mtseg.script.segment import POSTPROCESSING

NETWORK = ("network", "n_channels", "num_classes", "n_filters", "normalization", "has_dropout")
# Of the rows; files have all.
PRINTED = ("case", "set", "class", "dice", "jaccard", "pixel_accuracy", "hd95", "asd", "uncertainty")
PRINTED += ("tp", "fp", "fn", "tn")


def split_of(args):
    """What was segmented, in a word: the list's name, or that of --input."""
    return Path(args.split).name if args.input is None else stem(args.input) or args.input.resolve().name


def output_folder(args, sources):
    """The folder for the results, which is made; FlagError where it cannot be written to, and where the results would
    replace the scans, {case: files} in `sources`, a run, or those of other cases."""
    first, *others = args.model_path
    name = f"{first.stem}_and_{len(others)}_more" if others else first.stem
    folder = args.output_dir or first.parent / f"{name}_{split_of(args)}"
    before = read_config(folder / "metrics.json")
    there = before.get("checkpoint") if others and not args.output_dir else None
    if isinstance(there, list) and {Path(file).resolve() for file in there} != {p.resolve() for p in args.model_path}:
        raise FlagError(f"{folder}: holds the results of other weights, of so many and called so; give --output_dir")
    measured = {row.get("case") for row in before.get("cases") or () if isinstance(row, dict)}
    if lost := measured - sources.keys():
        raise FlagError(
            f"{folder}: holds results of {some(sorted(map(str, lost)))} that are not tested now and would be lost; "
            f"give another --output_dir, or remove it"
        )
    if holds_run(folder):
        raise FlagError(f"--output_dir {folder}: a run lies there, whose metrics.csv would be replaced; name another")
    read = {path.resolve().parent for files in sources.values() for path in files}
    if not read.isdisjoint((folder / part).resolve() for part in RESULT_FOLDERS):
        raise FlagError(f"--output_dir {folder}: what is written there would replace the input; name another")
    if args.save_result and args.save_result.resolve() in read:
        raise FlagError(f"--save_result {args.save_result}: the cases themselves lie there; name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise FlagError(f"--output_dir {folder}: cannot be written to ({error.strerror}); name another") from error
    return folder


def protocol_of(args):
    """What the results depend on beside the weights and the data."""
    protocol = {"patch_size": args.patch_size, "stride_xy": args.stride_xy}
    protocol |= {"stride_z": args.stride_z} if args.dims == 3 else {}
    unusual = {
        "resize": args.resize,
        "context": args.context,
        "slices_first": args.slices_first,
        "intensity": args.intensity != ("none" if args.dims == 3 else "zscore") and args.intensity,
        "weighting": args.weighting != "uniform" and args.weighting,
        "case_statistics": args.case_statistics,
        "tta": args.tta and ("flips" if args.dims == 2 else "flips of W and H"),
        "postprocessing": [step for step in POSTPROCESSING if getattr(args, step)],
    }
    protocol |= {name: value for name, value in unusual.items() if value}
    return protocol | ({} if args.ignore_index is None else {"ignore_index": args.ignore_index})


def monitored_here(args, cases):
    """The `cases` whose Dice a run watched."""
    return listed_in(args.configs, "val_cases") & cases.readers.keys()


def chosen_here(args, cases, selection):
    """Whether the Dice of these `cases` had a say in the weights: all but the last of a run without patience, whose
    rate did not follow it."""
    followed = any(config.get("patience") or config.get("lr_schedule") == "plateau" for config in args.configs)
    return bool(monitored_here(args, cases)) and (followed or selection != "last iteration")


def result_of(args, trained, cases, entries):
    """What metrics.json says of the `cases` (scans.Cases), `entries`: {case: what segment.infer_case gave}."""
    rows = [row for case in cases.readers if case in entries for row in entries[case]["rows"]]
    rows = [{key: math.nan if value is None else value for key, value in row.items()} for row in rows]
    learned = listed_in(args.configs, *LEARNED)
    selection = one_or_all(map(selection_of, args.model_path, args.configs, trained.checkpoints))
    seconds, iterations, memory = (None if None in cost else cost for cost in zip(*trained.costs, strict=True))
    result = {
        "checkpoint": one_or_all(map(str, args.model_path)),
        "checkpoint_sha256": one_or_all(trained.sha256),
        "selection": "test set" if chosen_here(args, cases, selection) else selection,
        "dataset": args.dataset_name,
        "split": split_of(args),
        "protocol": protocol_of(args),
        "unit": cases.unit,
        "tolerance": args.tolerance,
        "network": {name: getattr(args, name) for name in NETWORK} | trained.settings,
        "classes": args.classes,
        "method": one_or_all(config.get("model") for config in args.configs),
        "labelnum": one_or_all(config.get("labelnum") for config in args.configs),
        "seed": one_or_all(config.get("seed") for config in args.configs),
        "trained_on": sorted(learned & {row["case"] for row in rows}),
        "parameters": trained.parameters,
        "inference_seconds": sum(entry["seconds"] for entry in entries.values()),
        "training_seconds": seconds and sum(seconds),
        "iteration_seconds": seconds and sum(seconds) / sum(iterations),
        "peak_memory_mb": memory and max(memory),
        "torch": str(torch.__version__),
        "summary": summarize(rows),
        "patients": cases.patients,
        "cases": rows,
    }
    if args.split == "fold" and args.num is None:  # of the whole fold: the report pools it with the others
        result |= {name: args.configs[0].get(name) for name in ("fold", "folds")}
    if args.input:
        result |= {"input": str(args.input.resolve()), "preprocessing": cases.settings}
        result |= {"segmented": len(entries), "failures": cases.failures}
    if args.uncertainty:
        unsure, dices = (case_means(rows, metric) for metric in ("uncertainty", "dice"))
        samples = f", {args.mc_samples} samples" if args.uncertainty == "mc_dropout" else ""
        result["uncertainty"] = {
            "method": args.uncertainty + samples,
            "cases": {case: entry["uncertainty"] for case, entry in entries.items()},
            "rank_correlation": rank_correlation(unsure.values(), dices.values()),
            "labelled_cases": len(dices),
        }
    return result


def write_and_print(args, result, cases, folder):
    """Write `result` to metrics.json and its rows to metrics.csv, and print what a person wants to know of it."""
    rows = result["cases"]
    if rows:
        shown = [{key: row[key] for key in PRINTED if key in row} for row in rows]
        print(table(shown, unit=result["unit"], pooled="pixel_accuracy" in rows[0]))
        write_whole(folder / "metrics.csv", to_csv(rows).encode())
    write_whole(folder / "metrics.json", json.dumps(without_nan(result), indent=1).encode())
    if args.uncertainty:
        correlation = result["uncertainty"]["rank_correlation"]
        print(f"uncertainty ({args.uncertainty}, nats): rank correlation with 1 - Dice {correlation:.3f}")
    if args.input:
        labelled = len({row["case"] for row in rows})
        print(f"{result['segmented']} cases are in {folder / 'predictions'}, {labelled} of them were measured")
    monitored = " (the cases it was monitored on are tested here)" if monitored_here(args, cases) else ""
    print(f"checkpoint selected by: {result['selection']}{monitored}")
    print(f"written to {folder}/{'metrics.csv and ' if rows else ''}metrics.json")
    if result["trained_on"]:
        print(f"{len(result['trained_on'])} of the measured cases are cases the network was trained on")
    if cases.failures:
        print(f"{len(cases.failures)} of {len(cases.readers.keys() | cases.failures.keys())} cases failed:")
        for case, why in cases.failures.items():
            print(f"  {case}: {why}")
