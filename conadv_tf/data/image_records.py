"""Images as records: the shards that hold them; see import_images.py."""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence

import tensorflow as tf

from conadv_tf import terminal
from conadv_tf.data import image_encoding, in_turn
from conadv_tf.data.image_encoding import Encoded
from conadv_tf.data.image_folder import Source
from conadv_tf.errors import DataError

_COLORSPACES = dict(zip(image_encoding.MODES, (b"RGB", b"Grayscale"), strict=True))
_IMAGES_AHEAD, _MORE_THREADS = 256, 4
_IMAGES_PER_SHARD = 1000  # unless --shards says otherwise; ImageNet's 1,024 shards hold about as many


Result = tuple[int, int, str, bool] | str
"""What became of an image: (width, height, hash of the file, whether white shows), or the fault of a broken one."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of records to write: its name, its split, its images in their order."""

    name: str
    split: str
    images: list[Source]


@dataclasses.dataclass
class Report:
    """The outcome of an import.

    Attributes:
      sizes: (width, height), in pixels, of every image of each split.
      bad: the fault of each broken image, by its path.
      layout: a line on what the folders of SRC serve for; empty where they are classes.
      left_out: paths below SRC that are not imported, by the reason.
      whitened: paths of images with transparent parts, which are white in the records.
      duplicates: (path of a validation image, path of a training image of the same bytes).
    """

    sizes: dict[str, list[tuple[int, int]]] = dataclasses.field(default_factory=dict)
    bad: dict[str, str] = dataclasses.field(default_factory=dict)
    layout: str = ""
    left_out: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    whitened: list[str] = dataclasses.field(default_factory=list)
    duplicates: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def _feature(value: bytes | int) -> tf.train.Feature:
    if isinstance(value, int):
        return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))


def read(
    path: str,
    image_size: int | None = None,
    form: str = "JPEG",
) -> Encoded:
    """Reads an image file, and makes sure that training can decode what comes of it.

    Args:
      path, image_size, form: see `image_encoding.prepare`.

    Raises:
      DataError: with the fault of a broken image.
    """
    encoded = image_encoding.prepare(path, image_size, form)
    if encoded.copied:
        try:
            tf.io.decode_jpeg(encoded.image, channels=3)  # as training will
        except tf.errors.InvalidArgumentError as error:
            raise DataError("corrupt JPEG") from error
    return encoded


def _record(image: Source, class_name: str, encoded: Encoded) -> bytes:
    """Makes the serialized tf.train.Example of an image."""
    width, height = encoded.size
    features: dict[str, bytes | int] = {
        "image/encoded": encoded.image,
        "image/format": b"JPEG",
        "image/colorspace": _COLORSPACES[encoded.mode],
        "image/height": height,
        "image/width": width,
        "image/filename": os.fsencode(image.filename),
        "image/class/label": image.label,
        "image/class/text": os.fsencode(class_name),
    }
    feature = {name: _feature(value) for name, value in features.items()}
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString(deterministic=True)


def shards_of(splits: dict[str, list[Source]], shards: int | None) -> list[Shard]:
    """The files of both splits: `shards` for training, None makes one per 1,000 images; validation in proportion."""
    found = []
    for split, images in splits.items():
        count = _num_shards(len(images), len(splits["train"]), shards)
        names = [f"{split}-{number:05d}-of-{count:05d}" for number in range(count)]
        found += [Shard(name, split, images[number::count]) for number, name in enumerate(names)]
    return found


def fingerprint(shards: Sequence[Shard], classes: Sequence[str]) -> str:
    """A hash of the names and labels of all images and of size and time of their files."""
    found = hashlib.blake2b(repr(classes).encode(), digest_size=16)
    for shard in shards:
        for image in shard.images:
            try:
                status = os.stat(image.path)
                state = status.st_size, status.st_mtime_ns
            except OSError:  # a broken link; reading it will say so
                state = -1, -1
            found.update(repr((shard.name, image.filename, image.label, *state)).encode())
    return found.hexdigest()


