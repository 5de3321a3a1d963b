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

import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data.make_phantom import PhantomError, make_phantom
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
from mtseg.caselog import CaseLog, CaseLogError
from mtseg.checkpoint import CheckpointError, file_sha256, load_checkpoint, load_weights, write_whole
from mtseg.datasets import DataError, LAHeart
from mtseg.flags import FlagError, Parser, classes, one_sentence, patch_side, positive, rate, read_config
from mtseg.layouts import LayoutError, find_cases, stem
from mtseg.metrics import all_metrics
from mtseg.networks.unet import UNet
from mtseg.networks.vnet import VNet
from mtseg.postprocess import fill_holes, largest_component
from mtseg.preprocess import (
    Grid,
    PreprocessError,
    check_settings,
    grid_from_attributes,
    prepare,
    restore_scores,
    to_classes,
)
from mtseg.results import summarize, table, to_csv, without_nan
from mtseg.runfolder import RunError, choose_device
from mtseg.runlog import read_metrics
from mtseg.seeding import seed_iteration
from mtseg.sliding_window import optimize_for_inference, test_single_case
from mtseg.volumes import (
    VolumeError,
    ending,
    hdf5_bytes,
    need,
    nifti_header,
    read_channels,
    read_on_grid,
    read_volume,
    volume_bytes,
)

HERE = Path(__file__).resolve().parent
NETWORK = ("network", "n_channels", "num_classes", "n_filters", "normalization", "has_dropout")
DEFAULTS = {
    "root_path": str(HERE / "data/LA"),
    "dataset_name": "LA",
    "network": "vnet",
    "n_channels": 1,
    "num_classes": 2,
    "n_filters": 16,
    "normalization": "batchnorm",
    "has_dropout": True,
    "patch_size": [112, 112, 80],
    "stride_xy": 18,
    "stride_z": 4,
    "max_iterations": None,
    "selection": "unknown",
}
PACKAGES = {".nii": "nibabel", ".nii.gz": "nibabel", ".nrrd": "nrrd"}
POSTPROCESSING = {"largest_component": largest_component, "fill_holes": fill_holes}  # in the order they are done
PRINTED = ("case", "class", "dice", "jaccard", "hd95", "asd", "uncertainty")  # of the rows; files have all
BROKEN = (VolumeError, PreprocessError, MemoryError, torch.cuda.OutOfMemoryError)  # what costs only the case


