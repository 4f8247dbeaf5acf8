"""Decoding, cropping and augmenting images with Pillow."""

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from clip_lite_jax.config import AugmentConfig
from clip_lite_jax.errors import BadImage

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 64_000_000
"""Larger images are refused unread: a small file can hold a huge picture."""
LARGE_PIXELS = 16_000_000
"""Images from this size on are decoded one at a time: two of the largest would take a gigabyte."""
MAX_SCANS = 100
"""Of a progressive JPEG, which usually has ten.  Each goes over the whole picture, and an empty one
takes a few bytes of the file."""


class Opened:
    """An encoded picture: its size is known, its pixels are decoded when they are asked for."""

    def __init__(self, data: bytes) -> None:
        """Raises `BadImage`: empty, broken, of another format, or larger than `MAX_PIXELS`."""
        if not data:
            raise BadImage("empty file")
        self.data = data
        self._decoded: Image.Image | None = None
        with _damage_is_a_bad_image():
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            self.size, self.format = image.size, image.format or ""
            pixels = image.width * image.height
            if pixels > MAX_PIXELS:
                raise BadImage(f"{image.width}x{image.height} pixels, over {MAX_PIXELS:,}")
            # Only a JPEG says how it is turned before its pixels, and is decoded smaller.
            if image.format == "JPEG":
                if (scans := data.count(_START_OF_SCAN)) > MAX_SCANS:
                    raise BadImage(f"a JPEG of {scans} scans, over {MAX_SCANS}")
                if image.getexif().get(_ORIENTATION, 1) in _TURNED:
                    self.size = image.size[::-1]
            else:
                self._decoded = _upright(image)
                self.size = self._decoded.size

    @classmethod
    def of(cls, image: Image.Image) -> "Opened":
        """A picture that is decoded already."""
        opened = cls.__new__(cls)
        opened._decoded, opened.size, opened.format = to_rgb(image), image.size, ""
        return opened

    def decoded(self, shrink: float = 1.0) -> Image.Image:
        """RGB, upright (EXIF), transparency over white, the first frame only.

        A JPEG may come smaller, by a factor of up to `shrink`: decoding is faster then.  Raises
        `BadImage` where the pixels are broken or cut short.
        """
        if self._decoded is not None:
            return self._decoded
        with _damage_is_a_bad_image():
            image = Image.open(io.BytesIO(self.data), formats=("JPEG",))
            if shrink >= 2:
                image.draft(image.mode, (int(image.width / shrink), int(image.height / shrink)))
            return _upright(image)

    def shrunk(self, shorter: int) -> bytes:
        """The picture as a file whose shorter side is at most this; one that is small is the same.

        Photographs become JPEG files of quality 95, others PNG.  Raises `BadImage` as `decoded`.
        """
        short = min(self.size)
        image = self.decoded(shrink=short / shorter)
        if short <= shorter:
            return self.data
        width, height = (max(1, round(side * shorter / short)) for side in self.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        if self.format in ("JPEG", "WEBP"):
            image.save(buffer, "JPEG", quality=95)
        else:
            image.save(buffer, "PNG")
        return buffer.getvalue()


_START_OF_SCAN = b"\xff\xda"
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)
"""Of the tags of EXIF, and its values for pictures that lie on a side."""


def decode(data: bytes) -> Image.Image:
    """Encoded bytes → RGB picture; see `Opened`.

    Raises:
      BadImage: empty, broken, truncated, of another format, or larger than `MAX_PIXELS`.
    """
    return Opened(data).decoded()


def _upright(image: Image.Image) -> Image.Image:
    large = image.width * image.height >= LARGE_PIXELS
    with _ONE_LARGE_IMAGE if large else nullcontext():
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)


_ONE_LARGE_IMAGE = threading.Lock()


