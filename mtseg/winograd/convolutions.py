"""Convolutions of 3 x 3 x 3 voxels or 3 x 3 pixels on a CPU with a quarter of the multiplications, both ways.

Winograd's minimal filtering F(4 x 4, 3 x 3), as in Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks"
(CVPR 2016, arXiv:1509.09308), equation 8: along H and W, each tile of 4 x 4 outputs is

    Y = A^T [(G g G^T) * (B^T d B)] A

of the kernel g and the 6 x 6 inputs d, with 36 products where a sum over the kernel needs 144. Along D, which an image
has not, the products of three slices are summed before A^T is applied. The gradient of the input is the convolution
with the turned kernel; that of the kernel is G^T [(B^T d B) * (A dY A^T)] G. The results are exact but for rounding,
which the transforms amplify, the more so the more channels there are: to less than 3e-5 of the largest value with 256
(a test holds them to that).

The loops are in convolutions.c beside this file. The system's C compiler turns it into machine code for this processor
when it is asked for (a second): PyTorch has no operation that does them at the speed of the caches.
"""

import ctypes
import functools
import math
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ["-O3", "-march=native", "-shared", "-fPIC"]
if sys.platform == "linux":  # elsewhere a second OpenMP beside PyTorch's can end the process; without it: one thread
    FLAGS.append("-fopenmp")
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the axes of features and weights


class WinogradError(RuntimeError):
    """This machine or this network is not for Winograd's convolutions; the message is one sentence with the remedy."""


def winograd_convolutions(net):
    """Have the 3 x 3 (x 3) convolutions of `net` computed by Winograd's algorithm, and its memory in channels last.

    Returns `net`: its modules, parameters and state_dict stay, and a copy of it computes in the same way. Taken are
    nn.Conv2d and nn.Conv3d with kernel 3, padding 1 and stride 1, one group, and numbers of channels that 16 divides.
    Convolutions of one voxel become matrix products. Other layers (`left_to_pytorch` names them) and other types than
    float32 are left to PyTorch. For eager mode; export a network or transform it (vmap, torch.compile) without this.
    Raises WinogradError on a GPU, without a C compiler, and where no layer can be taken.
    """
    if any(parameter.device.type != "cpu" for parameter in net.parameters()):
        raise WinogradError("Winograd's convolutions are for CPUs: on a GPU, leave --winograd out")
    layers = [layer for layer in net.modules() if _suits(layer)]
    if not layers:
        raise WinogradError(
            "no 3 x 3 (x 3) convolution here has channels in multiples of 16: take --n_filters 16, not --winograd"
        )
    check_compiler()
    for layer in layers:
        layer._conv_forward = _conv_forward  # no method: a copy has it too, and computes with its own weight
    for layer in net.modules():
        if _is_plain(layer, 1):
            layer._conv_forward = _pointwise
    for parameter in net.parameters():
        parameter.data = parameter.data.to(memory_format=LAYOUTS.get(parameter.dim(), torch.preserve_format))
    return net


def check_compiler():
    """WinogradError where the loops cannot be compiled; the first call of a process takes a second."""
    _library()


def left_to_pytorch(net):
    """{name: reason} of the convolutions of `net` that `winograd_convolutions` leaves as they are."""
    reasons = {}
    for name, layer in net.named_modules():
        if not isinstance(layer, nn.modules.conv._ConvNd) or _suits(layer) or _is_plain(layer, 1):
            continue
        if layer.transposed or not _is_plain(layer, 3):
            kind = "transposed, " if layer.transposed else ""
            kernel, stride = (" x ".join(map(str, sides)) for sides in (layer.kernel_size, layer.stride))
            reasons[name] = f"{kind}kernel {kernel}, stride {stride}"
        else:
            reasons[name] = f"{layer.in_channels} to {layer.out_channels} channels, not multiples of 16"
    return reasons


