"""Trained networks, and what is written and measured of a case that they segment.

`args` are always the flags of inference.py.
"""

import time
from typing import NamedTuple

import numpy as np
import torch

from mtseg.averaging import (
    ALL_FLIPS,
    NO_FLIPS,
    case_uncertainty,
    dropout_on,
    entropy,
    label_map,
    mean_score,
)
from mtseg.checkpoint import file_sha256, find_state_dict, load_checkpoint, load_weights, write_whole
from mtseg.metrics import all_metrics
from mtseg.networks import NETWORKS
from mtseg.postprocess import fill_holes, largest_component
from mtseg.preprocess import PreprocessError, restore_scores
from mtseg.script import scans
from mtseg.script.endings import out_of_memory
from mtseg.script.flags import FlagError, network_settings
from mtseg.seeding import seed_iteration
from mtseg.sliding_window import NotFiniteScoresError, optimize_for_inference, test_single_case
from mtseg.volumes import VolumeError, hdf5_bytes, volume_bytes
from mtseg.winograd import winograd_convolutions

POSTPROCESSING = {"largest_component": largest_component, "fill_holes": fill_holes}  # in the order they are done


class Trained(NamedTuple):
    """`nets`: networks in eval mode, on the device. `partners`: their teachers or students, for --uncertainty teacher.
    `checkpoints`: what the files of `nets` hold. `sha256`: of these files. `parameters`: of all `nets` together.
    `settings`: what the weights of the first tell of it beside the flags."""

    nets: list
    partners: list
    checkpoints: list
    sha256: list
    parameters: int
    settings: dict


def load_network(args, path):
    """(network in eval mode on the CPU, what the file at `path` holds, the settings that its weights tell)."""
    checkpoint = load_checkpoint(path)
    kind = NETWORKS[args.network]
    told = kind.settings_of(find_state_dict(checkpoint) or {})
    settings = network_settings(args, args.n_channels) | told
    try:
        net = kind(**settings)
    except (RuntimeError, OverflowError, MemoryError, TypeError) as error:  # PyTorch has no class of its own for this
        raise FlagError(f"{path}: a network of such settings is too large to be made ({settings})") from error
    return load_weights(net, checkpoint, path).eval(), checkpoint, told


def load_networks(args, device):
    """The Trained networks of --model_path."""
    nets, checkpoints, told = zip(*(load_network(args, path) for path in args.model_path), strict=True)
    partners = []
    for path in args.model_path if args.uncertainty == "teacher" else ():
        name = path.name.removeprefix("ema_") if path.name.startswith("ema_") else f"ema_{path.name}"
        if not path.with_name(name).is_file():
            raise FlagError(f"--uncertainty teacher: beside {path} there is no {name} to compare it with")
        partners.append(load_network(args, path.with_name(name))[0])
    with dropout_on(nets) as layers:
        if args.uncertainty == "mc_dropout" and not (layers and args.has_dropout):
            raise FlagError("--uncertainty mc_dropout: the network has no dropout; use an ensemble")
    parameters = sum(parameter.numel() for net in nets for parameter in net.parameters())
    nets, partners = ([optimize_for_inference(net.to(device)) for net in group] for group in (nets, partners))
    for net in (*nets, *partners):
        if args.channels_last:
            net.to(memory_format=torch.channels_last_3d)
        if args.winograd:
            winograd_convolutions(net)
    return Trained(nets, partners, checkpoints, [file_sha256(path) for path in args.model_path], parameters, told[0])


def segment(trained, image, args):
    """(scores, mixture): the score map of `image`, and the one whose entropy is the uncertainty (None without it)."""

    def predict(net, image):
        _, score = test_single_case(
            net, image, args.stride_xy, args.stride_z, args.patch_size, args.num_classes, weighting=args.weighting
        )
        return score

    flips = ALL_FLIPS if args.tta else NO_FLIPS
    scores = mean_score(predict, trained.nets, image, flips)
    if args.uncertainty == "ensemble":
        return scores, scores
    if args.uncertainty == "teacher":
        return scores, (scores + mean_score(predict, trained.partners, image, flips)) / 2
    if args.uncertainty == "mc_dropout":
        mixture = np.zeros_like(scores)
        with dropout_on(trained.nets):
            for sample in range(args.mc_samples):
                seed_iteration(0, sample)  # the same masks for every case: a case does not depend on those before it
                mixture += mean_score(predict, trained.nets, image, flips) / args.mc_samples
        return scores, mixture
    return scores, None


def clean(prediction, args):
    """`prediction` after the postprocessing that the flags ask for."""
    for name, function in POSTPROCESSING.items():
        if getattr(args, name):
            prediction = function(prediction)
    return prediction


def measure(prediction, label, spacing, args):
    """[{'class': 1, <metric>: value, ...}, ...]; voxels of the label `args.ignore_index` are background in both."""
    if args.ignore_index is not None:
        prediction = np.where(label == args.ignore_index, 0, prediction)
    classes = [number for number in range(1, args.num_classes) if number != args.ignore_index]
    return [{"class": c} | all_metrics(prediction == c, label == c, spacing, args.tolerance) for c in classes]


def infer_case(name, scan, trained, unit, output_dir, args):
    """Segment a case, write what the flags ask for and measure it; returns its entry of the record."""
    started = time.perf_counter()
    scores, mixture = segment(trained, scan.image, args)
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
        measured = {"num_classes": args.num_classes, "ignore_index": args.ignore_index}
        measured["spacing"] = None if scan.spacing is None else [float(side) for side in scan.spacing]
        scans.save_case(args.save_result, name, args.save_format, volumes, measured)
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
        more = {"uncertainty": entry["uncertainty"]} if args.uncertainty else {}
        rows = measure(prediction, scan.label, scan.spacing if unit == "mm" else None, args)
        entry["rows"] = [{"case": name} | row | more for row in rows]
    return entry


def costs_only_the_case(error):
    """Whether the other cases of a folder can be segmented all the same."""
    return isinstance(error, (VolumeError, PreprocessError, NotFiniteScoresError)) or out_of_memory(error)
