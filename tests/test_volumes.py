"""Files in and out, against NiBabel and SimpleITK."""

import gzip
import sys
import tracemalloc

import h5py
import numpy as np
import pytest

from mtseg import images, layouts, volumes
from mtseg.volumes import VolumeError, ending, hdf5_bytes, nifti_header, read_channels, read_volume, volume_bytes

nibabel = pytest.importorskip("nibabel", reason='pip install -e ".[test]"')
nrrd = pytest.importorskip("nrrd", reason='pip install -e ".[test]"')
sitk = pytest.importorskip("SimpleITK", reason='pip install -e ".[test]"')

SHAPE = (9, 12, 7)


def rotation(x, y, z):
    (cx, cy, cz), (sx, sy, sz) = np.cos([x, y, z]), np.sin([x, y, z])
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    return about_x @ about_y @ np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])


def affine_of(directions, spacing=(0.7, 1.3, 2.9), origin=(-31.7, 12.1, 80.3)):
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = np.asarray(directions) * spacing, origin
    return affine


ORIENTATIONS = {
    "RAS": affine_of(np.eye(3)),
    "LPS": affine_of(np.diag([-1, -1, 1])),
    "LAS": affine_of(np.diag([-1, 1, 1])),
    "PIR": affine_of([[0, 0, 1], [-1, 0, 0], [0, -1, 0]]),
    "oblique": affine_of(rotation(0.4, -0.3, 0.2)),
    "oblique and flipped": affine_of(rotation(-0.2, 0.5, 0.3) @ [[0, 1, 0], [0, 0, -1], [-1, 0, 0]]),
}


def label_map(seed=0):
    return np.random.default_rng(seed).choice([0, 1, 2, 4], SHAPE).astype(np.uint8)


@pytest.mark.parametrize("affine", ORIENTATIONS.values(), ids=ORIENTATIONS)
@pytest.mark.parametrize("codes", [(1, 1), (0, 2), (1, 0)], ids=lambda c: f"qform {c[0]} sform {c[1]}")
@pytest.mark.parametrize("kind", [".nii.gz", ".nii"])
def test_nifti_in_nifti_out_on_the_same_grid(tmp_path, affine, codes, kind):
    image = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    made = nibabel.Nifti1Image(image, affine)
    made.set_qform(affine, codes[0])
    made.set_sform(affine, codes[1])
    made.header["descrip"] = b"a patient's name"
    source, target = tmp_path / f"image{kind}", tmp_path / f"label{kind}"
    nibabel.save(made, source)

    volume = read_volume(source)
    np.testing.assert_array_equal(volume.array, image)
    np.testing.assert_array_equal(volume.affine, nibabel.load(source).affine)
    np.testing.assert_allclose(volume.spacing, (0.7, 1.3, 2.9), rtol=1e-6)

    target.write_bytes(volume_bytes(label_map(), ending(source), volume.header))
    written = nibabel.load(target)
    assert written.get_data_dtype() == np.uint8
    assert written.shape == SHAPE
    assert (written.affine == nibabel.load(source).affine).all()
    assert (written.get_qform(coded=True)[1], written.get_sform(coded=True)[1]) == codes
    assert b"patient" not in (target.read_bytes() if kind == ".nii" else written.header.binaryblock)
    np.testing.assert_array_equal(np.asarray(written.dataobj), label_map())
    # ITK reads axes in the other order, and the same geometry from both files.
    by_itk, itk_source = sitk.ReadImage(str(target)), sitk.ReadImage(str(source))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(by_itk).transpose(2, 1, 0), label_map())
    assert by_itk.GetPixelID() == sitk.sitkUInt8
    for name in ("GetOrigin", "GetSpacing", "GetDirection", "GetSize"):
        assert getattr(by_itk, name)() == getattr(itk_source, name)()


