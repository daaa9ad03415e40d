"""Records in the ImageNet schema or TFDS' schema, read and examined; docs/data.md describes the schema.

Reading goes through tf.data; only a record that cannot be decoded is looked at again here, one by one, to say what is
wrong with it. The files are found and indexed by record_files.py.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import tensorflow as tf

from conadv_tf.data.cache import Cache
from conadv_tf.data.record_files import RecordFile
from conadv_tf.errors import DataError

_READ_BYTES = 1 << 20
_NAMED = 12  # features of a record, in a line about it
_LONGEST_VALUE = 30  # characters of a value in such a line
RECORD_SPECS = (tf.TensorSpec([], tf.string),)  # an element of a Cache of payloads


def fail_unless(condition: tf.Tensor | bool, line: str, *values: tf.Tensor) -> tf.Operation:
    """Makes an operation that fails unless the condition holds, with the line of a DataError, {} being the values."""
    texts = [value if value.dtype == tf.string else tf.strings.as_string(value) for value in values]
    fixed = ("DataError: " + line).split("{}")
    pieces = [piece for pair in zip(fixed, [*texts, ""], strict=True) for piece in pair]
    return tf.debugging.Assert(condition, [tf.strings.join(pieces)])


@dataclasses.dataclass(frozen=True)
class Schema:
    """The way a record becomes an example.

    Attributes:
      label_offset: the stored label of class 0.
      num_classes: labels must lie in 0..num_classes-1 after the offset; None only forbids negative ones.
      image_feature, label_feature: names of the encoded image and of its int64 label.
      source: the source of the records, whose settings messages name; "tfds" has no label_offset.
    """

    label_offset: int
    num_classes: int | None
    image_feature: str = "image/encoded"
    label_feature: str = "image/class/label"
    source: str = "tfrecords"

    def features(self, payloads: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Parses payloads into (images string, labels int64, after the offset and of any size), of the same shape.

        Raises:
          InvalidArgumentError: at run time, if a payload is no such record.
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
        """Parses payloads into (images string, labels int32).

        Raises:
          InvalidArgumentError: at run time, if a payload is no such record or a label is out of range.
        """
        images, labels = self.features(payloads)
        with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(self._inside(labels)), [labels])]):
            return images, tf.cast(labels, tf.int32)

    def check_label(self, stored: int, path: str, record: int) -> int:
        """The label after the offset.

        Raises:
          DataError: where the label is out of range, which is never skipped.
        """
        label = stored - self.label_offset
        if self._inside(label):
            return label
        raise DataError(self._label_line().format(path, record, stored, label))

    def check_in_graph(self, label: tf.Tensor, path: tf.Tensor, record: tf.Tensor) -> tf.Operation:
        """Makes an operation that fails with `check_label`'s line; `label` is an int64 scalar after the offset."""
        return fail_unless(self._inside(label), self._label_line(), path, record, label + self.label_offset, label)

    def _inside(self, label):
        return (label >= 0) & (label < (self.num_classes or tf.int32.max))

    def _label_line(self) -> str:
        """The line about a label out of range, with {} for path, record, stored label and class."""
        classes = f"0..{self.num_classes - 1}" if self.num_classes else "0, 1, 2, ..."
        if self.source == "tfds":
            return f"{{}}, record {{}}: label {{}} is class {{}}, not in {classes}: prepare the data set again"
        return (
            f"{{}}, record {{}}: label {{}} minus {self.source}.label_offset={self.label_offset} is {{}}, not in "
            f"{classes}: set {self.source}.label_offset or {self.source}.num_classes to what the files carry"
        )

    def mismatch(self, features: Mapping[str, tf.train.Feature]) -> str | None:
        """What the features of an example are instead of the schema's, on one line; None where both are there."""
        wanted = ((self.image_feature, "bytes_list", "1 bytes"), (self.label_feature, "int64_list", "1 int64"))
        for name, kind, what in wanted:
            if name not in features or not features[name].WhichOneof("kind"):
                named = [f"{other} ({_described(features[other])})" for other in sorted(features)]
                there = ", ".join(named[:_NAMED] + ["..."] * (len(named) > _NAMED))
                return f"feature {name} is missing; there are {there or 'none'}"
            if len(getattr(features[name], kind).value) != 1:
                return f"feature {name} is {_described(features[name])}, not {what}"
        return None

    def mismatch_remedy(self) -> str:
        """The end of the line about records none of which has the features."""
        if self.source == "tfds":
            return "prepare the data set again"
        return (
            f"set {self.source}.image_feature and {self.source}.label_feature to the names in the files, or write the "
            "records again with the image as 1 bytes and the label as 1 int64"
        )

    def wrong_shape(self, found: tuple[int, ...], expected: tuple[int, ...]) -> str:
        """Says what is wrong with an image of shape (H, W, C) in memory where all images have the expected shape."""
        sizes = [f"{height}x{width}" for height, width, _ in (found, expected)]
        settings = f"{self.source}.image_size; {self.source}.in_memory=False resizes"
        return f"image of {sizes[0]}, not {sizes[1]} pixels ({settings})"


def _described(feature: tf.train.Feature) -> str:
    """The number and kind of a feature's values, and a single one itself: "1 float: 3.0"."""
    kind = feature.WhichOneof("kind")
    if not kind:
        return "empty"
    values = getattr(feature, kind).value
    counted = f"{len(values)} {kind.removesuffix('_list')}"
    single = repr(values[0]) if len(values) == 1 else ""
    return f"{counted}: {single}" if 0 < len(single) <= _LONGEST_VALUE else counted


def raw_records(
    files: Sequence[RecordFile],
    order: tf.Tensor,
    shares: int = 1,
    share: int = 0,
    kept: Cache | None = None,
    at_once: int = 1,
) -> tf.data.Dataset:
    """Reads the records of the files, in the given order of files, without parsing them.

    A damaged record hides the rest of its file from TensorFlow's reader; hidden records come as empty payloads, so
    that every record keeps its place and can be read again by its number.

    Args:
      files: indexed files.
      order: int64 [any], indices into `files`.
      shares: the number of shares that all records together are divided into.
      share: the share to read: records share, share + shares, ...
      kept: a cache of `RECORD_SPECS` that keeps the payloads, by their number in all files, and gives them back.
      at_once: the number of files that are read in turn, a record each; 1 reads one after the other.

    Returns:
      Dataset of (payload string, file int64, record int64), scalars.
    """
    paths = tf.constant([file.path for file in files])
    compressions = tf.constant([file.compression for file in files])
    counts = tf.constant([file.num_records for file in files], tf.int64)
    firsts = tf.math.cumsum(counts, exclusive=True)

    def read(file: tf.Tensor) -> tf.data.Dataset:
        payloads = _payloads_of_file(paths[file], compressions[file])
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

    # One thread: many are no faster, since decoding takes a hundred times as long, and cost more.
    return tf.data.Dataset.from_tensor_slices(order).interleave(read, cycle_length=at_once, block_length=1)


def _payloads_of_file(path: tf.Tensor, compression: tf.Tensor) -> tf.data.Dataset:
    """Reads the payloads of a file; none where it cannot be opened, which TensorFlow's reader would try for ever."""

    def open_once(_: tf.Tensor) -> tf.Tensor:
        return tf.data.TFRecordDataset(path, compression).take(1).get_single_element()

    opened = tf.data.Dataset.from_tensors(0).map(open_once).ignore_errors()
    return opened.flat_map(lambda _: tf.data.TFRecordDataset(path, compression, buffer_size=_READ_BYTES))
