"""Damaged, missing and impossible data: counted, reported, skipped up to a limit, or refused in one line."""

import logging.handlers
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from record_data import (
    FOLDER,
    counting,
    example_bytes,
    flip_byte,
    jpeg,
    load,
    make_folder,
    needs_files,
    numbered,
    payloads,
    stream,
    take,
    write,
)

from conadv_tf import data
from conadv_tf.errors import ConfigError, DataError, data_error


def raises_data_error(folder: Path, in_memory: bool, **arguments) -> str:
    """Loads and reads two passes; the one line of the DataError that must come of it."""
    with pytest.raises((DataError, tf.errors.OpError)) as caught:
        take((load if in_memory else stream)(folder, **arguments).train_batches(7, 1), 6)
    found = data_error(caught.value)
    assert found is not None
    assert "\n" not in str(found)
    return str(found)


def corrupt(encoded: bytes) -> bytes:
    return encoded[: len(encoded) // 3]


DAMAGES = {
    "wrong checksum": lambda path: flip_byte(path, 2),
    "corrupt JPEG": lambda path: replace_record(path, 2, corrupt(jpeg_of(path, 2)), 2),
    "no JPEG": lambda path: replace_record(path, 2, b"not a picture\0\0", 2),
    "no image": lambda path: replace_record(path, 2, None, 2),
    "no label": lambda path: replace_record(path, 2, jpeg_of(path, 2), None),
    "no example": lambda path: replace_payload(path, 2, b"\xff\xff nonsense"),
}
REASONS = {
    "wrong checksum": "unreadable (corrupted record",
    "corrupt JPEG": "corrupt JPEG",
    "no JPEG": "no image, where JPEG, PNG, BMP, WebP or GIF is decoded",
    "no image": "image/encoded is missing; there are image/class/label (1 int64: 2)",
    "no label": "image/class/label is missing; there are image/encoded (1 bytes)",
    "no example": "not a tf.train.Example",
}


def jpeg_of(path: Path, record: int) -> bytes:
    feature = tf.train.Example.FromString(payloads(path)[record]).features.feature
    return feature["image/encoded"].bytes_list.value[0]


def replace_record(path: Path, record: int, encoded: bytes | None, label: int | None) -> None:
    replace_payload(path, record, example_bytes(encoded, label))


def replace_payload(path: Path, record: int, payload: bytes) -> None:
    content = payloads(path)
    write(path, [*content[:record], payload, *content[record + 1 :]])


@pytest.fixture(scope="module", params=[True, False], ids=["in memory", "streamed"])
def damaged(request, tmp_path_factory):
    """Six files, each with another damage in record 2 of four; what was read of them, and what was said."""
    folder, kept = tmp_path_factory.mktemp("damaged"), logging.handlers.BufferingHandler(1000)
    make_folder(folder, (4,) * len(DAMAGES))
    paths = {damage: folder / f"train-{number:05d}-of-00006" for number, damage in enumerate(DAMAGES)}
    for damage, path in paths.items():
        DAMAGES[damage](path)
    logging.getLogger().addHandler(kept)
    try:
        loaded = (load if request.param else stream)(folder, max_bad_records=6)
        labels = take(loaded.train_batches(18 if request.param else 24, 1), 2)[1].reshape(2, -1)
        evaluated = loaded.examples("train", 30)[1]
    finally:
        logging.getLogger().removeHandler(kept)
    said = [record.getMessage() for record in kept.buffer if record.levelno >= logging.WARNING]
    return request.param, paths, loaded.bad_records, labels, evaluated, said


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_record_is_skipped_counted_and_reported(damaged, damage):
    in_memory, paths, bad_records, labels, evaluated, said = damaged
    path, first = paths[damage], 4 * list(DAMAGES).index(damage)
    np.testing.assert_array_equal(evaluated[evaluated // 4 == first // 4], [first, first + 1, first + 3])
    for epoch in labels:
        expected = [0, 1, *([] if in_memory else [3]), 3]  # the next one takes its place
        np.testing.assert_array_equal(np.sort(epoch[epoch // 4 == first // 4]), first + np.array(expected))
    assert bad_records.per_file() == {str(other): 1 for other in paths.values()}
    assert REASONS[damage] in bad_records.reasons[str(path), 2]
    assert sum(str(path) in line and "record 2" in line for line in said) == 1


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("damage", ["wrong checksum", "corrupt JPEG"])
def test_a_bad_record_beyond_the_limit_ends_the_run(tmp_path, damage, in_memory):
    path = make_folder(tmp_path) / "train-00000-of-00003"
    DAMAGES[damage](path)
    line = raises_data_error(tmp_path, in_memory, max_bad_records=0)
    assert str(path) in line
    assert "record 2" in line
    assert "max_bad_records=0" in line
    assert REASONS[damage] in line


def test_a_resumed_stream_replaces_a_bad_record_by_the_same_image(tmp_path):
    flip_byte(make_folder(tmp_path) / "train-00000-of-00003", 2)
    replace_record(tmp_path / "train-00001-of-00003", 5, b"", 12)  # the last one of its file
    whole = take(stream(tmp_path, augmentation="resized_crop_flip").train_batches(1, 1), 40)
    for start in (8, 30):
        tail = take(stream(tmp_path, augmentation="resized_crop_flip").train_batches(5, 1, start), 2)
        np.testing.assert_array_equal(whole[0][start : start + 10], tail[0])
        np.testing.assert_array_equal(whole[1][start : start + 10], tail[1])


@pytest.mark.parametrize("in_memory", [True, False])
def test_two_bad_records_in_a_row_and_a_limit_over_all_files(tmp_path, in_memory):
    make_folder(tmp_path)
    for record in (1, 2):
        flip_byte(tmp_path / "train-00000-of-00003", record)
    flip_byte(tmp_path / "train-00001-of-00003", 0)
    assert "3 bad records" in raises_data_error(tmp_path, in_memory, max_bad_records=2)
    loaded = (load if in_memory else stream)(tmp_path, max_bad_records=3)
    take(loaded.train_batches(7, 1), 3)
    assert loaded.bad_records.count == 3
    assert "2 in" in loaded.bad_records.report()


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("compression", ["", "GZIP"])
def test_a_truncated_file_gives_its_whole_records(tmp_path, in_memory, compression):
    make_folder(tmp_path)
    path = tmp_path / "train-00001-of-00003"
    write(path, numbered(6, 7), compression)
    path.write_bytes(path.read_bytes()[:-60])
    loaded = (load if in_memory else stream)(tmp_path, max_bad_records=1)
    assert loaded.bad_records.count == 1
    assert 15 <= loaded.num_train < 21
    labels = take(loaded.train_batches(loaded.num_train, 1), 1)[1]
    assert set(range(7)) | set(range(13, 21)) <= set(labels)
    line = raises_data_error(tmp_path, in_memory, max_bad_records=0)
    assert str(path) in line
    assert "is lost" in line


@pytest.mark.parametrize("in_memory", [True, False])
def test_an_empty_file_and_one_that_is_no_tfrecord(tmp_path, in_memory):
    path = make_folder(tmp_path) / "train-00001-of-00003"
    path.write_bytes(b"")
    line = raises_data_error(tmp_path, in_memory)
    assert str(path) in line
    assert "empty" in line
    path.write_text("<html>404, and certainly no TFRecord file</html>")
    assert "no TFRecord" in raises_data_error(tmp_path, in_memory, max_bad_records=0)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(
    ("arguments", "label"),
    [
        ({"label_offset": 1}, "label 0 minus tfrecords.label_offset=1 is -1, not in 0..999"),
        ({"num_classes": 20}, "label 20 minus tfrecords.label_offset=0 is 20, not in 0..19"),
    ],
)
def test_a_label_out_of_range_is_never_skipped(tmp_path, in_memory, arguments, label):
    line = raises_data_error(make_folder(tmp_path), in_memory, max_bad_records=100, **arguments)
    assert label in line
    assert line.startswith(f"{tmp_path}/train-0000")
    assert ", record " in line
    assert "set tfrecords.label_offset or tfrecords.num_classes" in line


def test_a_label_out_of_range_stops_evaluation(tmp_path):
    make_folder(tmp_path)
    write(tmp_path / "validation-00000-of-00001", [example_bytes(jpeg(np.zeros((8, 8, 3), np.uint8)), 5000)])
    with pytest.raises(tf.errors.OpError) as caught:
        stream(tmp_path).examples("test", 1)
    path = tmp_path / "validation-00000-of-00001"
    assert str(data_error(caught.value)).startswith(f"{path}, record 0: label 5000 minus tfrecords.label_offset=0")


def test_a_png_among_jpegs_is_used(tmp_path):
    path = make_folder(tmp_path, size=8) / "train-00001-of-00003"
    shades = np.arange(32, dtype=np.uint8) * 7
    picture = np.stack(np.broadcast_arrays(shades[:, None], shades[None], np.uint8(90)), axis=-1)
    replace_record(path, 3, tf.io.encode_png(picture).numpy(), 10)
    loaded = stream(tmp_path, image_size=28)  # what is left of 32 pixels
    images, labels = loaded.examples("train", 21)
    np.testing.assert_array_equal(labels, np.arange(21))
    assert np.abs(images[10].astype(int) - picture[2:30, 2:30]).mean() < 2
    np.testing.assert_array_equal(np.sort(take(loaded.train_batches(7, 1), 3)[1]), np.arange(21))
    assert loaded.bad_records.count == 0


def test_a_file_without_a_good_record_and_one_that_is_gone(tmp_path):
    path = make_folder(tmp_path, (2, 3)) / "train-00000-of-00002"
    loaded = stream(tmp_path)
    path.unlink()
    with pytest.raises(tf.errors.OpError) as caught:
        take(loaded.train_batches(5, 1), 1)
    assert str(data_error(caught.value)) == f"{path}: no good record among 2: fetch the file again"


def test_a_bad_record_has_no_weight_in_streamed_evaluation(tmp_path):
    path = make_folder(tmp_path) / "validation-00000-of-00001"
    replace_record(path, 1, b"no picture", 1)
    loaded = stream(tmp_path)
    images, labels, weights = take(loaded.evaluation_batches("test", 4, 1), 2)
    np.testing.assert_array_equal(weights, [1, 0, 1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(labels, [0, 0, 2, 3, 4, 0, 0, 0])
    assert not images[1].any()
    assert loaded.bad_records.count == 1


def test_images_in_memory_must_be_of_one_size(tmp_path):
    path = make_folder(tmp_path) / "train-00001-of-00003"
    replace_record(path, 3, jpeg(np.zeros((16, 12, 3), np.uint8)), 10)
    loaded = load(tmp_path, max_bad_records=1)
    assert loaded.image_shape == (16, 16, 3)
    assert "16x12, not 16x16" in loaded.bad_records.reasons[str(path), 3]
    line = raises_data_error(tmp_path, True, image_size=32, max_bad_records=0)
    assert "16x16, not 32x32" in line
    assert "tfrecords.image_size" in line


def test_missing_files_and_directories(tmp_path):
    with pytest.raises(DataError, match=r"is no directory: point --data_dir"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no file matching 'train-\*'"):
        load(tmp_path)
    write(tmp_path / "train-0", numbered(1))
    with pytest.raises(DataError, match=r"'validation-\*' or 'test-\*'.*tfrecords.test_files"):
        load(tmp_path)
    write(tmp_path / "test-0", numbered(1))
    with pytest.raises(DataError, match=r"'training-\*'.*tfrecords.train_files"):
        load(tmp_path, train_files="training-*")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "mnist"}, r"data.source='mnist'"),
        ({"augmentation": "cutout"}, r"digits.augmentation='cutout'"),
        ({"augmentation": "resized_crop_flip"}, r"digits.augmentation='resized_crop_flip'"),
        ({"source": "tfrecords"}, r"data_dir=None"),
        ({"data_dir": "/somewhere"}, r"data_dir='/somewhere'"),
        ({"num_classes": 12}, r"num_classes=12 is no setting of data.source='digits'"),
        ({"image_size": 32}, r"image_size=32 is no setting of data.source='digits'"),
        ({"source": "tfrecords", "data_dir": "/", "in_memory": False}, r"tfrecords.num_classes=None"),
        ({"source": "tfrecords", "data_dir": "/", "max_bad_records": -1}, r"data.max_bad_records=-1"),
    ],
)
def test_impossible_settings(arguments, message):
    with pytest.raises(ConfigError, match=message):
        data.load(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [{"rows_per_replica": 0}, {"num_replicas": 0}, {"num_hosts": 2}, {"host": 1}, {"start_position": -1}],
)
def test_impossible_layouts(arguments):
    with pytest.raises(ConfigError, match=f"{next(iter(arguments))}={next(iter(arguments.values()))}"):
        counting(9).train_batches(**{"rows_per_replica": 2, "num_replicas": 3, **arguments})


def test_unknown_split_and_unsplittable_start(tmp_path):
    streamed = stream(make_folder(tmp_path))
    with pytest.raises(ConfigError, match="split='valid'"):
        streamed.evaluation_steps("valid", 4, 1)
    with pytest.raises(ConfigError, match="start_position=3"):
        streamed.train_batches(1, 2, start_position=3, num_hosts=2)


@needs_files
def test_a_damaged_cifar_file(tmp_path):
    content = (FOLDER / "cifar10" / "test-00000-of-00002.tfrecord.gz").read_bytes()
    (tmp_path / "test-0").write_bytes(content)
    (tmp_path / "train-0").write_bytes(content[: len(content) // 2])
    loaded = load(tmp_path, num_classes=10)
    assert 2000 < loaded.num_train < 3000
    assert loaded.num_test == 5000
    assert list(loaded.bad_records.per_file().values()) == [1]
    np.testing.assert_array_equal(loaded.examples("train", 2000)[1], loaded.examples("test", 2000)[1])


@needs_files
def test_a_damaged_imagenet_file(tmp_path):
    source = FOLDER / "imagenet_sample" / "train-00000-of-00002"
    path = tmp_path / "train-0"
    path.write_bytes(source.read_bytes())
    (tmp_path / "test-0").write_bytes(source.read_bytes())
    flip_byte(path, 3, 9000)
    arguments = {"label_offset": 1, "max_bad_records": 0}
    line = raises_data_error(tmp_path, False, **arguments)
    assert f"{path}, record 3: unreadable (corrupted record" in line
    # The photos differ in size, which memory does not take.
    assert "tfrecords.in_memory=False resizes" in raises_data_error(tmp_path, True, **arguments)


SERVER = """
import sys, time
import tensorflow as tf
cluster = tf.train.ClusterSpec({"worker": [sys.argv[1]]})
tf.distribute.Server(cluster, job_name="worker", task_index=0, start=True)
time.sleep(100)
"""
REMOTE = """
import sys
from pathlib import Path
import tensorflow as tf
from record_data import stream, take
from conadv_tf.errors import data_error
tf.config.experimental_connect_to_host(sys.argv[1], "worker")
for limit in (2, 0):
    loaded = stream(Path(sys.argv[2]), max_bad_records=limit)
    with tf.device("/job:worker/replica:0/task:0/device:CPU:0"):
        try:
            labels = take(loaded.train_batches(21, 1), 2)[1]
            _, tested, weights = take(loaded.evaluation_batches("test", 5, 1), 1)
        except tf.errors.OpError as error:
            print(data_error(error))
            continue
    print(sorted(labels.tolist()), weights.tolist(), loaded.bad_records.count, loaded.bad_records.report())
    print(*loaded.bad_records.reasons.values())
"""


@pytest.mark.long
def test_a_bad_record_on_an_input_host_without_our_python(tmp_path):
    """A process that only serves TensorFlow stands for the other hosts of a TPU pod."""
    make_folder(tmp_path)
    flip_byte(tmp_path / "train-00000-of-00003", 2)
    replace_record(tmp_path / "validation-00000-of-00001", 1, b"no picture", 1)
    with socket.create_server(("localhost", 0)) as free:
        address = f"localhost:{free.getsockname()[1]}"
    tests = Path(__file__).parent
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
    server = subprocess.Popen([sys.executable, "-c", SERVER, address], env=environment)
    try:
        outcome = subprocess.run(
            [sys.executable, "-c", REMOTE, address, str(tmp_path)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=90,
        )
    finally:
        server.kill()
        server.wait()
    assert outcome.returncode == 0, outcome.stderr
    labels, reasons, refused = outcome.stdout.splitlines()
    expected = sorted([0, 1, 3, *range(3, 21)] * 2)
    assert labels.startswith(f"{expected} [1.0, 0.0, 1.0, 1.0, 1.0] 2 2 bad records skipped (at most 2): 1 in ")
    assert reasons == "unreadable (corrupted record at 12) no image, where JPEG, PNG, BMP, WebP or GIF is decoded"
    place = f"{tmp_path}/train-00000-of-00003, record 2"
    assert refused.startswith(f"{place}: cannot be used; with it its host has met more bad records than")
    assert refused.endswith("data.max_bad_records=0: repair the file or raise data.max_bad_records")
