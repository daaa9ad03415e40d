"""AutoAugment: tf-models' operations and policies, our own draws; alone and in the pipelines."""

import functools
import itertools

import numpy as np
import pytest
import tensorflow as tf
from helpers import some_of
from official.vision.ops import augment as tfm

from conadv_tf import data, methods
from conadv_tf.data import augment, autoaugment, pipeline, record_files
from conadv_tf.data.memory import MemoryData
from conadv_tf.errors import ConfigError

SIZE = 24
# Arguments of the operations that have a random direction, at magnitude 10 (Cubuk et al., Table 6; translations by up
# to 10 of CIFAR's 32 pixels).
PIXELS = 10 * SIZE / 32
DIRECTED = {"Rotate": 30.0, "ShearX": 0.3, "ShearY": 0.3, "TranslateX": PIXELS, "TranslateY": PIXELS}
GREY = [128, 128, 128]


def photo(seed: int = 0) -> tf.Tensor:
    """Smooth shades over the whole range, with some noise: unlike noise alone, every operation changes it."""
    random = np.random.default_rng(seed)
    row, column = np.mgrid[:SIZE, :SIZE] / SIZE
    planes = np.stack([row, column, (row + 2 * column) / 3], -1) * 180 + random.uniform(10, 40, (SIZE, SIZE, 3))
    return tf.constant(planes.astype(np.uint8))


def possible(image: tf.Tensor, name: str, probability: float, magnitude: float) -> list[tuple[float, tf.Tensor]]:
    """(probability, result) of each way tf-models' operation may go."""
    function = tfm.NAME_TO_FUNC[name]
    if name in DIRECTED:
        amount = magnitude / 10 * DIRECTED[name]
        results = [function(image, amount, GREY), function(image, -amount, GREY)]
    else:
        results = [function(image, *tfm.level_to_arg(100, 250)[name](magnitude))]
    ways = [(probability / len(results), result) for result in results]
    return [*ways, (1 - probability, image)] if probability < 1 else ways


@functools.cache
def distribution(policy: str) -> dict[bytes, float]:
    """Probability of every image that AutoAugment may make of `photo()`."""
    sub_policies = getattr(tfm.AutoAugment, f"policy_reduced_{policy}")()
    shares: dict[bytes, float] = {}
    for first, second in sub_policies:
        for p, middle in possible(photo(), *first):
            for q, result in possible(middle, *second):
                if p * q > 0:
                    key = result.numpy().tobytes()
                    shares[key] = shares.get(key, 0.0) + p * q / len(sub_policies)
    return shares


@pytest.mark.parametrize("policy", some_of(("imagenet", "cifar10"), "imagenet", otherwise="long"))
def test_images_are_those_of_tf_models_as_often_as_the_policy_says(policy):
    expected, draws = distribution(policy), 4000
    seeds = tf.stack([tf.fill([draws], tf.constant(3, tf.int64)), tf.range(draws, dtype=tf.int64)], axis=1)
    made = tf.data.Dataset.from_tensor_slices(seeds).map(lambda s: autoaugment.distort(photo(), policy, s))
    counts: dict[bytes, int] = {}
    for image in made.as_numpy_iterator():
        counts[image.tobytes()] = counts.get(image.tobytes(), 0) + 1
    # Optimized programs round a blend differently by one level now and then; a second operation may enlarge that.
    known = np.array([np.frombuffer(key, np.uint8) for key in expected], int)
    shares = np.array(list(expected.values()))
    found = np.zeros(len(shares))
    for key, count in counts.items():
        distance = np.abs(known - np.frombuffer(key, np.uint8)).max(axis=1)
        assert distance.min() <= 3
        found[distance.argmin()] += count
    deviation = np.sqrt(shares * (1 - shares) / draws)
    assert np.all(np.abs(found / draws - shares) < 5 * deviation + 1e-9)


def memory(augmentation: augment.Augmentation, channels: int = 3) -> MemoryData:
    images = np.stack([photo(seed).numpy() for seed in range(12)])[..., :channels]
    split = images, np.arange(12, dtype=np.int32)
    return MemoryData("photos", 12, {"train": split, "test": split}, augmentation, record_files.BadRecords(0))


def epoch(loaded: pipeline.ImageData, number: int = 0, seed: int = 0, rows: int = 4):
    batches = loaded.train_batches(rows, 1, start_position=number * 12, seed=seed).take(12 // rows)
    images, labels = zip(*batches.as_numpy_iterator(), strict=True)
    return np.concatenate(images), np.concatenate(labels)


CROPS = ("none", "crop_flip")


@pytest.mark.parametrize("crop", some_of(CROPS, "crop_flip", otherwise="long"))
def test_the_augmented_image_replaces_the_clean_one_or_stands_beside_it(crop):
    clean, labels = epoch(memory(augment.Augmentation(crop)))
    replaced, same_labels = epoch(memory(augment.Augmentation(crop, "cifar10")))
    both, _ = epoch(memory(augment.Augmentation(crop, "cifar10", "concat3")))
    np.testing.assert_array_equal(labels, same_labels)
    np.testing.assert_array_equal(both[:, 0], clean)
    np.testing.assert_array_equal(both[:, 1], replaced)
    assert sum(map(np.array_equal, clean, replaced)) < 8


def test_epochs_and_seeds_draw_anew_and_any_batch_can_be_rebuilt():
    loaded = memory(augment.Augmentation("none", "imagenet"))
    versions = [epoch(loaded, *which) for which in itertools.product((0, 1), (0, 1))]
    by_label = [images[np.argsort(labels)] for images, labels in versions]
    for one, other in itertools.combinations(by_label, 2):
        assert sum(map(np.array_equal, one, other)) < 10
    again, _ = epoch(loaded, 1, 1)
    np.testing.assert_array_equal(again, versions[3][0])
    in_other_batches, _ = epoch(loaded, 1, 1, rows=2)
    np.testing.assert_array_equal(in_other_batches, versions[3][0])


def test_evaluation_sees_clean_images_alone():
    loaded = memory(augment.Augmentation("none", "imagenet", "concat3"))
    assert loaded.train_shape == (2, SIZE, SIZE, 3)
    [(images, _, _)] = loaded.evaluation_batches("train", 12, 1)
    np.testing.assert_array_equal(images[0], photo())
    assert images.shape == (12, SIZE, SIZE, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"autoaugment": "v0"}, r"autoaugment.policy='v0'.*imagenet, cifar10"),
        ({"autoaugment": "imagenet", "autoaugment_mode": "mix"}, r"autoaugment.mode='mix'.*concat3"),
        ({"autoaugment_mode": "concat3"}, r"autoaugment.mode='concat3' without a policy"),
        ({"autoaugment": "cifar10"}, r"autoaugment.policy='cifar10' is for colour images.*\(8, 8, 1\)"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        data.load(**settings)


def test_vanilla_does_not_take_a_second_image():
    with pytest.raises(ConfigError, match=r"concat3.*vanilla.*replace"):
        methods.make_method("vanilla", augmented=True)