class Writer:
    """Writes shards into a folder, the same bytes whatever the number of threads.

    Args:
      folder: the folder.
      classes: the names of the classes by label.
      image_size: the longest shorter side that stays, pixels; None leaves all sizes.
      max_bad_images: the number of broken images to leave out.
      report: takes the outcome.
    """

    def __init__(
        self, folder: str, classes: Sequence[str], image_size: int | None, max_bad_images: int, report: Report
    ):
        self._folder, self._classes, self._report = folder, classes, report
        self._image_size, self._max_bad_images = image_size, max_bad_images
        self._train_paths: dict[str, str] = {}  # by the hash of the file

    def write(
        self,
        shards: Sequence[Shard],
        workers: int | None,
        whole: Mapping[str, Sequence[Result]],
        finished: Callable[[str, list[Result]], None],
    ) -> None:
        """Writes all shards, in order.

        Args:
          shards: those of the training images first.
          workers: the number of threads that read images; None: a few more than there are cores, for slow disks.
          whole: what became of the images of the shards that are there already, by their names.
          finished: is called with the name of each shard that has been written, and what became of its images.

        Raises:
          DataError: too many broken images, or a shard without a good one.
        """
        missing = [image for shard in shards if shard.name not in whole for image in shard.images]
        self._report.sizes = {shard.split: [] for shard in shards}
        pool = concurrent.futures.ThreadPoolExecutor(workers or (os.cpu_count() or 1) + _MORE_THREADS)
        try:
            with terminal.Progress(len(missing), "image") as progress:
                results = in_turn.results(self._result, missing, pool, _IMAGES_AHEAD)
                for shard in shards:
                    if shard.name in whole:
                        for image, result in zip(shard.images, whole[shard.name], strict=True):
                            self._count(shard.split, image, result)
                    else:
                        made = self._write_shard(shard, itertools.islice(results, len(shard.images)), progress)
                        finished(shard.name, made)
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C only what has been begun is finished

    def _result(self, image: Source) -> tuple[bytes, Result]:
        """The record of an image and what became of it; b"" of a broken one."""
        try:
            encoded = read(image.path, self._image_size)
        except DataError as error:
            return b"", str(error)
        return _record(image, self._classes[image.label], encoded), (
            *encoded.size,
            encoded.digest.hex(),
            encoded.whitened,
        )

    def _write_shard(
        self, shard: Shard, results: Iterable[tuple[bytes, Result]], progress: terminal.Progress
    ) -> list[Result]:
        found = []
        with tf.io.TFRecordWriter(os.path.join(self._folder, shard.name)) as file:
            for image, (record, result) in zip(shard.images, results, strict=True):
                if record:
                    file.write(record)
                self._count(shard.split, image, result)
                found.append(result)
                progress.update()
        if all(isinstance(result, str) for result in found):
            raise DataError(f"{shard.name} would hold no good image: use fewer --shards, or repair the images")
        return found

    def _count(self, split: str, image: Source, result: Result) -> None:
        if isinstance(result, str):
            self._count_bad(image, result)
            return
        width, height, digest, whitened = result
        self._report.sizes[split].append((width, height))
        if whitened:
            self._report.whitened.append(image.path)
        if split == "train":
            self._train_paths.setdefault(digest, image.path)
        elif digest in self._train_paths:
            self._report.duplicates.append((image.path, self._train_paths[digest]))

    def _count_bad(self, image: Source, fault: str) -> None:
        bad = self._report.bad
        bad[image.path] = fault
        if len(bad) > self._max_bad_images:
            raise DataError(
                f"{image.path}: {fault}; with it {len(bad)} broken images, more than --max_bad_images="
                f"{self._max_bad_images}: repair them or raise --max_bad_images"
            )


def _num_shards(images: int, train_images: int, shards: int | None) -> int:
    """The number of shards of a split: --shards for training images, in the same proportion for validation."""
    wanted = shards or -(-train_images // _IMAGES_PER_SHARD)
    return max(1, min(images, round(wanted * images / train_images)))
