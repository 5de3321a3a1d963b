"""Lists of cases, and volumes in the HDF5 layout of the UA-MT family.

<root>/train.list, <root>/test.list     one case name a line
<root>/data/<case>/mri_norm2.h5         'image' float (W, H, D) or (C, W, H, D), normalised; 'label' int (W, H, D)
"""

import contextlib
import math
from pathlib import Path

import h5py
import numpy as np
from torch.utils.data import Dataset

UNKNOWN = 255  # stands for the label of a voxel that has none


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
    return above if not ((path / "data").is_dir() or any(path.glob("*.list"))) and any(above.glob("*.list")) else path


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
            f"{file.filename}: '{name}' has shape {dataset.shape}, but the file stores hardly any of its voxels; make "
            f"or copy it again"
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
        cases = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
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
        raise DataError(
            f"{root / 'train.list'}: case {shared[0]} is in test.list too ({len(shared)} in all); remove it from one"
        )
    return cases


def test_cases(root):
    """The cases of `<root>/test.list`, [] where there is no such list."""
    path = Path(root) / "test.list"
    return read_list(path) if path.exists() else []


def unlabeled_cases(root, train_cases=(), val_cases=(), test_cases=()):
    """(case names of a folder of unlabelled data, list of sentences on what is remarkable about them).

    The names are those of `<root>/unlabeled.list`, else of train.list, else of all folders in data/. A case is known by
    its name, wherever its file lies. Those of `train_cases` are left out, since each is trained on already, with its
    label or without. Those of `test_cases` are not, but a sentence names them: a network that has learned from the
    images of test cases knows more of them than of others. DataError where one is in `val_cases`.
    """
    root = Path(root)
    path = next((root / name for name in ("unlabeled.list", "train.list") if (root / name).exists()), root / "data")
    folders = path.glob("*/mri_norm2.h5")
    listed = read_list(path) if path.suffix else sorted(file.parent.name for file in folders)
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


def intensity_notes(images):
    """A list of sentences on images that are constant, or whose values are far from mean 0 and standard deviation 1.

    `images`: pairs of a case's name and its image, (W, H, D) or (C, W, H, D), an array or a cache.LazyArray; of large
    ones every fourth voxel along each axis is looked at. Channels count one by one.
    """
    constant, unnormalised = {}, {}  # case -> what is wrong; a dict, since a case may have several channels
    for case, image in images:
        step = 4 if math.prod(image.shape[-3:]) > 2**18 else 1
        voxels = np.asarray(image[..., ::step, ::step, ::step], dtype=np.float64)
        for channel in voxels.reshape(-1, math.prod(voxels.shape[-3:])):
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