@pytest.mark.parametrize("affine", ORIENTATIONS.values(), ids=ORIENTATIONS)
def test_nrrd_as_itk_writes_it(tmp_path, affine):
    """Written by ITK, read here, written here, read by ITK; and the affine is the one NiBabel finds in ITK's NIfTI."""
    image = sitk.GetImageFromArray(label_map(1).astype(np.int16).transpose(2, 1, 0))
    directions = np.diag([-1, -1, 1]) @ affine[:3, :3]
    spacing = np.linalg.norm(directions, axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((directions / spacing).ravel().tolist())
    image.SetOrigin((np.diag([-1, -1, 1]) @ affine[:3, 3]).tolist())
    for name in ("image.nrrd", "image.nii.gz"):
        sitk.WriteImage(image, str(tmp_path / name))

    volume, nifti = read_volume(tmp_path / "image.nrrd"), read_volume(tmp_path / "image.nii.gz")
    assert volume.array.dtype == nifti.array.dtype == np.int16
    np.testing.assert_array_equal(volume.array, nifti.array)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)
    np.testing.assert_allclose(nifti.affine, affine, atol=1e-4)
    (tmp_path / "out.nrrd").write_bytes(volume_bytes(label_map(), ".nrrd", volume.header))
    back = sitk.ReadImage(str(tmp_path / "out.nrrd"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(back).transpose(2, 1, 0), label_map())
    for name in ("GetOrigin", "GetSpacing", "GetDirection", "GetSize"):
        assert getattr(back, name)() == getattr(sitk.ReadImage(str(tmp_path / "image.nrrd")), name)()


@pytest.mark.parametrize("name", ["four axes.nii.gz", "vector.nii.gz", "vector.nrrd"])
def test_channels_come_first_whatever_the_file_has(tmp_path, name):
    channels = np.random.default_rng(0).standard_normal((3, *SHAPE)).astype(np.float32)
    path = tmp_path / name
    if name == "four axes.nii.gz":
        nibabel.save(nibabel.Nifti1Image(np.moveaxis(channels, 0, -1), ORIENTATIONS["oblique"]), path)
    else:
        sitk.WriteImage(sitk.GetImageFromArray(channels.transpose(3, 2, 1, 0), isVector=True), str(path))
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array, channels)
    (tmp_path / f"out{ending(path)}").write_bytes(volume_bytes(label_map(), ending(path), volume.header))
    back = read_volume(tmp_path / f"out{ending(path)}")
    np.testing.assert_array_equal(back.array, label_map())
    np.testing.assert_array_equal(back.affine, volume.affine)


def test_channels_in_files_of_their_own_that_have_channels_themselves(tmp_path):
    for name, shape in (("a", (8, 8, 4, 2)), ("b", (8, 8, 4))):
        nibabel.save(nibabel.Nifti1Image(np.zeros(shape, np.float32), np.eye(4)), tmp_path / f"{name}.nii")
    paths = [tmp_path / "a.nii", tmp_path / "b.nii"]
    with pytest.raises(VolumeError, match=r"a\.nii: has channels itself, where .*b\.nii is another"):
        read_channels(paths)
    with pytest.raises(VolumeError, match=r"a\.nii"):
        read_channels(paths[::-1])