@contextmanager
def _damage_is_a_bad_image() -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about metadata we do not use
            yield
    except BadImage:
        raise
    # Pillow's decoders raise a zoo of exceptions on damaged data, SyntaxError and struct.error
    # among them; every one of them means that this image cannot be used.
    except Exception as error:
        raise BadImage(f"cannot be decoded: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode → RGB: 16-bit and float scaled to 8, transparency over white."""
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        return _eight_bits(image).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if "A" in image.getbands():
        white = Image.new("RGB", image.size, "white")
        white.paste(image.convert("RGB"), mask=image.getchannel("A"))
        return white
    if "transparency" in image.info:  # one colour that stands for nothing
        return to_rgb(image.convert("RGBA"))
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greys of any range to 0 to 255, a strip at a time: a large one in floats would be huge."""
    _, highest = image.getextrema()
    top = 65535 if isinstance(highest, (int, float)) and highest > 255 else 255
    out = np.empty((image.height, image.width), np.uint8)
    rows = max(1, _STRIP // image.width)
    for start in range(0, image.height, rows):
        strip = image.crop((0, start, image.width, min(start + rows, image.height)))
        values = np.nan_to_num(np.asarray(strip, np.float64)) / top
        out[start : start + rows] = np.clip(values, 0, 1) * 255
    return Image.fromarray(out)


_STRIP = 1_000_000


def resize_and_crop(image: Image.Image, size: int, shorter: int | None = None) -> np.ndarray:
    """Shorter side to `shorter` (or `size`), then the centre: uint8 ``[size, size, 3]``."""
    if shorter is not None and shorter != size:
        scale = shorter / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, upper = (width - size) // 2, (height - size) // 2
        return np.asarray(image.crop((left, upper, left + size, upper + size)), np.uint8)
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC), np.uint8)


def augment(
    opened: Opened, size: int, config: AugmentConfig, rng: np.random.Generator
) -> tuple[np.ndarray, bool]:
    """Random resized crop, flip, colour jitter: uint8 ``[size, size, 3]`` and whether flipped."""
    left, upper, right, lower = _random_box(*opened.size, config, rng)
    image = opened.decoded(shrink=min(right - left, lower - upper) / size)
    across, down = image.width / opened.size[0], image.height / opened.size[1]
    box = (left * across, upper * down, right * across, lower * down)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    flipped = rng.random() < config.flip
    if flipped:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < config.jitter:
        image = _jitter(image, config, rng)
    return np.asarray(image, np.uint8), flipped


def _random_box(
    width: int, height: int, config: AugmentConfig, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """(left, upper, right, lower) of a crop of random area and shape, in pixels."""
    area = width * height
    for _ in range(10):
        target = area * rng.uniform(*config.crop_scale)
        ratio = np.exp(rng.uniform(*np.log(config.crop_ratio)))
        w, h = np.sqrt(target * ratio), np.sqrt(target / ratio)
        if w <= width and h <= height:
            left, upper = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, upper, left + w, upper + h
    side = min(width, height)  # no crop of such a shape fits: the centre square
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side


def _jitter(image: Image.Image, config: AugmentConfig, rng: np.random.Generator) -> Image.Image:
    enhancers = [
        (ImageEnhance.Brightness, config.brightness),
        (ImageEnhance.Contrast, config.contrast),
        (ImageEnhance.Color, config.saturation),
    ]
    # Without hue nothing is drawn for it: other numbers would follow.
    for i in rng.permutation(len(enhancers) + (config.hue > 0)):
        if i == len(enhancers):
            image = turn_hue(image, rng.uniform(-config.hue, config.hue))
        else:
            enhancer, strength = enhancers[i]
            image = enhancer(image).enhance(rng.uniform(1 - strength, 1 + strength))
    return image


def turn_hue(image: Image.Image, turn: float) -> Image.Image:
    """All hues moved by `turn` of the colour circle: 1/3 makes red green, and green blue."""
    hue, saturation, value = image.convert("HSV").split()
    # Of Pillow's 256 hues the last is red again, as the first.
    table = [(h + round(turn * 255)) % 255 for h in range(256)]
    return Image.merge("HSV", (hue.point(table), saturation, value)).convert("RGB")
