"""The index of remote record files; ram://, another file system of TensorFlow's that is not local, stands for gs://."""

import errno
import gzip
import uuid

import numpy as np
import pytest
import tensorflow as tf
from absl import logging

from conadv_tf.data import record_files
from conadv_tf.errors import DataError


@pytest.fixture
def folder() -> str:
    return f"ram://{uuid.uuid4().hex}"


def write(path: str, payloads: list[bytes]) -> str:
    remove(path)
    with tf.io.TFRecordWriter(path) as writer:
        for payload in payloads:
            writer.write(payload)
    return path


def remove(path: str) -> None:
    """ram:// does not cut an existing file when it is written anew."""
    if tf.io.gfile.exists(path):
        tf.io.gfile.remove(path)


def files_of(folder: str, counts=(3, 0, 5)) -> list[str]:
    return [write(f"{folder}/train-{i}", [bytes([i]) * (10 + j) for j in range(n)]) for i, n in enumerate(counts)]


def index(paths: list[str], limit: int = 0) -> list[record_files.RecordFile]:
    return record_files.index_files(paths, record_files.BadRecords(limit))


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    texts: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: texts.append(text % values))
    return texts


def test_an_index_is_kept_and_read_instead_of_the_files(folder, warnings):
    paths = files_of(folder, (3, 1, 5))
    first = index(paths)
    assert [file.num_records for file in first] == [3, 1, 5]
    assert first[2].read(4) == bytes([2]) * 14
    assert len(warnings) == 1
    assert "3 files" in warnings[0]
    for file in first:  # what would be damaged records, if anyone read them
        remove(file.path)
        with tf.io.gfile.GFile(file.path, "wb") as writer:
            writer.write(bytes(file.size))
    second = index(paths)
    for one, other in zip(first, second, strict=True):
        assert (one.path, one.compression, one.size) == (other.path, other.compression, other.size)
        np.testing.assert_array_equal(one.bounds, other.bounds)
    assert len(warnings) == 1


def test_hosts_that_begin_at_once_are_not_told_of_an_index_that_cannot_be_written(folder, warnings, monkeypatch):
    rename = tf.io.gfile.rename

    def another_was_faster(*arguments, **settings):
        rename(*arguments, **settings)
        rename(*arguments, **settings)

    monkeypatch.setattr(tf.io.gfile, "rename", another_was_faster)
    paths = files_of(folder, (3, 1))
    index(paths)
    assert "reads them whole" in warnings[0]
    assert [file.num_records for file in index(paths)] == [3, 1]
    assert len(warnings) == 1


def test_changed_and_new_files_are_indexed_anew(folder, warnings):
    paths = files_of(folder, (3, 1))
    index(paths)
    write(paths[0], [b"longer than before"] * 7)
    paths.append(write(f"{folder}/train-2", [b"new"] * 2))
    assert [file.num_records for file in index(paths)] == [7, 1, 2]
    assert [file.num_records for file in index(paths)] == [7, 1, 2]


def test_damage_is_reported_by_every_run(folder, warnings):
    paths = files_of(folder, (3, 2))
    with tf.io.gfile.GFile(paths[1], "rb") as file:
        content = file.read()
    remove(paths[1])
    with tf.io.gfile.GFile(paths[1], "wb") as file:
        file.write(content[:-5])
    for _ in range(2):
        bad = record_files.BadRecords(5)
        assert [file.num_records for file in record_files.index_files(paths, bad)] == [3, 1]
        assert bad.count == 1
        with pytest.raises(DataError, match="truncated"):
            index(paths)


@pytest.mark.parametrize("content", [b"", b"no index", b"PK\x03\x04 torn"])
def test_a_spoilt_index_is_put_right(folder, warnings, content):
    paths = files_of(folder, (3, 1))
    index(paths)
    remove(record_files.index_path(paths))
    with tf.io.gfile.GFile(record_files.index_path(paths), "wb") as file:
        file.write(content)
    assert [file.num_records for file in index(paths)] == [3, 1]
    assert any("cannot be used" in text for text in warnings)
    warnings.clear()
    assert [file.num_records for file in index(paths)] == [3, 1]
    assert not warnings


def test_local_folders_get_no_index(tmp_path):
    paths = files_of(str(tmp_path), (3, 1))
    index(paths)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train-0", "train-1"]


def test_a_gzip_file_that_the_system_does_not_read_is_no_damaged_one(tmp_path, monkeypatch):
    """Its records would count as one bad one, and the run train without them."""
    path = tmp_path / "train-0"
    write(str(path), [b"record"] * 3)
    path.write_bytes(gzip.compress(path.read_bytes()))

    def fail(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(gzip.GzipFile, "read", fail)
        with pytest.raises(DataError, match=r"cannot read the data: .*Too many open files"):
            index([str(path)], limit=5)
    assert [file.num_records for file in index([str(path)])] == [3]
    torn = tmp_path / "train-1"
    torn.write_bytes(path.read_bytes()[:-8] + bytes(8))  # the sum and the length of the bytes
    assert [file.damaged for file in index([str(path), str(torn)], limit=5)] == [False, True]
