"""Lists of cases, and volumes, stacks and images in the HDF5 layouts of the UA-MT / LASeg / SSL4MIS family.

<root>/train.list, <root>/test.list     one case name a line
<root>/data/<case>/mri_norm2.h5         'image' float (W, H, D) or (C, W, H, D), normalised; 'label' int (W, H, D)
<root>/data/<case>.h5                   the same (BraTS); of a stack of slices (S, H, W) (ACDC); of an image (H, W)
<root>/data/slices/<case>_slice_<k>.h5  the slices of a stack, (H, W) each, where <case>.h5 is not there
"""

import contextlib
import math
from pathlib import Path

import h5py
import numpy as np
from torch.utils.data import Dataset

UNKNOWN = 255  # stands for the label of a voxel that has none
IMAGES = (".png", ".tif", ".tiff")  # endings of images, which lists may name or leave out


class DataError(ValueError):
    """Data that cannot be used; the message is one sentence with the file and the remedy."""

    def __init__(self, message):
        # Of an error in a worker, DataLoader makes a new one with the whole traceback as its message: the sentence is
        # the last line.
        super().__init__(message.strip().splitlines()[-1].split("DataError: ")[-1])


def find_root(path):
    """The folder that holds the lists: `path` itself, or the one above it where `path` is the folder of the cases.

    The family's scripts name either: UA-MT's and LASeg's --root_path is the folder of the cases, their lists lie above.
    """
    path = Path(path)
    above = path.absolute().parent
    if path.suffix == ".json":  # an index of images
        return above
    own = (path / "data").is_dir() or any(path.glob("*.list"))
    return above if not own and any((above / f"{name}.list").is_file() for name in ("train", "test")) else path


def read_hdf5(file, name):
    """The h5py.Dataset `name` of an open HDF5 file, None where there is none.

    DataError where its voxels lie in other files (links, external storage, virtual data sets), since a file from a
    stranger could name any file of this machine, and where it claims to be far larger than what the file stores of it.
    """
    link = file.get(name, getlink=True)
    if link is None:
        return None
    if not isinstance(link, h5py.HardLink) or not isinstance(file[name], h5py.Dataset):
        raise DataError(f"{file.filename}: its '{name}' is a link or a group, not a data set; copy the voxels into it")
    dataset = file[name]
    if dataset.is_virtual or dataset.external:
        raise DataError(f"{file.filename}: the voxels of '{name}' lie in other files; copy them into this one")
    # gzip makes at most 1032 bytes of one.
    if dataset.size and dataset.nbytes > 2**20 + 1032 * dataset.id.get_storage_size():
        raise DataError(
            f"{file.filename}: '{name}' has shape {dataset.shape}, hardly any of it is stored; make or copy it again"
        )
    return dataset


def read_list(path):
    """The case names of a list file, one a line, in order; blank lines are passed over.

    Raises DataError where the file is missing or empty, where a name is a path (it would reach outside the data
    folder), and where a name is in it twice.
    """
    path = Path(path)
    if not path.is_file():
        missing = f"{path}: no such list" if path.parent.is_dir() else f"{path.parent}: no such folder"
        raise DataError(
            f"{missing}; a list is a text file with one case name a line, and a folder of data holds "
            f"train.list, test.list and data/<case>/mri_norm2.h5"
        )
    try:
        # "utf-8-sig" passes over the mark that editors on Windows put in front of a text.
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        cases = [line[: -len(Path(line).suffix)] if line.lower().endswith(IMAGES) else line for line in lines if line]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a text file of case names ({error}); write one name a line, in UTF-8") from error
    if not cases:
        raise DataError(f"{path}: the list names no case; write one case name a line")
    seen = set()
    for case in cases:
        if case in (".", "..") or "/" in case or "\\" in case:
            raise DataError(f"{path}: case {case!r} is a path; write only the name of its folder in data/")
        if case in seen:
            raise DataError(f"{path}: case {case!r} is listed twice; remove one of the lines")
        seen.add(case)
    return cases


