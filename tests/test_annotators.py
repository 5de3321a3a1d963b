import dataclasses
import hashlib
import json
import math
import shutil

import matplotlib
import nibabel
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from conftest import PHASES
from PIL import Image

from mtseg.active.annotators import (
    AnnotationError,
    Task,
    annotation_table,
    changed_share,
    check_folder,
    read_mask,
    read_prediction,
    write_case,
    write_todo,
)
from mtseg.active.pictures import heat
from mtseg.classes import ClassTable
from mtseg.script.sources import plain_table

TABLE = ClassTable.from_dict(PHASES)  # values 0, 10 and 200; black, red and blue
SHAPES = {None: (12, 17), 0: (5, 12, 17), 2: (17, 12, 6)}
BOXES = {
    None: [((2, 3), (9, 12))],
    0: [((1, 0, 0), (2, 12, 17)), ((3, 2, 4), (5, 8, 9))],
    2: [((0, 0, 2), (17, 12, 3)), ((3, 2, 4), (9, 8, 6))],
}
AXES = pytest.mark.parametrize("axis", [None, 0, 2], ids=["image", "stack", "volume"])


def task_of(axis, **more):
    rng = np.random.default_rng(0)
    shape = SHAPES[axis]
    settings = {"prediction": rng.integers(0, 3, shape, np.uint8), "uncertainty": rng.random(shape), "axis": axis}
    spacing = (0.5, 0.5, 2.0) if axis == 2 else None
    return Task("a", rng.standard_normal(shape).astype(np.float32), BOXES[axis], spacing=spacing, **settings | more)


def round_of(tmp_path, axis, table=TABLE, **more):
    """(folder, record as it comes back from JSON, truth: class numbers) of a round with the one case 'a'."""
    folder = tmp_path / "round_01"
    record = write_case(folder, task_of(axis, **more), table)
    write_todo(folder, [record], table)
    truth = np.random.default_rng(1).integers(0, len(table.names), SHAPES[axis], np.uint8)
    return folder, json.loads(json.dumps(record)), truth


def inside(axis):
    boxes = np.zeros(SHAPES[axis], bool)
    for start, stop in BOXES[axis]:
        boxes[tuple(slice(*ends) for ends in zip(start, stop, strict=True))] = True
    return boxes


def expected(truth, axis):
    return np.where(inside(axis), truth, 255)


VALUES = np.array([0, 10, 200], np.uint8)
COLORS = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], np.uint8)


def palette_png(path, index, palette):
    image = Image.fromarray(index)
    image.putpalette(np.uint8(palette).tobytes())
    image.save(path)


def own_palette(path, truth):
    palette = np.zeros((256, 3), np.uint8)
    palette[VALUES] = COLORS
    palette_png(path, VALUES[truth], palette)


# How each program saves the class numbers `truth` of an image.
IMAGE_WRITERS = {
    "index.png": lambda path, truth: Image.fromarray(VALUES[truth]).save(path),
    "palette.png": own_palette,
    "colours numbered anew.png": lambda path, truth: palette_png(
        path, truth + 50, np.repeat(COLORS, 60, 0)[[0] * 50 + [0, 60, 120]]
    ),
    "rgb.png": lambda path, truth: Image.fromarray(COLORS[truth]).save(path),
    "rgb.tif": lambda path, truth: tifffile.imwrite(path, COLORS[truth], photometric="rgb"),
    "int64.tif": lambda path, truth: tifffile.imwrite(path, VALUES[truth].astype(np.int64), compression="zlib"),
    "int32.TIFF": lambda path, truth: tifffile.imwrite(path, VALUES[truth].astype(np.int32)),
    "float.tif": lambda path, truth: tifffile.imwrite(path, VALUES[truth].astype(np.float32)),
    "itk.nrrd": lambda path, truth: sitk.WriteImage(sitk.GetImageFromArray(VALUES[truth][None]), str(path)),
}


