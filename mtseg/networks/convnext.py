"""ConvNeXt-T as an encoder, under torchvision's names: its weights, the authors', timm's and transformers' load.

Liu et al., "A ConvNet for the 2020s", CVPR 2022 (arXiv:2201.03545), without its stochastic depth.
"""

import re

import torch
import torch.nn.functional as F
from torch import nn

DEPTHS, WIDTHS = (3, 3, 9, 3), (96, 192, 384, 768)


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (N, C, H, W)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """A 7 x 7 convolution of each channel, layer norm, a perceptron over the channels; scaled, and the input added."""

    def __init__(self, width):
        super().__init__()
        conv, norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width, eps=1e-6)
        # torchvision counts permutations and the activation, too.
        self.block = nn.ModuleDict(
            {"0": conv, "2": norm, "3": nn.Linear(width, 4 * width), "5": nn.Linear(4 * width, width)}
        )
        self.layer_scale = nn.Parameter(torch.full((width, 1, 1), 1e-6))

    def forward(self, x):
        y = self.block["2"](self.block["0"](x).permute(0, 2, 3, 1))
        y = self.block["5"](F.gelu(self.block["3"](y))).permute(0, 3, 1, 2)
        return x + self.layer_scale * y


class ConvNeXtT(nn.Module):
    """The features of an image at `strides`, finest first, in `channels` channels.

    Input: float (N, n_channels, H, W) with sides that are multiples of `divisor`. The classifier with its layer norm,
    770 536 of the 28 589 128 parameters, is left out.
    """

    channels, strides, divisor = WIDTHS, (4, 8, 16, 32), 32
    # Beginnings of the names of the stages' weights.
    stages = (("features.0.",), ("features.1.",), *((f"features.{n}.", f"features.{n + 1}.") for n in (2, 4, 6)))
    stem = "features.0.0.weight"  # the one weight whose shape tells the number of input channels

    def __init__(self, n_channels=3):
        super().__init__()
        norms = [LayerNorm2d(width, eps=1e-6) for width in WIDTHS[:-1]]
        stem = nn.Sequential(nn.Conv2d(n_channels, WIDTHS[0], 4, 4), LayerNorm2d(WIDTHS[0], eps=1e-6))
        self.features = nn.ModuleList([stem])
        for level, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True)):
            if level:
                halving = nn.Conv2d(WIDTHS[level - 1], width, 2, 2)
                self.features.append(nn.Sequential(norms[level - 1], halving))
            self.features.append(nn.Sequential(*(Block(width) for _ in range(depth))))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x):
        return [x := stage(x) for stage in self.features][1::2]

    @staticmethod
    def translate(state):
        """The state_dict `state` under torchvision's names, where it is under the authors', timm's or transformers'."""
        layers = {"dwconv": 0, "conv_dw": 0, "norm": 2, "layernorm": 2}
        layers |= {"pwconv1": 3, "mlp.fc1": 3, "pwconv2": 5, "mlp.fc2": 5}
        translated = {}
        for name, value in state.items():
            name = name.removeprefix("convnext.").removeprefix("encoder.")
            name = re.sub(r"^(stem|downsample_layers\.0)\b", "features.0", name)
            name = name.replace("embeddings.patch_embeddings.", "features.0.0.")
            name = name.replace("embeddings.layernorm.", "features.0.1.")
            down = re.match(r"(?:stages\.(\d)\.downsampl\w+|downsample_layers\.(\d))\.(.+)", name)
            block = re.match(r"stages\.(\d)\.(?:blocks\.|layers\.)?(\d+)\.(.+)", name)
            if down:
                name = f"features.{2 * int(down[1] or down[2])}.{down[3]}"
            elif block:
                layer, _, kind = block[3].rpartition(".")
                ours = f"features.{2 * int(block[1]) + 1}.{block[2]}."
                if layer in layers:
                    name = f"{ours}block.{layers[layer]}.{kind}"
                elif kind in ("gamma", "layer_scale_parameter"):
                    name, value = f"{ours}layer_scale", value.reshape(-1, 1, 1)
            translated[name] = value
        return translated
