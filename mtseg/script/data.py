"""The cases of a run: which they are, as the flags ask, and how batches are drawn from them."""

import argparse
import itertools
import math
import zlib
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch

from mtseg.cache import CachedDataset
from mtseg.collate import why_no_workers
from mtseg.datasets import (
    UNKNOWN,
    DataError,
    JoinedCases,
    Slices,
    intensity_notes,
    read_list,
    slice_of,
    test_cases,
    training_cases,
    unlabeled_cases,
)
from mtseg.samplers import IterationSampler, ShuffledBatchSampler, TwoStreamBatchSampler
from mtseg.script import flags
from mtseg.script.plans import check_plan
from mtseg.script.runfolder import how_selected
from mtseg.script.sources import Source, annotated_cases, data_root, read_annotation
from mtseg.script.windows import class_name, counted_classes
from mtseg.splits import known_patients, read_folds
from mtseg.transforms import (
    Compose,
    RandomCrop,
    RandomFlip,
    RandomGenerator,
    RandomRot90Flip,
    RandomRotFlip,
    Resize,
    ToTensor,
)

UNUSUAL = 1e3  # an intensity that no image of unit variance has
FIRST_CASES = 8  # whose intensities are looked at where the volumes are not read at the start
TURNS = {"mirror": RandomRotFlip(), "all": RandomRot90Flip(), "flips": RandomFlip()}  # --rotflip


@dataclass
class Data:
    """The data of a run.

    `train`: the data set, labelled cases first. `val`: the cases of --val_list; `held_out`: where no labels are used,
    instead two patches of each of them, (N, C, *spatial), or None. `axis`: along which the slices of
    stacks follow each other. `sampler`: of the joint batches of all processes, labelled patches first. `labeled_bs`:
    the labelled patches of this process's share of one. `unknown`: stands for the label of a voxel that has none.
    `n_channels`: of the images, as the network takes them. `record`: what config.json says of the data: 'train_cases',
    'val_cases', ...: names; of a fold also 'folds', how many there are; 'selection': how the reported checkpoint is
    chosen; 'data_crc32': of the first case's voxels, and of all annotations; 'preprocessing': the data set's, or None.
    `description`, `notes`: for the log.
    """

    train: Any
    val: Any
    axis: int
    sampler: Any
    labeled_bs: int
    unknown: int
    n_channels: int
    record: dict
    description: str
    notes: list
    held_out: torch.Tensor | None = None

    def note_on_borders(self, args):
        """Of a method that learns distances to a class's border: say where they are wrong."""
        if args.annotations:
            known = "are to those that are annotated, too large where others are nearer"
            self.notes.append(f"--annotations: distances to borders {known}: annotate whole slices or cases for this")

    def unusual_image(self, seed, iteration):
        """What to look at when training went to NaN at `iteration`: a case of the last 50 iterations whose image is far
        from unit variance, in words, or None. Their patches are drawn once more; one is enough of each case."""
        seen = set()
        for batch in IterationSampler(self.sampler, seed, max(iteration - 50, 0), iteration):
            for index, patch_seed in batch:
                largest = 0 if index in seen else self.train[index, patch_seed]["image"].abs().max().item()
                seen.add(index)
                if not largest < UNUSUAL:
                    case = self.train.case_of(index)
                    return f"look at case {case}, which reaches {largest:.3g}; images must have unit variance"
        return None


