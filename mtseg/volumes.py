"""Medical volumes from files and back onto their grid: NIfTI (NiBabel), NRRD (pynrrd) and HDF5.

An array is (W, H, D), or (C, W, H, D) with channels first, whatever axis the file has them on; W, H and D are the
file's spatial axes in the file's order. An affine is a 4 x 4 matrix that takes voxel indices to millimetres in the
patient's frame with axes to the right, the front and above (RAS+, NIfTI's own; NRRD's left-posterior-superior is
turned into it). NIfTI files that name no unit of length are taken to be in millimetres, as ITK and NiBabel take them.
"""

import gzip
import io
import math
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".h5", ".hdf5")
NIFTI_GRID = ("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d")
NIFTI_GRID += ("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z")
NIFTI_MILLIMETRES = {"meter": 1e3, "mm": 1.0, "micron": 1e-3, "unknown": 1.0}
NRRD_MILLIMETRES = {"m": 1e3, "cm": 10.0, "mm": 1.0, "um": 1e-3}
DEFLATED = 1032  # bytes of which gzip makes one, at most
WIDTHS = (1e-6, 1e4)  # millimetres that a voxel can be wide: from a nanometre to ten metres
NRRD_TO_RAS = {
    **dict.fromkeys(("right-anterior-superior", "RAS"), (1, 1, 1)),
    **dict.fromkeys(("left-anterior-superior", "LAS"), (-1, 1, 1)),
    **dict.fromkeys(("left-posterior-superior", "LPS"), (-1, -1, 1)),
}


class VolumeError(ValueError):
    """A file that is no usable volume, or a package that is missing; one sentence with the file and the remedy."""


class Volume(NamedTuple):
    """`affine` (4, 4) and `spacing` (3 millimetres, along W, H and D) are None where the file does not say.

    `header`: what the file's format says of the grid, for `volume_bytes`. `label`: HDF5 only, the (W, H, D) label that
    stands in the same file, or None.
    """

    array: np.ndarray
    affine: np.ndarray | None
    spacing: np.ndarray | None
    header: Any
    label: np.ndarray | None = None


def ending(path):
    """The ending of a volume's file name, one of ENDINGS; VolumeError for any other."""
    for known in ENDINGS:
        if str(path).lower().endswith(known):
            return known
    raise VolumeError(f"{path}: not a volume this can read; convert it to one of {', '.join(ENDINGS)}")


def need(package, what):
    """Import an optional package, or say which `pip install` brings it. `what` begins the sentence."""
    try:
        return __import__(package)
    except ImportError as error:
        name = {"nibabel": "NiBabel", "nrrd": "pynrrd"}[package]
        raise VolumeError(f"{what} needs {name}: pip install {name.lower()}") from error


def read_volume(path, header_only=False):
    """The Volume in a NIfTI, NRRD or HDF5 file (its dataset 'image'); with `header_only` the array is None.

    Values are as the file means them: NIfTI's slope and intercept are applied, integers without them stay integers.
    Raises VolumeError for a file that is missing, damaged, of another format or of other dimensions, that has no
    voxels, whose voxels lie in other files, or that claims more voxels than it can hold, before memory is taken for it.
    """
    path = Path(path)
    kind = ending(path)
    if not path.is_file():
        raise VolumeError(f"{path}: no such file")
    read = {".h5": _read_hdf5, ".hdf5": _read_hdf5, ".nrrd": _read_nrrd}.get(kind, _read_nifti)
    try:
        return read(path, header_only)
    except VolumeError:
        raise
    except Exception as error:  # There is no end to what the packages raise on damaged files.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise VolumeError(f"{path}: not a whole {kind} file ({reason}); make or copy it again") from error


def _check_size(path, shape, bytes_a_voxel, stored):
    """VolumeError where there are no voxels, or more than the `stored` bytes of the file can hold; 1 MiB is allowed."""
    if 0 in shape:
        raise VolumeError(f"{path}: has shape {tuple(shape)}, that is no voxels; make it again or leave the case out")
    if math.prod(map(int, shape)) * bytes_a_voxel > 2**20 + stored:
        claimed = " x ".join(map(str, shape))
        raise VolumeError(f"{path}: claims {claimed} voxels, but the file cannot hold so many; make or copy it again")


def _with_grid(path, array, affine, spacing, header, label=None):
    if spacing is not None and not ((spacing >= WIDTHS[0]) & (spacing <= WIDTHS[1])).all():
        raise VolumeError(f"{path}: its voxels are {spacing} mm wide, which cannot be; repair the header")
    if affine is not None and not (np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3] / spacing)) > 1e-3):
        raise VolumeError(f"{path}: its affine is singular, two axes point the same way; repair the header")
    if array is not None and array.dtype.kind not in "biuf":
        raise VolumeError(f"{path}: its voxels are of type {array.dtype}, not numbers; convert them")
    return Volume(array, affine, spacing, header, label)


