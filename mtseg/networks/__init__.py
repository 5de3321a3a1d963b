"""The networks; each file is complete in itself."""

from mtseg.networks.kaiming import initialize_kaiming
from mtseg.networks.unet import UNet, UNetSSL4MIS
from mtseg.networks.vnet import VNet

__all__ = ["NETWORKS", "UNet", "UNetSSL4MIS", "VNet", "initialize_kaiming"]

NETWORKS = {"vnet": VNet, "unet": UNet, "unet_ssl4mis": UNetSSL4MIS}
