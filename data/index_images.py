"""Look into folders of images and masks, say what is in them, and write an index of them and the lists of a split.

    python data/index_images.py data/UHCS --out data/UHCS/index.json
    python data/index_images.py data/EBC data/Super --out data/both/index.json --test 4 --group '^(\\d+n\\d|[^_]+)'
    python data/index_images.py SRPU-Model/json/master_labeled_dataset.json --classes c.json --out data/srpu/index.json

A ROOT is a data set: a folder with images/ and masks/ (and unlabeled/), nnU-Net's layout, images with <name>_mask
beside them, or an index, also one of SRPU-Model. Its classes are those of --classes, or of its own classes.json or
dataset.json. Every file is read; what is wrong with any of them is said at once, and then nothing is written.

Ids are names without ending, of several sets <set>__<name>. A split counts groups: images of one specimen, patient or
sequence (--group '^(em\\d)' makes one of em10 to em19), and such with equal pixels or with a frame in common. Every
class and every set comes into every list where that is possible. Where no split is asked for, the ROOTs' own lists are
joined. The lists lie beside the index, and --root_path of the training scripts is the index, or its folder.
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
from mtseg.classes import ClassError, ClassTable, read_classes, to_index
from mtseg.datasets import read_list
from mtseg.image_index import DataSet, ImageIndexError, Index, Sample, name_of, read_index
from mtseg.images import ImageError, read_image, read_mask
from mtseg.layouts import BESIDE, find_cases, masks_without_image
from mtseg.script.flags import Parser, one_sentence
from mtseg.splits import add_split_flags, describe, missing_classes, patients_of, split_by_patient, write_split

LISTS = ("train", "val", "test", "unlabeled")


def find_samples(root, args, several, problems):
    """({set: DataSet}, its Samples as found, ids of those that are for testing whatever the seed) of a ROOT."""
    classes = args.classes and read_classes(args.classes).to_dict()
    if root.is_file():
        index = read_index(root, classes)
        sets = {name: data._replace(snap=args.snap or data.snap) for name, data in index.datasets.items()}
        return sets, index.samples, []
    broken = {}
    cases, _ = find_cases(root, broken=broken)
    problems += broken.values()
    problems += [f"{mask}: a mask without an image; add one or remove it" for mask in masks_without_image(root, cases)]
    described = next((root / name for name in ("classes.json", "dataset.json") if (root / name).is_file()), None)
    if described and not classes:
        classes = read_classes(described).to_dict()
    samples = [Sample(name_of(case.name, root.name, several), root.name, case.images, case.label) for case in cases]
    fixed = [sample.id for sample, case in zip(samples, cases, strict=True) if case.part == "Ts" and case.label]
    return {root.name: DataSet(root, classes, args.snap)}, samples, fixed


def look_into(sample, table, snap):
    """(the Sample with what its files hold, its kind in words, snapped pixels); ImageError or ClassError."""
    images = [read_image(path) for path in sample.images]
    image, pixels, snapped = images[len(images) // 2], None, 0
    if len({other.shape[1:] for other in images}) > 1:
        raise ImageError(f"{sample.images[0]}: the files of sample {sample.id} differ in size; cut them alike")
    if sample.mask:
        try:
            numbers, snapped = to_index(read_mask(sample.mask), table, snap)
        except ClassError as error:
            raise ClassError(f"{sample.mask}: {error}") from error
        if numbers.shape != image.shape[1:]:
            mask, size = (" x ".join(map(str, shape)) for shape in (numbers.shape, image.shape[1:]))
            raise ImageError(f"{sample.mask}: is {mask}, its image {size}; cut them alike")
        counts = np.bincount(numbers.ravel(), minlength=256)[: len(table.names)]
        pixels = {number: count for number, count in enumerate(counts.tolist()) if count}
    channels = sum(map(len, images))
    kind = f"{8 * image.itemsize} bit{' float' * (image.dtype.kind == 'f')}, {channels} channel{'s' * (channels > 1)}"
    kind += f", {image.shape[1]} pages" if image.ndim == 4 else ""
    sha256 = hashlib.sha256(f"{image.dtype.name} {image.shape}".encode() + image.tobytes()).hexdigest()
    height, width = image.shape[-2:]
    return replace(sample, height=height, width=width, sha256=sha256, pixels=pixels), kind, snapped


def look_into_all(found, tables, datasets, problems):
    """[(Sample, kind, snapped pixels)] of all that can be used; ImageIndexError where there are `problems`."""
    looked = []
    for sample in tqdm(found, unit="image", dynamic_ncols=True):
        try:
            looked.append(look_into(sample, tables[sample.dataset], datasets[sample.dataset].snap))
        except (ImageError, ClassError) as error:
            problems.append(str(error))
    if len(problems) > 1:
        print(*problems, sep="\n", file=sys.stderr)
        problems = [f"these {len(problems)} files cannot be used"]
    if problems:
        raise ImageIndexError(f"{problems[0]}; nothing was written")
    return looked


def print_set(name, table, samples, kinds):
    """What is in a data set, as a table a person reads."""
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
    """The lists of the folders `roots` as a split of `samples`; None where there are none."""
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
    return {**split, "labelnum": None, "patients": {}}


def groups_of(samples, pattern, needed):
    """({id: group}, pattern): equal by name, and joined where samples have equal images or a file in common."""
    above, named, patterns = {}, {}, {}

    def top(key):
        while above.setdefault(key, key) != key:
            key = above[key]
        return key

    datasets = sorted({sample.dataset for sample in samples})
    for dataset in datasets:
        names = {s.id: s.id.removeprefix(f"{dataset}__") for s in samples if s.dataset == dataset}
        groups, used = patients_of(names.values(), pattern, "group", needed)
        named |= {id: name_of(groups[name], dataset, len(datasets) > 1) for id, name in names.items()}
        patterns[used] = dataset
    for sample in samples:
        for key in (sample.sha256, *map(str, sample.images)):
            group = top(named[sample.id])
            above[group] = top(above.setdefault(key, group))
    return {id: top(group) for id, group in named.items()}, " and ".join(patterns)


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


def look_into_roots(roots, args):
    """({set: DataSet}, {set: ClassTable}, what `look_into_all` gives, ids of those that are for testing)."""
    datasets, tables, found, fixed, problems = {}, {}, [], [], []
    for root in roots:
        sets, samples, tests = find_samples(root, args, len(roots) > 1, problems)
        if twice := datasets.keys() & sets.keys():
            raise ImageIndexError(f"{root}: another data set is called {min(twice)}, too; rename a folder")
        datasets, found, fixed = {**datasets, **sets}, [*found, *samples], [*fixed, *tests]
        try:
            tables |= {name: data.classes and ClassTable.from_dict(data.classes) for name, data in sets.items()}
        except ClassError as error:
            raise ClassError(f"{root}: its table of classes {error}") from error
    if unread := [sample for sample in found if sample.mask and not tables[sample.dataset]]:
        raise ImageIndexError(f"{unread[0].mask}: nothing says what its classes are; name a file with --classes")
    return datasets, tables, look_into_all(found, tables, datasets, problems), fixed


def index_images(args, asked):
    """Write the index and the lists; see above."""
    if args.out.exists() and not args.overwrite:
        raise ImageIndexError(f"{args.out}: exists already; name another, or replace it with --overwrite")
    roots = [Path(os.path.abspath(root)) for root in args.roots]
    roots = [root.parent if root.name in BESIDE else root for root in roots]
    datasets, tables, looked, fixed = look_into_roots(roots, args)
    for name in datasets:
        of_set = [(sample, kind) for sample, kind, _ in looked if sample.dataset == name]
        print_set(name, tables[name], [sample for sample, _ in of_set], [kind for _, kind in of_set])

    needed = bool(args.test or args.val or args.labelnum is not None or args.unlabeled is not None)
    groups, pattern = groups_of([sample for sample, *_ in looked], args.patient_id, needed or bool(fixed))
    samples = [replace(sample, group=groups[sample.id]) for sample, *_ in looked]
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
        who="group",
        **{**asked, "patient_id": pattern},
    )
    index = Index(args.out, datasets, samples)
    for note in notes_on(samples, tables, [number for *_, number in looked], split, classes_of):
        print(f"note: {note}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_split(args.out.parent, split, asked, args.overwrite)
    write_whole(args.out, index.to_json().encode())
    print(f"{len(samples)} images in {args.out}: {describe(split, 'group')}")


def main(argv=None):
    parser = Parser(description=__doc__)
    flag = parser.add_argument
    flag("roots", type=Path, nargs="+", metavar="ROOT", help="folder of a data set, or an index")
    flag("--out", type=Path, required=True, metavar="FILE", help="index to write, e.g. data/steel/index.json")
    flag("--classes", type=Path, metavar="FILE", help="classes.json for all sets (default: that of each ROOT)")
    flag("--snap", action="store_true", help="take values and colours that are no class's for the nearest class's")
    flag("--overwrite", action="store_true", help="replace the index and the lists that are there")
    args = add_split_flags(parser, "group").parse_args(argv)
    with one_sentence():
        asked = ("labelnum", "unlabeled", "val", "test", "seed", "patient_id")
        index_images(args, {name: getattr(args, name) for name in asked})


if __name__ == "__main__":
    main()
