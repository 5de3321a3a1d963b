"""The flags of the scripts, and how a mistake ends: in one sentence, with exit code 2."""

import argparse
import contextlib
import difflib
import json
import shutil
import sys
from pathlib import Path

from mtseg.script.checks import (  # noqa: F401
    FlagError,
    check_flags,
    check_normalization,
    check_one_stream,
    check_two_streams,
)
from mtseg.script.endings import answer_help, one_sentence  # noqa: F401
from mtseg.script.values import below_one, classes, even, fraction, natural, patch_side, positive, rate, within

# Where scripts and data/ lie: the repository, or, where mtseg was installed without it, the current folder.
HOME = Path(__file__).resolve().parents[2]
HOME = HOME if (HOME / "inference.py").is_file() else Path.cwd()

# What the built-in data is trained with where a flag does not say otherwise: small volumes, minutes on a CPU.
PHANTOM_SETTINGS = {
    "patch_size": [32, 32, 32],
    "max_iterations": 300,
    "base_lr": 0.03,
    "lr_step": 225,
    "n_filters": 8,
    "consistency_rampup": 2.0,
    "save_freq": 100,
    "stride_xy": 16,
    "stride_z": 16,
}


# What a run adds to its flags in config.json.
RECORDED = {"n_channels", "has_dropout", "python", "torch", "device", "threads", "train_cases", "val_cases"}
RECORDED |= {"tf32", "selection", "unlabeled_cases", "preprocessing", "ranks"}

# What a checkpoint without a config.json is tested with where a flag does not say otherwise: the UA-MT protocol.
INFERENCE_SETTINGS = {
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
}

