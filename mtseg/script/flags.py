"""The flags of the training scripts, and what else a script needs before PyTorch is loaded."""

import argparse
import math
import sys
from pathlib import Path

from mtseg.script.checks import (  # noqa: F401
    ENCODED,
    NOT_IN_PRETRAINING,
    PADDED,
    FlagError,
    check_annotations,
    check_cases,
    check_flags,
    check_network_fits,
    check_normalization,
    check_one_stream,
    check_pairs,
    check_pretext,
    check_two_streams,
    is_own,
)
from mtseg.script.config import config_settings, read_config  # noqa: F401
from mtseg.script.endings import answer_help, one_sentence  # noqa: F401
from mtseg.script.parser import Parser, defaults_of, given_flags  # noqa: F401
from mtseg.script.values import (  # noqa: F401
    below_one,
    checked,
    classes,
    even,
    fraction,
    natural,
    odd,
    per_axis,
    positive,
    positive_fraction,
    rate,
    within,
)

# Where scripts and data/ lie: the repository, or, where mtseg was installed without it, the current folder.
HOME = Path(__file__).resolve().parents[2]
HOME = HOME if (HOME / "inference.py").is_file() else Path.cwd()

# What images, and slices of stacks, are trained with where a flag does not say otherwise.
IMAGE_SETTINGS = {"dims": 2, "network": "unet", "patch_size": [256, 256], "stride_xy": 128}
# What the built-in data is trained with where a flag does not say otherwise: minutes on a CPU.
BUILT_IN_SETTINGS = {
    "max_iterations": 300,
    "base_lr": 0.03,
    "lr_step": 225,
    "n_filters": 8,
    "consistency_rampup": 2.0,
    "save_freq": 100,
    "stride_xy": 16,
    "stride_z": 16,
}
BUILT_IN = {
    "Phantom": {**BUILT_IN_SETTINGS, "patch_size": [32, 32, 32]},
    "Electrode": {**IMAGE_SETTINGS, **BUILT_IN_SETTINGS, "patch_size": [64, 64], "stride_xy": 32},
}


NETWORKS = ("vnet", "unet", "unet_ssl4mis", *ENCODED)
NETWORK = "vnet, unet, unet_ssl4mis, encoder_decoder (docs/images.md), FILE.py:CLASS"
network = checked(
    str, lambda word: word in NETWORKS or is_own(word), f"is none of {', '.join(NETWORKS)}, and no FILE.py:CLASS"
)
INTENSITIES = ("none", "zscore", "percentile", "minmax")
NORMALIZATIONS = ("none", "batchnorm", "groupnorm", "instancenorm")
SCHEDULES = ("step", "constant", "poly", "cosine", "cosine_restarts", "exponential", "plateau", "warmup", "sawtooth")
RAMPUPS = ("sigmoid", "linear", "cosine", "constant")
DEEP_SUPERVISION = "weights of the levels, finest first, divided by their sum (default: 1, 1/2, 1/4, ...)"
HAS_DROPOUT = "half of the channels dropped at the bottom and before the output; of unet only if asked for"
PARTS = ("encoder", "all", "network")
PRETRAINED_PARTS = "what --pretrained gives: the encoder; all but the last layer, which starts anew; the whole network"
STRIDES = (
    "of the downsamplings, finest first: each a number, or one for each axis, as 2,2,1 (default: 2 2 2 2; vnet has "
    "four, unet as many as are given); a side of a patch is a multiple of the product of its own"
)
KERNELS = "odd sizes of the levels' convolutions, finest first, likewise: one more than strides (default: 3)"
KEEP_MEMORY = "on a CPU: keep freed memory for the next tensors, faster with large patches and more of it"
FAST = "what is fastest on this device and changes the last digits alone; the log says what that is"
WINOGRAD = "on a CPU with a C compiler: faster convolutions of 16, 32, ... channels; changes the last digits"
ROTFLIP = (
    "turns in the W-H plane: mirror (the family's: one of four mirror images, never the volume as it is), all (one of "
    "the eight symmetries), flips (along W and along H, each with probability one half), ssl4mis (one half mirror, a "
    "quarter a rotation by up to 20 degrees), none"
)
INTENSITY = (
    "how each case is normalised anew, over the whole of it and each channel by itself; none: as its file holds it "
    "(default: zscore of images, none of HDF5 files)"
)
PLAN = "a plan.json of data/plan.py, or an nnUNetPlans.json (--dims 2: its 2d); --config wins"
DIMS = "2: images, or the slices of stacks; 3: volumes (default: 2 where root_path holds images, else 3)"


