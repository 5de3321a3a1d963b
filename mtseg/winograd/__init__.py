"""3 x 3 x 3 convolutions by Winograd's algorithm, compiled from C when they are asked for."""

from mtseg.winograd.convolutions import (
    WinogradError,
    check_compiler,
    convolve,
    input_gradient,
    left_to_pytorch,
    weight_gradient,
    winograd_convolutions,
)

__all__ = [
    "WinogradError",
    "check_compiler",
    "convolve",
    "input_gradient",
    "left_to_pytorch",
    "weight_gradient",
    "winograd_convolutions",
]
