"""Networks as files for other programs; `python -m mtseg.export` is the command."""

from mtseg.export.convert import (
    ExportError,
    OnnxNet,
    Recorder,
    largest_difference,
    quantize,
    quiet,
    seconds_a_window,
    to_onnx,
    to_torch_export,
    to_torchscript,
)

__all__ = [
    "ExportError",
    "OnnxNet",
    "Recorder",
    "largest_difference",
    "quantize",
    "quiet",
    "seconds_a_window",
    "to_onnx",
    "to_torch_export",
    "to_torchscript",
]
