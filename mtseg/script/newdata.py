"""What the scripts in data/ share: a new data set in the layout of datasets.py, which is there whole or not at all."""

import contextlib
import os
import tempfile
from pathlib import Path

import numpy as np

from mtseg.checkpoint import write_whole
from mtseg.classes import read_classes
from mtseg.layouts import LayoutError
from mtseg.preprocess import PreprocessError
from mtseg.script.config import read_config
from mtseg.script.values import natural
from mtseg.volumes import hdf5_bytes, read_volume


@contextlib.contextmanager
def new_folder(out):
    """Yields the path at which to build the folder `out`; it is moved there when that went well, else removed.

    Raises LayoutError where `out` is there already.
    """
    if out.exists():
        raise LayoutError(f"{out}: exists already; name another folder or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent, ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary) / out.name
        yield folder
        os.replace(folder, out)


def write_case(root, case, arrays, attributes):
    """Write `<root>/data/<case>/mri_norm2.h5`: `arrays` as gzipped data sets, and `attributes`."""
    write_whole(root / "data" / case / "mri_norm2.h5", hdf5_bytes(arrays, attributes))


def told_by(source, cases, channels, ignore=None):
    """(settings of the preprocessing: 'labels', 'channels', 'ignore' where there is one; the channels' names or None)
    of the layouts.Cases in the folder `source`: by its dataset.json, else by the labels of `cases`.

    `channels`: as from find_cases. `ignore`: the value where nobody labelled, before dataset.json's. LayoutError,
    ClassError, PreprocessError or VolumeError where they contradict the files or are no labels.
    """
    described = source / "dataset.json"
    content = read_config(described)
    told = content.get("channel_names", content.get("modality"))  # nnU-Net's and the Decathlon's word for it
    told = list(told.values()) if isinstance(told, dict) else told if isinstance(told, list) else None
    if channels and told and len(told) != len(channels):
        raise LayoutError(f"{described}: speaks of {len(told)} channels, but a case has {len(channels)} files")
    values = {0}
    if content.get("labels") is not None:
        table = read_classes(described)
        values, ignore = set(table.values), table.ignore if ignore is None else ignore
    else:
        for label in (case.label for case in cases if case.label):
            held = np.unique(read_volume(label).array)
            if not np.isfinite(held).all() or (held != np.rint(held)).any():
                raise PreprocessError(f"{label}: is no label, its voxels are not whole numbers; replace it")
            values |= {int(value) for value in held}
        values |= {1} if values <= {0, ignore} else set()  # of scans that nobody labelled yet: some class there will be
    told = told and [str(name) for name in told]
    ignored = {} if ignore is None else {"ignore": ignore}
    return {**ignored, "labels": sorted(values - set(ignored.values())), "channels": channels}, told


def add_split_flags(parser):
    """The flags of splits.split_by_patient, as an argument group."""
    flag = parser.add_argument_group("split, in patients (of images: specimens, sequences)").add_argument
    flag("--test", type=natural, default=0, metavar="N", help="patients to test on (default: 0)")
    flag("--val", type=natural, default=0, metavar="N", help="patients to validate on, for --val_list (default: 0)")
    flag("--labelnum", type=natural, metavar="N", help="labelled patients, first in train.list (default: not counted)")
    flag("--unlabeled", type=natural, metavar="N", help="patients behind them, of unused label (default: all others)")
    flag("--seed", type=natural, default=0, help="seed of the patients' order (default: 0)")
    which = "what of a case's name is the patient: the pattern's first group, else the match (default: recognised)"
    flag("--patient_id", "--group", metavar="REGEX", help=which)
    return parser
