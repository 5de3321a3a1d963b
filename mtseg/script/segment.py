"""Trained networks, and what is written and measured of a case that they segment.

`args` are always the flags of inference.py.
"""

import math
import time
from typing import NamedTuple

import numpy as np

from mtseg import averaging
from mtseg.case_statistics import batch_norms, with_case_statistics
from mtseg.checkpoint import file_sha256, find_state_dict, load_checkpoint, load_weights, write_whole
from mtseg.datasets import DataError
from mtseg.images import ENDINGS as IMAGES
from mtseg.images import ImageError, png_bytes
from mtseg.metrics import all_metrics, pixel_accuracy
from mtseg.postprocess import fill_holes, largest_component
from mtseg.preprocess import PreprocessError, restore_scores
from mtseg.results import OF_LARGEST
from mtseg.script import fast, scans
from mtseg.script.build import MEMORY
from mtseg.script.endings import out_of_memory
from mtseg.script.flags import FlagError, check_network_fits, network_settings
from mtseg.script.networks import network_class
from mtseg.script.runlog import training_cost
from mtseg.script.sources import plain_table, shown_axis
from mtseg.script.windows import class_name, counted_classes, predict, side_by_side, through
from mtseg.seeding import seed_iteration
from mtseg.sliding_window import NotFiniteScoresError, optimize_for_inference
from mtseg.volumes import VolumeError, hdf5_bytes, volume_bytes

POSTPROCESSING = {"largest_component": largest_component, "fill_holes": fill_holes}  # in the order they are done


class Trained(NamedTuple):
    """`nets`: networks in eval mode, on the device; `ready`, but with --case_statistics. `partners`: their teachers or
    students, for --uncertainty teacher. `checkpoints`: what the files of `nets` hold. `sha256`: of these files.
    `parameters`: of all `nets` together. `settings`: what the weights of the first tell of it beside the flags.
    `costs`: of each run what runlog.training_cost says; None each where weights lie in no run's folder."""

    nets: list
    partners: list
    checkpoints: list
    sha256: list
    parameters: int
    settings: dict
    costs: list


def load_network(args, path):
    """(network in eval mode on the CPU, what the file at `path` holds, the settings that its weights tell)."""
    checkpoint = load_checkpoint(path)
    kind = network_class(args.network)
    told = kind.settings_of(find_state_dict(checkpoint) or {})
    settings = network_settings(args, args.n_channels) | told
    if settings["dims"] != args.dims:
        raise FlagError(
            f"{path}: its network has {settings['dims']} dimensions; give --dims {settings['dims']} and --patch_size"
        )
    try:
        net = kind(**settings)
    except ValueError as error:  # strides of the other number of dimensions, for one
        said = f"{path}: no network with {args.dims} dimensions has its settings ({error})"
        raise FlagError(f"{said}; give --dims, or the flags of its training") from error
    except (RuntimeError, OverflowError, MemoryError, TypeError) as error:  # PyTorch has no class of its own for this
        raise FlagError(f"{path}: a network of such settings is too large to be made ({settings})") from error
    check_network_fits(args.patch_size, net.divisors)
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
    with averaging.dropout_on(nets) as layers:
        if args.uncertainty == "mc_dropout" and not (layers and args.has_dropout):
            remedy = "train it with --has_dropout, or use --uncertainty ensemble"
            raise FlagError(f"--uncertainty mc_dropout: the network has no dropout; {remedy}")
    parameters = sum(parameter.numel() for net in nets for parameter in net.parameters())
    nets, partners = ([net.to(device) for net in group] for group in (nets, partners))
    if args.case_statistics:
        for net, path in zip(nets, args.model_path, strict=True):
            if not batch_norms(net):
                raise FlagError(f"--case_statistics: {path} has no batch norm that keeps statistics; leave it out")
    else:
        nets, partners = ([ready(net, args) for net in group] for group in (nets, partners))
    runs = {}  # and until which iteration they trained what is tested
    for path, config in zip(args.model_path, args.configs, strict=True):
        number = path.stem.rpartition("iter_")[2]
        last = int(number) if number.isdecimal() else math.inf
        runs[path.parent] = config, max(last, runs.get(path.parent, (config, 0))[1])
    costs = [
        training_cost(run / "metrics.csv", last) if config else (None, None, None)
        for run, (config, last) in runs.items()
    ]
    sha256 = [file_sha256(path) for path in args.model_path]
    return Trained(nets, partners, checkpoints, sha256, parameters, told[0], costs)


def ready(net, args):
    """A copy of a network, as fast as the flags allow."""
    net = optimize_for_inference(net)
    if args.channels_last:
        net.to(memory_format=MEMORY[args.dims])
    fast.convolutions(args, net)
    return net


def adapted(trained, scan, args):
    """`trained`, its networks with the share --case_statistics of the scan's own statistics."""
    windows, share = side_by_side(scan.image, scan.axis, args), args.case_statistics
    groups = trained.nets, trained.partners
    nets, partners = ([ready(with_case_statistics(net, windows, share), args) for net in group] for group in groups)
    return trained._replace(nets=nets, partners=partners)