def _read_nifti(path, header_only):
    nibabel = need("nibabel", f"{path}: reading NIfTI")
    image = nibabel.load(path)
    if not isinstance(image, nibabel.Nifti1Image):
        raise VolumeError(f"{path}: is named NIfTI but is {type(image).__name__}; convert it")
    shape = image.shape
    # Trailing axes of length 1 say nothing; ITK puts the channels of a vector image on the fifth axis.
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) == 5 and shape[3] == 1:
        shape = (*shape[:3], shape[4])
    if len(shape) not in (3, 4):
        raise VolumeError(f"{path}: has shape {image.shape}; a volume is (W, H, D), with channels (W, H, D, C)")
    stored = path.stat().st_size * (DEFLATED if ending(path) == ".nii.gz" else 1)
    _check_size(path, shape, image.get_data_dtype().itemsize, stored)
    array = None if header_only else np.asarray(image.dataobj).reshape(shape)
    scale = NIFTI_MILLIMETRES[image.header.get_xyzt_units()[0]]
    affine = np.diag((scale, scale, scale, 1.0)) @ image.affine
    if array is not None and array.ndim == 4:
        array = np.moveaxis(array, -1, 0)
    return _with_grid(path, array, affine, np.linalg.norm(affine[:3, :3], axis=0), image.header)


def _read_nrrd(path, header_only):
    nrrd = need("nrrd", f"{path}: reading NRRD")
    header = nrrd.read_header(str(path))
    if "data file" in header or "datafile" in header:
        raise VolumeError(f"{path}: its voxels lie in another file; write them into this one, behind the header")
    stored = path.stat().st_size
    if header["encoding"] not in ("raw", "ascii", "text", "txt"):
        # pynrrd unpacks bzip2, which has no such limit, before it makes an array of what it got.
        stored *= DEFLATED if header["encoding"] in ("gzip", "gz") else math.inf
    _check_size(path, header["sizes"], 1, stored)
    array = None if header_only else nrrd.read(str(path))[0]
    dims = int(header["dimension"])
    spatial = _nrrd_spatial_axes(header)
    if dims not in (3, 4) or len(spatial) != 3:
        raise VolumeError(f"{path}: has {dims} axes, {len(spatial)} of them spatial; a volume has 3 and channels")
    affine = spacing = None
    units = header.get("space units", [header["units"][axis] for axis in spatial] if "units" in header else [])
    units = {str(unit).strip('" ') or "mm" for unit in units or ["mm"]}
    scale = NRRD_MILLIMETRES.get(units.pop() if len(units) == 1 else None)
    if scale and "space directions" in header:
        directions = scale * np.asarray(header["space directions"], dtype=float)[spatial]
        spacing = np.linalg.norm(directions, axis=1)
        if header.get("space") in NRRD_TO_RAS and "space origin" in header:
            affine = np.eye(4)
            affine[:3, :3], affine[:3, 3] = directions.T, scale * np.asarray(header["space origin"], dtype=float)
            affine = np.diag((*NRRD_TO_RAS[header["space"]], 1.0)) @ affine
    elif scale and "spacings" in header:
        spacing = scale * np.asarray(header["spacings"], dtype=float)[spatial]
        spacing = None if np.isnan(spacing).any() else spacing
    if array is not None and dims == 4:
        array = np.moveaxis(array, next(axis for axis in range(4) if axis not in spatial), 0)
    return _with_grid(path, array, affine, spacing, header)


def _nrrd_spatial_axes(header):
    """The axes of an NRRD file that lie in space, in order; the other one, if any, holds the channels."""
    axes = range(int(header["dimension"]))
    if len(axes) == 3:
        return list(axes)
    if "space directions" in header:
        directions = np.asarray(header["space directions"], dtype=float)
        return [axis for axis in axes if not np.isnan(directions[axis]).any()]
    return [axis for axis, kind in zip(axes, header.get("kinds", ()), strict=False) if kind in ("domain", "space")]


def _read_hdf5(path, header_only):
    with h5py.File(path, "r") as file:
        attributes = {name: np.asarray(value) for name, value in file.attrs.items()}
        image, label = (_hdf5_dataset(path, file, name) for name in ("image", "label"))
        if image is None:
            raise VolumeError(f"{path}: has no data set 'image', only {sorted(file)}; prepare it again")
        shape = image.shape
        array = None if header_only else image[...]
        label = None if header_only or label is None else label[...]
    if len(shape) not in (3, 4) or (label is not None and label.shape != shape[-3:]):
        raise VolumeError(
            f"{path}: has an image of shape {shape} and a label of shape {None if label is None else label.shape}; "
            f"they must be (W, H, D) or (C, W, H, D), and (W, H, D)"
        )
    spacing = attributes.get("spacing")
    if spacing is not None and (spacing.shape != (3,) or spacing.dtype.kind not in "iuf"):
        raise VolumeError(f"{path}: its attribute 'spacing' is {spacing}, not 3 millimetres; prepare it again")
    return _with_grid(path, array, None, spacing, attributes, label)


