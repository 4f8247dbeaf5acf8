"""Pictures that nobody should send: broken, mislabelled, enormous, made to hurt."""

import io
import os
import struct
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    width, height = size
    depth = len(Image.new(mode, (1, 1)).getbands())
    shape = (height, width, depth) if depth > 1 else (height, width)
    values = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return Image.fromarray(values, mode if depth > 1 else "L").convert(mode)


def png_chunk(name: bytes, content: bytes) -> bytes:
    body = name + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def png_of(width: int, height: int, content: bytes, depth: int = 8, colour: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", content)
        + png_chunk(b"IEND", b"")
    )


def with_bytes(data: bytes, place: int, new: bytes) -> bytes:
    return data[:place] + new + data[place + len(new) :]


def jpeg_of_size(width: int, height: int) -> bytes:
    """A small JPEG whose header says that it is large."""
    data = encoded(noise(), "JPEG")
    start = data.index(b"\xff\xc0")
    return with_bytes(data, start + 5, struct.pack(">HH", height, width))


def many_scans() -> bytes:
    """A progressive JPEG with one of its scans 500 times over."""
    data = encoded(noise(), "JPEG", progressive=True)
    scan = data.rindex(b"\xff\xda")
    return data[:scan] + data[scan:-2] * 500 + b"\xff\xd9"


def animated(format: str) -> bytes:
    frames = [noise(), Image.new("RGB", (40, 30), "red")]
    return encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=10)


def text_bomb() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "a" * 5_000_000, zip=True)
    return encoded(noise(), "PNG", pnginfo=info)


def tiff_loop() -> bytes:
    """A TIFF whose next directory is its first."""
    data = encoded(noise(), "TIFF")
    (first,) = struct.unpack("<I", data[4:8])
    (count,) = struct.unpack("<H", data[first : first + 2])
    return with_bytes(data, first + 2 + 12 * count, struct.pack("<I", first))


def tiff_of_size(side: int) -> bytes:
    data = encoded(noise(), "TIFF")
    for tag in (256, 257):
        place = data.index(struct.pack("<HH", tag, 4)) if struct.pack("<HH", tag, 4) in data else -1
        if place < 0:
            place = data.index(struct.pack("<HH", tag, 3))
        data = with_bytes(data, place + 2, struct.pack("<HII", 4, 1, side))
    return data


