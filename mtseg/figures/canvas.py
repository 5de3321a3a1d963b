"""How figures for papers look and become files. Needs Matplotlib: pip install "mtseg[plot]"."""

import contextlib
import io

# 9 points stay legible when a page 7 inches wide is printed at half of that.
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.6,
}
WIDTH = 7.0  # of a figure, in inches
SUFFIXES = (".png", ".pdf", ".svg")


class FigureError(ValueError):
    """A picture that cannot be drawn; the message is one sentence with the file or folder and the remedy."""


@contextlib.contextmanager
def style():
    """A context in which figures have this look and need no display; FigureError where Matplotlib is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise FigureError('pictures need Matplotlib: pip install "mtseg[plot]"') from error
    matplotlib.use("Agg", force=False)
    with matplotlib.rc_context(STYLE):
        yield


def subplots(rows, columns, height, **how):
    """(figure, grid of axes (rows, columns)) of the width that all figures have, `height` inches high."""
    from matplotlib import pyplot as plt

    return plt.subplots(rows, columns, figsize=(WIDTH, height), squeeze=False, layout="constrained", **how)


def render(figure, format="png", dpi=150):
    """The figure as the bytes of a png, pdf or svg file, and closed. A PNG has 256 colours, for a third of the size."""
    from matplotlib import pyplot as plt
    from PIL import Image  # comes with Matplotlib

    content = io.BytesIO()
    try:
        figure.savefig(content, format=format, dpi=dpi, bbox_inches="tight", pad_inches=0.05)
    finally:
        plt.close(figure)
    if format == "png":
        # Of the methods the one that leaves no colour out, however few pixels have it: a legend's patch must match.
        how = {"method": Image.Quantize.MAXCOVERAGE, "kmeans": 3, "dither": Image.Dither.NONE}
        picture = Image.open(content).convert("RGB").quantize(256, **how)
        content = io.BytesIO()
        picture.save(content, "png", optimize=True, dpi=(dpi, dpi))
    return content.getvalue()