def parse_flags(argv):
    parser = Parser(description=__doc__)
    flag = parser.add_argument
    flag(
        "--model_path",
        type=Path,
        nargs="+",
        required=True,
        help="weights: iter_<N>.pth, ema_iter_<N>.pth, latest.pth, ...; the probabilities of several are averaged",
    )
    flag("--root_path", help="folder with <split>.list and data/ (default: the run's)")
    flag("--split", default="test", help="cases to segment: those of <root_path>/<split>.list")
    flag("--num", type=positive, help="only the first cases (default: all)")
    flag("--output_dir", type=Path, help="folder for the results (default: beside the checkpoint)")
    flag("--save_result", type=Path, metavar="DIR", help="also write image, label and prediction of each case there")
    flag("--save_format", choices=("hdf5", "nifti"), default="hdf5", help="nifti needs NiBabel")
    flag("--gpu", default="0", help="number of the GPU; without one the CPU is used")
    flag = parser.add_argument_group("scans instead of a list").add_argument
    flag("--input", type=Path, metavar="PATH", help="NIfTI, NRRD or HDF5 file, folder of them, nnU-Net's imagesTs, ...")
    flag("--labels", type=Path, metavar="DIR", help="folder with their labels (default: where the layout has them)")
    flag("--preprocessing", type=Path, metavar="FILE", help="a preprocessing.json (default: the run's)")
    flag("--continue", dest="go_on", action="store_true", help="pass over the cases that an earlier call finished")
    flag = parser.add_argument_group("averaging and cleaning up").add_argument
    flag("--tta", action="store_true", help="average over the eight mirrored images, too")
    flag("--weighting", choices=("uniform", "gaussian"), default="uniform", help="of a window's voxels in the average")
    flag("--largest_component", action="store_true", help="keep only the largest connected piece of each class")
    flag("--fill_holes", action="store_true", help="fill background that a class encloses")
    flag("--save_probabilities", action="store_true", help="also write <output_dir>/probabilities/<case>.h5, float16")
    flag(
        "--uncertainty",
        choices=("mc_dropout", "ensemble", "teacher"),
        help="write the predictive entropy of samples with dropout, of the networks of --model_path, or of student "
        "and teacher (iter_<N>.pth and ema_iter_<N>.pth) to <output_dir>/uncertainty/, and its mean a case",
    )
    flag("--mc_samples", type=positive, default=8, help="samples of mc_dropout")
    flag = parser.add_argument_group("measuring").add_argument
    flag(
        "--unit",
        choices=("mm", "voxel"),
        help="of distances (default: voxel, as in the papers; with --input mm where all spacings are known)",
    )
    flag("--tolerance", type=rate, default=1.0, help="of the normalized surface Dice, in that unit")
    flag = parser.add_argument_group("settings, by default the run's").add_argument
    flag("--network", choices=("vnet", "unet"), help="architecture")
    flag("--n_channels", type=positive, help="channels of the image")
    flag("--num_classes", type=classes, help="classes, background included")
    flag("--n_filters", type=positive, help="channels on the finest level")
    flag("--normalization", choices=("none", "batchnorm", "groupnorm", "instancenorm"), help="after each convolution")
    flag("--patch_size", type=patch_side, nargs=3, metavar=("W", "H", "D"), help="voxels of a window")
    flag("--stride_xy", type=positive, help="voxels between windows along W and H")
    flag("--stride_z", type=positive, help="voxels between windows along D")
    args = parser.parse_args(argv)
    args.configs = [read_config(path.parent / "config.json") for path in args.model_path]
    for name, default in DEFAULTS.items():
        if getattr(args, name, None) is None:
            setattr(args, name, args.configs[0].get(name, default))
    if args.input is None and (args.labels or args.preprocessing or args.go_on):
        raise FlagError("--labels, --preprocessing and --continue are about scans: name them by --input")
    if args.input and args.save_result:
        raise FlagError("--save_result is for the cases of a list: with --input predictions are written anyway")
    if args.uncertainty == "ensemble" and len(args.model_path) < 2:
        raise FlagError("--uncertainty ensemble with one --model_path: give several checkpoints, or use mc_dropout")
    return args


# --------------------------------------------------------------------------------------------------------------- cases


class Scan(NamedTuple):
    """A case as the network sees it, and where its prediction belongs.

    `image`: float32 (W, H, D) or (C, W, H, D), prepared. `label`: uint8 classes, or None. `spacing`: mm between the
    label's voxels, None where not known. `grid`: the prepared volume's place in the scan, None where it is the scan.
    `kind`, `header`: of the file to be written, as volumes.volume_bytes takes them. `values`: of the classes in it.
    `label_prepared`: whether the label lies on the prepared grid, not on the scan's.
    """

    image: np.ndarray
    label: np.ndarray | None
    spacing: np.ndarray | None
    grid: Grid | None = None
    kind: str = ".h5"
    header: Any = None
    values: list | None = None
    label_prepared: bool = True


def read_listed(dataset, case, unit):
    """The Scan of a case of a list."""
    sample = dataset.read(case)
    spacing = read_volume(dataset.path(case), header_only=True).spacing if unit == "mm" else None
    return Scan(sample["image"], sample["label"], spacing)


