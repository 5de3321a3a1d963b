"""Splits of a data set's cases by patient: no patient is on both sides of one."""

import json
import os
import re
from pathlib import Path

import numpy as np


class SplitError(ValueError):
    """A split that is not possible; the message is one sentence with the numbers and the remedy."""


def patient_of(case, pattern):
    """The patient of a case: the first group of the regular expression `pattern` where it is found in the case's name,
    the whole match where it has no group. SplitError where it is not found, or is no regular expression."""
    try:
        found = re.search(pattern, case)
    except re.error as error:
        raise SplitError(f"--patient_id {pattern!r}: not a regular expression ({error})") from error
    patient = found and found[1 if found.re.groups else 0]
    if not patient:
        raise SplitError(f"--patient_id {pattern!r}: finds no patient in the name of case {case}; change it")
    return patient


def split_by_patient(
    labeled, without_label=(), labelnum=None, unlabeled=None, val=0, test=0, seed=0, patient_id=".+", fixed_test=()
):
    """Share the cases out: {'train', 'val', 'test', 'unlabeled', 'left_out': lists of cases, 'labelnum': int}.

    `labeled`: cases with a label; `without_label`: cases without; `fixed_test`: cases with a label that are for
    testing whatever the seed. `labelnum`, `unlabeled`, `val` and `test` count *patients*: with several cases a patient,
    cases could not be counted exactly. `labelnum` of them are labelled, the next `unlabeled` (None: all others) train
    without their labels. The patients' order is a permutation drawn from `seed` and does not depend on the cases'.

    'train': cases with a label, the labelled patients' first, so that --labelnum of the training scripts, which counts
    cases, takes these with the returned 'labelnum' (of cases; None where none was asked for), and a smaller number
    takes some of them. 'unlabeled': cases without a label, of patients who are not tested or validated on. 'left_out':
    what is in no other list: above the asked numbers, or without a label and of a patient who is tested on.
    """
    everything = [*labeled, *without_label, *fixed_test]
    patients = {case: patient_of(case, patient_id) for case in everything}
    if len(patients) < len(everything):
        raise SplitError("a case is named twice; rename one of them")
    fixed = {patients[case] for case in fixed_test}
    shared = sorted(fixed & {patients[case] for case in labeled})
    if shared:
        both = [case for case in everything if patients[case] == shared[0]]
        raise SplitError(
            f"patient {shared[0]} is to be trained on and tested on (cases {', '.join(both[:4])}); move these cases to "
            f"one side"
        )
    if test and fixed_test:
        raise SplitError(f"--test {test}: the data set has test cases of its own; leave it out")

    own = sorted({patients[case] for case in labeled})
    own = [own[index] for index in np.random.default_rng(seed).permutation(len(own))]
    asked = test + val + (labelnum or 0) + (unlabeled or 0)
    if asked > len(own) or (own and labelnum is None and test + val == len(own)):
        raise SplitError(
            f"--test {test}, --val {val}, --labelnum {labelnum or 0} and --unlabeled {unlabeled or 0} are {asked} "
            f"patients, but {len(own)} have a label, and some must be trained on; ask for fewer"
        )
    test_patients, val_patients, rest = fixed | set(own[:test]), set(own[test : test + val]), own[test + val :]
    if unlabeled is not None:
        rest = rest[: (labelnum or 0) + unlabeled]
    cases_of = {}
    for case in labeled:
        cases_of.setdefault(patients[case], []).append(case)

    split = {
        "train": [case for patient in rest for case in cases_of[patient]],
        "val": [case for case in labeled if patients[case] in val_patients],
        "test": [case for case in (*labeled, *fixed_test) if patients[case] in test_patients],
        "unlabeled": [case for case in without_label if patients[case] not in test_patients | val_patients],
    }
    listed = {case for cases in split.values() for case in cases}
    split["left_out"] = [case for case in everything if case not in listed]
    split["labelnum"] = None if labelnum is None else sum(len(cases_of[patient]) for patient in rest[:labelnum])
    check_split(split, patients)
    return split


def check_split(split, patients):
    """SplitError if a patient is on two sides of `split`: training (with or without label), validation, test."""
    sides = {"train": "training", "unlabeled": "training", "val": "validation", "test": "testing"}
    side_of = {}
    for name, side in sides.items():
        for case in split[name]:
            other = side_of.setdefault(patients[case], side)
            if other != side:
                raise SplitError(f"patient {patients[case]} is on two sides, {other} and {side}: no such split is made")


def write_split(root, split, settings):
    """Write `split` to the folder `root`: a list file for each list that is not empty, and splits.json.

    An old list that the new split does not have is removed, and all are written before any is put into its place.
    `settings`: what the split was made with, for splits.json. SplitError where that cannot be written.
    """
    root = Path(root)
    lists = {f"{name}.list": split[name] for name in ("train", "val", "test", "unlabeled")}
    files = {name: "".join(f"{case}\n" for case in cases) for name, cases in lists.items() if cases}
    files["splits.json"] = json.dumps({**settings, **split}, indent=1)
    try:
        for name, text in files.items():
            with open(root / f".{name}.tmp", "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        for name in lists.keys() - files.keys():
            (root / name).unlink(missing_ok=True)
        for name in files:
            os.replace(root / f".{name}.tmp", root / name)
    except OSError as error:
        raise SplitError(f"{root}: its lists could not be written ({error.strerror or error}); free space") from error


def describe(split):
    """What `split` holds, in a line, and the flag of the training scripts that goes with it."""
    names = (name for name in ("train", "val", "test", "unlabeled") if split[name])
    numbers = ", ".join(f"{len(split[name])} in {name}.list" for name in names)
    left = f", {len(split['left_out'])} left out" * bool(split["left_out"])
    return f"{numbers}{left}" + (f"; train with --labelnum {split['labelnum']}" if split["labelnum"] else "")


def add_split_flags(parser):
    """The flags of `split_by_patient`, as an argument group."""

    def count(text):  # argparse makes "invalid count value" of a ValueError
        if int(text) < 0:
            raise ValueError
        return int(text)

    flag = parser.add_argument_group("split, in patients").add_argument
    flag("--test", type=count, default=0, metavar="N", help="patients to test on (default: 0)")
    flag("--val", type=count, default=0, metavar="N", help="patients to validate on, for --val_list (default: 0)")
    flag("--labelnum", type=count, metavar="N", help="labelled patients, first in train.list (default: not counted)")
    flag("--unlabeled", type=count, metavar="N", help="patients behind them, of unused label (default: all others)")
    flag("--seed", type=count, default=0, help="seed of the patients' order (default: 0)")
    flag(
        "--patient_id", default=".+", metavar="REGEX", help="what of a case's name is the patient (default: all of it)"
    )
    return parser
