"""Plain readings and writings of TFRecord files for tests, and small data sets made of them."""

import gzip
import io
import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from sample_data import FOLDER

from conadv_tf import data
from conadv_tf.data import augment, record_files
from conadv_tf.data.memory import MemoryData

needs_files = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"no sample data in {FOLDER}: set CONADV_TEST_DATA to run this test"
)


def payloads(path: Path) -> list[bytes]:
    """The records by the file format's definition, checksums not looked at."""
    content = path.read_bytes()
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    found, position = [], 0
    while position < len(content):
        length = struct.unpack("<Q", content[position : position + 8])[0]
        found.append(content[position + 12 : position + 12 + length])
        position += length + 16
    return found


def plain_example(payload: bytes) -> tuple[np.ndarray, int]:
    feature = tf.train.Example.FromString(payload).features.feature
    encoded = feature["image/encoded"].bytes_list.value[0]
    image = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    return image, feature["image/class/label"].int64_list.value[0]


def jpeg(image: np.ndarray) -> bytes:
    return tf.io.encode_jpeg(image, quality=100).numpy()


def example_bytes(encoded: bytes | None, label: int | None) -> bytes:
    feature = {}
    if encoded is not None:
        feature["image/encoded"] = tf.train.Feature(bytes_list=tf.train.BytesList(value=[encoded]))
    if label is not None:
        feature["image/class/label"] = tf.train.Feature(int64_list=tf.train.Int64List(value=[label]))
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


def write(path: Path, records_: list[bytes], compression: str = "") -> None:
    with tf.io.TFRecordWriter(str(path), compression) as writer:
        for record in records_:
            writer.write(record)


def flip_byte(path: Path, record: int, byte: int = 100) -> None:
    """Damages one payload byte of a plain file, so that the record's checksum is wrong."""
    begin = sum(len(payload) + 16 for payload in payloads(path)[:record])
    content = bytearray(path.read_bytes())
    content[begin + 12 + byte] ^= 0xFF
    path.write_bytes(content)


def numbered(count: int, first: int = 0, size: int = 16) -> list[bytes]:
    """Records whose label is their number and whose image is one grey level, 5 + 10 * (number % 25)."""
    return [
        example_bytes(jpeg(np.full((size, size, 3), 5 + 10 * (number % 25), np.uint8)), number)
        for number in range(first, first + count)
    ]


def make_folder(folder: Path, counts: tuple[int, ...] = (7, 6, 8), size: int = 16) -> Path:
    firsts = np.cumsum((0, *counts))
    for number, count in enumerate(counts):
        write(folder / f"train-{number:05d}-of-{len(counts):05d}", numbered(count, int(firsts[number]), size))
    write(folder / "validation-00000-of-00001", numbered(5, 0, size))
    return folder


def load(folder: Path, **arguments) -> data.ImageData:
    return data.load(**{"source": "tfrecords", "data_dir": str(folder), "num_classes": 1000, **arguments})


def stream(folder: Path, **arguments) -> data.ImageData:
    return load(folder, **{"in_memory": False, "image_size": 8, "shuffle_buffer": 4, **arguments})


def take(batches: tf.data.Dataset, count: int) -> tuple[np.ndarray, ...]:
    """The rows of the first `count` batches, concatenated."""
    taken = list(itertools.islice(batches.as_numpy_iterator(), count))
    assert len(taken) == count
    return tuple(np.concatenate(parts) for parts in zip(*taken, strict=True))


def counting(size: int, augmentation: str = "none", test_size: int = 5) -> MemoryData:
    """Data in memory whose labels are the example numbers."""

    def split(count):
        labels = np.arange(count, dtype=np.int32)
        images = np.random.default_rng(0).integers(1, 256, (count, 8, 8, 1), np.uint8)
        return images, labels

    return MemoryData(
        "counting",
        max(size, test_size),
        {"train": split(size), "test": split(test_size)},
        augment.Augmentation(augmentation),
        record_files.BadRecords(0),
    )