def training_cases(root, val_cases=(), num=None):
    """The first `num` (default: all) cases of `<root>/train.list` that are not among `val_cases`.

    Raises DataError where one of them is in `<root>/test.list` as well.
    """
    root, val_cases = Path(root), set(val_cases)
    cases = [case for case in read_list(root / "train.list") if case not in val_cases][:num]
    shared = sorted(set(cases) & set(test_cases(root)))
    if shared:
        raise DataError(f"{root / 'train.list'}: case {shared[0]} is in test.list too ({len(shared)} in all); move it")
    return cases


def test_cases(root):
    """The cases of `<root>/test.list`, [] where there is no such list."""
    path = Path(root) / "test.list"
    return read_list(path) if path.exists() else []


def unlabeled_cases(root, train_cases=(), val_cases=(), test_cases=(), present=None):
    """(case names of a folder of unlabelled data, list of sentences on what is remarkable about them).

    The names are those of `<root>/unlabeled.list`, else those `present`, else of train.list, else of all folders in
    data/. A case is known by its name, wherever its file lies. Those of `train_cases` are left out, since each is
    trained on already, with its label or without. Those of `test_cases` are not, but a sentence names them: a network
    that has learned from the images of test cases knows more of them than of others. DataError where one is in
    `val_cases`.
    """
    root = Path(root)
    lists = ("unlabeled.list",) if present else ("unlabeled.list", "train.list")
    path = next((root / name for name in lists if (root / name).exists()), root / "data")
    folders = path.glob("*/mri_norm2.h5")
    listed = read_list(path) if path.suffix else present or sorted(file.parent.name for file in folders)
    if not listed:
        raise DataError(f"{root}: holds no unlabeled.list, train.list or data/<case>/mri_norm2.h5; name another folder")

    def shared(cases):
        cases = set(cases)
        return [case for case in listed if case in cases]

    validated, trained, tested = map(shared, (val_cases, train_cases, test_cases))
    if validated:
        raise DataError(
            f"{path}: case {validated[0]} is in --val_list too ({len(validated)} in all), and what is validated on "
            f"must not be trained on; remove it from one"
        )
    notes = []
    if trained:
        notes.append(f"{path}: lists {some(trained)} of train.list too; each is used once, as train.list says")
    if tested:
        notes.append(
            f"{path}: lists {some(tested)} of test.list too: their images are TRAINED ON, without labels, and every "
            f"table of results will say so; for a test on unseen cases remove them from one of the lists"
        )
    trained = set(trained)
    return [case for case in listed if case not in trained], notes


def some(cases):
    """'3 cases (a, b, ...)' and the like, for a sentence."""
    names = ", ".join(cases[:2]) + (", ..." if len(cases) > 2 else "")
    return f"{len(cases)} {'case' if len(cases) == 1 else 'cases'} ({names})"


def intensity_notes(images, dims=3):
    """A list of sentences on images that are constant, or whose values are far from mean 0 and standard deviation 1.

    `images`: pairs of a case's name and its image, with `dims` spatial axes and channels in front or not, an array or a
    cache.LazyArray; of large ones every fourth voxel along each axis is looked at. Channels count one by one.
    """
    constant, unnormalised = {}, {}  # case -> what is wrong; a dict, since a case may have several channels
    for case, image in images:
        step = 4 if math.prod(image.shape[-dims:]) > 2**18 else 1
        voxels = np.asarray(image[(..., *[slice(None, None, step)] * dims)], dtype=np.float64)
        for channel in voxels.reshape(-1, math.prod(voxels.shape[-dims:])):
            mean, deviation = channel.mean(), channel.std()
            if channel.min() == channel.max():
                constant[case] = f"{mean:.3g}"
            elif not (abs(mean) <= 2 and 0.25 <= deviation <= 4):
                unnormalised[case] = f"mean {mean:.3g}, standard deviation {deviation:.3g}"
    notes = []
    if constant:
        first, value = next(iter(constant.items()))
        notes.append(
            f"constant images ({first}: {value} everywhere) in {some([*constant])}: nothing can be learned there"
        )
    if unnormalised:
        first, values = next(iter(unnormalised.items()))
        notes.append(
            f"images that are not normalised ({first}: {values}) in {some([*unnormalised])}: noise, padding and strong "
            f"views are made for mean 0 and standard deviation 1"
        )
    return notes


