"""A folder of images, one subfolder a class, becomes TFRecords in the ImageNet schema.

The console script of this module:

    conadv-import-images SRC DST --validation=0.1
    conadv-import-images SRC DST --image_size=256 --shards=64      (SRC has train/ and val/)

Labels count from 0 in the order of the subfolders' names, which classes.txt lists. JPEGs in RGB or grey are copied byte
for byte; images in other formats, rotated images and images to be shrunk are stored as JPEGs of quality 95, with
white where they are transparent. Whatever is not imported is named or counted.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import os
import shlex
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence

import tensorflow as tf
from PIL import ExifTags, Image, ImageOps

from conadv_tf import terminal
from conadv_tf.data.image_folder import Source, find
from conadv_tf.errors import ConfigError, DataError

_COLORSPACES = {"RGB": b"RGB", "L": b"Grayscale"}
_JPEG_QUALITY = 95
_IMAGES_PER_SHARD = 1000  # unless --shards says otherwise; ImageNet's 1,024 shards hold about as many
_LARGEST_IMAGE_SIZE = 224  # in the training command: the size that ImageNet networks take
_IMAGES_AT_A_TIME = 256
_TRANSPARENT_MODES = ("LA", "P", "PA", "RGBA", "RGBa")  # a palette may have transparent colours
_NAMED = 3  # of the files left out for one reason
_RECIPE, _RECIPE_BATCH_SIZE, _RECIPE_MICROBATCH_SIZE = "batch/1k.gin", 1024, 64


@dataclasses.dataclass
class Report:
    """The outcome of an import.

    Attributes:
      sides: the shorter side, in pixels, of every image of each split.
      bad: the fault of each broken image, by its path.
      layout: a line on what the folders of SRC serve for; empty where they are classes.
      left_out: paths below SRC that are not imported, by the reason.
      duplicates: (path of a validation image, path of a training image of the same bytes).
    """

    sides: dict[str, list[int]] = dataclasses.field(default_factory=dict)
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


def encode(content: bytes, image_size: int | None) -> tuple[bytes, tuple[int, int], str]:
    """Makes a JPEG that training can decode. Transparent parts become white.

    Args:
      content: an image file.
      image_size: the longest shorter side allowed, pixels; None leaves the size.

    Returns:
      (JPEG, its (width, height) in pixels, "RGB" or "L"): the content itself where it is such a JPEG already.

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
    converted.save(file, "JPEG", quality=_JPEG_QUALITY)
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


def _record(source: Source, class_name: str, image_size: int | None) -> tuple[bytes, int, bytes]:
    """Makes (serialized tf.train.Example, shorter side in pixels, hash of the file) of an image.

    Raises:
      DataError: with the fault of a broken image.
    """
    try:
        with open(source.path, "rb") as file:
            content = file.read()
        encoded, (width, height), mode = encode(content, image_size)
    except Exception as error:  # decoders raise whatever they stumble over
        raise DataError(_fault(error)) from error
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
    return example, min(width, height), hashlib.blake2b(content, digest_size=16).digest()


class _Writer:
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
                self.report.sides[split] = []
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
        sides = self.report.sides[split]
        before = len(sides)
        with tf.io.TFRecordWriter(path) as file:
            for image, result in self._results(images, pool):
                try:
                    record, side, digest = result.result()
                except DataError as error:
                    self._count_bad(image, str(error))
                else:
                    file.write(record)
                    sides.append(side)
                    self._compare(image, split, digest)
                progress.update()
        if len(sides) == before:
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


def import_images(
    src: str,
    dst: str,
    image_size: int | None = None,
    shards: int | None = None,
    validation: float | None = None,
    max_bad_images: int = 10,
) -> tuple[list[str], Report]:
    """Writes TFRecords of the images of a folder: the same files every time. DST appears when all of them are whole.

    Args:
      src: the folder of images, see `find`.
      dst: the folder to make: train-00000-of-..., validation-00000-of-..., classes.txt.
      image_size: images whose shorter side is longer than this many pixels are shrunk to it; None leaves all sizes.
      shards: the number of training files; None makes one for each 1,000 images.
      validation: the share of images to set aside, see `find`.
      max_bad_images: the number of broken images to leave out before the import ends.

    Returns:
      (names of the classes by label, what was imported).

    Raises:
      ConfigError: a number out of range, or DST not empty, inside SRC, or left unfinished by another import.
      DataError: see `find`; more broken images than allowed.
    """
    numbers = (("image_size", image_size, 1), ("shards", shards, 1), ("max_bad_images", max_bad_images, 0))
    for name, value, least in numbers:
        if value is not None and value < least:
            raise ConfigError(f"--{name}={value} is too small: give at least {least}, or drop it")
    src, dst = os.path.realpath(src), os.path.realpath(dst)
    partial = _partial_folder(src, dst)
    found = find(src, validation)
    num_train = len(found.splits["train"])
    if shards and shards > num_train:
        raise ConfigError(f"--shards={shards} is more than the {num_train} training images: use fewer")
    os.makedirs(partial)
    try:
        writer = _Writer(partial, found.classes, image_size, max_bad_images)
        writer.report.layout, writer.report.left_out = found.layout, found.left_out
        writer.write(found.splits, shards)
        with open(os.path.join(partial, "classes.txt"), "wb") as file:
            file.writelines(os.fsencode(name) + b"\n" for name in found.classes)
        os.replace(partial, dst)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return found.classes, writer.report


