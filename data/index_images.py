"""Look into folders of images and masks, say what is in them, and write an index of them and the lists of a split.

    python data/index_images.py data/UHCS --out data/UHCS/index.json
    python data/index_images.py data/EBC data/Super --out data/both/index.json --test 4 --group '^(\\d+n\\d|[^_]+)'

A ROOT is a data set: a folder with images/ and masks/ (and unlabeled/), nnU-Net's layout, or images with <name>_mask
beside them. Its classes are those of --classes, or of its own classes.json or dataset.json. Every file is read; what is
wrong with any of them is said at once, and then nothing is written.

Ids are names without ending, of several sets <set>__<name>. A split is by group: images of one specimen, patient or
sequence (--group '^(em\\d)' makes one of em10 to em19), and such with equal pixels. Every class and every set comes
into every list where that is possible. Where no split is asked for, the ROOTs' own lists are joined. The lists lie
beside the index, and --root_path of the training scripts is the index, or its folder.
"""

import hashlib
import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for mtseg, installed or not

from mtseg.checkpoint import write_whole
from mtseg.classes import read_classes
from mtseg.datasets import DataError, read_list
from mtseg.image_index import DataSet, ImageIndexError, Index, Sample, name_of
from mtseg.images import ImageError, read_image
from mtseg.layouts import BESIDE, find_cases, masks_without_image
from mtseg.script.flags import Parser, one_sentence
from mtseg.script.newdata import add_split_flags
from mtseg.script.sources import read_label, stacked_size, table_of
from mtseg.splits import (
    EACH,
    cases_of_patients,
    check_split,
    describe,
    known_patients,
    missing_classes,
    split_by_patient,
    write_split,
)

LISTS = ("train", "val", "test", "unlabeled")


def find_samples(roots, args):
    """({set: DataSet}, {set: its ClassTable or None}, Samples as found, ids of those that are for testing whatever the
    seed, sentences on files that do not belong together)."""
    datasets, tables, samples, fixed, problems = {}, {}, [], [], []
    for root in roots:
        if root.is_file():
            raise ImageIndexError(f"{root}: is a file; name the folder of a data set")
        if root.name in datasets:
            raise ImageIndexError(f"{root}: another data set is called {root.name}, too; rename a folder")
        broken = {}
        cases, _ = find_cases(root, broken=broken)
        masks = masks_without_image(root, cases)
        problems += [*broken.values(), *(f"{mask}: a mask without an image; add one or remove it" for mask in masks)]
        table = tables[root.name] = read_classes(args.classes) if args.classes else table_of(root)
        datasets[root.name] = DataSet(root, table and table.to_dict(), args.snap)
        for case in cases:
            if case.label and not table:
                raise ImageIndexError(f"{case.label}: nothing says what its classes are; name a file with --classes")
            name = name_of(case.name, root.name, len(roots) > 1)
            samples.append(Sample(name, root.name, case.images, case.label))
            fixed += [name] if case.part == "Ts" and case.label else []
    return datasets, tables, samples, fixed, problems


def look_into(sample, table, snap):
    """(the Sample with what its files hold, its kind in words, snapped pixels); ImageError or DataError."""
    channels, *shape = stacked_size(sample.images)
    image, pixels, snapped = np.concatenate([read_image(path) for path in sample.images]), None, 0
    if sample.mask:
        numbers, snapped = read_label(sample.mask, shape, table, snap)
        counts = np.bincount(numbers.ravel(), minlength=256)[: len(table.names)]
        pixels = {number: count for number, count in enumerate(counts.tolist()) if count}
    kind = f"{8 * image.itemsize} bit{' float' * (image.dtype.kind == 'f')}, {channels} channel{'s' * (channels > 1)}"
    kind += f", {shape[0]} pages" if len(shape) == 3 else ""
    sha256 = hashlib.sha256(f"{image.dtype.name} {image.shape}".encode() + image.tobytes()).hexdigest()
    return replace(sample, height=shape[-2], width=shape[-1], sha256=sha256, pixels=pixels), kind, snapped


def look_into_all(samples, tables, snap, problems):
    """[(Sample, kind, snapped pixels)] of all that can be used; ImageIndexError where there are `problems`."""
    looked = []
    for sample in tqdm(samples, unit="image", dynamic_ncols=True):
        try:
            looked.append(look_into(sample, tables[sample.dataset], snap))
        except (ImageError, DataError) as error:
            problems.append(str(error))
    if len(problems) > 1:
        print(*problems, sep="\n", file=sys.stderr)
        problems = [f"these {len(problems)} files cannot be used"]
    if problems:
        raise ImageIndexError(f"{problems[0]}; nothing was written")
    return looked


def print_set(name, table, looked):
    """What is in a data set, as a table a person reads."""
    samples, kinds, _ = zip(*looked, strict=True)
    masks = [sample for sample in samples if sample.mask]
    print(f"{name}: {len(samples)} images, {len(masks)} of them with a mask")
    for counts in Counter(f"{sample.height} x {sample.width}" for sample in samples), Counter(kinds):
        more = f", {len(counts) - 4} more" if len(counts) > 4 else ""
        print("  " + ", ".join(f"{what} ({number})" for what, number in counts.most_common(4)) + more)
    every = sum(sum(sample.pixels.values()) for sample in masks)
    for number, label in enumerate(table.names if masks else ()):
        share = 100 * sum(sample.pixels.get(number, 0) for sample in masks) / max(every, 1)
        print(f"  {label:30} {share:7.3f} % of pixels, in {sum(number in sample.pixels for sample in masks)} images")