@cache
def usable() -> dict[str, bytes]:
    """Odd, but pictures."""
    exif = Image.Exif()
    exif[0x0112] = 6
    wrong = Image.Exif()
    wrong[0x0112] = 99
    palette = noise().convert("P")
    return {
        "png named jpg.jpg": encoded(noise(), "PNG"),
        "jpeg named png.png": encoded(noise(), "JPEG"),
        "webp named gif.gif": encoded(noise(), "WEBP"),
        "cmyk.jpg": encoded(noise("CMYK"), "JPEG"),
        "grey.jpg": encoded(noise("L"), "JPEG"),
        "16 bit.png": encoded(Image.fromarray(np.full((9, 9), 40_000, np.uint16)), "PNG"),
        "32 bit.tiff": encoded(Image.fromarray(np.full((9, 9), 70_000, np.int32)), "TIFF"),
        "float.tiff": encoded(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF"),
        "1 bit.png": encoded(noise("L").convert("1"), "PNG"),
        "alpha.png": encoded(noise("RGBA"), "PNG"),
        "grey alpha.png": encoded(noise("LA"), "PNG"),
        "palette.png": encoded(palette, "PNG"),
        "transparent palette.png": encoded(palette, "PNG", transparency=0),
        "transparent colour.png": encoded(noise(), "PNG", transparency=(1, 2, 3)),
        "alpha.webp": encoded(noise("RGBA"), "WEBP"),
        "animated.gif": animated("GIF"),
        "animated.webp": animated("WEBP"),
        "animated.png": animated("PNG"),
        "rotated.jpg": encoded(noise(), "JPEG", exif=exif),
        "rotated nowhere.jpg": encoded(noise(), "JPEG", exif=wrong),
        "exif of nonsense.jpg": encoded(noise(), "JPEG", exif=b"Exif\x00\x00" + b"\xff" * 100),
        "progressive.jpg": encoded(noise(), "JPEG", progressive=True),
        "one pixel.png": encoded(noise(size=(1, 1)), "PNG"),
        "one line.png": encoded(noise(size=(9000, 1)), "PNG"),
        "one column.jpg": encoded(noise(size=(1, 9000)), "JPEG"),
        "icc of nonsense.jpg": encoded(noise(), "JPEG", icc_profile=b"\x00" * 300),
        "tail.jpg": encoded(noise(), "JPEG") + b"<?php system('ls'); ?>" * 100,
        "directory loop.tiff": tiff_loop(),
        # JPEG's decoder fills up what is missing before the end mark.
        "longer than it is.jpg": jpeg_of_size(4000, 4000),
        # 63 million pixels each: as much as is let in
        "large and empty.png": png_of(
            7900, 7900, zlib.compress(b"\x00" * (7900 * (2 * 7900 + 1))), depth=16
        ),
        "large and clear.png": png_of(
            7900, 7900, zlib.compress(b"\x00" * (7900 * (4 * 7900 + 1))), colour=6
        ),
    }


@cache
def refused() -> dict[str, tuple[bytes, str]]:
    """With a word of the reason."""
    jpeg, png, gif, webp, tiff, bmp = (
        encoded(noise(), format) for format in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP")
    )
    decoding = "cannot be decoded"
    found = {
        "empty.jpg": (b"", "empty file"),
        "zeros.jpg": (b"\x00" * 1000, decoding),
        "noise.png": (np.random.default_rng(0).bytes(1000), decoding),
        "page.jpg": (b"<!DOCTYPE html><title>404 Not Found</title>", decoding),
        "drawing.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", decoding),
        "laughs.png": (b"<!DOCTYPE l [<!ENTITY a 'ha'><!ENTITY b '&a;&a;'>]><l>&b;</l>", decoding),
        "script.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(rm) run\n", decoding),
        "document.jpg": (b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n", decoding),
        "archive.png": (b"PK\x03\x04" + b"\x00" * 200, decoding),
        "icon.png": (encoded(noise(size=(16, 16)), "ICO"), decoding),
        "targa.jpg": (encoded(noise(), "TGA"), decoding),
        "ppm.png": (encoded(noise(), "PPM"), decoding),
        "only a header.png": (png[:33], decoding),
        "wrong checksum.png": (with_bytes(png, 29, b"\x00\x00\x00\x00"), decoding),
        "wrong zlib.png": (png_of(40, 30, b"nonsense"), decoding),
        "too little.png": (png_of(40, 30, zlib.compress(b"\x00" * 9)), decoding),
        "no pixels.png": (png_of(0, 30, zlib.compress(b"")), decoding),
        "bomb.png": (png_of(60_000, 60_000, zlib.compress(b"\x00" * 10_000_000)), "pixels"),
        "largest.png": (png_of(2**31 - 1, 2**31 - 1, b"x"), "pixels"),
        "bomb.jpg": (jpeg_of_size(65_500, 65_500), "pixels"),
        "bomb.gif": (with_bytes(gif, 6, struct.pack("<HH", 65_535, 65_535)), "pixels"),
        "bomb.bmp": (with_bytes(bmp, 18, struct.pack("<ii", 100_000, 100_000)), "pixels"),
        "bomb.tiff": (tiff_of_size(100_000), "pixels"),
        "many scans.jpg": (many_scans(), "scans, over"),
        "text bomb.png": (text_bomb(), decoding),
    }
    for name, data in (("jpg", jpeg), ("png", png), ("webp", webp), ("tiff", tiff), ("bmp", bmp)):
        for part in (0.1, 0.5, 0.9):
            found[f"cut at {part}.{name}"] = (data[: int(len(data) * part)], decoding)
    found["cut at 0.1.gif"] = (gif[: len(gif) // 10], decoding)
    return found


def special_files(folder: Path) -> dict[str, str]:
    """Names that are no plain files below the folder, made there; a word of the reason for each."""
    (folder / "directory.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "endless.jpg").symlink_to("/dev/zero")
    (folder / "passwd.jpg").symlink_to("/etc/passwd")
    (folder / "dangling.jpg").symlink_to("nowhere.jpg")
    return {
        "directory.jpg": "no such file",
        "pipe.jpg": "no such file",
        "loop.jpg": "no",
        "endless.jpg": "leaves",
        "passwd.jpg": "leaves",
        "dangling.jpg": "no such file",
        "../outside.jpg": "leaves",
        "/etc/hostname": "leaves",
        "gone.jpg": "no such file",
        "": "no image path",
        "null\x00byte.jpg": "no",
        "a" * 300 + ".jpg": "no",
    }
