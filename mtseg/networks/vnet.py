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


class Block(nn.Module):
    """Layers in a row, under the name that checkpoints of the family have for them."""

    def __init__(self, *layers):
        super().__init__()
        self.conv = nn.Sequential(*layers)

    def forward(self, x):
        return self.conv(x)


class ConvBlock(Block):
    """`n_stages` of convolution with a kernel of 3, normalization, ReLU; keeps the size."""

    def __init__(self, n_stages, n_filters_in, n_filters_out, normalization="none", dims=3):
        layers, conv = [], (nn.Conv2d, nn.Conv3d)[dims - 2]
        for stage in range(n_stages):
            layers.append(conv(n_filters_in if stage == 0 else n_filters_out, n_filters_out, 3, padding=1))
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
    convolution with a kernel of 3; then normalization, ReLU."""

    def __init__(self, n_filters_in, n_filters_out, stride, normalization, dims, upsampling):
        conv, deconv = ((nn.Conv2d, nn.ConvTranspose2d), (nn.Conv3d, nn.ConvTranspose3d))[dims - 2]
        if upsampling == "deconv":
            layers = [deconv(n_filters_in, n_filters_out, stride, stride=stride)]
        else:
            how = {"mode": ("bilinear", "trilinear")[dims - 2], "align_corners": True} if upsampling == "linear" else {}
            layers = [nn.Upsample(scale_factor=stride, **how), conv(n_filters_in, n_filters_out, 3, padding=1)]
        super().__init__(*layers, *normalization_layers(normalization, n_filters_out, dims), nn.ReLU(inplace=True))


class Decoder(nn.Module):
    """V-Net from the features of its encoder on: `forward(features)` gives logits. Settings as in VNet; `upsampling`:
    'deconv', as V-Net has it, 'linear' or 'nearest', as MC-Net's further decoders have it."""

    def __init__(self, **settings):
        super().__init__()
        self.add_decoder(**settings)

    def add_decoder(self, n_classes, n_filters, strides, normalization, has_dropout, dims, upsampling="deconv"):
        self.has_dropout = has_dropout
        f, how = n_filters, (normalization, dims)
        one, two, three, four = strides
        self.block_five_up = UpsamplingBlock(16 * f, 8 * f, four, *how, upsampling)
        self.block_six = ConvBlock(3, 8 * f, 8 * f, *how)
        self.block_six_up = UpsamplingBlock(8 * f, 4 * f, three, *how, upsampling)
        self.block_seven = ConvBlock(3, 4 * f, 4 * f, *how)
        self.block_seven_up = UpsamplingBlock(4 * f, 2 * f, two, *how, upsampling)
        self.block_eight = ConvBlock(2, 2 * f, 2 * f, *how)
        self.block_eight_up = UpsamplingBlock(2 * f, f, one, *how, upsampling)
        self.block_nine = ConvBlock(1, f, f, *how)
        self.out_conv = (nn.Conv2d, nn.Conv3d)[dims - 2](f, n_classes, 1)
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

    Input: float (N, n_channels, *spatial) with `dims` (2 or 3) spatial sides, each a multiple of 16; output: logits
    (N, n_classes, *spatial). `strides`: of the four downsamplings, each a number or one for each side; a side must then
    be a multiple of the product of its strides. LASeg's published weights are of strides (2, 2, 2, (2, 2, 1)).
    `normalization`: none, batchnorm, groupnorm or instancenorm (the papers on LA use batchnorm).
    `has_dropout`: in training mode whole channels are dropped with p = 0.5 at the bottom and before the last
    convolution. `forward(x, turnoff_drop=True)` leaves them in for that one call.
    Other `dims` and another size raise ValueError.

    `net(x)` is `net.classify(net.decode(net.encode(x)))`: methods with further heads and decoders begin in between.
    `channels`: of the features that `encode` gives, finest first, and, but for the last, of those that `decode` gives.
    """

    def __init__(
        self,
        n_channels=3,
        n_classes=2,
        n_filters=16,
        normalization="none",
        has_dropout=False,
        strides=(2, 2, 2, 2),
        dims=3,
    ):
        nn.Module.__init__(self)
        if dims not in (2, 3):
            raise ValueError(f"dims is {dims!r}; a V-Net here has 2 or 3 spatial dimensions")
        f, how = n_filters, (normalization, dims)
        strides = [(stride,) * dims if isinstance(stride, int) else tuple(stride) for stride in strides]
        one, two, three, four = strides
        self.divisors = tuple(math.prod(along) for along in zip(*strides, strict=True))
        self.channels = [f, 2 * f, 4 * f, 8 * f, 16 * f]
        self.block_one = ConvBlock(1, n_channels, f, *how)
        self.block_one_dw = DownsamplingConvBlock(f, 2 * f, one, *how)
        self.block_two = ConvBlock(2, 2 * f, 2 * f, *how)
        self.block_two_dw = DownsamplingConvBlock(2 * f, 4 * f, two, *how)
        self.block_three = ConvBlock(3, 4 * f, 4 * f, *how)
        self.block_three_dw = DownsamplingConvBlock(4 * f, 8 * f, three, *how)
        self.block_four = ConvBlock(3, 8 * f, 8 * f, *how)
        self.block_four_dw = DownsamplingConvBlock(8 * f, 16 * f, four, *how)
        self.block_five = ConvBlock(3, 16 * f, 16 * f, *how)
        self.settings = {"n_classes": n_classes, "n_filters": f, "strides": strides, "normalization": normalization}
        self.settings |= {"has_dropout": has_dropout, "dims": dims}
        self.add_decoder(**self.settings)

    def another_decoder(self, upsampling):
        """A Decoder of the same sizes for the features of this encoder, with weights of its own."""
        return Decoder(**self.settings, upsampling=upsampling)

    @staticmethod
    def settings_of(state):
        """What the weights in the state_dict `state` tell beside the defaults: {'dims': 2, 'strides': ...}, or less."""
        state = VNet.translate(state)
        names = [f"block_{level}_dw.conv.0.weight" for level in ("one", "two", "three", "four")]
        strides = [tuple(state[name].shape[2:]) for name in names if name in state]
        dims = len(strides[0]) if strides else 0
        if dims not in (2, 3) or [*map(len, strides)] != [dims] * 4 or not all(map(all, strides)):
            return {}
        settings = {"dims": 2} if dims == 2 else {}
        return settings | ({"strides": strides} if strides != [(2,) * dims] * 4 else {})

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
