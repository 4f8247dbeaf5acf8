"""Decoding, cropping and resizing images; `color_jitter` changes their colours."""

import io
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from clip_lite_jax.config import AugmentConfig
from clip_lite_jax.errors import BadImage, ConfigError

try:
    import cv2
except ImportError:  # an extra: large, and needed for one way of resizing alone
    cv2 = None  # type: ignore[assignment]

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


def check_header(data: bytes) -> None:
    """Raises `BadImage` where the beginning of a file is that of no picture that `Opened` takes."""
    with _damage_is_a_bad_image():
        Image.open(io.BytesIO(data), formats=FORMATS)


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
    except UnidentifiedImageError as error:  # its message holds an address in memory
        raise BadImage(f"cannot be decoded: none of {', '.join(FORMATS)}") from error
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


def view_box(size: tuple[int, int], side: int, shorter: int | None = None) -> "Box":
    """What `resize_and_crop` shows of a picture of `size` (width, height), in its pixels."""
    width, height = size
    if shorter is None or shorter == side:
        square = min(size)
        left, upper = (width - square) / 2, (height - square) / 2
        return left, upper, left + square, upper + square
    scale = shorter / min(size)
    wide, high = (max(side, round(length * scale)) for length in size)
    left, upper = (wide - side) // 2, (high - side) // 2
    across, down = width / wide, height / high
    return left * across, upper * down, (left + side) * across, (upper + side) * down


def augment(
    opened: Opened, size: int, config: AugmentConfig, rng: np.random.Generator
) -> tuple[np.ndarray, bool]:
    """Random resized crop and flip: uint8 ``[size, size, 3]`` and whether flipped."""
    left, upper, right, lower = _random_box(*opened.size, config, rng)
    image = opened.decoded(shrink=min(right - left, lower - upper) / size)
    across, down = image.width / opened.size[0], image.height / opened.size[1]
    box = (left * across, upper * down, right * across, lower * down)
    flipped = rng.random() < config.flip
    return RESAMPLINGS[config.resampling](image, box, size, flipped), flipped


Box = tuple[float, float, float, float]
"""Left, upper, right and lower, in pixels."""


def _antialiased(image: Image.Image, box: Box, size: int, flipped: bool) -> np.ndarray:
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    if flipped:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image, np.uint8)


def _bilinear(image: Image.Image, box: Box, size: int, flipped: bool) -> np.ndarray:
    cv2.setNumThreads(1)  # the threads of the pipeline have an image each
    left, upper = min(round(box[0]), image.width - 1), min(round(box[1]), image.height - 1)
    width, height = max(1, round(box[2]) - left), max(1, round(box[3]) - upper)
    # Four neighbours say enough of a pixel that covers less than two in either direction.
    across, down = max(1, width // size), max(1, height // size)
    if across > 1 or down > 1:  # what does not divide stays outside, as much on either side
        left, upper = left + width % across // 2, upper + height % down // 2
        box = (left, upper, left + width - width % across, upper + height - height % down)
        part = image.reduce((across, down), box)
    else:
        part = image.crop((left, upper, left + width, upper + height))
    pixels = cv2.resize(np.asarray(part), (size, size), interpolation=cv2.INTER_LINEAR)
    return np.asarray(cv2.flip(pixels, 1) if flipped else pixels)


RESAMPLINGS: dict[str, Callable[[Image.Image, Box, int, bool], np.ndarray]] = {
    "antialiased": _antialiased,
    "bilinear": _bilinear,
}
"""How ``(image, box, size, flipped)`` become uint8 ``[size, size, 3]``."""


def check_resampling(config: AugmentConfig) -> None:
    """Raises `ConfigError` where OpenCV is needed and not installed."""
    if config.resampling == "bilinear" and cv2 is None:
        raise ConfigError(
            "data.augment.resampling='bilinear' needs OpenCV: pip install 'clip_lite_jax[opencv]', "
            "or set it to 'antialiased'"
        )


def _random_box(width: int, height: int, config: AugmentConfig, rng: np.random.Generator) -> Box:
    """A crop of random area and shape."""
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
