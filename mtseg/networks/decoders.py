"""Decoders for encoders of images, and the network of an encoder and a decoder, with the methods of VNet and UNet.

An encoder is a module whose `forward(x)` gives a list of features, finest first, and that has the attributes
`channels` and `strides` of these, `divisor` of the sides of its input, `stem`, the name of its first weight, `stages`,
the beginnings of the names of the weights of each of its stages, and a method `translate(state)`: see resnet.py,
efficientnet.py, convnext.py, and dinov2.py in a `Pyramid`.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

NORMALIZATIONS = ("none", "batchnorm", "groupnorm", "instancenorm")
RATES = (6, 12, 18)  # of DeepLabV3+'s dilated convolutions


def convolution(before, after, side, normalization, dilation=1, separable=False):
    """Convolution that keeps the size, normalization, ReLU; `separable`: of each channel, then over the channels."""
    layers = []
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization is {normalization!r}; use one of {', '.join(NORMALIZATIONS)}")
    padding, bias = dilation * (side // 2), normalization != "batchnorm"
    if separable:
        layers.append(nn.Conv2d(before, before, side, 1, padding, dilation, before, bias=False))
        side, padding, dilation = 1, 0, 1
    layers.append(nn.Conv2d(before, after, side, 1, padding, dilation, bias=bias))
    if normalization == "batchnorm":
        layers.append(nn.BatchNorm2d(after))
    elif normalization == "groupnorm":
        layers.append(nn.GroupNorm(math.gcd(16, after), after))
    elif normalization == "instancenorm":
        layers.append(nn.InstanceNorm2d(after))
    return nn.Sequential(*layers, nn.ReLU(inplace=True))


class Enlarge(nn.Module):
    """Features `by` times as large, by a transposed convolution ('deconv'), 'linear' (corners not aligned) or 'nearest'
    interpolation; in any case interpolated to `size`."""

    def __init__(self, channels, by, upsampling):
        super().__init__()
        self.mode = {"linear": "bilinear", "deconv": "bilinear"}.get(upsampling, upsampling)
        enlarges = upsampling == "deconv" and by > 1
        self.deconv = nn.ConvTranspose2d(channels, channels, by, by) if enlarges else nn.Identity()

    def forward(self, x, size):
        x = self.deconv(x)
        if x.shape[2:] == torch.Size(size):
            return x
        return F.interpolate(x, size, mode=self.mode, align_corners=False if self.mode == "bilinear" else None)


class UNetDecoder(nn.Module):
    """A U-Net's way up from the features of an encoder, in levels of half the stride down to the image's size.

    Ronneberger et al. (arXiv:1505.04597). `encoder`: whose `channels` and `strides` the features have. The finest level
    has `n_filters` channels, and each one below twice as many. Each level enlarges (`upsampling` as in Enlarge), joins
    the encoder's features of its size, if there are any, and has two 3 x 3 convolutions with `normalization`.
    `has_dropout`: in training mode whole channels of the finest level are dropped with p = 0.5.
    """

    def __init__(
        self, encoder, n_classes, n_filters=16, normalization="batchnorm", has_dropout=False, upsampling="nearest"
    ):
        super().__init__()
        channels, strides = encoder.channels, encoder.strides
        self.finest, self.has_dropout, self.dropout = strides[0], has_dropout, nn.Dropout2d(0.5)
        targets, skips = [*strides[-2::-1]], [*channels[-2::-1]]
        while targets[-1] > 1:
            targets, skips = [*targets, max(targets[-1] / 2, 1)], [*skips, 0]
        widths = [n_filters * 2**level for level in reversed(range(len(targets)))]
        before = [channels[-1], *widths[:-1]]
        factors = [round(a / b) for a, b in zip([strides[-1], *targets[:-1]], targets, strict=True)]
        self.up = nn.ModuleList(Enlarge(c, by, upsampling) for c, by in zip(before, factors, strict=True))
        self.blocks = nn.ModuleList(
            nn.Sequential(convolution(a + skip, b, 3, normalization), convolution(b, b, 3, normalization))
            for a, skip, b in zip(before, skips, widths, strict=True)
        )
        self.targets, self.channels = targets, widths[::-1]  # of what `decode` gives, finest first
        self.out_conv = nn.Conv2d(n_filters, n_classes, 1)

    def decode(self, features, turnoff_drop=False):
        """The features of the decoder's levels, finest first, from the encoder's."""
        *skips, x = features
        finest, decoded = features[0].shape[2:], []
        for level, (up, block, target) in enumerate(zip(self.up, self.blocks, self.targets, strict=True)):
            skip = [skips[-1 - level]] if level < len(skips) else []
            over, by = (target / self.finest).as_integer_ratio()  # round() of a side could not be exported
            size = skip[0].shape[2:] if skip else [side * by // over for side in finest]
            x = block(torch.cat([*skip, up(x, size)], dim=1))
            decoded.insert(0, x)
        if self.has_dropout and not turnoff_drop:
            decoded[0] = self.dropout(x)
        return decoded

    def classify(self, decoded):
        """Logits from what `decode` gave."""
        return self.out_conv(decoded[0])

    def forward(self, features, turnoff_drop=False):
        return self.classify(self.decode(features, turnoff_drop))


class DeepLabV3Plus(nn.Module):
    """DeepLabV3+: atrous spatial pyramid pooling of the coarsest features, joined with those of stride 4.

    Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation", ECCV 2018
    (arXiv:1802.02611), with an encoder whose output stride is 16 or 8. Settings as in UNetDecoder, but that each hidden
    layer has 16 `n_filters` channels; `upsampling` is of the pooled features, which `has_dropout` drops. The last step
    is always linear, corners not aligned. In training mode, batch norm needs two images or more: the mean over an image
    is one value a channel.
    """

    def __init__(
        self, encoder, n_classes, n_filters=16, normalization="batchnorm", has_dropout=False, upsampling="linear"
    ):
        super().__init__()
        width, strides, last = 16 * n_filters, encoder.strides, encoder.channels[-1]
        self.low, self.has_dropout, self.dropout = strides.index(4), has_dropout, nn.Dropout2d(0.5)
        self.branches = nn.ModuleList([convolution(last, width, 1, normalization)])
        self.branches.extend(convolution(last, width, 3, normalization, rate, separable=True) for rate in RATES)
        # A single value has no spread over the image.
        self.pooled = convolution(last, width, 1, "none" if normalization == "instancenorm" else normalization)
        self.project = nn.ModuleList([convolution(5 * width, width, 1, normalization)])
        self.project.append(convolution(width, width, 3, normalization, separable=True))
        self.up = Enlarge(width, strides[-1] // 4, upsampling)
        self.low_conv = convolution(encoder.channels[self.low], 48, 1, normalization)
        self.fuse = convolution(width + 48, width, 3, normalization, separable=True)
        self.out_conv = nn.Conv2d(width, n_classes, 1)
        self.channels = [width, width]  # of what `decode` gives, finest first

    def fused(self, features, turnoff_drop=False):
        """The decoder's features, of stride 4."""
        low, x = features[self.low], features[-1]
        pooled = self.pooled(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        x = self.project[0](torch.cat([*(branch(x) for branch in self.branches), pooled], dim=1))
        if self.has_dropout and not turnoff_drop:
            x = self.dropout(x)
        return self.fuse(torch.cat([self.up(self.project[1](x), low.shape[2:]), self.low_conv(low)], dim=1))

    def decode(self, features, turnoff_drop=False):
        """The decoder's features, enlarged to the image's size, and as they are, of stride 4."""
        x = self.fused(features, turnoff_drop)
        return [F.interpolate(x, scale_factor=4, mode="bilinear"), x]

    def classify(self, decoded):
        """Logits from what `decode` gave: of the smaller features, as the interpolation of logits costs less."""
        return F.interpolate(self.out_conv(decoded[-1]), scale_factor=4, mode="bilinear")

    def forward(self, features, turnoff_drop=False):
        return self.classify([self.fused(features, turnoff_drop)])


class Pyramid(nn.Module):
    """An encoder whose features all have the stride 14, a ViT, with features of the strides 3.5, 7, 14 and 28.

    The first half of Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection" (arXiv:2203.16527):
    each map is brought to `width` channels, and enlarged four and two times, left as it is, or halved; for UNetDecoder.
    """

    def __init__(self, encoder, width=256):
        super().__init__()
        self.encoder, self.divisor, self.stem = encoder, encoder.divisor, f"encoder.{encoder.stem}"
        self.stages = [tuple(f"encoder.{prefix}" for prefix in stage) for stage in encoder.stages]
        first, *_ = encoder.strides
        self.channels, self.strides = (width,) * 4, (first / 4, first / 2, first, first * 2)
        self.project = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in encoder.channels)
        twice = [nn.ConvTranspose2d(width, width, 2, 2) for _ in range(3)]
        sizes = [nn.Sequential(twice[0], nn.GELU(), twice[1]), twice[2], nn.Identity(), nn.MaxPool2d(2, ceil_mode=True)]
        self.resize = nn.ModuleList(sizes)

    def forward(self, x):
        layers = zip(self.encoder(x), self.project, self.resize, strict=True)
        return [resize(project(features)) for features, project, resize in layers]

    def translate(self, state):
        """The state_dict `state` of the encoder alone under this pyramid's names; its own comes back as it is."""
        if "project.0.weight" in state:
            return state
        return {f"encoder.{name}": value for name, value in self.encoder.translate(state).items()}