def read_data(args, run):
    """The Data of a training script; of labelled cases alone where its flags have no --labeled_bs, and of images alone,
    of all cases and without their labels, where its --labelnum is 0."""
    unlabeled, images_alone = hasattr(args, "labeled_bs"), args.labelnum == 0
    with run.ranks.main_first():
        root = data_root(args.root_path)
    source = Source(args.root_path)
    cases, more, notes = choose_cases(args, source)
    labeled_bs = args.labeled_bs if unlabeled else 0 if images_alone else args.batch_size
    unlabeled_bs = args.batch_size - labeled_bs
    run.ranks.check_shares(args.labelnum or args.batch_size, labeled_bs, unlabeled_bs)
    # What batch norm takes together: at least the smaller stream, or a part of --accumulation_steps.
    together = min(unlabeled_bs or labeled_bs, args.batch_size // args.accumulation_steps)
    flags.check_normalization(args, max(together // run.ranks.world_size, 1))

    names = cases["train_cases"]
    first = source.annotated(args, names) if args.annotations else source.dataset(args, names, args.labelnum)
    check_plan(args, source, first)
    sample = first.read(names[0])  # by whose voxels a resumed run notices other data under the same names
    checksum = zlib.crc32(sample["label"].tobytes(), zlib.crc32(sample["image"].tobytes()))
    for case in names if args.annotations else ():  # each of which may have been taken anew
        checksum = zlib.crc32(read_annotation(args.annotations, case).tobytes(), checksum)
    train, odd = training_set(args, source, first)
    labeled_cases = {*names[: args.labelnum]}
    labeled = range(
        sum(train.case_of(index) in labeled_cases for index in range(len(train)))
    )  # a stack has one a slice
    notes += odd + classes_in_none(args, first, names[: args.labelnum])
    if cases.get("unlabeled_cases"):
        other, odd = training_set(args, more, more.dataset(args, cases["unlabeled_cases"], labelnum=0))
        train, notes = JoinedCases([train, other]), notes + odd
    if args.num_workers and (reason := why_no_workers()):
        args.num_workers = 0
        notes.append(
            f"no data workers can be started ({reason}): data is loaded between iterations, which takes longer"
        )
    val, held_out = source.dataset(args, cases["val_cases"], 0 if images_alone else None), None
    if len(val) and val.n_channels != first.n_channels:
        raise flags.FlagError(f"--val_list {args.val_list}: its cases have other channels than the training cases")
    if len(val) and images_alone:
        held_out, val = held_out_patches(args, source, val), source.dataset(args, [])
    if args.fold is not None and not images_alone:  # what could not be tested is better found before the training
        source.dataset(args, cases["fold_cases"])

    args.n_channels = train.n_channels
    rest = range(len(labeled), len(train))
    if unlabeled:
        description = f"{args.labelnum} labelled and {len(train.image_list) - args.labelnum} unlabelled cases"
        slices = f" ({len(labeled)} and {len(rest)} slices)"
    elif images_alone:
        description, slices = f"{len(train.image_list)} cases without their labels", f" ({len(rest)} slices)"
    else:
        description, slices = f"{args.labelnum} labelled cases", f" ({len(labeled)} slices)"
    description += slices if len(train) > len(train.image_list) else ""
    labeled, rest = enough(labeled, labeled_bs), enough(rest, unlabeled_bs)
    if args.set_balance and not source.several:
        notes.append(f"--set_balance {args.set_balance:g} changes nothing: there is one data set")
    strata = [source.set_of(train.case_of(index)) for index in range(len(train))] if source.several else None
    if unlabeled:
        sampler = TwoStreamBatchSampler(
            labeled, rest, args.batch_size, unlabeled_bs, args.seed, strata=strata, balance=args.set_balance
        )
    else:
        given = rest if images_alone else labeled
        sampler = ShuffledBatchSampler(given, args.batch_size, args.seed, strata=strata, balance=args.set_balance)
    selection, how = how_selected([] if images_alone else cases["val_cases"], test_cases(root))
    record = {**cases, "selection": selection, "data_crc32": checksum}
    record["preprocessing"] = flags.read_config(root / "preprocessing.json") or None
    return Data(
        train=train,
        val=val,
        axis=source.axis,
        sampler=sampler,
        labeled_bs=labeled_bs // run.ranks.world_size,
        unknown=unknown_label(args),
        n_channels=train.n_channels,
        record=record,
        description=description,
        notes=how + notes,
        held_out=held_out,
    )


def enough(indices, wanted):
    """`indices` so often that there are `wanted`: a batch may hold several patches of the few images with labels."""
    return [*indices] * max(1, math.ceil(wanted / max(len(indices), 1)))


def classes_in_none(args, dataset, cases):
    """A list with a sentence on the classes that no label of the `cases` of `dataset` has, or empty."""
    missing = set(counted_classes(args)) if cases else set()
    for case in cases:
        if not missing:
            return []
        label = dataset.read(case)["label"]
        missing = {number for number in missing if not (label == number).any()}
    if not missing:
        return []
    named = ", ".join(str(class_name(args.classes, number)) for number in sorted(missing))
    what = f"class {named}" if len(missing) == 1 else f"the classes {named}"
    return [f"no labelled case has a voxel of {what}: look at --num_classes, or label cases that have"]


def unknown_label(args):
    """What stands for the label of a voxel that has none."""
    return UNKNOWN if args.ignore_index is None else args.ignore_index


def check_prepared(source):
    """DataError where a folder of images or scans lacks what a script makes of it; read_list names what else lacks."""
    root = source.root
    if (root / "train.list").is_file():
        return
    if source.files is not None and not source.indexed:
        raise DataError(f"{root}: images without a train.list; write it: python data/make_splits.py {root}")
    if (root / "imagesTr").is_dir() or (root / "images").is_dir():
        raise DataError(f"{root}: scans; prepare them first: python data/prepare_nifti.py {root} NEW_FOLDER")


def choose_cases(args, source):
    """({'train_cases': names, 'val_cases': names, ...}, the Source of the 'unlabeled_cases' or None, notes).

    FlagError or DataError where there are too few of a kind, or one is of two kinds that exclude each other.
    """
    root = source.root
    val = out = read_list(args.val_list) if args.val_list else []
    cases = {"val_cases": val}
    if args.fold is not None:
        listed = read_list(root / "train.list")
        patients, _ = known_patients(root, listed)
        folds = read_folds(root, {case: patients[case] for case in listed})
        if args.fold >= len(folds):
            raise flags.FlagError(
                f"--fold {args.fold}: {root} has {len(folds)} folds, numbered from 0; name one of them"
            )
        fold, cases["folds"] = folds[args.fold], len(folds)
        cases["fold_cases"], out = fold["val"], {*listed}.difference(fold["train"])
    if args.labelnum == 0 and args.unlabeled_root is None and not (root / "train.list").exists():  # all that is there
        kept_out, paths = {*val, *source.tested}, [p for p in root.glob("data/*") if p.suffix == ".h5" or p.is_dir()]
        flat = {path.name.removesuffix(".h5") for path in paths if not path.name.startswith(".")}
        there = [*source.files] if source.files else sorted(flat - {"slices"})
        found = [case for case in there if case not in kept_out]
        if there and not found:
            raise DataError(
                f"{root}: all its cases are in test.list or --val_list, none is left to learn from; add some"
            )
        found, notes = unlabeled_cases(root, (), val, source.tested, found)
        flags.check_cases(args, len(found[: args.max_samples]))
        return cases | {"train_cases": found[: args.max_samples]}, None, notes
    if args.annotations:
        train, rest = annotated_of(args, source.to_annotate(out, args.max_samples))
    else:
        check_prepared(source)
        train, rest = drawn(root, training_cases(root, out, args.max_samples), args.labeled_draw), []
    if not hasattr(args, "labeled_bs") and args.labelnum:
        flags.check_one_stream(args, len(train))
        return cases | {"train_cases": train[: args.labelnum]}, None, []
    other, more, notes = source if rest else None, rest, []
    listed = (root / "unlabeled.list").exists() or (root / "unlabeled").is_dir()
    if args.unlabeled_root is not None or listed:
        other = source if args.unlabeled_root is None else Source(args.unlabeled_root)
        if other is not source and not listed and other.root.resolve() == root.resolve():
            raise flags.FlagError(
                f"--unlabeled_root {args.unlabeled_root}: lies in the data set {root} and passes for its folder of "
                f"cases; move it elsewhere, or name its cases in {root / 'unlabeled.list'}"
            )
        known = [*train, *(case for case in rest if case not in train)]
        found, notes = unlabeled_cases(other.root, known, val, test_cases(root), other.without_lists())
        more = [*rest, *found]
    if args.fold is not None:  # other scans of the patients that are tested are kept out, too
        patients, _ = known_patients(root, [*patients, *more])
        held = {patients[case] for case in cases["fold_cases"]}
        more = [case for case in more if patients[case] not in held]
    if args.labelnum:
        flags.check_two_streams(args, len(train), len(more))
    elif not train:
        raise DataError(f"{root / 'train.list'}: --val_list or the fold keeps all its cases out; leave some in")
    else:
        flags.check_cases(args, len(train) + len(more))
    return cases | {"train_cases": train, "unlabeled_cases": more}, other, notes


def drawn(root, cases, number):
    """The `cases` of the data set in `root` in the order of draw `number`, those of a patient together; of 0 as they
    are. Of two patients the same one comes first, whoever else is among them."""
    patients = known_patients(root, read_list(root / "train.list"))[0] if number else {}
    return sorted(cases, key=lambda case: number and sha256(f"{number} {patients[case]}".encode()).digest())


def annotated_of(args, train):
    """(the cases of `train` with labels in the folder --annotations; those that have voxels without, which are learned
    from without labels, or all where there are none). FlagError where one of its labels is of another case, or empty.
    """
    labels = {case: read_annotation(args.annotations, case) != UNKNOWN for case in annotated_cases(args.annotations)}
    for case, known in labels.items():
        if case not in train:
            raise flags.FlagError(f"{args.annotations}: holds a label of {case}, which is no training case; remove it")
        if not known.any():
            raise flags.FlagError(f"{args.annotations}: the label of {case} has no voxel with a label; remove it")
    rest = [case for case in train if case not in labels or not labels[case].all()]
    return [case for case in train if case in labels], rest or train


def training_set(args, source, dataset):
    """(the cases of `dataset`, which is of `source`, cached, augmented, in slices as the flags ask; notes on them)."""
    outside = 0 if args.background == 0 else unknown_label(args)
    padding = flags.PADDED if args.ignore_padding else outside
    unknown = UNKNOWN if args.annotations else None
    corners = outside if unknown is None else unknown  # what turns in from outside is no annotation to draw around
    turn = RandomGenerator(corners) if args.rotflip == "ssl4mis" else TURNS.get(args.rotflip)
    steps = [turn, args.resize and Resize(args.resize)]
    around = args.foreground_patches, counted_classes(args), unknown
    steps += [RandomCrop(args.patch_size, padding, *around), ToTensor("uint8")]
    dataset.transform = Compose([step for step in steps if step])
    axes = {len(shape) for shape in dataset.shapes.values()}
    if args.dims == 3 and axes != {3}:
        raise flags.FlagError(f"--dims 3, but the cases in {source.root} are images: take --dims 2")
    if args.context and 2 in axes:
        raise flags.FlagError(f"--context {args.context}: images in {source.root} have no neighbours; leave it out")
    dims, files = max(axes, default=3), dataset
    if not args.cache:  # reading them all would take as long as caching them
        first = dataset.image_list[:FIRST_CASES]
        notes = intensity_notes(((case, dataset.read(case)["image"]) for case in first), dims)
    else:
        dataset = CachedDataset(dataset)
        notes = intensity_notes(((case, dataset.views(case)["image"]) for case in dataset.image_list), dims)
    notes += shape_notes(args, [*dataset.shapes.values()], source.axis)
    snapped = [count for count in getattr(files, "snapped", {}).values() if count]
    if snapped:
        notes.append(f"--snap: {sum(snapped)} pixels of {len(snapped)} masks are no class's, and got the nearest class")
    if args.dims == 3:
        return dataset, notes
    slices = Slices(dataset, source.axis, args.context)
    if args.annotations and files.labeled:
        labels = {case: read_annotation(args.annotations, case) != UNKNOWN for case in slices.image_list}
        slices.places = [(c, k) for c, k in slices.places if k is None or slice_of(labels[c], k, source.axis).any()]
    return slices, notes


def held_out_patches(args, source, dataset):
    """Two patches of each case of `dataset`, which is of `source`, (N, C, *spatial), always the same."""
    args = argparse.Namespace(**{**vars(args), "rotflip": "none", "cache": False})
    dataset, _ = training_set(args, source, dataset)
    samples = [[*indices] for _, indices in itertools.groupby(range(len(dataset)), dataset.case_of)]  # of each case
    places = [place for indices in samples for place in (indices[0], indices[len(indices) // 2])]
    return torch.stack([dataset[place, seed]["image"] for seed, place in enumerate(places)])


def shape_notes(args, shapes, axis):
    """Sentences: that the slices of every volume seem to be its first axis, that every case is padded, as smaller than
    the patch, or that a patch is all of every case, which leaves nothing to draw it around."""
    sizes, notes, what = shapes, [], "volume" if args.dims == 3 else "image"
    if args.dims == 2:
        if args.labelnum == 0 and all(len(shape) == 3 and shape[0] in (3, 4) for shape in shapes):
            colours = "if these are the colours of an image, give each file a 'label' (H, W)"
            notes = [f"every case has {shapes[0][0]} slices: {colours}"]
        sizes = [tuple(args.resize or (np.delete(shape, axis) if len(shape) == 3 else shape)) for shape in shapes]
    elif not args.slices_first and all(2 * shape[0] < min(shape[1:]) for shape in shapes):
        notes = [f"the first side of every case is its shortest ({shapes[0]}): files (S, H, W) need --slices_first"]
    rooms = [[patch - side for side, patch in zip(size, args.patch_size, strict=True)] for size in sizes]
    patch, largest = (" x ".join(map(str, size)) for size in (args.patch_size, max(sizes)))
    if all(max(room) > 0 for room in rooms):
        notes.append(f"--patch_size {patch}: no {what} is so large (the largest is {largest}); each is padded to it")
    if args.foreground_patches and all(min(room) >= 0 for room in rooms):
        notes.append(f"--foreground_patches: a patch of {patch} is all of every {what}, so that it changes nothing")
    return notes
