import h5py
import numpy as np
import pytest
from conftest import write_case
from torch.utils.data import DataLoader

from mtseg.datasets import DataError, LAHeart, read_list, training_cases
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
