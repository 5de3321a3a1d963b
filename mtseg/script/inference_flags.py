"""The flags of inference.py, and what a run's config.json says where no flag does."""

import argparse
import json
from pathlib import Path

from mtseg.script import flags
from mtseg.script.checks import FlagError, check_class_numbers, check_dims, is_own
from mtseg.script.config import LEARNED, read_config
from mtseg.script.parser import Parser
from mtseg.script.values import classes, positive, rate

# What a checkpoint without a config.json is tested with where a flag does not say otherwise: the UA-MT protocol.
INFERENCE_SETTINGS = {
    "dims": 3,
    "network": "vnet",
    "n_channels": 1,
    "num_classes": 2,
    "n_filters": 16,
    "normalization": "batchnorm",
    "has_dropout": True,
    "ignore_index": None,
    "patch_size": [112, 112, 80],
    "stride_xy": 18,
    "stride_z": 4,
    "intensity": "none",
    "resize": None,
    "context": 0,
    "slices_first": False,
    "snap": False,
}


def inference_parser(description):
    """The parser of inference.py; flags that are None there, `parse_inference` looks up."""
    parser = Parser(description=description, usage="%(prog)s --model_path FILE ... [flags]")
    flag, rare = parser.group("what to segment, with what")
    weights = "weights, such as iter_<N>.pth or ema_iter_<N>.pth; the probabilities of several are averaged"
    flag("--model_path", type=Path, nargs="+", action="extend", required=True, metavar="FILE", help=weights)
    flag("--root_path", help="folder with <split>.list and data/ (default: the run's)")
    split = "cases to segment: those of <root_path>/<split>.list (default: of a run with --fold the fold's, else test)"
    flag("--split", type=lambda name: name.removesuffix(".list"), help=split)
    flag("--num", type=positive, help="only the first cases (default: all)")
    flag("--output_dir", type=Path, help="folder for the results (default: beside the checkpoint)")
    flag("--save_result", type=Path, metavar="DIR", help="also write image, label and prediction of each case there")
    formats = "nifti needs NiBabel; png, for images, writes label and prediction in the masks' values with a palette"
    rare("--save_format", choices=("hdf5", "nifti", "png"), default="hdf5", help=formats)
    rare("--save_colors", action="store_true", help="of images: also write predictions as colour images (RGB)")
    flag("--gpu", default="0", metavar="N", help="number of the GPU; without one the CPU is used")
    flag("--fast", action="store_true", help=flags.FAST)
    rare("--winograd", action=argparse.BooleanOptionalAction, default=None, help=flags.WINOGRAD)
    rare("--keep_memory", action=argparse.BooleanOptionalAction, default=True, help=flags.KEEP_MEMORY)

    flag, rare = parser.group("scans instead of a list")
    flag("--input", type=Path, metavar="PATH", help="NIfTI, NRRD or HDF5 file, folder of them, nnU-Net's imagesTs, ...")
    flag("--labels", type=Path, metavar="DIR", help="folder with their labels (default: where the layout has them)")
    rare("--preprocessing", type=Path, metavar="FILE", help="a preprocessing.json (default: the run's)")
    flag("--continue", dest="go_on", action="store_true", help="pass over the cases that an earlier call finished")

    flag, rare = parser.group("averaging and cleaning up")
    mirrored = "average over the image and its three mirror images, of a volume in the W-H plane"
    flag("--tta", action="store_true", help=mirrored)
    flag("--weighting", choices=("uniform", "gaussian"), default="uniform", help="of a window's voxels in the average")
    share = "share of each case's own means and variances in batch norm, the rest is the training's (docs/inference.md)"
    flag("--case_statistics", type=flags.fraction, default=0.0, metavar="SHARE", help=share)
    flag("--largest_component", action="store_true", help="keep only the largest connected piece of each class")
    largest = "also measure the largest connected piece of each class: columns dice_largest and the like"
    rare("--measure_largest", action="store_true", help=largest)
    flag("--fill_holes", action="store_true", help="fill background that a class encloses")
    rare("--save_probabilities", action="store_true", help="also write <output_dir>/probabilities/<case>.h5, float16")
    methods = ("mc_dropout", "ensemble", "teacher")
    entropy = "write the entropy of several predictions to <output_dir>/uncertainty/, and its mean a case"
    flag("--uncertainty", choices=methods, help=entropy)
    rare("--mc_samples", type=positive, default=8, help="samples of --uncertainty mc_dropout")

    flag, rare = parser.group("measuring")
    unit = "of distances (default: voxel or pixel, as in the papers; of scans mm where all spacings are known)"
    flag("--unit", choices=("mm", "voxel", "pixel", "um", "nm"), help=unit)
    rare("--tolerance", type=rate, default=1.0, help="of the normalized surface Dice, in that unit")

    add_settings(parser)
    return parser


