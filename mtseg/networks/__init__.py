"""The networks; each file is complete in itself."""

from mtseg.networks.kaiming import initialize_kaiming
from mtseg.networks.unet import UNet
from mtseg.networks.vnet import VNet

__all__ = ["NETWORKS", "UNet", "VNet", "initialize_kaiming"]

NETWORKS = {"vnet": VNet, "unet": UNet}
