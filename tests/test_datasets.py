import h5py
import numpy as np
import pytest
from conftest import write_case
from torch.utils.data import DataLoader

from mtseg.datasets import (
    DataError,
    JoinedCases,
    LAHeart,
    find_root,
    intensity_notes,
    read_list,
    training_cases,
    unlabeled_cases,
)
from mtseg.transforms import Compose, RandomCrop, RandomRotFlip, ToTensor


def test_reads_the_lists_one_folder_up(data):
    train, test = LAHeart(data / "data"), LAHeart(data / "data", split="test")
    assert train.image_list == [f"case_{i}" for i in range(6)]
    assert len(test) == 2
    assert len(LAHeart(data, num=4)) == 4
    sample = train[0]
    assert sample["image"].dtype == np.float32
    assert sample["label"].dtype == np.uint8
    with h5py.File(data / "data/case_0/mri_norm2.h5") as file:
        np.testing.assert_array_equal(sample["image"], file["image"][...])


def test_a_seeded_index_gives_the_same_sample_in_any_worker(data):
    dataset = LAHeart(data / "data", transform=Compose([RandomRotFlip(), RandomCrop((16, 16, 16)), ToTensor()]))
    batches = [[(i, (7, 0, i)) for i in range(3)], [(i, (7, 1, i)) for i in range(3)]]
    none, two = (list(DataLoader(dataset, batch_sampler=batches, num_workers=n)) for n in (0, 2))
    for a, b in zip(none, two, strict=True):
        assert a.keys() == {"image", "label"}
        assert (a["image"] == b["image"]).all()
        assert (a["label"] == b["label"]).all()
    assert (none[0]["image"] != none[1]["image"]).any()


def broken(path, how):
    """Do to the HDF5 file at `path` what `how` says."""
    if how == "no such file":
        path.unlink()
    elif how == "not a whole HDF5 file":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        with h5py.File(path, "a") as file:
            image, label = file["image"][...], file["label"][...]
            if how == "has no 'label'":
                del file["label"]
            elif how == "an image of shape":
                del file["label"]
                file["label"] = label[1:]
            elif how == "NaN or infinity":
                image[0, 0, 0] = np.nan
                file["image"][...] = image
            elif how == "a label of value":
                label[0, 0, 0] = 7
                file["label"][...] = label


STRUCTURE = ["no such file", "not a whole HDF5 file", "has no 'label'", "an image of shape"]


@pytest.mark.parametrize("how", [*STRUCTURE, "NaN or infinity", "a label of value"])
def test_a_bad_file_is_named_with_its_case(data, how):
    path = data / "data/case_3/mri_norm2.h5"
    broken(path, how)
    with pytest.raises(DataError, match=how) as raised:
        LAHeart(data / "data", num_classes=2)[3]
    assert str(path) in str(raised.value)
    assert "case_3" in str(raised.value)
    assert "\n" not in str(raised.value)
    if how in STRUCTURE:  # is found before training begins
        with pytest.raises(DataError, match=how):
            LAHeart(data / "data")


