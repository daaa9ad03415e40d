"""Parts of data sets for scale models: which images they take, and that splits do not overlap."""

import numpy as np
import pytest

from conadv_tf import config, data
from conadv_tf.data.subset import Subset
from conadv_tf.errors import ConfigError


def numbered(count: int, side: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Images that show their number, which is their label too."""
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, side, side, 1))
    return images, np.arange(count, dtype=np.int32)


def splits(count: int = 50) -> dict:
    return {"train": numbered(count), "test": numbered(7)}


def test_splits_do_not_overlap_and_images_keep_their_labels():
    taken = Subset(20, 15).of(splits())
    train, validation = set(taken["train"][1]), set(taken["validation"][1])
    assert (len(train), len(validation), len(taken["test"][1])) == (20, 15, 7)
    assert not train & validation
    for images, labels in taken.values():
        np.testing.assert_array_equal(images[:, 0, 0, 0], labels)


def test_what_is_drawn_does_not_depend_on_the_size_of_the_other_split():
    one, other = Subset(20, 15).of(splits()), Subset(25, 5).of(splits())
    assert set(one["train"][1]) < set(other["train"][1])
    assert set(other["validation"][1]) < set(one["validation"][1])
    assert sorted(one["train"][1]) != list(range(20))  # drawn from all of them, not the first


def test_all_that_is_left_is_trained_on_and_nothing_changes_by_default():
    taken = Subset(validation_images=10).of(splits())
    assert sorted([*taken["train"][1], *taken["validation"][1]]) == list(range(50))
    whole = Subset().of(splits())
    assert list(whole["train"][1]) == list(range(50))
    assert set(whole) == {"train", "test"}


def test_downscaled_pixels_are_means_of_their_blocks():
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), np.uint8)
    taken = Subset(downscale=2).of({"train": (images, np.zeros(3, np.int32)), "test": (images, np.zeros(3, np.int32))})
    for row in range(2):
        for column in range(3):
            block = images[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].astype(float)
            np.testing.assert_allclose(taken["test"][0][:, row, column], block.mean((1, 2)), atol=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_images": 0}, "subset.train_images=0 must be a whole number of at least 1; None means all"),
        ({"validation_images": -1}, "subset.validation_images=-1"),
        ({"downscale": 0}, "subset.downscale=0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Subset(**settings)


def test_too_many_images_and_odd_sides_are_refused():
    with pytest.raises(ConfigError, match=r"subset.train_images=45 .*subset.validation_images=6.*50 training images"):
        Subset(45, 6).of(splits())
    with pytest.raises(ConfigError, match=r"subset.downscale=3 does not divide the images' 2x2"):
        Subset(downscale=3).of(splits())


def test_data_sets_are_loaded_in_part():
    config.configure(["data/digits.gin"], ["subset.train_images = 100", "subset.validation_images = 200"])
    loaded = data.load()
    assert loaded.sizes == {"train": 100, "validation": 200, "test": 360}
    [(images, _, weights)] = loaded.evaluation_batches("validation", 200, 1)
    assert images.shape == (1, 200, 8, 8, 1) or images.shape == (200, 8, 8, 1)
    assert float(np.sum(weights)) == 200


def test_synthetic_data_stand_in_for_a_part():
    params = ["subset.train_images = 5000", "subset.validation_images = 5000", "subset.downscale = 2"]
    config.configure_without_files(["data/cifar10.gin"], params)
    loaded = data.load()
    assert loaded.sizes == {"train": 5000, "validation": 5000, "test": 50_000}
    assert loaded.image_shape == (16, 16, 3)


def test_streamed_files_are_not_taken_in_part(tmp_path):
    config.configure(["data/imagenet.gin"], ["subset.downscale = 2"])
    with pytest.raises(ConfigError, match=r"downscale=2.*tfrecords.in_memory=True"):
        data.load(data_dir=str(tmp_path))
