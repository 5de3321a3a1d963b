"""Images and masks from PNG (Pillow) and TIFF (tifffile) files, to the bit, and predictions back into such files.

An image is (C, H, W), also where it has one channel; several pages of a TIFF file are a stack, (C, S, H, W). Values are
the file's own: 16 bits stay 16 bits, and a mask of 2 bits holds 0 to 3. An alpha channel that hides nothing is dropped.
Colour profiles, and how the camera was held (EXIF), are ignored.
"""

import io
import logging
import math
import struct
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np

ENDINGS = (".png", ".tif", ".tiff")
PNG = b"\x89PNG\r\n\x1a\n"
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
DEFLATED = 1032  # bytes of which zlib makes one, at most
UNPACKED = {1: 1, 5: 2600, 8: DEFLATED, 32946: DEFLATED, 32773: 64}  # the same of TIFF's compressions
LARGEST = 2**31  # bytes to which a file that is smaller may unpack


class ImageError(ValueError):
    """A file that is no usable image, or a package that is missing; one sentence with the file and the remedy."""


def read_image(path):
    """The image in a file, (C, H, W), of several pages (C, S, H, W), in the file's own type; 1 bit gives uint8.

    A palette gives its colours, or one channel where all of them are grey. Raises ImageError for a file that is
    missing, damaged or neither PNG nor TIFF, that claims more pixels than it can hold (before memory is taken for
    them), whose pages differ, or that has transparent pixels.
    """
    shape, palette, array = _read(path)
    array = array.astype(np.uint8) if array.dtype == bool else array
    if palette is not None:
        array = palette[array[..., 0]]
        array = (_opaque(path, array) if array.shape[-1] == 4 else array)[..., : shape[0]]
    return np.ascontiguousarray(np.moveaxis(array, -1, 0)).reshape(shape)


def read_mask(path):
    """The mask in a file, (H, W) or (S, H, W) numbers or bool, or uint8 colours, (H, W, 3) or (S, H, W, 3).

    Of a palette the indices, also of transparent colours. Raises ImageError as `read_image`, and for other numbers of
    channels and colours of 16 bits.
    """
    return read_mask_and_palette(path)[0]


def read_mask_and_palette(path):
    """(what `read_mask` gives, the colours (N, 3) in which the file shows its values, None without a palette)."""
    _, palette, array = _read(path)
    channels = array.shape[-1]
    if channels != 1 and (channels != 3 or array.dtype != np.uint8):
        raise ImageError(f"{path}: has {channels} channels of {array.dtype}; save one, or 8-bit colours (RGB)")
    array = array[0] if len(array) == 1 else array
    return array[..., 0] if channels == 1 else array, None if palette is None else palette[:, :3]


def image_size(path):
    """The shape of what `read_image` gives, without unpacking pixels; ImageError."""
    return _read(path, header_only=True)[0]


def _read(path, header_only=False):
    """(shape of the image, palette, array (S, H, W, C) without alpha; None with `header_only`) of a file.

    The palette (N, 3) has the colours of values, or (N, 4) with alpha, where a file holds indices or has 0 for white;
    else it is None.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(len(PNG))
        if start != PNG and start[:4] not in TIFF:
            raise ImageError(f"{path}: neither PNG nor TIFF; save it as one of them, from an original that is no JPEG")
        size, palette, array = (_read_png if start == PNG else _read_tiff)(path, header_only)
    except ImageError:
        raise
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or error}; give a whole file that can be read") from error
    except ImportError as error:
        name = str(error.name).partition(".")[0].replace("PIL", "Pillow")
        raise ImageError(f'{path}: reading it needs {name}: pip install "mtseg[images]"') from error
    except Exception as error:  # There is no end to what the packages raise on damaged files.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{path}: not a whole image ({reason}); make or copy it again") from error
    pages, height, width, channels = size
    if palette is not None:
        channels = 1 if (palette[:, :3] == palette[:, :1]).all() else 3
        if array is not None and array.max() >= len(palette):
            raise ImageError(f"{path}: the index {array.max()} lies outside its palette; save it with a whole palette")
    return (channels, *([pages] if pages > 1 else []), height, width), palette, array


def _check_size(path, shape, bits, stored, ratio):
    """ImageError where there are no pixels, or more than `stored` bytes can hold, before memory is taken for them."""
    claimed = " x ".join(map(str, shape))
    if 0 in shape:
        raise ImageError(f"{path}: has {claimed} pixels; make it again or leave it out")
    if math.prod(shape) * bits // 8 > 2**20 + ratio * stored:
        raise ImageError(f"{path}: claims {claimed} pixels, but the file cannot hold so many; make or copy it again")
    if math.prod(shape) * max(bits, 8) // 8 > max(LARGEST, stored):
        raise ImageError(f"{path}: has {claimed} pixels, more than {LARGEST >> 30} GiB; cut it into tiles")


def _opaque(path, array):
    """(..., C) without its last channel, alpha; ImageError where that is not all opaque."""
    if (array[..., -1] != (np.iinfo(array.dtype).max if array.dtype.kind in "iu" else 1)).any():
        raise ImageError(f"{path}: has transparent pixels; save it without transparency")
    return array[..., :-1]


def _png_chunks(path, header_only):
    """{name: content} of a PNG file's chunks, with `header_only` of those up to the first pixels. All must be whole."""
    chunks, left = {}, path.stat().st_size - len(PNG)
    with path.open("rb") as file:
        file.seek(len(PNG))
        while b"IEND" not in chunks and not (header_only and b"IDAT" in chunks):
            length, name = struct.unpack(">I4s", file.read(8))
            left -= 12 + length
            if left < 0:
                raise EOFError("it is cut short")
            content = file.read(length)
            if file.read(4) != struct.pack(">I", zlib.crc32(name + content)):
                raise ValueError(f"the checksum of its {name!r} is wrong")
            chunks.setdefault(name, []).append(content)
    return {name: b"".join(contents) for name, contents in chunks.items()}


