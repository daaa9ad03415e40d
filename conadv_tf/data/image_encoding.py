"""What an image file becomes in a record: a JPEG as it is, or one made anew."""

import contextlib
import errno
import hashlib
import io
import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import PIL
from PIL import ExifTags, Image, ImageOps

import conadv_tf
from conadv_tf.errors import DataError

MODES = ("RGB", "L")  # those in which a JPEG is stored, colour and grey
_JPEG = b"\xff\xd8\xff"  # what a JPEG begins with
QUALITY = 95  # of a JPEG that is made anew
_SAVED = {"JPEG": {"quality": QUALITY}, "PNG": {"compress_level": 1}}
# Errors of opening and reading one file: it is gone, is no file, or cannot be read, by this user or at all.
_OF_A_FILE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.EIO)
_TRANSPARENT_MODES = ("LA", "P", "PA", "RGBA", "RGBa")  # a palette may have transparent colours


def version() -> str:
    """What the bytes of images that are made anew depend on."""
    return f"conadv_tf {conadv_tf.__version__} and Pillow {PIL.__version__}"


class Encoded(NamedTuple):
    """An image as it is to be stored.

    Attributes:
      image: the file.
      size: (width, height) in pixels.
      mode: one of MODES.
      copied: whether `image` is the file that was read; only its head has been looked at.
      digest: a hash of the file that was read.
      whitened: whether parts were transparent, which are white now.
    """

    image: bytes
    size: tuple[int, int]
    mode: str
    copied: bool
    digest: bytes
    whitened: bool


def prepare(path: str, image_size: int | None, form: str) -> Encoded:
    """Reads an image file and makes an image that training can decode. Transparent parts become white.

    Args:
      path: the file.
      image_size: the longest shorter side allowed, pixels; None leaves the size.
      form: what an image becomes that is not a JPEG in RGB or grey, upright and small enough: "JPEG", or "PNG",
        which loses nothing.

    Raises:
      DataError: with the fault of a broken image.
      MemoryError, OSError: what the system refuses.
    """
    with _faults(OSError), open(path, "rb") as file:
        content = file.read()
    digest = hashlib.blake2b(content, digest_size=16).digest()
    with _faults(Exception), Image.open(io.BytesIO(content)) as image:
        fits = not image_size or min(image.size) <= image_size
        if content.startswith(_JPEG) and image.mode in MODES and fits and not _rotated(image):
            return Encoded(content, image.size, image.mode, True, digest, False)
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"pixels of mode {image.mode}, not 8 bits")
        converted, whitened = _upright(image)
    if image_size and min(converted.size) > image_size:
        converted = _resized(converted, image_size)
    return Encoded(_saved(converted, form), converted.size, converted.mode, False, digest, whitened)


@contextlib.contextmanager
def _faults(of: type[Exception]) -> Iterator[None]:
    """Makes DataErrors, of one line, of errors of a kind: faults of an image or of its file.

    What the system refuses goes through: memory, open files, space. Its OSErrors have a number, those of Pillow none.
    """
    try:
        yield
    except MemoryError:
        raise
    except of as error:
        if isinstance(error, OSError) and error.errno is not None and error.errno not in _OF_A_FILE:
            raise
        first, *_ = str(error).split(" <_io")[0].splitlines() or [type(error).__name__]
        raise DataError(first) from error


def shrunk(content: bytes, max_side: int, quality: int = QUALITY) -> tuple[bytes, tuple[int, int]] | None:
    """Makes a JPEG of an image of a record whose shorter side is longer than `max_side`.

    Args:
      content: the image as it is stored. As in training, what its EXIF says of its orientation does not count.
      max_side: pixels.
      quality: of the JPEG, in 1..100.

    Returns:
      (the JPEG, (width, height)); None for an image that is small enough, or of colours that a JPEG cannot hold.

    Raises:
      DataError: with the fault of a broken image.
      MemoryError, OSError: what the system refuses.
    """
    with _faults(Exception), Image.open(io.BytesIO(content)) as image:
        if min(image.size) <= max_side or image.mode not in MODES or "transparency" in image.info:
            return None
        image.load()
    smaller = _resized(image, max_side)
    return _saved(smaller, "JPEG", quality=quality), smaller.size


def _saved(image: Image.Image, form: str, **settings: int) -> bytes:
    image.info = {}  # a comment, perhaps longer than a JPEG may have
    with _file() as file:
        with _faults(OSError):  # no JPEG is wider than 65,500 pixels
            image.save(file, form, **_SAVED[form] | settings)
        file.seek(0)
        return file.read()


def _file() -> BinaryIO:
    """A file in memory: the system's where it has such. While Pillow writes to one, it gives Python's lock away."""
    return open(os.memfd_create("image"), "w+b") if hasattr(os, "memfd_create") else io.BytesIO()


def _rotated(image: Image.Image) -> bool:
    return image.getexif().get(ExifTags.Base.Orientation, 1) != 1


def _upright(image: Image.Image) -> tuple[Image.Image, bool]:
    """Decodes an image, turns it upright and into RGB on white; tells whether white shows."""
    upright, whitened = ImageOps.exif_transpose(image), False
    if upright.mode in _TRANSPARENT_MODES or "transparency" in upright.info:
        white = Image.new("RGBA", upright.size, "white")  # dropping alpha would show what it hides, mostly black
        layered = upright.convert("RGBA")
        whitened = any(layered.getchannel("A").histogram()[:255])
        upright = Image.alpha_composite(white, layered)
    return upright.convert("RGB"), whitened


def _resized(image: Image.Image, shorter: int) -> Image.Image:
    scale = shorter / min(image.size)
    width, height = (max(shorter, round(scale * side)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)
