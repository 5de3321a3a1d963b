"""The networks that --network names: V-Net, the U-Nets, and encoders with decoders; and the files they start from."""

import functools
from pathlib import Path

from mtseg.checkpoint import load_checkpoint
from mtseg.networks import NETWORKS as COMPLETE
from mtseg.networks.convnext import ConvNeXtT
from mtseg.networks.decoders import DeepLabV3Plus, EncoderDecoder, Pyramid, UNetDecoder
from mtseg.networks.dinov2 import DINOv2
from mtseg.networks.efficientnet import EfficientNetB0
from mtseg.networks.resnet import ResNet
from mtseg.safetensors_file import load_safetensors
from mtseg.script.checks import ENCODED

# Each takes a number of channels and an output stride; ConvNeXt and DINOv2 have but one.
ENCODERS = {f"resnet{depth}": functools.partial(ResNet, depth) for depth in (18, 34, 50)}
ENCODERS |= {"efficientnet_b0": EfficientNetB0, "convnext_t": lambda n_channels, _: ConvNeXtT(n_channels)}
ENCODERS["dinov2_vits14"] = lambda n_channels, _: Pyramid(DINOv2(n_channels))
ENCODERS["dinov2_vits14_reg"] = lambda n_channels, _: Pyramid(DINOv2(n_channels, registers=4))
DECODERS = {"unet": UNetDecoder, "deeplab": DeepLabV3Plus}


class Encoded(EncoderDecoder):
    """The network of images that a `name` in ENCODED stands for; each is a class of its own, with its `name`."""

    def __init__(self, n_channels, n_classes, n_filters, normalization, has_dropout, dims):
        if dims != 2:
            raise ValueError(f"dims is {dims!r}; {self.name} takes images")
        encoder, decoder = self.name.rsplit("_", 1)
        settings = {"n_filters": n_filters, "normalization": normalization, "has_dropout": has_dropout}
        encoder = ENCODERS[encoder](n_channels, ENCODED[self.name])
        super().__init__(encoder, DECODERS[decoder], n_classes=n_classes, **settings)


NETWORKS = COMPLETE | {name: type(name, (Encoded,), {"name": name}) for name in ENCODED}


def load_pretrained(path):
    """What lies in a checkpoint or a .safetensors file."""
    return load_safetensors(path) if Path(path).suffix == ".safetensors" else load_checkpoint(path)
