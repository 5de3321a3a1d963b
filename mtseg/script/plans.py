"""Plans of data sets: made for data/plan.py and prepare_nifti.py, and read as flags by the training scripts.

A plan.json holds flags of the training scripts under their names, what preparing scans needs (spacing, crop, over,
by_channel), what it was made from, and why.
"""

import argparse
import json
import textwrap
from pathlib import Path

import numpy as np
import torch

from mtseg.checkpoint import write_whole
from mtseg.datasets import read_list, training_cases
from mtseg.layouts import LayoutError, find_cases
from mtseg.nnunet_plans import NnUnetPlanError, from_nnunet
from mtseg.plan import N_FILTERS, fingerprint, plan, words
from mtseg.preprocess import IGNORED, canonical_axes, check_settings, orient
from mtseg.script.checks import NOT_IN_PRETRAINING, FlagError, divisors
from mtseg.script.config import read_config, value_of
from mtseg.script.newdata import told_by
from mtseg.script.sources import Source, shown_axis
from mtseg.script.values import checked, positive
from mtseg.volumes import VolumeError, read_channels, read_on_grid, read_volume

CPU_FILTERS = 8  # with more, a CPU takes days
HOUNSFIELD = -500  # values below: air, which no MR image has
PREPARATION = ("spacing", "crop", "over", "by_channel")
PLANNED = ("dims", "num_classes", "ignore_index", "network", "n_filters", "max_filters", "strides", "kernel_sizes")
PLANNED += ("normalization", "patch_size", "batch_size", "labeled_bs", "labelnum", "stride_xy", "stride_z")
PLANNED += ("intensity", "ignore_padding", "in_plane", "slices_first", "exp")
NEEDED = {"dims": int, "patch_size": list, "batch_size": int, "by_channel": list, "made_from": dict}
above_zero = checked(float, lambda number: 0 < number < 1e6, "is not above 0")
MEMORY = "memory of the device that trains (default: 8 with a GPU, else 1)"
FILTERS = "channels on the finest level (default: 32 of unet, 16 of vnet; 8 without a GPU and --memory_gb)"
FLAGS = ("memory_gb", "batch_cap", "max_patch", "network", "n_filters")


def add_plan_flags(parser):
    """The flags of a new plan, as an argument group."""
    flag = parser.add_argument_group("plan").add_argument
    flag("--memory_gb", type=above_zero, metavar="GB", help=MEMORY)
    flag("--batch_cap", type=above_zero, default=0.05, metavar="X", help="largest share of all voxels in a batch")
    flag("--max_patch", type=positive, metavar="SIDE", help="longest side of a patch (default: any)")
    flag("--network", choices=tuple(N_FILTERS), default="unet", help="network to plan for")
    flag("--n_filters", type=positive, help=FILTERS)
    return parser


# --------------------------------------------------------------------------------------------------------- making one


def make_plan(args, found, dims, num_classes, names=None):
    """The plan of a fingerprint by the flags of `add_plan_flags`; without them for this machine."""
    memory_gb, n_filters = args.memory_gb, args.n_filters
    if memory_gb is None:
        gpu = torch.cuda.is_available()
        memory_gb, n_filters = (8, n_filters) if gpu else (1, n_filters or CPU_FILTERS)
    asked = args.batch_cap, args.max_patch, args.network, n_filters
    made = plan(found, dims, num_classes, memory_gb, *asked, names)
    if args.memory_gb is None:
        without = "no GPU was found, so memory and channels are few (--memory_gb is for another machine)"
        made["why"]["memory"] += f"; {'a GPU was found' if gpu else without}"
    return made


def plan_of(args):
    """The plan of the data set in `args.root`: prepared HDF5 files, images, or scans before they are prepared."""
    source = Source(args.root)
    if source.files is None and not any((source.root / "data").glob("**/*.h5")):
        cases, channels = find_cases(args.root)
        cases = [case for case in cases if case.part != "Ts"]
        if cases and all(case.images[0].suffix not in (".h5", ".hdf5") for case in cases):
            settings, names = told_by(args.root, cases, channels)
            if args.spacing:
                raise FlagError("--spacing is for prepared files; scans say how wide their voxels are: leave it out")
            labelled = {case.name for case in cases if case.label}
            return plan_of_scans(args, cases, labelled, {**settings, "orientation": "RAS"}, names, args.dims or 3)
    return plan_of_prepared(args, source)


