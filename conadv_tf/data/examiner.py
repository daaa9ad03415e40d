"""Bad records: what is wrong with each, and how many there are."""

import itertools
import os
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf
from google.protobuf import message

from conadv_tf.data import pictures
from conadv_tf.data.decode import NO_PLACE
from conadv_tf.data.record_files import BadRecords, RecordFile
from conadv_tf.data.records import Schema, fail_unless
from conadv_tf.errors import DataError

_LEAST_EXAMINED = 10  # records, before all are taken for another kind of data
ANY_SHAPE = (0, 0, 0)  # in memory, before the first image has shown its shape


class Examiner:
    """Looks again, one by one, at records that did not decode.

    Attributes:
      files: indexed files; their order gives the file numbers.
      schema: how a record becomes an example.
      image_shape: (H, W, 3) that every image must have, or None where they are streamed: photos of any size.
      bad_records: the count of bad records.
      tables: tables on hosts where this process does not run, by device: see `count_bad`.
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
        """Returns the payload if the record is good; b"", and one more bad record, if not.

        Raises:
          DataError: label out of range, or more bad records than allowed.
        """
        payload, fault = self._examine(file, record)
        if fault is None:
            return payload
        self.bad_records.add(self.files[file].path, record, fault)
        return b""

    def look(self, file: int, record: int) -> tuple[str, int, str]:
        """Returns (path, record, what is wrong) for a record that could not be used."""
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
        mismatch = self.schema.mismatch(features)
        if mismatch:
            return mismatch
        (encoded,) = features[self.schema.image_feature].bytes_list.value
        (label,) = features[self.schema.label_feature].int64_list.value
        self.schema.check_label(label, path, record)
        try:
            shape = tuple(pictures.decode_image(encoded).shape)
        except tf.errors.InvalidArgumentError:
            return pictures.fault(encoded)
        if self.image_shape is None or self.image_shape in (ANY_SHAPE, shape):
            return None
        return self.schema.wrong_shape(shape, self.image_shape)


def check_schema(files: Sequence[RecordFile], schema: Schema, bad_records: BadRecords) -> None:
    """Checks that records have the features of a schema, by the first one that does.

    A few other records are bad ones, counted when they are met. Where there are only such, the data are of another
    kind, and skipping them would hide that.

    Raises:
      DataError: if the first records lack them, more than there may be bad ones; unreadable ones say nothing.
    """
    first_fault = ""
    places = ((file, record) for file in files for record in range(file.num_records))
    for file, record in itertools.islice(places, max(bad_records.limit + 1, _LEAST_EXAMINED)):
        try:
            features = tf.train.Example.FromString(file.read(record)).features.feature
        except (OSError, tf.errors.OpError, message.DecodeError):
            continue
        fault = schema.mismatch(features)
        if fault is None:
            return
        first_fault = first_fault or f"{file.path}, record {record}: {fault}"
    if first_fault:
        raise DataError(f"{first_fault}: {schema.mismatch_remedy()}")


def count_bad(batches: tf.data.Dataset, examiner: Examiner) -> tf.data.Dataset:
    """Counts the records that `Decoder.batches` found bad, on the host whose device is in scope.

    In this process the examiner looks at each bad record; elsewhere the record's place is kept in a table of that host,
    where `BadRecords.count` finds it.

    Returns:
      Dataset of (images, labels, weights).

    Raises:
      DataError: within a tf.errors exception while iterating: more bad records than allowed, elsewhere on that host.
    """
    note = _note_here(examiner) if _python_runs_here() else _note_there(examiner)

    def counted(images, labels, weights, bad):
        places = tf.boolean_mask(bad, bad[:, 0] != NO_PLACE)
        noted = tf.cond(tf.size(places) > 0, lambda: note(places), lambda: tf.constant(0, tf.int64))
        with tf.control_dependencies([noted]):
            return tf.identity(images), labels, weights

    return batches.map(counted)


def _python_runs_here() -> bool:
    """Tells whether the device in scope belongs to this process. TensorFlow shows it only by running Python there."""

    def process() -> np.int64:
        return np.int64(os.getpid())

    def probe() -> tf.Tensor:
        return tf.numpy_function(process, [], tf.int64)

    try:
        # Traced once, as it is run once: TensorFlow warns of a tf.function that is made again and again.
        return int(tf.function(probe, autograph=False).get_concrete_function()()) == os.getpid()
    except tf.errors.OpError:
        return False


def _note_here(examiner: Examiner) -> Callable[[tf.Tensor], tf.Tensor]:
    def look(places: np.ndarray) -> np.int64:
        for file, record in places:
            examiner.bad_records.add(*examiner.look(int(file), int(record)))
        return np.int64(len(places))

    return lambda places: tf.numpy_function(look, [places], tf.int64)


def _note_there(examiner: Examiner) -> Callable[[tf.Tensor], tf.Tensor]:
    bad_records, paths = examiner.bad_records, tf.constant([file.path for file in examiner.files])
    table = examiner.tables.get(paths.device)
    if table is None:
        table = examiner.tables[paths.device] = tf.lookup.experimental.MutableHashTable(tf.int64, tf.int64, 0)
        bad_records.add_source(lambda: [examiner.look(int(key) >> 32, int(key) % 2**32) for key in table.export()[0]])

    def note(places: tf.Tensor) -> tf.Tensor:
        line = (
            "{}, record {}: cannot be used; with it its host has met more bad records than data."
            f"max_bad_records={bad_records.limit}: repair the file or raise data.max_bad_records"
        )
        with tf.control_dependencies([table.insert(places[:, 0] * 2**32 + places[:, 1], places[:, 1])]):
            size = table.size()
        place = tf.gather(paths, places[0, 0]), places[0, 1]
        with tf.control_dependencies([fail_unless(size <= bad_records.limit, line, *place)]):
            return tf.identity(size)

    return note
