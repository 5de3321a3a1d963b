"""V-Net for volumes and images, as the UA-MT / LASeg family builds it: checkpoints of those papers load unchanged.

Milletari et al., "V-Net: Fully Convolutional Neural Networks for Volumetric Medical Image Segmentation", 3DV 2016
(arXiv:1606.04797), with skips that add instead of concatenate, and normalization after every convolution.
"""

import math

from torch import nn

NORMALIZATIONS = ("none", "batchnorm", "groupnorm", "instancenorm")


def normalization_layers(normalization, channels, dims):
    """A list with the normalization layer for features with `dims` spatial dimensions, empty for 'none'."""
    if normalization == "none":
        return []
    if normalization == "batchnorm":
        return [(nn.BatchNorm2d, nn.BatchNorm3d)[dims - 2](channels)]
    if normalization == "groupnorm":
        # 16 groups wherever they divide the channels, which with the family's n_filters=16 is everywhere.
        return [nn.GroupNorm(math.gcd(16, channels), channels)]
    if normalization == "instancenorm":
        return [(nn.InstanceNorm2d, nn.InstanceNorm3d)[dims - 2](channels)]
    raise ValueError(f"normalization is {normalization!r}; use one of {', '.join(NORMALIZATIONS)}")


def along_axes(values, dims):
    """Each of `values`, a number or one for each axis, as a tuple of `dims` numbers of at least 1, else ValueError."""
    values = [(value,) * dims if isinstance(value, int) else tuple(value) for value in values]
    if not all(len(value) == dims and min(value) >= 1 for value in values):
        raise ValueError(f"{values}: give each a number of at least 1, or {dims} of them")
    return values


def convolution(n_filters_in, n_filters_out, kernel, dims):
    """A convolution with `kernel`, an odd number or a tuple of such, that keeps the size."""
    (kernel,) = along_axes([kernel], dims)
    padding = tuple(side // 2 for side in kernel)
    return (nn.Conv2d, nn.Conv3d)[dims - 2](n_filters_in, n_filters_out, kernel, padding=padding)


class Block(nn.Module):
    """Layers in a row, under the name that checkpoints of the family have for them."""

    def __init__(self, *layers):
        super().__init__()
        self.conv = nn.Sequential(*layers)

    def forward(self, x):
        return self.conv(x)


class ConvBlock(Block):
    """`n_stages` of convolution, normalization, ReLU; keeps the size."""

    def __init__(self, n_stages, n_filters_in, n_filters_out, normalization="none", dims=3, kernel=3):
        layers = []
        for stage in range(n_stages):
            layers.append(convolution(n_filters_out if stage else n_filters_in, n_filters_out, kernel, dims))
            layers += normalization_layers(normalization, n_filters_out, dims)
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)


class DownsamplingConvBlock(Block):
    """Strided convolution, normalization, ReLU; divides the size by `stride`."""

    def __init__(self, n_filters_in, n_filters_out, stride=2, normalization="none", dims=3):
        convolution = (nn.Conv2d, nn.Conv3d)[dims - 2](n_filters_in, n_filters_out, stride, stride=stride)
        super().__init__(convolution, *normalization_layers(normalization, n_filters_out, dims), nn.ReLU(inplace=True))


class UpsamplingBlock(Block):
    """Multiplies the size by `stride`: 'deconv', a transposed convolution, or 'linear' or 'nearest' interpolation and a
    convolution with `kernel`; then normalization, ReLU."""

    def __init__(self, n_filters_in, n_filters_out, stride, kernel, normalization, dims, upsampling):
        if upsampling == "deconv":
            deconv = (nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 2]
            layers = [deconv(n_filters_in, n_filters_out, stride, stride=stride)]
        else:
            how = {"mode": ("bilinear", "trilinear")[dims - 2], "align_corners": True} if upsampling == "linear" else {}
            layers = [nn.Upsample(scale_factor=stride, **how), convolution(n_filters_in, n_filters_out, kernel, dims)]
        super().__init__(*layers, *normalization_layers(normalization, n_filters_out, dims), nn.ReLU(inplace=True))


