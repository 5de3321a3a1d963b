"""3 x 3 x 3 convolutions by Winograd's algorithm, compiled from C when they are asked for."""

from mtseg.winograd.convolutions import WinogradError, convolve, weight_gradient, winograd_convolutions

__all__ = ["WinogradError", "convolve", "weight_gradient", "winograd_convolutions"]