def _hdf5_dataset(path, file, name):
    """The data set `name`, None where there is none; VolumeError where its voxels lie in other files."""
    link = file.get(name, getlink=True)
    if link is None:
        return None
    dataset = file[name] if isinstance(link, h5py.HardLink) else None
    if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external:
        raise VolumeError(f"{path}: the voxels of '{name}' do not lie in this file; copy them into it")
    _check_size(path, dataset.shape, dataset.dtype.itemsize, DEFLATED * dataset.id.get_storage_size())
    return dataset


def read_channels(paths):
    """The Volume of a case whose channels lie in one file or in several, a file a channel: then (C, W, H, D).

    The first file's grid counts; VolumeError where another file lies on another grid, or has channels itself.
    """
    paths = list(paths)
    volume = read_volume(paths[0])
    if len(paths) == 1:
        return volume
    if volume.array.ndim > 3:
        raise VolumeError(f"{paths[0]}: has channels itself, where {paths[1]} is another; give a file a channel")
    return volume._replace(array=np.stack([volume.array, *(read_on_grid(path, volume) for path in paths[1:])]))


def read_on_grid(path, volume):
    """The array of a file that must lie on the grid of `volume`: a channel, or a label. (W, H, D); else VolumeError."""
    other = read_volume(path)
    shape = volume.array.shape[-3:]
    if other.array.shape != shape:
        raise VolumeError(f"{path}: has shape {other.array.shape} where its image has {shape}; resample it to that")
    if volume.affine is not None and other.affine is not None:
        # The corners, in millimetres: what a difference between two affines amounts to.
        corners = np.array([[*(np.array(shape) * corner), 1.0] for corner in np.ndindex(2, 2, 2)]).T
        apart = np.abs((volume.affine - other.affine) @ corners).max()
        if apart > 0.1 * volume.spacing.min():
            raise VolumeError(f"{path}: lies up to {apart:.3g} mm from its image of equal shape; repair the header")
    return other.array


def volume_bytes(array, kind, header, name="prediction"):
    """The bytes of a file with `array` (W, H, D) on the grid of the file that was read.

    `kind` and `header`: that file's ending and Volume.header. The grid's fields are copied bit by bit; what else the
    header held (descriptions, extensions, which may name a patient) is not. HDF5: a file with the dataset
    `name`. Raises VolumeError for a type the format lacks: NIfTI and NRRD have no float16.
    """
    if kind in (".h5", ".hdf5"):
        return hdf5_bytes({name: array})
    if array.dtype == np.float16:
        raise VolumeError(f"{kind} files hold no float16; use float32 or HDF5")
    if kind == ".nrrd":
        return _nrrd_bytes(array, header)
    nibabel = need("nibabel", "writing NIfTI")
    new = type(header)()
    for field in NIFTI_GRID:
        new[field] = header[field]
    new.set_data_dtype(array.dtype)
    write = nibabel.Nifti2Image if type(header) is nibabel.Nifti2Header else nibabel.Nifti1Image
    content = write(array, None, new).to_bytes()
    return gzip.compress(content, compresslevel=1, mtime=0) if kind == ".nii.gz" else content


def _nrrd_bytes(array, header):
    nrrd = need("nrrd", "writing NRRD")
    spatial = _nrrd_spatial_axes(header)
    names = ("space", "space dimension", "space origin", "space units")
    new = {name: header[name] for name in names if name in header}
    for name in ("space directions", "spacings"):
        if name in header:
            new[name] = np.asarray(header[name], dtype=float)[spatial]
    for name in ("kinds", "units", "centerings"):
        if name in header:
            new[name] = [header[name][axis] for axis in spatial]
    file = io.BytesIO()
    nrrd.write(file, array, {**new, "encoding": "gzip"}, compression_level=1)
    return file.getvalue()


def nifti_header(affine):
    """A NIfTI header with the grid of `affine` (millimetres, RAS+), for `volume_bytes`."""
    nibabel = need("nibabel", "writing NIfTI")
    header = nibabel.Nifti1Header()
    header.set_xyzt_units("mm")
    header.set_data_shape((1, 1, 1))
    header.set_qform(affine, "aligned")
    header.set_sform(affine, "aligned")
    return header


def hdf5_bytes(arrays, attributes=None):
    """The bytes of an HDF5 file with the given datasets, gzipped, and attributes."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, compression="gzip", compression_opts=1)
        file.attrs.update(attributes or {})
    return buffer.getvalue()
