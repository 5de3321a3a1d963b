"""Where the cases of a data set come from: HDF5 files, a folder of images with masks, or an index of several folders.

The lists (train.list, test.list, ...) lie in the data set's folder, whichever it is.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from mtseg.classes import ClassError, ClassTable, check_shown, read_classes, to_index
from mtseg.datasets import (
    UNKNOWN,
    CaseDataset,
    DataError,
    LAHeart,
    find_root,
    read_hdf5,
    some,
    test_cases,
    training_cases,
)
from mtseg.image_index import read_index
from mtseg.images import ENDINGS, image_size, read_image, read_mask_and_palette
from mtseg.layouts import find_cases
from mtseg.phantom import PHASES, make_phantom
from mtseg.preprocess import normalization, normalize
from mtseg.script import flags

BUILT_IN = {"Phantom": (3, "synthetic volumes"), "Electrode": (2, "synthetic images")}
LAYOUTS = ("images", "imagesTr", "imagesTs")  # folders in which images lie


class Files(NamedTuple):
    """`images`: the file of a case, or a file for each of its channels. `mask`: its file, or None. `set`: the name of
    the data set it is from, where there are several. `table`: what the values of the mask mean. `snap`: whether the
    nearest class is taken for what is none."""

    images: tuple
    mask: Path | None
    set: str | None
    table: ClassTable | None
    snap: bool = False


class Source:
    """The data set in the folder `root`, that of --root_path.

    `files`: {case: Files} of images, None for HDF5 files.
    `dims`: the axes of its cases, 2 or 3. `axis`: along which of a case's three axes its slices follow each other.
    `indexed`: whether an index.json names them. `several`: whether its images are from several sets. `ignores`: whether
    some masks have a value to be ignored.
    `tested`: the cases of test.list, and the images of nnU-Net's imagesTs.
    """

    def __init__(self, root_path):
        self.root = root = find_root(root_path)
        self.root_path, self.files, self.dims, self.axis = root_path, None, 3, 0
        self.tested = {*test_cases(root)}
        named = Path(root_path).suffix == ".json"
        index = Path(root_path) if named else root / "index.json"
        self.indexed = named or index.is_file()
        if self.indexed:
            index = read_index(index)
            self.tables = {n: ClassTable.from_dict(d.classes) if d.classes else None for n, d in index.datasets.items()}
            self.files = {
                s.id: Files(s.images, s.mask, s.dataset, self.tables[s.dataset], index.datasets[s.dataset].snap)
                for s in index.samples
            }
        else:
            self.tables = {None: table_of(root)}
            flat = not (root / "data").is_dir() and any(path.suffix.lower() in ENDINGS for path in root.glob("*"))
            if flat or any((root / name).is_dir() for name in LAYOUTS):
                cases, _ = find_cases(root)
                if all(case.images[0].suffix.lower() in ENDINGS for case in cases):
                    self.files = {c.name: Files(c.images, c.label, None, self.tables[None]) for c in cases}
                    self.tested |= {c.name for c in cases if c.part == "Ts"}
        self.several = len(self.tables) > 1
        self.ignores = any(table and table.ignore is not None for table in self.tables.values())
        if self.files is not None or root == flags.HOME / "data/Electrode":
            self.dims = 2
        elif any(root.glob("data/*/mri_norm2.h5")):
            self.axis = 2

    @functools.cached_property
    def table(self):
        """The classes.ClassTable of all its sets, None where it has none; DataError where they have other classes, or
        name other numbers than those in HDF5 files."""
        table = one_table(self.root_path, self.tables)
        odd = table and ([*table.values] != sorted(table.values) or table.ignore not in (None, UNKNOWN))
        if odd and self.files is None:
            raise DataError(
                f"{self.root}: the labels in HDF5 files are class numbers, so classes.json lists the background first, "
                f"the values rise, and what is to be ignored is {UNKNOWN}: write it so"
            )
        return table

    def dataset(self, args, cases, labelnum=None):
        """The `cases` as a CaseDataset, of which the first `labelnum` (default: all) must have labels."""
        if self.files is not None:
            return ImageCases(self, args, cases, labelnum)
        blind, first = getattr(args, "labelnum", None) == 0, getattr(args, "slices_first", False)
        self.axis = 2 if first else self.axis
        how = {"num_classes": None if blind else args.num_classes, "ignore_index": args.ignore_index}  # blind: no label
        return VolumeCases(self.root_path, args.intensity, first, cases=cases, labelnum=labelnum, **how)

    def annotated(self, args, cases):
        """The `cases` as a CaseDataset, their labels those in the folder --annotations."""
        return AnnotatedCases(self.dataset(args, cases, labelnum=0), args)

    def to_annotate(self, out=(), num=None):
        """The first `num` cases that are annotated bit by bit: those of train.list, where there is none all images
        without a mask that are not in test.list; less those `out`."""
        if self.files is None or (self.root / "train.list").is_file():
            return training_cases(self.root, out, num)
        out = {*out, *self.tested}
        return [case for case in self.without_lists() if case not in out][:num]

    def without_lists(self):
        """The cases that are unlabelled where no list says which are: images without a mask, None for HDF5 files."""
        return self.files and [case for case, files in self.files.items() if files.mask is None]

    def table_of(self, case):
        """The ClassTable of the set that the case is from, or None."""
        return self.files[case].table if self.files and case in self.files else self.table

    def set_of(self, case):
        """The name of the set that the case is from, None where there are not several or the case is not among them."""
        return self.files[case].set if self.several and case in self.files else None


def shown_axis(axis, shape, dims=3):
    """The axis across whose slices a case of `shape` is shown: the `axis` of its Source, or, for a network of `dims` 3,
    the last where a volume lies in a file as stacks (S, H, W) do: its first side is not much shorter than the others.
    """
    return 2 if dims == 3 and len(shape) == 3 and 2 * shape[0] >= min(shape[1:]) else axis


def data_root(root_path):
    """The folder with the lists; where it is that of the built-in data, that is made first."""
    root = find_root(root_path)
    for name, (dims, words) in BUILT_IN.items():
        if root == flags.HOME / "data" / name:
            print(f"*** The built-in {name.upper()} data: {words}, in {root} ***", flush=True)
            make_phantom(root, dims=dims)
    return root


def table_of(root):
    """The ClassTable of a data set's folder: its classes.json, or dataset.json where images lie; else None."""
    if root == flags.HOME / "data/Electrode":  # also before it is made
        return ClassTable.from_dict(PHASES)
    for name in ("classes.json", "dataset.json"):
        if (Path(root) / name).is_file():
            return read_classes(Path(root) / name)
    return None


