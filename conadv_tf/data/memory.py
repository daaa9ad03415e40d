"""Data held in memory, and the reading of records into it."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from conadv_tf.data import augment, fingerprint, record_files
from conadv_tf.data.examiner import ANY_SHAPE, Examiner, check_schema
from conadv_tf.data.fingerprint import Fingerprint
from conadv_tf.data.pictures import decode_image
from conadv_tf.data.pipeline import HostReading, ImageData
from conadv_tf.data.record_files import BadRecords, RecordFile
from conadv_tf.data.records import Schema, raw_records
from conadv_tf.errors import ConfigError, DataError


class MemoryData(ImageData):
    """Splits held in one uint8 array each; see `ImageData`.

    Args beyond those of ImageData:
      splits: name -> (images uint8 [n, H, W, C], labels int32 [n]); example i shows image i mod n.
      augmentation: the augmentation of training images.
      sizes: the number of examples of each split; None: as many as it has images.
      files: the files that the images were read from; None where there are none.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        splits: dict[str, tuple[np.ndarray, np.ndarray]],
        augmentation: augment.Augmentation,
        bad_records: record_files.BadRecords,
        sizes: dict[str, int] | None = None,
        files: fingerprint.Files | None = None,
    ):
        own_sizes = {split: len(labels) for split, (_, labels) in splits.items()}
        shape = splits["train"][0].shape[1:]
        if augmentation.policy != "none" and shape[-1] != 3:
            raise ConfigError(
                f"autoaugment.policy={augmentation.policy!r} is for colour images, {name} has {shape}: drop it"
            )
        super().__init__(name, num_classes, shape, sizes or own_sizes, bad_records, augmentation)
        self._files = files
        with tf.device("CPU:0"):  # else a GPU would hold them, and tf.data copy them back for each batch
            self._splits = {split: tuple(map(tf.constant, arrays)) for split, arrays in splits.items()}

    def _fingerprint(self) -> Fingerprint:
        # The images of files are known by the files: decoders differ by a level or so.
        found = self._files.fingerprint() if self._files else Fingerprint(self.name, {})
        for split, (images, labels) in self._splits.items():
            found.parts.update(fingerprint.of_labels(split, labels.numpy()))
            if not self._files:
                found.parts.update(fingerprint.of_images(split, images.numpy()))
        return found

    def _lookup(self, split: str, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        images, labels = self._splits[split]
        index %= images.shape[0]
        return tf.gather(images, index), tf.gather(labels, index)

    def _train(self, reading: HostReading, start_position: int, seed: int) -> tf.data.Dataset:
        def batch(number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            position = start_position + reading.positions(number)
            epoch, index = position // self.num_train, position % self.num_train
            example = augment.permute(index, self.num_train, seed, augment.ORDER, epoch)
            images, labels = self._lookup("train", example)
            images = augment.batch(images, self.augmentation, index, seed, epoch)
            return tf.ensure_shape(images, [reading.rows_per_replica, *self.train_shape]), labels

        return tf.data.Dataset.range(tf.int64.max).map(batch, num_parallel_calls=tf.data.AUTOTUNE)

    def _evaluation(self, split: str, reading: HostReading, steps: int, keeps: bool) -> tf.data.Dataset:
        def batch(number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            position = reading.positions(number)
            real = position < self.sizes[split]
            images, labels = self._lookup(split, tf.where(real, position, 0))
            images *= tf.cast(real, tf.uint8)[:, None, None, None]
            return images, labels * tf.cast(real, tf.int32), tf.cast(real, tf.float32)

        numbers = tf.data.Dataset.range(steps * reading.replicas_per_host)
        return numbers.map(batch, num_parallel_calls=tf.data.AUTOTUNE)

    def _largest_share(self, split: str, num_hosts: int) -> int:
        return -(-self.sizes[split] // num_hosts)


def _first_shape(examiner: Examiner) -> tuple[int, int, int]:
    """The shape of the first good image of all files."""
    for number, file in enumerate(examiner.files):
        for record in range(file.num_records):
            if payload := examiner.payload_or_empty(number, record):
                encoded, _ = examiner.schema.parse(tf.constant(payload))
                return tuple(decode_image(encoded).shape)
    raise _none_good(examiner.files)


def _none_good(files: Sequence[RecordFile]) -> DataError:
    return DataError(f"{files[0].path} and the files like it hold no good record: fetch them again")


def _decoded(files: Sequence[RecordFile], schema: Schema, shape: tuple[int, int, int]) -> tf.data.Dataset:
    """Batches of (number int64, image uint8, label int32) of the records that decode; numbers count all records."""

    def decode(number: tf.Tensor, raw: tuple[tf.Tensor, ...]) -> tuple[tf.Tensor, ...]:
        encoded, label = schema.parse(raw[0])
        return number, tf.ensure_shape(decode_image(encoded), shape), label

    records = raw_records(files, tf.range(len(files), dtype=tf.int64)).enumerate()
    return records.map(decode, num_parallel_calls=tf.data.AUTOTUNE).ignore_errors().batch(512).prefetch(2)


def read_into_memory(
    files: Sequence[RecordFile],
    schema: Schema,
    bad_records: BadRecords,
    image_shape: tuple[int, int, int] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes every record of the files, in file order.

    Args:
      files: indexed files.
      schema: how a record becomes an example.
      bad_records: the count of bad records, which are left out.
      image_shape: (H, W, 3) that every image must have; None takes the first image's.

    Returns:
      (images uint8 [n, H, W, 3], labels int32 [n]) of the n good records.

    Raises:
      DataError: label out of range, more bad records than allowed, or no good one.
    """
    check_schema(files, schema, bad_records)
    examiner = Examiner(files, schema, bad_records, image_shape or ANY_SHAPE)
    examiner.image_shape = shape = image_shape or _first_shape(examiner)
    counts = [file.num_records for file in files]
    images, labels = np.zeros((sum(counts), *shape), np.uint8), np.zeros(sum(counts), np.int32)
    good = np.zeros(sum(counts), bool)
    for numbers, some_images, some_labels in _decoded(files, schema, shape).as_numpy_iterator():
        images[numbers], labels[numbers], good[numbers] = some_images, some_labels, True
    firsts = np.cumsum([0, *counts])
    for number in np.flatnonzero(~good):
        file = int(np.searchsorted(firsts, number, side="right")) - 1
        if payload := examiner.payload_or_empty(file, int(number - firsts[file])):
            encoded, labels[number] = schema.parse(tf.constant(payload))
            images[number], good[number] = decode_image(encoded).numpy(), True
    if not good.any():
        raise _none_good(files)
    return images[good], labels[good]