def read_input(case, settings, args):
    """The Scan of a case of --input: HDF5 as it is, other formats prepared by `settings`."""
    volume = read_channels(case.images)
    kind, label = ending(case.images[0]), volume.label
    values = settings["labels"] if settings else list(range(args.num_classes))
    try:
        if kind in (".h5", ".hdf5"):
            if not np.isfinite(volume.array).all():
                raise PreprocessError("the image holds NaN or infinity; repair it")
            label = None if label is None else to_classes(label, list(range(args.num_classes)))
            scan = Scan(
                np.float32(volume.array), label, volume.spacing, kind=kind, values=list(range(args.num_classes))
            )
            grid, affine = grid_from_attributes(volume.header), volume.header.get("original_affine")
            if grid is not None and affine is not None:
                scan = scan._replace(grid=grid, kind=".nii.gz", header=nifti_header(affine), values=values)
            if case.label is not None:
                scan = scan._replace(label=to_classes(read_on_grid(case.label, volume), values))
        else:
            done = prepare(volume.array, volume.affine, volume.spacing, settings)
            label = None if case.label is None else to_classes(read_on_grid(case.label, volume), values)
            scan = Scan(done.image, label, volume.spacing, done.grid, kind, volume.header, values, label_prepared=False)
    except PreprocessError as error:
        raise PreprocessError(f"{case.images[0]}: {error}") from error
    channels = 1 if scan.image.ndim == 3 else len(scan.image)
    if channels != args.n_channels:
        raise VolumeError(f"{case.images[0]}: has {channels} channels, the network takes {args.n_channels}")
    return scan


def preprocessing_of(args):
    """How scans are prepared: --preprocessing, else what the run recorded, else what lies with its data; or None."""
    if args.preprocessing:
        settings = read_config(args.preprocessing)
        if not settings:
            raise FlagError(f"{args.preprocessing}: no such preprocessing; give one that data/prepare_nifti.py wrote")
    else:
        found = [config.get("preprocessing") for config in args.configs]
        if any(other != found[0] for other in found):
            raise FlagError("the runs of --model_path prepared their data differently; they cannot be averaged")
        settings = found[0] or read_config(Path(args.root_path) / "preprocessing.json")
    if not settings:
        return None
    check_settings(settings)
    if len(settings["labels"]) != args.num_classes:
        raise FlagError(
            f"the network has {args.num_classes} classes, the preprocessing {len(settings['labels'])} "
            f"(labels {settings['labels']}); give the --preprocessing of its training data"
        )
    return settings


def find_input(args, settings):
    """{name: Case} of --input, in order."""
    cases, _ = find_cases(args.input, channels=settings and settings["channels"], labels=args.labels)
    raw = next((case.images[0] for case in cases if ending(case.images[0]) not in (".h5", ".hdf5")), None)
    if raw and settings is None:
        raise FlagError(
            f"{raw}: how it is to be prepared is recorded neither in {args.model_path[0].parent / 'config.json'} nor "
            f"in {Path(args.root_path) / 'preprocessing.json'}; give a preprocessing.json by --preprocessing"
        )
    for kind in {ending(case.images[0]) for case in cases}:  # said once, not once a case
        if kind in PACKAGES:
            need(PACKAGES[kind], f"{args.input}: reading {kind} files")
    return {case.name: case for case in cases[: args.num]}


def choose_unit(args, paths):
    """'mm' or 'voxel', one for all cases: `paths` are files that know their spacing, or do not."""
    if args.unit == "voxel" or (args.unit is None and not args.input):
        return "voxel"
    for path in paths:
        try:
            unknown = read_volume(path, header_only=True).spacing is None
        except VolumeError:
            continue  # is met again, and reported, when the case is read
        if unknown and args.unit == "mm":
            raise FlagError(f"{path}: does not say how wide its voxels are; measure all cases with --unit voxel")
        if unknown:
            print(f"{path} does not say how wide its voxels are: distances of all cases are in voxels")
            return "voxel"
    return "mm"


# ---------------------------------------------------------------------------------------------------------- networks


