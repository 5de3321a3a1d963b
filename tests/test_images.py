"""Images and masks against what Pillow and tifffile wrote, or a PNG file put together by hand."""

import importlib.util
import io
import logging
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from mtseg.images import ImageError, image_size, png_bytes, read_image, read_mask, tiff_bytes

HEIGHT, WIDTH = 13, 22


def pixels(bits=8, channels=None, seed=0):
    """(H, W) or (H, W, C) of all values that so many bits have."""
    dtype = np.uint8 if bits <= 8 else np.uint16
    shape = (HEIGHT, WIDTH) if channels is None else (HEIGHT, WIDTH, channels)
    return np.random.default_rng(seed).integers(0, 2**bits, shape).astype(dtype)


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def paeth(a, b, c):
    return min((abs(b - c), 0, a), (abs(a - c), 1, b), (abs(a + b - 2 * c), 2, c))[2]


def png(array, bits, kind, filters=(0,), extra=b"", interlaced=0):
    """The bytes of a PNG file of (H, W, C), as its specification says; rows are filtered by `filters` in turn."""
    height, width = array.shape[:2]
    values = array.reshape(height, -1).astype(int)
    packed = [
        int("".join(f"{value:0{bits}b}" for value in row).ljust(-len(row) * bits // 8 * -8, "0"), 2) for row in values
    ]
    length = -(values.shape[1] * bits // -8)
    rows = [list(row.to_bytes(length, "big")) for row in packed]
    step = max(1, values.shape[1] // width * bits // 8)
    data = b""
    for y, row in enumerate(rows):
        above = rows[y - 1] if y else [0] * length
        kind_of_row = filters[y % len(filters)]
        data += bytes([kind_of_row])
        for x, value in enumerate(row):
            a, c = (row[x - step], above[x - step]) if x >= step else (0, 0)
            guess = (0, a, above[x], (a + above[x]) // 2, paeth(a, above[x], c))[kind_of_row]
            data += bytes([(value - guess) % 256])
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, interlaced))
    half = len(data) // 2
    stream = zlib.compress(data)
    parts = chunk(b"IDAT", stream[:half]) + chunk(b"IDAT", stream[half:])
    return b"\x89PNG\r\n\x1a\n" + header + extra + parts + chunk(b"IEND", b"")


def write(path, content):
    path.write_bytes(content)
    return path


def as_read(array):
    """(H, W) or (H, W, C) as `read_image` gives it."""
    return np.moveaxis(array.reshape(HEIGHT, WIDTH, -1), -1, 0)


def check(path, image, mask):
    """The file holds exactly these arrays, whose type counts, and its shape is known beforehand."""
    for got, expected in (read_image(path), image), (read_mask(path), mask) if mask is not None else (image, image):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)
    assert image_size(path) == image.shape


# ---- PNG


@pytest.mark.parametrize("mode, channels", [("L", None), ("RGB", 3)])
def test_png_that_pillow_wrote(tmp_path, mode, channels):
    array = pixels(channels=channels)
    Image.fromarray(array).save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == mode
    check(tmp_path / "a.png", as_read(array), array)


def test_png_of_16_bits_stays_so(tmp_path):
    array = pixels(16)
    Image.fromarray(array).save(tmp_path / "a.png")
    check(tmp_path / "a.png", array[None], array)


def test_png_of_1_bit(tmp_path):
    array = pixels(1).astype(bool)
    Image.fromarray(array).save(tmp_path / "a.png")
    check(tmp_path / "a.png", array.astype(np.uint8)[None], array)


@pytest.mark.parametrize("bits, kinds", [(1, (0,)), (2, (0,)), (4, (0,)), (8, (0, 2, 4, 6)), (16, (0, 2, 4, 6))])
@pytest.mark.parametrize("filters", [(0,), (0, 1, 2, 3, 4)])
def test_every_png_of_the_specification(tmp_path, bits, kinds, filters):
    for kind in kinds:
        read_and_compare(tmp_path, kind, {0: 1, 2: 3, 4: 2, 6: 4}[kind], bits, filters)


def read_and_compare(tmp_path, kind, channels, bits, filters):
    array = pixels(bits, channels)
    if kind > 3:
        array[..., -1] = 2**bits - 1
    path = write(tmp_path / "a.png", png(array, bits, kind, filters))
    image = as_read(array[..., :-1] if kind > 3 else array)
    check(path, image, (image[0].astype(bool) if bits == 1 else image[0]) if len(image) == 1 else None)
    if bits == 8:
        oracle = np.array(Image.open(path))
        np.testing.assert_array_equal(oracle.reshape(array.shape), array)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("grey", [False, True])
def test_palettes(tmp_path, bits, grey):
    index = pixels(bits)
    palette = np.random.default_rng(1).integers(0, 256, (2**bits, 3)).astype(np.uint8)
    palette[:, 1:] = palette[:, :1] if grey else palette[:, 1:]
    path = write(tmp_path / "a.png", png(index[..., None], bits, 3, extra=chunk(b"PLTE", palette.tobytes())))
    np.testing.assert_array_equal(np.array(Image.open(path).convert("RGB")), palette[index])
    image = as_read(palette[index])[: 1 if grey else 3]
    check(path, image, index.astype(bool) if bits == 1 else index)


def test_pillows_own_palette_and_interlacing(tmp_path):
    index = pixels(2)
    image = Image.fromarray(index)
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(tmp_path / "a.png", bits=2)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), index)
    # One pixel is the first of the seven passes; the others are empty.
    path = write(tmp_path / "b.png", png(np.full((1, 1, 1), 7), 8, 0, interlaced=1))
    assert read_image(path) == 7
    path = write(tmp_path / "c.png", png(np.full((1, 1, 3), 7), 16, 2, interlaced=1))
    with pytest.raises(ImageError, match=r"c\.png: has interlaced colours of 16 bits; save it without interlacing"):
        read_image(path)