def training_parser(description, model, unlabeled=False, teacher=False, strong_views=False):
    """The parser of a training script: the flags that all have, with LASeg's names and defaults.

    `model`: the method's name. `unlabeled`: the script learns from unlabelled patches, with a weight that ramps up.
    `teacher`: it averages a teacher. `strong_views`: its student sees strongly augmented patches. A method adds its
    own flags in its script: `flag, rare = parser.group(title)`.
    """
    parser = Parser(description=description, usage="%(prog)s [flags]")
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--config", metavar="FILE", help="JSON file with any of these flags; the command line wins")
    parser.add_argument("--plan", metavar="FILE", help=PLAN)

    flag, rare = parser.group("data")
    where = "folder with train.list, test.list, and data/ or images/ (default: data/LA, or built-in data)"
    flag("--root_path", help=where)
    name = "name of the data, for the run's folder (default: its folder's); without root_path: the data in data/NAME"
    rare("--dataset_name", metavar="NAME", help=f"{name}; Phantom and Electrode are built in")
    flag("--dims", type=int, choices=(2, 3), default=3, help=DIMS)
    flag("--labelnum", type=positive, default=25, help="labelled cases: the first ones of train.list")
    lots = "label other patients of train.list, drawn by this number, the same for every method and seed; 0: the first"
    rare("--labeled_draw", type=natural, default=0, help=lots)
    rare("--max_samples", type=positive, help="use only the first cases of train.list (default: all listed)")
    flag(
        "--num_classes", type=classes, default=2, help="classes, background included (default: classes.json's, else 2)"
    )
    size = "voxels along W, H and D, or pixels along H and W"
    flag("--patch_size", type=positive, nargs="+", default=[112, 112, 80], metavar="SIDE", help=size)
    rare("--rotflip", choices=("mirror", "all", "flips", "ssl4mis", "none"), default="mirror", help=ROTFLIP)
    share = "share of the patches that are drawn around a voxel of a foreground class, every class as often"
    rare("--foreground_patches", type=fraction, default=0, help=share)
    padding = "what pads a case counts in no supervised loss, nor in the others of MT, MTplus, UAMT, CPS and PL"
    rare("--ignore_padding", action=switch, default=False, help=padding)
    sets = "of several data sets in one index: 0 draws from them by their sizes, 1 from all alike, or between"
    rare("--set_balance", type=fraction, default=0, help=sets)
    image_flags(rare)
    only = "of labels <case>.h5, 255 where there is none: they alone are the labelled cases, --labelnum is their number"
    rare("--annotations", metavar="DIR", help=f"folder {only}")
    rare("--cache", action=switch, default=True, help="read all volumes once, into a temporary file that workers share")
    flag("--num_workers", type=natural, default=2, help="processes that load data; 0 loads between iterations")
    if unlabeled:
        flag("--labeled_bs", type=int, default=2, help="labelled patches of a batch; the rest is unlabelled")
        where = "folder with more unlabelled cases (default: root_path, if unlabeled.list lies there)"
        rare("--unlabeled_root", metavar="DIR", help=where)

    flag, rare = parser.group("network")
    flag("--network", type=network, default="vnet", help=NETWORK)
    flag("--n_filters", type=positive, default=16, help="channels on the finest level")
    rare("--max_filters", type=positive, help="most channels of a level, which has twice those above it")
    rare("--strides", type=per_axis(positive), nargs="+", metavar="S", help=STRIDES)
    rare("--kernel_sizes", type=per_axis(odd), nargs="+", metavar="K", help=KERNELS)
    flag("--normalization", choices=NORMALIZATIONS, default="batchnorm", help="normalization after each convolution")
    rare("--has_dropout", action=switch, default=True, help=HAS_DROPOUT)
    rare("--deep_supervision", action=switch, default=False, help="unet: losses on the coarser levels too")
    rare("--residual", action=switch, default=False, help="unet: each block adds its input to its output")
    rare("--init", choices=("none", "kaiming"), default="none", help="initial weights: PyTorch's own, or He et al.'s")
    flag("--pretrained", metavar="FILE", help="weights to start from, an encoder's too; what does not fit is listed")
    rare("--pretrained_parts", choices=PARTS, default="all", help=PRETRAINED_PARTS)
    rare("--from_scratch", action=switch, default=False, help="leave --pretrained out: the row to compare it with")
    rare("--encoder_lr_factor", type=rate, default=1.0, help="of the encoder's learning rate")
    decay = "of the learning rate, from each stage of the encoder to the one before it"
    rare("--layer_decay", type=positive_fraction, default=1.0, help=decay)
    frozen = "what stays as it is: encoder, stem, or the weights whose names begin as this regular expression says"
    rare("--freeze", metavar="PART", help=frozen)
    rare("--unfreeze_at", type=positive, metavar="N", help="iterations after which --freeze ends (default: never)")

    flag, rare = parser.group("optimizer")
    rare("--optimizer", choices=("sgd", "adam", "adamw"), default="sgd", help="which one")
    flag("--base_lr", type=rate, default=0.01, help="learning rate at the start, after the warm-up")
    rare("--momentum", type=fraction, default=0.9, help="of sgd")
    rare("--nesterov", action=switch, default=False, help="sgd: Nesterov's momentum")
    rare("--betas", type=below_one, nargs=2, default=[0.9, 0.999], metavar=("B1", "B2"), help="of adam and adamw")
    rare("--weight_decay", type=rate, default=1e-4, help="of every optimizer")
    flag("--lr_schedule", choices=SCHEDULES, default="step", help="how the learning rate falls")
    rare("--lr_step", type=positive, default=2500, help="iterations: of step, exponential, cosine_restarts")
    rare("--lr_gamma", type=fraction, default=0.1, help="factor of step, exponential (per --lr_step) and plateau")
    rare("--lr_power", type=rate, default=0.9, help="exponent of poly")
    rare("--lr_patience", type=natural, default=5, help="validations without a better Dice before plateau lowers it")
    rare("--warmup_iterations", type=natural, default=0, help="iterations over which the rate rises to --base_lr")

    flag, rare = parser.group("supervised loss")
    flag("--loss", default="ce:0.5,dice:0.5", help="weighted sum of ce, dice, linear_dice, focal and tversky")
    rare("--class_weights", type=rate, nargs="+", metavar="WEIGHT", help="a factor for each class in ce and focal")
    rare("--deep_supervision_weights", type=rate, nargs="+", metavar="WEIGHT", help=DEEP_SUPERVISION)
    flag("--ignore_index", type=int, help="label of voxels that no loss counts (default: there is none)")

    if strong_views:
        flag, rare = parser.group("strong views of the patches on which student and teacher are compared")
        plane = "rotate, scale and deform in the W-H plane alone, as stacks want it whose slices lie far apart"
        rare("--in_plane", action=switch, default=False, help=plane)
        flag("--strong_rotation", type=within(180), default=0, help="degrees: rotation by up to this about any axis")
        rare("--strong_scaling", type=within(0.99), default=0, help="magnification between 1 - this and 1 + this")
        moved = "voxels: largest move of a smooth deformation, up to 6.4"
        rare("--strong_elastic", type=within(6.4), default=0, help=moved)
        rare("--strong_gamma", type=rate, default=0, help="gamma between 1 / (1 + this) and 1 + this")
        flag("--strong_noise", type=rate, default=0, help="largest deviation of Gaussian noise, in the image's unit")
        rare("--strong_blur", type=rate, default=0, help="voxels: largest deviation of a Gaussian blur")
        rare("--strong_cutout", type=fraction, default=0, help="largest share of a patch that three boxes cut out")
        rare("--strong_mixin", type=fraction, default=0, help="largest share of a box pasted from a labelled patch")

    flag, rare = parser.group("training")
    flag("--max_iterations", type=positive, default=6000, help="iterations to train")
    flag("--batch_size", type=positive, default=4 if unlabeled else 2, help="patches an iteration")
    rare("--deterministic", type=int, choices=(0, 1), default=1, help="1: the same seed gives the same weights")
    flag("--seed", type=natural, default=1337, help="seed of weights, batches, crops, noise and dropout")
    flag("--gpu", default="0", metavar="N", help="number of the GPU; without one the CPU is used")
    flag("--amp", choices=("off", "bf16", "fp16"), default="off", help="mixed precision of the forward passes")
    flag("--fast", action=switch, default=False, help=FAST)
    rare("--compile", action=switch, default=None, help="torch.compile the networks; changes the last digits")
    rare("--channels_last", action=switch, default=None, help="memory format of the networks; changes the last bits")
    rare("--winograd", action=switch, default=None, help=WINOGRAD)
    rare("--keep_memory", action=switch, default=True, help=KEEP_MEMORY)
    rare("--accumulation_steps", type=positive, default=1, help="parts of a batch that pass one after the other")
    rare("--gradient_checkpointing", action=switch, default=False, help="recompute instead of storing activations")
    rare("--gradient_clipping", type=rate, default=0, help="largest norm of the gradient; 0 does not clip")

    if unlabeled:
        flag, rare = parser.group("weight of the loss on unlabelled patches")
        rare("--consistency_ramp", choices=RAMPUPS, default="sigmoid", help="shape of its ramp")
        rare("--consistency_warmup", type=natural, default=0, help="iterations of supervised training before the ramp")
    if teacher:
        flag, rare = parser.group("teacher")
        rare("--ema_rampup", type=natural, default=0, help="iterations over which --ema_decay rises, along a sigmoid")
        rare("--ema_buffers", action=switch, default=False, help="average batch norm's statistics too")
        rare("--teacher_checkpoint", metavar="FILE", help="weights to start from, such as those of a supervised run")
        who = ("teacher", "student", "both")
        rare("--teacher_checkpoint_for", choices=who, default="both", help="who starts from --teacher_checkpoint")

    flag, rare = parser.group("run")
    flag("--exp", help="name of the experiment, for the run's folder (default: the network's)")
    rare("--model", default=model, help="name of the method, for the run's folder")
    flag("--output_dir", default=".", help="runs go to OUTPUT_DIR/model/<dataset>_<exp>_<labelnum>_labeled/<model>/")
    flag("--resume", nargs="?", const="latest", metavar="FILE", help="go on from FILE, or from the run's latest.pth")
    flag("--overwrite", action="store_true", help="start anew where a run of this name already lies")
    rare("--save_freq", type=positive, default=500, help="iterations between two writings of latest.pth")
    rare("--keep_last", type=natural, default=0, help="also keep the weights of so many of the last writings")
    rare("--test_only", action="store_true", help="no training: test the weights of this run's last iteration")

    flag, rare = parser.group("validation")
    flag("--val_list", metavar="FILE", help="file with the names of cases to monitor, kept out of training")
    fold = "fold of splits_final.json to train, numbered from 0: its val cases are kept out, for inference.py"
    rare("--fold", type=natural, metavar="K", help=fold)
    flag("--val_freq", type=positive, default=500, help="iterations between two validations")
    rare("--patience", type=positive, help="stop after so many validations without a better Dice (default: never)")
    rare("--stride_xy", type=positive, default=18, help="voxels between windows along W and H in validation")
    rare("--stride_z", type=positive, default=4, help="voxels between windows along D in validation")

    flag, rare = parser.group("monitoring")
    rare("--log_freq", type=positive, default=1, help="iterations between two rows of metrics.csv")
    flag("--tensorboard", action=switch, default=False, help="event files in the run's folder; needs tensorboard")
    rare("--wandb", choices=("offline", "online"), help="Weights & Biases; needs wandb (default: no)")
    rare("--progress", type=natural, default=60, help="seconds between two drawings of progress.png; 0 draws none")
    parser.method_first = True
    return parser