@pytest.mark.parametrize("damage", ["group", "text", "bytes"])
def test_damage_of_any_kind_is_one_sentence(data, damage):
    path = data / "data/case_3/mri_norm2.h5"
    content = bytearray(path.read_bytes())
    for place in range(7, len(content), len(content) // 40) if damage == "bytes" else [0]:
        if damage == "bytes":
            path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        else:
            with h5py.File(path, "w") as file:
                file["label"] = np.zeros((3, 3, 3))
                _ = file.create_group("image") if damage == "group" else file.create_dataset("image", data="hello")
        try:
            LAHeart(data / "data", num_classes=2)[3]
        except DataError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert damage == "bytes"  # not every byte of an uncompressed file matters


def test_a_case_without_voxels_is_refused(tmp_path):
    write_case(tmp_path, "a", np.zeros((4, 0, 4), np.float32), np.zeros((4, 0, 4), np.uint8))
    with pytest.raises(DataError, match=r"case a has no voxels, it is of shape \(4, 0, 4\)"):
        LAHeart(tmp_path, cases=["a"])


SECRET = bytes(range(256)) * 16  # 4096 bytes of another file, as 16 x 16 x 4 float32 voxels


def point_elsewhere(path, key, how):
    """Make data set `key` of the file at `path` one whose voxels lie in other files."""
    other = path.with_name("other")
    with h5py.File(path, "a") as file:
        shape = (16, 16, 4)
        for name in ("image", "label"):
            del file[name]
            if name != key:
                file[name] = np.zeros(shape, np.uint8)
        if how == "external":
            other.write_bytes(SECRET)
            file.create_dataset(key, shape, np.float32, external=[(str(other), 0, len(SECRET))])
        else:
            with h5py.File(other, "w") as source:
                source["image"] = np.zeros(shape, np.float32)
        if how == "virtual":
            layout = h5py.VirtualLayout(shape, np.float32)
            layout[:] = h5py.VirtualSource(str(other), "image", shape)
            file.create_virtual_dataset(key, layout)
        elif how == "external link":
            file[key] = h5py.ExternalLink(str(other), "image")
        elif how == "soft link":
            file["hidden"] = h5py.ExternalLink(str(other), "/")
            file[key] = h5py.SoftLink("/hidden/image")


@pytest.mark.parametrize("key", ["image", "label"])
@pytest.mark.parametrize("how", ["external", "virtual", "external link", "soft link"])
def test_voxels_that_lie_in_other_files_are_refused(data, how, key):
    path = data / "data/case_3/mri_norm2.h5"
    point_elsewhere(path, key, how)
    with pytest.raises(DataError, match=f"'{key}'.* (other files|is a link)") as raised:
        LAHeart(data)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_small_file_that_claims_many_voxels_is_refused_before_memory_is_taken(data):
    path = data / "data/case_3/mri_norm2.h5"
    with h5py.File(path, "w") as file:
        for key in ("image", "label"):
            file.create_dataset(key, (2000, 2000, 2000), np.float32, chunks=(64, 64, 64))
    assert path.stat().st_size < 10_000
    with pytest.raises(DataError, match="hardly any of it is stored"):
        LAHeart(data)
    with h5py.File(path, "w") as file:  # voxels that are all alike compress as well as anything can
        for key in ("image", "label"):
            file.create_dataset(key, data=np.zeros((128, 128, 256), np.float32), compression="gzip", compression_opts=9)
    assert LAHeart(data)[3]["image"].shape == (128, 128, 256)


def test_the_folder_of_the_cases_is_taken_for_the_root(data, tmp_path, monkeypatch):
    assert find_root(data) == find_root(data / "data") == data
    (data / "data").rename(data / "2018LA_Seg_Training Set")  # UA-MT's --root_path
    assert find_root(data / "2018LA_Seg_Training Set") == data
    assert len(LAHeart(data / "2018LA_Seg_Training Set")) == 6
    assert len(training_cases(find_root(data / "2018LA_Seg_Training Set"))) == 6
    monkeypatch.chdir(data / "2018LA_Seg_Training Set")
    assert find_root(".") == data
    assert find_root(tmp_path / "nowhere") == tmp_path / "nowhere"


def test_a_list_that_is_no_text(data):
    (data / "train.list").write_bytes(b"\xff\xfe\x00case")
    with pytest.raises(DataError, match="not a text file"):
        LAHeart(data)


def test_a_workers_error_keeps_its_one_sentence(data):
    broken(data / "data/case_3/mri_norm2.h5", "NaN or infinity")
    dataset = LAHeart(data / "data")
    with pytest.raises(DataError, match=r"^[^\n]*case_3/mri_norm2.h5: the image of case case_3 holds NaN[^\n]*$"):
        list(DataLoader(dataset, batch_size=None, sampler=[0, 3], num_workers=1))


@pytest.mark.parametrize("value", [-1, 0.5, np.nan, 300])
def test_labels_that_are_no_classes_are_refused(tmp_path, value):
    label = np.zeros((4, 4, 4))
    label[1, 1, 1] = value
    write_case(tmp_path, "a", np.zeros((4, 4, 4)), label)
    (tmp_path / "train.list").write_text("a\n")
    with pytest.raises(DataError, match="a label of value"):
        LAHeart(tmp_path)[0]


def test_channels_must_agree(tmp_path):
    label = np.zeros((4, 4, 4), np.uint8)
    write_case(tmp_path, "a", np.zeros((2, 4, 4, 4)), label)
    write_case(tmp_path, "b", np.zeros((4, 4, 4)), label)
    assert LAHeart(tmp_path, cases=["a"]).n_channels == 2
    with pytest.raises(DataError, match="case a has 2 channels and case b has 1"):
        LAHeart(tmp_path, cases=["a", "b"])


@pytest.mark.parametrize("name", ["../secret", "/etc", "..", "a/b", "a\\b"])
def test_a_path_in_a_list_is_refused(data, name):
    (data / "train.list").write_text(f"case_0\n{name}\n")
    with pytest.raises(DataError, match="is a path"):
        LAHeart(data)


def test_lists(data):
    (data / "train.list").write_text("\n case_0 \n\ncase_1\r\n")
    assert read_list(data / "train.list") == ["case_0", "case_1"]
    (data / "train.list").write_text("case_0\ncase_0\n")
    with pytest.raises(DataError, match="twice"):
        read_list(data / "train.list")
    (data / "train.list").write_text("\n")
    with pytest.raises(DataError, match="names no case"):
        read_list(data / "train.list")
    with pytest.raises(DataError, match="no such list"):
        read_list(data / "val.list")
    with pytest.raises(DataError, match="no such folder"):
        LAHeart(data / "nowhere")


def test_no_case_is_trained_and_tested_on(data):
    assert training_cases(data, val_cases=["case_1"], num=3) == ["case_0", "case_2", "case_3"]
    (data / "test.list").write_text("case_7\ncase_2\n")
    with pytest.raises(DataError, match=r"case_2 is in test\.list too"):
        training_cases(data)


def test_a_list_may_begin_with_the_mark_of_windows_editors(data):
    (data / "train.list").write_bytes(b"\xef\xbb\xbfcase_0\r\ncase_1\r\n")
    assert LAHeart(data)[0]["image"].shape == (24, 20, 14)
    assert read_list(data / "train.list") == ["case_0", "case_1"]


def test_unlabelled_cases_are_looked_for_in_lists_and_then_in_folders(data, tmp_path):
    (data / "unlabeled.list").write_text("case_9\n")
    assert unlabeled_cases(data) == (["case_9"], [])
    (data / "unlabeled.list").unlink()
    assert unlabeled_cases(data)[0] == [f"case_{number}" for number in range(6)]
    (data / "train.list").unlink()
    names = [f"case_{number}" for number in range(8)]
    cases, notes = unlabeled_cases(data, names[:2], (), names[6:])
    assert cases == names[2:]
    assert [note.split(":")[0] for note in notes] == [str(data / "data")] * 2
    with pytest.raises(DataError, match=r"data: case case_7 is in --val_list too \(1 in all\)"):
        unlabeled_cases(data, val_cases=["case_7", "case_8"])
    with pytest.raises(DataError, match="name another folder"):
        unlabeled_cases(tmp_path)


def test_notes_on_intensities():
    rng = np.random.default_rng(0)
    good = rng.standard_normal((70, 70, 70)).astype(np.float32)
    assert intensity_notes([("a", good), ("b", good[:20] / 2 + 1), ("c", np.stack([good, -good]))]) == []
    (note,) = intensity_notes([("a", good), ("b", np.stack([good, 0 * good + 3])), ("c", 0 * good)])
    assert note.startswith("constant images (b: 3 everywhere) in 2 cases (b, c)")
    (note,) = intensity_notes([("a", np.stack([good, 255 * (good > 0)])), ("b", good), ("c", good / 10)])
    assert note.startswith("images that are not normalised (a: mean 12") and "in 2 cases (a, c)" in note
    assert intensity_notes([]) == []


@pytest.mark.parametrize(("key", "value"), [("image", 1j), ("label", "heart"), ("label", b"1")])
def test_voxels_that_are_no_numbers_are_refused(data, key, value):
    path = data / "data/case_3/mri_norm2.h5"
    with h5py.File(path, "a") as file:
        shape = file[key].shape
        del file[key]
        kind = h5py.string_dtype() if isinstance(value, str) else None
        file.create_dataset(key, data=np.full(shape, value, dtype=kind), dtype=kind)
    with pytest.raises(DataError, match=f"{path}: '{key}' of case case_3 is .*, not numbers"):
        LAHeart(data)


def test_a_label_that_is_not_needed_may_be_deleted(data):
    with h5py.File(data / "data/case_3/mri_norm2.h5", "a") as file:
        file["label"][0, 0, 0] = 7
    for labelnum, advice in ((4, "raise --num_classes$"), (3, "or delete its 'label'")):
        with pytest.raises(DataError, match=advice):
            LAHeart(data, num_classes=2, labelnum=labelnum)[3]


def test_joined_cases_follow_one_another_with_their_seeds(data, tmp_path):
    crop = Compose([RandomCrop((8, 8, 8)), ToTensor()])
    parts = [LAHeart(data, cases=[f"case_{n}" for n in names], transform=crop) for names in ((0, 1), (), (2, 3, 4))]
    joined = JoinedCases(parts)
    assert (len(joined), joined.n_channels) == (5, 1)
    for index, (part, place) in enumerate([(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]):
        assert (joined[(index, (3, index))]["image"] == parts[part][(place, (3, index))]["image"]).all()
    assert (joined[-1, 7]["image"] == parts[2][2, 7]["image"]).all() and joined.case_of(-1) == "case_4"
    with pytest.raises(IndexError):
        joined[5]
    write_case(tmp_path, "a", np.zeros((2, 4, 4, 4)), np.zeros((4, 4, 4)))
    with pytest.raises(DataError, match="case a has 2 channels and case case_0 has 1"):
        JoinedCases([parts[0], LAHeart(tmp_path, cases=["a"])])
