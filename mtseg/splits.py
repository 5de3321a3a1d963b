"""Splits of a data set's cases by patient: no patient, or of images no specimen or sequence, is on both sides.

One split into lists (train.list, ...), or folds for cross-validation in the file of nnU-Net, splits_final.json.
"""

import contextlib
import itertools
import json
import os
import re
from pathlib import Path

import numpy as np

EACH = ".+"  # the pattern by which every case is a patient
# Names that say who the patient is. BraTS since 2023: BraTS-GLI-00005-001 is the second time point of 00005; BIDS:
# sub-07_ses-2; ACDC: patient001_frame12.
CONVENTIONS = (r"^(BraTS-[A-Za-z]+-\d+)-\d+$", r"^(sub-[A-Za-z0-9]+)(?:_|$)", r"^(patient\d+)_frame\d+$")
FOLDS = "splits_final.json"
LAST_PART = r"^(.+)[_-][A-Za-z0-9]+$"  # the patient is what stands before the last part: p07_2, 012-left
FIRST_PART = "^[^_-]+"  # or what stands before all others: p07_left_2


class SplitError(ValueError):
    """A split that is not possible; the message is one sentence with the numbers and the remedy."""


def patient_of(case, pattern):
    """The patient of a case: the first group of the regular expression `pattern` where it is found in the case's name,
    the whole match where it has no group. SplitError where it is not found, or is no regular expression."""
    try:
        match = re.search(pattern, case)
    except re.error as error:
        raise SplitError(f"--patient_id {pattern!r}: not a regular expression ({error})") from error
    patient = match and match[1 if match.re.groups else 0]
    if not patient:
        raise SplitError(f"--patient_id {pattern!r}: finds no patient in the name of case {case}; change it")
    return patient


def recognise_patients(cases, sure=True):
    """The pattern for `patient_of` that the names of all `cases` suggest; None where they do not tell.

    One of CONVENTIONS; or EACH, where no two names differ in their last part alone (la_003 and liver_7), or all do, for
    then the last part is the patient (la_003 and la_004; nnU-Net's names, BraTS2021_00005); or LAST_PART, where what
    stands before it ends in a number wherever it is repeated (p07_1 and p07_2, beside p08_1). Of Healthy_1, Healthy_2
    and Sick_1 nobody knows, nor, to be `sure`, of p07_1_1, p07_1_2 and p07_2_1.
    """
    for pattern in CONVENTIONS:
        if all(re.search(pattern, case) for case in cases):
            return pattern
    series = _series(cases)
    repeated = [name for name, members in series.items() if len(members) > 1]
    if not repeated or len(series) == 1:
        return EACH
    numbered = all(name[-1].isdigit() for name in repeated) and all(re.search(LAST_PART, case) for case in cases)
    return LAST_PART if numbered and not (sure and recognise_patients([*series]) != EACH) else None


def patients_of(cases, pattern=None, needed=True):
    """({case: patient}, pattern): by `pattern`, else by that of `recognise_patients`. Where the names do not tell it,
    SplitError, or with `needed` False every case is a patient, and the pattern None."""
    pattern = pattern or recognise_patients(cases, sure=needed)
    if pattern is None and needed:
        one, other = next(members[:2] for members in _series(cases).values() if len(members) > 1)
        ways = {patient_of(one, pattern): pattern for pattern in (FIRST_PART, LAST_PART)}  # often the same
        ways = [f"--patient_id '{pattern}' (both are of {name})" for name, pattern in ways.items()]
        how = " or ".join([*ways, f"--patient_id '{EACH}' (every case is of another patient)"])
        raise SplitError(f"the names do not tell whether {one} and {other} are of one patient; say it by {how}")
    return {case: patient_of(case, pattern or EACH) for case in cases}, pattern


def known_patients(root, cases, pattern=None, needed=False):
    """({case: patient} of `cases` and others, pattern): by `pattern`; else as <root>/splits.json has them, and a case
    that it does not name by the pattern with which it was made, or by that which all their names suggest."""
    record = {"patients": {}} if pattern else _record(root)
    known, made_by = record["patients"], record.get("patient_id")
    for case in cases:
        if case not in known and made_by:
            with contextlib.suppress(SplitError, TypeError):  # where its name has another form
                known[case] = patient_of(case, made_by)
    others = [case for case in cases if case not in known]
    named, found = patients_of(others, pattern or recognise_patients([*known, *others], sure=needed), needed)
    return named | known, pattern or made_by or found


