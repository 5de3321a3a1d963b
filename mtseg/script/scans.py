"""The cases that inference.py segments: each as the network sees it, and where its prediction goes.

`args` are always the flags of inference.py.
"""

import json
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from mtseg.checkpoint import write_whole
from mtseg.datasets import DataError, find_root, read_list
from mtseg.images import ENDINGS as IMAGES
from mtseg.images import png_bytes, tiff_bytes
from mtseg.layouts import find_cases
from mtseg.preprocess import IGNORED, Grid, PreprocessError, check_settings, grid_from_attributes, prepare, to_classes
from mtseg.script.flags import FlagError, read_config
from mtseg.script.sources import Source, data_root, normalised, plain_table, read_channels_of, read_label
from mtseg.splits import known_patients
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

    `image`: float32 (*spatial) or (C, *spatial), prepared. `label`: uint8 classes, or None. `spacing`: the size of the
    label's voxels, None where not known. `axis`: along which slices of a stack follow each other. `set`: the data set
    that the case is from, where there are several. `grid`: the prepared volume's place in the scan, or None.
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
    axis: int = 2
    set: str | None = None


class Cases(NamedTuple):
    """`readers`: {case: function that reads its Scan}. `unit`: of distances, 'mm' or 'voxel', for all cases. `files`:
    {case: paths of its files}. `failures`: {case: why it has no result}, to which more are added. `patients`: {case:
    whose it is}. `settings`: the preprocessing, None where there is none."""

    readers: dict
    unit: str
    files: dict
    failures: dict
    patients: dict
    settings: dict | None = None


def listed_scans(args):
    """The Cases of the list <split>.list of --root_path, or those that the run's fold kept out of training."""
    if args.save_result and args.save_format == "nifti":
        need("nibabel", "--save_format nifti")
    root = data_root(args.root_path)
    source = Source(args.root_path)
    if args.save_result and args.save_format == "png" and source.dims == 3:
        raise FlagError("--save_format png is for images; take hdf5 or nifti")
    dataset = listed_cases(args, source, args.split == "fold" and args.configs[0].get("fold_cases"))
    if args.dims == 3 and source.dims == 2:
        raise FlagError(f"the network is one of volumes, the cases in {root} are images; name other data")
    check_classes(args, source)
    trained, here = args.configs[0].get("preprocessing"), read_config(root / "preprocessing.json")
    if here and isinstance(trained, dict) and (odd := [name for name in here if here[name] != trained.get(name)]):
        was, now = (", ".join(f"{name} {settings.get(name)}" for name in odd) for settings in (trained, here))
        print(f"note: {root} was prepared otherwise than what the network was trained on ({now}; there {was})")
    if args.save_colors and any(len(shape) == 3 for shape in dataset.shapes.values()):
        raise FlagError("--save_colors is for images: of stacks and volumes there is no one colour picture")
    for case in dataset.image_list:
        dataset.read(case)  # a broken file is better found now than after an hour of segmenting
    if source.dims == 2:
        tables = {case: source.table_of(case) for case in dataset.image_list}
        unit = next((image_unit(args, table) for table in tables.values()), "pixel")
        spacings = {c: pixel_spacing(args, table, len(dataset.shapes[c])) for c, table in tables.items()}
    else:
        unit = choose_unit(args, map(dataset.path, dataset.image_list))
        spacings = dict.fromkeys(dataset.image_list)
        for case in dataset.image_list if unit == "mm" else ():
            spacing = read_volume(dataset.path(case), header_only=True).spacing
            spacings[case] = np.roll(spacing, -1) if args.slices_first else spacing
    readers = {case: partial(read_listed, dataset, source, case, spacings[case]) for case in dataset.image_list}
    files, patients = {case: dataset.files(case) for case in readers}, patients_among(root, readers)
    return Cases(readers, unit, files, {}, patients)


def patients_among(root, cases):
    """{case: patient} of the `cases`, which lie in `root`."""
    known, _ = known_patients(root, list(cases))
    return {case: known[case] for case in cases}


