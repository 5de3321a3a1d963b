"""The cases that inference.py segments: each as the network sees it, and where its prediction goes.

`args` are always the flags of inference.py.
"""

import json
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from mtseg.checkpoint import write_whole
from mtseg.datasets import LAHeart, find_root
from mtseg.layouts import find_cases
from mtseg.phantom import make_phantom
from mtseg.preprocess import IGNORED, Grid, PreprocessError, check_settings, grid_from_attributes, prepare, to_classes
from mtseg.script import flags
from mtseg.script.flags import FlagError, read_config
from mtseg.volumes import (
    VolumeError,
    ending,
    hdf5_bytes,
    need,
    nifti_header,
    read_channels,
    read_on_grid,
    read_volume,
    volume_bytes,
)

HDF5 = (".h5", ".hdf5")
PACKAGES = {".nii": "nibabel", ".nii.gz": "nibabel", ".nrrd": "nrrd"}


class Scan(NamedTuple):
    """A case as the network sees it, and where its prediction belongs.

    `image`: float32 (W, H, D) or (C, W, H, D), prepared. `label`: uint8 classes, or None. `spacing`: mm between the
    label's voxels, None where not known. `grid`: the prepared volume's place in the scan, None where it is the scan.
    `kind`, `header`: of the file to be written, as volumes.volume_bytes takes them. `values`: of the classes in it.
    `label_prepared`: whether the label lies on the prepared grid, not on the scan's. `label_error`: why there is no
    label though there is a file.
    """

    image: np.ndarray
    label: np.ndarray | None
    spacing: np.ndarray | None
    grid: Grid | None = None
    kind: str = ".h5"
    header: Any = None
    values: list | None = None
    label_prepared: bool = True
    label_error: str | None = None


class Cases(NamedTuple):
    """`readers`: {case: function that reads its Scan}. `unit`: of distances, 'mm' or 'voxel', for all cases. `files`:
    {case: paths of its files}. `failures`: {case: why it has no result}, to which more are added. `settings`: the
    preprocessing, None where there is none."""

    readers: dict
    unit: str
    files: dict
    failures: dict
    settings: dict | None = None


def listed_scans(args):
    """The Cases of the list <split>.list of --root_path."""
    if args.save_result and args.save_format == "nifti":
        need("nibabel", "--save_format nifti")
    root = find_root(args.root_path)
    if root == flags.HOME / "data/Phantom":
        make_phantom(root)
    checked = {"num_classes": args.num_classes, "ignore_index": args.ignore_index}
    dataset = LAHeart(args.root_path, split=args.split, num=args.num, **checked)
    if dataset.n_channels != args.n_channels:
        raise FlagError(f"the network takes {args.n_channels} channels, the cases in {root} have {dataset.n_channels}")
    for case in dataset.image_list:
        dataset.read(case)  # a broken file is better found now than after an hour of segmenting
    unit = choose_unit(args, map(dataset.path, dataset.image_list))
    readers = {case: partial(read_listed, dataset, case, unit) for case in dataset.image_list}
    return Cases(readers, unit, {}, {})


def read_listed(dataset, case, unit):
    """The Scan of a case of a list."""
    sample = dataset.read(case)
    spacing = read_volume(dataset.path(case), header_only=True).spacing if unit == "mm" else None
    return Scan(sample["image"], sample["label"], spacing)


def input_scans(args):
    """The Cases of --input, which are prepared as the training data was."""
    settings, broken = preprocessing_of(args), {}
    if settings and settings.get("ignore") is not None:
        args.ignore_index = IGNORED
    cases, _ = find_cases(args.input, channels=settings and settings["channels"], labels=args.labels, broken=broken)
    raw = next((case.images[0] for case in cases if ending(case.images[0]) not in HDF5), None)
    if raw and settings is None:
        raise FlagError(
            f"{raw}: how it is to be prepared is recorded neither in {args.model_path[0].parent / 'config.json'} nor "
            f"in {find_root(args.root_path) / 'preprocessing.json'}; give a preprocessing.json by --preprocessing"
        )
    for kind in {ending(case.images[0]) for case in cases}:  # one sentence, not one a case
        if kind in PACKAGES:
            need(PACKAGES[kind], f"{args.input}: reading {kind} files")
    cases = cases[: args.num]
    unit = choose_unit(args, (case.images[0] for case in cases if case.label or ending(case.images[0]) in HDF5))
    readers = {case.name: partial(read_input, case, settings, args) for case in cases}
    files = {case.name: [*case.images, *filter(None, [case.label])] for case in cases}
    return Cases(readers, unit, files, broken, settings)


def state_of(paths):
    """[[path, bytes, time of change], ...]: what --continue tells files by that were replaced; VolumeError."""
    try:
        status = {path: path.stat() for path in paths}
    except OSError as error:
        raise VolumeError(f"{error.filename}: cannot be read ({error.strerror})") from error
    return [[str(path.resolve()), entry.st_size, entry.st_mtime_ns] for path, entry in status.items()]


