"""What the scripts in data/ share: a new data set in the layout of datasets.py, which is there whole or not at all."""

import contextlib
import os
import tempfile
from pathlib import Path

import h5py

from mtseg.layouts import LayoutError


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
    path = root / "data" / case / "mri_norm2.h5"
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, compression="gzip")
        file.attrs.update(attributes)