def listed_cases(args, source, cases=None):
    """The `cases`, else those of <split>.list, but no more than --num; VolumeError where the network takes no such."""
    dataset = source.dataset(args, (cases or read_list(source.root / f"{args.split}.list"))[: args.num])
    check_channels(source.root_path, dataset.n_channels, args)
    check_context(source.root_path, {len(shape) for shape in dataset.shapes.values()}, args)
    return dataset


def read_listed(dataset, source, case, spacing):
    """The Scan of a case of a list; `spacing`: that of its voxels or pixels, or None."""
    sample = dataset.read(case)
    return Scan(sample["image"], sample["label"], spacing, axis=source.axis, set=source.set_of(case))


def input_scans(args):
    """The Cases of --input, which are prepared as the training data was."""
    settings, broken = preprocessing_of(args), {}
    if settings and settings.get("ignore") is not None:
        args.ignore_index = IGNORED
    cases, _ = find_cases(args.input, channels=settings and settings["channels"], labels=args.labels, broken=broken)
    if cases and cases[0].images[0].suffix.lower() in IMAGES:
        return input_images(args, cases[: args.num], broken)
    if args.save_colors:
        raise FlagError("--save_colors is for images: a volume has no one colour picture; leave it out")
    raw = next((case.images[0] for case in cases if ending(case.images[0]) not in HDF5), None)
    if raw and settings is None:
        raise FlagError(
            f"{raw}: how it is to be prepared is recorded neither in {args.model_path[0].parent / 'config.json'} nor "
            f"in {find_root(args.root_path) / 'preprocessing.json'}; give a preprocessing.json by --preprocessing"
        )
    if args.slices_first and not raw:
        raise FlagError("--input with --slices_first: predictions would lie across the files; name a list by --split")
    for kind in {ending(case.images[0]) for case in cases}:  # one sentence, not one a case
        if kind in PACKAGES:
            need(PACKAGES[kind], f"{args.input}: reading {kind} files")
    cases = cases[: args.num]
    unit = choose_unit(args, (case.images[0] for case in cases if case.label or ending(case.images[0]) in HDF5))
    readers = {case.name: partial(read_input, case, settings, args) for case in cases}
    files = {case.name: case.files for case in cases}
    return Cases(readers, unit, files, broken, patients_among(args.input, readers), settings)


def input_images(args, cases, broken):
    """The Cases of --input that are images or stacks of them, normalised as --intensity says."""
    if args.dims == 3:
        raise FlagError(f"{cases[0].images[0]}: an image, but the network is one of volumes; name scans")
    readers = {case.name: partial(read_input_image, case, args) for case in cases}
    files = {case.name: case.files for case in cases}
    patients = patients_among(args.input, readers)
    return Cases(readers, image_unit(args, args.table), files, broken, patients, {"intensity": args.intensity})


def read_input_image(case, args):
    """The Scan of an image of --input."""
    image = read_channels_of(case.images, args.intensity)
    table = args.table or plain_table(args.num_classes, args.ignore_index)
    check_channels(case.images[0], len(image), args)
    check_context(case.images[0], {image.ndim - 1}, args)
    if args.save_colors and image.ndim == 4:
        raise VolumeError(f"{case.images[0]}: a stack, which has no one colour picture; leave out --save_colors")
    spacing = pixel_spacing(args, args.table, image.ndim - 1)
    kind = ".tif" if image.ndim == 4 else ".png"
    scan = Scan(image if len(image) > 1 else image[0], None, spacing, kind=kind, axis=0)
    if case.label is None:
        return scan
    try:
        return scan._replace(label=read_label(case.label, image.shape[1:], table, args.snap)[0])
    except DataError as error:
        return scan._replace(label_error=str(error))