@pytest.mark.parametrize("kind", IMAGE_WRITERS)
def test_the_mask_of_an_image_comes_back_from_any_program(tmp_path, kind):
    folder, record, truth = round_of(tmp_path, None)
    IMAGE_WRITERS[kind](folder / f"masks/a.{kind.rpartition('.')[2]}", truth)
    check_folder(folder, [record])
    labels, snapped = read_mask(folder, record, TABLE)
    assert labels.dtype == np.uint8 and snapped == 0
    assert (labels == expected(truth, None)).all()


STACK_WRITERS = {
    "uint8.tif": lambda path, truth: tifffile.imwrite(path, VALUES[truth], photometric="minisblack"),
    "imagej.tif": lambda path, truth: tifffile.imwrite(path, VALUES[truth], imagej=True),
    "int64.tif": lambda path, truth: tifffile.imwrite(path, VALUES[truth].astype(np.int64), compression="zlib"),
    "rgb.tif": lambda path, truth: tifffile.imwrite(path, COLORS[truth], photometric="rgb"),
    "itk.nii.gz": lambda path, truth: sitk.WriteImage(sitk.GetImageFromArray(VALUES[truth]), str(path)),
}


@pytest.mark.parametrize("kind", STACK_WRITERS)
def test_the_mask_of_a_stack_comes_back_from_any_program(tmp_path, kind):
    folder, record, truth = round_of(tmp_path, 0)
    STACK_WRITERS[kind](folder / f"masks/a.{kind.partition('.')[2]}", truth)
    check_folder(folder, [record])
    assert (read_mask(folder, record, TABLE)[0] == expected(truth, 0)).all()


def of_volume(folder, truth):
    """SimpleITK's image of the class numbers (W, H, D), on the grid of images/."""
    image = sitk.GetImageFromArray(VALUES[truth].T)
    image.CopyInformation(sitk.ReadImage(str(folder / "images/a.nii.gz")))
    return image


def turned(folder, truth):
    """The same by nibabel, its axes in another order and two of them mirrored."""
    image = nibabel.Nifti1Image(VALUES[truth], nibabel.load(folder / "images/a.nii.gz").affine)
    return image.as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))


VOLUME_WRITERS = {
    "itk.nii.gz": lambda folder, path, truth: sitk.WriteImage(of_volume(folder, truth), str(path)),
    "itk.nrrd": lambda folder, path, truth: sitk.WriteImage(of_volume(folder, truth), str(path)),
    "flipped.nii": lambda folder, path, truth: sitk.WriteImage(
        sitk.DICOMOrient(of_volume(folder, truth), "LPS"), str(path)
    ),
    "flipped.nrrd": lambda folder, path, truth: sitk.WriteImage(
        sitk.DICOMOrient(of_volume(folder, truth), "PIL"), str(path)
    ),
    "turned.nii.gz": lambda folder, path, truth: nibabel.save(turned(folder, truth), path),
    "no place.nrrd": lambda folder, path, truth: nrrd.write(str(path), VALUES[truth]),
}


@pytest.mark.parametrize("kind", VOLUME_WRITERS)
def test_the_mask_of_a_volume_comes_back_in_any_orientation(tmp_path, kind):
    folder, record, truth = round_of(tmp_path, 2)
    VOLUME_WRITERS[kind](folder, folder / f"masks/a.{kind.partition('.')[2]}", truth)
    check_folder(folder, [record])
    assert (read_mask(folder, record, TABLE)[0] == expected(truth, 2)).all()


