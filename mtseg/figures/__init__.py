"""Pictures for papers; `python -m mtseg.figures` is the command."""

from mtseg.figures.canvas import STYLE, CanvasError, render, style
from mtseg.figures.cases import CaseError, best_median_worst, case_files, named_folders, pick_for_gallery, read_case
from mtseg.figures.meshes import MeshError, surface, surfaces
from mtseg.figures.runs import PANELS, RunError, boxes, curves, moving_average, read_curves
from mtseg.figures.slices import compare, draw_slice, gallery, largest_section, overlay, worst_error

__all__ = [
    "PANELS",
    "STYLE",
    "CanvasError",
    "CaseError",
    "MeshError",
    "RunError",
    "best_median_worst",
    "boxes",
    "case_files",
    "compare",
    "curves",
    "draw_slice",
    "gallery",
    "largest_section",
    "moving_average",
    "named_folders",
    "overlay",
    "pick_for_gallery",
    "read_case",
    "read_curves",
    "render",
    "style",
    "surface",
    "surfaces",
    "worst_error",
]