def _is_plain(layer, side):
    """Whether `layer` is a convolution by so many voxels each way that keeps the size, with zeros around, one group."""
    if type(layer) not in (nn.Conv2d, nn.Conv3d) or {*layer.kernel_size} != {side}:
        return False
    keeps = layer.padding == "same" or {*layer.padding} == {side // 2} or (side == 1 and layer.padding == "valid")
    return keeps and layer.padding_mode == "zeros" and {*layer.stride, *layer.dilation, layer.groups} == {1}


def _suits(layer):
    return _is_plain(layer, 3) and layer.in_channels % 16 == layer.out_channels % 16 == 0


def _conv_forward(x, weight, bias):
    # What does not fit is PyTorch's to compute, or to complain of.
    fits = x.dim() == weight.dim() and x.shape[1] == weight.shape[1] and x.numel()
    if fits and all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in (x, weight)):
        return _Convolution.apply(x, weight, bias)
    return _pytorchs(x, weight, bias, padding=1)


def _pytorchs(x, weight, bias, padding=0):
    return (torch.conv2d, torch.conv3d)[weight.dim() - 4](x, weight, bias, padding=padding)


def _pointwise(x, weight, bias):
    if x.dim() != weight.dim() or x.shape[1] != weight.shape[1]:
        return _pytorchs(x, weight, bias)
    return F.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        x = x.contiguous(memory_format=LAYOUTS[x.dim()])
        ctx.save_for_backward(x, weight)
        if _pays(x, weight):
            return convolve(x, weight, bias)
        with torch.autocast("cpu", enabled=False):  # one type, whatever the size
            return _pytorchs(x, weight, bias, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=LAYOUTS[x.dim()])
        to_x, to_weight, to_bias = ctx.needs_input_grad
        by_x = by_weight = by_bias = None
        if to_x and _pays(x, weight):
            by_x, to_x = input_gradient(gradient, weight), False
        if to_weight and _gradient_pays(x, weight):
            by_weight, to_weight = weight_gradient(x, gradient), False
        if to_bias:
            by_bias = gradient.sum((0, *range(2, x.dim())))
        if to_x or to_weight:
            ones, asked = [1] * (x.dim() - 2), (to_x, to_weight, False)
            with torch.autocast("cpu", enabled=False):
                others = torch.ops.aten.convolution_backward(
                    gradient, x, weight, None, ones, ones, ones, False, [0] * len(ones), 1, asked
                )
            by_x, by_weight = (others[0] if to_x else by_x), (others[1] if to_weight else by_weight)
        return by_x, by_weight, by_bias