@AXES
def test_the_prediction_is_a_start_that_comes_back(tmp_path, axis):
    folder, record, _ = round_of(tmp_path, axis)
    prediction = task_of(axis).prediction
    assert (read_prediction(folder, record, TABLE) == prediction).all()
    file = folder / record["prediction"]
    assert record["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    read = {None: lambda p: np.array(Image.open(p)), 0: tifffile.imread, 2: lambda p: nibabel.load(p).get_fdata()}
    assert (read[axis](file) == VALUES[prediction]).all()
    shutil.copy(file, folder / "masks")
    labels, _ = read_mask(folder, record, TABLE)
    assert changed_share(prediction, labels, record["boxes"]) == 0
    where = np.argwhere(inside(axis))[:7]
    labels[tuple(where.T)] = (labels[tuple(where.T)] + 1) % 3
    assert changed_share(prediction, labels, record["boxes"]) == pytest.approx(7 / inside(axis).sum())
    assert math.isnan(changed_share(None, labels, record["boxes"]))


def test_a_stack_of_one_slice_and_one_with_a_palette(tmp_path):
    task = task_of(0)
    task = task._replace(**{name: getattr(task, name)[:1] for name in ("image", "prediction", "uncertainty")})
    record = write_case(tmp_path, task._replace(boxes=[((0, 0, 0), (1, 12, 17))]), TABLE)
    assert (read_prediction(tmp_path, record, TABLE) == task.prediction).all()


@AXES
def test_images_are_those_of_the_user_or_look_like_them(tmp_path, axis):
    folder, record, _ = round_of(tmp_path, axis)
    image = task_of(axis).image
    (name,) = record["images"]
    if axis == 2:
        file = nibabel.load(folder / name)
        assert (file.get_fdata() == image).all() and file.header.get_zooms() == (0.5, 0.5, 2.0)
        unsure = nibabel.load(folder / "uncertainty/a.nii.gz")
        assert np.allclose(unsure.get_fdata(), task_of(axis).uncertainty) and (unsure.affine == file.affine).all()
        return
    grey = np.array(Image.open(folder / name)) if axis is None else tifffile.imread(folder / name)
    low, high = np.percentile(image, (0.5, 99.5))
    assert grey.dtype == np.uint8 and np.abs(grey - np.clip(255 * (image - low) / (high - low), 0, 255)).max() <= 1


def test_the_users_own_files_are_copied_and_stay(tmp_path):
    for name in ("x.tif", "y.tif"):
        tifffile.imwrite(tmp_path / name, np.arange(204, dtype=np.uint16).reshape(12, 17))
    before = (tmp_path / "x.tif").read_bytes()
    _, record, _ = round_of(tmp_path, None, files=(tmp_path / "x.tif",))
    assert record["images"] == ["images/a.tif"]
    assert (tmp_path / "round_01/images/a.tif").read_bytes() == before == (tmp_path / "x.tif").read_bytes()
    _, record, _ = round_of(tmp_path, None, files=(tmp_path / "x.tif", tmp_path / "y.tif"))
    assert record["images"] == ["images/a_0.tif", "images/a_1.tif"]


def test_a_channel_of_a_volume_is_a_file(tmp_path):
    task = task_of(2)
    record = write_case(tmp_path, task._replace(image=np.stack([task.image, -task.image])), TABLE)
    assert record["images"] == ["images/a_0.nii.gz", "images/a_1.nii.gz"]
    assert (nibabel.load(tmp_path / record["images"][1]).get_fdata() == -task.image).all()


@AXES
def test_a_cold_start_has_neither_prediction_nor_uncertainty(tmp_path, axis):
    folder, record, _ = round_of(tmp_path, axis, prediction=None, uncertainty=None)
    assert record["prediction"] is None and read_prediction(folder, record, TABLE) is None
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"images", "colour", "masks"}
    assert "predictions/" not in (folder / "TODO.txt").read_text()
    check_folder(folder, [record])


