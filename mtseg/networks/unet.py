"""U-Net for images and volumes in one class.

Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015 (arXiv:1505.04597);
Cicek et al., "3D U-Net", MICCAI 2016 (arXiv:1606.06650). Convolutions keep the size (padding 1).
"""

import math

import torch
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


class DoubleConv(nn.Module):
    """Twice convolution, normalization, ReLU; with `residual` the input (1x1 convolved if channels change) is added."""

    def __init__(self, channels_in, channels_out, dims, normalization, residual):
        super().__init__()
        conv = (nn.Conv2d, nn.Conv3d)[dims - 2]
        self.conv1 = conv(channels_in, channels_out, 3, padding=1)
        self.norm1 = normalization_layer(normalization, channels_out, dims)
        self.conv2 = conv(channels_out, channels_out, 3, padding=1)
        self.norm2 = normalization_layer(normalization, channels_out, dims)
        self.shortcut = None
        if residual:
            self.shortcut = nn.Identity() if channels_in == channels_out else conv(channels_in, channels_out, 1)

    def forward(self, x):
        y = torch.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.shortcut is not None:
            y = y + self.shortcut(x)
        return torch.relu(y)


class UNet(nn.Module):
    """U-Net with `depth` halvings, `n_filters` channels on the finest level and twice as many on each one below.

    Input: float (N, n_channels, *spatial) with `dims` (2 or 3) spatial sides, each a multiple of 2**depth (ValueError
    otherwise). Output: logits (N, n_classes, *spatial). With `deep_supervision`, training mode gives a list of logits,
    finest first, each half the size of the one before and one for every level above the bottom; eval mode gives the
    finest alone. `normalization`: none, batchnorm, groupnorm or instancenorm. `has_dropout`: in training mode whole
    channels are dropped with p = 0.5 at the bottom and before the last convolution, as in VNet;
    `forward(x, turnoff_drop=True)` leaves them in for that one call. `residual`: each block adds its input.
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
    ):
        super().__init__()
        if dims not in (2, 3):
            raise ValueError(f"dims is {dims!r}; a U-Net here has 2 or 3 spatial dimensions")
        if depth < 1:
            raise ValueError(f"depth is {depth!r}; a U-Net halves its input at least once")
        self.dims = dims
        self.depth = depth
        self.has_dropout = has_dropout
        self.deep_supervision = deep_supervision

        conv = (nn.Conv2d, nn.Conv3d)[dims - 2]
        deconv = (nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 2]
        channels = [n_filters * 2**level for level in range(depth + 1)]
        self.encoder = nn.ModuleList(
            DoubleConv(before, after, dims, normalization, residual)
            for before, after in zip([n_channels, *channels], channels, strict=False)
        )
        self.pool = (nn.MaxPool2d, nn.MaxPool3d)[dims - 2](2)
        self.up = nn.ModuleList(deconv(channels[level + 1], channels[level], 2, stride=2) for level in range(depth))
        self.decoder = nn.ModuleList(
            DoubleConv(2 * channels[level], channels[level], dims, normalization, residual) for level in range(depth)
        )
        heads = depth if deep_supervision else 1
        self.out_conv = nn.ModuleList(conv(channels[level], n_classes, 1) for level in range(heads))
        self.dropout = (nn.Dropout2d, nn.Dropout3d)[dims - 2](p=0.5)

    @staticmethod
    def settings_of(state):
        """What the weights in the state_dict `state` tell beside the defaults: residual, deep_supervision, dims."""
        weights = {"residual": "encoder.1.shortcut.weight", "deep_supervision": "out_conv.1.weight"}
        settings = {setting: True for setting, weight in weights.items() if weight in state}
        first = state.get("encoder.0.conv1.weight")
        return settings | ({"dims": 2} if first is not None and first.dim() == 4 else {})

    def forward(self, x, turnoff_drop=False):
        if x.dim() != self.dims + 2:
            raise ValueError(f"a {self.dims}-D UNet takes {self.dims + 2} axes (N, C, ...), not {tuple(x.shape)}")
        if any(size % 2**self.depth for size in x.shape[2:]):
            raise ValueError(
                f"UNet of depth {self.depth}: {2**self.depth} must divide each side of {tuple(x.shape[2:])}"
            )
        drop = self.has_dropout and not turnoff_drop

        skips = []
        for level, block in enumerate(self.encoder):
            x = block(x if level == 0 else self.pool(x))
            skips.append(x)
        if drop:
            x = self.dropout(x)
        outputs = []
        for level in reversed(range(self.depth)):
            x = self.decoder[level](torch.cat([skips[level], self.up[level](x)], dim=1))
            if level == 0 and drop:
                x = self.dropout(x)
            if level == 0 or (self.deep_supervision and self.training):
                outputs.insert(0, self.out_conv[level](x))
        return outputs if self.deep_supervision and self.training else outputs[0]
