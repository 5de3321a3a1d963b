"""Turn the 2018 Atrial Segmentation Challenge's own folders into the HDF5 layout that the scripts read.

    python data/prepare_la.py "Training Set" data/LA                 # needs pynrrd: pip install pynrrd
    python data/prepare_la.py "Training Set" data/LA --crop margins  # without looking at any label

Reads <folder>/<case>/lgemri.nrrd and laendo.nrrd; writes <out>/data/<case>/mri_norm2.h5 with 'image' (float32, zero
mean and unit variance over the whole scan) and 'label' (uint8), the voxel spacing in millimetres as the attribute
'spacing', and the 80 / 20 split of UA-MT as train.list and test.list.

The default, --crop label, is UA-MT's preprocessing, on which the field's tables are made: along W and H it cuts each
scan to the bounding box of its label, enlarged to 112 voxels and then by a random 10 to 19 on each side; D stays
whole. Mind that this looks at the labels of unlabelled and of test cases too: results on it compare methods, and say
little about whole scans. --crop margins cuts the same share off every scan's borders instead and looks at no label.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for mtseg, installed or not

from mtseg.layouts import LayoutError
from mtseg.script.flags import FlagError, Parser, fraction, natural, one_sentence
from mtseg.script.newdata import new_folder, write_case
from mtseg.volumes import need, read_on_grid, read_volume

SPLITS = Path(__file__).resolve().parent / "splits" / "LA"
PATCH = 112


def label_box(label, rng):
    """UA-MT's crop, as three slices: the label's extent along W and H, enlarged to the patch and by a random margin."""
    box = []
    for axis in (0, 1):
        inside = np.flatnonzero(label.any(axis=(1 - axis, 2)))
        low, high = inside[0], inside[-1]
        widen = max(PATCH - (high - low), 0) // 2
        low = max(low - rng.integers(10, 20) - widen, 0)
        # As in UA-MT's code, the last labelled voxel's index ends the slice, which its margin makes harmless.
        high = min(high + rng.integers(10, 20) + widen, label.shape[axis])
        box.append(slice(int(low), int(high)))
    return (*box, slice(None))


def margin_box(shape, share):
    """The middle of a volume without `share` of its length at each end of W and H; all of D."""
    return (*(slice(int(n * share), n - int(n * share)) for n in shape[:2]), slice(None))


def prepare_case(folder, rng, crop, share):
    """(data sets, attributes) of a case's folder, normalised and cropped."""
    volume = read_volume(folder / "lgemri.nrrd")
    label = (read_on_grid(folder / "laendo.nrrd", volume) > 0).astype(np.uint8)
    if crop == "label" and not label.any():
        raise LayoutError(f"{folder / 'laendo.nrrd'}: the label is empty; use --crop margins")
    box = label_box(label, rng) if crop == "label" else margin_box(label.shape, share)
    image = volume.array
    image = ((image - image.mean()) / max(image.std(), 1e-8)).astype(np.float32)
    return {"image": image[box], "label": label[box]}, {} if volume.spacing is None else {"spacing": volume.spacing}


def prepare(source, out, crop="label", share=0.25, seed=0):
    """Write all cases of `source` to the new folder `out`; returns their names."""
    need("nrrd", f"{source}: reading .nrrd files")
    cases = sorted(path.parent.name for path in source.glob("*/lgemri.nrrd"))
    if not cases:
        raise LayoutError(f"{source}: no <case>/lgemri.nrrd in it; give the challenge's 'Training Set' folder")
    with new_folder(out) as folder:
        for number, case in enumerate(cases):
            arrays, attributes = prepare_case(source / case, np.random.default_rng([seed, number]), crop, share)
            write_case(folder, case, arrays, attributes)
            print(f"{case}: {' x '.join(map(str, arrays['image'].shape))}")
        for name in ("train", "test"):
            listed = [case for case in (SPLITS / f"{name}.list").read_text().split() if case in cases]
            if not listed:
                raise LayoutError(f"{source}: no case of it is in {SPLITS / name}.list; give the challenge's folder")
            (folder / f"{name}.list").write_text("".join(f"{case}\n" for case in listed))
    return cases


def main(argv=None):
    parser = Parser(description=__doc__)
    flag = parser.add_argument
    flag("source", type=Path, help="the challenge's folder, with a folder per case")
    flag("out", type=Path, help="folder to make, e.g. data/LA")
    flag(
        "--crop",
        choices=("label", "margins"),
        default="label",
        help="as UA-MT, around the label, of unlabelled and test cases too; or the margins away, without labels",
    )
    flag("--share", type=fraction, default=0.25, help="with --crop margins: share of W and H cut at each end")
    flag("--seed", type=natural, default=0, help="seed of the random margins of --crop label (default: 0)")
    args = parser.parse_args(argv)
    with one_sentence():
        if args.share >= 0.5:
            raise FlagError(f"--share {args.share}: cut at both ends, nothing would be left; it is below 0.5")
        cases = prepare(args.source, args.out, args.crop, args.share, args.seed)
        print(f"{len(cases)} cases in {args.out}")


if __name__ == "__main__":
    main()
