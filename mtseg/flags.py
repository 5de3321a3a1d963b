"""The flags that the training scripts share, and how a mistake ends: in one sentence, with exit code 2."""

import argparse
import contextlib
import json
import math
import sys

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


class FlagError(ValueError):
    """Flags that contradict each other or the data; the message is one sentence that names them."""


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help with the default behind each flag that has one."""

    def _get_help_string(self, action):
        has_default = action.default not in (None, False, argparse.SUPPRESS)
        return f"{action.help} (default: %(default)s)" if has_default else action.help


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose help shows defaults, and whose errors are one line without the usage in front."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=Formatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        print(f"error: {message} (--help lists the flags)", file=sys.stderr)
        raise SystemExit(2)


@contextlib.contextmanager
def one_sentence(*errors):
    """Turn the given errors, whose messages are sentences for the user, into a line on stderr and exit code 2."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except errors as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def natural(text):
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def classes(text):
    number = int(text)
    if not 2 <= number <= 256:
        raise argparse.ArgumentTypeError(f"{text} is not between 2 and 256 (background is a class)")
    return number


def patch_side(text):
    number = positive(text)
    if number % 16:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 16, and the networks halve a patch four times")
    return number


def rate(text):
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least 0")
    return number


def fraction(text):
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return number


def training_parser(description, model, batch_size):
    """The parser of a training script, with LASeg's flags and defaults; `model` names the method."""
    parser = Parser(description=description)
    flag = parser.add_argument_group("data").add_argument
    flag("--root_path", help="folder with train.list, test.list and data/ (default: data/LA, else the Phantom data)")
    flag("--dataset_name", default="LA", help="name of the data, for the run's folder; 'Phantom' is built in")
    flag("--labelnum", type=positive, default=25, help="labelled cases: the first ones of train.list")
    flag("--max_samples", type=positive, help="use only the first cases of train.list (default: all listed)")
    flag("--num_classes", type=classes, default=2, help="classes, background included")
    flag("--patch_size", type=patch_side, nargs=3, default=[112, 112, 80], metavar=("W", "H", "D"), help="voxels")
    flag("--num_workers", type=natural, default=2, help="processes that load data; 0 loads between iterations")

    flag = parser.add_argument_group("network").add_argument
    flag("--network", choices=("vnet", "unet"), default="vnet", help="architecture")
    flag("--n_filters", type=positive, default=16, help="channels on the finest level")
    flag(
        "--normalization",
        choices=("none", "batchnorm", "groupnorm", "instancenorm"),
        default="batchnorm",
        help="normalization after each convolution",
    )

    flag = parser.add_argument_group("training").add_argument
    flag("--max_iterations", type=positive, default=6000, help="iterations to train")
    flag("--batch_size", type=positive, default=batch_size, help="patches an iteration")
    flag("--base_lr", type=rate, default=0.01, help="learning rate at the start; a tenth every --lr_step iterations")
    flag("--lr_step", type=positive, default=2500, help="iterations between two steps of the learning rate")
    flag("--deterministic", type=int, choices=(0, 1), default=1, help="1: the same seed gives the same weights")
    flag("--seed", type=natural, default=1337, help="seed of weights, batches, crops, noise and dropout")
    flag("--gpu", default="0", help="number of the GPU; without one the CPU is used")

    flag = parser.add_argument_group("run").add_argument
    flag("--exp", default="vnet", help="name of the experiment, for the run's folder")
    flag("--model", default=model, help="name of the method, for the run's folder")
    flag("--output_dir", default=".", help="runs go to OUTPUT_DIR/model/<dataset>_<exp>_<labelnum>_labeled/<model>/")
    flag("--resume", nargs="?", const="latest", metavar="FILE", help="go on from FILE, or from the run's latest.pth")
    flag("--overwrite", action="store_true", help="start anew where a run of this name already lies")
    flag("--save_freq", type=positive, default=500, help="iterations between two writings of latest.pth")
    flag("--log_freq", type=positive, default=1, help="iterations between two rows of metrics.csv")

    flag = parser.add_argument_group("validation").add_argument
    flag("--val_list", help="file with the names of cases to monitor, kept out of training")
    flag("--val_freq", type=positive, default=500, help="iterations between two validations")
    flag("--stride_xy", type=positive, default=18, help="voxels between windows along W and H in validation")
    flag("--stride_z", type=positive, default=4, help="voxels between windows along D in validation")
    return parser


def parse(parser, argv, la_folder, phantom_folder):
    """The flags in `argv`. Without --root_path: `la_folder` where it has a train.list, else the Phantom data's
    folder and PHANTOM_SETTINGS for all flags not given; --dataset_name says which of the two by name."""
    args = parser.parse_args(argv)
    if args.root_path is None:
        parser.set_defaults(dataset_name=None)
        named = parser.parse_args(argv).dataset_name
        if named == "Phantom" or (named is None and not (la_folder / "train.list").is_file()):
            parser.set_defaults(root_path=str(phantom_folder), **PHANTOM_SETTINGS)
        else:
            parser.set_defaults(root_path=str(la_folder), dataset_name="LA")
        args = parser.parse_args(argv)
    return args


def check_normalization(args, patches):
    """FlagError where a batch of `patches` patches leaves one voxel a channel at the bottom, with nothing to normalise.

    The networks' bottom is 16 times smaller than the patch.
    """
    voxels = math.prod(side // 16 for side in args.patch_size)
    if voxels * (patches if args.normalization == "batchnorm" else 1) == 1 and args.normalization in (
        "batchnorm",
        "instancenorm",
    ):
        raise FlagError(
            f"--patch_size 16 16 16 with --normalization {args.normalization} and {patches} patches at a time: one "
            f"voxel is left at the bottom of the network, which has no variance; take larger patches or groupnorm"
        )


def read_config(path):
    """The settings in a config.json, {} where there is none; FlagError where it is no JSON object."""
    try:
        config = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise FlagError(f"{path}: not a JSON file ({error}); repair it or move it away") from error
    if not isinstance(config, dict):
        raise FlagError(f"{path}: not a JSON object; repair it or move it away")
    return config