def read_input(case, settings, args):
    """The Scan of a case of --input: HDF5 as it is, other formats prepared by `settings`."""
    volume, kind = read_channels(case.images), ending(case.images[0])
    values = settings["labels"] if settings else list(range(args.num_classes))
    try:
        if kind in HDF5:
            scan, volume = read_prepared(volume, kind, values, args)
        else:
            done = prepare(volume.array, volume.affine, volume.spacing, settings)
            scan = Scan(done.image, None, volume.spacing, done.grid, kind, volume.header, values)
        if case.label is not None:
            scan = scan._replace(label=None, spacing=volume.spacing, label_prepared=False)
            try:
                label, ignore = read_on_grid(case.label, volume), (settings or {}).get("ignore")
                scan = scan._replace(label=to_classes(label, values, args.ignore_index, ignore))
            except VolumeError as error:
                scan = scan._replace(label_error=str(error))
            except PreprocessError as error:
                scan = scan._replace(label_error=f"{case.label}: {error}")
    except PreprocessError as error:
        raise PreprocessError(f"{case.images[0]}: {error}") from error
    channels = 1 if scan.image.ndim == 3 else len(scan.image)
    if channels != args.n_channels:
        raise VolumeError(f"{case.images[0]}: has {channels} channels, the network takes {args.n_channels}")
    return scan


def read_prepared(volume, kind, values, args):
    """(the Scan of an HDF5 `volume`, the volume on whose grid a label in a file of its own lies): that of the scan,
    where the file says from which place of it the image was cut."""
    classes = list(range(args.num_classes))
    if not volume.array.size or not np.isfinite(volume.array).all():
        raise PreprocessError("the image has no voxels, or holds NaN or infinity; repair it")
    label = None if volume.label is None else to_classes(volume.label, classes, args.ignore_index)
    scan = Scan(np.float32(volume.array), label, volume.spacing, kind=kind, values=classes)
    grid, affine = grid_from_attributes(volume.header), volume.header.get("original_affine")
    if grid is not None and grid.shape != scan.image.shape[-3:]:
        raise PreprocessError(f"its grid_shape {grid.shape} is not the image's; prepare it again")
    if grid is None or affine is None:
        return scan, volume
    scan = scan._replace(grid=grid, kind=".nii.gz", header=nifti_header(checked(affine)), values=values)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    return scan, volume._replace(array=np.broadcast_to(0, grid.original_shape), affine=affine, spacing=spacing)


def checked(affine):
    """`affine` if it is one; PreprocessError."""
    if np.shape(affine) != (4, 4) or not np.isfinite(affine).all() or not np.linalg.det(affine[:3, :3]):
        raise PreprocessError("its original_affine is no invertible 4 x 4 matrix; prepare it again")
    return affine


def preprocessing_of(args):
    """How scans are prepared: --preprocessing, else what the run recorded, else what lies with its data; or None."""
    if args.preprocessing:
        settings = read_config(args.preprocessing)
        if not settings:
            raise FlagError(f"{args.preprocessing}: no such preprocessing; give one that data/prepare_nifti.py wrote")
    else:
        recorded = [config.get("preprocessing") for config in args.configs]
        if any(other != recorded[0] for other in recorded):
            raise FlagError("the runs of --model_path prepared their data differently; they cannot be averaged")
        settings = recorded[0] or read_config(find_root(args.root_path) / "preprocessing.json")
    if not settings:
        return None
    check_settings(settings)
    if len(settings["labels"]) != args.num_classes:
        raise FlagError(
            f"the network has {args.num_classes} classes, the preprocessing {len(settings['labels'])} "
            f"(labels {settings['labels']}); give the --preprocessing of its training data"
        )
    return settings


def choose_unit(args, paths):
    """'mm' or 'voxel', one for all cases: `paths` are files that know their spacing, or do not."""
    if args.unit == "voxel" or (args.unit is None and not args.input):
        return "voxel"
    for path in paths:
        try:
            unknown = read_volume(path, header_only=True).spacing is None
        except VolumeError:
            continue  # is met again, and reported, when the case is read
        if unknown and args.unit == "mm":
            raise FlagError(f"{path}: does not say how wide its voxels are; measure all cases with --unit voxel")
        if unknown:
            print(f"{path} does not say how wide its voxels are: distances of all cases are in voxels")
            return "voxel"
    return "mm"


def save_case(folder, case, format, volumes, measured):
    """Write the arrays in `volumes` to `folder`: as <case>.h5, or as <case>_<name>.nii.gz with voxels of 1 mm.

    `measured`: how the case was measured, for JSON; an HDF5 file holds it as the attribute 'case'. A NIfTI image of
    several channels has them on its last axis.
    """
    if format == "hdf5":
        write_whole(folder / f"{case}.h5", hdf5_bytes(volumes, {"case": json.dumps(measured)}))
        return
    for name, volume in volumes.items():
        volume = np.moveaxis(volume, 0, -1) if volume.ndim == 4 else volume
        write_whole(folder / f"{case}_{name}.nii.gz", volume_bytes(volume, ".nii.gz", nifti_header(np.eye(4))))
