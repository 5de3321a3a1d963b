"""The cached volumes against the files they come from: the same samples bit for bit, the same complaints."""

import pickle
import resource

import h5py
import numpy as np
import pytest
import torch
from conftest import make_data, write_case
from torch.utils.data import DataLoader

from mtseg.cache import CachedDataset, CacheError, LazyArray, decode, encode
from mtseg.datasets import DataError, LAHeart
from mtseg.samplers import IterationSampler, ShuffledBatchSampler
from mtseg.transforms import Compose, RandomCrop, RandomFlip, RandomRotFlip, ToTensor

PATCHES = [(16, 16, 8), (16, 32, 16)]  # smaller than the volumes of (24, 20, 14); larger in two directions


@pytest.fixture(params=["float32", "8 bits", "8 bits, two channels"])
def data(request, tmp_path):
    """Volumes that must stay float32, and such as 8-bit scans become when they are normalised."""
    root = make_data(tmp_path / "tiny", channels=2 if "two" in request.param else None)
    for path in sorted(root.glob("data/*/mri_norm2.h5")) if "8 bits" in request.param else []:
        with h5py.File(path, "a") as file:
            image = np.clip(file["image"][...] * 50 + 100, 0, 255).astype(np.uint8).astype(np.float32)
            file["image"][...] = (image - image.mean()) / image.std()
    return root


def batches(count=8):
    return IterationSampler(ShuffledBatchSampler(range(6), 3, seed=5), seed=5, start=3, stop=3 + count)


def assert_same(ours, theirs):
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            assert torch.equal(a[key], b[key])


@pytest.mark.parametrize("patch_size", PATCHES)
@pytest.mark.parametrize("workers", [0, 2])
def test_samples_are_those_of_the_files(data, patch_size, workers):
    plain = LAHeart(data, transform=Compose([RandomRotFlip(), RandomCrop(patch_size), ToTensor()]), num_classes=2)
    cached = CachedDataset(plain)
    assert (cached.n_channels, cached.image_list, len(cached)) == (plain.n_channels, plain.image_list, 6)
    loader = DataLoader(cached, batch_sampler=batches(), num_workers=workers)
    assert_same(loader, DataLoader(plain, batch_sampler=batches()))


def test_any_transform_sees_the_same_volumes(data):
    def normalise(sample):
        image = np.stack([sample["image"], sample["image"] * 2.0])
        assert sample["image"].max() == image[0].max()
        inside = np.concatenate([sample["label"], 1 - sample["label"]])
        return {**sample, "image": image[0] - np.mean(image), "label": inside}

    for transform in (
        None,
        RandomCrop((24, 20, 14)),
        Compose([RandomFlip((-1,)), RandomCrop((24, 20, 14)), RandomFlip((0, 1, 2))]),
        normalise,
    ):
        plain = LAHeart(data, transform=transform)
        cached = CachedDataset(plain)
        for index in ((2, (7, 1)), (5, 3)):
            ours, theirs = cached[index], plain[index]
            assert ours.keys() == theirs.keys()
            for key in theirs:
                assert np.asarray(ours[key]).dtype == theirs[key].dtype
                np.testing.assert_array_equal(ours[key], theirs[key])
        np.random.seed(3)
        ours = cached[1]
        np.random.seed(3)
        np.testing.assert_array_equal(ours["image"], plain[1]["image"])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_case_that_cannot_be_augmented_is_named_with_its_file(data, workers):
    def crash(sample):
        raise ZeroDivisionError("by\nzero")

    cached = CachedDataset(LAHeart(data, transform=crash))
    path = data / "data/case_2/mri_norm2.h5"
    with pytest.raises(
        DataError, match=rf"^{path}: case case_2 cannot be augmented \(ZeroDivisionError: by zero\)[^\n]*$"
    ):
        list(DataLoader(cached, batch_sampler=[[2]], num_workers=workers))


def test_numpys_ways_to_change_an_image_change_a_copy():
    image = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    centred = lazy = LazyArray(image, np.arange(256, dtype=np.float32) / 2)
    centred -= lazy.mean()
    np.testing.assert_array_equal(centred, image / 2 - image.mean() / 2)
    assert float(lazy[1, 2, 3] + 1) == 12.5
    with pytest.raises(TypeError, match="read-only: assign to a copy"):
        lazy[lazy > 3] = 3


def test_what_a_sample_gives_may_be_written_to(data):
    cached = CachedDataset(LAHeart(data, transform=ToTensor()))
    before = cached.read("case_0")["image"].copy()
    cached[0]["image"].zero_()
    cached.read("case_0")["image"][...] = 0
    np.testing.assert_array_equal(cached.read("case_0")["image"], before)


