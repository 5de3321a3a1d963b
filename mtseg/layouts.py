"""Which files make up the cases of a folder, in the layouts that data sets come in.

nnU-Net, Medical Segmentation Decathlon     imagesTr/, labelsTr/, imagesTs/, labelsTs/, dataset.json
a folder of files                           <case>.nii.gz (channels inside), or a file a channel: <case>_0000.nii.gz ...
case folders, BraTS                         <case>/<case>_t1.nii.gz ... and <case>/<case>_seg.nii.gz ('-' for '_' too)
images                                      images/ and masks/ or labels/, unlabeled/ for images without masks; or a
                                            folder with x.png and x_mask.png (_label, _seg)
this library's own                          <case>/mri_norm2.h5
one case's folder, or one file              of any of them

Volumes end in .nii.gz, .nii, .nrrd, .h5 or .hdf5, images in .png, .tif or .tiff. Hidden files (the Decathlon's archives
hold some) are passed over, and so are images that lie beside volumes.
"""

import itertools
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

IMAGES = (".png", ".tif", ".tiff")
ENDINGS = (".nii.gz", ".nii", ".nrrd", ".h5", ".hdf5", *IMAGES)
NUMBERED = re.compile(r"(.+)_(\d{4})")
LABEL = re.compile(r"(.+)[_-]seg")
MASK = re.compile(r"(.+)[_-](mask|label|seg)")
NNUNET = {"imagesTr": ["labelsTr"], "imagesTs": ["labelsTs"]}
BESIDE = {**NNUNET, "images": ["masks", "labels"]}  # where the labels of a folder with this name lie
UNLABELED = "unlabeled"


class LayoutError(ValueError):
    """A folder that holds no cases, or cases that lack files; the message is one sentence with it and the remedy."""


class Case(NamedTuple):
    """`images`: a file, or a file a channel in the order of the channels. `label`: its file, None where it has none.

    `part`: 'Tr' or 'Ts' in an nnU-Net layout, '' elsewhere.
    """

    name: str
    images: tuple
    label: Path | None
    part: str = ""

    @property
    def files(self):
        """All its files."""
        return [*self.images, *filter(None, [self.label])]


def stem(path):
    """The name of a file without its ending; None where it does not have one of ENDINGS, or is hidden."""
    name = Path(path).name
    known = next((ending for ending in ENDINGS if name.lower().endswith(ending)), None)
    return None if known is None or name.startswith(".") else name[: -len(known)]


def _is_image(path):
    return path.suffix.lower() in IMAGES


def find_cases(source, channels=None, labels=None, broken=None):
    """(cases, channels): the Cases of `source` by name, and the parts of the names by which a case's files differ.

    `channels`: those parts where they are known (settings["channels"] of a data set), in their order, else None: they
    are then those of most cases, sorted. The returned one is None where a case is one file. `labels`: folder with the
    labels, <case> or <case>_seg with any ending; without it they are looked for where the layout has them. `broken`: a
    dict that gets {case: what is wrong with its files, in a sentence}, while the other cases are returned. Raises
    LayoutError.
    """
    source = Path(source)
    if labels is not None and not Path(labels).is_dir():
        raise LayoutError(f"{labels}: no such folder; give the one with the labels")
    groups, files_of, cases = _groups(source, channels), {}, []
    for name, files, *_ in groups:
        single = isinstance(files, dict) and files.keys() == {"0000"}  # nnU-Net numbers a single channel, too
        files_of[name] = {"": files["0000"]} if single else files
    counts = Counter(tuple(sorted(files)) for files in files_of.values() if isinstance(files, dict))
    parts = sorted(channels) if channels else list(counts.most_common(1)[0][0]) if counts else [""]
    for name, _, label, *part in groups:
        files = files_of[name]
        if isinstance(files, dict) and sorted(files) != parts:
            these, usual = (", ".join(filter(None, names)) or "one file" for names in (sorted(files), parts))
            differ = f"case {name} has {these} where the data set has {usual} a case"
            files = LayoutError(f"{next(iter(files.values()))}: {differ}; add or remove files")
        if isinstance(files, LayoutError):
            if broken is None:
                raise files
            broken[name] = str(files)
            continue
        images = tuple(files[part] for part in (channels or parts))
        cases.append(Case(name, images, _label_of(name, Path(labels), files_of) if labels else label, *part))
    if not cases:
        raise LayoutError(next(iter(broken.values())))
    if labels is not None and not any(case.label for case in cases):
        such = cases[0].name + (".png" if _is_image(cases[0].images[0]) else ".nii.gz")
        raise LayoutError(f"{labels}: holds the label of none of the cases, e.g. {such}; rename them")
    return cases, None if parts == [""] else channels or parts


