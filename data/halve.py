"""Halve the resolution of a data set, so that a CPU can train on it: 8 voxels become one.

    python data/halve.py data/LA data/LA_half

Images are averaged over blocks of 2 x 2 x 2 voxels (a last odd slice is dropped); a label is kept where at least half
of the block has it, class by class. Lists are copied; 'spacing' is doubled, and what was recorded of the scan that a
case came from is left out.
"""

import shutil
import sys
from pathlib import Path

import h5py
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for mtseg, installed or not

from mtseg.datasets import DataError, read_hdf5
from mtseg.script.flags import Parser, one_sentence
from mtseg.script.newdata import new_folder, write_case


def halve(volume):
    """The mean over blocks of 2 x 2 x 2 of the last three axes, float32."""
    *channels, w, h, d = volume.shape
    w, h, d = w // 2, h // 2, d // 2
    blocks = volume[..., : 2 * w, : 2 * h, : 2 * d].astype(np.float32).reshape(*channels, w, 2, h, 2, d, 2)
    return blocks.mean(axis=(-5, -3, -1))


def halve_label(label):
    """The class that at least half of a block has; background where there is none (or a tie, the higher class)."""
    result = np.zeros([n // 2 for n in label.shape], label.dtype)
    for value in np.unique(label):
        if value:
            result[halve(label == value) >= 0.5] = value
    return result


def halved(path):
    """(data sets, attributes) of the HDF5 file `path`, halved."""
    with h5py.File(path) as whole:
        image, label = (read_hdf5(whole, name) for name in ("image", "label"))
        if image is None or image.ndim not in (3, 4) or min(image.shape[-3:]) < 2:
            raise DataError(f"{path}: has no 'image' of at least 2 x 2 x 2 voxels; make it again or remove the folder")
        arrays = {"image": halve(image[...])} | ({} if label is None else {"label": halve_label(label[...])})
        attributes = {name: value for name, value in whole.attrs.items() if not name.startswith(("grid_", "original_"))}
    if "spacing" in attributes:
        attributes["spacing"] = 2 * attributes["spacing"]
    return arrays, attributes


def halve_all(root, out):
    """Make the new folder `out` of the data set in `root`; returns the number of cases."""
    files = sorted(root.glob("data/*/mri_norm2.h5"))
    if not files:
        raise DataError(f"{root}: no data/<case>/mri_norm2.h5 in it; name another folder")
    with new_folder(out) as folder:
        for path in files:
            write_case(folder, path.parent.name, *halved(path))
        for path in (*root.glob("*.list"), *root.glob("splits*.json"), *root.glob("classes.json")):
            shutil.copy(path, folder)
    return len(files)


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("root", type=Path, help="folder with train.list, test.list and data/")
    parser.add_argument("out", type=Path, help="folder to make")
    args = parser.parse_args(argv)
    with one_sentence():
        print(f"{halve_all(args.root, args.out)} cases in {args.out}")


if __name__ == "__main__":
    main()
