"""Batches that data workers hand to the training process without /dev/shm.

    loader = DataLoader(dataset, batch_size=4, num_workers=2, collate_fn=collate)

PyTorch's workers put every batch into /dev/shm, of which a container has 64 MB by default; four patches of
112 x 112 x 80 voxels take 20 MB. `collate` puts batches into anonymous memory instead (memfd_create), which is bounded
by the memory of the machine alone. It is as fast: the memory is shared, not copied.
"""

import math
import mmap
import multiprocessing
import os
from multiprocessing import reduction

import torch
from torch.utils.data import default_collate, get_worker_info

ALIGNMENT = 64  # bytes: where the tensors of a batch begin


def collate(samples):
    """Samples, each a dict of tensors, as one dict of tensors (N, ...): what default_collate makes of them.

    default_collate itself does the work in the training process, where a sample holds anything but tensors, and on
    systems other than Linux, which have no anonymous memory.
    """
    tensors = all(isinstance(value, torch.Tensor) and value.numel() for sample in samples for value in sample.values())
    if get_worker_info() is None or not hasattr(os, "memfd_create") or not tensors:
        return default_collate(samples)
    return SharedBatch(samples)


def why_no_workers():
    """Why this system can start no data workers, or None. Their queues need semaphores, which lie in /dev/shm too."""
    try:
        multiprocessing.Semaphore()
    except (ImportError, OSError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None


class SharedBatch:
    """A batch in anonymous memory, which arrives in another process as a dict of tensors."""

    def __init__(self, samples):
        self.layout, size = {}, 0  # key -> (dtype, shape, offset in bytes)
        for key, value in samples[0].items():
            self.layout[key] = value.dtype, (len(samples), *value.shape), size
            size += len(samples) * value.numel() * value.element_size()
            size += -size % ALIGNMENT
        self.file = open(os.memfd_create("batch"), "r+b", buffering=0)
        self.file.truncate(size)
        for key, batch in mapped(self.file, self.layout).items():
            torch.stack([sample[key] for sample in samples], out=batch)

    def __reduce__(self):
        return received, (reduction.DupFd(self.file.fileno()), self.layout)


def received(descriptor, layout):
    """What the other process gets. The memory is free again when the last of the tensors is gone."""
    with open(descriptor.detach(), "r+b", buffering=0) as file:
        return mapped(file, layout)


def mapped(file, layout):
    """The tensors of `layout` that lie in the open file; they share its memory."""
    memory = mmap.mmap(file.fileno(), 0)
    return {
        key: torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)
        for key, (dtype, shape, offset) in layout.items()
    }