NETWORKS = ("vnet", "unet")
NORMALIZATIONS = ("none", "batchnorm", "groupnorm", "instancenorm")
SCHEDULES = ("step", "constant", "poly", "cosine", "cosine_restarts", "exponential", "plateau")
RAMPUPS = ("sigmoid", "linear", "cosine", "constant")
DEEP_SUPERVISION = "weights of the four levels, finest first, divided by their sum (default: 1, 1/2, 1/4, 1/8)"
KEEP_MEMORY = "on a CPU: keep freed memory for the next tensors, faster with large patches and more of it"
FAST = "what is fastest on this device and changes the last digits alone; the log says what that is"
FAST_DECIDES = ("channels_last", "winograd", "compile")
WINOGRAD = "on a CPU with a C compiler: faster convolutions of 16, 32, ... channels; changes the last digits"
ROTFLIP = (
    "turns in the W-H plane: mirror (the family's: one of four mirror images, never the volume as it is), all (one of "
    "the eight symmetries), flips (along W and along H, each with probability one half), none"
)


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help with values and default behind each flag; without `everything`, only the flags that people often set."""

    def __init__(self, prog, everything=True):
        super().__init__(prog, max_help_position=28, width=min(shutil.get_terminal_size((120, 24)).columns, 120))
        self.everything = everything

    def add_argument(self, action):
        if self.everything or not getattr(action, "rare", False):
            super().add_argument(action)

    def _get_default_metavar_for_optional(self, action):
        return "N" if action.type in (int, positive, natural, classes, patch_side, even) else "X"

    def _metavar_formatter(self, action, default_metavar):
        metavar = action.metavar or ("X" if action.choices else default_metavar)
        return lambda size: metavar if isinstance(metavar, tuple) else (metavar,) * size

    def _get_help_string(self, action):
        text = action.help + (": " + ", ".join(map(str, action.choices)) if action.choices else "")
        if action.default in (None, False, argparse.SUPPRESS):
            return text
        default = action.default if isinstance(action.default, (list, tuple)) else [action.default]
        return f"{text} (default: {' '.join(map(str, default))})".replace("%", "%%")


class Help(argparse.Action):
    """--help shows the flags that people often set, --help all every one."""

    def __call__(self, parser, namespace, value, option_string=None):
        parser.everything = value == "all" or not parser.has_rare
        print(parser.format_help(), end="")
        raise SystemExit(0)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with a page of help, `--help all` for the rest, and errors of one line.

    `group(title)` gives two functions that add a flag: for those that people often set, and for those they rarely do.
    """

    def __init__(self, **kwargs):
        super().__init__(formatter_class=Formatter, allow_abbrev=False, add_help=False, **kwargs)
        self.noted = set()  # flags that were given twice, each of which is said once
        self.everything = True
        self.has_rare = False
        self.method_first = False  # whether a new group stands before the others in the help
        what = "this page; `--help all` shows every flag"
        self.add_argument("-h", "--help", nargs="?", metavar="all", action=Help, default=argparse.SUPPRESS, help=what)

    def group(self, title):
        add = self.add_argument_group(title).add_argument
        if self.method_first:
            self._action_groups.insert(2, self._action_groups.pop())

        def rare(*names, **settings):
            add(*names, **settings).rare = self.has_rare = True

        return add, rare

    def _get_formatter(self):
        return self.formatter_class(prog=self.prog, everything=self.everything)

    @contextlib.contextmanager
    def errors_as(self, make):
        """A context in which a wrong flag raises `make(message)` instead of ending the process."""
        self.make_error = make
        try:
            yield
        finally:
            self.make_error = None

    make_error = None

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's, but a flag that is given twice is said, and an error where it takes a list of values."""
        words = sys.argv[1:] if args is None else [str(word) for word in args]
        seen = {}
        for option in (word.partition("=")[0] for word in words):
            action = self._option_string_actions.get(option)
            if action in seen and action.nargs == "+":
                self.error(f"{option} is given twice, and only the last would count; give all values behind one")
            if action in seen and action not in self.noted:
                self.noted.add(action)
                print(f"note: {seen[action]} and {option} are both given; the last one counts", file=sys.stderr)
            if action is not None and not isinstance(action, argparse._ExtendAction):
                seen[action] = option
        return super().parse_known_args(words, namespace)

    def error(self, message):
        if self.make_error is not None:
            raise self.make_error(message)
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        if message.startswith("unrecognized arguments: --"):
            near = difflib.get_close_matches(unknown, self._option_string_actions, n=1)
            message += f"; did you mean {near[0]}?" if near else ""
        print(f"error: {message} (--help lists the flags)", file=sys.stderr)
        raise SystemExit(2)