def _png_file(width, height, bits, kind, interlaced, pixels, palette=b""):
    """The bytes of a PNG file; `pixels` are filtered and compressed."""
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, interlaced)
    chunks = [(b"IHDR", header), (b"PLTE", palette), (b"IDAT", pixels), (b"IEND", b"")]
    return PNG + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
        if content or name == b"IEND"
    )


def _read_png(path, header_only):
    from PIL.PngImagePlugin import PngImageFile

    chunks = _png_chunks(path, header_only)
    width, height, bits, kind, _, _, interlaced = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    channels, alpha, palette, clear = PNG_CHANNELS[kind], kind in (4, 6), None, chunks.get(b"tRNS")
    _check_size(path, (height, width, channels), bits, path.stat().st_size, DEFLATED)
    if kind == 3:
        palette, kind = np.frombuffer(chunks[b"PLTE"], dtype=np.uint8).reshape(-1, 3), 0
        opacity = np.frombuffer((clear or b"").ljust(len(palette), b"\xff"), dtype=np.uint8)
        palette, clear = np.column_stack([palette, opacity]), None
    size = (1, height, width, channels - alpha)
    if header_only:
        return size, palette, None
    parts = [chunks[b"IDAT"]]
    if bits == 16 and channels > 1:
        # Pillow cuts colours to 8 bits, but not grey. PNG's filters work on each channel by itself.
        if interlaced:
            raise ImageError(f"{path}: has interlaced colours of 16 bits; save it without interlacing")
        rows = zlib.decompressobj().decompress(parts[0], height * (1 + 2 * channels * width))
        rows = np.frombuffer(rows, dtype=np.uint8).reshape(height, -1)
        planes = np.split(rows[:, 1:].reshape(height, width, channels, 2), channels, axis=2)
        parts = [zlib.compress(np.column_stack([rows[:, 0], plane.reshape(height, -1)]), 1) for plane in planes]
        kind = 0
    # A file that holds nothing but the pixels: what else Pillow would read in it cannot harm.
    files = [io.BytesIO(_png_file(width, height, bits, kind, interlaced, part)) for part in parts]
    array = np.concatenate([np.array(PngImageFile(file)).reshape(1, height, width, -1) for file in files], -1)
    if bits in (2, 4):
        array //= 255 // (2**bits - 1)  # Pillow spreads them over 0 to 255
    array = array.astype(np.uint16) if bits == 16 else array
    if clear is not None:  # the one colour that is transparent
        _opaque(path, (array != np.frombuffer(clear, dtype=">u2")).any(-1, keepdims=True))
    return size, palette, _opaque(path, array) if alpha else array


def _read_tiff(path, header_only):
    import tifffile

    logger, arrays, seen, kinds, first, stored = logging.getLogger("tifffile"), [], set(), set(), None, 0
    logger.addFilter(_silence)
    try:
        with tifffile.TiffFile(path) as file:
            # The pages alone: the pixels of an OME-TIFF's series may lie in other files.
            for page in file.pages:
                if page.offset in seen:
                    raise ValueError("its pages go round in a circle")
                seen.add(page.offset)
                if page.is_reduced:  # a thumbnail
                    continue
                planes, depth, height, width, samples = page.shaped
                first, of_page = first or page, (height, width, planes * samples)
                kinds.add((of_page, page.dtype, page.photometric))
                if len(kinds) > 1 or depth != 1:
                    differ = "its pages differ in size or type; save pages that are alike, or one a file"
                    raise ImageError(f"{path}: {differ}")
                stored += sum(page.databytecounts)
                if not header_only:
                    _check_page(path, page, (len(arrays) + 1, *of_page), min(stored, file.filehandle.size))
                    array = np.moveaxis(page.asarray(squeeze=False, maxworkers=1)[:, 0], 0, -1).reshape(of_page)
                arrays.append(None if header_only else array)
            if not arrays:
                raise ImageError(f"{path}: has no pages; make it again or leave it out")
            palette, bits = None, first.bitspersample
            if first.photometric == 3:  # of 16 bits, of which some programs write 8
                palette = (first.colormap.T >> (8 if first.colormap.max() > 255 else 0)).astype(np.uint8)
            elif first.photometric == 0 and bits <= 16:
                palette = np.arange(2**bits)[::-1, None].astype(f"u{max(bits // 8, 1)}").repeat(3, axis=1)
    finally:
        logger.removeFilter(_silence)
    alpha = bool(first.extrasamples) and first.extrasamples[-1] in (1, 2)
    size = (len(arrays), height, width, planes * samples - alpha)
    if header_only:
        return size, palette, None
    return size, palette, _opaque(path, np.stack(arrays)) if alpha else np.stack(arrays)


