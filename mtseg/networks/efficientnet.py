"""EfficientNet-B0 as an encoder, under torchvision's names: its weights, timm's and EfficientNet-PyTorch's load.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019 (arXiv:1905.11946),
without its stochastic depth.
"""

import torch.nn.functional as F
from torch import nn

# Of each stage: expansion, side of the kernel, stride, channels, number of blocks.
STAGES = ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3), (6, 5, 2, 192, 4))
STAGES += ((6, 3, 1, 320, 1),)
# A block's layers under torchvision's, timm's and EfficientNet-PyTorch's names; one that does not expand has fewer.
OURS = "0.0 0.1 1.0 1.1 2.fc1 2.fc2 3.0 3.1".split()
TIMM = "conv_pw bn1 conv_dw bn2 se.conv_reduce se.conv_expand conv_pwl bn3".split()
PYTORCH = "_expand_conv _bn0 _depthwise_conv _bn1 _se_reduce _se_expand _project_conv _bn2".split()
FIRST_OURS = "0.0 0.1 1.fc1 1.fc2 2.0 2.1".split()
FIRST_TIMM = "conv_dw bn1 se.conv_reduce se.conv_expand conv_pw bn2".split()


class TensorFlowConv2d(nn.Conv2d):
    """A strided convolution that pads as TensorFlow does: of an odd number of voxels the greater part at the end."""

    def forward(self, x):
        padding = self.kernel_size[0] - self.stride[0]
        before, after = padding // 2, padding - padding // 2
        x = F.pad(x, (before, after, before, after))
        return F.conv2d(x, self.weight, None, self.stride, 0, self.dilation, self.groups)


def convolution(before, after, side=1, stride=1, dilation=1, groups=1, tensorflow=False, activation=True):
    """Convolution without bias, batch norm, SiLU."""
    kind = TensorFlowConv2d if tensorflow and stride > 1 else nn.Conv2d
    padding = dilation * (side // 2)
    conv = kind(before, after, side, stride, padding, dilation, groups=groups, bias=False)
    norm = nn.BatchNorm2d(after, *((1e-3, 0.01) if tensorflow else ()))
    return nn.Sequential(conv, norm, *[nn.SiLU(inplace=True)] * activation)


class SqueezeExcitation(nn.Module):
    """Each channel times a number in (0, 1), of the means of all channels."""

    def __init__(self, channels, squeezed):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x):
        return x * self.fc2(F.silu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class MBConv(nn.Module):
    """Expansion, convolution of each channel, squeeze and excitation, projection; the input added where it fits."""

    def __init__(self, before, after, expansion, side, stride, dilation, tensorflow):
        super().__init__()
        width, self.adds = before * expansion, stride == 1 and before == after
        layers = [convolution(before, width, tensorflow=tensorflow)] if expansion > 1 else []
        layers.append(convolution(width, width, side, stride, dilation, width, tensorflow))
        layers.append(SqueezeExcitation(width, before // 4))
        layers.append(convolution(width, after, tensorflow=tensorflow, activation=False))
        self.block = nn.Sequential(*layers)

    def forward(self, x):
        return self.block(x) + x if self.adds else self.block(x)


class EfficientNetB0(nn.Module):
    """The features of an image at `strides`, finest first, in `channels` channels.

    Input: float (N, n_channels, H, W) with sides that are multiples of `divisor`. `output_stride` 16 or 8 (32 by
    default, else ValueError): the last strides are 1, and what follows is dilated. `tensorflow`: strided convolutions
    pad and batch norms are set as in TensorFlow's, for weights of EfficientNet-PyTorch, MONAI and timm's tf_ models.
    The last convolution and the classifier, 1 693 160 of the 5 288 548 parameters, are left out.
    """

    stages = tuple((f"features.{stage}.",) for stage in range(8))  # beginnings of the names of their weights
    stem = "features.0.0.weight"  # the one weight whose shape tells the number of input channels

    def __init__(self, n_channels=3, output_stride=32, tensorflow=False):
        super().__init__()
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride {output_stride}: give 8, 16 or 32")
        self.channels, self.divisor, self.tensorflow = (16, 24, 40, 112, 320), output_stride, tensorflow
        self.strides = tuple(min(2**level, output_stride) for level in range(1, 6))
        self.features = nn.ModuleList([convolution(n_channels, 32, 3, 2, tensorflow=tensorflow)])
        before, reached, dilation = 32, 2, 1
        for expansion, side, stride, after, count in STAGES:
            dilated = dilation * stride if reached * stride > output_stride else dilation
            stride = stride if dilated == dilation else 1
            blocks = [MBConv(before, after, expansion, side, stride, dilation, tensorflow)]
            blocks += [MBConv(after, after, expansion, side, 1, dilated, tensorflow) for _ in range(count - 1)]
            self.features.append(nn.Sequential(*blocks))
            before, reached, dilation = after, reached * stride, dilated
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x):
        stages = [x := stage(x) for stage in self.features]
        return [stages[number] for number in (1, 2, 3, 5, 7)]

    def translate(self, state):
        """The state_dict `state` under torchvision's names, where it is under timm's or EfficientNet-PyTorch's, which
        are MONAI's too. ValueError where the latter, which pad as TensorFlow does, would be computed otherwise."""
        if "_conv_stem.weight" in state and not self.tensorflow:
            raise ValueError("its weights are padded for as in TensorFlow; take --network efficientnet_b0_tf_...")
        names, number = {"conv_stem": "features.0.0", "bn1": "features.0.1"}, 0
        names |= {"_conv_stem": "features.0.0", "_bn0": "features.0.1"}
        for stage, (*_, count) in enumerate(STAGES):
            layers = zip(OURS, TIMM, PYTORCH, strict=True)
            layers = [*layers] if stage else [*zip(FIRST_OURS, FIRST_TIMM, PYTORCH[2:], strict=True)]
            for block in range(count):
                for ours, timm, pytorch in layers:
                    ours = f"features.{stage + 1}.{block}.block.{ours}"
                    names[f"blocks.{stage}.{block}.{timm}"] = names[f"_blocks.{number}.{pytorch}"] = ours
                    names[f"_blocks.{stage}.{number}.{pytorch}"] = ours  # MONAI's
                number += 1
        layers = {name: name.rpartition(".") for name in state}
        return {f"{names.get(layer, layer)}{dot}{kind}": state[name] for name, (layer, dot, kind) in layers.items()}
