"""Images and masks from PNG (Pillow) and TIFF (tifffile) files, and predictions back into them."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np

ENDINGS = (".png", ".tif", ".tiff")


class ImageError(ValueError):
    """A file that is no usable image, or a package that is missing; one sentence with the file and the remedy."""


def need(package, what):
    """Import an optional package, or say which `pip install` brings it. `what` begins the sentence."""
    try:
        return __import__(package, fromlist=["Image"])
    except ImportError as error:
        name = {"PIL": "Pillow"}.get(package, package)
        raise ImageError(f'{what} needs {name}: pip install "mtseg[images]"') from error


def _read(path):
    """(array (S, H, W, C), palette (N, 3) uint8 or None)."""
    path = Path(path)
    if not path.is_file():
        raise ImageError(f"{path}: no such file")
    try:
        if path.suffix.lower() == ".png":
            image = need("PIL.Image", f"{path}: reading PNG").open(path, formats=("PNG",))
            palette = np.array(image.getpalette(), dtype=np.uint8).reshape(-1, 3) if image.mode == "P" else None
            array = np.array(image)
            return array.reshape(1, *array.shape[:2], -1), palette
        with need("tifffile", f"{path}: reading TIFF").TiffFile(path) as tiff:
            pages = [page.asarray(squeeze=False, maxworkers=1) for page in tiff.pages]
        array = np.concatenate([np.moveaxis(p[:, 0], 0, -1).reshape(1, *p.shape[2:4], -1) for p in pages])
        return array, None
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"{path}: not a whole image ({error}); make or copy it again") from error


def read_image(path):
    """(C, H, W), of several pages (C, S, H, W): channels always come first, for a stack of three is no colour image."""
    array, palette = _read(path)
    if palette is not None:
        array = palette[array[..., 0]]
    array = np.moveaxis(array, -1, 0)
    return array[:, 0] if array.shape[1] == 1 else array


def read_mask(path):
    """(H, W) or (S, H, W) integers, or colours with a last axis of 3."""
    array, _ = _read(path)
    array = array[0] if len(array) == 1 else array
    return array[..., 0] if array.shape[-1] == 1 else array[..., :3]


def image_size(path):
    """The shape that `read_image` gives."""
    return read_image(path).shape


def png_bytes(index, palette=None):
    """The bytes of a PNG file with the numbers `index` (H, W), uint8 or uint16; with a palette (256, 3) in colours."""
    index = np.asarray(index)
    bits, kind = 8 * index.itemsize, 0 if palette is None else 3
    header = struct.pack(">IIBBBBB", *index.shape[::-1], bits, kind, 0, 0, 0)
    rows = np.ascontiguousarray(index, dtype=f">u{index.itemsize}").view(np.uint8)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes())), (b"IEND", b"")]
    if palette is not None:
        chunks.insert(1, (b"PLTE", np.asarray(palette, dtype=np.uint8).tobytes()))
    parts = (struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff_bytes(array):
    """The bytes of a TIFF file with a page for each (H, W) of `array`, (H, W) or (S, H, W), deflated."""
    file = io.BytesIO()
    need("tifffile", "writing TIFF").imwrite(
        file, array, photometric="minisblack", compression="zlib", metadata=None, software=None
    )
    return file.getvalue()
