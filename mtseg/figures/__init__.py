"""Pictures for papers; `python -m mtseg.figures` is the command."""

# ruff: noqa: F401  what other modules may import from here
from mtseg.figures.budgets import label_curves
from mtseg.figures.canvas import FigureError, render, style
from mtseg.figures.cases import best_median_worst, caption, case_readers, named_folders, pick_for_gallery, score
from mtseg.figures.meshes import distances_to, surface, surfaces
from mtseg.figures.runs import boxes, boxes_of, curves, read_runs
from mtseg.figures.slices import compare, draw_slice, gallery, gallery_of, largest_section, overlay, worst_error