def test_files_of_classes_as_the_programs_read_them(tmp_path):
    table = dataclasses.replace(TABLE, names=("matrix", 'small "pore"', "grain"))
    folder, record, _ = round_of(tmp_path, None, table)
    write_todo(folder, [record, {**record, "axis": 2, "shape": [12, 17, 3], "boxes": []}], table)
    lut = np.frombuffer((folder / "classes.lut").read_bytes(), np.uint8).reshape(3, 256).T
    assert (lut[VALUES] == COLORS).all() and (lut[255] == 255).all() and lut.shape == (256, 3)
    # ITK-SNAP: seven numbers and a name in quotation marks; # begins a comment.
    rows = [line for line in (folder / "labels.txt").read_text().splitlines() if not line.startswith("#")]
    rows = [([float(word) for word in line.split('"')[0].split()], line.split('"')[1:]) for line in rows]
    assert rows[0] == ([0] * 7, ["Clear Label", ""])
    assert [row[0][:4] for row in rows[1:]] == [[10, 255, 0, 0], [200, 0, 0, 255], [255, 255, 255, 255]]
    assert [row[1] for row in rows[1:]] == [["small 'pore'", ""], ["grain", ""], ["leave out", ""]]
    assert all(row[0][4:] == [1, 1, 1] for row in rows[1:])
    # 3D Slicer: words apart from each other by spaces, of which a name holds none.
    rows = [line.split() for line in (folder / "classes.ctbl").read_text().splitlines() if not line.startswith("#")]
    assert rows[0] == ["0", "matrix", "0", "0", "0", "0"] and rows[1] == ["10", "small_'pore'", "255", "0", "0", "255"]
    assert [row[0] for row in rows] == ["0", "10", "200", "255"]
    assert not (round_of(tmp_path / "more", 2)[0] / "classes.lut").exists()
    assert not (round_of(tmp_path / "image", None)[0] / "labels.txt").exists()


def test_todo_names_every_region_as_the_programs_count(tmp_path):
    text = (round_of(tmp_path / "i", None)[0] / "TODO.txt").read_text()
    assert "  open     images/a.png\n  start    predictions/a.png\n" in text
    assert "  draw     the box x 3 to 11, y 2 to 8 (9 x 7 pixels)\n  save as  masks/a.png\n" in text
    assert "   200  grain        0   0 255\n   255  leave out  255 255 255\n" in text
    assert f"python recipes/active_learning.py take {tmp_path / 'i/round_01'}\n" in text
    text = (round_of(tmp_path / "s", 0)[0] / "TODO.txt").read_text()
    assert "  draw     slice 2 (1), whole\n" in text
    assert "  draw     slices 4 to 5 (3 to 4), the box x 4 to 8, y 2 to 7 (5 x 6 pixels)\n" in text
    text = (round_of(tmp_path / "v", 2)[0] / "TODO.txt").read_text()
    assert "slice 3 (2), whole\n" in text and "the box x 3 to 8, y 2 to 7 (6 x 6 pixels)" in text
    record = write_case(tmp_path, task_of(2, prediction=None)._replace(boxes=[((0, 0, 0), SHAPES[2])]), TABLE)
    write_todo(tmp_path, [record], TABLE, "my rounds/round_02")
    text = (tmp_path / "TODO.txt").read_text()
    assert "  draw     all slices, whole\n" in text
    assert "python recipes/active_learning.py take 'my rounds/round_02'\n" in text


def test_the_colours_of_uncertainty_are_viridis():
    values = np.linspace(0, 1, 257).reshape(1, -1)
    assert np.abs(heat(values) - 255.0 * matplotlib.colormaps["viridis"](values)[..., :3]).max() < 20
    assert heat(np.array([0.0, 1.0])).tolist() == [[68, 1, 84], [253, 231, 37]]


@AXES
def test_the_bar_of_a_heat_map_holds_both_ends_of_the_scale(tmp_path, axis):
    """Whatever the round's values are: here they lie around one half, and are drawn in that colour."""
    folder, *_ = round_of(tmp_path, axis, uncertainty=np.full(SHAPES[axis], 0.5))
    picture = np.array(Image.open(folder / "uncertainty/a.png"))
    bar = picture[:, -28:-12]
    assert (bar[0] == [253, 231, 37]).all() and (bar[-1] == [68, 1, 84]).all()
    assert (np.diff(bar[:, 0].astype(int) @ [2, 7, 1]) <= 8).all()  # ever darker
    assert (picture[:, :-28] == heat(np.array(0.5))).all(-1).mean() > 0.5


