"""A trained network as a file that runs without this library: ONNX, TorchScript or torch.export, and 8-bit ONNX.

    python -m mtseg.export --model_path model/LA_vnet_8_labeled/MT/iter_6000.pth --onnx net.onnx
    python -m mtseg.export --model_path model/LA_vnet_8_labeled/MT/iter_6000.pth --onnx net.onnx --quantize static
    python -m mtseg.export --model_path model/LA_vnet_8_labeled/MT/iter_6000.pth --torchscript a.ts --torch_export a.pt2

What is exported takes 'image', float32 (batch, channels, W, H, D) with any batch and each side a multiple of 16, and
gives 'logits' (batch, classes, W, H, D). It is compared with PyTorch on two shapes before it is written. `--quantize`
writes a second file, <name>.<dynamic or static>.onnx, and prints what it costs: size, time and Dice on given cases.

What is not in such a file: training mode, and with it dropout and deep supervision; the sliding window and the image's
normalisation, which stay the caller's (mtseg/sliding_window.py and the data's preparation).

ONNX needs onnx and onnxruntime: pip install "mtseg[export]".
"""

import inspect
import io
import logging
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

# Two shapes to compare on: neither the batch nor any side is the same, and each side is a multiple of 16.
SHAPES = ((1, 32, 48, 32), (2, 48, 32, 64))
TOLERANCE = 1e-4
OPSET = 17
DIVISOR = 16


class ExportError(ValueError):
    """A network that cannot be exported as asked; the message is one sentence with the reason and the remedy."""


