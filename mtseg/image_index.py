"""An index of images: the files of each sample, over several data sets. As JSON:

    {"format": 1,
     "datasets": {"steel": {"root": "../steel", "classes": {...}, "snap": false}, ...},
     "samples": [{"id": "steel__a", "dataset": "steel", "image": "images/a.png", "mask": "masks/a.png", "group": "a",
                  "height": 484, "width": 645, "sha256": "...", "pixels": {"0": 231, "1": 12}}, ...]}

"root" is absolute or relative to the index's folder, files are relative to it and lie inside. In place of "image",
"frames" is a list of files that become the channels of one image; the mask is that of the middle one. "classes" is what
the set's classes.json holds, "snap" whether colours near a class's are taken for it. A sample without "mask" is
unlabelled; what follows "mask" may be left out.
"""

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

LARGEST = 2**27  # bytes of an index: some 500,000 samples


class ImageIndexError(ValueError):
    """An index that cannot be used; the message is one sentence with its file."""


class DataSet(NamedTuple):
    """`root`: the folder that files are relative to. `classes`: the content of a classes.json, or None."""

    root: Path
    classes: dict | None = None
    snap: bool = False


@dataclass(frozen=True)
class Sample:
    """`images`: the image's file, or those of its channels. `mask`: its file. `group`: what must not be on two sides of
    a split. `sha256`: of the image's pixels. `pixels`: {class number: how many} in the mask. All but the first
    three may be None."""

    id: str
    dataset: str
    images: tuple
    mask: Path | None = None
    group: str | None = None
    height: int | None = None
    width: int | None = None
    sha256: str | None = None
    pixels: dict | None = None


@dataclass(frozen=True)
class Index:
    """`path`: its file. `datasets`: {name: DataSet}. `samples`: a list of Sample.

    Raises ImageIndexError where an id is a path or there twice, and where a file is missing.
    """

    path: Path
    datasets: dict
    samples: list

    def __post_init__(self):
        counts = Counter(sample.id for sample in self.samples)
        for sample in self.samples:
            name, missing = sample.id, [file for file in (*sample.images, sample.mask) if file and not file.is_file()]
            if name in ("", ".", "..") or name != name.strip() or not name.isprintable() or {*name} & {*"/\\"}:
                raise ImageIndexError(f"{self.path}: the id of sample {name!r} is not a name but a path; rename it")
            if counts[name] > 1:
                raise ImageIndexError(f"{self.path}: sample {name} is there {counts[name]} times; rename all but one")
            if missing:
                raise ImageIndexError(f"{self.path}: {missing[0]}, of sample {name}, is missing; add it or index again")

    def to_json(self):
        """The index as the text of a file at `path`; the sets' roots become relative to that."""
        folder, datasets, samples = self.path.resolve().parent, {}, []
        for name, data in self.datasets.items():
            root = Path(os.path.relpath(data.root.resolve(), folder)).as_posix()
            datasets[name] = {**data._asdict(), "root": root}
        for sample in self.samples:
            entry, root = asdict(sample), self.datasets[sample.dataset].root
            files = [file.relative_to(root).as_posix() for file in entry.pop("images")]
            entry["mask"] = sample.mask and sample.mask.relative_to(root).as_posix()
            images = {"image": files[0]} if len(files) == 1 else {"frames": files}
            samples.append(json.dumps({"id": sample.id, "dataset": sample.dataset, **images, **entry}))
        lines = ",\n".join(samples)
        return f'{{"format": 1,\n"datasets": {json.dumps(datasets)},\n"samples": [\n{lines}\n]}}\n'


def name_of(stem, dataset, several):
    """The id of the image file `stem`: with the name of its data set in front where there are several sets."""
    return f"{dataset}__{stem}" if several else stem


def read_index(path):
    """The Index in a JSON file as above, or in one of SRPU-Model (datasets_info, and samples with frames).

    Sets without classes get those of a classes.json beside it. Only names are read, no image is opened. Raises
    ImageIndexError as Index does, for a file that is no index, and where one outside of its set's folder is named.
    """
    path = Path(path)
    content, beside = _json(path), path.parent / "classes.json"
    classes = _json(beside) if beside.is_file() else None
    try:
        datasets, samples = (_own if "format" in content else _srpu)(content, path.absolute())
        datasets = {name: data if data.classes else data._replace(classes=classes) for name, data in datasets.items()}
        return Index(path, datasets, samples)
    except ImageIndexError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ImageIndexError(f"{path}: not an index ({type(error).__name__}: {error}); make it again") from error


def _json(path):
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if isinstance(content, dict):
            return content
        raise ValueError("it does not hold {...}")
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ImageIndexError(f"{path}: not a JSON file that can be read ({reason}); name another") from error


def _inside(path, root, file):
    """`root` / `file`; ImageIndexError where that leaves `root`: the index at `path` may come from a stranger."""
    inner = PurePosixPath(file.replace("\\", "/"))
    if inner.is_absolute() or ".." in inner.parts or ":" in inner.parts[0]:
        raise ImageIndexError(f"{path}: file {file!r} is not in its data set's folder {root}; move it there")
    return root / inner


def _own(content, path):
    if content["format"] != 1:
        raise ImageIndexError(f"{path}: has format {content['format']!r}, only 1 is known; take a newer mtseg")
    datasets = {
        name: DataSet(path.parent / entry["root"], entry.get("classes"), bool(entry.get("snap")))
        for name, entry in content["datasets"].items()
    }
    samples = []
    for entry in content["samples"]:
        root, mask = datasets[entry["dataset"]].root, entry.get("mask")
        images = tuple(_inside(path, root, file) for file in entry.get("frames") or [entry["image"]])
        more = {name: entry.get(name) for name in ("group", "height", "width", "sha256")}
        pixels = entry.get("pixels") and {int(number): int(count) for number, count in entry["pixels"].items()}
        mask = None if mask is None else _inside(path, root, mask)
        samples.append(Sample(entry["id"], entry["dataset"], images, mask, **more, pixels=pixels))
    return datasets, samples


def _srpu(content, path):
    def found(inner):  # its paths begin in its project's folder, where this file lies in json/
        return next((base / inner for base in path.parents[:2] if (base / inner).exists()), path.parent / inner)

    info, samples = content["datasets_info"], []
    roots = {name: (found(entry["raw_image_root"]), found(entry["mask_root"])) for name, entry in info.items()}
    for entry in content["samples"]:
        images, masks = roots[entry["dataset"]]
        files, mask = tuple(_inside(path, images, file) for file in entry["frames"]), entry.get("mask_file")
        mask = _inside(path, masks, mask) if mask else None
        samples.append(Sample(entry["sample_id"], entry["dataset"], files, mask))
    return {name: DataSet(Path(os.path.commonpath(folders))) for name, folders in roots.items()}, samples
