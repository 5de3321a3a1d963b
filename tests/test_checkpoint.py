import os
import resource
import struct
import tarfile

import pytest
import torch
from torch import nn

from mtseg.checkpoint import (
    CheckpointError,
    file_sha256,
    find_state_dict,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    write_whole,
)


@pytest.fixture
def net():
    return nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2))


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model_state_dict", "net", "module."])
def test_reads_what_others_write(tmp_path, net, wrap):
    state = net.state_dict()
    if wrap == "module.":
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    elif wrap != "plain":
        state = {wrap: state, "epoch": 3}
    torch.save(state, tmp_path / "a.pth")
    other = nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2))
    load_weights(other, load_checkpoint(tmp_path / "a.pth"), tmp_path / "a.pth")
    assert torch.equal(other[0].weight, net[0].weight)


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_checkpoint_that_runs_code_is_refused(tmp_path):
    torch.save({"state_dict": Bomb(tmp_path / "owned")}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="could run code"):
        load_checkpoint(tmp_path / "a.pth")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_truncated_checkpoint_is_named(tmp_path, net, share):
    save_checkpoint(net.state_dict(), tmp_path / "a.pth")
    content = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"a\.pth: not a whole checkpoint"):
        load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "content", [b"<html>404</html>", b"\x80\x02", b"PK\x03\x04 and no more", b"to be or not", b"case_0\ncase_1\n"]
)
def test_what_is_no_checkpoint_is_not_called_dangerous(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pth: not a whole checkpoint") as caught:
        load_checkpoint(tmp_path / "a.pth")
    assert "weights_only" not in str(caught.value)  # PyTorch's advice to turn it off is not passed on


def test_truncated_files_of_the_old_format_too(tmp_path, net):
    torch.save(net.state_dict(), tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "a.pth").read_bytes()
    for size in range(1, len(content), 37):
        (tmp_path / "a.pth").write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"a\.pth: not a whole checkpoint"):
            load_checkpoint(tmp_path / "a.pth")


def test_every_flipped_bit_of_a_checkpoint_is_noticed_or_changes_nothing(tmp_path, net):
    """At 371cded a flipped bit of a weight was read as another weight."""
    path = tmp_path / "a.pth"
    save_checkpoint({"weights": torch.arange(40.0), "iteration": 7}, path)
    content = path.read_bytes()
    flips = [position for position in range(len(content)) if content[position] or position % 16 == 0]
    refused = 0
    for position in flips:
        path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        try:
            read = load_checkpoint(path)
        except CheckpointError as error:
            assert "a.pth: " in str(error)
            assert "weights_only" not in str(error)
            refused += 1
        else:
            assert read["iteration"] == 7
            assert torch.equal(read["weights"], torch.arange(40.0))
    assert refused > len(flips) / 2


def test_a_damaged_weight_is_named(tmp_path):
    path = tmp_path / "a.pth"
    save_checkpoint({"weights": torch.full((100,), 1.5)}, path)
    number = struct.pack("<f", 1.5)
    path.write_bytes(path.read_bytes().replace(8 * number, 7 * number + struct.pack("<f", 2.5), 1))
    assert torch.load(path, weights_only=True)["weights"].max() == 2.5  # PyTorch itself does not look
    with pytest.raises(CheckpointError, match=r"a\.pth: is damaged \(the checksum of .*data/0 is wrong\)"):
        load_checkpoint(path)


def test_checkpoints_without_checksums_are_read(tmp_path):
    if not hasattr(torch.serialization, "set_crc32_options"):
        pytest.skip("this PyTorch always writes checksums")
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weights": torch.arange(40.0)}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(load_checkpoint(tmp_path / "a.pth")["weights"], torch.arange(40.0))


def test_no_message_gives_pytorchs_advice_to_load_unsafely(tmp_path, net, recwarn):
    torch.jit.trace(nn.Linear(2, 2), torch.rand(1, 2)).save(str(tmp_path / "a.pth"))
    with pytest.raises(CheckpointError, match=r"a\.pth: is a TorchScript program, not weights"):
        load_checkpoint(tmp_path / "a.pth")
    with tarfile.open(tmp_path / "b.pth", "w") as file:  # as PyTorch 0.1 wrote them
        for name in ("storages", "tensors", "pickle"):
            file.addfile(tarfile.TarInfo(name))
    with pytest.raises(CheckpointError, match=r"b\.pth: not a whole checkpoint") as caught:
        load_checkpoint(tmp_path / "b.pth")
    assert "weights_only" not in str(caught.value)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "a.pth")


def test_weights_of_another_network_change_nothing(net):
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    other = nn.Sequential(nn.Conv3d(1, 4, 3), nn.Identity(), nn.Conv3d(4, 1, 1))
    with pytest.raises(CheckpointError, match=r"x\.pth: the weights are of another network .*1\.weight is missing"):
        load_weights(net, other.state_dict(), "x.pth")
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    with pytest.raises(CheckpointError, match="holds no state_dict"):
        load_weights(net, {"epoch": 3}, "x.pth")
    assert find_state_dict([1, 2]) is None


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, net):
    path = tmp_path / "latest.pth"
    save_checkpoint({"iteration": 1}, path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"latest\.pth: could not be saved .* still whole"):
            save_checkpoint({"iteration": 2, "weights": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["latest.pth"]


def test_files_are_written_whole_and_hashed(tmp_path):
    write_whole(tmp_path / "new" / "a.json", b"abc")
    assert (tmp_path / "new" / "a.json").read_bytes() == b"abc"
    assert file_sha256(tmp_path / "new" / "a.json").startswith("ba7816bf8f01cfea")
    (tmp_path / "b").write_text("a file")
    with pytest.raises(CheckpointError, match="could not be saved"):
        write_whole(tmp_path / "b" / "a.json", b"abc")


def test_a_networks_own_part_called_module_keeps_its_name(tmp_path):
    """What DataParallel puts before names stands before all of them."""
    net = torch.nn.Module()
    net.module, net.head = torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)
    assert find_state_dict(net.state_dict()).keys() == net.state_dict().keys()
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in net.state_dict().items()}
    assert find_state_dict(wrapped).keys() == net.state_dict().keys()