class OnnxNet(nn.Module):
    """An ONNX file as a network: float tensor (batch, channels, *sides) to logits, on the CPU, without gradients."""

    def __init__(self, path_or_bytes, threads=None):
        super().__init__()
        try:
            import onnxruntime
        except ImportError as error:
            raise ExportError('ONNX needs ONNX Runtime: pip install "mtseg[export]"') from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(path_or_bytes, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors share no base class but this one
            reason = " ".join(str(error).split())
            raise ExportError(f"ONNX Runtime {onnxruntime.__version__} cannot run the file ({reason})") from error

    def forward(self, x):
        (logits,) = self.session.run(None, {"image": x.numpy()})
        return torch.from_numpy(logits)


def largest_difference(net, exported, n_channels, seed=0):
    """The largest absolute difference between two networks' logits on normal noise of the two SHAPES."""
    generator = torch.Generator().manual_seed(seed)
    largest = 0.0
    for batch, *sides in SHAPES:
        x = torch.randn(batch, n_channels, *sides, generator=generator)
        with torch.no_grad():
            expected, found = net(x), exported(x)
        if expected.shape != found.shape:
            raise ExportError(f"the exported network gives {tuple(found.shape)} instead of {tuple(expected.shape)}")
        largest = max(largest, (expected - found).abs().max().item())
    return largest


def to_onnx(net, n_channels):
    """`net` (in eval mode, on the CPU) as the bytes of an ONNX file with dynamic batch and sides.

    Raises ExportError where onnx is missing or the network has what ONNX has not.
    """
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise ExportError('ONNX needs onnx and onnxruntime: pip install "mtseg[export]"') from error
    sides = {2: "w", 3: "h", 4: "d"}
    options = {"input_names": ["image"], "output_names": ["logits"], "opset_version": OPSET}
    options["dynamic_axes"] = {"image": {0: "batch", **sides}, "logits": {0: "batch", **sides}}
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:
        # The exporter that every PyTorch from 2.2 on has, and that needs no further package.
        options["dynamo"] = False
    content = io.BytesIO()
    with _quiet():
        try:
            torch.onnx.export(net, (torch.zeros(1, n_channels, 32, 32, 32),), content, **options)
        except Exception as error:  # PyTorch's export errors have many types
            raise ExportError(f"{type(net).__name__} cannot be written as ONNX ({_first_line(error)})") from error
    return content.getvalue()


def to_torchscript(net, n_channels):
    """`net` (in eval mode, on the CPU) traced, as the bytes of a TorchScript file; batch and sides stay free."""
    content = io.BytesIO()
    with _quiet(), torch.no_grad():
        try:
            torch.jit.save(torch.jit.trace(net, torch.zeros(1, n_channels, 32, 32, 32)), content)
        except Exception as error:
            raise ExportError(f"{type(net).__name__} cannot be traced ({_first_line(error)})") from error
    return content.getvalue()


def to_torch_export(net, n_channels):
    """`net` (in eval mode, on the CPU) as the bytes of a torch.export file (.pt2) with dynamic batch and sides of 32
    or more."""
    dim = torch.export.Dim
    # From two voxels at the bottom of the network on: torch.export takes a side of one for another case.
    shapes = {0: dim("batch")} | {axis: DIVISOR * dim(name, min=2) for axis, name in ((2, "w"), (3, "h"), (4, "d"))}
    content = io.BytesIO()
    with _quiet(), torch.no_grad():
        try:
            # Sides of the example differ, and its batch is not 1: what is alike would be taken to be the same for ever.
            example = torch.zeros(2, n_channels, 32, 48, 64)
            program = torch.export.export(net, (example,), dynamic_shapes=(shapes,))
            torch.export.save(program, content)
        except Exception as error:
            raise ExportError(f"{type(net).__name__} cannot be exported ({_first_line(error)})") from error
    return content.getvalue()


def quantize(content, how, windows=()):
    """The ONNX file `content` (bytes) with 8-bit convolutions, as bytes.

    `how`: 'dynamic' measures the range of every activation as it comes; 'static' takes the ranges from `windows`, a
    list of float32 arrays (batch, channels, W, H, D), and is faster. Transposed convolutions stay float32 in both:
    ONNX Runtime has no 8-bit kernel for them. Raises ExportError.
    """
    try:
        from onnxruntime import quantization
    except ImportError as error:
        raise ExportError('quantization needs onnx and onnxruntime: pip install "mtseg[export]"') from error

    class Windows(quantization.CalibrationDataReader):
        def __init__(self):
            self.rest = iter(windows)

        def get_next(self):
            window = next(self.rest, None)
            return None if window is None else {"image": window}

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        source.write_bytes(content)
        with _quiet():
            try:
                if how == "dynamic":
                    # Its integer convolution takes no signed weights.
                    quantization.quantize_dynamic(
                        source, target, op_types_to_quantize=["Conv"], weight_type=quantization.QuantType.QUInt8
                    )
                else:
                    quantization.quantize_static(
                        source,
                        target,
                        Windows(),
                        op_types_to_quantize=["Conv"],
                        per_channel=True,
                        # Seven bits for weights: processors without VNNI add pairs of 8-bit products in 16 bits.
                        reduce_range=True,
                        activation_type=quantization.QuantType.QUInt8,
                        weight_type=quantization.QuantType.QInt8,
                    )
            except Exception as error:
                raise ExportError(f"{how} quantization failed ({_first_line(error)}); export without it") from error
        return target.read_bytes()


class Recorder(nn.Module):
    """A network that only keeps what it is shown: `windows`, float32 arrays (1, channels, *sides)."""

    def __init__(self, num_classes):
        super().__init__()
        self.num_classes = num_classes
        self.windows = []

    def forward(self, x):
        self.windows.append(x.numpy())
        return torch.zeros(len(x), self.num_classes, *x.shape[2:])


def seconds_a_window(net, n_channels, patch_size, repeats=5):
    """The median time of `net` for one window, after one that is not counted."""
    x = torch.zeros(1, n_channels, *patch_size)
    times = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            start = time.perf_counter()
            net(x)
            times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


class _quiet(warnings.catch_warnings):
    """A context without the warnings and the log lines of exporters, which say nothing a user could act on."""

    def __enter__(self):
        entered = super().__enter__()
        warnings.simplefilter("ignore")
        self.before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        return entered

    def __exit__(self, *error):
        logging.disable(self.before)
        super().__exit__(*error)


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def parse_flags(argv):
    from mtseg.flags import FlagError, Parser, classes, patch_side, positive, read_config

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
    if not (args.onnx or args.torchscript or args.torch_export):
        raise FlagError("nothing to write; name a file by --onnx, --torchscript or --torch_export")
    if args.quantize and not args.onnx:
        raise FlagError("--quantize makes a second file beside that of --onnx; name one")
    defaults = {"root_path": "data/LA", "network": "vnet", "n_channels": 1, "num_classes": 2, "n_filters": 16}
    defaults |= {"normalization": "batchnorm", "patch_size": [112, 112, 80], "stride_xy": 18, "stride_z": 4}
    config = read_config(args.model_path.parent / "config.json")
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, config.get(name, default))
    return args