def _record(root):
    """What <root>/splits.json holds, with 'patients' turned into {case: patient}; nobody is one where it is missing."""
    path = Path(root) / "splits.json"
    try:
        record = json.loads(path.read_text("utf-8")) if path.exists() else {}
        said = record.get("patient_id", "") is not None
        cases_of = record.get("patients", {}) if said else {}
        return {**record, "patients": {str(case): patient for patient, cases in cases_of.items() for case in cases}}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        says = "does not say which cases are of which patient"
        raise SplitError(f"{path}: {says} ({error}); make it again, or move it away") from error


def _series(cases):
    """{what stands before the last part of a name: the cases called so}."""
    series = {}
    for case in cases:
        match = re.search(LAST_PART, case)
        series.setdefault(match[1] if match else case, []).append(case)
    return series


def split_by_patient(
    labeled,
    without_label=(),
    labelnum=None,
    unlabeled=None,
    val=0,
    test=0,
    seed=0,
    patient_id=None,
    fixed_test=(),
    patients=None,
    classes_of=None,
):
    """Share the cases out: {'train', 'val', 'test', 'unlabeled', 'left_out': lists of cases, 'labelnum': int, ...}.

    `labeled`: cases with a label; `without_label`: cases without; `fixed_test`: cases with a label that are for
    testing whatever the seed. `labelnum`, `unlabeled`, `val` and `test` count *patients*: with several cases a patient,
    cases could not be counted exactly. `labelnum` of them are labelled, the next `unlabeled` (None: all others) train
    without their labels. The patients' order is drawn from `seed` and does not depend on the cases'.

    'train': cases with a label, the labelled patients' first: the returned 'labelnum' (of cases) is --labelnum of the
    training scripts. 'unlabeled': cases without a label, of patients who are not tested or validated on. 'left_out':
    all others. `patient_id`: the pattern of `patient_of`, else that of `recognise_patients`; SplitError where the names
    do not tell it and the split depends on it. `patients`: {case: patient}, in place of a pattern.

    `classes_of`: {case: set of classes}. Patients then change places so that each class is among the labelled (without
    `labelnum`: the trained), the tested and the validated cases, in this order where too few patients have it.
    """
    everything = [*labeled, *without_label, *fixed_test]
    if patients is None:
        needed = bool(labelnum or unlabeled or val or test or fixed_test)
        patients, patient_id = patients_of(everything, patient_id, needed)
    if len(patients) < len(everything):
        raise SplitError("a case is named twice; rename one of them")
    fixed = {patients[case] for case in fixed_test}
    shared = sorted(fixed & {patients[case] for case in labeled})
    if shared:
        both = [case for case in everything if patients[case] == shared[0]]
        cases = ", ".join(both[:4])
        raise SplitError(f"patient {shared[0]} is both trained and tested on (cases {cases}); move them to one side")
    if test and fixed_test:
        raise SplitError(f"--test {test}: the data set has test cases of its own; leave it out")

    cases_of = {}
    for case in labeled:
        cases_of.setdefault(patients[case], []).append(case)
    order = sorted(cases_of)
    rng = np.random.default_rng(seed)
    order = [order[index] for index in rng.permutation(len(order))]
    asked = test + val + (labelnum or 0) + (unlabeled or 0)
    if asked > len(order) or (order and labelnum is None and test + val == len(order)):
        sums = f"--test {test}, --val {val}, --labelnum {labelnum or 0} and --unlabeled {unlabeled or 0} are {asked}"
        held = f"{len(order)} have a label (by --patient_id {patient_id!r})"
        raise SplitError(f"{sums} patients, but {held}, and some must be trained on; ask for fewer")
    if classes_of is not None:
        held = {patient: set().union(*map(classes_of.get, cases)) for patient, cases in cases_of.items()}
        order = _spread(order, (test, val, labelnum or len(order) - test - val), held, rng)
    test_patients, val_patients = fixed | set(order[:test]), set(order[test : test + val])
    rest = order[test + val :]
    if unlabeled is not None:
        rest = rest[: (labelnum or 0) + unlabeled]
    split = {
        "train": [case for patient in rest for case in cases_of[patient]],
        "val": [case for case in labeled if patients[case] in val_patients],
        "test": [case for case in (*labeled, *fixed_test) if patients[case] in test_patients],
        "unlabeled": [case for case in without_label if patients[case] not in test_patients | val_patients],
    }
    listed = {case for cases in split.values() for case in cases}
    split["left_out"] = [case for case in everything if case not in listed]
    split["labelnum"] = None if labelnum is None else sum(len(cases_of[patient]) for patient in rest[:labelnum])
    split["patient_id"] = patient_id
    split["patients"] = cases_of_patients({case: patients[case] for case in everything})
    check_split(split, patients)
    return split