def plan_of_scans(args, cases, labelled, settings, names=None, dims=3):
    """The plan of scans: the layouts.Cases `cases`, of which the labels of `labelled` (names) may be looked at.

    `settings`: of the preprocessing, of which labels, ignore and orientation are read; `names`: the channels'.
    """
    lowest = []  # of each case the lowest value of each channel

    def triples():
        for case in cases:
            volume = read_channels(case.images)
            turned = settings["orientation"] == "RAS"
            if volume.spacing is None or (turned and volume.affine is None):
                raise VolumeError(f"{case.images[0]}: does not say how wide its voxels are and how they lie; repair it")
            axes, flips = canonical_axes(volume.affine) if turned else ((0, 1, 2), (0, 0, 0))
            image, label = orient(volume.array, axes, flips), None
            if not np.isfinite(image).all():
                raise VolumeError(f"{case.images[0]}: the image holds NaN or infinity; repair it")
            if case.name in labelled:
                label = orient(read_on_grid(case.label, volume), axes, flips)
                label = (label > 0) & (label != settings.get("ignore", 0))
            lowest.append(image.min(axis=(-3, -2, -1)).reshape(-1))
            yield image, label, volume.spacing[list(axes)]

    labelled = {case.name for case in cases if case.label and case.name in labelled}
    found, because = fingerprint(triples(), len(labelled)), "dataset.json says so"
    if not names and found["intensities"]:
        names = ["CT" if below else "MR" for below in (np.max(lowest, axis=0) < HOUNSFIELD).tolist()]
        because = f"in every case values go below {HOUNSFIELD}; dataset.json's channel_names would say another kind"
    made = make_plan(args, found, dims, len(settings["labels"]), names)
    if any(isinstance(row, list) for row in made["by_channel"]):
        made["why"]["normalisation"] += f" ({', '.join(names)}: {because})"
    made["made_from"]["axes"] = (2, 1, 0)
    return made


def plan_of_prepared(args, source):
    """The plan of the data set of a Source. Nothing resamples its files: all voxels count as the median ones."""
    names = training_names(source)
    how = argparse.Namespace(num_classes=256, ignore_index=None, intensity="none", snap=True)
    dataset = source.dataset(how, names, labelnum=0)
    shapes = [dataset.shapes[case][-2:] if source.files else dataset.shapes[case] for case in names]
    dims, median = args.dims or min(source.dims, len(shapes[0])), np.median(shapes, axis=0)
    # Volumes (W, H, D) lie in the same files as stacks (S, H, W), which have few slices.
    first = len(median) == 3 and source.axis == 0 and (dims == 2 or shown_axis(0, median) == 0)
    widths, num_classes = [], len(source.table.names) if source.table else 2
    for case in names if source.files is None else ():
        whole = len(median) == 3 and dataset.path(case).parent.name != "slices"  # where no file has a spacing
        width = read_volume(dataset.path(case), header_only=True).spacing if whole else None
        widths += [] if width is None else [slices_last(width, first)]
        if source.table is None:
            label = dataset.read(case)["label"]
            num_classes = max(num_classes, 1 + int(label[label < IGNORED].max(initial=0)))
    said = args.spacing
    if source.dims == 2 and source.table and source.table.pixel_size:
        said = said or source.table.pixel_size[:2]
    spacing = np.median(widths, axis=0) if widths else np.array(said or [1.0] * len(median))
    if len(spacing) != len(median):
        raise FlagError(f"--spacing {words(spacing)}: the cases have {len(median)} axes; give a number for each")
    found = {"shapes": [slices_last(shape, first) for shape in shapes], "spacings": [spacing.tolist()] * len(shapes)}
    made = make_plan(args, {**found, "channels": dataset.n_channels, "kept": 1.0, "intensities": []}, dims, num_classes)
    made["made_from"]["axes"] = axes_of(source, first)
    if first and dims == 3:
        made |= {"slices_first": True}
        made["why"]["files"] = f"stacks (S, H, W), since the first side, {median[0]:g}, is short: --slices_first"
    preparation, split = (read_config(source.root / name) for name in ("preprocessing.json", "splits.json"))
    made |= {"intensity": "none" if preparation else "zscore"}
    made |= {"ignore_index": IGNORED} if source.ignores or preparation.get("ignore") is not None else {}
    made |= {"labelnum": split["labelnum"]} if split.get("labelnum") else {}
    unknown = "" if source.files else ": how the files were normalised is not recorded"
    made["why"]["normalisation"] = (
        "as preprocessing.json says, and not once more (--intensity none)"
        if preparation
        else f"z-score of each case (--intensity zscore){unknown}"
    )
    if not widths:
        apart = "" if source.files else ": give it by --spacing where slices lie farther apart than pixels"
        unknown = f"assumed, since {'classes.json does' if source.files else 'the files do'} not say{apart}"
        made["why"]["spacing"] = f"{words(spacing)}: {'as was said' if said else unknown}"
    elif len(widths) < len(names) or np.ptp(widths, axis=0).max() > 0.01 * spacing.min():
        made["why"]["spacing"] += "; not all have it, and files that are prepared are not resampled"
    return made