@AXES
def test_pictures_show_the_prediction_and_the_frames(tmp_path, axis):
    task = task_of(axis, prediction=np.ones(SHAPES[axis], np.uint8))._replace(image=np.zeros(SHAPES[axis], np.float32))
    write_case(tmp_path, task, TABLE)
    picture = np.array(Image.open(tmp_path / "colour/a.png"))
    times = 256 // 17
    count = {None: 1, 0: 3, 2: 3}[axis]
    assert picture.shape == (12 * times + (0 if axis is None else 14) + 4, count * (17 * times + 4), 3)
    red = (picture == [115, 0, 0]).all(-1)
    assert red.mean() > 0.7
    if axis is None:
        assert (picture[2 * times, 3 * times : 12 * times] == 255).all()  # the upper side of the box
        assert (picture[2 * times + 1, 3 * times + 1 : 12 * times - 1] == 0).all()
        assert red[2 * times - 1, 3 * times : 12 * times].all()


def test_a_box_of_one_pixel_is_framed_within_itself(tmp_path):
    task = task_of(None)._replace(
        image=np.zeros((600, 300)), prediction=np.ones((600, 300), np.uint8), uncertainty=None
    )
    write_case(tmp_path, task._replace(boxes=[((0, 0), (1, 1))]), TABLE)
    picture = np.array(Image.open(tmp_path / "colour/a.png"))[:600, :300]
    assert np.argwhere((picture != [115, 0, 0]).any(-1)).tolist() == [[0, 0]]


def refused(words, call, *arguments, **keywords):
    with pytest.raises(AnnotationError) as caught:
        call(*arguments, **keywords)
    sentence = str(caught.value)
    assert words in sentence and "\n" not in sentence and ";" in sentence, sentence


def test_near_colours_are_taken_only_when_asked(tmp_path):
    folder, record, truth = round_of(tmp_path, None)
    near = COLORS[truth].astype(int)
    near[4, 5:8] += [[9, -3, 4]] * 3
    Image.fromarray(np.clip(near, 0, 255).astype(np.uint8)).save(folder / "masks/a.png")
    refused("--snap", read_mask, folder, record, TABLE)
    labels, snapped = read_mask(folder, record, TABLE, snap=True)
    assert (labels == expected(truth, None)).all() and snapped == 3


def test_what_lies_outside_of_the_regions_may_be_anything(tmp_path):
    folder, record, truth = round_of(tmp_path, None)
    Image.fromarray(np.where(inside(None), VALUES[truth], 77).astype(np.uint8)).save(folder / "masks/a.png")
    assert (read_mask(folder, record, TABLE)[0] == expected(truth, None)).all()


TWO = {"names": ("cell", "membrane"), "values": (0, 255), "colors": ((0, 0, 0), (255, 255, 255)), "background": 0}
LEAVING = {
    "255 is free": (TABLE, 255, (255, 255, 255)),
    "named": (dataclasses.replace(TABLE, ignore=7), 7, (255, 255, 255)),
    "255 is a class": (ClassTable(**TWO), 128, (230, 159, 0)),  # far from both
    "no colours": (plain_table(3), 255, (255, 255, 255)),
}


@pytest.mark.parametrize("case", LEAVING)
def test_what_is_left_out_has_a_value_and_a_colour(tmp_path, case):
    table, value, color = LEAVING[case]
    folder, record, truth = round_of(tmp_path, None, table, prediction=np.zeros(SHAPES[None], np.uint8))
    more = annotation_table(table)
    assert f"{value}  leave out" in (folder / "TODO.txt").read_text() and more.colors[-1] == color
    truth[4:6, 4:7] = len(table.names)
    want = expected(np.where(truth == len(table.names), 255, truth), None)
    Image.fromarray(np.uint8(more.values)[truth]).save(folder / "masks/a.png")
    assert (read_mask(folder, record, table)[0] == want).all()
    Image.fromarray(np.uint8(more.colors)[truth]).save(folder / "masks/a.png")
    assert (read_mask(folder, record, table)[0] == want).all()
    palette_png(folder / "masks/a.png", np.uint8(more.values)[truth], more.palette(by_value=True))
    assert (read_mask(folder, record, table)[0] == want).all()


