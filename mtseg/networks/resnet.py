"""ResNet-18, 34 and 50 as encoders, under torchvision's names: its weights, timm's and transformers' load.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016 (arXiv:1512.03385), with the stride of a bottleneck
on its 3 x 3 convolution, as torchvision has it; dilations as in Chen et al. (arXiv:1706.05587).
"""

from torch import nn

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


def convolution(channels_in, channels_out, side, stride=1, dilation=1):
    """A convolution without bias that keeps the size but for the stride."""
    return nn.Conv2d(channels_in, channels_out, side, stride, dilation * (side // 2), dilation, bias=False)


class Block(nn.Module):
    """Two 3 x 3 convolutions, or as a bottleneck 1 x 1, 3 x 3 and 1 x 1, each with batch norm, and the input added."""

    # Which normalization follows a convolution at once: for inference, the one can do the work of both.
    folds = (("conv1", "bn1"), ("conv2", "bn2"))

    def __init__(self, channels_in, width, channels_out, stride, dilation, dilation_after):
        super().__init__()
        if width == channels_out:
            self.conv1 = convolution(channels_in, width, 3, stride, dilation)
            self.conv2, self.bn3 = convolution(width, width, 3, 1, dilation_after), None
        else:
            self.folds = (*self.folds, ("conv3", "bn3"))
            self.conv1, self.conv2 = convolution(channels_in, width, 1), convolution(width, width, 3, stride, dilation)
            self.conv3, self.bn3 = convolution(width, channels_out, 1), nn.BatchNorm2d(channels_out)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.relu, self.downsample = nn.ReLU(inplace=True), None
        if stride > 1 or channels_in != channels_out:
            shortcut = convolution(channels_in, channels_out, 1, stride)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels_out))

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.bn3 is not None:
            y = self.bn3(self.conv3(self.relu(y)))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """The features of an image at `strides`, finest first, in `channels` channels, of a ResNet with `depth` layers.

    Input: float (N, n_channels, H, W) with sides that are multiples of `divisor`. `output_stride` 16 or 8: the last one
    or two stages keep the size and dilate their convolutions instead. Other values raise ValueError. The classifier
    (fc) is left out: torchvision's has 513 000 parameters for 18 and 34 layers, 2 049 000 for 50.
    """

    folds = (("conv1", "bn1"),)
    stages = (("conv1.", "bn1."), ("layer1.",), ("layer2.",), ("layer3.",), ("layer4.",))  # beginnings of names
    stem = "conv1.weight"  # the one weight whose shape tells the number of input channels

    def __init__(self, depth=50, n_channels=3, output_stride=32):
        super().__init__()
        if depth not in DEPTHS or output_stride not in (8, 16, 32):
            raise ValueError(f"depth {depth}, output_stride {output_stride}: give 18, 34 or 50, and 8, 16 or 32")
        self.divisor, self.strides = output_stride, tuple(min(2**level, output_stride) for level in range(1, 6))
        expansion = 4 if depth == 50 else 1
        self.channels = (64, *(width * expansion for width in (64, 128, 256, 512)))
        self.conv1 = nn.Conv2d(n_channels, 64, 7, 2, 3, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(64), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        before, dilation = 64, 1
        for level, count in enumerate(DEPTHS[depth], start=1):
            width = 32 * 2**level
            stride = 2 if level > 1 and self.strides[level] > self.strides[level - 1] else 1
            after = 2 * dilation if level > 1 and stride == 1 else dilation
            blocks = [Block(before, width, width * expansion, stride, dilation, after)]
            before, dilation = width * expansion, after
            blocks += [Block(before, width, before, 1, dilation, dilation) for _ in range(count - 1)]
            setattr(self, f"layer{level}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        features = [self.relu(self.bn1(self.conv1(x)))]
        x = self.maxpool(features[0])
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            features.append(x := layer(x))
        return features

    @staticmethod
    def translate(state):
        """The state_dict `state` under torchvision's names, which are timm's, where it is under transformers'."""
        names, kinds = {}, (("convolution", "conv", 0), ("normalization", "bn", 1))
        for theirs, ours, place in kinds:
            names[f"embedder.embedder.{theirs}"] = f"{ours}1"
            for stage in range(4):
                for block in range(6):
                    layer = f"encoder.stages.{stage}.layers.{block}"
                    names[f"{layer}.shortcut.{theirs}"] = f"layer{stage + 1}.{block}.downsample.{place}"
                    for number in range(3):
                        names[f"{layer}.layer.{number}.{theirs}"] = f"layer{stage + 1}.{block}.{ours}{number + 1}"
        layers = {name: name.removeprefix("resnet.").rpartition(".") for name in state}
        return {f"{names.get(layer, layer)}{dot}{kind}": state[name] for name, (layer, dot, kind) in layers.items()}
