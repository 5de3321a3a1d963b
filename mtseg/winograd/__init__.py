"""3 x 3 x 3 convolutions by Winograd's algorithm, compiled from C when they are asked for."""

# ruff: noqa: F401  what other modules may import from here
from mtseg.winograd.convolutions import WinogradError, check_compiler, left_to_pytorch, winograd_convolutions