def pixel_spacing(args, table, dims):
    """The size of a pixel by `table`, None in pixels; FlagError for a stack (`dims` 3): its slices may lie apart."""
    unit = image_unit(args, table)
    if unit == "pixel":
        return None
    if dims == 3:
        raise FlagError(f"--unit {unit}: how far apart the slices of a stack lie is not known; take --unit pixel")
    return table.pixel_size[:2]


def image_unit(args, table):
    """'pixel', or the unit of the pixel size in `table` where --unit asks for it."""
    if args.unit in (None, "pixel", "voxel"):
        return "pixel"
    size = table and table.pixel_size
    if not size or size[2] != args.unit:
        says = f"says {size[2]}" if size else "does not say how large a pixel is"
        raise FlagError(f"--unit {args.unit}: classes.json {says}; write its pixel_size, or take --unit pixel")
    return args.unit


def check_classes(args, source):
    """FlagError where the data's classes are not those of the run: its rows would stand under other names."""
    if args.table and source.table and args.table.names != source.table.names:
        run, data = (", ".join(table.names) for table in (args.table, source.table))
        raise FlagError(f"the network was trained on the classes {run}, the data has {data}; name data with the same")


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
            scan = scan._replace(axis=2 if case.images[0].name == "mri_norm2.h5" else 0)
        else:
            done = prepare(volume.array, volume.affine, volume.spacing, settings)
            scan = Scan(done.image, None, volume.spacing, done.grid, kind, volume.header, values)
        axes = scan.image.ndim - (args.n_channels > 2 * args.context + 1)
        scan = scan._replace(image=normalised(scan.image, args.intensity, axes))
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
    check_channels(case.images[0], 1 if scan.image.ndim == 3 else len(scan.image), args)
    return scan


def check_channels(path, channels, args):
    """VolumeError where the network does not take the `channels` that lie at `path`, with --context of each slice."""
    seen = channels * (2 * args.context + 1)
    if seen != args.n_channels:
        has = f"{channels} channels" + f" ({seen} with --context {args.context})" * bool(args.context)
        raise VolumeError(f"{path}: has {has}, the network takes {args.n_channels}; name others")


def check_context(path, dims, args):
    """VolumeError where cases at `path` have two `dims`, and the network takes slices with their neighbours."""
    if args.context and 2 in dims:
        raise VolumeError(f"{path}: an image, and the network takes slices with {args.context} neighbours; name stacks")


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
    if args.unit not in (None, "mm"):
        raise FlagError(f"--unit {args.unit} is for images; take mm or voxel")
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


def save_case(folder, case, format, volumes, measured, table=None):
    """Write the arrays in `volumes` to `folder`: as <case>.h5, as <case>_<name>.nii.gz with voxels of 1 mm, or, label
    and prediction of an image, as <case>_<name>.png with the values and the palette of `table`. Returns the files.

    `measured`: how the case was measured, for JSON; an HDF5 file holds it as the attribute 'case'. A NIfTI image of
    several channels has them on its last axis.
    """
    contents = {}
    if format == "hdf5":
        contents[f"{case}.h5"] = hdf5_bytes(volumes, {"case": json.dumps(measured)})
    elif format == "png":
        for name in ("label", "prediction"):
            kind, content = image_file(volumes[name], table)
            contents[f"{case}_{name}{kind}"] = content
    else:
        for name, volume in volumes.items():
            volume = np.moveaxis(volume, 0, -1) if volume.ndim == 4 else volume
            contents[f"{case}_{name}.nii.gz"] = volume_bytes(volume, ".nii.gz", nifti_header(np.eye(4)))
    for name, content in contents.items():
        write_whole(folder / name, content)
    return [folder / name for name in contents]


def image_file(index, table):
    """(ending, bytes) of a file with the class numbers `index` in the masks' values: of an image (H, W) a PNG with the
    palette of `table`, where its values fit, of a stack (S, H, W) a TIFF."""
    values = table.to_values(index)
    if index.ndim == 3:
        return ".tif", tiff_bytes(values)
    return ".png", png_bytes(values, table.palette(by_value=True) if values.dtype == np.uint8 else None)