def cases_of_patients(patients):
    """{patient: [cases]} of {case: patient}."""
    cases = {}
    for case in sorted(patients):
        cases.setdefault(patients[case], []).append(case)
    return cases


def _spread(order, sizes, held, rng):
    """`order`, changed where its parts of `sizes` (test, validation, labelled) lack classes that others have.

    `held`: {patient: set of classes}. Patients change places as long as that makes the parts lack less. Where that ends
    too early, it begins again from another order, drawn from `rng`.
    """
    every = set().union(*held.values())
    ranges = itertools.starmap(range, itertools.pairwise(np.cumsum((0, *sizes)).tolist()))
    parts = {part: weight for part, weight in zip(ranges, (101, 100, 102), strict=True) if part}

    def lacking(order, part):
        return every.difference(*(held[order[place]] for place in part))

    def cost(order):  # nearly the number of classes that parts lack: the labelled part comes first, then the test's
        return sum(weight * len(lacking(order, part)) for part, weight in parts.items())

    def improved(order):
        for part in parts:
            lack = lacking(order, part)
            bring = [there for there in range(len(order)) if there not in part and held[order[there]] & lack]
            for here, there in itertools.product(part, bring):
                other = list(order)
                other[here], other[there] = other[there], other[here]
                if cost(other) < cost(order):
                    return other
        return None

    best = order
    for _ in range(20):
        while better := improved(order):
            order = better
        best = min(best, order, key=cost)
        if cost(best) == 0:
            break
        order = [order[index] for index in rng.permutation(len(order))]
    return best


def missing_classes(split, classes_of):
    """{list: classes that no case of it has, but one of another list}; 'train' means the labelled cases.

    `split`: as from split_by_patient. `classes_of`: {case: set of classes}.
    """
    held = {"train": split["train"][: split["labelnum"]], "val": split["val"], "test": split["test"]}
    held = {name: [classes_of.get(case, ()) for case in cases] for name, cases in held.items() if cases}
    every = set().union(*itertools.chain(*held.values()))
    lacking = {name: sorted(every.difference(*classes)) for name, classes in held.items()}
    return {name: classes for name, classes in lacking.items() if classes}


def check_split(split, patients):
    """SplitError if a patient is on two sides of `split`: training (with or without label), validation, test."""
    sides = {"train": "training", "unlabeled": "training", "val": "validation", "test": "testing"}
    side_of = {}
    for name, side in sides.items():
        for case in split[name]:
            other = side_of.setdefault(patients[case], side)
            if other != side:
                raise SplitError(f"patient {patients[case]} is on two sides, {other} and {side}: no such split is made")


def make_folds(patients, count=5):
    """`count` folds of the cases of `patients`, {case: patient}: a list of {'train': cases, 'val': cases}, by name.

    Each patient is in one 'val'. Where every case is a patient they are nnU-Net's: those of scikit-learn's KFold with
    shuffle=True and random_state=12345 over the sorted names.
    """
    order = list(dict.fromkeys(patients[case] for case in sorted(patients)))
    if not 1 < count <= len(order):
        raise SplitError(f"--folds {count}: there are {len(order)} patients to train on; take from 2 to so many folds")
    shuffled = np.random.RandomState(12345).permutation(len(order))
    parts = [{order[index] for index in part} for part in np.array_split(shuffled, count)]
    cases = sorted(patients)
    return [
        {side: [case for case in cases if (patients[case] in part) == (side == "val")] for side in ("train", "val")}
        for part in parts
    ]