def add_settings(parser):
    """The settings of a trained network, and of its windows, that its run's config.json knows."""
    flag, rare = parser.group("settings, by default the run's")
    rare("--dims", type=int, choices=(2, 3), help="2: images, or stacks slice by slice; 3: volumes")
    flag("--network", type=flags.network, help="architecture")
    rare("--n_channels", type=positive, help="channels of the image")
    flag("--num_classes", type=classes, help="classes, background included")
    flag("--n_filters", type=positive, help="channels on the finest level")
    rare("--normalization", choices=flags.NORMALIZATIONS, help="after each convolution")
    flag("--patch_size", type=positive, nargs="+", metavar="SIDE", help="voxels of a window")
    flag("--stride_xy", type=positive, help="voxels between windows along W and H, at most those of a window")
    flag("--stride_z", type=positive, help="voxels between windows along D, at most those of a window")
    rare("--ignore_index", type=int, help="label of voxels that no metric counts")
    flags.image_flags(rare, training=False)


def parse_inference(parser, argv):
    """The flags in `argv`, and `configs`, the config.json beside each checkpoint ({} where there is none).

    Settings that no flag gives are the first run's, else INFERENCE_SETTINGS and data/LA. FlagError where flags
    contradict each other.
    """
    args = parser.parse_args(argv)
    args.configs = [read_config(path.parent / "config.json") for path in args.model_path]
    for path, config in zip(args.model_path, args.configs, strict=True):
        for name in (*LEARNED, "val_cases", "fold_cases"):
            cases = config.get(name) or []
            if not isinstance(cases, list) or not all(isinstance(case, str) for case in cases):
                raise FlagError(f"{path.parent / 'config.json'}: {name} is no list of names; repair it")
        if config.get("labelnum") == 0:
            raise FlagError(f"{path}: is of a pretraining and gives images, no classes; train on by --pretrained")
    check_alike(args)
    given, la = args.root_path, str(flags.HOME / "data/LA")
    defaults = {"root_path": la, **INFERENCE_SETTINGS, "dataset_name": flags.folder_name(given or la)}
    recorded = args.configs[0].get("root_path")
    recorded = Path(recorded) if isinstance(recorded, str) and not given and not args.input else None
    if recorded and recorded.parent != flags.HOME / "data" and not recorded.exists():  # built-in data is made anew
        raise FlagError(
            f"{args.model_path[0].parent / 'config.json'}: the run's data was {recorded}, which is not there from "
            f"{Path.cwd()}; give --root_path"
        )
    take_over(parser, args, args.configs[0], defaults)
    elsewhere = given and Path(given).resolve() != Path(str(args.configs[0].get("root_path"))).resolve()
    if elsewhere:
        args.dataset_name = flags.folder_name(given)  # the run's is that of other data
    if args.split is None:
        first, *others = (config.get("fold_cases") for config in args.configs)
        moved = elsewhere and not {*(first or ())} <= {*listed_for_training(given)}
        own = first and not moved and not args.input and all(other == first for other in others)
        args.split = "fold" if own else "test"
    if args.input is None and (args.labels or args.preprocessing):
        raise FlagError("--labels and --preprocessing are about scans: name them by --input")
    if args.input and args.save_result:
        raise FlagError("--save_result is for the cases of a list: with --input predictions are written anyway")
    given = flags.given_flags(parser, argv)
    for name, used, needed in (
        ("save_format", args.save_result, "--save_result"),
        ("mc_samples", args.uncertainty == "mc_dropout", "--uncertainty mc_dropout"),
    ):
        if name in given and not used:
            raise FlagError(f"--{name} without {needed} changes nothing: add that, or leave --{name} out")
    if args.background is None and (args.largest_component or args.fill_holes or args.measure_largest):
        raise FlagError(
            "--largest_component, --measure_largest and --fill_holes without a background: nothing could stand in the "
            "place of what they take away; leave them out"
        )
    if args.uncertainty == "ensemble" and len(args.model_path) < 2:
        raise FlagError("--uncertainty ensemble with one --model_path: give several checkpoints, or use mc_dropout")
    return args