def load_networks(args, device):
    """(networks, their teachers or students for --uncertainty teacher, checkpoints, number of parameters), in eval
    mode on the device."""

    def load(path):
        net = {"vnet": VNet, "unet": UNet}[args.network](
            n_channels=args.n_channels,
            n_classes=args.num_classes,
            n_filters=args.n_filters,
            normalization=args.normalization,
            has_dropout=args.has_dropout,
        )
        checkpoint = load_checkpoint(path)
        parameters = sum(parameter.numel() for parameter in net.parameters())
        return optimize_for_inference(load_weights(net, checkpoint, path).to(device).eval()), checkpoint, parameters

    loaded = [load(path) for path in args.model_path]
    partners = []
    if args.uncertainty == "teacher":
        for path in args.model_path:
            name = path.name.removeprefix("ema_") if path.name.startswith("ema_") else f"ema_{path.name}"
            if not path.with_name(name).is_file():
                raise FlagError(f"--uncertainty teacher: beside {path} there is no {name} to compare it with")
            partners.append(load(path.with_name(name))[0])
    nets = [net for net, _, _ in loaded]
    with dropout_on(nets) as layers:
        if args.uncertainty == "mc_dropout" and not (layers and args.has_dropout):
            raise FlagError("--uncertainty mc_dropout: the network has no dropout; use an ensemble")
    return nets, partners, [checkpoint for _, checkpoint, _ in loaded], sum(number for *_, number in loaded)


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


# ---------------------------------------------------------------------------------------------------------- a case


def save_case(folder, case, format, volumes):
    """Write the arrays in `volumes` to `folder`: as <case>.h5, or as <case>_<name>.nii.gz with voxels of 1 mm.

    A NIfTI image of several channels has them on its last axis.
    """
    if format == "hdf5":
        write_whole(folder / f"{case}.h5", hdf5_bytes(volumes))
        return
    for name, volume in volumes.items():
        volume = np.moveaxis(volume, 0, -1) if volume.ndim == 4 else volume
        write_whole(folder / f"{case}_{name}.nii.gz", volume_bytes(volume, ".nii.gz", nifti_header(np.eye(4))))


def clean(prediction, args):
    for name, function in POSTPROCESSING.items():
        if getattr(args, name):
            prediction = function(prediction)
    return prediction


def infer_case(name, scan, nets, partners, unit, output_dir, args):
    """Segment, write and measure a case; returns its entry of the record."""
    started = time.perf_counter()
    scores, mixture = segment(nets, partners, scan.image, args)
    seconds = time.perf_counter() - started

    def on_scan(scores):
        return scores if scan.grid is None else restore_scores(scores, scan.grid)

    prediction = clean(label_map(on_scan(scores)), args)
    entry = {"seconds": seconds, "uncertainty": None, "rows": []}
    if args.input:
        entry["prediction"] = f"{name}{scan.kind}"
        values = np.array(scan.values, np.min_scalar_type(max(scan.values)))
        content = volume_bytes(values[prediction], scan.kind, scan.header)
        write_whole(output_dir / "predictions" / entry["prediction"], content)
    if args.save_result:
        volumes = {"image": scan.image, "label": scan.label, "prediction": prediction}
        save_case(args.save_result, name, args.save_format, volumes)
    if args.save_probabilities:
        probabilities = np.stack([score.astype(np.float16) for score in on_scan(scores)])
        content = hdf5_bytes({"probabilities": probabilities})
        write_whole(output_dir / "probabilities" / f"{name}.h5", content)
    if mixture is not None:
        entropy_map = entropy(on_scan(mixture))
        entry["uncertainty"] = case_uncertainty(entropy_map, prediction)
        kind = scan.kind if args.input else ".h5"
        content = hdf5_bytes({"uncertainty": entropy_map})
        if kind not in (".h5", ".hdf5"):
            content = volume_bytes(entropy_map, kind, scan.header)
        write_whole(output_dir / "uncertainty" / f"{name}{kind}", content)

    if scan.label is not None:
        if scan.grid is not None and scan.label_prepared:
            prediction = clean(label_map(scores), args)
        spacing = scan.spacing if unit == "mm" else None
        for label in range(1, args.num_classes):
            measured = all_metrics(prediction == label, scan.label == label, spacing, args.tolerance)
            unsure = {"uncertainty": entry["uncertainty"]} if args.uncertainty else {}
            entry["rows"].append({"case": name, "class": label, **measured, **unsure})
    return entry


