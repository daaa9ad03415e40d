"""The names of classes: kept in a text file, or in the records themselves."""

import os
from collections.abc import Sequence

import tensorflow as tf
from absl import logging

from conadv_tf import paths
from conadv_tf.data import record_files, records
from conadv_tf.errors import DataError, one_line

FILE = "classes.txt"
_TEXT_FEATURE = "image/class/text"


def text_of(names: Sequence[str]) -> str:
    """The content of the file: a name a line, in the order of the labels."""
    return "".join(f"{name}\n" for name in names)


def beside(folder: str) -> list[str] | None:
    """Reads the file of a folder, local or gs://; None where there is none, or an unreadable one, which is warned of.

    Bytes that are not UTF-8, as names of folders may have, become question marks.
    """
    path = os.path.join(folder, FILE)
    try:
        if not paths.exists(path):
            return None
        with paths.opened(path) as file:
            text = file.read().decode("utf-8-sig", "replace")
    except (OSError, tf.errors.OpError) as error:
        logging.warning("%s cannot be read (%s): the classes have no names", path, one_line(error))
        return None
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def within(files: Sequence[str], schema: records.Schema, num_classes: int) -> list[str] | None:
    """Reads records until each class has shown its name, "image/class/text".

    Args:
      files: the files of a split.
      schema: how a record becomes an example.
      num_classes: the number of classes.

    Returns:
      names by label; the label itself for a class of which no record was met. None where the first record that has a
      label has no such text.
    """
    features = {
        schema.label_feature: tf.io.FixedLenFeature([], tf.int64),
        _TEXT_FEATURE: tf.io.FixedLenFeature([], tf.string, ""),
    }

    def named(payload: tf.Tensor, file: tf.Tensor, record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        parsed = tf.io.parse_single_example(payload, features)
        return parsed[schema.label_feature] - schema.label_offset, parsed[_TEXT_FEATURE]

    found: dict[int, str] = {}
    try:
        indexed = record_files.index_files(files, record_files.BadRecords(len(files)))
        payloads = records.raw_records(indexed, tf.range(len(files), dtype=tf.int64))
        for label, text in payloads.map(named).ignore_errors().as_numpy_iterator():
            found.setdefault(int(label), text.decode("utf-8", "replace"))
            if not any(found.values()):
                return None
            if len(found) >= num_classes:
                break
    except (DataError, OSError, tf.errors.OpError) as error:
        logging.warning("%s and the files like it cannot be read for names of classes (%s)", files[0], one_line(error))
    return [found.get(label) or str(label) for label in range(num_classes)] if found else None
