"""Pictures for papers; `python -m mtseg.figures` is the command."""

from mtseg.figures.canvas import STYLE, CanvasError, render, style
from mtseg.figures.cases import (
    CaseError,
    best_median_worst,
    caption,
    case_readers,
    named_folders,
    pick_for_gallery,
    read_case,
    score,
)
from mtseg.figures.meshes import MeshError, surface, surfaces
from mtseg.figures.runs import RunError, boxes, boxes_of, curves, find_runs, read_runs
from mtseg.figures.slices import compare, draw_slice, gallery, gallery_of, largest_section, overlay, worst_error

__all__ = [
    "STYLE",
    "CanvasError",
    "CaseError",
    "MeshError",
    "RunError",
    "best_median_worst",
    "boxes",
    "boxes_of",
    "caption",
    "case_readers",
    "compare",
    "curves",
    "draw_slice",
    "find_runs",
    "gallery",
    "gallery_of",
    "largest_section",
    "named_folders",
    "overlay",
    "pick_for_gallery",
    "read_case",
    "read_runs",
    "render",
    "score",
    "style",
    "surface",
    "surfaces",
    "worst_error",
]
