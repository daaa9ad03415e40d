"""Records in the ImageNet schema or that of TFDS, read and examined (SPEC section 8).

Reading goes through tf.data; only a record that cannot be decoded is looked at again here, one by one, to say what is
wrong with it. The files are found and indexed by record_files.py.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from google.protobuf import message

from conadv_tf.cache import Cache
from conadv_tf.errors import DataError
from conadv_tf.record_files import BadRecords, RecordFile

_READ_BYTES = 1 << 20
RECORD_SPECS = (tf.TensorSpec([], tf.string),)  # of a Cache of payloads
_ANY_SHAPE = (0, 0, 0)  # in memory, before the first image says which


def fail_unless(condition: tf.Tensor | bool, line: str, *values: tf.Tensor) -> tf.Operation:
    """An operation that fails with the line of a DataError, where it has {} the values, unless the condition holds."""
    texts = [value if value.dtype == tf.string else tf.strings.as_string(value) for value in values]
    fixed = ("DataError: " + line).split("{}")
    pieces = [piece for pair in zip(fixed, [*texts, ""], strict=True) for piece in pair]
    return tf.debugging.Assert(condition, [tf.strings.join(pieces)])


@dataclasses.dataclass(frozen=True)
class Schema:
    """How a record becomes an example.

    Attributes:
      label_offset: the stored label of class 0.
      num_classes: labels must lie in 0..num_classes-1 after the offset; None only forbids negative ones.
      image_feature, label_feature: names of the encoded image and of its int64 label.
    """

    label_offset: int
    num_classes: int | None
    image_feature: str = "image/encoded"
    label_feature: str = "image/class/label"

    def features(self, payloads: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """(images string, labels int64, after the offset and of any size), shaped like the payloads.

        InvalidArgumentError at run time if one is no such record.
        """
        features = tf.io.parse_example(
            payloads,
            {
                self.image_feature: tf.io.FixedLenFeature([], tf.string),
                self.label_feature: tf.io.FixedLenFeature([], tf.int64),
            },
        )
        return features[self.image_feature], features[self.label_feature] - self.label_offset

    def parse(self, payloads: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """(images string, labels int32); InvalidArgumentError at run time if one is unusable or out of range."""
        images, labels = self.features(payloads)
        with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(self._inside(labels)), [labels])]):
            return images, tf.cast(labels, tf.int32)

    def check_label(self, stored: int, path: str, record: int) -> int:
        """The label after the offset; a DataError where it is out of range, which is never skipped."""
        label = stored - self.label_offset
        if self._inside(label):
            return label
        raise DataError(self._label_line().format(path, record, stored, label))

    def check_in_graph(self, label: tf.Tensor, path: tf.Tensor, record: tf.Tensor) -> tf.Operation:
        """The same of a label after the offset, int64 scalar: an operation that fails with the DataError's line."""
        return fail_unless(self._inside(label), self._label_line(), path, record, label + self.label_offset, label)

    def _inside(self, label):
        return (label >= 0) & (label < (self.num_classes or tf.int32.max))

    def _label_line(self) -> str:
        classes = f"0..{self.num_classes - 1}" if self.num_classes else "0, 1, 2, ..."
        return (
            f"{{}}, record {{}}: label {{}} minus data.label_offset={self.label_offset} is {{}}, not in {classes}: set "
            "data.label_offset or data.num_classes to what the files carry"
        )