def _groups(source, channels):
    """[(case, {channel: file}, label, part where there are any), ...] by name, of the layout that `source` has."""
    if not source.exists():
        raise LayoutError(f"{source}: no such file or folder")
    if source.is_file():
        groups = _one_file(source, channels)
    elif any((source / name).is_dir() for name in NNUNET):
        groups = [(*group, name[-2:]) for name in NNUNET for group in _labelled(source / name, channels)]
    elif source.name in BESIDE and not any((source / name).is_dir() for name in BESIDE):
        groups = _labelled(source, channels)
    elif _is_case_folder(source.absolute(), channels):
        groups = _case_folders([source.absolute()])
    else:
        both = [*_labelled(source / "images", channels), *_flat(source / UNLABELED, channels)]
        flat = _flat(source, channels)
        beside = any((source / name).is_dir() for name in (*BESIDE["images"], UNLABELED))
        groups = (both or flat if beside else flat or both) or _case_folders(source.rglob("*"))
    if not groups:
        needed = f"imagesTr/ or images/, or files ending in {', '.join(ENDINGS)}, or a folder a case with them"
        other = [path.name for path in source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".bmp")][:1]
        remedy = "".join(f"; {name} is to be saved as PNG, from an original that is no JPEG" for name in other)
        raise LayoutError(f"{source}: no volumes in it and no images; it must hold {needed}{remedy}")
    groups = sorted(groups, key=lambda group: group[0])
    for before, after in itertools.pairwise(groups):
        if before[0] == after[0]:
            raise LayoutError(f"{source}: two cases are called {after[0]}; rename one of them")
    return groups


def _labelled(images, channels, groups=None):
    """As `_flat`, of `images`, a folder called as in BESIDE, or of `groups` in it, with the labels that lie there."""
    groups = _flat(images, channels) if groups is None else groups
    names, labelled = {name for name, *_ in groups}, []
    for name, files, label in groups:
        for folder in BESIDE[images.name]:
            label = label or _label_of(name, images.absolute().parent / folder, names)
        labelled.append((name, files, label))
    return labelled


def _label_of(name, folder, names):
    """The label of a case: the file with its name, else with a suffix, which none of the cases' `names` has."""
    suffixes = (f"{dash}{word}" for word in ("seg", "mask", "label") for dash in "_-")
    for stems in [name], [name + suffix for suffix in suffixes if name + suffix not in names]:
        found = []
        for case_of in (str.lower, str.upper):  # "a.PNG", where letters have two sizes
            paths = [folder / (stem + case_of(ending)) for stem in stems for ending in ENDINGS]
            found = found or [path for path in paths if path.is_file()]
        if len(found) > 1 and _is_image(found[0]):
            raise _two_labels(name, *found[:2])
        if found:
            return found[0]
    return None


def _two_labels(case, first, second):
    return LayoutError(f"{second}: case {case} has another label, {first.name}, too; remove one of them")


def masks_without_image(source, cases):
    """The files with labels in `source` that belong to none of `cases`, those that `find_cases` gave, sorted."""
    source = Path(source).absolute()
    root = source.parent if source.name in BESIDE else source
    # Of one of several folders of images: what belongs to the others is theirs.
    asked = [name for name in BESIDE if source in (root, root / name) or not (root / name).is_dir()]
    folders = [root / name for images in asked for name in BESIDE[images]]
    files = [path for folder in folders if folder.is_dir() for path in folder.iterdir() if stem(path) is not None]
    files += [path for path in source.glob("*") if _is_image(path) and MASK.fullmatch(stem(path) or "")]
    if not any(_is_image(path) for case in cases for path in case.files):  # pictures beside volumes are passed over
        files = [path for path in files if not _is_image(path)]
    used = {path.resolve() for case in cases for path in (*case.images, case.label) if path}
    return sorted(path for path in files if path.resolve() not in used)


