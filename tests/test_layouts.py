"""Which files make up the cases of a folder of images; the layouts of volumes are in test_prepare_nifti.py."""

import pytest

from mtseg.layouts import LayoutError, find_cases, masks_without_image, stem


def make(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root


def found(source, **options):
    """{case: (its images, its label)} as paths below `source`, and the channels."""
    cases, channels = find_cases(source, **options)

    def relative(path):
        return path and str(path.resolve().relative_to(source.resolve()))

    return {case.name: ([*map(relative, case.images)], relative(case.label)) for case in cases}, channels


@pytest.mark.parametrize("folder", ["masks", "labels"])
@pytest.mark.parametrize("suffix", ["", "_mask", "_label", "_seg", "-seg"])
def test_images_and_masks_in_two_folders(tmp_path, folder, suffix):
    make(tmp_path, "images/a.png", "images/b.TIF", f"{folder}/a{suffix}.png", f"{folder}/b{suffix}.tiff", "preview.png")
    make(tmp_path, "classes.json", "images/.hidden.png", "images/Thumbs.db", "unlabeled/c.png")
    assert found(tmp_path) == (
        {
            "a": (["images/a.png"], f"{folder}/a{suffix}.png"),
            "b": (["images/b.TIF"], f"{folder}/b{suffix}.tiff"),
            "c": (["unlabeled/c.png"], None),
        },
        None,
    )


def test_images_without_masks_and_a_folder_that_is_called_images(tmp_path):
    make(tmp_path, "images/a.png", "images/b.png")
    assert found(tmp_path)[0] == {"a": (["images/a.png"], None), "b": (["images/b.png"], None)}
    make(tmp_path, "masks/a.png")
    assert find_cases(tmp_path / "images")[0] == find_cases(tmp_path)[0]
    assert find_cases(tmp_path / "images" / "a.png")[0] == find_cases(tmp_path)[0][:1]


def test_masks_beside_their_images(tmp_path):
    make(tmp_path, "a.png", "a_mask.png", "b.tif", "b-label.png", "c.png", "d_mask.png")
    assert found(tmp_path)[0] == {
        "a": (["a.png"], "a_mask.png"),
        "b": (["b.tif"], "b-label.png"),
        "c": (["c.png"], None),
    }
    assert masks_without_image(tmp_path, find_cases(tmp_path)[0]) == [tmp_path / "d_mask.png"]


def test_in_a_folder_of_images_a_name_says_nothing(tmp_path):
    make(tmp_path, "images/cell_label.png", "images/cell.png", "masks/cell_label.png", "masks/cell.png")
    assert found(tmp_path)[0] == {
        "cell": (["images/cell.png"], "masks/cell.png"),
        "cell_label": (["images/cell_label.png"], "masks/cell_label.png"),
    }
    (tmp_path / "masks" / "cell.png").unlink()
    assert found(tmp_path)[0]["cell"] == (["images/cell.png"], None)
    assert masks_without_image(tmp_path / "images", find_cases(tmp_path / "images")[0]) == []


def test_nnunet_with_a_file_a_channel_and_with_one_file(tmp_path):
    make(tmp_path, *(f"imagesTr/a_000{c}.tif" for c in range(3)), "imagesTr/a.json", "labelsTr/a.png")
    make(tmp_path, *(f"imagesTs/b_000{c}.tif" for c in range(3)))
    cases, channels = found(tmp_path)
    assert channels == ["0000", "0001", "0002"]
    assert cases == {
        "a": ([f"imagesTr/a_000{c}.tif" for c in range(3)], "labelsTr/a.png"),
        "b": ([f"imagesTs/b_000{c}.tif" for c in range(3)], None),
    }
    make(tmp_path / "rgb", "imagesTr/a_0000.png", "labelsTr/a.png")
    assert found(tmp_path / "rgb") == ({"a": (["imagesTr/a_0000.png"], "labelsTr/a.png")}, None)


def test_numbers_of_a_sequence_are_no_channels(tmp_path):
    names = [f"slice_000{number}" for number in range(3)]
    make(tmp_path, *(f"images/{name}.png" for name in names), *(f"masks/{name}.png" for name in names))
    assert found(tmp_path) == ({name: ([f"images/{name}.png"], f"masks/{name}.png") for name in names}, None)
    make(tmp_path / "flat", *(f"{name}.png" for name in names))
    assert list(found(tmp_path / "flat")[0]) == names
    assert find_cases(tmp_path / "flat" / "slice_0000.png")[0][0].name == "slice_0000"
    one = found(tmp_path / "flat", channels=["0000", "0001", "0002"])
    assert one == ({"slice": ([f"{name}.png" for name in names], None)}, ["0000", "0001", "0002"])


def test_images_beside_volumes_are_passed_over(tmp_path):
    make(tmp_path, "a.nii.gz", "a.png", "a_seg.nii.gz", "figures/overview.png", "images/a.png")
    assert found(tmp_path)[0] == {"a": (["a.nii.gz"], "a_seg.nii.gz")}
    make(tmp_path / "folders", "x/x_t1.nii", "x/x_seg.nii", "x/screen.png", "pictures/one.png")
    assert found(tmp_path / "folders")[0] == {"x": (["x/x_t1.nii"], "x/x_seg.nii")}


def test_in_a_folder_of_scans_a_name_says_nothing(tmp_path):
    make(tmp_path, "imagesTr/a_seg.nii.gz", "labelsTr/a_seg.nii.gz")
    assert found(tmp_path)[0] == {"a_seg": (["imagesTr/a_seg.nii.gz"], "labelsTr/a_seg.nii.gz")}


def test_labels_in_a_folder_of_their_own(tmp_path):
    make(tmp_path, "scans/a.png", "scans/b.png", "drawn/a_mask.tif", "drawn/z.png")
    labels = tmp_path / "drawn"
    cases, _ = find_cases(tmp_path / "scans", labels=labels)
    assert [case.label for case in cases] == [labels / "a_mask.tif", None]


@pytest.mark.parametrize("layout", ["images/{}.png masks/{}.png", "imagesTr/{}_0000.png labelsTr/{}.png"])
def test_masks_without_an_image_are_told(tmp_path, layout):
    image, mask = layout.split()
    make(tmp_path, image.format("a"), mask.format("a"), mask.format("b"), "labelsTs/c.png")
    for source in tmp_path, (tmp_path / image).parent:
        cases, _ = find_cases(source)
        assert masks_without_image(source, cases) == sorted([tmp_path / mask.format("b"), tmp_path / "labelsTs/c.png"])


@pytest.mark.parametrize(
    "names, message",
    [
        (["images/a.png", "images/a.tif"], r"a\.tif: case a has this file with another ending too; remove one"),
        (["images/a.png", "masks/a.png", "masks/a.tif"], r"a\.tif: case a has another label, a\.png, too; remove one"),
        (["images/a.png", "masks/a_seg.png", "masks/a_mask.png"], r"a_mask\.png: case a has another label, a_seg\.png"),
        (["a.png", "a_mask.png", "a_seg.png"], r"a_seg\.png: case a has another label, a_mask\.png, too; remove one"),
        (["a.nii.gz", "a_seg.nii.gz", "b_seg.nii.gz"], r"b_seg\.nii\.gz: a label without an image; add the image or"),
        (["images/a.png", "masks/a.png", "unlabeled/a.png"], r"two cases are called a; rename one"),
        (
            ["images/a.jpg"],
            r"no volumes in it and no images; it must hold imagesTr/ or images/, or files ending in .*png",
        ),
        (["a_mask.png"], r"no volumes in it and no images"),
        (["images/a.JPG"], r"with them; a.JPG is to be saved as PNG, from an original that is no JPEG$"),
    ],
)
def test_files_that_contradict_each_other(tmp_path, names, message):
    with pytest.raises(LayoutError, match=message):
        find_cases(make(tmp_path, *names))


def test_a_picture_of_another_format(tmp_path):
    make(tmp_path, "a.bmp")
    with pytest.raises(LayoutError, match=r"a\.bmp: not a volume or image this can read; convert it to one of .*\.png"):
        find_cases(tmp_path / "a.bmp")
    with pytest.raises(LayoutError, match=r"holds the label of none of the cases, e\.g\. b\.png; rename them"):
        find_cases(make(tmp_path, "images/b.png") / "images", labels=make(tmp_path / "other", "c.png"))


def test_stem():
    assert [stem(name) for name in ("a.b.png", "x/A.TIFF", ".a.png", "a.jpg", "a.tif")] == ["a.b", "A", None, None, "a"]
