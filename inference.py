"""Segment volumes with a trained network and measure the result against their labels, where there are any.

    python inference.py --model_path model/LA_vnet_25_labeled/MT/iter_6000.pth
    python inference.py --model_path model/LA_vnet_25_labeled/MT/ema_iter_6000.pth --save_result predictions
    python inference.py --model_path theirs.pth --root_path /data/LA --n_filters 16       # weights without config.json
    python inference.py --model_path model/Heart_vnet_8_labeled/MT/iter_6000.pth --input Task02_Heart/imagesTs
    python inference.py --model_path run1/iter_6000.pth run2/iter_6000.pth --tta --weighting gaussian --input scans

Without --input: the cases of a list, by the UA-MT protocol. Prints a row per case and mean (standard deviation), and
writes metrics.csv and metrics.json into <folder of the checkpoint>/<its name>_<split>/. With --input: scans as they
are; they are prepared as the training data was (the run's preprocessing), and predictions are written on the scan's
own grid, with the values its labels have, into <output_dir>/predictions/; a broken file is passed over, named at the
end, and makes the exit code 1. Settings come from the flags, else from the run's config.json beside the checkpoint,
else they are those of the UA-MT protocol: windows of 112 x 112 x 80 voxels, strides 18 and 4.
"""

from pathlib import Path

from mtseg.script import flags

if __name__ == "__main__":  # --help and misspelt flags are answered before PyTorch is loaded, which takes seconds
    flags.inference_parser(__doc__).parse_args()

import json
import math
import time

import numpy as np
import torch
from tqdm import tqdm

from mtseg.allocator import keep_freed_memory
from mtseg.averaging import (
    ALL_FLIPS,
    NO_FLIPS,
    case_uncertainty,
    dropout_on,
    entropy,
    label_map,
    mean_score,
    rank_correlation,
)
from mtseg.checkpoint import CheckpointError, file_sha256, load_checkpoint, load_weights, write_whole
from mtseg.datasets import DataError
from mtseg.layouts import LayoutError, stem
from mtseg.metrics import all_metrics
from mtseg.networks import NETWORKS
from mtseg.phantom import PhantomError
from mtseg.postprocess import fill_holes, largest_component
from mtseg.preprocess import PreprocessError, restore_scores
from mtseg.results import case_means, one_or_all, summarize, table, to_csv, without_nan
from mtseg.script import scans
from mtseg.script.caselog import CaseLog, CaseLogError
from mtseg.script.flags import FlagError
from mtseg.script.runfolder import RunError, choose_device, selection_of
from mtseg.script.runlog import training_seconds
from mtseg.seeding import seed_iteration
from mtseg.sliding_window import optimize_for_inference, test_single_case
from mtseg.volumes import VolumeError, hdf5_bytes, volume_bytes
from mtseg.winograd import WinogradError, winograd_convolutions

HERE = Path(__file__).resolve().parent
NETWORK = ("network", "n_channels", "num_classes", "n_filters", "normalization", "has_dropout")
POSTPROCESSING = {"largest_component": largest_component, "fill_holes": fill_holes}  # in the order they are done
PRINTED = ("case", "class", "dice", "jaccard", "hd95", "asd", "uncertainty")  # of the rows; files have all
BROKEN = (VolumeError, PreprocessError, MemoryError, torch.cuda.OutOfMemoryError)


def parse_flags(argv):
    return flags.parse_inference(flags.inference_parser(__doc__), argv, HERE / "data/LA")


def load_networks(args, device):
    """(networks, their teachers or students for --uncertainty teacher, checkpoints, number of parameters), in eval
    mode on the device."""

    def load(path):
        checkpoint = load_checkpoint(path)
        net = NETWORKS[args.network](**flags.network_settings(args, args.n_channels))
        return load_weights(net, checkpoint, path).to(device).eval(), checkpoint

    nets, checkpoints = zip(*map(load, args.model_path), strict=True)
    partners = []
    for path in args.model_path if args.uncertainty == "teacher" else ():
        name = path.name.removeprefix("ema_") if path.name.startswith("ema_") else f"ema_{path.name}"
        if not path.with_name(name).is_file():
            raise FlagError(f"--uncertainty teacher: beside {path} there is no {name} to compare it with")
        partners.append(optimize_for_inference(load(path.with_name(name))[0]))
    with dropout_on(nets) as layers:
        if args.uncertainty == "mc_dropout" and not (layers and args.has_dropout):
            raise FlagError("--uncertainty mc_dropout: the network has no dropout; use an ensemble")
    parameters = sum(parameter.numel() for net in nets for parameter in net.parameters())
    return [optimize_for_inference(net) for net in nets], partners, checkpoints, parameters


