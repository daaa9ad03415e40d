"""Corrupted files made of real CIFAR-10 records: no crash, no hang, every bad record counted, every good one kept.

What is bad is worked out here from the file format's definition: lengths, CRC-32C, protocol buffer, JPEG.
CONADV_TORTURE=1 (`make torture`) makes all of them, `make test` a share. Every case is drawn from its number alone.
"""

import io
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from helpers import TORTURE
from PIL import Image
from record_data import FOLDER, example_bytes, load, needs_files, payloads, stream, write

CASES = 220 if TORTURE else 11
BATCH = 11  # cases a test
FILES, RECORDS = 3, 6
WAYS = (load, {}), (stream, {"image_size": 32})  # a torture reads every case both ways


def crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


TABLE = crc_table()


def masked_crc(content: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in content:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read(content: bytes) -> tuple[list[bytes | None], bool]:
    """(payloads, None for a wrong checksum of the length or the payload; whether the file ends where a record does).

    A length whose checksum is wrong still says where the next record begins, if that is in the file.
    """
    found: list[bytes | None] = []
    position = 0
    while position < len(content):
        header = content[position : position + 12]
        length = int.from_bytes(header[:8], "little")
        end = position + 16 + length
        if len(header) < 12 or end > len(content):
            return found, False
        payload, crcs = content[position + 12 : end - 4], (header[8:], content[end - 4 : end])
        right = crcs == tuple(struct.pack("<I", masked_crc(of)) for of in (header[:8], payload))
        found.append(payload if right else None)
        position = end
    return found, True


def label_of(payload: bytes | None) -> int | None:
    """The label of a good record; None for a bad one."""
    try:
        feature = tf.train.Example.FromString(payload).features.feature
        image = tf.io.decode_image(feature["image/encoded"].bytes_list.value[0], 3, expand_animations=False)
        (label,) = feature["image/class/label"].int64_list.value
    except Exception:  # of whatever kind: it is no record
        return None
    return label if image.shape == (32, 32, 3) and 0 <= label < 1000 else None


def expected(folder: Path) -> tuple[list[int], int]:
    """(labels of the good records of all files, number of bad ones); the rest of an unreadable file counts as one."""
    good, bad = [], 0
    for path in sorted(folder.glob("train-*")):
        found, whole = read(path.read_bytes())
        labels = [label_of(payload) for payload in found]
        good += [label for label in labels if label is not None]
        bad += labels.count(None) + (not whole)
    return good, bad


def replaced(path: Path, record: int, payload: bytes) -> None:
    content = payloads(path)
    write(path, [*content[:record], payload, *content[record + 1 :]])


def image_of(path: Path, record: int) -> tuple[bytes, int]:
    feature = tf.train.Example.FromString(payloads(path)[record]).features.feature
    return feature["image/encoded"].bytes_list.value[0], feature["image/class/label"].int64_list.value[0]


def flip_bits(draw: random.Random, path: Path, record: int) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 2, 40))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut_file(draw: random.Random, path: Path, record: int) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(1, len(content))])


def append_garbage(draw: random.Random, path: Path, record: int) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randrange(1, 200)))


def cut_image(draw: random.Random, path: Path, record: int) -> None:
    encoded, label = image_of(path, record)
    replaced(path, record, example_bytes(encoded[: draw.randrange(len(encoded))], label))


def flip_image(draw: random.Random, path: Path, record: int) -> None:
    encoded, label = image_of(path, record)
    content = bytearray(encoded)
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    replaced(path, record, example_bytes(bytes(content), label))


def other_format(draw: random.Random, path: Path, record: int) -> None:
    picture, file = np.full((32, 32, 3), 77, np.uint8), io.BytesIO()
    Image.fromarray(picture).save(file, draw.choice(("TIFF", "PPM", "PNG", "BMP", "GIF")))
    replaced(path, record, example_bytes(file.getvalue(), image_of(path, record)[1]))


def garbage_example(draw: random.Random, path: Path, record: int) -> None:
    replaced(path, record, draw.randbytes(draw.randrange(300)))


def cut_example(draw: random.Random, path: Path, record: int) -> None:
    payload = payloads(path)[record]
    replaced(path, record, payload[: draw.randrange(len(payload))])


def missing_field(draw: random.Random, path: Path, record: int) -> None:
    encoded, label = image_of(path, record)
    replaced(
        path, record, draw.choice((example_bytes(None, label), example_bytes(encoded, None), example_bytes(b"", 3)))
    )


def swapped_records(draw: random.Random, path: Path, record: int) -> None:
    content = payloads(path)
    draw.shuffle(content)
    write(path, content)


DAMAGES = (
    flip_bits,
    flip_bits,
    cut_file,
    append_garbage,
    cut_image,
    flip_image,
    other_format,
    garbage_example,
    cut_example,
    missing_field,
    swapped_records,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Files of real images whose labels are their numbers."""
    folder = tmp_path_factory.mktemp("whole")
    images = payloads(FOLDER / "cifar10" / "train-00000-of-00010.tfrecord.gz")
    for file in range(FILES):
        numbers = range(file * RECORDS, (file + 1) * RECORDS)
        encoded = (tf.train.Example.FromString(images[n]).features.feature["image/encoded"] for n in numbers)
        records = [example_bytes(each.bytes_list.value[0], n) for n, each in zip(numbers, encoded, strict=True)]
        write(folder / f"train-{file:05d}-of-{FILES:05d}", records)
    write(
        folder / "test-00000-of-00001", [example_bytes(tf.io.encode_jpeg(np.zeros((32, 32, 3), np.uint8)).numpy(), 1)]
    )
    return folder


def evaluated_labels(loaded) -> list[int]:
    found = []
    for _, labels, weights in loaded.evaluation_batches("train", 4, 1):
        found += labels.numpy()[weights.numpy() > 0].tolist()
    return found


@needs_files
@pytest.mark.parametrize("first", range(0, CASES, BATCH))
def test_corrupted_files_are_read_as_far_as_they_are_good(first, whole, tmp_path):
    found = 0
    for number in range(first, first + BATCH):
        draw, folder = random.Random(number), tmp_path / str(number)
        folder.mkdir()
        for path in whole.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        damage = DAMAGES[number % len(DAMAGES)]
        damage(draw, folder / f"train-{draw.randrange(FILES):05d}-of-{FILES:05d}", draw.randrange(RECORDS))
        good, bad = expected(folder)
        for read_by, settings in WAYS if TORTURE else [WAYS[number % 2]]:
            loaded = read_by(folder, max_bad_records=50, **settings)
            case = (number, damage.__name__, type(loaded).__name__)
            assert sorted(evaluated_labels(loaded)) == sorted(good), case
            assert loaded.bad_records.count == bad, (case, loaded.bad_records.reasons)
        found += bad
    how = "in memory and streamed" if TORTURE else "in memory or streamed"
    print(f"corrupted files {first} to {first + BATCH - 1}: {found} bad records, all counted, {how}")


@needs_files
def test_nothing_of_whole_files_is_bad(whole):
    good, bad = expected(whole)
    assert (good, bad) == (list(range(FILES * RECORDS)), 0)
