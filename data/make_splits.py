"""Split a data set by patient: write its train.list, val.list, test.list and unlabeled.list.

    python data/make_splits.py data/Heart --test 4 --val 2 --labelnum 4
    python data/make_splits.py data/Liver --test 20 --labelnum 8 --seed 1 --patient_id '^(\\d+)_' --overwrite
    python data/make_splits.py data/ACDC --test 20 --val 10 --labelnum 7
    python data/make_splits.py data/Steel --test 4 --patient_id '^(spot[0-9]+)_'
    python data/make_splits.py data/Heart --folds 5

A data set is a folder with data/<case>/mri_norm2.h5 or data/<case>.h5, or one with images and masks (images/ and
masks/, nnU-Net's layout; index_images.py takes several such folders and looks into the masks, too). Numbers are of
patients. The order is drawn from --seed; the first --labelnum patients of train.list are the labelled ones. A case
without a label is in unlabeled.list, unless its patient is tested or validated on. Labelled cases that came from an
nnU-Net layout's imagesTs stay the test cases. splits.json says what was asked for and where each case is.

--folds shares the cases of train.list (of the lists that lie there, where nothing else is asked for) out for
cross-validation and writes nnU-Net's splits_final.json. One that lies there is checked and kept.
"""

import sys
from pathlib import Path

import h5py

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for mtseg, installed or not

from mtseg.datasets import read_list, test_cases, training_cases
from mtseg.layouts import IMAGES, find_cases
from mtseg.script.flags import Parser, one_sentence
from mtseg.script.newdata import add_split_flags
from mtseg.splits import (
    FOLDS,
    SplitError,
    check_split,
    describe,
    known_patients,
    make_folds,
    read_folds,
    split_by_patient,
    write_folds,
    write_split,
)


def cases_of(root):
    """(labelled, without a label, labelled and for testing whatever the seed): the case names of the folder `root`."""
    kinds = ([], [], [])
    files = sorted([*root.glob("data/*/mri_norm2.h5"), *root.glob("data/*.h5")])
    for case in [] if files else find_cases(root)[0]:
        if case.images[0].suffix.lower() not in IMAGES:
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


def listed(root, pattern):
    """(the cases of train.list, {case: patient} of all listed cases, their pattern), of lists that lie there; no
    patient is in train.list and in test.list."""
    train, test, unlabeled = training_cases(root), test_cases(root), root / "unlabeled.list"
    cases = [*train, *test, *(read_list(unlabeled) if unlabeled.is_file() else [])]
    patients, pattern = known_patients(root, cases, pattern, needed=True)
    check_split({"train": train, "test": test, "val": [], "unlabeled": []}, patients)
    return train, patients, pattern


def choose_folds(root, patients, count, overwrite):
    """`count` folds of the cases of `patients`: those that lie in `root`, checked, unless `overwrite`, or new ones."""
    if overwrite or not (root / FOLDS).is_file():
        return make_folds(patients, count)
    folds = read_folds(root, patients)
    if len(folds) != count:
        raise SplitError(f"{root / FOLDS}: has {len(folds)} folds already, not {count}; replace it with --overwrite")
    return folds


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("root", type=Path, help="folder of the data set")
    parser.add_argument("--overwrite", action="store_true", help="replace the lists, or folds, that are there")
    parser.add_argument("--folds", type=int, metavar="N", help="write N folds of train.list too, to splits_final.json")
    args = add_split_flags(parser).parse_args(argv)
    asked = {name: getattr(args, name) for name in ("labelnum", "unlabeled", "val", "test", "seed", "patient_id")}
    other_lists = any(value for name, value in asked.items() if name != "patient_id")
    with one_sentence():
        if args.folds is not None and (args.root / "train.list").is_file() and not other_lists:
            split, (train, patients, pattern) = None, listed(args.root, args.patient_id)
        else:
            labeled, without_label, fixed_test = cases_of(args.root)
            split = split_by_patient(labeled, without_label, fixed_test=fixed_test, **asked)
            train, patients = split["train"], {c: name for name, cases in split["patients"].items() for c in cases}
            pattern = split["patient_id"]
        if args.folds is not None:
            folds = choose_folds(args.root, {case: patients[case] for case in train}, args.folds, args.overwrite)
        if split:
            write_split(args.root, split, asked, args.overwrite)
            print(f"{args.root}: {describe(split)}")
        if args.folds is not None:
            write_folds(args.root, folds, patients, pattern)
            sizes = ", ".join(str(len(fold["val"])) for fold in folds)
            print(f"{args.root / FOLDS}: {len(folds)} folds, which test {sizes} cases; train each by --fold 0, 1, ...")
    return split


if __name__ == "__main__":
    main()