# --------------------------------------------------------------------------------------------------------- all cases


def infer(args):
    if args.save_result and args.save_format == "nifti":
        need("nibabel", "--save_format nifti")

    # ------------------------------------------------------------------------------------------ data and network
    name = args.model_path[0].stem + f"_and_{len(args.model_path) - 1}_more" * (len(args.model_path) > 1)
    split = (stem(args.input) or args.input.resolve().name) if args.input else args.split
    output_dir = args.output_dir or args.model_path[0].parent / f"{name}_{split}"
    settings = None
    if args.input:
        settings = preprocessing_of(args)
        cases = find_input(args, settings)
        if args.input.resolve() == (output_dir / "predictions").resolve():
            raise FlagError(f"--output_dir {output_dir}: its predictions would replace the input; name another")
        paths = [c.images[0] for c in cases.values() if c.label or ending(c.images[0]) in (".h5", ".hdf5")]
        unit = choose_unit(args, paths)
        readers = {case: partial(read_input, cases[case], settings, args) for case in cases}
    else:
        root = Path(args.root_path)
        if root == HERE / "data/Phantom":
            make_phantom(root)
        dataset = LAHeart(root / "data", split=args.split, num=args.num, num_classes=args.num_classes)
        if dataset.n_channels != args.n_channels:
            raise FlagError(
                f"the network takes {args.n_channels} channels, the cases in {root} have {dataset.n_channels}"
            )
        for case in dataset.image_list:
            dataset.read(case)  # a broken file is better found now than after an hour of segmenting
        unit = choose_unit(args, map(dataset.path, dataset.image_list))
        readers = {case: partial(read_listed, dataset, case, unit) for case in dataset.image_list}

    nets, partners, checkpoints, parameters = load_networks(args, choose_device(args.gpu))
    sha256 = [file_sha256(path) for path in args.model_path]
    protocol = {"patch_size": args.patch_size, "stride_xy": args.stride_xy, "stride_z": args.stride_z}
    if args.weighting != "uniform":
        protocol["weighting"] = args.weighting
    if args.tta:
        protocol["tta"] = "flips"
    if any(getattr(args, name) for name in POSTPROCESSING):
        protocol["postprocessing"] = [name for name in POSTPROCESSING if getattr(args, name)]

    # --------------------------------------------------------------------------------------------------- inference
    entries, failures, log = {}, {}, None
    if args.input:
        asked = {"checkpoint_sha256": sha256, "protocol": protocol, "preprocessing": settings, "unit": unit}
        asked |= {
            name: getattr(args, name) for name in ("uncertainty", "mc_samples", "save_probabilities", "tolerance")
        }
        asked["labels"] = args.labels and str(args.labels.resolve())
        log = CaseLog(output_dir / "cases.jsonl", asked, keep=args.go_on)
        there = {path.name for path in (output_dir / "predictions").glob("*")}
        entries = {c: entry for c, entry in log.done.items() if c in readers and entry.get("prediction") in there}
    for case in tqdm([case for case in readers if case not in entries], unit="case", dynamic_ncols=True):
        try:
            entries[case] = infer_case(case, readers[case](), nets, partners, unit, output_dir, args)
        except BROKEN as error:
            if not args.input:
                raise
            failures[case] = " ".join(str(error).split()) or type(error).__name__
            tqdm.write(f"failed: {case}: {failures[case]}")
            continue
        if log:
            log.add(case, without_nan(entries[case]))

    # ------------------------------------------------------------------------------------------------------ results
    rows = [row for case in readers if case in entries for row in entries[case]["rows"]]
    rows = [{key: math.nan if value is None else value for key, value in row.items()} for row in rows]
    shared = readers.keys() & {case for config in args.configs for case in config.get("val_cases", [])}
    trained_on = {row["case"] for row in rows} & {c for config in args.configs for c in config.get("train_cases", [])}
    result = {
        "checkpoint": one_or_all(map(str, args.model_path)),
        "checkpoint_sha256": one_or_all(sha256),
        "selection": "test set" if shared else one_or_all(selections(args, checkpoints)),
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
        "training_seconds": training_seconds({path.parent for path in args.model_path}),
        "torch": str(torch.__version__),
        "summary": summarize(rows),
        "cases": rows,
    }
    if args.input:
        result |= {"input": str(args.input), "preprocessing": settings, "segmented": len(entries), "failures": failures}
    if args.uncertainty:
        result["uncertainty"] = uncertainty_of(args, entries, rows)
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
    print(
        f"checkpoint selected by: {result['selection']}"
        + " (the cases it was monitored on are tested here)" * bool(shared)
    )
    print(f"written to {output_dir}/{'metrics.csv and ' * bool(rows)}metrics.json")
    if failures:
        print(f"{len(failures)} of {len(readers)} cases failed:")
        for case, why in failures.items():
            print(f"  {case}: {why}")
    return result