class LAHeart(Dataset):
    """Samples {'image', 'label'} of the listed cases, each read from its HDF5 file when asked for.

    `base_dir`: the folder with the case folders, `<root>/data`, as in the family; `<root>` itself is understood too.
    `split`: which list, `<split>.list` in `find_root(base_dir)`; or `cases`: names instead of a list. `num`: only the
    first `num` cases. `transform`: called with the sample. `num_classes`: labels of this value or above raise, except
    `ignore_index`; None lets all pass. `labelnum`: only so many cases, the first ones, must have a label (default:
    all). Without a label it is UNKNOWN everywhere.

    `dataset[index]` gives a sample. For `dataset[(index, seed)]` the transforms draw from sample['rng'], which is
    numpy.random.default_rng(seed), so that the sample depends on nothing else (see samplers.IterationSampler).

    `n_channels`: of the images, the same in all cases.

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
        self.image_list = (read_list(find_root(base_dir) / f"{split}.list") if cases is None else list(cases))[:num]
        self.transform = transform
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.labeled = set(self.image_list[:labelnum])
        channels = {}  # number of channels -> the first case that has so many
        for case in self.image_list:
            with self._opened(case) as (image, _):
                channels.setdefault(1 if image.ndim == 3 else image.shape[0], case)
        if len(channels) > 1:
            (a, first), (b, second) = list(channels.items())[:2]
            raise DataError(
                f"{self.base_dir}: case {first} has {a} channels and case {second} has {b}; prepare all cases alike"
            )
        self.n_channels = next(iter(channels), 1)

    def __len__(self):
        return len(self.image_list)

    def __getitem__(self, index):
        index, seed = index if isinstance(index, tuple) else (index, None)
        case = self.image_list[index]
        return self.transformed(case, self.read(case), seed)

    def transformed(self, case, sample, seed=None):
        """What the transform makes of `sample`, which is that of `case`; it draws from default_rng(seed)."""
        if self.transform is None:
            return sample
        if seed is not None:
            sample["rng"] = np.random.default_rng(seed)
        try:
            sample = self.transform(sample)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise DataError(
                f"{self.path(case)}: case {case} cannot be augmented ({reason}); look at it, or remove it from its list"
            ) from error
        sample.pop("rng", None)
        return sample

    def path(self, case):
        return self.base_dir / case / "mri_norm2.h5"

    def read(self, case):
        """The whole case as {'image': float32, 'label': uint8}, checked, without transform."""
        path = self.path(case)
        with self._opened(case) as (image, label):
            image, label = image[...].astype(np.float32), None if label is None else label[...]
        if not np.isfinite(image).all():
            raise DataError(
                f"{path}: the image of case {case} holds NaN or infinity; repair it or remove the case from its list"
            )
        if label is None:
            return {"image": image, "label": np.full(image.shape[-3:], UNKNOWN, np.uint8)}
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
        """The open data sets (image, label) of the case, checked but for their values; the label may be None."""
        path = self.path(case)
        try:
            if not path.is_file():
                raise DataError(
                    f"{path}: no such file, but case {case} is listed; add the file or remove the case from its list"
                )
            with h5py.File(path, "r") as file:
                image, label = (read_hdf5(file, key) for key in ("image", "label"))
                for key, dataset in (("image", image), ("label", label)):
                    if dataset is None and (key == "image" or case in self.labeled):
                        raise DataError(f"{path}: case {case} has no '{key}', only {sorted(file)}; prepare it again")
                    if dataset is not None and dataset.dtype.kind not in "biuf":
                        raise DataError(
                            f"{path}: '{key}' of case {case} is {dataset.dtype}, not numbers; prepare it again"
                        )
                shape = image.shape[-3:] if label is None else label.shape
                if image.shape[-3:] != shape or image.ndim not in (3, 4):
                    raise DataError(
                        f"{path}: case {case} has an image of shape {image.shape} and a label of shape {shape}; "
                        f"they must be (W, H, D) or (C, W, H, D), and (W, H, D)"
                    )
                if 0 in image.shape:
                    raise DataError(
                        f"{path}: case {case} has no voxels, its image is of shape {image.shape}; prepare it again, or "
                        f"remove the case from its list"
                    )
                yield image, label
        except DataError:
            raise
        except (OSError, RuntimeError, LookupError, AttributeError, TypeError, ValueError) as error:
            # HDF5 reports damage by many exceptions; whichever it is, the file cannot be used.
            reason = " ".join(str(error).split())
            raise DataError(
                f"{path}: case {case} is not a whole HDF5 file ({reason}); make or copy it again"
            ) from error


class JoinedCases(Dataset):
    """The samples of several data sets one after the other; indices as in LAHeart, with or without a seed.

    Raises DataError where their images have different numbers of channels.
    """

    def __init__(self, datasets):
        self.datasets = list(datasets)
        self.n_channels = self.datasets[0].n_channels
        for other in self.datasets[1:]:
            if other.n_channels != self.n_channels:
                raise DataError(
                    f"case {other.image_list[0]} has {other.n_channels} channels and case "
                    f"{self.datasets[0].image_list[0]} has {self.n_channels}; prepare all cases alike"
                )

    def __len__(self):
        return sum(map(len, self.datasets))

    def __getitem__(self, index):
        index, seed = index if isinstance(index, tuple) else (index, None)
        for dataset in self.datasets:
            if index < len(dataset):
                return dataset[index if seed is None else (index, seed)]
            index -= len(dataset)
        raise IndexError(index)