def image_flags(rare, training=True):
    """The flags that say how images and slices reach the network; without `training` none has a default."""

    def default(value):
        return value if training else None

    rare("--intensity", choices=INTENSITIES, default=default("none"), help=INTENSITY)
    size = "of slices and images: resize each to so many pixels, and predictions back"
    rare("--resize", type=positive, nargs=2, metavar=("H", "W"), help=size)
    channels = "of slices: so many on either side are further channels (2.5-D)"
    rare("--context", type=natural, default=default(0), help=channels)
    first = "of volumes: the files hold (S, H, W), as ACDC's; they are read as (H, W, S), with the slices last"
    rare("--slices_first", action=argparse.BooleanOptionalAction, default=default(False), help=first)
    snap = "of masks: take the nearest class for a value or colour that is none, instead of refusing it"
    rare("--snap", action=argparse.BooleanOptionalAction, default=default(False), help=snap)


def parse(parser, argv):
    """The flags in `argv`, those of its --config that it does not give, those of its --plan that neither gives, and
    defaults for the rest, which depend on the data: images have IMAGE_SETTINGS.

    Without --root_path: the folder of --dataset_name in data/; without that, too, data/LA where it has a train.list,
    else the built-in data, which --dims 2 alone asks for images of. Built-in data has the settings in BUILT_IN as
    defaults. Without --dataset_name: the name of the data's folder. Without --exp: the name of the network, of one's
    own that of its class. `args.classes` is the data's class table, as JSON holds it, or None; `args.background` is 0,
    or None where no class is the background.
    """
    argv = sys.argv[1:] if argv is None else [str(word) for word in argv]
    given = given_flags(parser, argv)
    config = config_settings(parser, Path(given["config"])) if given.get("config") else {}
    if is_own(config.get("network", "")) and "network" not in given:
        raise FlagError(f"{given['config']}: its network is code: give --network {config['network']}, to run it")
    name = given.get("dataset_name")
    if "root_path" not in given and name and (name in BUILT_IN or (HOME / "data" / name).is_dir()):
        config.pop("root_path", None)  # other data than that of the run whose settings these are
    chosen, settings = {**config, **given}, {}
    optimizer, own_rate = parser.get_default("optimizer"), parser.get_default("base_lr")
    if optimizer != "sgd" and "base_lr" in config and "base_lr" not in given and "optimizer" not in chosen:
        remedy = "give --base_lr, or name the optimizer in the file"
        said = f"{given['config']}: its base_lr {config['base_lr']:g} names no optimizer"
        raise FlagError(f"{said}, and this script's is {optimizer}, at {own_rate:g}, not sgd; {remedy}")
    name, images = chosen.get("dataset_name"), chosen.get("dims") == 2
    if chosen.get("root_path") is None:
        la = HOME / "data/LA"
        if name is None and (images or not (la / "train.list").is_file()):
            name = "Electrode" if images else "Phantom"
        place = HOME / "data" / (name or "LA")
        if name not in (None, *BUILT_IN) and not place.is_dir():
            known = sorted({*BUILT_IN, *(path.parent.name for path in HOME.glob("data/*/train.list"))})
            raise FlagError(f"--dataset_name {name}: there is no {place}; give --root_path, or {' or '.join(known)}")
        settings = {**BUILT_IN.get(name, {}), "root_path": str(place)}
        if chosen.get("dims") == 3 and settings.get("dims") == 2:
            raise FlagError(f"--dims 3 with --dataset_name {name}, whose cases are images: take --dims 2")
    if optimizer != "sgd":
        settings.pop("base_lr", None)  # the built-in data's is a rate of sgd
    if not parser.get_default("consistency_rampup"):
        settings.pop("consistency_rampup", None)  # a method that has no ramp has none there
    if (parser.get_default("consistency_warmup") or 0) >= settings.get("max_iterations", math.inf):
        settings["consistency_warmup"] = settings["max_iterations"] // 3
    root = chosen.get("root_path") or settings["root_path"]
    if chosen.get("root_path") and not Path(root).exists():
        raise FlagError(f"{root}: no such folder; give the one that holds train.list, test.list, and data/ or images/")
    data, planned = data_settings(root, classes_count=parser.get_default("labelnum") != 0), {}
    if data["dims"] == 3:
        del data["intensity"]  # of volumes it is the script's
    if chosen.get("plan"):
        from mtseg.script.plans import plan_settings  # not above: it loads PyTorch, and --help is answered before

        planned = plan_settings(parser, Path(chosen["plan"]), root, chosen)
    images = images or 2 in (data["dims"], planned.get("dims"))
    if images and "patch_size" in settings:
        settings["patch_size"] = settings["patch_size"][:2]  # of slices of Phantom
    settings = (IMAGE_SETTINGS if images else {}) | data | settings
    settings |= planned
    kind = chosen.get("network") or settings.get("network") or parser.get_default("network")
    settings["has_dropout"] = kind != "unet"  # it loses classes by it; vnet loses Dice, but drops in all of its papers
    kind = kind.rpartition(":")[2].lower()
    settings.setdefault("exp", kind if kind.isidentifier() else "own")  # of another, what is wrong is said later
    known = {action.dest for action in parser._actions}
    chosen = {name: value for name, value in {**settings, **config}.items() if name in known}
    args = parser.parse_args(argv, argparse.Namespace(**chosen))
    args.classes, args.background = data["classes"], data["background"]
    if args.dataset_name is None:
        args.dataset_name = folder_name(args.root_path)
    if getattr(args, "annotations", None):
        from mtseg.script.sources import UNKNOWN, annotated_cases  # likewise

        check_annotations(args, given)
        args.labelnum, args.ignore_index = len(annotated_cases(args.annotations)), UNKNOWN
    check_flags(args, given)
    return args


