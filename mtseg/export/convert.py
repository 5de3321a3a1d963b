"""A network as ONNX, TorchScript or torch.export, and an ONNX file in 8 bits.

Each `to_...` takes a network in eval mode on the CPU, whose input is float32 (batch, channels, *sides) with sides that
are multiples of its `divisors` and whose output are logits (batch, classes, *sides), and gives the bytes of a file for
any batch and any such sides. ONNX needs onnx and onnxruntime: pip install "mtseg[export]".
"""

import contextlib
import importlib
import inspect
import io
import logging
import os
import tempfile
import timeit
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mtseg.script.endings import first_line

# Two batches to compare on, and how many times the network's divisors their sides are; nothing is the same in both.
SHAPES = ((1, 2, 3, 2), (2, 3, 2, 4))
SIDES = {2: "hw", 3: "whd"}
OPSET = 17


class ExportError(ValueError):
    """A network that cannot be exported as asked; the message is one sentence with the reason and the remedy."""


class OnnxNet(nn.Module):
    """An ONNX file as a network: float tensor (batch, channels, *sides) to logits, on the CPU, without gradients."""

    def __init__(self, path_or_bytes):
        super().__init__()
        onnxruntime = extra("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(path_or_bytes, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors share no base class but this one
            reason = " ".join(str(error).split())
            raise ExportError(f"ONNX Runtime {onnxruntime.__version__} cannot run the file ({reason})") from error

    def forward(self, x):
        (logits,) = self.session.run(None, {"image": x.numpy()})
        return torch.from_numpy(logits)


def compared_shapes(net, n_channels):
    """The two shapes to compare on."""
    return [(batch, n_channels, *(n * by for n, by in zip(sides, net.divisors))) for batch, *sides in SHAPES]  # noqa: B905


def largest_difference(net, exported, n_channels):
    """The largest absolute difference between two networks' logits on normal noise of the two shapes."""
    generator = torch.Generator().manual_seed(0)
    differences = []
    for shape in compared_shapes(net, n_channels):
        x = torch.randn(shape, generator=generator)
        with torch.no_grad():
            expected, logits = net(x), exported(x)
        if expected.shape != logits.shape:
            raise ExportError(f"the exported network gives {tuple(logits.shape)} instead of {tuple(expected.shape)}")
        differences.append((expected - logits).abs().max())
    return torch.stack(differences).max().item()  # NaN if one is


def to_onnx(net, n_channels):
    """`net` (in eval mode, on the CPU) as the bytes of an ONNX file with dynamic batch and sides.

    Raises ExportError where onnx is missing or the network has what ONNX has not.
    """
    extra("onnx")
    sides = dict(enumerate(SIDES[len(net.divisors)], start=2))
    options = {"input_names": ["image"], "output_names": ["logits"], "opset_version": OPSET}
    options["dynamic_axes"] = {"image": {0: "batch", **sides}, "logits": {0: "batch", **sides}}
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:
        # The exporter that every PyTorch from 2.2 on has, and that needs no further package.
        options["dynamo"] = False
    content = io.BytesIO()
    with failing_as(f"{type(net).__name__} cannot be written as ONNX"):
        torch.onnx.export(net, (torch.zeros(compared_shapes(net, n_channels)[0]),), content, **options)
    return content.getvalue()


def to_torchscript(net, n_channels):
    """`net` (in eval mode, on the CPU) traced, as the bytes of a TorchScript file; batch and sides stay free."""
    content = io.BytesIO()
    with torch.no_grad(), failing_as(f"{type(net).__name__} cannot be traced"):
        torch.jit.save(torch.jit.trace(net, torch.zeros(compared_shapes(net, n_channels)[0])), content)
    return content.getvalue()


def to_torch_export(net, n_channels):
    """`net` (in eval mode, on the CPU) as the bytes of a torch.export file (.pt2) with dynamic batch and sides of twice
    their divisor or more."""
    dim = torch.export.Dim
    # From two voxels at the bottom of the network on: torch.export takes a side of one for another case.
    sides = zip(SIDES[len(net.divisors)], net.divisors, strict=True)
    shapes = {axis: divisor * dim(name, min=2) for axis, (name, divisor) in enumerate(sides, start=2)}
    shapes[0] = dim("batch")
    content = io.BytesIO()
    # Sides of the example differ, and its batch is not 1: what is alike would be taken to be the same for ever.
    example = torch.zeros(2, n_channels, *(n * by for n, by in enumerate(net.divisors, start=2)))
    with torch.no_grad(), failing_as(f"{type(net).__name__} cannot be exported"):
        torch.export.save(torch.export.export(net, (example,), dynamic_shapes=(shapes,)), content)
    return content.getvalue()


def quantize(content, how, windows=()):
    """The ONNX file `content` (bytes) with 8-bit convolutions, as bytes.

    `how`: 'dynamic' measures the range of every activation as it comes; 'static' takes the ranges from `windows`, a
    list of float32 arrays (batch, channels, *sides), and is faster. Transposed convolutions stay float32 in both:
    ONNX Runtime has no 8-bit kernel for them. Raises ExportError.
    """
    quantization = extra("onnxruntime.quantization")

    class Windows(quantization.CalibrationDataReader):
        def __init__(self):
            self.rest = iter(windows)

        def get_next(self):
            window = next(self.rest, None)
            return None if window is None else {"image": window}

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        source.write_bytes(content)
        with failing_as(f"{how} quantization failed", "; export without it"):
            types, only = quantization.QuantType, ["Conv"]
            if how == "dynamic":  # whose integer convolution takes no signed weights
                quantization.quantize_dynamic(source, target, op_types_to_quantize=only, weight_type=types.QUInt8)
            else:
                # Seven bits for weights: processors without VNNI add pairs of 8-bit products in 16 bits.
                bits = {"reduce_range": True, "activation_type": types.QUInt8, "weight_type": types.QInt8}
                quantization.quantize_static(
                    source, target, Windows(), op_types_to_quantize=only, per_channel=True, **bits
                )
        return target.read_bytes()


def seconds_a_window(net, n_channels, patch_size):
    """The median time of `net` for one window in five runs, after one that is not counted."""
    x = torch.zeros(1, n_channels, *patch_size)
    with torch.no_grad():
        return float(np.median(timeit.repeat(lambda: net(x), number=1, repeat=6)[1:]))


def extra(name):
    """The module `name` of the packages that ONNX needs; ExportError where it is missing."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime reports its use over the network otherwise
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(f'ONNX needs {name.partition(".")[0]}: pip install "mtseg[export]"') from error


@contextlib.contextmanager
def failing_as(what, remedy=""):
    """A context that makes any error an ExportError: what failed, why, and the remedy. It is without the warnings and
    the log lines of exporters, which say nothing a user could act on."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ExportError:
        raise
    except Exception as error:  # those of the exporters have no type in common
        raise ExportError(f"{what} ({first_line(error)}){remedy}") from error
    finally:
        logging.disable(before)
