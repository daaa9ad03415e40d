"""Images as records: what each becomes, and the shards that hold them; see import_images.py."""

import concurrent.futures
import dataclasses
import hashlib
import io
import os
from collections.abc import Iterator, Sequence

import tensorflow as tf
from PIL import ExifTags, Image, ImageOps

from conadv_tf import terminal
from conadv_tf.data.image_folder import Source
from conadv_tf.errors import DataError

_COLORSPACES = {"RGB": b"RGB", "L": b"Grayscale"}
_SAVED = {"JPEG": {"quality": 95}, "PNG": {"compress_level": 1}}
_IMAGES_PER_SHARD = 1000  # unless --shards says otherwise; ImageNet's 1,024 shards hold about as many
_IMAGES_AT_A_TIME = 256
_TRANSPARENT_MODES = ("LA", "P", "PA", "RGBA", "RGBa")  # a palette may have transparent colours


@dataclasses.dataclass
class Report:
    """The outcome of an import.

    Attributes:
      sizes: (width, height), in pixels, of every image of each split.
      bad: the fault of each broken image, by its path.
      layout: a line on what the folders of SRC serve for; empty where they are classes.
      left_out: paths below SRC that are not imported, by the reason.
      duplicates: (path of a validation image, path of a training image of the same bytes).
    """

    sizes: dict[str, list[tuple[int, int]]] = dataclasses.field(default_factory=dict)
    bad: dict[str, str] = dataclasses.field(default_factory=dict)
    layout: str = ""
    left_out: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    duplicates: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def _rotated(image: Image.Image) -> bool:
    return image.getexif().get(ExifTags.Base.Orientation, 1) != 1


def _reencoded(image: Image.Image, image_size: int | None) -> Image.Image:
    """Turns an image upright and into RGB on white, and shrinks its shorter side to image_size pixels."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode in _TRANSPARENT_MODES or "transparency" in upright.info:
        white = Image.new("RGBA", upright.size, "white")  # dropping alpha would show what it hides, mostly black
        upright = Image.alpha_composite(white, upright.convert("RGBA"))
    upright = upright.convert("RGB")
    if image_size and min(upright.size) > image_size:
        scale = image_size / min(upright.size)
        width, height = (max(image_size, round(scale * side)) for side in upright.size)
        upright = upright.resize((width, height), Image.Resampling.BICUBIC)
    return upright


def encode(content: bytes, image_size: int | None, form: str = "JPEG") -> tuple[bytes, tuple[int, int], str]:
    """Makes an image that training can decode. Transparent parts become white.

    Args:
      content: an image file.
      image_size: the longest shorter side allowed, pixels; None leaves the size.
      form: what an image becomes that is not a JPEG in RGB or grey, upright and small enough: "JPEG", or "PNG",
        which loses nothing.

    Returns:
      (image, its (width, height) in pixels, "RGB" or "L"): the content itself where it is such a JPEG already.

    Raises:
      Exception: many kinds, where the image is broken.
    """
    with Image.open(io.BytesIO(content)) as image:
        fits = not image_size or min(image.size) <= image_size
        if tf.io.is_jpeg(content) and image.mode in _COLORSPACES and fits and not _rotated(image):
            tf.io.decode_jpeg(content, channels=3)  # as training will
            return content, image.size, image.mode
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"pixels of mode {image.mode}, not 8 bits")
        converted = _reencoded(image, image_size)
    file = io.BytesIO()
    converted.save(file, form, **_SAVED[form])
    return file.getvalue(), converted.size, converted.mode


def _feature(value: bytes | int) -> tf.train.Feature:
    if isinstance(value, int):
        return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))


def _fault(error: Exception) -> str:
    if isinstance(error, tf.errors.InvalidArgumentError):
        return "corrupt JPEG"
    first, *_ = str(error).split(" <_io")[0].splitlines() or [type(error).__name__]
    return first


def read(
    path: str, image_size: int | None = None, form: str = "JPEG"
) -> tuple[bytes, tuple[bytes, tuple[int, int], str]]:
    """Reads an image file: (its content, what `encode` makes of it).

    Raises:
      DataError: with the fault of a broken image.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
        return content, encode(content, image_size, form)
    except Exception as error:  # decoders raise whatever they stumble over
        raise DataError(_fault(error)) from error