def one_or_all(values):
    """The value that all have in common, or the list of them."""
    values = list(values)
    return values[0] if all(value == values[0] for value in values) else values


def selections(args, checkpoints):
    """How each checkpoint was chosen among those of its run."""
    for path, config, checkpoint in zip(args.model_path, args.configs, checkpoints, strict=True):
        selection, last = (config.get(name, DEFAULTS[name]) for name in ("selection", "max_iterations"))
        if selection == "validation list" and not path.stem.endswith("best_model"):
            selection = "last iteration"
        if selection == "last iteration" and checkpoint.get("iteration", last) != last:
            selection = f"iteration {checkpoint['iteration']} of an unfinished run"
        yield selection


def training_seconds(folders):
    """The time of all iterations in the runs' metrics.csv, validation and saving between them included; else None."""
    seconds = 0.0
    for folder in folders:
        before, rows = 0, read_metrics(folder / "metrics.csv")
        for row in rows:
            seconds += (int(row["iteration"]) - before) / float(row["iterations_per_second"])
            before = int(row["iteration"])
        if not rows:
            return None
    return seconds


def uncertainty_of(args, entries, rows):
    """The uncertainty of every case, and its rank correlation with 1 - Dice (the mean of the classes)."""
    values = {case: entry["uncertainty"] for case, entry in entries.items()}
    dices = {case: [row["dice"] for row in rows if row["case"] == case] for case in values}
    pairs = [(values[case], sum(dices[case]) / len(dices[case])) for case in values if dices[case]]
    pairs = [(math.nan if u is None else u, d) for u, d in pairs]
    correlation = rank_correlation(*zip(*pairs, strict=True)) if pairs else math.nan
    method = {"mc_dropout": f"mc_dropout, {args.mc_samples} samples"}.get(args.uncertainty, args.uncertainty)
    return {"method": method, "cases": values, "rank_correlation": correlation, "labelled_cases": len(pairs)}


def main(argv=None):
    mistakes = (FlagError, DataError, PhantomError, CheckpointError, RunError)
    with one_sentence(*mistakes, VolumeError, LayoutError, PreprocessError, CaseLogError):
        result = infer(parse_flags(argv))
    if result.get("failures"):
        raise SystemExit(1)
    return result


if __name__ == "__main__":
    main()