class Decoder(nn.Module):
    """V-Net from the features of its encoder on: `forward(features)` gives logits. Settings as in VNet; `upsampling`:
    'deconv', as V-Net has it, 'linear' or 'nearest', as MC-Net's further decoders have it."""

    def __init__(self, **settings):
        super().__init__()
        self.add_decoder(**settings)

    def add_decoder(self, n_classes, channels, strides, kernels, normalization, has_dropout, dims, upsampling="deconv"):
        self.has_dropout = has_dropout
        (f1, f2, f3, f4, f5), (k1, k2, k3, k4, _), how = channels, kernels, (normalization, dims)
        self.block_five_up = UpsamplingBlock(f5, f4, strides[3], k4, *how, upsampling)
        self.block_six = ConvBlock(3, f4, f4, *how, k4)
        self.block_six_up = UpsamplingBlock(f4, f3, strides[2], k3, *how, upsampling)
        self.block_seven = ConvBlock(3, f3, f3, *how, k3)
        self.block_seven_up = UpsamplingBlock(f3, f2, strides[1], k2, *how, upsampling)
        self.block_eight = ConvBlock(2, f2, f2, *how, k2)
        self.block_eight_up = UpsamplingBlock(f2, f1, strides[0], k1, *how, upsampling)
        self.block_nine = ConvBlock(1, f1, f1, *how, k1)
        self.out_conv = (nn.Conv2d, nn.Conv3d)[dims - 2](f1, n_classes, 1)
        self.dropout = (nn.Dropout2d, nn.Dropout3d)[dims - 2](p=0.5)

    def decode(self, features, turnoff_drop=False):
        """The features of the decoder's four levels, finest first (the finest after its dropout), from `encode`'s."""
        x1, x2, x3, x4, x5 = features
        x6 = self.block_six(self.block_five_up(x5) + x4)
        x7 = self.block_seven(self.block_six_up(x6) + x3)
        x8 = self.block_eight(self.block_seven_up(x7) + x2)
        x9 = self.block_nine(self.block_eight_up(x8) + x1)
        if self.has_dropout and not turnoff_drop:
            x9 = self.dropout(x9)
        return [x9, x8, x7, x6]

    def classify(self, decoded):
        """Logits from what `decode` gave."""
        return self.out_conv(decoded[0])

    def forward(self, features):
        return self.classify(self.decode(features))