def training_parser(description, model, unlabeled=False, teacher=False, strong_views=False):
    """The parser of a training script: the flags that all have, with LASeg's names and defaults.

    `model`: the method's name. `unlabeled`: the script learns from unlabelled patches, with a weight that ramps up.
    `teacher`: it averages a teacher. `strong_views`: its student sees strongly augmented patches. A method adds its
    own flags in its script: `flag, rare = parser.group(title)`.
    """
    parser = Parser(description=description, usage="%(prog)s [flags]")
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--config", metavar="FILE", help="JSON file with any of these flags; the command line wins")

    flag, rare = parser.group("data")
    flag("--root_path", help="folder with train.list, test.list and data/ (default: data/LA, else the Phantom data)")
    rare("--dataset_name", help="name of the data, for the run's folder (default: its folder's); Phantom is built in")
    flag("--labelnum", type=positive, default=25, help="labelled cases: the first ones of train.list")
    rare("--max_samples", type=positive, help="use only the first cases of train.list (default: all listed)")
    flag("--num_classes", type=classes, default=2, help="classes, background included")
    flag("--patch_size", type=patch_side, nargs=3, default=[112, 112, 80], metavar=("W", "H", "D"), help="voxels")
    rare("--rotflip", choices=("mirror", "all", "flips", "none"), default="mirror", help=ROTFLIP)
    rare("--cache", action=switch, default=True, help="read all volumes once, into a temporary file that workers share")
    flag("--num_workers", type=natural, default=2, help="processes that load data; 0 loads between iterations")
    if unlabeled:
        flag("--labeled_bs", type=int, default=2, help="labelled patches of a batch; the rest is unlabelled")
        where = "folder with more unlabelled cases (default: root_path, if unlabeled.list lies there)"
        rare("--unlabeled_root", metavar="DIR", help=where)

    flag, rare = parser.group("network")
    flag("--network", choices=NETWORKS, default="vnet", help="architecture")
    flag("--n_filters", type=positive, default=16, help="channels on the finest level")
    flag("--normalization", choices=NORMALIZATIONS, default="batchnorm", help="normalization after each convolution")
    rare("--deep_supervision", action=switch, default=False, help="unet: losses on the coarser levels too")
    rare("--residual", action=switch, default=False, help="unet: each block adds its input to its output")
    rare("--init", choices=("none", "kaiming"), default="none", help="initial weights: PyTorch's own, or He et al.'s")
    flag("--pretrained", metavar="FILE", help="weights to start from: what fits is loaded, what does not is listed")

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
    flag("--loss", default="ce:0.5,dice:0.5", help="weighted sum of ce, dice, focal and tversky")
    rare("--class_weights", type=rate, nargs="+", metavar="WEIGHT", help="a factor for each class in ce and focal")
    rare("--deep_supervision_weights", type=rate, nargs=4, metavar="WEIGHT", help=DEEP_SUPERVISION)
    flag("--ignore_index", type=int, help="label of voxels that no loss counts (default: there is none)")

    if strong_views:
        flag, rare = parser.group("strong views of the patches on which student and teacher are compared")
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
    flag("--gpu", default="0", help="number of the GPU; without one the CPU is used")
    flag("--amp", choices=("off", "bf16", "fp16"), default="off", help="mixed precision of the forward passes")
    flag("--fast", action=switch, default=False, help=FAST)
    rare("--compile", action=switch, default=False, help="torch.compile the networks; changes the last digits")
    rare("--channels_last", action=switch, default=False, help="memory format of the networks; changes the last bits")
    rare("--winograd", action=switch, default=False, help=WINOGRAD)
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
    flag("--exp", default="vnet", help="name of the experiment, for the run's folder")
    rare("--model", default=model, help="name of the method, for the run's folder")
    flag("--output_dir", default=".", help="runs go to OUTPUT_DIR/model/<dataset>_<exp>_<labelnum>_labeled/<model>/")
    flag("--resume", nargs="?", const="latest", metavar="FILE", help="go on from FILE, or from the run's latest.pth")
    flag("--overwrite", action="store_true", help="start anew where a run of this name already lies")
    rare("--save_freq", type=positive, default=500, help="iterations between two writings of latest.pth")
    rare("--keep_last", type=natural, default=0, help="also keep the weights of so many of the last writings")
    rare("--test_only", action="store_true", help="no training: test the weights of this run's last iteration")

    flag, rare = parser.group("validation")
    flag("--val_list", metavar="FILE", help="file with the names of cases to monitor, kept out of training")
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


