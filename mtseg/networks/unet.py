"""U-Net for images and volumes in one class, and SSL4MIS's with settings of its own: its published weights load.

Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015 (arXiv:1505.04597);
Cicek et al., "3D U-Net", MICCAI 2016 (arXiv:1606.06650). Convolutions keep the size (padding 1).
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

    def __init__(self, channels_in, channels_out, dims, normalization, residual, slope, dropout):
        super().__init__()
        conv = (nn.Conv2d, nn.Conv3d)[dims - 2]
        self.conv1 = conv(channels_in, channels_out, 3, padding=1)
        self.norm1 = normalization_layer(normalization, channels_out, dims)
        self.conv2 = conv(channels_out, channels_out, 3, padding=1)
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

    def add_decoder(self, n_classes, channels, has_dropout, dims, how, deep_supervision, upsampling, out_kernel, drop):
        self.dims, self.has_dropout, self.deep_supervision = dims, has_dropout, deep_supervision
        self.interpolation = {"linear": ("bilinear", "trilinear")[dims - 2]}.get(upsampling, upsampling)
        conv = (nn.Conv2d, nn.Conv3d)[dims - 2]
        up, kernel = (nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 2], 2
        if upsampling != "deconv":
            up, kernel = conv, 1
        pairs = list(itertools.pairwise(channels))
        self.up = nn.ModuleList(up(below, here, kernel, stride=kernel) for here, below in pairs)
        self.decoder = nn.ModuleList(DoubleConv(2 * here, here, *how, dropout=0.0) for here, _ in pairs)
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
                x = F.interpolate(x, scale_factor=2, mode=self.interpolation, align_corners=corners)
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
    """U-Net with `depth` halvings, `n_filters` channels on the finest level and twice as many on each one below.

    Input: float (N, n_channels, *spatial) with `dims` (2 or 3) spatial sides, each a multiple of 2**depth (ValueError
    otherwise). Output: logits (N, n_classes, *spatial). With `deep_supervision`, training mode gives a list of logits,
    finest first, each half the size of the one before and one for every level above the bottom; eval mode gives the
    finest alone. `normalization`: none, batchnorm, groupnorm or instancenorm. `has_dropout`: in training mode whole
    channels are dropped with p = 0.5 at the bottom and before the last convolution, as in VNet;
    `forward(x, turnoff_drop=True)` leaves them in for that one call. `residual`: each block adds its input.
    For `UNetSSL4MIS`: `slope` of the activation below zero, 0 for ReLU; `dropouts`, for each level, finest first, the
    share of single values that is dropped between the encoder's convolutions, instead of those channels; `upsampling`:
    'deconv', a transposed convolution, or after a 1x1 convolution 'linear' interpolation (corners aligned) or
    'nearest'; `out_kernel`, the side of the last convolution.

    `net(x)` is `net.classify(net.decode(net.encode(x)))`: methods with further heads and decoders begin in between.
    `channels`: of the features that `encode` gives, finest first, and, but for the last, of those that `decode` gives.
    """

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
        depth=4,
        slope=0.0,
        dropouts=None,
        upsampling="deconv",
        out_kernel=1,
    ):
        nn.Module.__init__(self)
        if dims not in (2, 3):
            raise ValueError(f"dims is {dims!r}; a U-Net here has 2 or 3 spatial dimensions")
        if depth < 1:
            raise ValueError(f"depth is {depth!r}; a U-Net halves its input at least once")
        self.depth = depth
        self.channels = [n_filters * 2**level for level in range(depth + 1)]
        how = (dims, normalization, residual, slope)
        drops = [0.0] * (depth + 1) if dropouts is None else dropouts
        self.encoder = nn.ModuleList(
            DoubleConv(before, after, *how, drop)
            for before, after, drop in zip([n_channels, *self.channels[:-1]], self.channels, drops, strict=True)
        )
        self.pool = (nn.MaxPool2d, nn.MaxPool3d)[dims - 2](2)
        self.settings = {"n_classes": n_classes, "channels": self.channels, "has_dropout": has_dropout, "dims": dims}
        self.settings |= {"how": how, "out_kernel": out_kernel, "drop": dropouts is None}
        self.add_decoder(**self.settings, deep_supervision=deep_supervision, upsampling=upsampling)

    def another_decoder(self, upsampling):
        """A Decoder of the same sizes for the features of this encoder, with weights of its own."""
        return Decoder(**self.settings, deep_supervision=False, upsampling=upsampling)

    @staticmethod
    def settings_of(state):
        """What the weights in the state_dict `state` tell beside the defaults: residual, deep_supervision, dims."""
        weights = {"residual": "encoder.1.shortcut.weight", "deep_supervision": "out_conv.1.weight"}
        settings = {setting: True for setting, weight in weights.items() if weight in state}
        first = state.get("encoder.0.conv1.weight")
        return settings | ({"dims": 2} if first is not None and first.dim() == 4 else {})

    def encode(self, x, turnoff_drop=False):
        """The features of the depth + 1 levels, finest first (the bottom's after its dropout)."""
        if x.dim() != self.dims + 2:
            raise ValueError(f"a {self.dims}-D UNet takes {self.dims + 2} axes (N, C, ...), not {tuple(x.shape)}")
        if any(size % 2**self.depth for size in x.shape[2:]):
            raise ValueError(
                f"UNet of depth {self.depth}: {2**self.depth} must divide each side of {tuple(x.shape[2:])}"
            )
        drop = self.has_dropout and not turnoff_drop
        features = []
        for level, block in enumerate(self.encoder):
            x = block(x if level == 0 else self.pool(x), drop)
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