def data_settings(root_path, classes_count=True):
    """What the data in `root_path` decide: {'dims': 2 or 3, 'intensity': --intensity's default, 'classes': their table
    as JSON holds it, or None, 'background': 0 or None}, and, where there is a table, the defaults of --num_classes and
    --ignore_index. Without `classes_count`, in pretraining, there is no table, and several sets may have any."""
    from mtseg.script.sources import UNKNOWN, Source  # not above: it loads PyTorch, and --help is answered before

    source = Source(root_path)
    table = source.table if classes_count else None
    settings = {"dims": source.dims, "classes": None, "background": 0}
    settings["intensity"] = "zscore" if source.dims == 2 else "none"
    if table is not None:
        settings |= {"classes": table.to_dict(), "background": table.background, "num_classes": len(table.names)}
        settings["ignore_index"] = UNKNOWN if source.ignores else None
    return settings


def folder_name(root_path):
    """The name of the data in `root_path`: of the folder that holds the lists."""
    from mtseg.datasets import find_root  # not above: it loads PyTorch, and --help is answered before

    return find_root(root_path).resolve().name


def network_settings(args, n_channels):
    """The arguments of the network that `args` ask for, on images of `n_channels` channels."""
    settings = {"n_channels": n_channels, "n_classes": args.num_classes, "n_filters": args.n_filters, "dims": args.dims}
    settings |= {"normalization": args.normalization, "has_dropout": args.has_dropout}
    # Of a checkpoint, inference reads these from the weights; not every network takes them.
    others = ("deep_supervision", "residual", "strides", "kernel_sizes", "max_filters")
    return settings | {name: getattr(args, name) for name in others if getattr(args, name, None)}