def plain_table(num_classes, ignore_index=None):
    """The ClassTable of masks that hold class numbers, the background's 0: that of a data set without classes.json.
    With the `ignore_index` 255 they may hold that, too."""
    numbers, ignore = tuple(range(num_classes)), UNKNOWN if ignore_index == UNKNOWN else None
    return ClassTable(tuple(map(str, numbers)), numbers, (None,) * num_classes, background=0, ignore=ignore)


def one_table(path, tables):
    """The ClassTable that the sets of an index share; DataError where they have other classes."""
    words = {name: ", ".join(table.names) if table else "none" for name, table in tables.items()}
    if not tables:
        raise DataError(f"{path}: has no data set; make the index again")
    (first, table), *others = tables.items()
    for name, other in others:
        if words[name] != words[first] or (table and other.background != table.background):
            raise DataError(
                f"{path}: the classes of set {name} are {words[name]}, those of {first} {words[first]}; sets that are "
                f"trained together need the same ones, in the same order, and the same background"
            )
    return table


class VolumeCases(LAHeart):
    """LAHeart's cases, each normalised anew as `intensity` says; `slices_first`: of files (S, H, W), as (H, W, S)."""

    def __init__(self, base_dir, intensity, slices_first=False, **settings):
        self.intensity, self.slices_first = intensity, slices_first
        super().__init__(base_dir, **settings)
        if slices_first:
            self.shapes = {case: (*shape[1:], shape[0]) for case, shape in self.shapes.items()}

    def read(self, case):
        sample = super().read(case)
        if self.slices_first and sample["label"].ndim == 3:
            sample = {name: np.moveaxis(array, -3, -1) for name, array in sample.items()}
        return sample | {"image": normalised(sample["image"], self.intensity, sample["label"].ndim)}


class ImageCases(CaseDataset):
    """Samples {'image', 'label'} of images with masks; see CaseDataset.

    An image is (H, W) or (C, H, W), of a file with several pages (S, H, W) or (C, S, H, W): every channel is normalised
    as `args.intensity` says, over the whole of it. Masks become class numbers by the set's table. `snapped`: {case: how
    many pixels got the nearest class} of the masks that were read.
    """

    def __init__(self, source, args, cases, labelnum):
        self.source, self.intensity, self.snap = source, args.intensity, args.snap
        self.counted, self.snapped, self.unlabeled = (args.num_classes, args.ignore_index), {}, labelnum == 0
        foreign = args.ignore_index not in (None, UNKNOWN, *range(args.num_classes or 0))
        if foreign and not any(source.tables.values()):
            raise flags.FlagError(
                f"--ignore_index {args.ignore_index} of masks without a classes.json: write one with "
                f'"ignore": {args.ignore_index}, or mark these pixels by {UNKNOWN}'
            )
        missing = [case for case in cases if case not in source.files]
        if missing:
            raise DataError(f"{source.root}: has no image of {some(missing)}, which a list names; add it, or its index")
        labeled = cases[:labelnum]
        for case in labeled:
            if source.files[case].mask is None:
                raise DataError(f"{self.path(case)}: case {case} has no mask; add it, or leave the case out")
        sizes = {case: stacked_size(source.files[case].images) for case in cases}
        shapes = {case: tuple(shape) for case, (_, *shape) in sizes.items()}
        super().__init__(cases, None, set(labeled), shapes, {case: size[0] for case, size in sizes.items()})

    def path(self, case):
        return self.source.files[case].images[0]

    def files(self, case):
        """All files of the case, its mask's too."""
        files = self.source.files[case]
        return [*files.images, *filter(None, [files.mask])]

    def read(self, case):
        """The whole case as {'image': float32, 'label': uint8}, checked, without transform."""
        files = self.source.files[case]
        image = read_channels_of(files.images, self.intensity)
        shape, image = image.shape[1:], image[0] if len(image) == 1 else image
        if files.mask is None or self.unlabeled:
            return {"image": image, "label": np.full(shape, UNKNOWN, np.uint8)}
        table, snap = files.table or plain_table(*self.counted), self.snap or files.snap
        label, self.snapped[case] = read_label(files.mask, shape, table, snap)
        return {"image": image, "label": label}


