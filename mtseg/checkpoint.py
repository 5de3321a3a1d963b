"""Files that are written whole or not at all, and weights from anywhere that run no code when they are read."""

import contextlib
import hashlib
import io
import os
import re
import zipfile
from pathlib import Path

import torch

LARGEST_WEIGHT = 1e12  # its square, times the voxels that are summed over, is still far from float32's largest number
UNSAFE_ADVICE = re.compile("weights_only|safe_globals")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, written or used; the message is one sentence with the file and the remedy."""


def write_whole(path, data):
    """Write the bytes `data` to `path` so that the file is there whole or, whatever happens, as it was before.

    A temporary file in the same folder is written, flushed to the disk and renamed over `path`. Raises CheckpointError
    where that fails (a full disk, a folder that cannot be written); the previous file is then untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # one name: what a killed process left is overwritten
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        left = "the previous one is still whole" if path.exists() else "nothing was left half-written"
        raise CheckpointError(
            f"{path}: could not be saved ({error.strerror or error}), {left}; free space or write elsewhere"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save_checkpoint(state, path):
    """torch.save `state` (tensors, numbers, strings and containers of them) to `path`, whole or not at all.

    Raises CheckpointError as `write_whole` does.
    """
    # PyTorch's own writer can abort the process when the disk is full; bytes in memory fail as an ordinary OSError.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getbuffer())


def load_checkpoint(path, map_location="cpu"):
    """What `save_checkpoint` or any torch.save wrote to `path`, tensors on `map_location`.

    Always with weights_only=True: a file that would run code when unpickled is refused. The checksums in the file are
    compared with what it holds, which torch.load does not do; files of PyTorch before 1.6 have none. Raises
    CheckpointError.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; give the path of a .pth file in it")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; give the path of a .pth file")
    try:
        check_whole(path)
        return torch.load(path, map_location=map_location, weights_only=True)
    except CheckpointError:
        raise
    except (MemoryError, torch.cuda.OutOfMemoryError) as error:
        raise CheckpointError(f"{path}: there is not enough memory to read it; free some") from error
    except Exception as error:  # files that are cut short, damaged or no checkpoints at all raise nearly anything
        message = str(error).strip()
        refused = re.search(r"(?:GLOBAL |Unsupported class )([\w]+\.[\w.]+)", message)
        if refused:
            raise CheckpointError(
                f"{path}: refused, reading it could run code ({refused[1]}); save its state_dict() alone"
            ) from error
        # PyTorch's message begins with the advice to turn weights_only off, which nobody should follow.
        reason = re.search(r"WeightsUnpickler error:\s*(.+)", message) or re.match(r"(.+)", message)
        reason = reason[1] if reason and not UNSAFE_ADVICE.search(reason[1]) else type(error).__name__
        reason = reason.partition(". ")[0]  # PyTorch's advice follows
        raise CheckpointError(f"{path}: not a whole checkpoint ({reason}); copy it again or take an older") from error


def check_whole(path):
    """CheckpointError where a checksum in the checkpoint `path` is not that of what it holds, or it is something else.

    Only the zip files that torch.save has written since PyTorch 1.6 have checksums; older checkpoints pass.
    """
    with open(path, "rb") as file:
        if not file.read(2).startswith((b"PK", b"\x80")):  # a zip file, a pickle
            raise CheckpointError(f"{path}: not a whole checkpoint (it does not begin as one); give another file")
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as file:
        if any(name.endswith("/constants.pkl") for name in file.namelist()):
            raise CheckpointError(f"{path}: is a TorchScript program, not weights; save its state_dict() alone")
        # torch.serialization.set_crc32_options(False) leaves them all 0.
        damaged = file.testzip() if any(part.CRC for part in file.infolist()) else None
    if damaged:
        raise CheckpointError(f"{path}: is damaged (the checksum of {damaged} is wrong); copy it again or take another")


def find_state_dict(checkpoint):
    """The state_dict in what `load_checkpoint` gave, without the prefixes 'module.' of (Distributed)DataParallel and
    '_orig_mod.' of torch.compile.

    Understood are a plain state_dict, and one under 'state_dict', 'model_state_dict', 'model' or 'net'. Returns None
    where there is none.
    """
    for key in ("state_dict", "model_state_dict", "model", "net"):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
            break
    if not isinstance(checkpoint, dict) or not checkpoint:
        return None
    tensors = [value for value in checkpoint.values() if isinstance(value, torch.Tensor)]
    if len(tensors) < len(checkpoint) or any(t.is_meta or t.layout != torch.strided for t in tensors):
        return None
    checkpoint = {str(name): tensor for name, tensor in checkpoint.items()}
    while prefix := next((p for p in ("module.", "_orig_mod.") if all(n.startswith(p) for n in checkpoint)), None):
        checkpoint = {name.removeprefix(prefix): tensor for name, tensor in checkpoint.items()}
    return checkpoint


def weights_for(net, checkpoint, path):
    """The state_dict in `checkpoint`, read from file `path`, under the names of `net`, {} where there is none.

    A network with a method `translate(state)`, such as VNet, understands other names too. Raises CheckpointError for
    weights that are NaN, infinite or beyond 1e12, of which no network computes anything.
    """
    state = find_state_dict(checkpoint) or {}
    for name, tensor in state.items():
        largest = tensor.detach().float().abs().max().item() if tensor.is_floating_point() and tensor.numel() else 0
        if not largest <= LARGEST_WEIGHT:
            raise CheckpointError(
                f"{path}: is of a training that went wrong ({name} holds {largest:.3g}); take an older checkpoint, or "
                f"train again with a lower --base_lr"
            )
    try:
        return net.translate(state) if hasattr(net, "translate") else state
    except ValueError as error:  # names that it knows, of weights that it would compute otherwise
        raise CheckpointError(f"{path}: {error}") from error


def load_weights(net, checkpoint, path):
    """Load the weights in `checkpoint`, read from file `path`, into `net`, all of them; returns `net`.

    Understands what `find_state_dict` does. Raises CheckpointError naming what does not fit; `net` is then unchanged.
    """
    state = weights_for(net, checkpoint, path)
    if not state:
        raise CheckpointError(f"{path}: holds no state_dict; save net.state_dict(), or put it under 'state_dict'")
    wanted = net.state_dict()
    problems = [f"{name} is missing" for name in wanted if name not in state]
    problems += [f"{name} is unknown" for name in state if name not in wanted]
    problems += [
        f"{name} has shape {tuple(state[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{path}: the weights are of another network ({'; '.join(problems[:3])}{more}); give the settings it was "
            f"trained with (--network, --n_filters, --normalization, --n_channels, --num_classes)"
        )
    net.load_state_dict(state)
    return net


def load_fitting(net, checkpoint, path, names=None, needed=()):
    """Load those weights in `checkpoint`, read from `path`, that `net` has under the same name and in the same shape.

    `names`: only these of `net` are looked at (default: all). `needed`: of these at least nine in ten must fit.
    Returns (how many were loaded, a line for each that was left out, in either direction, with name and shapes).
    CheckpointError where nothing fits, or too little of what is needed.
    """
    state, whole = weights_for(net, checkpoint, path), net.state_dict()
    wanted = whole if names is None else {name: whole[name] for name in names}
    fitting = {name: value for name, value in state.items() if name in wanted and value.shape == wanted[name].shape}
    lines = [f"{name}: not in {path}, left as it was" for name in wanted if name not in state]
    lines += [f"{name}: not in the network, left out" for name in state if name not in whole]
    for name in wanted.keys() & (state.keys() - fitting.keys()):
        shapes = f"{tuple(state[name].shape)} in {path}, {tuple(wanted[name].shape)} in the network"
        lines.append(f"{name}: {shapes}, left as it was")
    # Not every kind of file has the counts.
    needed = [name for name in needed if not name.endswith("num_batches_tracked")]
    missing = [name for name in needed if name not in fitting]
    if 10 * len(missing) > len(needed):
        first = "; ".join(sorted(line for line in lines if line.partition(":")[0] in missing[:3]))
        first = first.replace(f" in {path}", " there").replace(", left as it was", "")
        raise CheckpointError(
            f"{path}: only {len(needed) - len(missing)} of the encoder's {len(needed)} weights fit ({first}); give "
            f"weights of this network, with the settings it was trained with (--network, --n_filters, --normalization)"
        )
    if not fitting:
        raise CheckpointError(f"{path}: no weight in it fits the network by name and shape; give weights of its kind")
    net.load_state_dict(fitting, strict=False)
    return len(fitting), sorted(lines)


def file_sha256(path):
    """The SHA-256 of a file, as a hexadecimal string."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