def test_what_nifti_scales_and_what_its_units_mean(tmp_path):
    stored = nibabel.Nifti1Image(
        np.arange(24, dtype=np.int16).reshape(2, 3, 4, 1), affine_of(np.eye(3), (700, 1300, 2900))
    )
    stored.header.set_slope_inter(0.5, -3)
    stored.header.set_xyzt_units("micron")
    nibabel.save(stored, tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii")
    assert volume.array.shape == (2, 3, 4)
    np.testing.assert_allclose(volume.spacing, (0.7, 1.3, 2.9))
    np.testing.assert_array_equal(volume.array, nibabel.load(tmp_path / "a.nii").get_fdata()[..., 0])
    (tmp_path / "b.nii").write_bytes(volume_bytes(np.ones((2, 3, 4), np.uint8), ".nii", volume.header))
    assert (nibabel.load(tmp_path / "b.nii").affine == nibabel.load(tmp_path / "a.nii").affine).all()
    assert read_volume(tmp_path / "b.nii").array.max() == 1
    assert read_volume(tmp_path / "a.nii", header_only=True).array is None


def test_hdf5_with_and_without_label_and_spacing(tmp_path):
    path = tmp_path / "a.h5"
    path.write_bytes(hdf5_bytes({"image": np.ones((2, *SHAPE), np.float32)}, {"spacing": [1.0, 2.0, 3.0]}))
    volume = read_volume(path)
    assert volume.spacing.tolist() == [1, 2, 3]
    assert volume.label is None and volume.affine is None
    path.write_bytes(hdf5_bytes({"image": np.ones(SHAPE), "label": label_map()}))
    assert (read_volume(path).label == label_map()).all() and read_volume(path).spacing is None
    path.write_bytes(hdf5_bytes({"image": np.ones(SHAPE), "label": label_map()[1:]}))
    with pytest.raises(VolumeError, match=r"a\.h5: has an image of shape"):
        read_volume(path)
    (tmp_path / "b.h5").write_bytes(volume_bytes(label_map(), ".h5", {}))
    with h5py.File(tmp_path / "b.h5") as file:
        assert (file["prediction"][...] == label_map()).all()


def test_a_header_made_from_an_affine(tmp_path):
    affine = ORIENTATIONS["oblique and flipped"]
    (tmp_path / "a.nii.gz").write_bytes(volume_bytes(label_map(), ".nii.gz", nifti_header(affine)))
    np.testing.assert_allclose(nibabel.load(tmp_path / "a.nii.gz").affine, affine, rtol=1e-6)


@pytest.mark.parametrize("key", ["image", "label"])
@pytest.mark.parametrize("how", ["external", "virtual", "external link", "soft link", "group"])
def test_hdf5_voxels_that_lie_in_other_files_are_refused(tmp_path, how, key):
    path, other = tmp_path / "a.h5", tmp_path / "other"
    other.write_bytes(bytes(4096))
    with h5py.File(path, "w") as file:
        if key == "label":
            file["image"] = np.zeros((16, 16, 4), np.float32)
        if how == "external":
            file.create_dataset(key, (16, 16, 4), np.float32, external=[(str(other), 0, 4096)])
        elif how == "virtual":
            layout = h5py.VirtualLayout((16, 16, 4), np.float32)
            layout[:] = h5py.VirtualSource(str(other), "image", (16, 16, 4))
            file.create_virtual_dataset(key, layout)
        elif how == "group":
            file.create_group(key)
        else:
            file[key] = h5py.ExternalLink(str(other), "image") if how == "external link" else h5py.SoftLink("/image")
    for header_only in (False, True):
        with pytest.raises(VolumeError, match=f"a.h5: the voxels of '{key}' do not lie in this file"):
            read_volume(path, header_only)


@pytest.mark.parametrize(("units", "spacing"), [('"um" "um" "um"', (0.5, 0.5, 2)), ('"mm" "" ""', (500, 500, 2000))])
def test_the_units_of_each_axis_of_an_nrrd_count(tmp_path, units, spacing):
    header = "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 3 4 5\nencoding: raw\nspacings: 500 500 2000\n"
    (tmp_path / "a.nrrd").write_bytes(f"{header}units: {units}\n\n".encode() + bytes(60))
    np.testing.assert_allclose(read_volume(tmp_path / "a.nrrd").spacing, spacing)


def test_an_nrrd_header_that_names_another_file_is_refused(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(range(60)))
    header = "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 3 4 5\nencoding: raw\n"
    for name in ("data file", "datafile"):
        (tmp_path / "a.nrrd").write_text(f"{header}{name}: {tmp_path / 'secret'}\n\n")
        with pytest.raises(VolumeError, match="lie in another file"):
            read_volume(tmp_path / "a.nrrd")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "raw.nrrd", "a.h5"])
def test_a_small_file_that_claims_many_voxels_takes_no_memory(tmp_path, name, monkeypatch):
    path, shape = tmp_path / name, (2000, 2000, 2000)
    if name == "a.h5":
        with h5py.File(path, "w") as file:
            file.create_dataset("image", shape, np.float32, chunks=(64, 64, 64))
    elif name.endswith(".nrrd"):
        encoding = "raw" if name.startswith("raw") else "gzip"
        sizes = " ".join(map(str, shape))
        header = f"NRRD0004\ntype: float\ndimension: 3\nsizes: {sizes}\nendian: little\nencoding: {encoding}\n\n"
        path.write_bytes(header.encode() + gzip.compress(bytes(4000)))
    else:
        header = nibabel.Nifti1Header()
        header.set_data_dtype(np.float32)
        header.set_data_shape(shape)
        header["vox_offset"], header["magic"] = 352, b"n+1"
        content = header.binaryblock + bytes(4 + 4000)
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert path.stat().st_size < 10_000
    tracemalloc.start()
    with pytest.raises(VolumeError, match=r"claims 2000 x 2000 x 2000 voxels, but the file cannot hold"):
        read_volume(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6  # of 32e9


@pytest.mark.parametrize("name", ["a.nii.gz", "a.h5"])
def test_voxels_that_are_all_alike_are_held_by_a_small_file(tmp_path, name):
    zeros = np.zeros((256, 256, 128), np.uint8)
    path = tmp_path / name
    path.write_bytes(
        hdf5_bytes({"image": zeros}) if name == "a.h5" else volume_bytes(zeros, ".nii.gz", nifti_header(np.eye(4)))
    )
    assert read_volume(path).array.shape == zeros.shape


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.h5"])
def test_a_volume_without_voxels_is_refused(tmp_path, name):
    path, empty = tmp_path / name, np.zeros((4, 0, 4), np.float32)
    if name == "a.h5":
        path.write_bytes(hdf5_bytes({"image": np.zeros((4, 4, 4), np.float32)}))
        with h5py.File(path, "w") as file:
            file["image"] = empty
    elif name == "a.nrrd":
        path.write_text("NRRD0004\ntype: float\ndimension: 3\nsizes: 4 0 4\nendian: little\nencoding: raw\n\n")
    else:
        nibabel.save(nibabel.Nifti1Image(empty, np.eye(4)), path)
    with pytest.raises(VolumeError):
        read_volume(path)


@pytest.mark.parametrize("width", [1e-30, 1e-9, 1e7, 1e30])
def test_an_absurd_spacing_is_refused(tmp_path, width):
    affine = np.diag([1, 1, width, 1])
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.float32), affine), tmp_path / "a.nii.gz")
    with pytest.raises(VolumeError, match=r"mm wide, which cannot be|not a whole"):
        read_volume(tmp_path / "a.nii.gz")