test_cases.__test__ = False  # not a test, whatever pytest thinks of the name


class CaseDataset(Dataset):
    """Samples {'image', 'label'} of the cases in `image_list`: what data sets of any format share.

    A subclass has `path(case)` and `read(case)`, which gives {'image': float32 (C, *spatial) or (*spatial), 'label':
    uint8 (*spatial)}, checked, and raises DataError. `shapes`: {case: its spatial axes}. `channels`: {case: their
    number}, the same in all. `labeled`: the cases whose labels may be looked at.

    `dataset[index]` gives a sample. For `dataset[(index, seed)]` the transforms draw from sample['rng'], which is
    numpy.random.default_rng(seed), so that the sample depends on nothing else (see samplers.IterationSampler). They
    find in sample['labeled'] whether the label may be looked at.
    """

    def __init__(self, image_list, transform, labeled, shapes, channels):
        self.image_list, self.transform, self.labeled, self.shapes = image_list, transform, labeled, shapes
        first = {}  # number of channels -> the first case that has so many
        for case, number in channels.items():
            first.setdefault(number, case)
        if len(first) > 1:
            (a, one), (b, other) = list(first.items())[:2]
            raise DataError(f"{self.path(other)}: case {one} has {a} channels and case {other} has {b}; prepare alike")
        self.n_channels = next(iter(first), 1)

    def __len__(self):
        return len(self.image_list)

    def __getitem__(self, index):
        index, seed = index if isinstance(index, tuple) else (index, None)
        case = self.image_list[index]
        return self.transformed(case, self.read(case), seed)

    def case_of(self, index):
        """The name of the case that the sample of this index is from."""
        return self.image_list[index]

    def transformed(self, case, sample, seed=None):
        """What the transform makes of `sample`, which is that of `case`; it draws from default_rng(seed)."""
        if self.transform is None:
            return sample
        sample["labeled"] = case in self.labeled
        if seed is not None:
            sample["rng"] = np.random.default_rng(seed)
        try:
            sample = self.transform(sample)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise DataError(
                f"{self.path(case)}: case {case} cannot be augmented ({reason}); look at it, or leave it out"
            ) from error
        return {key: value for key, value in sample.items() if key not in ("rng", "labeled")}