def _silence(record):
    """A filter for tifffile's log. After an error it would go on with fewer pages or none; not after one in a tag."""
    if record.levelno >= logging.ERROR and "TiffTag" not in record.getMessage():
        raise ValueError(record.getMessage())
    return False


def _check_page(path, page, shape, stored):
    """ImageError for a TIFF page of a kind that is not read, or whose pixels do not all lie in the file.

    `shape`: of all pages so far. `stored`: the bytes of their pixels in the file.
    """
    dtype, bits, ratio = page.dtype, page.bitspersample, UNPACKED.get(page.compression)
    kinds = {0: "bu", 1: "biuf", 2: "biuf", 3: "bu"}.get(page.photometric, "")
    known = dtype is not None and dtype.kind in kinds and bits in (1, 8, 16, 32, 64) and ratio is not None
    packed = page.compression == 5 or page.predictor == 3
    if not known or (len(kinds) == 2 and bits > 16) or (packed and not find_spec("imagecodecs")):
        what = f"{page.photometric!r}, {bits} bits, {dtype}, {page.compression!r}"
        remedy = "save it grey or RGB with deflate (zip) or uncompressed, or for LZW: pip install imagecodecs"
        raise ImageError(f"{path}: is TIFF of a kind that is not read ({what}); {remedy}")
    for claimed in shape, page.chunks:
        _check_size(path, claimed, bits, stored, ratio)
    chunk, unpacked, file = math.prod(page.chunks) * max(bits, 8) // 8, 0, page.parent.filehandle
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        if count == 0 or offset + count > file.size:
            raise EOFError("it is cut short")
        if ratio == DEFLATED:  # tifffile sets zlib no limit
            file.seek(offset)
            count = len(zlib.decompressobj().decompress(file.read(count), chunk + 1))
            if count > chunk:
                raise ValueError("a strip holds more than its pixels")
        unpacked += count * (1 if ratio == DEFLATED else ratio)
    if len(page.dataoffsets) < math.prod(page.chunked) or unpacked * 8 < math.prod(shape[1:]) * bits:
        raise EOFError("it is cut short")


def png_bytes(array, palette=None):
    """The bytes of a PNG file with numbers (H, W) or colours (H, W, 3), bool, uint8 or uint16; always the same.

    `palette`: (256, 3) uint8, the colours in which numbers, uint8 then, are shown. Raises ImageError for other arrays.
    """
    array = array.astype(np.uint8) if array.dtype == bool else array
    size, kind = array.dtype.itemsize, 2 if array.ndim == 3 else 0 if palette is None else 3
    if array.shape[2:] not in ((), (3,)) or array.dtype not in (np.uint8, np.uint16) or (kind == 3 and size > 1):
        raise ImageError(f"PNG{' with a palette' * (kind == 3)} does not hold {array.dtype} of shape {array.shape}")
    rows = np.ascontiguousarray(array, dtype=f">u{size}").view(np.uint8).reshape(len(array), -1)
    pixels = zlib.compress(np.pad(rows, ((0, 0), (1, 0))))  # a row begins with its filter, none
    colors = np.asarray(palette, dtype=np.uint8).tobytes() if kind == 3 else b""
    return _png_file(*array.shape[1::-1], 8 * size, kind, 0, pixels, colors)


def tiff_bytes(array):
    """The bytes of a TIFF file with numbers (H, W), or a page for each (H, W) of (S, H, W); always the same.

    ImageError where tifffile is missing.
    """
    try:
        import tifffile
    except ImportError as error:
        raise ImageError('writing TIFF needs tifffile: pip install "mtseg[images]"') from error

    file, options = io.BytesIO(), {"photometric": "minisblack", "compression": "zlib", "metadata": None}
    tifffile.imwrite(file, array, software=False, **options)
    return file.getvalue()