class AnnotatedCases(CaseDataset):
    """The cases of `dataset` with the labels in the folder --annotations, UNKNOWN where nobody annotated."""

    def __init__(self, dataset, args):
        self.dataset, self.args = dataset, args
        channels = dict.fromkeys(dataset.image_list, dataset.n_channels)
        super().__init__(dataset.image_list, dataset.transform, {*dataset.image_list}, dataset.shapes, channels)

    def path(self, case):
        return self.dataset.path(case)

    def read(self, case):
        image, label = self.dataset.read(case)["image"], read_annotation(self.args.annotations, case)
        label = np.moveaxis(label, 0, -1) if self.args.slices_first else label
        path, shape, highest = annotation_file(self.args.annotations, case), self.shapes[case], self.args.num_classes
        if label.shape != shape:
            raise DataError(f"{path}: has shape {label.shape} and the case {shape}; take it anew")
        if (wrong := label[(label >= highest) & (label != UNKNOWN)]).size:
            raise DataError(
                f"{path}: has a label {wrong[0]}, but --num_classes is {highest}; raise it, or take it anew"
            )
        return {"image": image, "label": label}


def annotation_file(folder, case):
    return Path(folder) / f"{case}.h5"


def annotated_cases(folder):
    """The names of the cases with labels in the folder --annotations; DataError where there are none."""
    cases = sorted(path.stem for path in Path(folder).glob("*.h5"))
    if not cases:
        raise DataError(f"{folder}: no folder with a label <case>.h5 in it; give one that active_learning.py take made")
    return cases


def read_annotation(folder, case):
    """The label of a case in the folder --annotations, uint8, as the case's own file has its axes; DataError."""
    path = annotation_file(folder, case)
    try:
        with h5py.File(path, "r") as file:
            label = read_hdf5(file, "label")
            if label is None or label.dtype != np.uint8:
                raise DataError(f"{path}: has no 'label' of whole numbers in 8 bits; take it anew")
            return label[...]
    except OSError as error:
        raise DataError(f"{path}: not a whole HDF5 file ({' '.join(str(error).split())}); take it anew") from error


def read_channels_of(paths, intensity):
    """The image in one file, or a file a channel, as float32 (C, H, W) or (C, S, H, W), each channel normalised."""
    channels = np.concatenate([read_image(path) for path in paths]).astype(np.float32)
    if not np.isfinite(channels).all():
        raise DataError(f"{paths[0]}: holds NaN or infinity; repair it")
    return normalised(channels, intensity, channels.ndim - 1)


def normalised(image, intensity, axes):
    """`image`, float32 with `axes` spatial axes and channels in front or not, each channel over the whole of it."""
    if intensity == "none":
        return image
    how = {"normalization": intensity, "crop": "none"}
    channels = image.reshape(-1, *image.shape[-axes:])
    return np.stack([normalize(c, *normalization(c, how)) for c in channels]).reshape(image.shape)


def stacked_size(paths):
    """(C, H, W) or (C, S, H, W) of the image in one file, or a file a channel; DataError where the sizes differ."""
    (channels, *shape), *others = map(image_size, paths)
    for path, (more, *other) in zip(paths[1:], others, strict=True):
        if other != shape:
            raise DataError(f"{path}: is {words(other)}, and {paths[0].name} of its case {words(shape)}; resize it")
        channels += more
    return channels, *shape


def read_label(path, shape, table, snap=False):
    """(uint8 class numbers of a mask, how many pixels were snapped); DataError where it is not of this `shape`."""
    mask, palette = read_mask_and_palette(path)
    size = mask.shape[: len(shape)]
    if size != tuple(shape) or mask.ndim > len(shape) + 1:
        raise DataError(f"{path}: is {words(size)}, its image {words(shape)}; cut them alike")
    try:
        if palette is not None:
            used, two = np.unique(mask).astype(int), mask.dtype == bool and len(table.values) == 2
            shown = palette[used] * np.uint8(255 if palette.max() == 1 else 1)  # a TIFF of 1 bit has 0 and 1
            check_shown(np.sort(table.values)[used] if two else used, shown, table)
        return to_index(mask, table, snap)
    except ClassError as error:
        plain = all(name.isdecimal() for name in table.names)  # as `plain_table` calls them
        more = "; or say in a classes.json what its values mean (docs/images.md)" if plain else ""
        raise DataError(f"{path}: {error}{more}") from error


def words(shape):
    return " x ".join(map(str, shape)) + " pixels"
