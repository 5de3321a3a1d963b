"""Split a data set by patient: write its train.list, val.list, test.list and unlabeled.list.

    python data/make_splits.py data/Heart --test 4 --val 2 --labelnum 4
    python data/make_splits.py data/Liver --test 20 --labelnum 8 --seed 1 --patient_id '^(\\d+)_' --overwrite
    python data/make_splits.py data/ACDC --test 20 --val 10 --labelnum 7
    python data/make_splits.py data/Steel --test 4 --patient_id '^(spot[0-9]+)_'

A data set is a folder with data/<case>/mri_norm2.h5 or data/<case>.h5, or one with images and masks (images/ and
masks/, nnU-Net's layout; index_images.py takes several such folders and looks into the masks, too). Numbers are of
patients. The order is drawn from --seed; the first --labelnum patients of train.list are the labelled ones. A case
without a label is in unlabeled.list, unless its patient is tested or validated on. Labelled cases that came from an
nnU-Net layout's imagesTs stay the test cases. splits.json says what was asked for and where each case is.
"""

import sys
from pathlib import Path

import h5py

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for mtseg, installed or not

from mtseg.layouts import find_cases
from mtseg.script.flags import Parser, one_sentence
from mtseg.splits import SplitError, add_split_flags, describe, split_by_patient, write_split


def cases_of(root):
    """(labelled, without a label, labelled and for testing whatever the seed): the case names of the folder `root`."""
    kinds = ([], [], [])
    files = sorted([*root.glob("data/*/mri_norm2.h5"), *root.glob("data/*.h5")])
    for case in [] if files else find_cases(root)[0]:
        if case.images[0].suffix.lower() not in (".png", ".tif", ".tiff"):
            raise SplitError(f"{case.images[0]}: is no image; prepare volumes first, with prepare_nifti.py")
        kinds[1 if case.label is None else 2 if case.part == "Ts" else 0].append(case.name)
    for path in files:
        try:
            with h5py.File(path, "r") as file:
                kind = 1 if "label" not in list(file) else 2 if file.attrs.get("fixed_test", False) else 0
        except (OSError, RuntimeError) as error:
            raise SplitError(f"{path}: not a whole HDF5 file ({error}); make or copy it again") from error
        kinds[kind].append(path.parent.name if path.name == "mri_norm2.h5" else path.stem)
    return kinds


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("root", type=Path, help="folder of the data set")
    parser.add_argument("--overwrite", action="store_true", help="replace the lists that are there")
    args = add_split_flags(parser).parse_args(argv)
    asked = {name: getattr(args, name) for name in ("labelnum", "unlabeled", "val", "test", "seed", "patient_id")}
    with one_sentence():
        labeled, without_label, fixed_test = cases_of(args.root)
        split = split_by_patient(labeled, without_label, fixed_test=fixed_test, **asked)
        write_split(args.root, split, asked, args.overwrite)
        print(f"{args.root}: {describe(split)}")
    return split


if __name__ == "__main__":
    main()