def test_white_and_nearly_white_is_a_class_of_255_and_not_what_is_left_out(tmp_path):
    table = ClassTable(("cell", "membrane"), (0, 255), (None, None), background=0)
    folder, record, truth = round_of(tmp_path, None, table, prediction=None)
    grey = np.where(truth == 1, 200 + 54 * (np.arange(17) % 2), 3)
    Image.fromarray(grey.astype(np.uint8)).save(folder / "masks/a.png")
    labels, snapped = read_mask(folder, record, table, snap=True)
    assert (labels == expected(truth, None)).all() and snapped > 0
    Image.fromarray(255 * truth).convert("RGB").save(folder / "masks/a.png")
    assert (read_mask(folder, record, table)[0] == expected(truth, None)).all()
    Image.fromarray(np.full((12, 17), 255, np.uint8)).save(folder / "masks/a.png")
    assert (read_mask(folder, record, table)[0] == expected(np.ones((12, 17)), None)).all()


def test_of_data_without_a_background_the_first_class_is_no_empty_mask(tmp_path):
    table = dataclasses.replace(TABLE, background=None)
    folder, record, _ = round_of(tmp_path, None, table, prediction=None)
    Image.fromarray(np.zeros((12, 17), np.uint8)).save(folder / "masks/a.png")
    assert (read_mask(folder, record, table)[0] == expected(np.zeros((12, 17)), None)).all()


@pytest.mark.parametrize("turned", ["LAS", "RPI", "SRP"])
def test_a_stack_whose_axes_were_turned_is_refused(tmp_path, turned):
    folder, record, truth = round_of(tmp_path, 0)
    image = sitk.DICOMOrient(sitk.GetImageFromArray(VALUES[truth]), turned)
    sitk.WriteImage(image, str(folder / "masks/a.nii.gz"))
    refused("its axes are turned or mirrored; save it as TIFF", read_mask, folder, record, TABLE)


def test_a_stack_whose_file_says_nothing_of_its_axes_lies_as_the_image(tmp_path):
    folder, record, truth = round_of(tmp_path, 0)
    nibabel.save(nibabel.Nifti1Image(VALUES[truth].T, None), folder / "masks/a.nii.gz")
    assert (read_mask(folder, record, TABLE)[0] == expected(truth, 0)).all()


def test_a_class_that_takes_the_rest_and_a_mask_of_one_bit(tmp_path):
    rest = ClassTable(("matrix", "pore"), (0, 1), (None, (255, 0, 0)), background=None, other=0)
    folder, record, _ = round_of(tmp_path, None, rest, prediction=None)
    colors = np.random.default_rng(0).integers(0, 256, (12, 17, 3), np.uint8)
    colors[4:7, 5:7] = (255, 0, 0)
    Image.fromarray(colors).save(folder / "masks/a.png")
    truth = np.zeros((12, 17), np.uint8)
    truth[4:7, 5:7] = 1
    assert (read_mask(folder, record, rest)[0] == expected(truth, None)).all()
    Image.fromarray(truth.astype(bool)).save(folder / "masks/a.png")
    assert (read_mask(folder, record, ClassTable(**TWO))[0] == expected(truth, None)).all()


def test_masks_that_are_missing_twice_there_or_of_another_size(tmp_path):
    folder, record, truth = round_of(tmp_path, None)
    refused("masks/a.png: no such file", read_mask, folder, record, TABLE)
    Image.fromarray(VALUES[truth]).save(folder / "masks/a.png")
    Image.fromarray(VALUES[truth]).save(folder / "masks/a.tif")
    refused("masks/a.png: case a has another mask in a.tif", read_mask, folder, record, TABLE)
    (folder / "masks/a.tif").unlink()
    Image.fromarray(VALUES[truth].T).save(folder / "masks/a.png")
    refused("masks/a.png: is 17 x 12 pixels, its image 12 x 17 pixels", read_mask, folder, record, TABLE)
    (folder / "masks/a.png").write_bytes(b"no image")
    refused("masks/a.png: neither PNG nor TIFF", read_mask, folder, record, TABLE)