def segment(nets, partners, image, args):
    """(scores, mixture): the score map of `image`, and the one whose entropy is the uncertainty (None without it)."""

    def predict(net, image):
        _, score = test_single_case(
            net, image, args.stride_xy, args.stride_z, args.patch_size, args.num_classes, weighting=args.weighting
        )
        return score

    flips = ALL_FLIPS if args.tta else NO_FLIPS
    scores = mean_score(predict, nets, image, flips)
    if args.uncertainty == "ensemble":
        return scores, scores
    if args.uncertainty == "teacher":
        return scores, (scores + mean_score(predict, partners, image, flips)) / 2
    if args.uncertainty == "mc_dropout":
        mixture = np.zeros_like(scores)
        with dropout_on(nets):
            for sample in range(args.mc_samples):
                seed_iteration(0, sample)  # the same masks for every case: a case does not depend on those before it
                mixture += mean_score(predict, nets, image, flips) / args.mc_samples
        return scores, mixture
    return scores, None


def costs_only_the_case(error):
    """Whether the other cases of a folder can be segmented all the same."""
    # PyTorch has no class of its own for a CPU without memory.
    return isinstance(error, BROKEN) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


def clean(prediction, args):
    for name, function in POSTPROCESSING.items():
        if getattr(args, name):
            prediction = function(prediction)
    return prediction


def infer_case(name, scan, nets, partners, unit, output_dir, args):
    """Segment, write and measure a case; returns its entry of the record."""
    started = time.perf_counter()
    scores, mixture = segment(nets, partners, scan.image, args)
    entry = {"seconds": time.perf_counter() - started, "uncertainty": None, "rows": [], "files": []}
    entry["label_error"] = scan.label_error

    def write(path, content):
        write_whole(output_dir / path, content)
        entry["files"].append(path)

    prediction = clean(label_map(restore_scores(scores, scan.grid)), args)
    if args.input:
        values = np.array(scan.values, np.min_scalar_type(max(scan.values)))
        write(f"predictions/{name}{scan.kind}", volume_bytes(values[prediction], scan.kind, scan.header))
    if args.save_result:
        volumes = {"image": scan.image, "label": scan.label, "prediction": prediction}
        scans.save_case(args.save_result, name, args.save_format, volumes)
    if args.save_probabilities:
        probabilities = np.stack([score.astype(np.float16) for score in restore_scores(scores, scan.grid)])
        write(f"probabilities/{name}.h5", hdf5_bytes({"probabilities": probabilities}))
    if mixture is not None:
        unsure = entropy(restore_scores(mixture, scan.grid))
        entry["uncertainty"] = case_uncertainty(unsure, prediction)
        write(f"uncertainty/{name}{scan.kind}", volume_bytes(unsure, scan.kind, scan.header, "uncertainty"))
    if scan.label is not None:
        if scan.grid is not None and scan.label_prepared:
            prediction = clean(label_map(scores), args)
        spacing = scan.spacing if unit == "mm" else None
        for label in range(1, args.num_classes):
            row = {"case": name, "class": label}
            row |= all_metrics(prediction == label, scan.label == label, spacing, args.tolerance)
            entry["rows"].append(row | ({"uncertainty": entry["uncertainty"]} if args.uncertainty else {}))
    return entry