def segment(trained, scan, args):
    """(scores, mixture): the score map of a scan, and the one whose entropy is the uncertainty (None without it)."""
    image = scan.image
    trained = adapted(trained, scan, args) if args.case_statistics else trained

    def scores_of(net, image):
        return predict(net, image, scan.axis, args, args.weighting)

    flips = averaging.plane_flips(through(image, scan.axis, args)) if args.tta else averaging.NO_FLIPS
    scores = averaging.mean_score(scores_of, trained.nets, image, flips)
    if args.uncertainty == "ensemble":
        return scores, scores
    if args.uncertainty == "teacher":
        return scores, (scores + averaging.mean_score(scores_of, trained.partners, image, flips)) / 2
    if args.uncertainty == "mc_dropout":
        mixture = np.zeros_like(scores)
        with averaging.dropout_on(trained.nets):
            for sample in range(args.mc_samples):
                seed_iteration(0, sample)  # the same masks for every case: a case does not depend on those before it
                mixture += averaging.mean_score(scores_of, trained.nets, image, flips) / args.mc_samples
        return scores, mixture
    return scores, None


def clean(prediction, args):
    """`prediction` after the postprocessing that the flags ask for."""
    for name, function in POSTPROCESSING.items():
        if getattr(args, name):
            prediction = function(prediction)
    return prediction


def measure(case, prediction, label, spacing, args):
    """[{'class': number or name, <metric>: value, ...}, ...]; voxels of the label `args.ignore_index` do not count.

    With --measure_largest also <metric>_largest, of the largest connected piece of each class alone.
    """
    ignored = None if args.ignore_index is None else label == args.ignore_index
    if ignored is not None and ignored.all():
        remedy = "so nothing can be measured; leave it out of the list"
        raise DataError(f"case {case}: nobody labelled any of its pixels, {remedy}")
    right = {} if label.ndim == 3 else {"pixel_accuracy": pixel_accuracy(prediction, label, args.ignore_index)}
    largest = largest_component(prediction) if args.measure_largest else None
    rows = []
    for number in counted_classes(args):
        reference = label == number, spacing, args.tolerance, ignored
        found = all_metrics(prediction == number, *reference)
        rows.append({"class": class_name(args.classes, number)} | found | right)
        if largest is not None:
            if (largest == number).sum() < (prediction == number).sum():
                found = all_metrics(largest == number, *reference)
            rows[-1] |= {f"{metric}_largest": found[metric] for metric in OF_LARGEST}
    return rows


def infer_case(name, scan, trained, unit, output_dir, args):
    """Segment a case, write what the flags ask for and measure it; returns its entry of the record."""
    started = time.perf_counter()
    scores, mixture = segment(trained, scan, args)
    entry = {"seconds": time.perf_counter() - started, "uncertainty": None, "rows": [], "files": []}
    entry["label_error"] = scan.label_error

    def write(path, content):
        write_whole(output_dir / path, content)
        entry["files"].append(path)

    prediction = clean(averaging.label_map(restore_scores(scores, scan.grid)), args)
    table = args.table or plain_table(args.num_classes, args.ignore_index)
    if args.input and scan.kind in IMAGES:
        write(f"predictions/{name}{scan.kind}", scans.image_file(prediction, table)[1])
    elif args.input:
        values = np.array(scan.values, np.min_scalar_type(max(scan.values)))
        write(f"predictions/{name}{scan.kind}", volume_bytes(values[prediction], scan.kind, scan.header))
    if args.save_result:
        volumes = {"image": scan.image, "label": scan.label, "prediction": prediction}
        measured = {"num_classes": args.num_classes, "ignore_index": args.ignore_index, "classes": args.classes}
        measured |= {"unit": unit, "axis": shown_axis(scan.axis, prediction.shape, args.dims)}
        measured["spacing"] = None if scan.spacing is None else [float(side) for side in scan.spacing]
        saved = scans.save_case(args.save_result, name, args.save_format, volumes, measured, table)
        entry["files"] += [str(path.resolve()) for path in saved]
    if args.save_colors:
        colors = png_bytes(table.palette()[prediction])
        if args.save_result:
            write_whole(args.save_result / f"{name}_colors.png", colors)
        else:
            write(f"colors/{name}_colors.png", colors)
    if args.save_probabilities:
        probabilities = np.stack([score.astype(np.float16) for score in restore_scores(scores, scan.grid)])
        write(f"probabilities/{name}.h5", hdf5_bytes({"probabilities": probabilities}))
    if mixture is not None:
        unsure = averaging.entropy(restore_scores(mixture, scan.grid))
        entry["uncertainty"] = averaging.case_uncertainty(unsure, prediction, args.background)
        kind = ".h5" if scan.kind in IMAGES else scan.kind
        write(f"uncertainty/{name}{kind}", volume_bytes(unsure, kind, scan.header, "uncertainty"))
    if scan.label is not None:
        if scan.grid is not None and scan.label_prepared:
            prediction = clean(averaging.label_map(scores), args)
        of = {"case": name} | ({"set": scan.set} if scan.set else {})
        more = {"uncertainty": entry["uncertainty"]} if args.uncertainty else {}
        spacing = None if unit in ("voxel", "pixel") else scan.spacing
        entry["rows"] = [of | row | more for row in measure(name, prediction, scan.label, spacing, args)]
    return entry


def costs_only_the_case(error):
    """Whether the other cases of a folder can be segmented all the same."""
    known = (VolumeError, PreprocessError, DataError, ImageError, NotFiniteScoresError)
    return isinstance(error, known) or out_of_memory(error)
