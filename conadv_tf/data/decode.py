"""Batches of images from records, and what becomes of a bad record.

Decoding is TensorFlow's graph, so that it runs on the hosts of a pod and in workers of the tf.data service, where
there is no Python of ours. Python finds only the reason why a record is bad, where the host that reads is this process.
"""

from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from conadv_tf.data.record_files import RecordFile
from conadv_tf.data.records import Schema, fail_unless

_READ_BYTES = 1 << 18  # the buffer for a single record: a photo and some
NO_PLACE = -1


class Decoder:
    """Makes batches of the records of a split.

    Args:
      files: indexed files; their order gives the file numbers.
      schema: how a record becomes an example.
      decode: from (image string scalar, seed int64 [2]) to an image uint8 [...]; fails at run time if it is damaged.
      image_shape: the shape of what `decode` makes.
      replaces: whether a bad record is replaced by the next good one of its file, cyclically. The choice depends on the
        record alone, not on what was read before, so a resumed run repeats it. Otherwise the place stays black.
    """

    def __init__(
        self,
        files: Sequence[RecordFile],
        schema: Schema,
        decode: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
        image_shape: tuple[int, ...],
        replaces: bool,
    ):
        self._schema, self._decode = schema, decode
        self._image_shape, self._replaces = image_shape, replaces
        counts = [file.num_records for file in files]
        self._counts = tf.constant(counts, tf.int64)
        self._paths = tf.constant([file.path for file in files])
        self._compressions = tf.constant([file.compression for file in files])
        self._begins = tf.constant(np.concatenate([file.bounds[:-1] for file in files]), tf.int64)
        self._firsts = tf.constant(np.cumsum([0, *counts[:-1]]), tf.int64)

    def batches(self, stream: tf.data.Dataset, rows: int, parts: int = 1, part: int = 0) -> tf.data.Dataset:
        """Decodes a stream, in order.

        Guarding every element against failure would cost half as much as decoding it, so a batch is first decoded
        without guards, and only one that fails is decoded again with them.

        Args:
          stream: ((payload string, file int64, record int64), key int64, index int64), scalars: [key, index] is the
            seed of the image. file = record = NO_PLACE is padding.
          rows: elements of a batch; a rest is dropped.
          parts: the number of parts that the batches are divided into.
          part: the part to decode: the batches part, part + parts, part + 2 parts, ...

        Returns:
          Dataset of (images uint8 [rows, *image_shape], labels int32 [rows], weights float32 [rows], bad int64 [rows,
          2]). Weights are 1, and 0 for padding and bad records that are not replaced. bad holds (file, record) where a
          record is bad, and NO_PLACE elsewhere.
        """
        return (
            stream.batch(rows, drop_remainder=True)
            .shard(parts, part)
            .interleave(
                lambda raw, key, index: self._batch(rows, (*raw, key, index)),
                cycle_length=tf.data.AUTOTUNE,
                block_length=1,
                num_parallel_calls=tf.data.AUTOTUNE,
                deterministic=True,
            )
        )

    def _batch(self, rows: int, elements: tuple[tf.Tensor, ...]) -> tf.data.Dataset:
        def parsed(payload, file, record, key, index):
            encoded, labels = self._schema.parse(payload)
            return encoded, tf.stack([key, index], axis=1), labels

        def decoded(encoded, seeds, labels):
            images = tf.data.Dataset.from_tensor_slices((encoded, seeds)).map(self._decode)
            good = labels, tf.ones([rows]), tf.fill([rows, 2], tf.constant(NO_PLACE, tf.int64))
            return tf.data.Dataset.zip(
                images.batch(rows, drop_remainder=True), *map(tf.data.Dataset.from_tensors, good)
            )

        whole = tf.data.Dataset.from_tensors(elements).map(parsed).flat_map(decoded).ignore_errors()
        single = tf.data.Dataset.from_tensor_slices(elements).flat_map(self._second_look)
        return whole.concatenate(single.batch(rows, drop_remainder=True)).take(1)

    def _second_look(self, payload, file, record, key, index) -> tf.data.Dataset:
        """Makes one example, from the payload, the record read again, or the record that replaces a bad one."""
        count = tf.gather(self._counts, tf.maximum(file, 0))
        again = count if self._replaces else tf.ones([], tf.int64)
        attempts = tf.where(file == NO_PLACE, tf.zeros([], tf.int64), 1 + again)

        def attempt(number: tf.Tensor) -> tf.data.Dataset:
            place = (record + tf.maximum(number - 1, 0)) % count
            as_it_came = tf.data.Dataset.from_tensors(payload).take(tf.cast(number == 0, tf.int64))
            read_again = self._read(file, place).take(tf.cast(number > 0, tf.int64))
            made = as_it_came.concatenate(read_again).map(lambda found: self._example(found, tf.stack([key, index])))
            return made.map(lambda image, label: (image, label, number, place)).ignore_errors()

        no_place = tf.constant(NO_PLACE, tf.int64)

        def finish(image, label, number, place):
            self._schema.check_in_graph(label, tf.gather(self._paths, file), place)
            return (
                image,
                tf.cast(label, tf.int32),
                tf.constant(1.0),
                tf.where(number > 1, tf.stack([file, record]), no_place),
            )

        found = tf.data.Dataset.range(attempts).flat_map(attempt).take(1).map(finish)
        blank = tf.zeros(self._image_shape, tf.uint8), tf.constant(0), tf.constant(0.0), tf.stack([file, record])
        nothing = tf.data.Dataset.from_tensors(blank)
        return found.concatenate(nothing.map(self._fail) if self._replaces else nothing).take(1)

    def _fail(self, image, label, weight, bad):
        path, count = tf.gather(self._paths, bad[0]), tf.gather(self._counts, bad[0])
        line = "{}: no good record among {}: fetch the file again"
        with tf.control_dependencies([fail_unless(False, line, path, count)]):
            return tf.identity(image), label, weight, bad

    def _example(self, payload: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        encoded, label = self._schema.features(payload)
        return self._decode(encoded, seed), label

    def _read(self, file: tf.Tensor, record: tf.Tensor) -> tf.data.Dataset:
        """Reads the payload of one record, independent of all others; none where it is damaged."""
        begin = tf.gather(self._begins, tf.gather(self._firsts, file) + record)

        def read(path: tf.Tensor, compression: tf.Tensor) -> tf.Tensor:
            size = tf.constant(_READ_BYTES, tf.int64)
            variant = tf.raw_ops.TFRecordDatasetV2(
                filenames=path[None], compression_type=compression, buffer_size=size, byte_offsets=begin[None]
            )
            return tf.data.experimental.from_variant(variant, tf.TensorSpec([], tf.string)).take(1).get_single_element()

        # Within a map a failure belongs to this element alone; a reader itself would try for ever.
        place = tf.gather(self._paths, file), tf.gather(self._compressions, file)
        return tf.data.Dataset.from_tensors(place).map(read).ignore_errors()
