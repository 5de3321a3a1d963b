"""Volumes read once and shared by all data workers; a sample touches only the voxels of its patch.

    dataset = CachedDataset(LAHeart(root, transform=Compose([RandomRotFlip(), RandomCrop(patch_size), ToTensor()])))

gives the samples of the LAHeart that it wraps, bit for bit, for any transform.
"""

import math
import mmap
import tempfile
from multiprocessing import reduction

import numpy as np
from torch.utils.data import Dataset

ALIGNMENT = 64  # bytes; for any element type and a whole cache line
PAIRS_PAY = 2**17  # voxels from which the table of pairs saves more time than making it costs
CHUNK = 2**14  # pairs of voxels that are decoded at a time


class CacheError(OSError):
    """A cache that cannot be written; the message is one sentence with the folder and the remedy."""


def encode(image):
    """(codes, levels) with levels[codes] equal to `image` bit for bit, or (image, None) where that is not possible.

    `image`: float32 array. `codes`: uint8 array of the same shape. `levels`: float32 (256,), the values that occur. An
    8-bit scan has at most 256 values, also after normalisation.
    """
    if np.unique(image.reshape(-1)[:4096]).size > 256:  # a quick look: nearly all other images have more already here
        return image, None
    values = np.unique(image)
    if values.size > 256:
        return image, None
    levels = np.zeros(256, dtype=np.float32)
    levels[: values.size] = values
    # Sign, exponent and 11 bits of the mantissa tell 256 evenly spaced values apart; others may collide.
    code_of = np.zeros(1 << 20, dtype=np.uint8)
    code_of[values.view(np.uint32) >> 12] = np.arange(values.size)
    bits = np.ascontiguousarray(image).view(np.uint32)
    codes = code_of[bits >> 12]
    exact = np.array_equal(levels[codes].view(np.uint32), bits)
    return (codes, levels) if exact else (image, None)


def decode(codes, levels):
    """levels[codes], float32, for uint8 `codes` of any shape and strides and float32 `levels` (256,)."""
    codes = np.asarray(codes, order="C")
    image = np.empty(codes.shape, np.float32)
    flat, out = codes.reshape(-1), image.reshape(-1)
    done = 0
    if flat.size > PAIRS_PAY:
        # Two voxels at a time, as one number of 16 bits: half as many look-ups, in a table that fits a core's cache.
        pairs = np.empty((256, 256), np.complex64)
        pairs.real, pairs.imag = levels, levels[:, None]
        done = flat.size // 2 * 2
        code_pairs, value_pairs = flat[:done].view("<u2"), out[:done].view(np.complex64)
        for start in range(0, len(code_pairs), CHUNK):  # NumPy's indices of 8 bytes each stay in the cache, too
            part = slice(start, start + CHUNK)
            pairs.reshape(-1).take(code_pairs[part], out=value_pairs[part], mode="clip")
    levels.take(flat[done:], out=out[done:], mode="clip")
    return image


class LazyArray(np.lib.mixins.NDArrayOperatorsMixin):
    """A stored array that is read late: slices, np.flip and np.rot90 of it are views, anything else works on a copy.

    A chain of transforms that turns a volume and then crops it reads no voxel outside the crop. The copy is decoded to
    float32 where there are `levels` (see `encode`). `torch.from_numpy` does not take a LazyArray; give it the result of
    a NumPy function, such as np.ascontiguousarray.
    """

    def __init__(self, stored, levels=None):
        self._stored = stored
        self._levels = levels
        self.shape = stored.shape
        self.ndim = stored.ndim
        self.dtype = stored.dtype if levels is None else levels.dtype

    def __len__(self):
        return len(self._stored)

    def __getitem__(self, key):
        return LazyArray(self._stored[key], self._levels)

    def __setitem__(self, key, value):
        raise TypeError("a LazyArray is read-only: assign to a copy, np.array(it)")

    def __array__(self, dtype=None, copy=None):
        if self._levels is None:
            return np.array(self._stored, dtype=dtype, order="C")
        return decode(self._stored, self._levels).astype(dtype or self.dtype, copy=False)

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(np.asarray(self), name)

    def __array_function__(self, function, types, args, kwargs):
        if function in (np.flip, np.rot90) and isinstance(args[0], LazyArray):
            return LazyArray(function(args[0]._stored, *args[1:], **kwargs), self._levels)
        return function(*map(_read, args), **{key: _read(value) for key, value in kwargs.items()})

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        return getattr(ufunc, method)(*map(_read, inputs), **{key: _read(value) for key, value in kwargs.items()})