class LAHeart(CaseDataset):
    """Samples {'image', 'label'} of the listed cases, each read from its HDF5 file when asked for.

    `base_dir`: the folder with the cases, `<root>/data`, as in the family; `<root>` itself is understood too.
    `split`: which list, `<split>.list` in `find_root(base_dir)`; or `cases`: names instead of a list. `num`: only the
    first `num` cases. `transform`: called with the sample. `num_classes`: labels of this value or above raise, except
    `ignore_index`; None lets all pass. `labelnum`: only so many cases, the first ones, must have a label (default:
    all). Without a label it is UNKNOWN everywhere. With `labelnum` 0 and no `num_classes` no label is looked at.

    The constructor opens every file and checks its keys, types and shapes. Values (finite images, labels in range) are
    checked whenever a case is read. Both raise DataError.
    """

    def __init__(
        self,
        base_dir,
        split="train",
        num=None,
        transform=None,
        cases=None,
        num_classes=None,
        ignore_index=None,
        labelnum=None,
    ):
        base_dir = Path(base_dir)
        if not base_dir.is_dir():
            raise DataError(f"{base_dir}: no such folder; give the one that holds train.list, test.list and data/")
        self.base_dir = base_dir / "data" if (base_dir / "data").is_dir() else base_dir
        image_list = (read_list(find_root(base_dir) / f"{split}.list") if cases is None else list(cases))[:num]
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.labeled, self.blind = set(image_list[:labelnum]), labelnum == 0 and num_classes is None
        self.slices = slice_files(self.base_dir / "slices")
        shapes, channels = {}, {}
        for case in image_list:
            with self._opened(case) as (image, label):
                shapes[case] = spatial_shape(image, label)
                channels[case] = 1 if image.ndim == len(shapes[case]) else image.shape[0]
        super().__init__(image_list, transform, self.labeled, shapes, channels)

    def path(self, case):
        """The file of the case; of a stack in single slices that of its first one."""
        nested, flat = self.base_dir / case / "mri_norm2.h5", self.base_dir / f"{case}.h5"
        return next((p for p in (nested, flat, *self.slices.get(case, ())) if p.is_file()), nested)

    def files(self, case):
        """All files of the case."""
        path, slices = self.path(case), self.slices.get(case, ())
        return [*slices] if path in slices else [path]

    def read(self, case):
        """The whole case as {'image': float32, 'label': uint8}, checked, without transform."""
        path = self.path(case)
        with self._opened(case) as (image, label):
            shape = spatial_shape(image, label)
            image = image[...].astype(np.float32)
            label = None if label is None or self.blind else label[...]
            image = image[0] if image.ndim > len(shape) and len(image) == 1 else image
        if not np.isfinite(image).all():
            raise DataError(f"{path}: the image of case {case} holds NaN or infinity; repair it or leave it out")
        if label is None:
            return {"image": image, "label": np.full(shape, UNKNOWN, np.uint8)}
        classes = 256 if self.num_classes is None else self.num_classes
        with np.errstate(invalid="ignore"):  # NaN becomes some number here, and differs from it below
            checked = label.astype(np.uint8, copy=False)
        wrong = label[(checked != label) | ((checked >= classes) & (checked != self.ignore_index))]
        if wrong.size:
            raise DataError(
                f"{path}: case {case} has a label of value {wrong[0]}, but labels must be whole numbers in "
                f"0 .. {classes - 1}; relabel it or raise --num_classes"
                + ("" if case in self.labeled else ", or delete its 'label', since it counts as unlabelled")
            )
        return {"image": image, "label": checked}

    @contextlib.contextmanager
    def _opened(self, case):
        """(image, label) of the case, open data sets or arrays, checked but for their values; the label may be None."""
        path = self.path(case)
        if path.parent.name != "slices":
            with self._opened_file(case, path) as pair:
                yield pair
            return
        slices = []
        for path in self.slices[case]:
            with self._opened_file(case, path) as (image, label):
                slices.append((image[...], None if label is None else label[...]))
        images, labels = zip(*slices, strict=True)
        if any(image.shape != images[0].shape or image.ndim != 2 for image in images):
            raise DataError(f"{path}: is a slice of other shape than the others of {case}; each must be (H, W), alike")
        yield np.stack(images), None if any(label is None for label in labels) else np.stack(labels)

    @contextlib.contextmanager
    def _opened_file(self, case, path):
        try:
            if not path.is_file():
                raise DataError(f"{path}: no such file, but case {case} is listed; add it, or remove it from its list")
            with h5py.File(path, "r") as file:
                image, label = (read_hdf5(file, key) for key in ("image", "label"))
                for key, dataset in (("image", image), ("label", label)):
                    if dataset is None and (key == "image" or case in self.labeled):
                        raise DataError(f"{path}: case {case} has no '{key}', only {sorted(file)}; prepare it again")
                    if dataset is not None and dataset.dtype.kind not in "biuf":
                        raise DataError(f"{path}: '{key}' of case {case} is {dataset.dtype}, not numbers; convert it")
                shape = spatial_shape(image, label)
                if image.shape not in (shape, (*image.shape[:1], *shape)) or len(shape) not in (2, 3):
                    raise DataError(
                        f"{path}: case {case} has an image of shape {image.shape} and a label of shape {shape}; "
                        f"they must be (W, H, D) or (C, W, H, D), and (W, H, D), or of an image (H, W) or (C, H, W), "
                        f"and (H, W)"
                    )
                if 0 in image.shape:
                    raise DataError(f"{path}: case {case} has no voxels, it is of shape {image.shape}; leave it out")
                yield image, label
        except DataError:
            raise
        except (OSError, RuntimeError, LookupError, AttributeError, TypeError, ValueError) as error:
            # HDF5 reports damage by many exceptions; whichever it is, the file cannot be used.
            reason = " ".join(str(error).split())
            raise DataError(f"{path}: case {case} is not a whole HDF5 file ({reason}); copy it again") from error


