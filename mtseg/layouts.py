"""Which files make up the cases of a folder, in the layouts that data sets come in.

nnU-Net, Medical Segmentation Decathlon     imagesTr/, labelsTr/, imagesTs/, labelsTs/, dataset.json
a folder of files                           <case>.nii.gz (channels inside), or a file a channel: <case>_0000.nii.gz ...
case folders, BraTS                         <case>/<case>_t1.nii.gz ... and <case>/<case>_seg.nii.gz ('-' for '_' too)
this library's own                          <case>/mri_norm2.h5
one file                                    any of them

Files end in .nii.gz, .nii, .nrrd, .h5 or .hdf5; hidden files (the Decathlon's archives hold some) are passed over.
"""

import itertools
import json
import re
from pathlib import Path
from typing import NamedTuple

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".h5", ".hdf5")
NUMBERED = re.compile(r"(.+)_(\d{4})")


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


def stem(path):
    """The name of a volume's file without its ending; None where it does not have one of ENDINGS, or is hidden."""
    name = Path(path).name
    known = next((ending for ending in ENDINGS if name.lower().endswith(ending)), None)
    return None if known is None or name.startswith(".") else name[: -len(known)]


def find_cases(source, channels=None, labels=None):
    """(cases, channels): the Cases of `source` by name, and the parts of the names by which a case's files differ.

    `channels`: those parts where they are known (settings["channels"] of a data set), in their order, else None: they
    are then the first case's, sorted. The returned one is None where a case is one file. `labels`: folder with the
    labels, <case> or <case>_seg with any ending; without it they are looked for where the layout has them. Raises
    LayoutError.
    """
    source = Path(source)
    if not source.exists():
        raise LayoutError(f"{source}: no such file or folder")
    if labels is not None and not Path(labels).is_dir():
        raise LayoutError(f"{labels}: no such folder; give the one with the labels")
    if source.is_file():
        groups = _one_file(source, channels)
    elif (source / "imagesTr").is_dir() or (source / "imagesTs").is_dir():
        groups = []
        for part in ("Tr", "Ts"):
            for name, files, _ in _flat(source / f"images{part}"):
                groups.append((name, files, _label_of(name, source / f"labels{part}"), part))
    else:
        groups = _flat(source) or _case_folders(source)
    if not groups:
        raise LayoutError(
            f"{source}: no volumes in it; it must hold imagesTr/, or files ending in {', '.join(ENDINGS)}, or a folder "
            f"a case with them"
        )
    groups = sorted(groups, key=lambda group: group[0])
    for before, after in itertools.pairwise(groups):
        if before[0] == after[0]:
            raise LayoutError(f"{source}: two cases are called {after[0]}; rename one of them")
    parts, cases = channels and sorted(channels), []
    for name, files, label, *part in groups:
        if files.keys() == {"0000"}:
            files = {"": files["0000"]}  # nnU-Net numbers a single channel, too
        parts = parts or sorted(files)
        if sorted(files) != parts:
            here, there = (", ".join(filter(None, names)) or "one file" for names in (sorted(files), parts))
            raise LayoutError(
                f"{next(iter(files.values()))}: case {name} has {here} where the data set has {there} a case; add or "
                f"remove files"
            )
        images = tuple(files[part] for part in (channels or parts))
        cases.append(Case(name, images, _label_of(name, Path(labels)) if labels else label, *part))
    if labels is not None and not any(case.label for case in cases):
        raise LayoutError(f"{labels}: holds the label of none of the cases, e.g. {cases[0].name}.nii.gz; rename them")
    return cases, None if parts == [""] else channels or parts


def _label_of(name, folder):
    paths = (folder / f"{name}{suffix}{ending}" for suffix in ("", "_seg", "-seg") for ending in ENDINGS)
    return next((path for path in paths if path.is_file()), None)


def _flat(folder):
    """[(case, {channel: file}, None)] of the files in a folder; the channel is '' where a case is one file."""
    groups = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = stem(path)
        if name is None or not path.is_file():
            continue
        numbered = NUMBERED.fullmatch(name)
        case, channel = numbered.groups() if numbered else (name, "")
        if channel in groups.setdefault(case, {}):
            raise LayoutError(f"{path}: case {case} is there twice, with another ending too; remove one of the files")
        groups[case][channel] = path
    return [(case, files, None) for case, files in groups.items()]


def _one_file(path, channels):
    name = stem(path)
    if name is None:
        raise LayoutError(f"{path}: not a volume this can read; convert it to one of {', '.join(ENDINGS)}")
    if name == "mri_norm2":
        return [(path.resolve().parent.name, {"": path}, None)]
    numbered = NUMBERED.fullmatch(name)
    if channels and numbered:
        return [group for group in _flat(path.parent) if group[0] == numbered[1]]
    return [(numbered[1] if numbered else name, {"": path}, None)]


def _case_folders(source):
    """As `_flat`, of the folders at any depth whose files are called after them; the label is the file 'seg'."""
    groups = []
    for folder in sorted(path for path in source.rglob("*") if path.is_dir()):
        files, label = {}, None
        for path in sorted(folder.iterdir()):
            name = stem(path)
            if name is None or not path.is_file():
                continue
            part = re.fullmatch(re.escape(folder.name) + r"[_-](.+)", name)
            if name in ("mri_norm2", folder.name):
                files[""] = path
            elif part is None:
                raise LayoutError(
                    f"{path}: in a case's folder every file is called {folder.name}_<channel>, the label "
                    f"{folder.name}_seg; rename or remove it"
                )
            elif part[1] == "seg":
                label = path
            elif part[1] in files:
                raise LayoutError(f"{path}: is there twice, with another ending too; remove one of the files")
            else:
                files[part[1]] = path
        if files:
            groups.append((folder.name, files, label))
        elif label:
            raise LayoutError(f"{label}: a label without an image; add the image or remove the folder")
    return groups


def read_dataset_json(path):
    """{'labels': ascending values, or None; 'channels': their number, or None} of a dataset.json of either version.

    The Decathlon's has {"0": "background", ...} and "modality", nnU-Net v2's {"background": 0, ...} and
    "channel_names". A region of v2 (a list of values) stands for the values in it. Raises LayoutError.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        labels, channels = content.get("labels"), content.get("channel_names", content.get("modality"))
        if labels is not None:
            if any(str(name).lower() == "ignore" for name in labels):
                raise LayoutError(f"{path}: has a label to be ignored, which is not understood here; relabel it")
            values = set()
            for name, value in labels.items():
                whole = name if isinstance(value, str) else value
                values |= {int(v) for v in (whole if isinstance(whole, list) else [whole])}
            labels = sorted(values | {0})
        return {"labels": labels, "channels": None if channels is None else len(channels)}
    except LayoutError:
        raise
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise LayoutError(f"{path}: not a dataset.json ({' '.join(str(error).split())}); repair it") from error