def _tiles(x, weight):
    """(tiles for each channel, slices of the kernel): the more of the former there are for each of the latter, the less
    the transforms of the kernel weigh."""
    n, _, *slices, h, w = x.shape
    tiles = n * math.prod(slices) * -(-h // 4) * -(-w // 4)
    return tiles / max(weight.shape[:2]), math.prod(weight.shape[2:-2])


# The rules look at shapes and the processor's instructions alone: a run that is resumed computes the same.
def _pays(x, weight):
    tiles, slices = _tiles(x, weight)
    return 8 * tiles >= slices


def _gradient_pays(x, weight):
    """With AVX-512, PyTorch has a direct kernel for the gradient of the weight, which is better with few tiles."""
    tiles, slices = _tiles(x, weight)
    return 24 * tiles >= slices or "AVX512" not in torch.backends.cpu.get_cpu_capability()


def convolve(x, weight, bias=None):
    """`x`, N x C x D x H x W, convolved with `weight`, C' x C x 3 x 3 x 3, padded by one voxel, plus `bias`, C'.

    Or N x C x H x W with C' x C x 3 x 3, here as below. Returns N x C' x D x H x W in channels last, in which `x` is
    best, too; autograd does not see it. ValueError unless all are float32 on the CPU, fit each other, and 16 divides C
    and C'.
    """
    if weight.shape[1:] != (x.shape[1], *[3] * (x.dim() - 2)) or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(f"a weight of {tuple(weight.shape)}, or its bias, does not fit an input of {tuple(x.shape)}")
    bias = None if bias is None else bias.contiguous()
    return _convolve(x, weight.movedim((0, 1), (-1, -2)), bias)


def input_gradient(gradient, weight):
    """The gradient of `convolve`'s x, N x C x D x H x W, from its `weight` and the `gradient` of its result.

    `gradient` is best in channels last; autograd does not see it. ValueError as above.
    """
    if weight.shape[0] != gradient.shape[1] or weight.shape[2:] != (3,) * (gradient.dim() - 2):
        raise ValueError(f"a weight of {tuple(weight.shape)} does not fit a gradient of {tuple(gradient.shape)}")
    return _convolve(gradient, weight.movedim((0, 1), (-2, -1)), turned=True)


def _convolve(x, weight, bias=None, turned=False):
    """`weight` is 3 x 3 x 3 x C x C'; it is turned about in space where `turned`."""
    layout = LAYOUTS[x.dim()]
    y = torch.empty((len(x), weight.shape[-1], *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=layout)
    _call("winograd_convolve", x, y, weight.contiguous(), bias, y, turned=turned)
    return y


def weight_gradient(x, gradient):
    """The gradient of `convolve`'s weight, C' x C x 3 x 3 x 3, from its `x` and the `gradient` of its result.

    Both are best in channels last; autograd does not see it. ValueError as above.
    """
    gradient = gradient.contiguous(memory_format=LAYOUTS[gradient.dim()])
    sides = [3] * (x.dim() - 2)
    to_weight = torch.empty((*sides, x.shape[1], gradient.shape[1]), dtype=x.dtype, device=x.device)
    _call("winograd_weight_gradient", x, gradient, gradient, to_weight)
    return to_weight.movedim((-1, -2), (0, 1))


def _call(name, x, outputs, *tensors, turned=False):
    """Call convolutions.c, which trusts what it is given; `outputs` is, or has the shape of, what `x` becomes."""
    x = x.contiguous(memory_format=LAYOUTS[x.dim()])
    (n, ci, *slices, h, w), co = x.shape, outputs.shape[1]
    for tensor in (x, *tensors):
        if tensor is not None and (tensor.dtype != torch.float32 or tensor.device.type != "cpu"):
            raise ValueError(f"float32 on the CPU is wanted, not {tensor.dtype} on {tensor.device}")
    if outputs.shape != (n, co, *x.shape[2:]) or ci % 16 or co % 16 or not outputs.numel():
        raise ValueError(f"{tuple(x.shape)} to {tuple(outputs.shape)}: equal voxels and channels by 16 are wanted")
    d, kd = (slices[0], 3) if slices else (1, 1)
    sizes = (ctypes.c_int64 * 9)(n, d, h, w, ci, co, torch.get_num_threads(), kd, turned)
    pointers = [None if tensor is None else ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, *tensors)]
    if not getattr(_library(), name)(sizes, *pointers):
        raise MemoryError(f"no memory for a convolution of {tuple(x.shape)}")


@functools.cache
def _library():
    """convolutions.c as a library. Compiled anew by each process: a stored one might meet another processor."""
    if not SOURCE.is_file():
        raise WinogradError(f"{SOURCE} is missing: copy it to where convolutions.py lies")
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            library = Path(folder) / "winograd.so"
            command = [*shlex.split(os.environ.get("CC") or "cc"), *FLAGS, "-o", str(library), str(SOURCE)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or ["it said nothing"]
                raise OSError(next((line for line in lines if "error" in line), lines[-1]))
            return ctypes.CDLL(str(library))
    except (OSError, ValueError) as error:  # ValueError: CC with an odd quote
        raise WinogradError(
            f"{SOURCE.name} could not be compiled ({error}): that takes a C compiler (cc, or what CC names) and a "
            f"folder where programs may run (TMPDIR); or leave --winograd out"
        ) from error