def test_what_else_a_png_says_is_ignored(tmp_path):
    array = pixels()
    image = Image.fromarray(array)
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "a.png", exif=exif, gamma=0.5, dpi=(300, 300))
    check(tmp_path / "a.png", array[None], array)
    bomb = zlib.compress(bytes(10**8))
    path = write(tmp_path / "b.png", png(array[..., None], 8, 0, extra=chunk(b"zTXt", b"a\0\0" + bomb)))
    check(path, array[None], array)


@pytest.mark.parametrize("mode, full", [("LA", 255), ("RGBA", 255)])
def test_alpha(tmp_path, mode, full):
    array = pixels(channels=len(mode))
    array[..., -1] = full
    for ending in "png", "tif":
        path = tmp_path / f"a.{ending}"
        Image.fromarray(array, mode).save(path)
        image = as_read(array[..., :-1])
        check(path, image, array[..., 0] if mode == "LA" else array[..., :-1])
    array[3, 4, -1] = 254
    for ending in "png", "tif":
        path = tmp_path / f"a.{ending}"
        Image.fromarray(array, mode).save(path)
        for read in read_image, read_mask:
            with pytest.raises(ImageError, match=r"a\.\w+: has transparent pixels; save it without transparency"):
                read(path)


def test_transparent_colours(tmp_path):
    grey, colours = pixels()[..., None], pixels(channels=3)
    grey[0, 0], colours[0, 0] = 5, (1, 2, 3)
    cases = [(grey, 0, (5,)), (colours, 2, (1, 2, 3))]
    for array, kind, value in cases:
        extra = chunk(b"tRNS", struct.pack(f">{len(value)}H", *value))
        with pytest.raises(ImageError, match="transparent pixels"):
            read_image(write(tmp_path / "a.png", png(array, 8, kind, extra=extra)))
        array[(array == value).all(-1)] = 0
        path = write(tmp_path / "a.png", png(array, 8, kind, extra=extra))
        check(path, as_read(array), array.squeeze())
    index, palette = pixels(2), bytes(range(12))
    extra = chunk(b"PLTE", palette) + chunk(b"tRNS", b"\xff\0")
    path = write(tmp_path / "p.png", png(index[..., None], 2, 3, extra=extra))
    np.testing.assert_array_equal(read_mask(path), index)
    with pytest.raises(ImageError, match="transparent pixels"):
        read_image(path)
    index[index == 1] = 0
    path = write(tmp_path / "p.png", png(index[..., None], 2, 3, extra=extra))
    assert read_image(path).shape == image_size(path) == (3, HEIGHT, WIDTH)


