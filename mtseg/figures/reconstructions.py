"""What a network of recipes/pretrain_masked.py makes of hidden blocks, and its losses. Needs Matplotlib."""

from pathlib import Path

import numpy as np
import torch

from mtseg.checkpoint import load_checkpoint, load_weights
from mtseg.datasets import DataError
from mtseg.figures.canvas import WIDTH, FigureError
from mtseg.masking import Reconstructor, corrupted
from mtseg.script import flags, methods
from mtseg.script.build import new_network
from mtseg.script.data import held_out_patches
from mtseg.script.progress import BLUE, ORANGE, literal, moving_average, read_columns, thinned
from mtseg.script.sources import Source

SHOWN = 3  # cases, where none is named
COLUMNS = ("image", "what the network sees", "reconstruction", "error")


def reconstructions(folder, case=None):
    """Image, what the network sees of it, its reconstruction and the error of a few patches of the run in `folder`, and
    the course of its losses. `case`: a name; by default the first of --val_list, or else of the training cases. Of the
    former these are patches that the held-out loss is measured on, of a stack one in its middle.

    Where blocks are hidden, the reconstruction is shown in these, and the image elsewhere. Of a volume the middle slice
    is drawn, of several channels the first. The error is that of the loss, its root in units of the image's deviation.
    """
    config = flags.read_config(Path(folder) / "config.json")
    if "pretext" not in config:
        raise FigureError(f"{folder}: not the folder of a run of recipes/pretrain_masked.py; give one")
    parser = methods.parser_of(flags.HOME / "recipes/pretrain_masked.py")
    args = flags.parse(parser, ["--config", Path(folder) / "config.json"])
    net = new_network(args, config["n_channels"], config["n_channels"])
    # The state of the last iteration: in iter_<N>.pth batch norm's statistics are those of whole images.
    state = load_checkpoint(Path(folder) / "latest.pth")
    load_weights(net, {"state_dict": state["model"]}, Path(folder) / "latest.pth")
    net = Reconstructor(net, args.pretext != "autoencoder", args.sparse, args.mask_block)
    if args.sparse:
        net.tokens.load_state_dict(state["tokens"])
    cases = [case] if case else (config["val_cases"] or config["train_cases"])[:SHOWN]
    try:
        source = Source(args.root_path)
        patches = held_out_patches(args, source, source.dataset(args, cases, labelnum=0))[1::2]
    except DataError as error:
        raise FigureError(str(error)) from error
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        seen, hidden = corrupted(patches, args.pretext, args.mask_block, args.mask_ratio)
        output = net.eval()(seen)
    output = output if hidden is None else torch.where(hidden, output, patches)
    error = (output - patches).square().mean(1, keepdim=True).sqrt()
    shown = [tensor[:, 0].numpy() for tensor in (patches, seen, output, error)]
    if args.dims == 3:
        shown = [array[..., array.shape[-1] // 2].swapaxes(1, 2) for array in shown]
    return draw(cases, shown, folder)


def draw(cases, columns, folder):
    """The figure: a row for each case with one of `columns`, arrays (N, H, W), after the other, and one of losses."""
    from matplotlib import pyplot as plt

    rows, side = len(cases), WIDTH / len(columns)
    figure = plt.figure(figsize=(WIDTH, side * rows + 2.0), layout="constrained")
    grid = figure.add_gridspec(rows + 1, len(columns), height_ratios=[*[side] * rows, 2.0])
    low, high = np.percentile(columns[0], [1, 99.5])
    grey, hot = {"cmap": "gray", "vmin": low, "vmax": high}, {"cmap": "magma", "vmin": 0, "vmax": 2}
    for row, case in enumerate(cases):
        for column, (title, array) in enumerate(zip(COLUMNS, columns, strict=True)):
            axes = figure.add_subplot(grid[row, column])
            drawn = axes.imshow(array[row], **(hot if title == "error" else grey))
            axes.set(xticks=[], yticks=[], title=title if row == 0 else "")
            axes.spines[:].set_visible(False)
            if column == 0:
                axes.set_ylabel(literal(case), fontsize=7)
        figure.colorbar(drawn, ax=axes, shrink=0.8)
    axes, (found, _) = figure.add_subplot(grid[rows, :]), read_columns(Path(folder) / "metrics.csv")
    for name, style in {"loss": {"color": BLUE}, "held_out_loss": {"color": ORANGE, "marker": "o"}}.items():
        if name in found:
            iterations, values = map(np.asarray, found[name])
            smooth = moving_average(values, max(len(values) // 50, 1))
            axes.plot(*thinned(iterations, smooth), label=name.replace("_", "-", 1).replace("_", " "), **style)
    axes.set(xlabel="iteration", ylabel="squared error", ylim=(0, None))
    axes.legend()
    return figure