def raw_records(
    files: Sequence[RecordFile], order: tf.Tensor, shares: int = 1, share: int = 0, kept: Cache | None = None
) -> tf.data.Dataset:
    """Records of the files, in the given order of files, not yet parsed.

    A damaged record hides the rest of its file from TensorFlow's reader; these come as empty payloads, so
    that every record keeps its place and can be read again by its number.

    Args:
      files: indexed files.
      order: int64 [any], indices into `files`.
      shares: records share, share + shares, ... of all files together are read.
      share: likewise.
      kept: keeps the payloads of `RECORD_SPECS`, by their number in all files, and gives them back.

    Returns:
      Dataset of (payload string, file int64, record int64), scalars.
    """
    paths = tf.constant([file.path for file in files])
    compressions = tf.constant([file.compression for file in files])
    counts = tf.constant([file.num_records for file in files], tf.int64)
    firsts = tf.math.cumsum(counts, exclusive=True)

    def read(file: tf.Tensor) -> tf.data.Dataset:
        payloads = _of_file(paths[file], compressions[file])
        lost = tf.data.Dataset.from_tensors("").repeat()
        whole = payloads.ignore_errors().concatenate(lost).take(counts[file])
        begin = (share - firsts[file]) % shares
        numbers = tf.data.Dataset.range(begin, counts[file], shares)
        if shares > 1:
            whole = whole.shard(shares, begin)
        if kept is not None:
            count = tf.maximum(counts[file] - begin + shares - 1, 0) // shares
            keys = tf.data.Dataset.range(firsts[file] + begin, firsts[file] + counts[file], shares)
            whole = kept.through(tf.data.Dataset.zip((whole,)), file, keys, count).map(lambda payload: payload)
        return tf.data.Dataset.zip(whole, tf.data.Dataset.from_tensors(file).repeat(), numbers)

    return tf.data.Dataset.from_tensor_slices(order).flat_map(read)


def _of_file(path: tf.Tensor, compression: tf.Tensor) -> tf.data.Dataset:
    """Payloads of a file; none where it cannot be opened, which TensorFlow's reader would try for ever."""

    def open_once(_: tf.Tensor) -> tf.Tensor:
        return tf.data.TFRecordDataset(path, compression).take(1).get_single_element()

    opened = tf.data.Dataset.from_tensors(0).map(open_once).ignore_errors()
    return opened.flat_map(lambda _: tf.data.TFRecordDataset(path, compression, buffer_size=_READ_BYTES))


def decode_image(encoded: tf.Tensor) -> tf.Tensor:
    """uint8 [H, W, 3] of a JPEG, PNG, BMP, WebP or the first picture of a GIF; fails at run time for what is none."""
    return tf.io.decode_image(encoded, channels=3, expand_animations=False)