def spatial_shape(image, label):
    """The spatial axes of a case: those of its label, else of an image that has one channel, or channels in front."""
    return image.shape[-3:] if label is None else label.shape


def slice_files(folder):
    """{stack: the files <stack>_slice_<k>.h5 in `folder`, by rising k}."""
    stacks = {}
    for path in folder.glob("*_slice_*.h5"):
        stack, _, number = path.stem.rpartition("_slice_")
        if number.isdecimal():
            stacks.setdefault(stack, []).append((int(number), path))
    return {stack: [path for _, path in sorted(files)] for stack, files in stacks.items()}


class Slices(Dataset):
    """The 2-D slices of the cases of `dataset`, a CaseDataset or a cache.CachedDataset, as samples.

    A stack (S, H, W), or (C, S, H, W) with channels, gives a sample for each slice along its spatial `axis`; a case
    that is an image gives one. With `context` N, the N slices before and behind a slice are further channels, in order;
    beyond the ends the outermost slice stands for them (2.5-D). Indices, seeds and transforms are as in CaseDataset.
    """

    def __init__(self, dataset, axis=0, context=0):
        self.dataset, self.axis, self.context = dataset, axis, context
        self.image_list = dataset.image_list
        self.n_channels = dataset.n_channels * (2 * context + 1)
        shapes = {case: dataset.shapes[case] for case in self.image_list}
        self.places = [(c, k) for c, s in shapes.items() for k in (range(s[axis]) if len(s) == 3 else [None])]

    def __len__(self):
        return len(self.places)

    def case_of(self, index):
        return self.places[index][0]

    def __getitem__(self, index):
        index, seed = index if isinstance(index, tuple) else (index, None)
        case, number = self.places[index]
        sample = (self.dataset.views if hasattr(self.dataset, "views") else self.dataset.read)(case)
        if number is not None:
            image = slice_of(sample["image"], number, self.axis, self.context)
            sample = {"image": image, "label": slice_of(sample["label"], number, self.axis)}
        return self.dataset.transformed(case, sample, seed)


def slice_of(stack, number, axis=0, context=0):
    """Slice `number` along spatial `axis` of `stack`, (S, H, W) or (C, S, H, W), as (H, W) or (C, H, W).

    With `context` so many neighbours on either side are channels, ((2 context + 1) C, H, W), slice after slice.
    """
    last = stack.shape[axis - 3] - 1
    slices = [
        stack[(..., min(max(k, 0), last), *[slice(None)] * (2 - axis))]
        for k in range(number - context, number + context + 1)
    ]
    if not context:
        return slices[0]
    return np.stack(slices) if slices[0].ndim == 2 else np.concatenate(slices)


class JoinedCases(Dataset):
    """The samples of several data sets one after the other; indices as in LAHeart, with or without a seed.

    Raises DataError where their images have different numbers of channels.
    """

    def __init__(self, datasets):
        first, *others = datasets
        self.image_list = [case for dataset in datasets for case in dataset.image_list]
        self.places = [(dataset, index) for dataset in datasets for index in range(len(dataset))]
        self.n_channels = first.n_channels
        for other in others:
            if other.n_channels != first.n_channels:
                raise DataError(
                    f"case {other.image_list[0]} has {other.n_channels} channels and case {first.image_list[0]} has "
                    f"{first.n_channels}; prepare all cases alike"
                )

    def __len__(self):
        return len(self.places)

    def case_of(self, index):
        dataset, index = self.places[index]
        return dataset.case_of(index)

    def __getitem__(self, index):
        index, seed = index if isinstance(index, tuple) else (index, None)
        dataset, index = self.places[index]
        return dataset[index, seed]
