"""The data pipeline against plain readings of the same files."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
from helpers import some_of
from hypothesis import given, settings
from hypothesis import strategies as st
from record_data import (
    FOLDER,
    counting,
    example_bytes,
    jpeg,
    load,
    make_folder,
    needs_files,
    numbered,
    payloads,
    plain_example,
    stream,
    take,
    write,
)

from conadv_tf import data
from conadv_tf.data import augment


@pytest.fixture(scope="module")
def streamed(tmp_path_factory) -> data.ImageData:
    return stream(make_folder(tmp_path_factory.mktemp("streamed")), augmentation="resized_crop_flip")


@pytest.fixture(scope="module")
def cifar() -> data.ImageData:
    return data.load(
        "tfrecords",
        data_dir=str(FOLDER / "cifar10"),
        train_files="train-00000-*",
        test_files="test-00001-*",
        num_classes=10,
    )


# Order ---------------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(size=st.integers(1, 40), rows=st.integers(1, 9), seed=st.integers(0, 2**62))
def test_each_pass_of_the_stream_has_every_image_once(size, rows, seed):
    labels = take(counting(size).train_batches(rows, 1, seed=seed), -(-3 * size // rows))[1][: 3 * size]
    for epoch in labels.reshape(3, size):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(size))


def test_epochs_and_seeds_differ_in_order():
    labels = take(counting(50).train_batches(10, 1), 10)[1]
    assert (labels[:50] != labels[50:]).any()
    assert (labels[:50] != take(counting(50).train_batches(10, 1, seed=1), 5)[1]).any()
    np.testing.assert_array_equal(labels, take(counting(50).train_batches(10, 1), 10)[1])


def test_streamed_passes_have_every_image_once_in_new_orders(streamed):
    labels = take(streamed.train_batches(7, 1, seed=3), 9)[1].reshape(3, 21)
    np.testing.assert_array_equal(np.sort(labels, axis=1), np.tile(np.arange(21), (3, 1)))
    assert (labels[0] != labels[1]).any()
    assert (labels[1] != labels[2]).any()


@pytest.mark.long
@settings(max_examples=8, deadline=None)
@given(start=st.integers(0, 130))
def test_any_start_is_the_tail_of_the_whole(start):
    source = counting(37, "crop_flip")
    whole = take(source.train_batches(1, 1, seed=5), 150)
    tail = take(source.train_batches(4, 1, start_position=start, seed=5), 5)
    for one, other in zip(whole, tail, strict=True):
        np.testing.assert_array_equal(one[start : start + 20], other)


@pytest.mark.parametrize("start", some_of([3, 21, 50], 21, otherwise="long"))
def test_any_start_of_streamed_files_is_the_tail_of_the_whole(streamed, start):
    whole = take(streamed.train_batches(5, 1, seed=5), 14)
    tail = take(streamed.train_batches(4, 1, start_position=start, seed=5), 4)
    for one, other in zip(whole, tail, strict=True):
        np.testing.assert_array_equal(one[start : start + 16], other)


@pytest.fixture(scope="module")
def one_class_a_file(tmp_path_factory) -> data.ImageData:
    """70 files of 24 images each, labelled with the number of their file; the buffer holds half a file."""
    folder = tmp_path_factory.mktemp("neighbours")
    image = jpeg(np.full((8, 8, 3), 100, np.uint8))
    for number in range(70):
        write(folder / f"train-{number:05d}-of-00070", [example_bytes(image, number)] * 24)
    write(folder / "validation-00000-of-00001", [example_bytes(image, 0)])
    return stream(folder, shuffle_buffer=12)


def test_neighbours_in_a_file_seldom_share_a_batch(one_class_a_file):
    """One file after the other: 0.49 of the pairs within a batch are of one file. In a uniform order: 0.014."""
    labels = take(one_class_a_file.train_batches(24, 1, seed=1), 70)[1].reshape(70, 24)
    pairs = labels[:, :, None] == labels[:, None, :]
    share = (pairs.sum() - labels.size) / (labels.size * 23)
    assert share < 0.02
    np.testing.assert_array_equal(np.bincount(labels.ravel()), np.full(70, 24))


@pytest.mark.parametrize("start", [1_000, 1_640])
def test_a_run_resumes_among_files_read_in_turn(one_class_a_file, start):
    whole = take(one_class_a_file.train_batches(40, 1, seed=1), 45)[1]
    tail = take(one_class_a_file.train_batches(40, 1, start_position=start, seed=1), 3)[1]
    np.testing.assert_array_equal(whole[start : start + 120], tail)


def test_streamed_order_ignores_the_global_seed(streamed):
    tf.random.set_seed(1)
    one = take(streamed.train_batches(5, 1), 6)
    tf.random.set_seed(2)
    other = take(streamed.train_batches(5, 1), 6)
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_array_equal(one[1], other[1])


@pytest.mark.parametrize(
    ("source", "rows", "replicas"),
    [("memory", 3, 2), ("memory", 1, 6), ("stream", 3, 2), pytest.param("stream", 1, 6, marks=pytest.mark.long)],
)
def test_layouts_give_the_same_images_in_the_same_order(streamed, source, rows, replicas):
    loaded = streamed if source == "stream" else counting(20, "crop_flip")
    reference = take(loaded.train_batches(6, 1, start_position=6, seed=2), 4)
    other = take(loaded.train_batches(rows, replicas, start_position=6, seed=2), 24 // rows)
    for one, two in zip(reference, other, strict=True):
        np.testing.assert_array_equal(one, two)


def test_hosts_in_memory_take_slices_of_one_stream():
    source = counting(23, "crop_flip")
    whole = source.train_batches(3, 4, start_position=12).take(12).as_numpy_iterator()
    hosts = [
        source.train_batches(3, 4, start_position=12, num_hosts=2, host=host).as_numpy_iterator() for host in range(2)
    ]
    for number, (images, labels) in enumerate(whole):
        host_images, host_labels = next(hosts[number // 2 % 2])
        np.testing.assert_array_equal(labels, host_labels)
        np.testing.assert_array_equal(images, host_images)


@pytest.mark.parametrize(("hosts", "shares"), some_of([(3, (7, 6, 8)), (2, (11, 10))], (2, (11, 10)), otherwise="long"))
def test_hosts_own_disjoint_shares_of_streamed_files(streamed, hosts, shares):
    seen = []
    for host, share in enumerate(shares):
        labels = take(streamed.train_batches(1, hosts, seed=1, num_hosts=hosts, host=host), 2 * share)[1]
        np.testing.assert_array_equal(np.sort(labels[:share]), np.sort(labels[share:]))
        seen.extend(labels[:share])
    np.testing.assert_array_equal(np.sort(seen), np.arange(21))


def test_a_streaming_host_resumes_in_its_own_share(streamed):
    whole = take(streamed.train_batches(2, 2, num_hosts=2, host=1), 20)
    tail = take(streamed.train_batches(2, 2, start_position=28, num_hosts=2, host=1), 5)
    np.testing.assert_array_equal(whole[0][14:24], tail[0])
    np.testing.assert_array_equal(whole[1][14:24], tail[1])


def test_batches_have_static_shapes_and_no_autosharding(streamed):
    for loaded, shape in ((streamed, (8, 8, 3)), (counting(9, "flip"), (8, 8, 1))):
        train = loaded.train_batches(4, 2)
        assert [tuple(spec.shape) for spec in train.element_spec] == [(4, *shape), (4,)]
        assert [spec.dtype for spec in train.element_spec] == [tf.uint8, tf.int32]
        evaluation = loaded.evaluation_batches("test", 4, 2)
        assert [tuple(spec.shape) for spec in evaluation.element_spec] == [(4, *shape), (4,), (4,)]
        assert evaluation.element_spec[2].dtype == tf.float32
        policy = train.options().experimental_distribute.auto_shard_policy
        assert policy == tf.data.experimental.AutoShardPolicy.OFF
        assert train.options().deterministic


def test_replicas_of_a_strategy_get_their_batches_in_turn():
    cpus = tf.config.list_logical_devices("CPU")
    strategy = tf.distribute.MirroredStrategy([cpu.name for cpu in cpus])
    replicas = strategy.num_replicas_in_sync
    batches = strategy.distribute_datasets_from_function(lambda context: counting(20).train_batches(2, replicas))
    values = strategy.experimental_local_results(next(iter(batches))[1])
    whole = take(counting(20).train_batches(2 * replicas, 1), 1)[1]
    np.testing.assert_array_equal(np.concatenate(values), whole)


# Evaluation ----------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(size=st.integers(1, 40), rows=st.integers(1, 7), hosts=st.integers(1, 3), per_host=st.integers(1, 3))
def test_evaluation_has_every_image_once(size, rows, hosts, per_host):
    source = counting(3, test_size=size)
    check_evaluation(source, "test", size, rows, hosts, per_host)


def check_evaluation(source, split, size, rows, hosts, per_host):
    steps = source.evaluation_steps(split, rows, hosts * per_host, hosts)
    seen = []
    for host in range(hosts):
        dataset = source.evaluation_batches(split, rows, hosts * per_host, hosts, host)
        batches = list(dataset.as_numpy_iterator())
        assert len(batches) == steps * per_host
        images, labels, weights = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        assert set(np.unique(weights)) <= {0, 1}
        assert not images[weights == 0].any()
        assert not labels[weights == 0].any()
        seen.extend(labels[weights == 1])
    np.testing.assert_array_equal(np.sort(seen), np.arange(size))


@pytest.mark.parametrize(("hosts", "per_host"), some_of([(1, 2), (2, 1), (3, 2)], (2, 1), otherwise="long"))
def test_streamed_evaluation_has_every_image_once(streamed, hosts, per_host):
    check_evaluation(streamed, "train", 21, 4, hosts, per_host)
    check_evaluation(streamed, "test", 5, 4, hosts, per_host)


def test_evaluation_is_in_order_and_not_augmented():
    source = counting(10, "crop_flip")
    images, labels, _ = take(source.evaluation_batches("train", 5, 2), 2)
    np.testing.assert_array_equal(labels, np.arange(10))
    np.testing.assert_array_equal(images, counting(10).examples("train", 10)[0])
    assert (take(source.train_batches(10, 1), 1)[0] != images).any()


# Right labels and pixels ---------------------------------------------------------------------------------


def test_digits_are_the_fixed_stratified_split():
    digits = data.load()
    assert (digits.name, digits.num_classes, digits.image_shape) == ("digits", 10, (8, 8, 1))
    assert (digits.num_train, digits.num_test, digits.bad_records.count) == (1437, 360, 0)
    train, test = digits.examples("train", 1437), digits.examples("test", 360)
    assert train[0].dtype == np.uint8
    assert train[0].max() == 255
    counts = np.bincount(np.concatenate([train[1], test[1]]))
    np.testing.assert_allclose(np.bincount(test[1]) / counts, 360 / 1797, atol=0.005)
    from sklearn.datasets import load_digits

    plain = load_digits()
    both = np.concatenate([train[0], test[0]])[..., 0] / 255 * 16
    expected = sorted(
        (*image.ravel().astype(int), label) for image, label in zip(plain.images, plain.target, strict=True)
    )
    found = sorted(
        (*image.ravel().round().astype(int), label)
        for image, label in zip(both, np.concatenate([train[1], test[1]]), strict=True)
    )
    assert expected == found


@needs_files
@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar_equals_a_plain_reading(cifar, split):
    path = (
        FOLDER
        / "cifar10"
        / {"train": "train-00000-of-00010.tfrecord.gz", "test": "test-00001-of-00002.tfrecord.gz"}[split]
    )
    plain = payloads(path)
    assert cifar.sizes[split] == len(plain) == 5000
    assert (cifar.image_shape, cifar.num_classes) == ((32, 32, 3), 10)
    images, labels = cifar.examples(split, 300)
    for number in range(300):
        image, label = plain_example(plain[number])
        assert labels[number] == label
        # Two JPEG decoders may differ by rounding.
        assert np.abs(images[number].astype(int) - image).mean() < 2


@needs_files
def test_imagenet_sample_equals_a_plain_reading():
    folder = FOLDER / "imagenet_sample"
    sample = data.load("tfrecords", data_dir=str(folder), label_offset=1, num_classes=1000, in_memory=False)
    assert (sample.name, sample.num_train, sample.num_test) == ("imagenet_sample", 48, 12)
    assert sample.image_shape == (224, 224, 3)
    plain = [plain_example(payload) for path in sorted(folder.glob("train-*")) for payload in payloads(path)]
    images, labels = sample.examples("train", 48)
    np.testing.assert_array_equal(labels, [label - 1 for _, label in plain])
    for found, (image, _) in zip(images, plain, strict=True):
        height, width, _ = image.shape
        square = round(0.875 * min(height, width))
        top, left = (height - square + 1) // 2, (width - square + 1) // 2
        cropped = image[top : top + square, left : left + square]
        expected = tf.image.resize(cropped, (224, 224), "bicubic").numpy().clip(0, 255)
        # Two JPEG decoders differ by rounding and by how they fill in colours.
        assert np.abs(found - expected).mean() < 3
    assert sample.bad_records.count == 0


@needs_files
def test_imagenet_sample_trains_on_every_image_once():
    folder = FOLDER / "imagenet_sample"
    sample = data.load(
        "tfrecords",
        data_dir=str(folder),
        label_offset=1,
        num_classes=1000,
        in_memory=False,
        image_size=64,
        augmentation="resized_crop_flip",
    )
    labels = [plain_example(payload)[1] - 1 for path in folder.glob("train-*") for payload in payloads(path)]
    images, found = take(sample.train_batches(16, 1), 3)
    np.testing.assert_array_equal(np.sort(found), np.sort(labels))
    assert images.std(axis=(1, 2, 3)).min() > 5
    grey = [plain_example(payload)[0] for payload in payloads(folder / "train-00000-of-00002")]
    assert any((image == image[..., :1]).all() for image in grey)  # the sample does exercise grey JPEGs


@pytest.mark.parametrize("compression", ["", "GZIP"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_compression_is_told_by_the_first_bytes(tmp_path, compression, in_memory):
    write(tmp_path / "train-0.gz", numbered(6, size=8), compression)
    write(tmp_path / "test-0", numbered(3, size=8), compression)
    loaded = load(tmp_path, in_memory=in_memory, image_size=8)
    assert (loaded.num_train, loaded.num_test) == (6, 3)
    images, labels = loaded.examples("train", 10)
    np.testing.assert_array_equal(labels, np.arange(6))
    np.testing.assert_allclose(images.mean(axis=(1, 2, 3)), 5 + 10 * np.arange(6), atol=1)


def test_classes_are_counted_where_they_are_not_given(tmp_path):
    assert load(make_folder(tmp_path), num_classes=None).num_classes == 21


def test_synthetic_has_the_shape_of_imagenet():
    synthetic = data.load("synthetic", image_size=16)
    assert (synthetic.num_train, synthetic.num_test, synthetic.num_classes) == (1_281_167, 50_000, 1000)
    images, labels = take(synthetic.train_batches(32, 1, start_position=1_281_150), 1)
    assert images.shape == (32, 16, 16, 3)
    again = take(data.load("synthetic", image_size=16).train_batches(32, 1, start_position=1_281_150), 1)
    np.testing.assert_array_equal(images, again[0])
    np.testing.assert_array_equal(labels, again[1])


# Augmentation --------------------------------------------------------------------------------------------


def test_crop_flip_gives_crops_of_the_padded_image_evenly():
    source = counting(400, "crop_flip")
    images, labels = take(source.train_batches(400, 1, seed=9), 2)
    originals = source.examples("train", 400)[0]
    padded = np.pad(originals, ((0, 0), (4, 4), (4, 4), (0, 0)))
    places = []
    for image, label in zip(images, labels, strict=True):
        places.append(
            [
                (top, left, flip)
                for top in range(9)
                for left in range(9)
                for flip in (1, -1)
                if (image == padded[label, top : top + 8, left : left + 8][:, ::flip]).all()
            ]
        )
    assert all(places)
    top, left, flip = np.array([place[0] for place in places]).T
    for offsets in (top, left):
        assert np.bincount(offsets, minlength=9).min() > 50  # 89 expected
    assert abs((flip == 1).mean() - 0.5) < 0.08
    assert len({tuple(place[0]) for place in places}) > 140  # of 162
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.15


def test_flip_mirrors_about_half_of_the_images_and_does_no_more():
    source = counting(300, "flip")
    images, labels = take(source.train_batches(300, 1), 1)
    originals = source.examples("train", 300)[0][labels]
    kept = (images == originals).all(axis=(1, 2, 3))
    mirrored = (images == originals[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (kept ^ mirrored).all()
    assert 0.4 < kept.mean() < 0.6


def test_crops_differ_between_epochs_and_seeds():
    draws = [
        augment.permute(
            tf.range(2000, dtype=tf.int64),
            2**31,
            seed,
            augment.AUGMENTATION,
            tf.fill([2000], tf.constant(epoch, tf.int64)),
        ).numpy()
        % 162
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    for one, other in itertools.combinations(draws, 2):
        assert (one == other).mean() < 3 / 162  # 1 / 162 by chance


@pytest.mark.parametrize("stream", [augment.ORDER, augment.AUGMENTATION, augment.AUTOAUGMENT])
@pytest.mark.parametrize("varied", ["epoch", "seed"])
def test_two_thousand_epochs_or_seeds_are_drawn_apart(stream, varied):
    """Numbers that are equal in their low 8, 16 or 32 bits are among them."""
    size, count = 1437 if stream == augment.ORDER else 2**31, 12
    steps = [*range(800), *range(1000, 1000 + 256 * 600, 256), *(2**16 * np.arange(3, 403))]
    steps += [2**32 * step for step in range(1, 201)]
    assert len(set(steps)) == 2000
    number, index = np.repeat(np.int64(steps), count), np.tile(np.arange(count), 2000)
    seed, epoch = (number, 0 * number) if varied == "seed" else (7, number)
    first = augment.permute(tf.constant(index), size, seed, stream, tf.constant(epoch)).numpy().reshape(2000, count)
    assert len(np.unique(first, axis=0)) == 2000
    # The first place has all values equally often, and the values of neighbours have nothing in common.
    for values in (first[:, 0], first[:, -1]):
        times = np.bincount(values * 20 // size, minlength=20)
        assert np.sum((times - 100) ** 2 / 100) < 44  # chi-squared of 19 degrees: 1 in 1,000
    assert abs(np.corrcoef(first[:-1, 0], first[1:, 0])[0, 1]) < 4 / np.sqrt(2000)
    chance = count / size if stream == augment.ORDER else 0
    met = np.mean([np.isin(one, other).sum() / count for one, other in itertools.pairwise(first)])
    assert abs(met - chance) < 0.003


def test_streamed_crops_are_of_the_offered_sizes_and_differ_between_epochs(tmp_path):
    # A picture of two ramps shows where a crop begins and how large it is.
    ramp = np.zeros((80, 120, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = 2 * np.arange(120), 3 * np.arange(80)[:, None]
    write(tmp_path / "train-0", [example_bytes(jpeg(ramp), 0)])
    write(tmp_path / "test-0", [example_bytes(jpeg(ramp), 0)])
    loaded = stream(tmp_path, augmentation="resized_crop_flip", image_size=32)
    images = take(loaded.train_batches(50, 1), 4)[0]
    columns, rows = images[..., 0].mean(axis=1) / 2, images[..., 1].mean(axis=2) / 3
    width, height = (np.abs(values[:, -2] - values[:, 1]) * 32 / 29 for values in (columns, rows))
    area, aspect = width * height / (80 * 120), width / height
    assert 0.05 < area.min() < 0.2
    assert 0.7 < area.max() < 1.1
    assert 0.65 < aspect.min() < 0.9
    assert 1.1 < aspect.max() < 1.6
    assert 0.35 < (columns[:, 1] < columns[:, -2]).mean() < 0.65
    assert len(np.unique(images.reshape(200, -1), axis=0)) > 190