def test_files_that_can_be_read_are_the_files_that_are_found():
    """None of these modules knows another, so that each can be copied alone."""
    assert (*volumes.ENDINGS, *images.ENDINGS) == layouts.ENDINGS


def spoil(path, how):
    if how == "no such file":
        path.unlink()
    elif how == "half of it":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "text":
        path.write_text("hello")
    elif how == "two axes":
        path.write_bytes(nibabel.Nifti1Image(np.ones((3, 4), np.float32), np.eye(4)).to_bytes())
    elif how == "complex":
        path.write_bytes(nibabel.Nifti1Image(np.ones(SHAPE, np.complex64), np.eye(4)).to_bytes())
    elif how == "flat affine":
        image = nibabel.Nifti1Image(np.ones(SHAPE, np.float32), None)
        image.header["sform_code"], image.header["srow_x"], image.header["srow_y"] = 1, (1, 1, 0, 0), (1, 1, 0, 0)
        image.header["srow_z"] = (0, 0, 1, 0)
        path.write_bytes(nibabel.Nifti1Image(np.ones(SHAPE, np.float32), None, image.header).to_bytes())


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "a.h5"])
@pytest.mark.parametrize("how", ["no such file", "half of it", "text"])
def test_a_broken_file_is_one_sentence(tmp_path, name, how):
    path = tmp_path / name
    if name == "a.h5":
        path.write_bytes(hdf5_bytes({"image": np.random.default_rng(0).standard_normal(SHAPE)}))
    else:
        noise = np.random.default_rng(0).standard_normal(SHAPE)
        sitk.WriteImage(sitk.GetImageFromArray(noise), str(path))
    spoil(path, how)
    with pytest.raises(VolumeError) as raised:
        read_volume(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["a.nii", "a.nrrd"])
def test_a_header_damaged_anywhere_is_read_or_refused(tmp_path, name):
    path = tmp_path / name
    sitk.WriteImage(sitk.GetImageFromArray(label_map()), str(path))
    whole = path.read_bytes()
    refused = 0
    for place in range(352 if name == "a.nii" else whole.index(b"\n\n")):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            read_volume(path)
        except VolumeError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 10


@pytest.mark.parametrize(
    ("how", "words"), [("two axes", "has shape"), ("complex", "complex64"), ("flat affine", "singular")]
)
def test_a_file_that_is_no_volume(tmp_path, how, words):
    spoil(tmp_path / "a.nii", how)
    with pytest.raises(VolumeError, match=words):
        read_volume(tmp_path / "a.nii")
    with pytest.raises(VolumeError, match=r"a\.mha: not a volume this can read"):
        read_volume(tmp_path / "a.mha")


@pytest.mark.parametrize(("package", "name"), [("nibabel", "nibabel"), ("nrrd", "pynrrd")])
def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch, package, name):
    path = tmp_path / ("a.nii.gz" if package == "nibabel" else "a.nrrd")
    sitk.WriteImage(sitk.GetImageFromArray(label_map()), str(path))
    header = read_volume(path).header
    monkeypatch.setitem(sys.modules, package, None)
    for call in (lambda: read_volume(path), lambda: volume_bytes(label_map(), ending(path), header)):
        with pytest.raises(VolumeError, match=f"pip install {name}"):
            call()
    with pytest.raises(VolumeError, match="no float16"):
        volume_bytes(label_map().astype(np.float16), ending(path), header)