def slices_last(sides, first):
    """The `sides` of a stack (S, H, W), where the slices are its `first` axis, as those of (H, W, S)."""
    return [*map(float, sides[1:]), float(sides[0])] if first else [*map(float, sides)]


def axes_of(source, slices_first):
    """Which axis of nnU-Net's arrays each axis of a Source's cases is: of images (H, W), stacks (H, W, S), volumes."""
    return (1, 2) if source.files else (1, 2, 0) if slices_first else (2, 1, 0)


def training_names(source):
    """The cases that are trained on: those of train.list and unlabeled.list; without lists all but test cases."""
    root = source.root
    if (root / "train.list").is_file():
        more = read_list(root / "unlabeled.list") if (root / "unlabeled.list").is_file() else []
        return list(dict.fromkeys([*training_cases(root), *more]))
    if source.files:
        return sorted(source.files.keys() - source.tested)
    paths = sorted([*root.glob("data/*/mri_norm2.h5"), *root.glob("data/*.h5")])
    names = [path.parent.name if path.name == "mri_norm2.h5" else path.stem for path in paths]
    if not names:
        raise LayoutError(f"{root}: holds no cases; give a folder with data/, images/ or scans")
    return [name for name in names if name not in source.tested]


def description(made):
    """The plan as a table for a person: what was found, what was decided and why, a sentence a row."""
    source = made["made_from"]
    channels = f"{source['channels']} channel{'s' if source['channels'] > 1 else ''}"
    rows = {"cases": f"{source['cases']} for training, with {channels} and {made['num_classes']} classes"}
    rows["size"] = f"{words(source['shape'])} voxels of {words(source['spacing'])} (medians)"
    lines = []
    for name, sentence in (rows | made["why"]).items():
        lines += textwrap.wrap(f"{name:14}{sentence}", 118, subsequent_indent=" " * 14)
    return "\n".join(lines)


def write_plan(path, made):
    """Write the plan, whole or not at all."""
    write_whole(path, json.dumps(made, indent=1).encode())


# -------------------------------------------------------------------------------------------------------- reading one


def read_plan(path, dims=3, source=None, slices_first=False):
    """The plan in a plan.json, or in an nnUNetPlans.json: its 3d_fullres, or with `dims` 2 its 2d, along the axes of a
    Source's cases, None for scans; FlagError."""
    path = Path(path)
    stacks = source is not None and (slices_first or (source.axis == 0 and dims == 2))
    axes = axes_of(source, stacks) if source else (2, 1, 0)
    if not path.is_file():
        raise FlagError(f"--plan {path}: no such file; data/plan.py makes one")
    content = read_config(path)
    try:
        made = from_nnunet(content, dims, axes) if "configurations" in content else content
    except NnUnetPlanError as error:
        raise FlagError(f"--plan {path}: {error}; make one with data/plan.py") from error
    for name, kind in NEEDED.items():
        if type(made.get(name)) is not kind:
            raise FlagError(f"--plan {path}: is no plan, its {name} is {made.get(name)!r}; make one with data/plan.py")
    return {"exp": "plan", **made}


