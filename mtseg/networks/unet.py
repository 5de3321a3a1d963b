"""U-Net for images and volumes in one class, and SSL4MIS's with settings of its own: its published weights load.

Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015 (arXiv:1505.04597);
Cicek et al., "3D U-Net", MICCAI 2016 (arXiv:1606.06650). Convolutions keep the size.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

NORMALIZATIONS = ("none", "batchnorm", "groupnorm", "instancenorm")


def normalization_layer(normalization, channels, dims):
    """The normalization layer for features with `dims` spatial dimensions."""
    if normalization == "none":
        return nn.Identity()
    if normalization == "batchnorm":
        return (nn.BatchNorm2d, nn.BatchNorm3d)[dims - 2](channels)
    if normalization == "groupnorm":
        return nn.GroupNorm(math.gcd(16, channels), channels)
    if normalization == "instancenorm":
        return (nn.InstanceNorm2d, nn.InstanceNorm3d)[dims - 2](channels)
    raise ValueError(f"normalization is {normalization!r}; use one of {', '.join(NORMALIZATIONS)}")


def along_axes(values, dims):
    """Each of `values`, a number or one for each axis, as a tuple of `dims` numbers of at least 1, else ValueError."""
    values = [(value,) * dims if isinstance(value, int) else tuple(value) for value in values]
    if not all(len(value) == dims and min(value) >= 1 for value in values):
        raise ValueError(f"{values}: give each a number of at least 1, or {dims} of them")
    return values


def shapes_of(state, name):
    """The shapes of the weights `name`.format(0), `name`.format(1), ... in the state_dict `state`."""
    names = itertools.takewhile(state.__contains__, map(name.format, itertools.count()))
    return [tuple(state[name].shape) for name in names]


class Dropout(nn.Dropout):
    """nn.Dropout on (N, C, *spatial) that draws the same in every memory format, on a CPU in a quarter of the time."""

    def forward(self, x):
        if not self.training:
            return x
        # 16 random bits a value, in the order of channels last.
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        bits = bits.view(torch.int16)[: x.numel()].view(len(x), *x.shape[2:], x.shape[1]).movedim(-1, 1)
        kept = bits >= round(self.p * 2**16) - 2**15
        return x * kept.to(x.dtype).mul_(1 / (1 - self.p))


class DoubleConv(nn.Module):
    """Twice convolution, normalization, activation; with `residual` the input (1x1 convolved if channels change) is
    added. `slope`: of the activation below zero, 0 for ReLU. `dropout`: the share of single values dropped between the
    convolutions, in training mode and with `forward(x, drop=True)`."""

    # Which normalization follows a convolution at once: for inference, the one can do the work of both.
    folds = (("conv1", "norm1"), ("conv2", "norm2"))

    def __init__(self, channels_in, channels_out, kernel, dims, normalization, residual, slope, dropout):
        super().__init__()
        conv, padding = (nn.Conv2d, nn.Conv3d)[dims - 2], tuple(side // 2 for side in kernel)
        self.conv1 = conv(channels_in, channels_out, kernel, padding=padding)
        self.norm1 = normalization_layer(normalization, channels_out, dims)
        self.conv2 = conv(channels_out, channels_out, kernel, padding=padding)
        self.norm2 = normalization_layer(normalization, channels_out, dims)
        self.activation = nn.LeakyReLU(slope, inplace=True) if slope else nn.ReLU(inplace=True)
        self.dropout = Dropout(dropout) if dropout else None
        self.shortcut = None
        if residual:
            self.shortcut = nn.Identity() if channels_in == channels_out else conv(channels_in, channels_out, 1)

    def forward(self, x, drop=False):
        y = self.activation(self.norm1(self.conv1(x)))
        if drop and self.dropout is not None:
            y = self.dropout(y)
        y = self.norm2(self.conv2(y))
        if self.shortcut is not None:
            y = y + self.shortcut(x)
        return self.activation(y)


class Decoder(nn.Module):
    """A U-Net from the features of its encoder on: `forward(features)` gives logits. Settings as in UNet; `upsampling`
    is the one by which MC-Net's decoders differ."""

    def __init__(self, **settings):
        super().__init__()
        self.add_decoder(**settings)

    def add_decoder(
        self, n_classes, channels, strides, kernels, has_dropout, how, deep_supervision, upsampling, out_kernel, drop
    ):
        dims, *_ = how
        self.strides, self.dims = strides, dims
        self.has_dropout, self.deep_supervision = has_dropout, deep_supervision
        self.interpolation = {"linear": ("bilinear", "trilinear")[dims - 2]}.get(upsampling, upsampling)
        conv = (nn.Conv2d, nn.Conv3d)[dims - 2]
        up = (nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 2]
        if upsampling != "deconv":
            up, strides = conv, [1] * len(strides)
        sizes = zip(itertools.pairwise(channels), strides, strict=True)
        self.up = nn.ModuleList(up(below, here, stride, stride=stride) for (here, below), stride in sizes)
        sizes = zip(channels[:-1], kernels[:-1], strict=True)
        self.decoder = nn.ModuleList(DoubleConv(2 * here, here, kernel, *how, dropout=0.0) for here, kernel in sizes)
        heads = channels[:-1] if deep_supervision else channels[:1]
        self.out_conv = nn.ModuleList(conv(here, n_classes, out_kernel, padding=out_kernel // 2) for here in heads)
        self.dropout = (nn.Dropout2d, nn.Dropout3d)[dims - 2](p=0.5) if drop else nn.Identity()

    def decode(self, features, turnoff_drop=False):
        """The features of the decoder's levels, finest first (the finest after its dropout), from `encode`'s."""
        *skips, x = features
        decoded = []
        for level in reversed(range(len(skips))):
            x = self.up[level](x)
            if self.interpolation != "deconv":
                corners = None if self.interpolation == "nearest" else True
                x = F.interpolate(x, scale_factor=self.strides[level], mode=self.interpolation, align_corners=corners)
            x = self.decoder[level](torch.cat([skips[level], x], dim=1))
            if level == 0 and self.has_dropout and not turnoff_drop:
                x = self.dropout(x)
            decoded.insert(0, x)
        return decoded

    def classify(self, decoded):
        """Logits from what `decode` gave; in training mode with `deep_supervision` a list, finest first."""
        if self.deep_supervision and self.training:
            return [head(level) for head, level in zip(self.out_conv, decoded, strict=True)]
        return self.out_conv[0](decoded[0])

    def forward(self, features):
        return self.classify(self.decode(features))


class UNet(Decoder):
    """U-Net with `n_filters` channels on the finest level and twice as many on each one below, up to `max_filters`.

    Input: float (N, n_channels, *spatial) with `dims` (2 or 3) spatial sides, each a multiple of the product of its
    strides (ValueError otherwise). Output: logits (N, n_classes, *spatial). `strides`: of the downsamplings, finest
    first, each a number or one for each side, where 1 leaves it as it is. `kernel_sizes`: of the levels' convolutions,
    likewise, one more and odd. They mean what they mean in nnU-Net's plans, but nnU-Net downsamples by strided
    convolutions, and this network by max pooling, as Ronneberger et al. do, with windows of the stride.
    With `deep_supervision`, training mode gives a list of logits, finest first, one for every level above the bottom
    in its size; eval mode gives the finest alone.
    `normalization`: none, batchnorm, groupnorm or instancenorm. `has_dropout`: in training mode whole channels are
    dropped with p = 0.5 at the bottom and before the last convolution, as in VNet;
    `forward(x, turnoff_drop=True)` leaves them in for that one call. `residual`: each block adds its input.
    For `UNetSSL4MIS`: `slope` of the activation below zero, 0 for ReLU; `dropouts`, for each level, finest first, the
    share of single values that is dropped between the encoder's convolutions, instead of those channels; `upsampling`:
    'deconv', a transposed convolution, or after a 1x1 convolution 'linear' interpolation (corners aligned) or
    'nearest'; `out_kernel`, the side of the last convolution.

    `net(x)` is `net.classify(net.decode(net.encode(x)))`: methods with further heads and decoders begin in between.
    `channels`: of the features that `encode` gives, finest first, and, but for the last, of those that `decode` gives.
    """

    head = "out_conv."  # the beginning of the names of the last layer's weights; `stages` has those of the encoder's

    def __init__(
        self,
        n_channels=1,
        n_classes=2,
        n_filters=16,
        normalization="none",
        has_dropout=False,
        dims=3,
        residual=False,
        deep_supervision=False,
        strides=(2, 2, 2, 2),
        kernel_sizes=None,
        max_filters=None,
        slope=0.0,
        dropouts=None,
        upsampling="deconv",
        out_kernel=1,
    ):
        nn.Module.__init__(self)
        if dims not in (2, 3):
            raise ValueError(f"dims is {dims!r}; a U-Net here has 2 or 3 spatial dimensions")
        strides = along_axes(strides, dims)
        kernels = along_axes(kernel_sizes or [3] * (len(strides) + 1), dims)
        if not strides or len(kernels) != len(strides) + 1 or not all(side % 2 for side in itertools.chain(*kernels)):
            raise ValueError(f"strides {strides}, kernel_sizes {kernels}: give odd kernels, one more than strides")
        self.divisors = tuple(math.prod(along) for along in zip(*strides, strict=True))
        self.channels = [min(n_filters * 2**level, max_filters or math.inf) for level in range(len(kernels))]
        how = (dims, normalization, residual, slope)
        drops = dropouts or [0.0] * len(kernels)
        blocks = zip([n_channels, *self.channels[:-1]], self.channels, kernels, drops, strict=True)
        self.stages = [(f"encoder.{level}.",) for level in range(len(kernels))]
        self.encoder = nn.ModuleList(DoubleConv(before, n, kernel, *how, drop) for before, n, kernel, drop in blocks)
        self.pool = (F.max_pool2d, F.max_pool3d)[dims - 2]
        self.settings = {"n_classes": n_classes, "channels": self.channels, "strides": strides, "kernels": kernels}
        self.settings |= {"has_dropout": has_dropout, "how": how, "out_kernel": out_kernel, "drop": dropouts is None}
        self.add_decoder(**self.settings, deep_supervision=deep_supervision, upsampling=upsampling)

    def another_decoder(self, upsampling):
        """A Decoder of the same sizes for the features of this encoder, with weights of its own."""
        return Decoder(**self.settings, deep_supervision=False, upsampling=upsampling)

    @staticmethod
    def settings_of(state):
        """What the weights in the state_dict `state` tell beside the defaults: residual, deep_supervision, dims,
        strides (of the transposed convolutions of 'deconv' alone), kernel_sizes, max_filters."""
        weights = {"residual": "decoder.0.shortcut.weight", "deep_supervision": "out_conv.1.weight"}
        settings = {setting: True for setting, weight in weights.items() if weight in state}
        shapes = shapes_of(state, "encoder.{}.conv1.weight")
        strides, kernels = ([s[2:] for s in group] for group in (shapes_of(state, "up.{}.weight"), shapes))
        dims = len(kernels[0]) if kernels else 0
        if dims not in (2, 3) or {*map(len, strides + kernels)} != {dims} or len(kernels) != len(strides) + 1:
            return settings
        settings |= {"dims": 2} if dims == 2 else {}
        if strides != [(2,) * dims] * 4 and all(map(all, strides)):
            settings["strides"] = strides
        if kernels != [(3,) * dims] * len(kernels) and all(side % 2 for side in itertools.chain(*kernels)):
            settings["kernel_sizes"] = kernels
        return settings | ({"max_filters": shapes[-1][0]} if shapes[-1][0] < shapes[0][0] * 2 ** len(strides) else {})

    def encode(self, x, turnoff_drop=False):
        """The features of the levels, finest first (the bottom's after its dropout)."""
        if x.dim() != self.dims + 2:
            raise ValueError(f"a {self.dims}-D UNet takes {self.dims + 2} axes (N, C, ...), not {tuple(x.shape)}")
        if any(size % divisor for size, divisor in zip(x.shape[2:], self.divisors, strict=True)):
            raise ValueError(f"UNet: {self.divisors} must divide the sides {tuple(x.shape[2:])}")
        drop = self.has_dropout and not turnoff_drop
        features = []
        for level, block in enumerate(self.encoder):
            x = block(x if level == 0 else self.pool(x, self.strides[level - 1]), drop)
            features.append(x)
        if drop:
            features[-1] = self.dropout(x)
        return features

    def forward(self, x, turnoff_drop=False):
        return self.classify(self.decode(self.encode(x, turnoff_drop), turnoff_drop))


class UNetSSL4MIS(UNet):
    """The 2-D U-Net of SSL4MIS (Luo, 2020, github.com/HiLab-git/SSL4MIS, code/networks/unet.py), or the same in 3-D.

    Sizes, `n_filters`, `normalization`, `has_dropout` and `turnoff_drop` as in UNet; its published weights, which load
    by `translate`, have 16 filters and batch norm. It upsamples by interpolation, as SSL4MIS's code does: the setting
    there that says otherwise is not used (its issue 42).
    """

    def __init__(self, n_channels=1, n_classes=2, n_filters=16, normalization="batchnorm", has_dropout=True, dims=2):
        own = {"slope": 0.01, "dropouts": (0.05, 0.1, 0.2, 0.3, 0.5), "upsampling": "linear", "out_kernel": 3}
        super().__init__(n_channels, n_classes, n_filters, normalization, has_dropout, dims, **own)

    @staticmethod
    def settings_of(state):
        """What the weights in the state_dict `state` tell: {'dims': 2} or {'dims': 3}, or {}."""
        first = UNetSSL4MIS.translate(state).get("encoder.0.conv1.weight")
        return {} if first is None else {"dims": first.dim() - 2}

    @staticmethod
    def translate(state):
        """The state_dict `state` under this U-Net's names, where it is under SSL4MIS's, without the further decoders
        and outputs that its UNet_CCT and UNet_URPC have in training. Any other comes back as it is."""
        if "encoder.in_conv.conv_conv.0.weight" not in state:
            return state
        blocks = {"encoder.in_conv": "encoder.0"}
        blocks |= {f"encoder.down{level}.maxpool_conv.1": f"encoder.{level}" for level in range(1, 5)}
        blocks |= {f"decoder.up{4 - level}.conv": f"decoder.{level}" for level in range(4)}
        places = {"conv1": 0, "norm1": 1, "conv2": 4, "norm2": 5}
        names = {f"{b}.conv_conv.{place}": f"{ours}.{p}" for b, ours in blocks.items() for p, place in places.items()}
        names |= {f"decoder.up{4 - level}.conv1x1": f"up.{level}" for level in range(4)}
        names["decoder.out_conv"] = "out_conv.0"
        parts = {name: name.replace("main_decoder.", "decoder.").rpartition(".") for name in state}
        return {f"{names[layer]}.{kind}": state[name] for name, (layer, _, kind) in parts.items() if layer in names}