def inference_parser(description):
    """The parser of inference.py; flags that are None there, `parse_inference` looks up."""
    parser = Parser(description=description)
    flag = parser.add_argument
    flag(
        "--model_path",
        type=Path,
        nargs="+",
        action="extend",
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
    flag("--fast", action="store_true", help=FAST)
    flag("--winograd", action="store_true", help=WINOGRAD)
    flag("--keep_memory", action=argparse.BooleanOptionalAction, default=True, help=KEEP_MEMORY)

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

    add_settings(parser)
    return parser


def add_settings(parser):
    """The settings of a trained network, and of its windows, that its run's config.json knows."""
    flag = parser.add_argument_group("settings, by default the run's").add_argument
    flag("--network", choices=NETWORKS, help="architecture")
    flag("--n_channels", type=positive, help="channels of the image")
    flag("--num_classes", type=classes, help="classes, background included")
    flag("--n_filters", type=positive, help="channels on the finest level")
    flag("--normalization", choices=NORMALIZATIONS, help="after each convolution")
    flag("--patch_size", type=patch_side, nargs=3, metavar=("W", "H", "D"), help="voxels of a window")
    flag("--stride_xy", type=positive, help="voxels between windows along W and H, at most those of a window")
    flag("--stride_z", type=positive, help="voxels between windows along D, at most those of a window")
    flag("--ignore_index", type=int, help="label of voxels that no metric counts")


def parse_inference(parser, argv, la_folder):
    """The flags in `argv`, and `configs`, the config.json beside each checkpoint ({} where there is none).

    Settings that no flag gives are the first run's, else INFERENCE_SETTINGS and `la_folder`. FlagError where flags
    contradict each other.
    """
    args = parser.parse_args(argv)
    args.configs = [read_config(path.parent / "config.json") for path in args.model_path]
    for path, config in zip(args.model_path, args.configs, strict=True):
        for name in ("train_cases", "unlabeled_cases", "val_cases"):
            cases = config.get(name) or []
            if not isinstance(cases, list) or not all(isinstance(case, str) for case in cases):
                raise FlagError(f"{path.parent / 'config.json'}: {name} is no list of names; repair it")
    given, trained_on = args.root_path, str(args.configs[0].get("root_path"))
    defaults = {"root_path": str(la_folder), **INFERENCE_SETTINGS}
    take_over(parser, args, args.configs[0], {**defaults, "dataset_name": folder_name(given or la_folder)})
    if given and Path(given).resolve() != Path(trained_on).resolve():
        args.dataset_name = folder_name(given)  # the run's is that of other data
    if args.input is None and (args.labels or args.preprocessing or args.go_on):
        raise FlagError("--labels, --preprocessing and --continue are about scans: name them by --input")
    if args.input and args.save_result:
        raise FlagError("--save_result is for the cases of a list: with --input predictions are written anyway")
    if args.uncertainty == "ensemble" and len(args.model_path) < 2:
        raise FlagError("--uncertainty ensemble with one --model_path: give several checkpoints, or use mc_dropout")
    return args


def take_over(parser, args, config, defaults):
    """Give `args` the settings in `defaults` that no flag gave: those in `config`, a run's config.json, else these.

    FlagError for a value in `config` that the flag would not take. Strides are no larger than the patch, as the
    windows lie.
    """
    path = args.model_path[0].parent / "config.json"
    for name, default in defaults.items():
        value = config.get(name)
        if getattr(args, name, None) is not None:
            continue
        wrong = f"{path}: {name} cannot be {json.dumps(value)}; repair it"
        if value is not None and f"--{name}" in parser._option_string_actions:
            words = [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
            with parser.errors_as(lambda _, wrong=wrong, name=name: FlagError(f"{wrong}, or give --{name}")):
                value = getattr(parser.parse_args(["--model_path", "", *words]), name)
        elif value is not None and not isinstance(value, type(default)):
            raise FlagError(wrong)
        setattr(args, name, default if value is None else value)
    args.stride_xy, args.stride_z = min(args.stride_xy, *args.patch_size[:2]), min(args.stride_z, args.patch_size[2])


def listed_in(configs, *names):
    """The set of cases that any of `configs` lists under any of `names`."""
    return {case for config in configs for name in names for case in config.get(name) or []}


def parse(parser, argv):
    """The flags in `argv`, those of its --config that it does not give, and defaults for the rest.

    Without --root_path: data/LA where it has a train.list, else the Phantom data with PHANTOM_SETTINGS as defaults;
    --dataset_name says which of the two by name. Without --dataset_name: the name of the data's folder.
    """
    argv = sys.argv[1:] if argv is None else [str(word) for word in argv]
    given = given_flags(parser, argv)
    config = config_settings(parser, Path(given["config"])) if given.get("config") else {}
    chosen, settings = {**config, **given}, {}
    if chosen.get("root_path") is None:
        la, name = HOME / "data/LA", chosen.get("dataset_name")
        settings = {"root_path": str(la)}
        if name == "Phantom" or (name is None and not (la / "train.list").is_file()):
            settings = {**PHANTOM_SETTINGS, "root_path": str(HOME / "data/Phantom")}
    known = {action.dest for action in parser._actions}
    settings = {name: value for name, value in {**settings, **config}.items() if name in known}
    args = parser.parse_args(argv, argparse.Namespace(**settings))
    if args.dataset_name is None:
        args.dataset_name = folder_name(args.root_path)
    check_flags(args, given)
    return args


def folder_name(root_path):
    """The name of the data in `root_path`: of the folder that holds the lists."""
    from mtseg.datasets import find_root  # not above: it loads PyTorch, and --help is answered before

    return find_root(root_path).resolve().name


def given_flags(parser, argv):
    """{name: value} of the flags that stand in `argv`."""
    absent = object()
    names = {action.dest: absent for action in parser._actions if action.dest != "help"}
    values = vars(parser.parse_args(argv, argparse.Namespace(**names)))
    return {name: value for name, value in values.items() if name in names and value is not absent}


def defaults_of(parser):
    """{name: default} of all flags of `parser`."""
    return {action.dest: parser.get_default(action.dest) for action in parser._actions if action.dest != "help"}


def config_settings(parser, path):
    """{name: value} of the flags in the JSON file `path`; FlagError names a wrong key or value.

    Understands what a run wrote into its config.json: RECORDED and how that run was started are passed over. Settings
    that only other scripts have are left out, and a line says so.
    """
    from mtseg.script import methods  # here, as it loads the other scripts, and PyTorch with them

    if not path.is_file():
        raise FlagError(f"--config {path}: no such file; give a JSON file with flags, such as a run's config.json")
    left_out = []
    known = {action.dest: action for action in parser._actions if action.option_strings and action.dest != "help"}
    config, settings = read_config(path), {}
    for key, value in config.items():
        if key in RECORDED or key in ("config", "resume", "overwrite", "test_only"):
            continue
        if key not in known and key in methods.all_flags():
            left_out.append(key)
            continue
        if key == "model" and value != parser.get_default("model") and value in methods.names():
            continue  # another method's name is not this one's
        if key in FAST_DECIDES and config.get("fast") is True:
            continue  # this machine's --fast may be another one
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0)
            raise FlagError(f"{path}: unknown key {key!r}; the nearest flag is {near[0]!r}")
        if value is None:
            continue
        switch = isinstance(known[key], argparse.BooleanOptionalAction)
        entries = [str(entry) for entry in (value if isinstance(value, list) else [value])]
        if isinstance(value, bool) != switch or isinstance(value, dict) or any(e.startswith("--") for e in entries):
            raise FlagError(f"{path}: {key} cannot be {json.dumps(value)}; see --help for what --{key} takes")
        words = [f"--{key}" if value else f"--no-{key}"] if switch else [f"--{key}", *entries]
        with parser.errors_as(lambda message: FlagError(f"{path}: {message}; see --help")):
            settings[key] = given_flags(parser, words)[key]
    if left_out:
        print(f"{path}: left out, since only other scripts have them: {', '.join(left_out)}", flush=True)
    return settings


def network_settings(args, n_channels):
    """The arguments of the network that `args` ask for, on images of `n_channels` channels."""
    settings = {"n_channels": n_channels, "n_classes": args.num_classes, "n_filters": args.n_filters}
    settings |= {"normalization": args.normalization, "has_dropout": args.has_dropout}
    # Of a checkpoint, inference reads these from the weights; a V-Net does not take them.
    return settings | {name: True for name in ("deep_supervision", "residual") if getattr(args, name, False)}


def read_config(path):
    """The settings in a config.json, {} where there is none; FlagError where it is no JSON object."""
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise FlagError(f"{path}: not a JSON file ({error}); repair it or move it away") from error
    if not isinstance(config, dict):
        raise FlagError(f"{path}: not a JSON object; repair it or move it away")
    return config