def joined_lists(roots, samples, several):
    """The lists of the folders `roots` as a split of `samples`, and who their groups are; None where there are none."""
    without = [root for root in roots if not (root / "train.list").is_file()]
    if without == roots:
        return None
    if without:
        raise ImageIndexError(f"{without[0]}: has no train.list as the others; ask for a split of all, as --test 4")
    split, known = {name: [] for name in (*LISTS, "left_out")}, {sample.id for sample in samples}
    for root, name in ((root, name) for root in roots for name in LISTS if (root / f"{name}.list").is_file()):
        for case in read_list(root / f"{name}.list"):
            split[name].append(name_of(case, root.name, several))
            if split[name][-1] not in known:
                raise ImageIndexError(f"{root / name}.list: there is no image of {case}; add it, or remove the line")
    rest = known.difference(*split.values())
    for sample in (sample for sample in samples if sample.id in rest):
        split["left_out" if sample.mask else "unlabeled"].append(sample.id)
    return {**split, "labelnum": None, "patients": cases_of_patients({sample.id: sample.group for sample in samples})}


def groups_of(samples, datasets, pattern, needed):
    """({id: group}, pattern): equal by name, or as a set's own splits.json says, and joined where samples have equal
    images."""
    groups, first, patterns = {}, {}, []
    for dataset in sorted({sample.dataset for sample in samples}):
        names = {s.id: s.id.removeprefix(f"{dataset}__") for s in samples if s.dataset == dataset}
        named, used = known_patients(datasets[dataset].root, names.values(), pattern, needed)
        groups |= {id: name_of(named[name], dataset, len(datasets) > 1) for id, name in names.items()}
        patterns.append(used or EACH)
    for sample in samples:
        group, joined = groups[sample.id], groups[first.setdefault(sample.sha256, sample.id)]
        if group != joined:
            groups = {id: joined if other == group else other for id, other in groups.items()}
    return groups, " and ".join(dict.fromkeys(patterns))


def notes_on(samples, tables, snapped, split, classes_of):
    """What a person should know about an index that is fine, in sentences."""
    place = {id: name for name in LISTS for id in split[name]}
    equal = {}
    for sample in samples:
        equal.setdefault(sample.sha256, []).append(f"{sample.id} ({place.get(sample.id, 'in no list')})")
    yield from (f"the same image: {', '.join(ids)}" for ids in equal.values() if len(ids) > 1)
    if without := [sample.id for sample in samples if not sample.mask]:
        yield f"unlabelled, for want of a mask: {', '.join(without[:4])}{', ...' * (len(without) > 4)} ({len(without)})"
    if len({table.names for table in tables.values() if table}) > 1:
        yield "the sets have different classes, so one network cannot learn them all"
    if any(snapped):
        yield f"{sum(snapped)} pixels in {sum(map(bool, snapped))} masks are taken for the nearest class's"
    yield from (f"{name}.list has no {', '.join(few)}" for name, few in missing_classes(split, classes_of).items())


def index_images(args, asked):
    """Write the index and the lists; see above."""
    if args.out.exists() and not args.overwrite:
        raise ImageIndexError(f"{args.out}: exists already; name another, or replace it with --overwrite")
    roots = [Path(os.path.abspath(root)) for root in args.roots]
    roots = [root.parent if root.name in BESIDE else root for root in roots]
    datasets, tables, found, fixed, problems = find_samples(roots, args)
    looked = look_into_all(found, tables, args.snap, problems)
    for name, table in tables.items():
        print_set(name, table, [entry for entry in looked if entry[0].dataset == name])
    samples, _, snapped = zip(*looked, strict=True)

    if args.out.is_dir():
        raise ImageIndexError(f"{args.out}: is a folder; name a file in it, such as {args.out / 'index.json'}")
    needed = bool(args.test or args.val or args.labelnum is not None or args.unlabeled is not None)
    groups, pattern = groups_of(samples, datasets, args.patient_id, needed or bool(fixed))
    samples = [replace(sample, group=groups[sample.id]) for sample in samples]
    labeled = [sample for sample in samples if sample.mask]
    classes_of = {
        sample.id: {f"set {sample.dataset}", *(tables[sample.dataset].names[number] for number in sample.pixels)}
        for sample in labeled
    }
    split = (None if needed else joined_lists(roots, samples, len(roots) > 1)) or split_by_patient(
        [sample.id for sample in labeled if sample.id not in fixed],
        [sample.id for sample in samples if not sample.mask],
        fixed_test=fixed,
        patients=groups,
        classes_of=classes_of,
        **{**asked, "patient_id": pattern},
    )
    split["patient_id"] = pattern
    if args.patient_id:  # of which lists that were there may know nothing
        check_split(split, groups)
    index = Index(args.out, datasets, samples)
    for note in notes_on(samples, tables, snapped, split, classes_of):
        print(f"note: {note}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_split(args.out.parent, split, asked, args.overwrite)
    write_whole(args.out, index.to_json().encode())
    print(f"{len(samples)} images in {args.out}: {describe(split)}")


def main(argv=None):
    parser = Parser(description=__doc__)
    flag = parser.add_argument
    flag("roots", type=Path, nargs="+", metavar="ROOT", help="folder of a data set")
    flag("--out", type=Path, required=True, metavar="FILE", help="index to write, e.g. data/steel/index.json")
    flag("--classes", type=Path, metavar="FILE", help="classes.json for all sets (default: that of each ROOT)")
    flag("--snap", action="store_true", help="take values and colours that are no class's for the nearest class's")
    flag("--overwrite", action="store_true", help="replace the index and the lists that are there")
    args = add_split_flags(parser).parse_args(argv)
    with one_sentence():
        asked = ("labelnum", "unlabeled", "val", "test", "seed", "patient_id")
        index_images(args, {name: getattr(args, name) for name in asked})


if __name__ == "__main__":
    main()