def test_masks_that_say_nothing_or_what_is_not_known(tmp_path):
    folder, record, truth = round_of(tmp_path, None)

    def saved(mask):
        Image.fromarray(np.uint8(mask)).save(folder / "masks/a.png")

    saved(np.where(truth == 1, 11, VALUES[truth]))
    refused("have the value 11, which is no class's, the nearest is 'pore'", read_mask, folder, record, TABLE)
    saved(np.full((12, 17), 255))
    refused("all is left out in the box x 3 to 11, y 2 to 8", read_mask, folder, record, TABLE)
    saved(np.where(inside(None), 0, 10))
    refused("--allow_empty", read_mask, folder, record, TABLE)
    labels, _ = read_mask(folder, record, TABLE, allow_empty=True)
    assert (labels == expected(np.zeros((12, 17)), None)).all()


def test_each_region_must_be_annotated(tmp_path):
    folder, record, truth = round_of(tmp_path, 0)
    mask = VALUES[truth]
    mask[3:] = 255
    tifffile.imwrite(folder / "masks/a.tif", mask, photometric="minisblack")
    refused("all is left out in slices 4 to 5 (3 to 4), the box", read_mask, folder, record, TABLE)
    mask[4, 3, 5] = 10
    tifffile.imwrite(folder / "masks/a.tif", mask, photometric="minisblack")
    assert (read_mask(folder, record, TABLE)[0][3:] != 255).sum() == 1


def test_a_palette_that_contradicts_its_values(tmp_path):
    folder, record, truth = round_of(tmp_path, None)
    palette = np.zeros((256, 3), np.uint8)
    palette[VALUES] = COLORS[[0, 2, 1]]
    palette_png(folder / "masks/a.png", VALUES[truth], palette)
    refused("its values and the colours it shows", read_mask, folder, record, TABLE)
    palette[VALUES] = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]  # a palette for looking, whose colours mean nothing
    palette_png(folder / "masks/a.png", VALUES[truth], palette)
    assert (read_mask(folder, record, TABLE)[0] == expected(truth, None)).all()


def test_volumes_elsewhere_and_volumes_in_pages(tmp_path):
    folder, record, truth = round_of(tmp_path, 2)
    affine = nibabel.load(folder / "images/a.nii.gz").affine
    for wrong in (np.diag([0.5, 0.5, 1, 1]), affine + np.eye(4)[:, [3, 3, 3, 0]] * 0.7):
        nibabel.save(nibabel.Nifti1Image(VALUES[truth], wrong), folder / "masks/a.nii.gz")
        refused("masks/a.nii.gz: lies elsewhere than images/a.nii.gz", read_mask, folder, record, TABLE)
    nibabel.save(nibabel.Nifti1Image(VALUES[truth][1:], affine), folder / "masks/a.nii.gz")
    refused("is 16 x 12 x 6 pixels, its image 17 x 12 x 6 pixels", read_mask, folder, record, TABLE)
    (folder / "masks/a.nii.gz").unlink()
    tifffile.imwrite(folder / "masks/a.tif", VALUES[truth], photometric="minisblack")
    refused("save it as NIfTI or NRRD", read_mask, folder, record, TABLE)


def test_a_file_of_another_round_and_one_that_is_not_read(tmp_path):
    folder, record, truth = round_of(tmp_path, None)
    for name in ("Thumbs.db", ".a.png", "notes.txt"):
        (folder / "masks" / name).write_bytes(b"")
    check_folder(folder, [record])
    Image.fromarray(VALUES[truth]).save(folder / "masks/b.png")
    refused("masks/b.png: round_01 asked for no case b", check_folder, folder, [record])
    (folder / "masks/b.png").unlink()
    Image.fromarray(VALUES[truth]).save(folder / "masks/a.jpg")
    refused("masks/a.jpg: is of a kind that is not read", check_folder, folder, [record])


def test_a_prediction_that_was_changed_in_place(tmp_path):
    folder, record, truth = round_of(tmp_path, None)
    Image.fromarray(VALUES[truth]).save(folder / "predictions/a.png")
    refused("predictions/a.png: was changed in place", check_folder, folder, [record])
    shutil.move(folder / "predictions/a.png", folder / "masks/a.png")  # as the sentence says
    check_folder(folder, [record])
    assert read_prediction(folder, record, TABLE) is None
    assert (read_mask(folder, record, TABLE)[0] == expected(truth, None)).all()