def infer(args):
    # ------------------------------------------------------------------------------------------- cases and networks
    name = args.model_path[0].stem + f"_and_{len(args.model_path) - 1}_more" * (len(args.model_path) > 1)
    split = (stem(args.input) or args.input.resolve().name) if args.input else args.split
    output_dir = args.output_dir or args.model_path[0].parent / f"{name}_{split}"
    device = choose_device(args.gpu)
    if device.type == "cpu" and args.keep_memory:
        keep_freed_memory()
    nets, partners, checkpoints, parameters = load_networks(args, device)
    for net in (*nets, *partners) if args.winograd else ():
        winograd_convolutions(net)
    sha256 = [file_sha256(path) for path in args.model_path]
    settings = scans.preprocessing_of(args) if args.input else None
    listed = None if args.input else (*scans.listed_scans(args), {}, {})
    readers, unit, sources, failures = listed or scans.input_scans(args, settings)
    written = {(output_dir / part).resolve() for part in ("predictions", "probabilities", "uncertainty")}
    if any(Path(file).parent in written for files in sources.values() for file, *_ in files):
        raise FlagError(f"--output_dir {output_dir}: what is written there would replace the input; name another")
    protocol = {"patch_size": args.patch_size, "stride_xy": args.stride_xy, "stride_z": args.stride_z}
    if args.weighting != "uniform":
        protocol["weighting"] = args.weighting
    if args.tta:
        protocol["tta"] = "flips"
    if any(getattr(args, step) for step in POSTPROCESSING):
        protocol["postprocessing"] = [step for step in POSTPROCESSING if getattr(args, step)]

    # --------------------------------------------------------------------------------------------------- inference
    entries, log, number = {}, None, len(readers) + len(failures)
    if args.input:
        asked = {"checkpoint_sha256": sha256, "protocol": protocol, "preprocessing": settings, "unit": unit}
        asked["input"] = str(args.input.resolve())
        asked |= {flag: vars(args)[flag] for flag in ("uncertainty", "mc_samples", "save_probabilities", "tolerance")}
        asked["labels"] = args.labels and str(args.labels.resolve())
        log = CaseLog(output_dir / "cases.jsonl", asked, keep=args.go_on, owner="input")
        for case, entry in log.done.items():
            if case in readers and entry.get("source") == sources[case]:
                if all((output_dir / path).is_file() for path in entry["files"]):
                    entries[case] = entry
    for case in tqdm([case for case in readers if case not in entries], unit="case", dynamic_ncols=True):
        try:
            entries[case] = infer_case(case, readers[case](), nets, partners, unit, output_dir, args)
        except Exception as error:
            if not (args.input and costs_only_the_case(error)):
                raise
            failures[case] = " ".join(str(error).split()) or type(error).__name__
            tqdm.write(f"failed: {case}: {failures[case]}")
            continue
        if why := entries[case]["label_error"]:
            failures[case] = f"segmented, but not measured: {why}"
            tqdm.write(f"failed: {case}: {failures[case]}")
        elif log:
            entries[case]["source"] = sources[case]
            log.add(case, without_nan(entries[case]))

    # ------------------------------------------------------------------------------------------------------ results
    rows = [row for case in readers if case in entries for row in entries[case]["rows"]]
    rows = [{key: math.nan if value is None else value for key, value in row.items()} for row in rows]
    shared = readers.keys() & {case for config in args.configs for case in config.get("val_cases", [])}
    trained_on = {row["case"] for row in rows} & {c for config in args.configs for c in config.get("train_cases", [])}
    selection = one_or_all(map(selection_of, args.model_path, args.configs, checkpoints))
    trained = [training_seconds(folder / "metrics.csv") for folder in {path.parent for path in args.model_path}]
    result = {
        "checkpoint": one_or_all(map(str, args.model_path)),
        "checkpoint_sha256": one_or_all(sha256),
        "selection": "test set" if shared else selection,
        "dataset": args.dataset_name,
        "split": split,
        "protocol": protocol,
        "unit": unit,
        "tolerance": args.tolerance,
        "network": {name: getattr(args, name) for name in NETWORK},
        "method": one_or_all(config.get("model") for config in args.configs),
        "labelnum": one_or_all(config.get("labelnum") for config in args.configs),
        "seed": one_or_all(config.get("seed") for config in args.configs),
        "trained_on": sorted(trained_on),
        "parameters": parameters,
        "inference_seconds": sum(entry["seconds"] for entry in entries.values()),
        "training_seconds": None if None in trained else sum(trained),
        "torch": str(torch.__version__),
        "summary": summarize(rows),
        "cases": rows,
    }
    if args.input:
        result |= {"input": str(args.input), "preprocessing": settings, "segmented": len(entries), "failures": failures}
    if args.uncertainty:
        unsure, dices = (case_means(rows, metric) for metric in ("uncertainty", "dice"))
        result["uncertainty"] = {
            "method": args.uncertainty + f", {args.mc_samples} samples" * (args.uncertainty == "mc_dropout"),
            "cases": {case: entry["uncertainty"] for case, entry in entries.items()},
            "rank_correlation": rank_correlation(unsure.values(), dices.values()),
            "labelled_cases": len(dices),
        }
    if rows:
        write_whole(output_dir / "metrics.csv", to_csv(rows).encode())
        print(table([{key: row[key] for key in PRINTED if key in row} for row in rows], unit=unit))
    write_whole(output_dir / "metrics.json", json.dumps(without_nan(result), indent=1).encode())
    if args.uncertainty:
        found = result["uncertainty"]["rank_correlation"]
        print(f"uncertainty ({args.uncertainty}, nats): rank correlation with 1 - Dice {found:.3f}")
    if args.input:
        labelled = len({row["case"] for row in rows})
        print(f"{len(entries)} cases are in {output_dir / 'predictions'}, {labelled} of them were measured")
    monitored = " (the cases it was monitored on are tested here)" * bool(shared)
    print(f"checkpoint selected by: {result['selection']}{monitored}")
    print(f"written to {output_dir}/{'metrics.csv and ' * bool(rows)}metrics.json")
    if trained_on:
        print(f"{len(trained_on)} of the measured cases are cases the network was trained on")
    if failures:
        print(f"{len(failures)} of {number} cases failed:")
        for case, why in failures.items():
            print(f"  {case}: {why}")
    return result


def main(argv=None):
    mistakes = (FlagError, DataError, PhantomError, CheckpointError, RunError, WinogradError)
    with flags.one_sentence(*mistakes, VolumeError, LayoutError, PreprocessError, CaseLogError):
        result = infer(parse_flags(argv))
    if result.get("failures"):
        raise SystemExit(1)
    return result


if __name__ == "__main__":
    main()
