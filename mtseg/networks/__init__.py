"""The networks; each file is complete in itself."""

from torch import nn
from torch.nn.modules.conv import _ConvNd

from mtseg.networks.unet import UNet
from mtseg.networks.vnet import VNet

__all__ = ["UNet", "VNet", "build_network", "initialize_kaiming"]


def build_network(args, n_channels):
    """The network that the flags `args` ask for, on images of `n_channels` channels, with dropout."""
    settings = {"n_filters": args.n_filters, "normalization": args.normalization, "has_dropout": args.has_dropout}
    if args.network == "unet":
        return UNet(n_channels, args.num_classes, deep_supervision=args.deep_supervision, **settings)
    return VNet(n_channels, args.num_classes, **settings)


def initialize_kaiming(net):
    """Weights of convolutions from N(0, 2 / fan_in), biases 0; returns `net`.

    He et al., "Delving Deep into Rectifiers", ICCV 2015 (arXiv:1502.01852), equation 10.
    """
    for module in net.modules():
        if isinstance(module, _ConvNd):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return net
