"""A trained network as a file that runs without this library: ONNX, TorchScript or torch.export, and 8-bit ONNX.

    python -m mtseg.export --model_path model/LA_vnet_8_labeled/MT/iter_6000.pth --onnx net.onnx
    python -m mtseg.export --model_path model/LA_vnet_8_labeled/MT/iter_6000.pth --onnx net.onnx --quantize static
    python -m mtseg.export --model_path model/LA_vnet_8_labeled/MT/iter_6000.pth --torchscript a.ts --torch_export a.pt2

What is exported takes 'image', float32 (batch, channels, W, H, D) or (batch, channels, H, W) with any batch and each
side a multiple of the product of the network's strides, by default 16, and gives 'logits' (batch, classes, *sides). It
is compared with PyTorch on two shapes before it is written. `--quantize` writes a second file, <name>.<dynamic or
static>.onnx, and prints what it costs: size, time and Dice on given cases.

What is not in such a file: training mode, and with it dropout and deep supervision; the sliding window and the image's
normalisation, which stay the caller's (mtseg/sliding_window.py and the data's preparation).
"""

import io
from pathlib import Path

import numpy as np
import torch

from mtseg.checkpoint import write_whole
from mtseg.datasets import training_cases
from mtseg.export import convert
from mtseg.metrics import dice
from mtseg.script.flags import HOME, FlagError, Parser, one_sentence, positive, read_config
from mtseg.script.inference_flags import INFERENCE_SETTINGS, add_settings, take_over
from mtseg.script.scans import listed_cases
from mtseg.script.segment import load_network
from mtseg.script.sources import Source
from mtseg.script.windows import score_cases, side_by_side

TOLERANCE = 1e-4


def parse_flags(argv):
    parser = Parser(description=__doc__, prog="python -m mtseg.export")
    flag = parser.add_argument
    flag("--model_path", type=Path, required=True, help="weights: iter_<N>.pth, ema_iter_<N>.pth, ...")
    flag("--onnx", type=Path, metavar="FILE", help="write an ONNX file")
    flag("--torchscript", type=Path, metavar="FILE", help="write a TorchScript file")
    flag("--torch_export", type=Path, metavar="FILE", help="write a torch.export file (.pt2)")
    flag("--quantize", choices=("dynamic", "static"), help="with --onnx: a second file with 8-bit convolutions")
    flag = parser.add_argument_group("cases for --quantize").add_argument
    flag("--root_path", help="folder with <split>.list and data/ (default: the run's)")
    flag(
        "--num_calibration", type=positive, default=4, help="static: so many first cases of train.list give the ranges"
    )
    flag("--split", default="test", help="Dice is measured on cases of <root_path>/<split>.list")
    flag("--num", type=positive, default=4, help="on so many of them, the first ones")
    add_settings(parser)
    args = parser.parse_args(argv)
    if not (args.onnx or args.torchscript or args.torch_export):
        raise FlagError("nothing to write; name a file by --onnx, --torchscript or --torch_export")
    if args.quantize and not args.onnx:
        raise FlagError("--quantize makes a second file beside that of --onnx; name one")
    args.model_path = [args.model_path]
    config = read_config(args.model_path[0].parent / "config.json")
    take_over(parser, args, config, {"root_path": str(HOME / "data/LA"), **INFERENCE_SETTINGS})
    args.has_dropout = False  # has no weights, and inference drops nothing
    return args


def export(args):
    net, *_ = load_network(args, args.model_path[0])
    # Before anything is written: a mistake here leaves no file behind.
    cases = listed_cases(args, Source(args.root_path)) if args.quantize else None
    formats = {
        "onnx": (convert.to_onnx, convert.OnnxNet),
        "torchscript": (convert.to_torchscript, lambda content: torch.jit.load(io.BytesIO(content))),
        "torch_export": (convert.to_torch_export, lambda content: torch.export.load(io.BytesIO(content)).module()),
    }
    contents = {}
    for name, (write, read) in formats.items():
        if getattr(args, name):
            content = contents[name] = write(net, args.n_channels)
            with convert.failing_as(f"the {name} network does not run on other sides than it was written with"):
                difference = convert.largest_difference(net, read(content), args.n_channels)
            if not difference <= TOLERANCE:
                raise convert.ExportError(
                    f"{args.model_path[0]}: the {name} network differs from PyTorch's by {difference:.1e}, more than "
                    f"{TOLERANCE:.0e}, and was not written; export it in another format"
                )
            write_whole(getattr(args, name), content)
            shapes = " and ".join("x".join(map(str, shape)) for shape in convert.compared_shapes(net, args.n_channels))
            sides = f"multiples of {'x'.join(map(str, net.divisors))}{' from twice that on' * (name == 'torch_export')}"
            print(
                f"{getattr(args, name)}: {len(content) / 1e6:.1f} MB, any batch, sides {sides}, differs from PyTorch "
                f"by at most {difference:.1e} (on {shapes})"
            )
    print("not in it: training mode (dropout, deep supervision), the sliding window, the image's normalisation")
    if args.quantize:
        path = args.onnx.with_suffix(f".{args.quantize}{args.onnx.suffix}")
        smaller = quantize_and_measure(contents["onnx"], cases, args)
        write_whole(path, smaller)
        print(f"written to {path}")


def quantize_and_measure(content, cases, args):
    """The quantized file as bytes, after a table of what it costs on `cases` was printed."""
    windows, source = [], Source(args.root_path)
    if args.quantize == "static":
        calibration = source.dataset(args, training_cases(source.root, num=args.num_calibration), labelnum=0)
        for case in calibration.image_list:
            windows.extend(side_by_side(calibration.read(case)["image"], source.axis, args)[:, None].numpy())
        print(f"calibrated on {len(windows)} windows of {', '.join(calibration.image_list)}")
    smaller = convert.quantize(content, args.quantize, windows)

    print(f"{'':10}{'MB':>8}{'ms a window':>14}{'Dice %':>10}   on {', '.join(cases.image_list)}")
    means = []
    for name, file in (("float32", content), (args.quantize, smaller)):
        net = convert.OnnxNet(file)
        samples = map(cases.read, cases.image_list)
        means.append(100 * float(np.mean(score_cases(net, samples, dice, source.axis, args))))
        milliseconds = 1000 * convert.seconds_a_window(net, args.n_channels, args.patch_size)
        print(f"{name:10}{len(file) / 1e6:8.1f}{milliseconds:14.0f}{means[-1]:10.2f}")
    print(f"change in Dice: {means[1] - means[0]:+.2f}; transposed convolutions stay float32")
    return smaller


def main(argv=None):
    with one_sentence():
        export(parse_flags(argv))


if __name__ == "__main__":
    main()