def _partial_folder(src: str, dst: str) -> str:
    """The folder to write into until all is there, after checking that DST may be made."""
    if os.path.lexists(dst) and (not os.path.isdir(dst) or os.listdir(dst)):
        raise ConfigError(f"DST={dst!r} is not an empty folder: name another one, or empty it")
    if os.path.commonpath([src, dst]) == src:
        raise ConfigError(f"DST={dst!r} lies in SRC={src!r}, whose subfolders are classes: name a folder outside it")
    partial = f"{dst}.partial"
    if os.path.lexists(partial):
        raise ConfigError(f"{partial!r} is there: another import is writing it, or was killed: then delete it")
    return partial


def training_command(dst: str, classes: Sequence[str], report: Report) -> str:
    """The command that trains a ResNet-50 on what was imported, at batch 1,024 or what fewer images allow."""
    num_train = len(report.sides["train"])
    image_size = min(_LARGEST_IMAGE_SIZE, int(statistics.median(report.sides["train"])))
    settings = {
        "data.source": "tfrecords",
        "tfrecords.name": os.path.basename(os.path.realpath(dst)),
        "tfrecords.num_train": num_train,
        "tfrecords.num_classes": len(classes),
        "tfrecords.label_offset": 0,
        "tfrecords.image_size": image_size,
        "tfrecords.in_memory": False,
        "tfrecords.augmentation": "resized_crop_flip",
    }
    if num_train < _RECIPE_BATCH_SIZE:
        rows = min(_RECIPE_MICROBATCH_SIZE, num_train)
        settings |= {"train.global_batch_size": num_train // rows * rows, "train.microbatch_size": rows}
    command = ["python", "train.py", f"--gin_file={_RECIPE}", "--gin_file=method/conadv.gin", f"--data_dir={dst}"]
    bindings = [_quoted_flag("--gin_param", f"{name}={value!r}") for name, value in settings.items()]
    return " ".join([shlex.join(command), *bindings])


def _quoted_flag(flag: str, value: str) -> str:
    # shlex.quote breaks a value in quotes of its own into five pieces; double quotes read better where they serve.
    plain = not set(value) & set('"$`\\!')
    return f'{flag}="{value}"' if plain else shlex.quote(f"{flag}={value}")


def _shown(path: str) -> str:
    """A path on one line, whatever its name."""
    return path if path.isprintable() else ascii(path)


def _print_report(dst: str, classes: Sequence[str], report: Report) -> None:
    for path, fault in report.bad.items():
        print(f"left out: {_shown(path)}: {fault}", file=sys.stderr)
    for reason, paths in report.left_out.items():
        some = ", ".join([_shown(path) for path in paths[:_NAMED]] + ["…"] * (len(paths) > _NAMED))
        print(f"left out: {len(paths):,} {reason}: {some}", file=sys.stderr)
    if report.duplicates:
        validation_path, train_path = map(_shown, report.duplicates[0])
        print(
            f"{len(report.duplicates):,} validation images are training images too, byte for byte, such as "
            f"{validation_path} = {train_path}",
            file=sys.stderr,
        )
    if report.layout:
        print(_shown(report.layout))
    train, validation = (len(report.sides[split]) for split in ("train", "validation"))
    others = sum(map(len, report.left_out.values()))
    left_out = f"{len(report.bad):,} broken images" + (f" and {others:,} other files or folders" if others else "")
    print(
        f"{dst}: {train:,} training, {validation:,} validation images of {len(classes):,} classes; "
        f"{left_out} left out. Train on it:"
    )
    print(training_command(dst, classes, report))


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = terminal.Parser(prog="conadv-import-images", description="A folder of images becomes TFRecords.")
    any_path = functools.partial(terminal.path, any_bytes=True)  # TensorFlow opens no file of SRC
    images = "a subfolder of images for each class, or train/ and val/ with them"
    parser.add_argument("src", type=any_path, metavar="SRC", help=images)
    parser.add_argument("dst", type=terminal.path, metavar="DST", help="folder to make; it appears when it is whole")
    parser.add_argument("--image_size", type=int, metavar="N", help="shrink shorter sides beyond N pixels to N")
    parser.add_argument("--shards", type=int, metavar="N", help="training files; default: one for each 1,000 images")
    parser.add_argument("--validation", type=float, metavar="SHARE", help="of each class, where SRC has no val/: 0.1")
    parser.add_argument("--max_bad_images", type=int, default=10, metavar="N", help="broken images to leave out (10)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for arguments, 1 for data, 130 where it was interrupted."""
    return terminal.exit_code(
        lambda: _import(_arguments(arguments)),
        "nothing was imported",
        "check space and permissions of DST; nothing was imported",
    )


def _import(parsed: argparse.Namespace) -> None:
    classes, report = import_images(**vars(parsed))
    _print_report(parsed.dst, classes, report)


if __name__ == "__main__":
    sys.exit(main())
