"""Split a prepared data set by patient: write its train.list, val.list, test.list and unlabeled.list.

    python data/make_splits.py data/Heart --test 4 --val 2 --labelnum 4
    python data/make_splits.py data/Liver --test 20 --labelnum 8 --seed 1 --patient_id '^(\\d+)_' --overwrite

Numbers are of patients. The order is drawn from --seed; the first --labelnum patients of train.list are the labelled
ones. A case without a label is in unlabeled.list, unless its patient is tested or validated on. Labelled cases that
came from an nnU-Net layout's imagesTs stay the test cases. splits.json says what was asked for and where each case is.
"""

import sys
from pathlib import Path

import h5py

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for mtseg, installed or not

from mtseg.script.flags import Parser, one_sentence
from mtseg.splits import SplitError, add_split_flags, describe, split_by_patient, write_split


def cases_of(root):
    """(labelled, without a label, labelled and for testing whatever the seed): the case names in `<root>/data`."""
    kinds = ([], [], [])
    for path in sorted(root.glob("data/*/mri_norm2.h5")):
        try:
            with h5py.File(path, "r") as file:
                kind = 1 if "label" not in list(file) else 2 if file.attrs.get("fixed_test", False) else 0
        except (OSError, RuntimeError) as error:
            raise SplitError(f"{path}: not a whole HDF5 file ({error}); make or copy it again") from error
        kinds[kind].append(path.parent.name)
    if not any(kinds):
        raise SplitError(f"{root}: no data/<case>/mri_norm2.h5 in it; give the folder of a prepared data set")
    return kinds


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("root", type=Path, help="folder with data/<case>/mri_norm2.h5")
    parser.add_argument("--overwrite", action="store_true", help="replace the lists that are there")
    args = add_split_flags(parser).parse_args(argv)
    asked = {name: getattr(args, name) for name in ("labelnum", "unlabeled", "val", "test", "seed", "patient_id")}
    with one_sentence():
        labeled, without_label, fixed_test = cases_of(args.root)
        split = split_by_patient(labeled, without_label, fixed_test=fixed_test, **asked)
        lists = sorted(path.name for path in args.root.glob("*.list"))
        if lists and not args.overwrite:
            raise SplitError(f"{args.root}: has {', '.join(lists)} already; replace them with --overwrite")
        write_split(args.root, split, asked)
        print(f"{args.root}: {describe(split)}")
    return split


if __name__ == "__main__":
    main()
