"""Semi-supervised segmentation of medical volumes, in plain modules: import, or copy, the one you need."""

__version__ = "0.1.0"
