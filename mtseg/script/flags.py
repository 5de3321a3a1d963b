"""The flags of the scripts, and how a mistake ends: in one sentence, with exit code 2."""

import argparse
import contextlib
import difflib
import json
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
from mtseg.script.values import below_one, classes, fraction, natural, patch_side, positive, rate, within

# What the built-in data is trained with where a flag does not say otherwise: small volumes, minutes on a CPU.
PHANTOM_SETTINGS = {
    "dataset_name": "Phantom",
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
RECORDED |= {"selection", "unlabeled_cases", "preprocessing", "ranks"}

# What a checkpoint without a config.json is tested with where a flag does not say otherwise: the UA-MT protocol.
INFERENCE_SETTINGS = {
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
}

NETWORKS = ("vnet", "unet")
NORMALIZATIONS = ("none", "batchnorm", "groupnorm", "instancenorm")
SCHEDULES = ("step", "constant", "poly", "cosine", "cosine_restarts", "exponential", "plateau")
RAMPUPS = ("sigmoid", "linear", "cosine", "constant")
DEEP_SUPERVISION = "weights of the four levels, finest first, divided by their sum (default: 1, 1/2, 1/4, 1/8)"
KEEP_MEMORY = "on a CPU: keep freed memory for the next tensors, faster with large patches and more of it"
WINOGRAD = "on a CPU with a C compiler: faster convolutions of 16, 32, ... channels; changes the last digits"
ROTFLIP = "quarter turns and flips in the W-H plane: the family's four mirror images, all eight, or none"


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help with the default behind each flag that has one."""

    def _get_help_string(self, action):
        has_default = action.default not in (None, False, argparse.SUPPRESS)
        return f"{action.help} (default: %(default)s)" if has_default else action.help


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose help shows defaults, and whose errors are one line without the usage in front."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=Formatter, allow_abbrev=False, **kwargs)

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
        """As argparse's, and an error where a flag is given twice: the first would be passed over without a word."""
        words = sys.argv[1:] if args is None else [str(word) for word in args]
        seen = {}
        for word in words:
            option = word.partition("=")[0]
            action = self._option_string_actions.get(option)
            if action in seen:
                both = option if option == seen[action] else f"{seen[action]} and {option}"
                self.error(f"{both}: this flag is given twice; give it once")
            if action is not None:
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


def training_parser(description, model="supervised", batch_size=2):
    """The parser of a training script, with LASeg's flags and defaults; `model` names the method."""
    parser = Parser(description=description)
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--config", metavar="FILE", help="JSON file with any of these flags; the command line wins")

    flag = parser.add_argument_group("data").add_argument
    flag("--root_path", help="folder with train.list, test.list and data/ (default: data/LA, else the Phantom data)")
    flag("--dataset_name", default="LA", help="name of the data, for the run's folder; 'Phantom' is built in")
    flag("--labelnum", type=positive, default=25, help="labelled cases: the first ones of train.list")
    flag("--max_samples", type=positive, help="use only the first cases of train.list (default: all listed)")
    flag("--num_classes", type=classes, default=2, help="classes, background included")
    flag("--patch_size", type=patch_side, nargs=3, default=[112, 112, 80], metavar=("W", "H", "D"), help="voxels")
    flag("--rotflip", choices=("mirror", "all", "none"), default="mirror", help=ROTFLIP)
    flag("--cache", action=switch, default=True, help="read all volumes once, into a temporary file that workers share")
    flag("--num_workers", type=natural, default=2, help="processes that load data; 0 loads between iterations")

    flag = parser.add_argument_group("network").add_argument
    flag("--network", choices=NETWORKS, default="vnet", help="architecture")
    flag("--n_filters", type=positive, default=16, help="channels on the finest level")
    flag("--normalization", choices=NORMALIZATIONS, default="batchnorm", help="normalization after each convolution")
    flag("--deep_supervision", action=switch, default=False, help="unet: losses on the coarser levels too")
    flag("--residual", action=switch, default=False, help="unet: each block adds its input to its output")
    flag("--init", choices=("none", "kaiming"), default="none", help="initial weights: PyTorch's own, or He et al.'s")
    flag("--pretrained", metavar="FILE", help="weights to start from: what fits is loaded, what does not is listed")

    flag = parser.add_argument_group("optimizer").add_argument
    flag("--optimizer", choices=("sgd", "adam", "adamw"), default="sgd", help="which one")
    flag("--base_lr", type=rate, default=0.01, help="learning rate at the start, after the warm-up")
    flag("--momentum", type=fraction, default=0.9, help="of sgd")
    flag("--nesterov", action=switch, default=False, help="sgd: Nesterov's momentum")
    flag("--betas", type=below_one, nargs=2, default=[0.9, 0.999], metavar=("B1", "B2"), help="of adam and adamw")
    flag("--weight_decay", type=rate, default=1e-4, help="of every optimizer")
    flag("--lr_schedule", choices=SCHEDULES, default="step", help="course of the learning rate")
    flag("--lr_step", type=positive, default=2500, help="iterations: of step, exponential, cosine_restarts")
    flag("--lr_gamma", type=fraction, default=0.1, help="factor of step, exponential (per --lr_step) and plateau")
    flag("--lr_power", type=rate, default=0.9, help="exponent of poly")
    flag("--lr_patience", type=natural, default=5, help="validations without a better Dice before plateau lowers it")
    flag("--warmup_iterations", type=natural, default=0, help="iterations over which the rate rises to --base_lr")

    flag = parser.add_argument_group("supervised loss").add_argument
    flag("--loss", default="ce:0.5,dice:0.5", help="weighted sum of ce, dice, focal and tversky")
    flag("--class_weights", type=rate, nargs="+", metavar="WEIGHT", help="a factor for each class in ce and focal")
    flag("--deep_supervision_weights", type=rate, nargs=4, metavar="WEIGHT", help=DEEP_SUPERVISION)
    flag("--ignore_index", type=int, help="label of voxels that no loss counts (default: there is none)")

    flag = parser.add_argument_group("strong views").add_argument
    flag("--strong_rotation", type=within(180), default=0, help="degrees: rotation by up to this about any axis")
    flag("--strong_scaling", type=within(0.99), default=0, help="magnification between 1 - this and 1 + this")
    flag(
        "--strong_elastic", type=within(6.4), default=0, help="voxels: largest move of a smooth deformation, up to 6.4"
    )
    flag("--strong_gamma", type=rate, default=0, help="gamma between 1 / (1 + this) and 1 + this")
    flag("--strong_noise", type=rate, default=0, help="largest deviation of Gaussian noise, in the image's unit")
    flag("--strong_blur", type=rate, default=0, help="voxels: largest deviation of a Gaussian blur")
    flag("--strong_cutout", type=fraction, default=0, help="largest share of a patch that three boxes cut out")
    flag("--strong_mixin", type=fraction, default=0, help="largest share of a box pasted from a labelled patch")

    flag = parser.add_argument_group("training").add_argument
    flag("--max_iterations", type=positive, default=6000, help="iterations to train")
    flag("--batch_size", type=positive, default=batch_size, help="patches an iteration")
    flag("--deterministic", type=int, choices=(0, 1), default=1, help="1: the same seed gives the same weights")
    flag("--seed", type=natural, default=1337, help="seed of weights, batches, crops, noise and dropout")
    flag("--gpu", default="0", help="number of the GPU; without one the CPU is used")
    flag("--amp", choices=("off", "bf16", "fp16"), default="off", help="mixed precision of the forward passes")
    flag("--compile", action=switch, default=False, help="torch.compile the networks; dropout draws other masks")
    flag("--channels_last", action=switch, default=False, help="memory format of the networks; changes the last bits")
    flag("--winograd", action=switch, default=False, help=WINOGRAD)
    flag("--keep_memory", action=switch, default=True, help=KEEP_MEMORY)
    flag("--accumulation_steps", type=positive, default=1, help="parts of a batch that pass one after the other")
    flag("--gradient_checkpointing", action=switch, default=False, help="recompute instead of storing activations")
    flag("--gradient_clipping", type=rate, default=0, help="largest norm of the gradient; 0 does not clip")

    flag = parser.add_argument_group("run").add_argument
    flag("--exp", default="vnet", help="name of the experiment, for the run's folder")
    flag("--model", default=model, help="name of the method, for the run's folder")
    flag("--output_dir", default=".", help="runs go to OUTPUT_DIR/model/<dataset>_<exp>_<labelnum>_labeled/<model>/")
    flag("--resume", nargs="?", const="latest", metavar="FILE", help="go on from FILE, or from the run's latest.pth")
    flag("--overwrite", action="store_true", help="start anew where a run of this name already lies")
    flag("--save_freq", type=positive, default=500, help="iterations between two writings of latest.pth")
    flag("--keep_last", type=natural, default=0, help="also keep the weights of so many of the last writings")
    flag("--test_only", action="store_true", help="no training: test the weights of this run's last iteration")

    flag = parser.add_argument_group("validation").add_argument
    flag("--val_list", help="file with the names of cases to monitor, kept out of training")
    flag("--val_freq", type=positive, default=500, help="iterations between two validations")
    flag("--patience", type=positive, help="stop after so many validations without a better Dice (default: never)")
    flag("--stride_xy", type=positive, default=18, help="voxels between windows along W and H in validation")
    flag("--stride_z", type=positive, default=4, help="voxels between windows along D in validation")

    flag = parser.add_argument_group("monitoring").add_argument
    flag("--log_freq", type=positive, default=1, help="iterations between two rows of metrics.csv")
    flag("--tensorboard", action=switch, default=False, help="event files in the run's folder; needs tensorboard")
    flag("--wandb", choices=("offline", "online"), help="Weights & Biases; needs wandb (default: no)")
    flag("--progress", type=natural, default=60, help="seconds between two drawings of progress.png; 0 draws none")
    return parser


def unlabeled_parser(description, model):
    """The parser of a training script with unlabelled data and a weight that ramps up."""
    parser = training_parser(description, model, batch_size=4)
    flag = parser.add_argument_group("unlabelled data").add_argument
    flag("--labeled_bs", type=int, default=2, help="labelled patches of a batch; the rest is unlabelled")
    flag(
        "--unlabeled_root", help="folder with more unlabelled cases (default: root_path, if unlabeled.list lies there)"
    )
    flag("--consistency", type=rate, default=0.1, help="weight of the loss on unlabelled patches after its ramp")
    flag("--consistency_ramp", choices=RAMPUPS, default="sigmoid", help="shape of the ramp")
    flag("--consistency_rampup", type=rate, default=40.0, help="length of the ramp, in blocks of 150 iterations")
    flag("--consistency_warmup", type=natural, default=0, help="iterations of supervised training before the ramp")
    return parser


def teacher_parser(description, model="MT", compare=True):
    """The parser of a training script with a teacher and unlabelled data; `compare`: their outputs are compared."""
    parser = unlabeled_parser(description, model)
    switch = argparse.BooleanOptionalAction
    flag = parser.add_argument_group("mean teacher").add_argument
    flag("--ema_decay", type=fraction, default=0.99, help="share of the teacher that an update keeps")
    flag("--ema_rampup", type=natural, default=0, help="iterations over which that share rises, along a sigmoid")
    flag("--ema_buffers", action=switch, default=False, help="average batch norm's statistics too")
    flag("--teacher_checkpoint", metavar="FILE", help="weights to start from, such as those of a supervised run")
    flag("--teacher_checkpoint_for", choices=("teacher", "student", "both"), default="both", help="who starts from it")

    if compare:
        flag = parser.add_argument_group("consistency").add_argument
        flag("--consistency_type", choices=("mse", "kl", "ce"), default="mse", help="distance of student and teacher")
        flag("--consistency_on", choices=("unlabeled", "all"), default="unlabeled", help="patches that are compared")
        flag("--consistency_threshold", type=fraction, default=0, help="compare where the teacher is at least so sure")
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
    flag("--ignore_index", type=int, help="label of voxels that no metric counts (default: the run's)")

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


def parse_inference(parser, argv, la_folder):
    """The flags in `argv`, and `configs`, the config.json beside each checkpoint ({} where there is none).

    Settings that no flag gives are the first run's, else INFERENCE_SETTINGS and `la_folder`. FlagError where flags
    contradict each other.
    """
    args = parser.parse_args(argv)
    args.configs = [read_config(path.parent / "config.json") for path in args.model_path]
    defaults = {"root_path": str(la_folder), "ignore_index": None, **INFERENCE_SETTINGS}
    take_over(parser, args, args.configs[0], defaults)
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
        if value is not None and f"--{name}" in parser._option_string_actions:
            words = [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
            with parser.errors_as(lambda message: FlagError(f"{path}: {message}; repair it, or give the flag")):
                value = getattr(parser.parse_args(["--model_path", "", *words]), name)
        elif value is not None and not isinstance(value, type(default)):
            raise FlagError(f"{path}: {name} cannot be {json.dumps(value)}; repair it")
        setattr(args, name, default if value is None else value)
    args.stride_xy, args.stride_z = min(args.stride_xy, *args.patch_size[:2]), min(args.stride_z, args.patch_size[2])


def listed_in(config, *names):
    """The cases that `config`, read from a config.json, lists under `names`; FlagError where these are no lists."""
    lists = [config.get(name) or [] for name in names]
    if not all(isinstance(cases, list) and all(isinstance(case, str) for case in cases) for cases in lists):
        raise FlagError(f"a config.json of --model_path: its {' or '.join(names)} are no lists of names; repair it")
    return [case for cases in lists for case in cases]


def parse(parser, argv, la_folder, phantom_folder):
    """The flags in `argv`, those of its --config that it does not give, and defaults for the rest.

    Without --root_path: `la_folder` where it has a train.list, else the Phantom data's folder and PHANTOM_SETTINGS as
    defaults; --dataset_name says which by name.
    """
    argv = sys.argv[1:] if argv is None else [str(word) for word in argv]
    given = given_flags(parser, argv)
    config = config_settings(parser, Path(given["config"])) if given.get("config") else {}
    chosen = {**config, **given}
    settings = {}
    if chosen.get("root_path") is None:
        name = chosen.get("dataset_name")
        if name == "Phantom" or (name is None and not (la_folder / "train.list").is_file()):
            settings = {**PHANTOM_SETTINGS, "root_path": str(phantom_folder)}
        else:
            settings = {"root_path": str(la_folder), "dataset_name": "LA"}
    args = parser.parse_args(argv, argparse.Namespace(**{**settings, **config}))
    check_flags(args, given)
    return args


def given_flags(parser, argv):
    """{name: value} of the flags that stand in `argv`."""
    absent = object()
    names = {action.dest: absent for action in parser._actions if action.dest != "help"}
    values = vars(parser.parse_args(argv, argparse.Namespace(**names)))
    return {name: value for name, value in values.items() if name in names and value is not absent}


def config_settings(parser, path):
    """{name: value} of the flags in the JSON file `path`; FlagError names a wrong key or value.

    Understands what a run wrote into its config.json: RECORDED and how that run was started are passed over.
    """
    if not path.is_file():
        raise FlagError(f"--config {path}: no such file; give a JSON file with flags, such as a run's config.json")
    known = {action.dest: action for action in parser._actions if action.option_strings and action.dest != "help"}
    settings = {}
    for key, value in read_config(path).items():
        if key in RECORDED or key in ("config", "resume", "overwrite", "test_only"):
            continue
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
    return settings


def network_settings(args, n_channels):
    """The arguments of the network that `args` ask for, on images of `n_channels` channels."""
    settings = {"n_channels": n_channels, "n_classes": args.num_classes, "n_filters": args.n_filters}
    settings |= {"normalization": args.normalization, "has_dropout": args.has_dropout}
    # Of a checkpoint, inference reads these from the weights; a V-Net does not take them.
    return settings | {name: True for name in ("deep_supervision", "residual") if getattr(args, name, False)}


def markdown_table(parser):
    """All flags of `parser` as Markdown, a table for each group: flag, default, meaning."""
    lines = []
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if a.dest != "help" and a.option_strings]
        if actions:
            title = "settings" if group.title == "options" else group.title
            lines += ["", f"| {title} | default | what |", "|---|---|---|"]
        for action in actions:
            default = action.default
            if isinstance(default, (list, tuple)):
                default = " ".join(map(str, default))
            shown = "on" if default is True else {None: "", 0: "off"}.get(default, f"`{default}`")  # False is 0
            text = action.help.replace("|", "\\|")
            values = "" if action.choices is None else ": " + ", ".join(f"`{choice}`" for choice in action.choices)
            lines.append(f"| `{action.option_strings[0]}` | {shown} | {text}{values} |")
    return "\n".join(lines[1:])


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


if __name__ == "__main__":
    readme, end = Path("README.md"), "<!-- end of flags -->"
    begin = "<!-- flags: python -m mtseg.script.flags writes this table -->"
    before, _, rest = readme.read_text().partition(begin)
    table = markdown_table(teacher_parser(""))
    readme.write_text(f"{before}{begin}\n\n{table}\n\n{end}{rest.partition(end)[2]}")