def test_eight_bits_take_a_byte_a_voxel(data):
    cached = CachedDataset(LAHeart(data))
    with h5py.File(data / "data/case_0/mri_norm2.h5") as file:
        few_levels, voxels = len(np.unique(file["image"])) <= 256, file["image"].size
    assert few_levels == (cached.stored("case_0", "image")[0].dtype == np.uint8)
    labels = 24 * 20 * 14
    assert cached.nbytes <= 1.1 * 6 * (voxels * (1 if few_levels else 4) + labels)


def test_levels_are_exact_or_not_used():
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (20, 20, 20)).astype(np.float32)
    for image in ((raw - raw.mean()) / raw.std(), raw / 255, np.zeros((3, 3, 3), np.float32)):
        codes, levels = encode(image)
        assert codes.dtype == np.uint8
        np.testing.assert_array_equal(levels[codes], image)
    close = np.float32([1, 1 + 2**-20]).repeat(50)  # the same in their upper 20 bits
    signed = np.float32([0.0, -0.0, 1.0])
    many = np.zeros(9000, np.float32)
    many[4096:] = rng.standard_normal(9000 - 4096)
    for image in (close, signed, many, rng.standard_normal(9000).astype(np.float32)):
        kept, levels = encode(image)
        assert levels is None
        assert kept is image


@pytest.mark.parametrize("shape", [(3, 4, 5), (64, 64, 33), (63, 65, 33)])
def test_codes_of_any_strides_and_number_are_looked_up(shape):
    rng = np.random.default_rng(0)
    codes, levels = rng.integers(0, 256, shape, dtype=np.uint8), rng.standard_normal(256).astype(np.float32)
    for view in (codes, codes[1:, :, 1:], codes[:, ::-1, ::-1], np.rot90(codes), codes.transpose(2, 0, 1)):
        np.testing.assert_array_equal(decode(view, levels), levels[view])


def test_a_turned_and_cropped_volume_is_read_only_where_it_is_looked_at():
    stored = np.arange(60, dtype=np.uint8).reshape(5, 4, 3)
    stored.flags.writeable = False
    lazy = np.flip(np.rot90(LazyArray(stored), 3, axes=(0, 1)), axis=0)[1:3, :2]
    assert isinstance(lazy, LazyArray)
    assert np.shares_memory(lazy._stored, stored)
    assert (lazy.shape, lazy.ndim, len(lazy), lazy.dtype) == ((2, 2, 3), 3, 2, np.uint8)
    expected = np.flip(np.rot90(stored, 3, axes=(0, 1)), axis=0)[1:3, :2]
    np.testing.assert_array_equal(lazy, expected)
    np.testing.assert_array_equal(lazy + 1, expected + 1)


@pytest.mark.parametrize("trouble", ["NaN", "label"])
def test_bad_values_are_found_before_training(data, trouble):
    path = data / "data/case_3/mri_norm2.h5"
    with h5py.File(path, "a") as file:
        name, value = {"NaN": ("image", np.nan), "label": ("label", 7)}[trouble]
        file[name][(0,) * file[name].ndim] = value
    with pytest.raises(DataError, match=f"{path}: .*case_3"):
        CachedDataset(LAHeart(data, num_classes=2))


def test_a_folder_without_room_is_one_sentence(data, tmp_path):
    with pytest.raises(CacheError, match=r"^[^\n]*nowhere: the volumes cannot be kept[^\n]*TMPDIR$"):
        CachedDataset(LAHeart(data), tmp_path / "nowhere")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        with pytest.raises(CacheError, match="File too large"):
            CachedDataset(LAHeart(data), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


def test_no_case_at_all(tmp_path):
    write_case(tmp_path, "a", np.zeros((4, 4, 4)), np.zeros((4, 4, 4)))
    assert len(CachedDataset(LAHeart(tmp_path, cases=[]))) == 0


def test_spawned_workers_get_the_open_file(data):
    plain = LAHeart(data, transform=Compose([RandomRotFlip(), RandomCrop((16, 16, 8)), ToTensor()]))
    cached = CachedDataset(plain)
    expected = list(DataLoader(plain, batch_sampler=batches(2)))
    for path in data.glob("data/*/mri_norm2.h5"):
        path.unlink()
    loader = DataLoader(cached, batch_sampler=batches(2), num_workers=1, multiprocessing_context="spawn")
    assert_same(loader, expected)


def test_without_descriptors_to_hand_on_a_copy_reads_the_files(data, monkeypatch):
    cached = CachedDataset(LAHeart(data))
    assert len(pickle.dumps(cached)) < 5000 + 6 * 2000  # the levels, not the volumes
    monkeypatch.delattr("multiprocessing.reduction.DupFd")
    again = pickle.loads(pickle.dumps(cached))
    np.testing.assert_array_equal(again.read("case_2")["image"], cached.read("case_2")["image"])
