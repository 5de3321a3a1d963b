"""Initial weights as He et al. drew them."""

from torch import nn
from torch.nn.modules.conv import _ConvNd


def initialize_kaiming(net):
    """Weights of convolutions from N(0, 2 / fan_in), biases 0; returns `net`.

    He et al., "Delving Deep into Rectifiers", ICCV 2015 (arXiv:1502.01852), equation 10. Of a transposed convolution
    fan_in is PyTorch's, the channels it gives times its kernel, so that what it gives is smaller than theirs.
    """
    for module in net.modules():
        if isinstance(module, _ConvNd):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return net