# ---- TIFF


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint32", "int32", "float32", "float64"])
@pytest.mark.parametrize(
    "options", [{}, {"compression": "zlib"}, {"bigtiff": True, "byteorder": ">"}, {"rowsperstrip": 4}]
)
@pytest.mark.parametrize("channels", [None, 3])
def test_tiff_that_tifffile_wrote(tmp_path, dtype, options, channels):
    array = (1000 * np.random.default_rng(0).random((HEIGHT, WIDTH, channels or 1))).astype(dtype)
    array = array if channels else array[..., 0]
    options = {**options, "photometric": "rgb" if channels else "minisblack"}
    tifffile.imwrite(tmp_path / "a.tif", array, **options)
    check(tmp_path / "a.tif", as_read(array), array if channels is None or dtype == "uint8" else None)


@pytest.mark.parametrize("compression", [None, "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("mode", ["1", "L", "RGB", "I;16", "F", "P"])
def test_tiff_that_pillow_wrote(tmp_path, compression, mode):
    array = {"1": pixels(1).astype(bool), "RGB": pixels(channels=3), "I;16": pixels(16)}.get(mode, pixels())
    array = array.astype(np.float32) if mode == "F" else array
    image = Image.fromarray(array)
    palette = np.random.default_rng(1).integers(0, 256, (256, 3)).astype(np.uint8)
    if mode == "P":
        image.putpalette(palette.tobytes())
    assert image.mode == mode
    image.save(tmp_path / "a.tiff", compression=compression)
    expected = as_read(palette[array] if mode == "P" else array)
    check(tmp_path / "a.tiff", expected.astype(np.uint8) if mode == "1" else expected, array)


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("options", [{}, {"tile": (16, 16)}, {"tile": (16, 16), "compression": "zlib", "predictor": 2}])
def test_tiff_with_planes_tiles_and_predictor(tmp_path, planar, options):
    array = pixels(16, 3)
    data = array if planar == "contig" else as_read(array)
    tifffile.imwrite(tmp_path / "a.tif", data, photometric="rgb", planarconfig=planar, **options)
    check(tmp_path / "a.tif", as_read(array), None)


def test_pages_are_a_stack(tmp_path):
    stack = np.stack([pixels(16, seed=seed) for seed in range(5)])
    for options in {}, {"imagej": True}, {"ome": True}, {"compression": "zlib", "metadata": None}:
        tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack", **options)
        check(tmp_path / "a.tif", stack[None], stack)
    colours = np.stack([pixels(channels=3, seed=seed) for seed in range(5)])
    tifffile.imwrite(tmp_path / "b.tif", colours, photometric="rgb")
    check(tmp_path / "b.tif", np.moveaxis(colours, -1, 0), colours)


def test_five_channels_are_an_image_and_no_mask(tmp_path):
    array = np.moveaxis(pixels(16, 5), -1, 0)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack", planarconfig="separate")
    check(tmp_path / "a.tif", array, None)
    with pytest.raises(ImageError, match=r"a\.tif: has 5 channels of uint16; save one, or 8-bit colours"):
        read_mask(tmp_path / "a.tif")


def test_white_is_zero(tmp_path):
    for array in pixels(), pixels(16):
        tifffile.imwrite(tmp_path / "a.tif", array, photometric="miniswhite")
        check(tmp_path / "a.tif", (np.iinfo(array.dtype).max - array)[None], array)


def test_thumbnails_are_passed_over(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(pixels(), photometric="minisblack")
        file.write(pixels()[::2, ::2], photometric="minisblack", subfiletype=1)
    check(tmp_path / "a.tif", pixels()[None], pixels())


def test_tiff_makes_us_read_no_other_file(tmp_path):
    """An OME-TIFF that says its second plane lies in another file."""
    tifffile.imwrite(tmp_path / "secret.ome.tif", np.full((HEIGHT, WIDTH), 99, np.uint8))
    xml = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels ID="Pixels:0" '
        'DimensionOrder="XYZCT" Type="uint8" SizeX="22" SizeY="13" SizeZ="2" SizeC="1" SizeT="1">'
        '<TiffData FirstZ="0" IFD="0"/><TiffData FirstZ="1" IFD="0"><UUID FileName="secret.ome.tif">urn:uuid:1</UUID>'
        "</TiffData></Pixels></Image></OME>"
    )
    tifffile.imwrite(tmp_path / "a.ome.tif", pixels(), description=xml, metadata=None)
    check(tmp_path / "a.ome.tif", pixels()[None], pixels())


def test_nothing_is_printed(tmp_path, caplog, capfd):
    """tifffile complains of a tag whose value lies outside the file, and reads on."""
    tifffile.imwrite(tmp_path / "a.tif", pixels(), description="a" * 50, metadata=None)
    content = (tmp_path / "a.tif").read_bytes()
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        at = file.pages[0].tags["ImageDescription"].offset + 8
    write(tmp_path / "a.tif", content[:at] + struct.pack("<I", 10**6) + content[at + 4 :])
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        file.pages[0].asarray()
    assert "invalid value offset" in caplog.text
    caplog.clear()
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif")[0], pixels())
    assert not caplog.records and capfd.readouterr().err == ""
    assert logging.getLogger("tifffile").filters == []


# ---- bad input


def test_files_that_are_no_images(tmp_path):
    with pytest.raises(ImageError, match=r"none\.png: No such file or directory; give a whole file"):
        read_image(tmp_path / "none.png")
    for name, content in ("empty.png", b""), ("text.tif", b"hello world"), ("a.npy", b"\x93NUMPY"):
        with pytest.raises(
            ImageError, match=rf"{name}: neither PNG nor TIFF; save it as one of them, from an original"
        ):
            read_image(write(tmp_path / name, content))
    for kind in "JPEG", "BMP", "GIF":
        Image.fromarray(pixels()).save(tmp_path / "a.png", format=kind)
        with pytest.raises(ImageError, match=r"a\.png: neither PNG nor TIFF; .* no JPEG"):
            read_mask(tmp_path / "a.png")


def test_a_palette_with_holes(tmp_path):
    path = write(tmp_path / "a.png", png(pixels(2)[..., None], 2, 3, extra=chunk(b"PLTE", bytes(9))))
    for read in read_mask, read_image:
        with pytest.raises(
            ImageError, match=r"a\.png: the index 3 lies outside its palette; save it with a whole palette"
        ):
            read(path)


def test_masks_in_colours_of_16_bits(tmp_path):
    with pytest.raises(ImageError, match=r"a\.png: has 3 channels of uint16; save one, or 8-bit colours \(RGB\)"):
        read_mask(write(tmp_path / "a.png", png(pixels(16, 3), 16, 2)))


def test_pages_that_differ(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(pixels(), photometric="minisblack")
        file.write(pixels()[:5], photometric="minisblack")
    with pytest.raises(
        ImageError, match=r"a\.tif: its pages differ in size or type; save pages that are alike, or one a"
    ):
        read_image(tmp_path / "a.tif")


def test_a_tiff_without_pages(tmp_path):
    for content in b"II*\0\0\0\0\0", b"II*\0\x08\0\0\0":
        with pytest.raises(ImageError, match=r"a\.tif: (has no pages|not a whole image)"):
            read_image(write(tmp_path / "a.tif", content))


def test_pages_in_a_circle(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.stack([pixels()] * 3), photometric="minisblack", metadata=None)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        first, last = file.pages[0].offset, file.pages[2].offset
    content = bytearray((tmp_path / "a.tif").read_bytes())
    tags = struct.unpack_from("<H", content, last)[0]
    struct.pack_into("<I", content, last + 2 + 12 * tags, first)
    with pytest.raises(ImageError, match=r"a\.tif: not a whole image \(its pages go round in a circle\)"):
        read_image(write(tmp_path / "a.tif", bytes(content)))


@pytest.mark.parametrize("photometric, compression", [("cielab", None), ("separated", None), ("minisblack", "lzma")])
def test_kinds_of_tiff_that_are_not_read(tmp_path, photometric, compression):
    array = pixels(channels={"cielab": 3, "separated": 4}.get(photometric))
    tifffile.imwrite(tmp_path / "a.tif", array, photometric=photometric, compression=compression)
    with pytest.raises(
        ImageError, match=r"a\.tif: is TIFF of a kind that is not read \(.*uint8, .*\); save it grey or RGB"
    ):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("dtype", ["float32", "int16", "uint32"])
def test_0_for_white_is_read_of_what_a_palette_can_hold(tmp_path, dtype):
    tifffile.imwrite(tmp_path / "a.tif", pixels().astype(dtype), photometric="miniswhite")
    with pytest.raises(ImageError, match=r"a\.tif: is TIFF of a kind that is not read \(.*WHITE"):
        read_image(tmp_path / "a.tif")


def test_lzw_is_read_where_its_package_is(tmp_path):
    Image.fromarray(pixels()).save(tmp_path / "a.tif", compression="tiff_lzw")
    if importlib.util.find_spec("imagecodecs"):
        check(tmp_path / "a.tif", pixels()[None], pixels())
    else:
        with pytest.raises(
            ImageError, match=r"a\.tif: .*LZW.*; save it .* uncompressed, or for LZW: pip install imagec"
        ):
            read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("module, name, package", [("PIL", "a.png", "Pillow"), ("tifffile", "a.tif", "tifffile")])
def test_packages_that_are_missing(tmp_path, monkeypatch, module, name, package):
    Image.fromarray(pixels()).save(tmp_path / name)
    for known in [known for known in sys.modules if known.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, known)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImageError, match=rf'{name}: reading \w+ needs {package}: pip install "mtseg\[images\]"'):
        read_image(tmp_path / name)
    if module == "tifffile":
        with pytest.raises(ImageError, match=r'writing TIFF needs tifffile: pip install "mtseg\[images\]"'):
            tiff_bytes(pixels())


def test_bombs_explode_before_memory_is_taken(tmp_path):
    """Checked in a process that may take 256 MiB more than it has."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0))
    rows = zlib.compress(bytes(10**6), 9)
    start = b"\x89PNG\r\n\x1a\n"
    write(tmp_path / "few.png", start + header + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    write(tmp_path / "many.png", start + header + chunk(b"IDAT", bytes(4 * 10**6)) + chunk(b"IEND", b""))
    wide = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 10, 16, 2, 0, 0, 0))
    write(tmp_path / "rows.png", start + wide + chunk(b"IDAT", zlib.compress(bytes(2**29))) + chunk(b"IEND", b""))
    # 100 x 100 pixels whose only strip unpacks to 512 MiB, and one that claims 60000 x 60000.
    for name, side, strip in ("strip.tif", 100, zlib.compress(bytes(2**29))), ("claim.tif", 60000, rows):
        tags = [
            (256, side),
            (257, side),
            (258, 8),
            (259, 8),
            (262, 1),
            (273, 8),
            (277, 1),
            (278, side),
            (279, len(strip)),
        ]
        content = b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + struct.pack("<H", len(tags))
        content += b"".join(struct.pack("<HHII", code, 4, 1, value) for code, value in tags) + bytes(4)
        write(tmp_path / name, content)
    code = """
import resource, sys, tifffile, PIL.PngImagePlugin
from mtseg.images import ImageError, read_image
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
for path in sys.argv[1:]:
    try:
        print(read_image(path).shape)
    except ImageError as error:
        print(error)
"""
    names = ["few.png", "many.png", "rows.png", "strip.tif", "claim.tif"]
    command = [sys.executable, "-W", "error", "-c", code, *(str(tmp_path / name) for name in names)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    few, many, rows, strip, claim = done.stdout.splitlines()
    assert few.endswith(
        "few.png: claims 60000 x 60000 x 1 pixels, but the file cannot hold so many; make or copy it again"
    )
    assert many.endswith("has 60000 x 60000 x 1 pixels, more than 2 GiB; cut it into tiles")
    assert rows == "(3, 10, 2)"
    assert strip.endswith("strip.tif: not a whole image (a strip holds more than its pixels); make or copy it again")
    assert "claim.tif: claims 1 x 60000 x 60000 x 1 pixels" in claim


def test_a_large_image_is_no_bomb(tmp_path):
    """Pillow itself warns of more than 89 million pixels, and refuses twice as many."""
    path = write(tmp_path / "a.png", png_bytes(np.zeros((14000, 14000), np.uint8)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(path).shape == image_size(path) == (1, 14000, 14000)


def originals(tmp_path):
    for bits, kind, channels in (8, 0, 1), (8, 2, 3), (16, 2, 3), (2, 3, 1), (16, 0, 1):
        extra = chunk(b"PLTE", bytes(range(12))) if kind == 3 else b""
        yield png(pixels(bits, channels), bits, kind, (0, 1, 2, 3, 4), extra)
    for options in (
        {},
        {"compression": "zlib", "rowsperstrip": 5},
        {"tile": (16, 16), "compression": "zlib"},
        {"bigtiff": True},
    ):
        file = io.BytesIO()
        tifffile.imwrite(file, np.stack([pixels(16)] * 3), photometric="minisblack", **options)
        yield file.getvalue()
    file = io.BytesIO()
    Image.fromarray(pixels()).save(file, format="TIFF", compression="packbits")
    yield file.getvalue()


@pytest.mark.parametrize("number", range(10))
def test_damaged_files_end_in_one_sentence(tmp_path, number, capfd):
    content = list(originals(tmp_path))[number]
    rng = np.random.default_rng(number)
    path = tmp_path / ("a.png" if number < 5 else "a.tif")
    failed = 0
    for _ in range(300):
        damaged = bytearray(content)
        if rng.random() < 0.2:
            damaged = damaged[: rng.integers(len(damaged))]
        else:
            # Where files say of themselves what they are: at their beginning or end.
            places = rng.integers(0, min(200, len(damaged)), rng.integers(1, 4))
            for place in places if rng.random() < 0.5 else len(damaged) - 1 - places:
                damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        for read in read_image, read_mask, image_size:
            try:
                read(path)
            except ImageError as error:
                failed += 1
                assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    assert failed > 300
    assert capfd.readouterr() == ("", "")


def test_every_cut_is_noticed(tmp_path):
    for number, content in enumerate(originals(tmp_path)):
        whole = read_image(write(tmp_path / "a", content))
        for length in range(0, len(content), 19):
            with pytest.raises(ImageError):
                found = read_image(write(tmp_path / "a", content[:length]))
                if number >= 5:  # what tifffile writes behind the pixels may be missing
                    np.testing.assert_array_equal(found, whole)
                    raise ImageError


# ---- writing


def test_png_bytes(tmp_path):
    palette = np.random.default_rng(1).integers(0, 256, (256, 3)).astype(np.uint8)
    index = pixels()
    path = write(tmp_path / "a.png", png_bytes(index, palette))
    image = Image.open(path)
    assert image.mode == "P"
    np.testing.assert_array_equal(np.array(image), index)
    np.testing.assert_array_equal(np.array(image.convert("RGB")), palette[index])
    check(path, as_read(palette[index]), index)
    assert png_bytes(index, palette) == path.read_bytes()
    for array in (
        pixels(),
        pixels(16),
        pixels(1).astype(bool),
        pixels(16).T,
        pixels(channels=3),
        palette[index].swapaxes(0, 1),
    ):
        path.write_bytes(png_bytes(array))
        np.testing.assert_array_equal(np.array(Image.open(path)), array)
    for array, colors in (pixels(16), palette), (pixels().astype(int), None), (pixels(channels=2), None):
        with pytest.raises(ImageError, match=r"^PNG.* does not hold \w+ of shape \("):
            png_bytes(array, colors)


def test_tiff_bytes(tmp_path):
    for array in (
        pixels(),
        pixels(16),
        np.stack([pixels(seed=seed) for seed in range(3)]),
        np.zeros((4, 9, 3), np.uint16),
    ):
        path = write(tmp_path / "a.tif", tiff_bytes(array))
        np.testing.assert_array_equal(tifffile.imread(path), array)
        check(path, array[None], array)
        assert tiff_bytes(array) == path.read_bytes()