def _record(source: Source, class_name: str, image_size: int | None) -> tuple[bytes, tuple[int, int], bytes]:
    """Makes (serialized tf.train.Example, (width, height) in pixels, hash of the file) of an image.

    Raises:
      DataError: with the fault of a broken image.
    """
    content, (encoded, (width, height), mode) = read(source.path, image_size)
    features: dict[str, bytes | int] = {
        "image/encoded": encoded,
        "image/format": b"JPEG",
        "image/colorspace": _COLORSPACES[mode],
        "image/height": height,
        "image/width": width,
        "image/filename": os.fsencode(source.filename),
        "image/class/label": source.label,
        "image/class/text": os.fsencode(class_name),
    }
    feature = {name: _feature(value) for name, value in features.items()}
    example = tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString(deterministic=True)
    return example, (width, height), hashlib.blake2b(content, digest_size=16).digest()


class Writer:
    """Writes the shards of both splits into a folder."""

    def __init__(self, folder: str, classes: Sequence[str], image_size: int | None, max_bad_images: int):
        self._folder, self._classes = folder, classes
        self._image_size, self._max_bad_images = image_size, max_bad_images
        self._train_paths: dict[bytes, str] = {}  # by the hash of the file
        self.report = Report()

    def write(self, splits: dict[str, list[Source]], shards: int | None) -> None:
        total = sum(map(len, splits.values()))
        with concurrent.futures.ThreadPoolExecutor() as pool, terminal.Progress(total, "image") as progress:
            for split, images in splits.items():
                self.report.sizes[split] = []
                count = _num_shards(len(images), len(splits["train"]), shards)
                for number in range(count):
                    path = os.path.join(self._folder, f"{split}-{number:05d}-of-{count:05d}")
                    self._write_shard(path, images[number::count], split, pool, progress)

    def _write_shard(
        self,
        path: str,
        images: list[Source],
        split: str,
        pool: concurrent.futures.Executor,
        progress: terminal.Progress,
    ) -> None:
        sizes = self.report.sizes[split]
        before = len(sizes)
        with tf.io.TFRecordWriter(path) as file:
            for image, result in self._results(images, pool):
                try:
                    record, size, digest = result.result()
                except DataError as error:
                    self._count_bad(image, str(error))
                else:
                    file.write(record)
                    sizes.append(size)
                    self._compare(image, split, digest)
                progress.update()
        if len(sizes) == before:
            raise DataError(
                f"{os.path.basename(path)} would hold no good image: use fewer --shards, or repair the images"
            )

    def _results(
        self, images: list[Source], pool: concurrent.futures.Executor
    ) -> Iterator[tuple[Source, concurrent.futures.Future]]:
        # Submits some at a time: the pool holds what it made until it is written.
        for begin in range(0, len(images), _IMAGES_AT_A_TIME):
            some = images[begin : begin + _IMAGES_AT_A_TIME]
            futures = [pool.submit(_record, image, self._classes[image.label], self._image_size) for image in some]
            yield from zip(some, futures, strict=True)

    def _compare(self, image: Source, split: str, digest: bytes) -> None:
        if split == "train":
            self._train_paths.setdefault(digest, image.path)
        elif digest in self._train_paths:
            self.report.duplicates.append((image.path, self._train_paths[digest]))

    def _count_bad(self, image: Source, fault: str) -> None:
        self.report.bad[image.path] = fault
        if len(self.report.bad) > self._max_bad_images:
            raise DataError(
                f"{image.path}: {fault}; with it {len(self.report.bad)} broken images, more than --max_bad_images="
                f"{self._max_bad_images}: repair them or raise --max_bad_images"
            )


def _num_shards(images: int, train_images: int, shards: int | None) -> int:
    """The number of shards of a split: --shards for training images, in the same proportion for validation."""
    wanted = shards or -(-train_images // _IMAGES_PER_SHARD)
    return max(1, min(images, round(wanted * images / train_images)))
