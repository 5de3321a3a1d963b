"""Batches of data workers against those of PyTorch's own default_collate."""

import pytest
import torch
from conftest import make_data
from torch.utils.data import DataLoader

import train_sup
from mtseg.cache import CachedDataset
from mtseg.collate import collate
from mtseg.datasets import LAHeart
from mtseg.transforms import Compose, RandomCrop, RandomRotFlip, ToTensor

BATCHES = [[(index, (7, iteration, index)) for index in range(4)] for iteration in range(3)]


class Samples(torch.utils.data.Dataset):
    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


@pytest.fixture
def no_shared_memory(monkeypatch):
    """Processes from here on find /dev/shm full, as a container's is."""

    def full(*size):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    for name in ("_new_using_fd_cpu", "_new_using_filename_cpu"):
        monkeypatch.setattr(torch.UntypedStorage, name, full)


def patches(data):
    transform = Compose([RandomRotFlip(), RandomCrop((16, 16, 16)), ToTensor("uint8")])
    return CachedDataset(LAHeart(data, transform=transform))


@pytest.mark.parametrize(("context", "workers"), [("fork", 2), ("spawn", 1)])
def test_batches_are_those_of_pytorch(data, context, workers):
    ours = DataLoader(
        patches(data), batch_sampler=BATCHES, num_workers=workers, collate_fn=collate, multiprocessing_context=context
    )
    kept = list(ours)  # all at once: none is overwritten by a later one
    for batch, expected in zip(kept, DataLoader(patches(data), batch_sampler=BATCHES), strict=True):
        assert batch.keys() == expected.keys() == {"image", "label"}
        for key in batch:
            assert batch[key].dtype == expected[key].dtype
            assert torch.equal(batch[key], expected[key])
        batch["image"].zero_()  # may be written to


def test_batches_do_not_need_shared_memory(data, no_shared_memory):
    """A default /dev/shm holds 64 MB, four batches of four patches of the default size 80."""
    with pytest.raises(RuntimeError, match="No space left"):
        list(DataLoader(patches(data), batch_sampler=BATCHES, num_workers=2))
    assert len(list(DataLoader(patches(data), batch_sampler=BATCHES, num_workers=2, collate_fn=collate))) == 3


def test_training_with_data_workers_does_not_need_shared_memory(tmp_path, no_shared_memory):
    data = make_data(tmp_path / "tiny")
    words = ["--root_path", data, "--labelnum", 3, "--max_iterations", 2, "--patch_size", 16, 16, 16, "--progress", 0]
    folder = train_sup.main([*words, "--n_filters", 2, "--num_workers", 2, "--output_dir", tmp_path])
    assert (folder / "iter_2.pth").is_file()


def test_training_goes_on_where_no_data_worker_can_be_started(tmp_path, monkeypatch):
    def read_only(*arguments):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("multiprocessing.synchronize._multiprocessing.SemLock", read_only)
    words = ["--root_path", make_data(tmp_path / "tiny"), "--labelnum", 3, "--max_iterations", 2, "--n_filters", 2]
    words += ["--patch_size", 16, 16, 16, "--progress", 0, "--num_workers", 2, "--output_dir", tmp_path]
    folder = train_sup.main(words)
    assert "no data workers can be started (Read-only file system)" in (folder / "log.txt").read_text()
    assert (folder / "iter_2.pth").is_file()


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_of_any_kind_are_collated_as_pytorch_does(workers):
    samples = [{"image": torch.full((2, 3), number), "name": f"case {number}"} for number in range(2)]
    (batch,) = DataLoader(Samples(samples), batch_size=2, num_workers=workers, collate_fn=collate)
    assert batch["name"] == ["case 0", "case 1"]
    assert torch.equal(batch["image"], torch.tensor([[[0] * 3] * 2, [[1] * 3] * 2]))
    empty = [{"image": torch.zeros(0, 3, dtype=torch.bool)}] * 2
    (batch,) = DataLoader(Samples(empty), batch_size=2, num_workers=workers, collate_fn=collate)
    assert batch["image"].shape == (2, 0, 3)


def test_samples_of_different_shapes_are_refused():
    loader = DataLoader(Samples([{"x": torch.ones(3)}, {"x": torch.ones(4)}]), 2, num_workers=1, collate_fn=collate)
    with pytest.raises(RuntimeError, match="equal size"):
        list(loader)