def listed_for_training(root_path):
    """The cases of train.list in `root_path`; none where there is no such list."""
    from mtseg.datasets import find_root, read_list  # not above: PyTorch, and --help is answered before

    path = find_root(root_path) / "train.list"
    return read_list(path) if path.is_file() else []


def check_alike(args):
    """FlagError where runs of --model_path were trained on another view of the data than the first, on other classes,
    or are of other networks: the mean of their probabilities would be of nothing."""
    names = ("intensity", "resize", "context", "slices_first", "network", "normalization")
    names = [name for name in names if getattr(args, name) is None]
    views = []
    for path, config in zip(args.model_path, args.configs, strict=True):
        view = {f"--{name}": config[name] for name in names if name in config}
        view |= {"classes": table_of(config["classes"]).names} if config.get("classes") else {}
        views.append((path, view))
    (first, one), *others = views
    for path, other in others:
        if odd := [name for name in one.keys() & other.keys() if one[name] != other[name]]:
            values = " and ".join(json.dumps(view[odd[0]]) for view in (one, other))
            raise FlagError(f"{first} and {path} were trained with {odd[0]} {values}: they cannot be averaged")


def table_of(classes):
    """The classes.ClassTable in a config.json; None where the data had none."""
    from mtseg.classes import ClassTable  # not above: NumPy, and --help is answered before

    return ClassTable.from_dict(classes) if classes else None


def take_over(parser, args, config, defaults):
    """Give `args` the settings in `defaults` that no flag gave: those in `config`, a run's config.json, else these.

    FlagError for a value in `config` that the flag would not take. Strides are no larger than the patch, as the
    windows lie. `args.classes`, `background` and `table`: the run's classes, else those of the data.
    """
    path = args.model_path[0].parent / "config.json"
    known = config
    if "classes" not in config:
        known = flags.data_settings(args.root_path or config.get("root_path") or defaults["root_path"])
        told = ("num_classes", "ignore_index", "intensity")
        defaults = defaults | {name: known[name] for name in told if name in known}
    for name, default in defaults.items():
        value = config.get(name)
        if getattr(args, name, None) is not None:
            continue
        if name == "network" and isinstance(value, str) and is_own(value):
            raise FlagError(f"{path}: its network is code: give --network {value}, to run it")
        wrong = f"{path}: {name} cannot be {json.dumps(value)}; repair it"
        if value is not None and f"--{name}" in parser._option_string_actions:
            words = [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
            if isinstance(value, bool):
                words = [f"--{name}" if value else f"--no-{name}"]
            with parser.errors_as(lambda _, wrong=wrong, name=name: FlagError(f"{wrong}, or give --{name}")):
                value = getattr(parser.parse_args(["--model_path", "", *words]), name)
        elif value is not None and not isinstance(value, type(default)):
            raise FlagError(wrong)
        setattr(args, name, default if value is None else value)
    args.classes, args.background = known["classes"], known.get("background", 0)
    args.table = table_of(args.classes)
    check_dims(args)
    check_class_numbers(args)
    args.stride_xy, args.stride_z = min(args.stride_xy, *args.patch_size[:2]), min(args.stride_z, args.patch_size[-1])


def listed_in(configs, *names):
    """The set of cases that any of `configs` lists under any of `names`."""
    return {case for config in configs for name in names for case in config.get(name) or []}