def _read(value):
    if isinstance(value, (list, tuple)):
        return type(value)(map(_read, value))
    return np.asarray(value) if isinstance(value, LazyArray) else value


class CachedDataset(Dataset):
    """The samples of `dataset` (LAHeart or another CaseDataset), read from its files once, here, with all its checks.

    `dataset` has `image_list`, `shapes`, `n_channels`, `transform` (or None), `read(case)`, which gives {'image':
    float32 (C, *spatial) or (*spatial), 'label': uint8 (*spatial)}, and `transformed(case, sample, seed)`. Indices and
    seeds are as in LAHeart. A transform finds LazyArrays in the sample; what it gives is the same, bit for bit.

    The volumes lie uncompressed in a file without a name in `cache_dir` (default: where Python puts temporary files),
    as uint8 where `encode` can, else as float32. It is mapped into memory, read-only: all workers share the same pages
    (on Windows each makes its own file), and nothing is left behind however the process ends. Raises CacheError where
    the file cannot be written.
    """

    def __init__(self, dataset, cache_dir=None):
        self.dataset = dataset
        self.image_list, self.shapes, self.n_channels = dataset.image_list, dataset.shapes, dataset.n_channels
        self._cache_dir = cache_dir
        self._parts = {case: {} for case in self.image_list}  # case -> key -> (offset, dtype, shape, levels)
        cache_dir = cache_dir or tempfile.gettempdir()
        try:
            self._file = tempfile.TemporaryFile(dir=cache_dir, buffering=0)
            for case in self.image_list:
                for key, array in dataset.read(case).items():
                    stored, levels = encode(array) if array.dtype == np.float32 else (array, None)
                    self._parts[case][key] = self._append(stored), stored.dtype.str, stored.shape, levels
        except OSError as error:
            raise CacheError(
                f"{cache_dir}: the volumes cannot be kept there uncompressed ({error.strerror or error}); free space "
                f"there, or name a folder with more of it in the environment variable TMPDIR"
            ) from error
        self._map()

    def _append(self, array):
        """Write `array` to the end of the file; returns its offset."""
        offset = self._file.seek(0, 2)
        offset = self._file.seek(offset + -offset % ALIGNMENT)
        data = memoryview(np.ascontiguousarray(array)).cast("B")
        while data:  # a write that runs into a full disk may be cut short before it fails
            data = data[self._file.write(data) :]
        return offset

    def _map(self):
        self.nbytes = self._file.seek(0, 2)
        self._memory = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) if self.nbytes else b""

    def __getstate__(self):
        # Workers that are spawned get the open file, not its content. Windows cannot do that.
        file = reduction.DupFd(self._file.fileno()) if hasattr(reduction, "DupFd") else None
        return {**self.__dict__, "_memory": None, "_file": file}

    def __setstate__(self, state):
        if state["_file"] is None:
            self.__init__(state["dataset"], state["_cache_dir"])
            return
        self.__dict__.update(state)
        self._file = open(state["_file"].detach(), "rb", buffering=0)
        self._map()

    def __len__(self):
        return len(self.image_list)

    def __getitem__(self, index):
        index, seed = index if isinstance(index, tuple) else (index, None)
        case = self.image_list[index]
        sample = self.read(case) if self.dataset.transform is None else self.views(case)
        return self.transformed(case, sample, seed)

    def case_of(self, index):
        return self.image_list[index]

    def transformed(self, case, sample, seed=None):
        """What the data set's transform makes of `sample`, which is that of `case`."""
        return self.dataset.transformed(case, sample, seed)

    def read(self, case):
        """The whole case as {'image': float32, 'label': uint8}, without transform; new arrays."""
        return {key: np.asarray(view) for key, view in self.views(case).items()}

    def views(self, case):
        """The case as LazyArrays, {'image': ..., 'label': ...}, without transform."""
        return {key: LazyArray(*self.stored(case, key)) for key in self._parts[case]}

    def stored(self, case, key):
        """'image' or 'label' of a case as the cache stores it: (read-only array, levels), both as in `encode`."""
        offset, dtype, shape, levels = self._parts[case][key]
        return np.frombuffer(self._memory, dtype, math.prod(shape), offset).reshape(shape), levels