def fold_stem(weight, n_channels):
    """A first convolution's weights (out, in, h, w) for images of `n_channels` channels instead.

    For one channel the sum over all, so that it computes what it would of the channel repeated; for n the channels in
    turn, times in / n.
    """
    given = weight.shape[1]
    if n_channels == 1:
        return weight.sum(1, keepdim=True)
    return weight[:, [channel % given for channel in range(n_channels)]] * (given / n_channels)


class EncoderDecoder(nn.Module):
    """An encoder and a decoder with the methods of VNet and UNet, for images.

    Input: float (N, n_channels, H, W) with sides that are multiples of `divisors` (ValueError otherwise). Output:
    logits (N, n_classes, H, W). `decoder`: UNetDecoder, DeepLabV3Plus or a class of this kind, which is made for the
    encoder with `settings`, n_classes at least. With has_dropout=True among them, whole channels of the coarsest
    features are dropped in training mode with p = 0.5, too; `forward(x, turnoff_drop=True)` leaves all of them in for
    that one call.

    `net(x)` is `net.classify(net.decode(net.encode(x)))`: methods with further heads and decoders begin in between.
    `channels`: of the features that `decode` gives, finest first, and then of the coarsest that `encode` gives.
    """

    head = "decoder.out_conv."  # the beginning of the names of the last layer's weights

    def __init__(self, encoder, decoder, **settings):
        super().__init__()
        self.encoder, self.settings = encoder, settings
        self.stages = [tuple(f"encoder.{prefix}" for prefix in stage) for stage in encoder.stages]
        self.kind, self.divisors = decoder, (encoder.divisor,) * 2
        self.decoder = self.another_decoder()
        self.channels = [*self.decoder.channels, encoder.channels[-1]]
        self.dropout = nn.Dropout2d(0.5) if settings.get("has_dropout") else nn.Identity()

    def another_decoder(self, upsampling=None):
        """A decoder of the same sizes for the features of this encoder, with weights of its own."""
        settings = self.settings | ({"upsampling": upsampling} if upsampling else {})
        return self.kind(self.encoder, **settings)

    @staticmethod
    def settings_of(state):
        """What the weights in the state_dict `state` tell: {'dims': 2}, or {}."""
        known = any(name.startswith("encoder.") for name in state) and any(n.startswith("decoder.") for n in state)
        return {"dims": 2} if known else {}

    def translate(self, state):
        """The state_dict `state` under this network's names, where it is an encoder's alone, of any origin that the
        encoder's `translate` knows; its stem is folded where that is for another number of channels. What has no place
        here, such as a classifier, keeps its name. A whole network's comes back as it is."""
        if self.settings_of(state):
            return state
        for prefix in ("encoder.", "backbone."):
            if all(name.startswith(prefix) for name in state):
                state = {name.removeprefix(prefix): value for name, value in state.items()}
        state = self.encoder.translate(state)
        stem, n_channels = state.get(self.encoder.stem), self.encoder.state_dict()[self.encoder.stem].shape[1]
        if stem is not None and stem.dim() == 4 and stem.shape[1] != n_channels:
            state = state | {self.encoder.stem: fold_stem(stem, n_channels)}
        return {f"encoder.{name}": value for name, value in state.items()}

    def encode(self, x, turnoff_drop=False):
        """The encoder's features, finest first (the coarsest after its dropout)."""
        if x.dim() != 4:
            raise ValueError(f"a 2-D network takes 4 axes (N, C, H, W), not {tuple(x.shape)}")
        if any(side % self.encoder.divisor for side in x.shape[2:]):
            name = type(self.encoder).__name__
            raise ValueError(f"{name}: {self.divisors} must divide the sides {tuple(x.shape[2:])}")
        *features, last = self.encoder(x)
        return [*features, last if turnoff_drop else self.dropout(last)]

    def decode(self, features, turnoff_drop=False):
        """The features of the decoder's levels, finest first, from `encode`'s."""
        return self.decoder.decode(features, turnoff_drop)

    def classify(self, decoded):
        """Logits from what `decode` gave."""
        return self.decoder.classify(decoded)

    def forward(self, x, turnoff_drop=False):
        return self.decoder(self.encode(x, turnoff_drop), turnoff_drop)