def _flat(folder, channels=None):
    """[(case, {channel: file}, label)] of the files in a folder; the channel is '' where a case is one file.

    A number of four digits at the end is a channel where the case has a 0000, or `channels` are such numbers, and else
    part of the name (PANCREAS_0001); of images, whose sequences are numbered so, the 0000 says it in nnU-Net's layout
    only. The label is <case>_seg, where that lies beside; of images <case>_mask or <case>_label, too, and such a file
    is never an image, but in a folder that is called as one of images. In the place of files that contradict each
    other, and of a volume's label without the volume in any other folder, is a LayoutError.
    """
    found = [path for path in sorted(folder.iterdir()) if stem(path) and path.is_file()] if folder.is_dir() else []
    volumes = [path for path in found if not _is_image(path)]
    names = {}
    for path in volumes or found:
        names.setdefault(stem(path), []).append(path)
    called = folder.absolute().name
    is_label = LABEL if volumes else None if called in (*BESIDE, UNLABELED) else MASK
    known = [*(channels or ()), *(["0000"] if volumes or called in NNUNET else [])]
    groups = {}
    for name, paths in names.items():
        numbered = NUMBERED.fullmatch(name)
        is_channel = numbered and any(f"{numbered[1]}_{channel}" in names for channel in known)
        case, channel = numbered.groups() if is_channel else (name, "")
        files = groups.setdefault(case, {})
        if len(paths) > 1:
            twice = f"case {case} has this file with another ending too; remove one of them"
            groups[case] = LayoutError(f"{paths[1]}: {twice}")
        elif not isinstance(files, LayoutError):
            files[channel] = paths[0]
    labels = {}
    for case in list(groups) if is_label else ():
        of = is_label.fullmatch(case)
        single = not isinstance(groups[case], LayoutError) and groups[case].keys() == {""}
        alone = of and volumes and of[1] not in groups
        if of and single and not (alone and called in (*BESIDE, UNLABELED)):
            path = groups.pop(case)[""]
            if alone:
                groups[case] = LayoutError(f"{path}: a label without an image; add the image or remove it")
            elif of[1] in labels:
                groups[of[1]] = _two_labels(of[1], labels[of[1]], path)
            labels[of[1]] = path
    return [(case, files, labels.get(case)) for case, files in groups.items()]


def _one_file(path, channels):
    """As `_flat`, of the case that one of its files, `path`, belongs to."""
    name, folder = stem(path), path.absolute().parent
    if name is None:
        raise LayoutError(f"{path}: not a volume or image this can read; convert it to one of {', '.join(ENDINGS)}")
    if name == "mri_norm2":
        return [(folder.name, {"": path}, None)]
    if channels and _is_case_folder(folder, channels):
        return _case_folders([folder])
    numbered = NUMBERED.fullmatch(name)
    if channels and numbered:
        groups = [group for group in _flat(path.parent, channels) if group[0] == numbered[1]]
    else:
        sequence = _is_image(path) and folder.name not in NNUNET
        single = numbered and numbered[2] == "0000" and not sequence
        groups = [(numbered[1] if single else name, {"": path}, None)]
    return _labelled(folder, channels, groups) if folder.name in BESIDE else groups


def _is_case_folder(folder, channels):
    """Whether all volumes in `folder` are called after it: <folder>_<channel>, or mri_norm2.

    Where the `channels` are not known, there must be a _seg, and numbers are no channels: in a folder 'heart', heart_1
    and heart_2 are two cases.
    """
    names = {stem(path) for path in folder.iterdir() if path.is_file() and not _is_image(path)} - {None}
    matches = [re.fullmatch(re.escape(folder.name) + r"[_-](.+)", name) for name in names]
    parts = {match[1] for match in matches if match}
    known = parts >= set(channels) if channels else parts > {"seg"} and not any(map(str.isdigit, parts))
    return names == {"mri_norm2"} or (bool(matches) and all(matches) and known)


def _case_folders(folders):
    """As `_flat`, of those `folders` whose files are called after them; the label is the file 'seg'."""
    groups = []
    for folder in sorted(path for path in folders if path.is_dir()):
        files, label = {}, None
        for path in sorted(folder.iterdir()):
            name = stem(path)
            if name is None or not path.is_file() or _is_image(path):
                continue
            part = re.fullmatch(re.escape(folder.name) + r"[_-](.+)", name)
            if name in ("mri_norm2", folder.name):
                files[""] = path
            elif part is None:
                called = f"every file is called {folder.name}_<channel>, the label {folder.name}_seg"
                raise LayoutError(f"{path}: in a case's folder {called}; rename or remove it")
            elif part[1] == "seg":
                label = path
            elif part[1] in files:
                raise LayoutError(f"{path}: the case has this file with another ending too; remove one of them")
            else:
                files[part[1]] = path
        if files:
            groups.append((folder.name, files, label))
        elif label:
            raise LayoutError(f"{label}: a label without an image; add the image or remove the folder")
    return groups