def export(args):
    from mtseg.checkpoint import load_checkpoint, load_weights, write_whole
    from mtseg.networks.unet import UNet
    from mtseg.networks.vnet import VNet

    net = {"vnet": VNet, "unet": UNet}[args.network](
        n_channels=args.n_channels,
        n_classes=args.num_classes,
        n_filters=args.n_filters,
        normalization=args.normalization,
        has_dropout=True,
    )
    net = load_weights(net, load_checkpoint(args.model_path), args.model_path).eval()
    formats = {
        "onnx": (to_onnx, OnnxNet),
        "torchscript": (to_torchscript, lambda content: torch.jit.load(io.BytesIO(content))),
        "torch_export": (to_torch_export, lambda content: torch.export.load(io.BytesIO(content)).module()),
    }
    contents = {}
    for name, (write, read) in formats.items():
        if getattr(args, name):
            content = contents[name] = write(net, args.n_channels)
            with _quiet():
                difference = largest_difference(net, read(content), args.n_channels)
            if not difference <= TOLERANCE:
                raise ExportError(
                    f"{args.model_path}: the {name} network differs from PyTorch's by {difference:.1e}, more than "
                    f"{TOLERANCE:.0e}, and was not written; export it in another format"
                )
            write_whole(getattr(args, name), content)
            shapes = " and ".join("x".join(map(str, (shape[0], args.n_channels, *shape[1:]))) for shape in SHAPES)
            print(
                f"{getattr(args, name)}: {len(content) / 1e6:.1f} MB, any batch, sides multiples of {DIVISOR}"
                f"{' from 32 on' * (name == 'torch_export')}, "
                f"differs from PyTorch by at most {difference:.1e} (on {shapes})"
            )
    print("not in it: training mode (dropout, deep supervision), the sliding window, the image's normalisation")
    if args.quantize:
        path = args.onnx.with_suffix(f".{args.quantize}{args.onnx.suffix}")
        smaller = quantize_and_measure(contents["onnx"], args)
        write_whole(path, smaller)
        print(f"written to {path}")


def quantize_and_measure(content, args):
    """The quantized file as bytes, after a table of what it costs was printed."""
    from mtseg.datasets import LAHeart, training_cases
    from mtseg.metrics import dice
    from mtseg.sliding_window import test_single_case

    root = Path(args.root_path)
    cases = LAHeart(root / "data", split=args.split, num=args.num, num_classes=args.num_classes)
    if cases.n_channels != args.n_channels:
        raise ExportError(f"the network takes {args.n_channels} channels, the cases in {root} have {cases.n_channels}")
    recorder = Recorder(args.num_classes)
    if args.quantize == "static":
        calibration = LAHeart(root / "data", cases=training_cases(root, num=args.num_calibration))
        for case in calibration.image_list:
            image = calibration.read(case)["image"]
            test_single_case(recorder, image, args.patch_size[0], args.patch_size[2], args.patch_size, args.num_classes)
        print(f"calibrated on {len(recorder.windows)} windows of {', '.join(calibration.image_list)}")
    smaller = quantize(content, args.quantize, recorder.windows)

    print(f"{'':10}{'MB':>8}{'ms a window':>14}{'Dice %':>10}   on {', '.join(cases.image_list)}")
    means = []
    for name, file in (("float32", content), (args.quantize, smaller)):
        net = OnnxNet(file)
        scores = []
        for sample in map(cases.read, cases.image_list):
            prediction, _ = test_single_case(
                net, sample["image"], args.stride_xy, args.stride_z, args.patch_size, args.num_classes
            )
            scores += [dice(prediction == c, sample["label"] == c) for c in range(1, args.num_classes)]
        means.append(100 * float(np.mean(scores)))
        milliseconds = 1000 * seconds_a_window(net, args.n_channels, args.patch_size)
        print(f"{name:10}{len(file) / 1e6:8.1f}{milliseconds:14.0f}{means[-1]:10.2f}")
    print(f"change in Dice: {means[1] - means[0]:+.2f}; transposed convolutions stay float32")
    return smaller


def main(argv=None):
    from mtseg.checkpoint import CheckpointError
    from mtseg.datasets import DataError
    from mtseg.flags import FlagError, one_sentence

    with one_sentence(ExportError, CheckpointError, DataError, FlagError):
        export(parse_flags(argv))


if __name__ == "__main__":
    main()