def wrong_shape(found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """What is wrong with an image of shape (H, W, C) in memory where all have the expected one."""
    sizes = [f"{height}x{width}" for height, width, _ in (found, expected)]
    return f"image of {sizes[0]}, not {sizes[1]} pixels (data.image_size; data.in_memory=False resizes)"


class Examiner:
    """Looks again, one by one, at records that did not decode.

    Attributes:
      files: indexed files; their order gives the file numbers.
      schema: how a record becomes an example.
      image_shape: (H, W, 3) that every image must have, or None where they are streamed: photos of any size.
      bad_records: where the bad ones are counted.
      tables: of hosts where this process does not run, by device: see decode.count_bad.
    """

    def __init__(
        self,
        files: Sequence[RecordFile],
        schema: Schema,
        bad_records: BadRecords,
        image_shape: tuple[int, int, int] | None = None,
    ):
        self.files, self.schema, self.bad_records = files, schema, bad_records
        self.image_shape = image_shape
        self.tables: dict[str, tf.lookup.experimental.MutableHashTable] = {}

    def payload_or_empty(self, file: int, record: int) -> bytes:
        """The payload if the record is good; b"", and one more bad record, if not.

        Raises:
          DataError: label out of range, or more bad records than allowed.
        """
        payload, fault = self._examine(file, record)
        if fault is None:
            return payload
        self.bad_records.add(self.files[file].path, record, fault)
        return b""

    def look(self, file: int, record: int) -> tuple[str, int, str]:
        """(path, record, what is wrong) of a record that could not be used."""
        _, fault = self._examine(file, record)
        return self.files[file].path, record, fault or "unreadable when it was needed"

    def _examine(self, file: int, record: int) -> tuple[bytes, str | None]:
        path = self.files[file].path
        try:
            payload = self.files[file].read(record)
            return payload, self._fault(payload, path, record)
        except (OSError, tf.errors.OpError) as error:
            return b"", f"unreadable ({str(error).splitlines()[0].split('} ')[-1].split(' [Op:')[0]})"

    def _fault(self, payload: bytes, path: str, record: int) -> str | None:
        try:
            features = tf.train.Example.FromString(payload).features.feature
        except message.DecodeError:
            return "not a tf.train.Example"
        image_feature, label_feature = self.schema.image_feature, self.schema.label_feature
        label, encoded = features[label_feature].int64_list.value, features[image_feature].bytes_list.value
        if len(label) != 1 or len(encoded) != 1:
            return f"feature {image_feature if len(label) == 1 else label_feature} is missing"
        self.schema.check_label(label[0], path, record)
        try:
            shape = tuple(decode_image(encoded[0]).shape)
        except tf.errors.InvalidArgumentError:
            return "corrupt JPEG"
        if self.image_shape is None or self.image_shape in (_ANY_SHAPE, shape):
            return None
        return wrong_shape(shape, self.image_shape)


def _first_shape(examiner: Examiner) -> tuple[int, int, int]:
    """Of the first good image of all files."""
    for number, file in enumerate(examiner.files):
        for record in range(file.num_records):
            if payload := examiner.payload_or_empty(number, record):
                encoded, _ = examiner.schema.parse(tf.constant(payload))
                return tuple(decode_image(encoded).shape)
    raise _none_good(examiner.files)


def _none_good(files: Sequence[RecordFile]) -> DataError:
    return DataError(f"{files[0].path} and the files like it hold no good record: fetch them again")


def _decoded(files: Sequence[RecordFile], schema: Schema, shape: tuple[int, int, int]) -> tf.data.Dataset:
    """Batches of (row int64, image uint8, label int32) of the records that decode; row counts all records."""

    def decode(row: tf.Tensor, raw: tuple[tf.Tensor, ...]) -> tuple[tf.Tensor, ...]:
        encoded, label = schema.parse(raw[0])
        return row, tf.ensure_shape(decode_image(encoded), shape), label

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
      bad_records: where bad ones are counted; they are left out.
      image_shape: (H, W, 3) that every image must have; None takes the first image's.

    Returns:
      (images uint8 [n, H, W, 3], labels int32 [n]) of the n good records.

    Raises:
      DataError: label out of range, more bad records than allowed, or no good one.
    """
    examiner = Examiner(files, schema, bad_records, image_shape or _ANY_SHAPE)
    examiner.image_shape = shape = image_shape or _first_shape(examiner)
    counts = [file.num_records for file in files]
    images, labels = np.zeros((sum(counts), *shape), np.uint8), np.zeros(sum(counts), np.int32)
    good = np.zeros(sum(counts), bool)
    for rows, some_images, some_labels in _decoded(files, schema, shape).as_numpy_iterator():
        images[rows], labels[rows], good[rows] = some_images, some_labels, True
    first_row = np.cumsum([0, *counts])
    for row in np.flatnonzero(~good):
        file = int(np.searchsorted(first_row, row, side="right")) - 1
        if payload := examiner.payload_or_empty(file, int(row - first_row[file])):
            encoded, labels[row] = schema.parse(tf.constant(payload))
            images[row], good[row] = decode_image(encoded).numpy(), True
    if not good.any():
        raise _none_good(files)
    return images[good], labels[good]


def data_error(error: BaseException) -> DataError | None:
    """The DataError, of one line, that an exception from the pipeline is or carries; None if there is none.

    TensorFlow wraps what its threads raise, and gin adds a line to what `data.load` raises.
    """
    text = f"DataError: {error}" if isinstance(error, DataError) else str(error)
    if "Unknown iteration client id" in text:
        return DataError("data.service: one of its processes was started anew: start the same command again")
    # An assertion of TensorFlow's puts brackets around its line.
    found = re.search(r"\[DataError: ([^\n]+)\]|DataError: ([^\n]+)", text)
    return DataError(found.group(1) or found.group(2)) if found else None
