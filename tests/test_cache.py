"""stream.cache: the same batches, from memory alone once a host has read its share."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import some_of
from record_data import flip_byte, load, make_folder, stream, take

from conadv_tf import data
from conadv_tf.data.cache import Cache
from conadv_tf.errors import ConfigError


def batches(loaded: data.ImageData, hosts: int, host: int, start: int = 0) -> tf.data.Dataset:
    return loaded.train_batches(2, hosts, start, seed=3, num_hosts=hosts, host=host)


def train(loaded: data.ImageData, hosts: int, host: int, count: int, start: int = 0):
    return take(batches(loaded, hosts, host, start), count)


def evaluation(loaded: data.ImageData, split: str, hosts: int, host: int):
    batches = loaded.evaluation_batches(split, 4, hosts, hosts, host)
    return take(batches, loaded.evaluation_steps(split, 4, hosts, hosts))


def assert_same(one, other) -> None:
    for left, right in zip(one, other, strict=True):
        np.testing.assert_array_equal(left, right)


# Of three files: all, and every other record.
@pytest.mark.parametrize(("hosts", "host"), some_of([(1, 0), (2, 1)], (2, 1), otherwise="long"))
def test_batches_are_the_same_and_no_file_is_needed_after_a_pass(tmp_path, hosts, host):
    make_folder(tmp_path)
    flip_byte(tmp_path / "train-00001-of-00003", 2)
    plain, cached = (stream(tmp_path, augmentation="resized_crop_flip", cache=cache) for cache in ("none", "memory"))
    expected, resumed = train(plain, hosts, host, 40), train(plain, hosts, host, 20, start=16 * hosts)
    evaluated = evaluation(plain, "train", hosts, host)
    passes = batches(cached, hosts, host)
    assert_same(take(passes, 2), (part[:4] for part in expected))  # dropped within the pass
    assert_same(take(passes, 40), expected)
    assert_same(evaluation(cached, "train", hosts, host), evaluated)
    assert cached.bad_records.reasons == plain.bad_records.reasons
    assert 9 not in expected[1]
    (tmp_path / "train-00000-of-00003").unlink()
    (tmp_path / "train-00002-of-00003").unlink()  # the other one is read for what replaces its bad record
    assert_same(take(passes, 40), expected)
    assert_same(train(cached, hosts, host, 20, start=16 * hosts), resumed)
    assert cached.bad_records.reasons == plain.bad_records.reasons


@pytest.mark.parametrize(("hosts", "host"), some_of([(1, 0), (2, 1)], (2, 1), otherwise="long"))
def test_test_images_are_decoded_once(tmp_path, hosts, host):
    make_folder(tmp_path)
    flip_byte(tmp_path / "validation-00000-of-00001", 1)
    plain, cached = stream(tmp_path), stream(tmp_path, cache="memory")
    expected = evaluation(plain, "test", hosts, host)
    batches = cached.evaluation_batches("test", 4, hosts, hosts, host)
    take(batches, 1)
    assert_same(take(batches, cached.evaluation_steps("test", 4, hosts, hosts)), expected)
    (tmp_path / "validation-00000-of-00001").unlink()
    assert_same(evaluation(cached, "test", hosts, host), expected)
    assert cached.bad_records.count == plain.bad_records.count == (1 if hosts == 1 or host == 1 else 0)


def test_a_look_at_the_first_examples_keeps_nothing(tmp_path):
    loaded = stream(make_folder(tmp_path), cache="memory")
    loaded.examples("test", 5)
    (tmp_path / "validation-00000-of-00001").unlink()
    assert not take(loaded.evaluation_batches("test", 1, 1), 5)[2].any()
    assert loaded.bad_records.count == 5


def test_elements_of_a_group_are_kept_when_it_was_read_to_its_end():
    cache = Cache((tf.TensorSpec([2], tf.float32), tf.TensorSpec([], tf.string)))
    source = tf.data.Dataset.from_tensor_slices(([[1.0, 2.0], [3.0, 4.0]], ["a", ""]))
    nothing = source.map(lambda *element: (element[0] * 0, element[1] + "x"))
    group, count = tf.constant(7, tf.int64), tf.constant(2, tf.int64)

    def read(elements: tf.data.Dataset, length: int) -> list:
        batches = cache.through(elements, group, tf.data.Dataset.range(10, 12), count)
        return [(list(numbers), text) for numbers, text in batches.take(length).as_numpy_iterator()]

    whole = [([1.0, 2.0], b"a"), ([3.0, 4.0], b"")]
    assert read(source, 1) == whole[:1]
    assert read(source, 2) == whole
    assert read(nothing, 2) == whole
    assert cache.size() == 2


def test_memory_is_what_the_records_and_images_take(tmp_path):
    make_folder(tmp_path, (2, 3))
    loaded = stream(tmp_path, cache="memory")
    files = sorted(str(path) for path in tmp_path.glob("train-*"))
    payloads = sum(len(payload) for payload in tf.data.TFRecordDataset(files).as_numpy_iterator())
    assert loaded.cache_bytes == (payloads, 5 * (8 * 8 * 3 + 4 + 4))
    assert stream(tmp_path).cache_bytes == load(tmp_path).cache_bytes == (0, 0)


def test_where_a_cache_makes_no_sense(tmp_path):
    make_folder(tmp_path)
    with pytest.raises(ConfigError, match=r"stream.cache='disk' is not known: choose one of none, memory"):
        stream(tmp_path, cache="disk")
    with pytest.raises(ConfigError, match=r"cache='memory' is for streamed files: drop it, or set in_memory=False"):
        load(tmp_path, cache="memory")
    with pytest.raises(ConfigError, match=r"cache='memory' is no setting of data.source='digits'"):
        data.load(cache="memory")
