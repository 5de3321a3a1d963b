"""What the scripts in data/ share: a new data set in the layout of datasets.py, which is there whole or not at all."""

import contextlib
import os
import shutil

import h5py

from mtseg.layouts import LayoutError


@contextlib.contextmanager
def new_folder(out):
    """Yields the path beside `out` to build the folder at, and renames it when that went well, else removes it.

    Raises LayoutError where `out` is there already.
    """
    if out.exists():
        raise LayoutError(f"{out}: exists already; name another folder or remove it")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_case(root, case, arrays, attributes):
    """Write `<root>/data/<case>/mri_norm2.h5`: `arrays` as gzipped data sets, and `attributes`."""
    path = root / "data" / case / "mri_norm2.h5"
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, compression="gzip")
        file.attrs.update(attributes)
