"""Records in the ImageNet schema or that of TFDS, read and examined (SPEC section 8).

Reading goes through tf.data; only a record that cannot be decoded is looked at again here, one by one, to say what is
wrong with it. The files are found and indexed by record_files.py.
"""

import dataclasses
from collections.abc import Sequence

import tensorflow as tf

from conadv_tf.data.cache import Cache
from conadv_tf.data.record_files import RecordFile
from conadv_tf.errors import DataError

_READ_BYTES = 1 << 20
RECORD_SPECS = (tf.TensorSpec([], tf.string),)  # of a Cache of payloads


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