def read_folds(root, patients):
    """The folds in <root>/splits_final.json, of the cases of `patients`, {case: patient}.

    SplitError where there is no such file, where a fold names another case, or a case or patient of its 'val' in its
    'train' too, and where two folds validate on one case.
    """
    path, fold_of = Path(root) / FOLDS, {}
    try:
        folds = [{side: fold[side] for side in ("train", "val")} for fold in json.loads(path.read_text("utf-8"))]
        sides = [cases for fold in folds for cases in fold.values()]
        if not folds or not all(isinstance(cases, list) and {*map(type, cases)} == {str} for cases in sides):
            raise ValueError("a side is no list of names")
    except FileNotFoundError as error:
        raise SplitError(f"{path}: no such file; make it with data/make_splits.py {root} --folds 5") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SplitError(f"{path}: no list of folds, {{'train': names, 'val': names}} each; make it again") from error
    for number, fold in enumerate(folds):
        unknown = next((case for cases in fold.values() for case in cases if case not in patients), None)
        if unknown is not None:
            raise SplitError(f"{path}: fold {number} names case {unknown}, which is not in train.list; take it out")
        held = {patients[case]: case for case in fold["val"]}
        shared = next((case for case in fold["train"] if patients[case] in held), None)
        if shared is not None:
            who = f"patient {patients[shared]} (case {shared} and case {held[patients[shared]]})"
            raise SplitError(f"{path}: fold {number} trains and validates on {who}; make it again by patient")
        for case in fold["val"]:
            if case in fold_of:
                raise SplitError(
                    f"{path}: case {case} is validated on by fold {fold_of[case]} and by {number}; take one out"
                )
            fold_of[case] = number
    return folds


def write_folds(root, folds, patients, pattern):
    """Write `folds` to <root>/splits_final.json, and to splits.json which cases are of one of the `patients`, whom the
    `pattern` names."""
    record = _record(root) | {"patients": cases_of_patients(patients), "patient_id": pattern}
    _write(Path(root), {FOLDS: json.dumps(folds, indent=4), "splits.json": json.dumps(record, indent=1)})


def write_split(root, split, settings, overwrite=True):
    """Write `split` to the folder `root`: a list file for each list that is not empty, and splits.json.

    An old list that the new split does not have is removed, and all are written before any is put into its place.
    `settings`: what the split was made with, for splits.json. SplitError where that cannot be written, and where lists
    would change with `overwrite` False.
    """
    root = Path(root)
    lists = {f"{name}.list": split[name] for name in ("train", "val", "test", "unlabeled")}
    files = {name: "".join(f"{case}\n" for case in cases) for name, cases in lists.items() if cases}
    old = {name: (root / name).read_text("utf-8", "replace") for name in lists if (root / name).is_file()}
    changed = [name for name, text in old.items() if text.splitlines() != files.get(name, "").splitlines()]
    if changed and not overwrite:
        raise SplitError(f"{root}: has another {', '.join(changed)} already; replace with --overwrite")
    files["splits.json"] = json.dumps({**settings, **split}, indent=1)
    _write(root, files, lists.keys() - files.keys())


def _write(root, files, gone=()):
    """Put `files`, {name: text}, into their places in `root` once all are written, and take away those of `gone`."""
    try:
        for name, text in files.items():
            with open(root / f".{name}.tmp", "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        for name in gone:
            (root / name).unlink(missing_ok=True)
        for name in files:
            os.replace(root / f".{name}.tmp", root / name)
    except OSError as error:
        raise SplitError(f"{root}: its lists could not be written ({error.strerror or error}); free space") from error
    finally:
        for name in files:
            (root / f".{name}.tmp").unlink(missing_ok=True)


def describe(split):
    """In a line: what `split` holds, who its patients are, and the flag of the training scripts that goes with it."""
    names = [name for name in ("train", "val", "test", "unlabeled") if split[name]]
    parts = [", ".join(f"{len(split[name])} in {name}.list" for name in names)]
    if split["left_out"]:
        parts[0] += f", {len(split['left_out'])} left out"
    patients, cases = split["patients"], sum(map(len, split["patients"].values()))
    if len(patients) == cases > 0:
        parts.append("every case is taken for another patient (--patient_id changes that)")
    elif cases:
        patient = max(patients, key=lambda name: len(patients[name]))
        example = f"{patient} has {', '.join(patients[patient][:4])}"
        parts.append(f"{len(patients)} patients in {cases} cases by --patient_id '{split['patient_id']}': {example}")
    if split["labelnum"]:
        parts.append(f"train with --labelnum {split['labelnum']}")
    return "; ".join(parts)
