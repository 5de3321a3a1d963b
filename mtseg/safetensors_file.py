"""Weights in files of the safetensors format, read without its package; no such file can run code.

The format: 8 bytes, the length of the header; the header, a JSON object {name: {"dtype", "shape", "data_offsets"}} with
an optional "__metadata__"; the values one after the other, little-endian (github.com/huggingface/safetensors).
"""

import json
import math
import mmap

import torch

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64"}
DTYPES |= {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
DTYPES |= {"U16": "uint16", "U32": "uint32", "U64": "uint64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
LONGEST_HEADER = 100_000_000  # bytes, as in the package


class SafetensorsError(ValueError):
    """A file that cannot be read; the message is one sentence with the file, what is wrong and the remedy."""


def load_safetensors(path):
    """The tensors in the file `path`, {name: tensor}, on the CPU and mapped: they are read from the disk where they are
    used, and changing them leaves the file alone. Raises SafetensorsError."""
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        reason = getattr(error, "strerror", None) or error
        raise SafetensorsError(f"{path}: cannot be read ({reason}); give a .safetensors file") from error
    length = int.from_bytes(data[:8], "little")
    start = 8 + length
    if length > LONGEST_HEADER or start > len(data):
        reason = f"a header of {length} bytes in a file of {len(data)}"
        raise SafetensorsError(f"{path}: not a whole safetensors file ({reason}); copy it again")
    try:
        header = json.loads(data[8:start].decode())
        header.pop("__metadata__", None)
        entries = {name: (e["dtype"], e["shape"], *e["data_offsets"]) for name, e in header.items()}
        tensors, reached = {}, 0
        for name, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda entry: entry[1][2:]):
            kind = getattr(torch, DTYPES[dtype])
            if any(type(n) is not int or n < 0 for n in (*shape, begin, end)):
                raise ValueError(f"{name}: shape {shape} from {begin} to {end}")
            if begin != reached or end - begin != math.prod(shape) * kind.itemsize or end > len(data) - start:
                raise ValueError(f"{name}: {begin} to {end} is no place for {dtype} of shape {shape}")
            reached = end
            values = torch.empty(0, dtype=torch.uint8)
            if end > begin:
                values = torch.frombuffer(data, dtype=torch.uint8, count=end - begin, offset=start + begin)
                values = values.clone() if values.data_ptr() % kind.itemsize else values
            tensors[name] = values.view(kind).reshape(shape)
        if reached != len(data) - start:
            raise ValueError(f"{len(data) - start - reached} bytes belong to no tensor")
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError, RecursionError) as error:
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise SafetensorsError(f"{path}: not a whole safetensors file ({reason}); copy it again") from error
    return {name: tensors[name] for name in header}