class VNet(Decoder):
    """V-Net: five levels, by default 16 times smaller at the bottom.

    Input: float (N, n_channels, *spatial) with `dims` (2 or 3) spatial sides, each a multiple of the product of its
    strides, by default 16; output: logits (N, n_classes, *spatial). `strides`: of the four downsamplings, each a number
    or one for each side. LASeg's published weights are of strides (2, 2, 2, (2, 2, 1)). `kernel_sizes`: of the five
    levels' convolutions, likewise, and odd. The finest level has `n_filters` channels, and each one below twice as
    many, up to `max_filters`.
    `normalization`: none, batchnorm, groupnorm or instancenorm (the papers on LA use batchnorm).
    `has_dropout`: in training mode whole channels are dropped with p = 0.5 at the bottom and before the last
    convolution. `forward(x, turnoff_drop=True)` leaves them in for that one call.
    Other `dims`, strides, kernels and another size raise ValueError.

    `net(x)` is `net.classify(net.decode(net.encode(x)))`: methods with further heads and decoders begin in between.
    `channels`: of the features that `encode` gives, finest first, and, but for the last, of those that `decode` gives.
    """

    # The beginnings of the names of the encoder's weights, by stages, and of the last layer's.
    stages = (
        ("block_one.",),
        ("block_one_dw.", "block_two."),
        ("block_two_dw.", "block_three."),
        ("block_three_dw.", "block_four."),
        ("block_four_dw.", "block_five."),
    )
    head = "out_conv."

    def __init__(
        self,
        n_channels=3,
        n_classes=2,
        n_filters=16,
        normalization="none",
        has_dropout=False,
        strides=(2, 2, 2, 2),
        dims=3,
        kernel_sizes=None,
        max_filters=None,
    ):
        nn.Module.__init__(self)
        if dims not in (2, 3):
            raise ValueError(f"dims is {dims!r}; a V-Net here has 2 or 3 spatial dimensions")
        strides, kernels = along_axes(strides, dims), along_axes(kernel_sizes or [3] * 5, dims)
        if (len(strides), len(kernels)) != (4, 5) or not all(side % 2 for kernel in kernels for side in kernel):
            raise ValueError(f"strides {strides}, kernel_sizes {kernels}: give 4 strides and 5 odd kernels")
        self.divisors = tuple(math.prod(along) for along in zip(*strides, strict=True))
        self.channels = [min(n_filters * 2**level, max_filters or math.inf) for level in range(5)]
        (f1, f2, f3, f4, f5), (k1, k2, k3, k4, k5), how = self.channels, kernels, (normalization, dims)
        self.block_one = ConvBlock(1, n_channels, f1, *how, k1)
        self.block_one_dw = DownsamplingConvBlock(f1, f2, strides[0], *how)
        self.block_two = ConvBlock(2, f2, f2, *how, k2)
        self.block_two_dw = DownsamplingConvBlock(f2, f3, strides[1], *how)
        self.block_three = ConvBlock(3, f3, f3, *how, k3)
        self.block_three_dw = DownsamplingConvBlock(f3, f4, strides[2], *how)
        self.block_four = ConvBlock(3, f4, f4, *how, k4)
        self.block_four_dw = DownsamplingConvBlock(f4, f5, strides[3], *how)
        self.block_five = ConvBlock(3, f5, f5, *how, k5)
        self.settings = {"n_classes": n_classes, "channels": self.channels, "strides": strides, "kernels": kernels}
        self.settings |= {"normalization": normalization, "has_dropout": has_dropout, "dims": dims}
        self.add_decoder(**self.settings)

    def another_decoder(self, upsampling):
        """A Decoder of the same sizes for the features of this encoder, with weights of its own."""
        return Decoder(**self.settings, upsampling=upsampling)

    @staticmethod
    def settings_of(state):
        """What the weights in the state_dict `state` tell beside the defaults: {'dims': 2, 'strides': ...,
        'kernel_sizes': ..., 'max_filters': ...}, or less."""
        state, levels = VNet.translate(state), ("one", "two", "three", "four", "five")
        names = [f"block_{level}{end}.conv.0.weight" for end in ("", "_dw") for level in levels]
        shapes = [tuple(state[name].shape) for name in names[:-1] if name in state]
        kernels, strides = ([shape[2:] for shape in group] for group in (shapes[:5], shapes[5:]))
        dims = len(strides[0]) if strides else 0
        if dims not in (2, 3) or [*map(len, kernels + strides)] != [dims] * 9 or not all(map(all, strides)):
            return {}
        settings = {"dims": 2} if dims == 2 else {}
        settings |= {"strides": strides} if strides != [(2,) * dims] * 4 else {}
        if kernels != [(3,) * dims] * 5 and all(side % 2 for kernel in kernels for side in kernel):
            settings["kernel_sizes"] = kernels
        return settings | ({"max_filters": shapes[4][0]} if shapes[4][0] < 16 * shapes[0][0] else {})

    @staticmethod
    def translate(state):
        """The state_dict `state` under this V-Net's names, where it is of MC-Net's (Wu et al., MICCAI 2021): an encoder
        and decoders, of which the first, with transposed convolutions, is V-Net's. Any other comes back as it is."""
        if "encoder.block_one.conv.0.weight" not in state:
            return state
        parts = {name: name.partition(".") for name in state}
        decoder = "decoder1" if any(part == "decoder1" for part, *_ in parts.values()) else "decoder"
        return {rest: state[name] for name, (part, _, rest) in parts.items() if part in ("encoder", decoder)}

    def encode(self, x, turnoff_drop=False):
        """The features of the five levels, finest first (the bottom's after its dropout)."""
        dims = len(self.divisors)
        if x.dim() != dims + 2:
            raise ValueError(f"a {dims}-D VNet takes {dims + 2} axes (N, C, ...), not {tuple(x.shape)}")
        if any(size % divisor for size, divisor in zip(x.shape[2:], self.divisors, strict=True)):
            raise ValueError(f"VNet: {self.divisors} must divide the sides {tuple(x.shape[2:])}")
        x1 = self.block_one(x)
        x2 = self.block_two(self.block_one_dw(x1))
        x3 = self.block_three(self.block_two_dw(x2))
        x4 = self.block_four(self.block_three_dw(x3))
        x5 = self.block_five(self.block_four_dw(x4))
        if self.has_dropout and not turnoff_drop:
            x5 = self.dropout(x5)
        return [x1, x2, x3, x4, x5]

    def forward(self, x, turnoff_drop=False):
        return self.classify(self.decode(self.encode(x, turnoff_drop), turnoff_drop))