def plan_settings(parser, path, root_path, chosen):
    """{flag: value} of the flags of `parser` that the plan in the file `path` gives for the data in `root_path`.

    `chosen`: the flags that are given otherwise, which count more. FlagError where the plan is of other classes or
    dimensions. A batch holds no more labelled cases than there are.
    """
    source, known = Source(root_path), {action.dest for action in parser._actions}
    made = read_plan(path, chosen.get("dims") or source.dims, source, chosen.get("slices_first"))
    if chosen.get("dims") not in (None, made["dims"]):
        raise FlagError(f"--plan {path}: is for --dims {made['dims']}, not {chosen['dims']}; make another")
    labels = read_config(source.root / "preprocessing.json").get("labels")
    there = len(source.table.names) if source.table else len(labels) if isinstance(labels, list) else None
    check_same(path, "classes", made.get("num_classes"), there)
    unlabelled = parser.get_default("labelnum") == 0  # pretraining, which has no use for what is about labels
    names = [name for name in PLANNED if name in made and name in known]
    names = [name for name in names if not (unlabelled and name in ("labelnum", *NOT_IN_PRETRAINING))]
    settings = {name: value_of(parser, path, name, made[name]) for name in names}
    if settings["dims"] == 3 and not unlabelled:
        labelnum = {**settings, **chosen}.get("labelnum", parser.get_default("labelnum"))
        batch = chosen.get("batch_size", settings["batch_size"])
        labeled = batch // 2 if "labeled_bs" in known else batch
        settings |= {"labeled_bs": min(labeled, labelnum), "batch_size": batch - max(labeled - labelnum, 0)}
        if labeled > labelnum and "batch_size" not in chosen:
            print(f"{path}: --batch_size {settings['batch_size']} instead of {batch}, since --labelnum is {labelnum}")
    return settings


def check_plan(args, source, dataset):
    """FlagError where --plan is of data with other channels than `dataset`, the training cases of a Source, or has a
    patch that none of them fills, even if it is padded to what the strides divide."""
    if not args.plan:
        return
    made = read_plan(args.plan, args.dims, source, getattr(args, "slices_first", False))
    check_same(args.plan, "channels", made["made_from"].get("channels"), dataset.n_channels)
    if args.resize or args.patch_size != made["patch_size"]:
        return
    sizes = [np.delete(size, source.axis) if len(size) > args.dims else size for size in dataset.shapes.values()]
    largest, divisor = np.max(sizes, axis=0), divisors(args)
    if (np.ceil(largest / divisor) * divisor < args.patch_size).any():
        raise FlagError(
            f"--plan {args.plan}: no case fills its patch of {words(args.patch_size)}, the largest sides are "
            f"{words(largest)}; make a plan of this data with data/plan.py"
        )


def preparation_of(path, made, settings):
    """The `settings` of the preprocessing with what a plan decides; FlagError where it is of other classes."""
    check_same(path, "classes", made.get("num_classes"), len(settings["labels"]))
    decided = {name: made.get(name) for name in PREPARATION}
    if not isinstance(decided["spacing"], list) or len(decided["spacing"]) != 3:
        raise FlagError(f"--plan {path}: has the spacing {decided['spacing']}, not 3 millimetres; make a 3-D plan")
    return check_settings({**settings, **decided, "normalization": "by_channel"})


def check_same(path, what, planned, there):
    """FlagError where the plan in `path` is of data with another number of `what` than is `there`; None: not known."""
    if None not in (planned, there) and planned != there:
        raise FlagError(f"--plan {path}: is of data with {planned} {what}, here are {there}; make one of this data")
