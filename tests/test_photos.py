"""The streamed pipeline on real ImageNet photos, some of them grey, and on JPEGs in CMYK."""

import io

import numpy as np
import pytest
import tensorflow as tf
from helpers import some_of
from PIL import Image
from sample_data import FOLDER

from conadv_tf import data
from conadv_tf.data import augment

PHOTOS = FOLDER / "imagenet_sample"
needs_photos = pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"{PHOTOS} is not here; set CONADV_TEST_DATA")
SIZE = 64


def load(**settings) -> data.ImageData:
    stored = {"source": "tfrecords", "data_dir": str(PHOTOS), "label_offset": 1, "num_classes": 1000}
    how = {"in_memory": False, "image_size": SIZE, "shuffle_buffer": 10, "augmentation": "none"}
    return data.load(**stored, **{**how, **settings})


def stored_labels() -> list[int]:
    """Of the 48 training photos, by a plain reading."""
    files = sorted(str(path) for path in PHOTOS.glob("train-*"))
    schema = {"image/class/label": tf.io.FixedLenFeature([], tf.int64)}
    payloads = tf.data.TFRecordDataset(files).as_numpy_iterator()
    return [int(tf.io.parse_single_example(p, schema)["image/class/label"]) - 1 for p in payloads]


def epoch(loaded: data.ImageData, hosts: int, number: int = 0, seed: int = 0):
    """(digest of the image, label) of everything that all hosts read in one epoch."""
    seen = []
    for host in range(hosts):
        batches = loaded.train_batches(1, hosts, 48 * number, seed, num_hosts=hosts, host=host).take(48 // hosts)
        seen += [(image.tobytes(), int(label)) for [image], [label] in batches.as_numpy_iterator()]
    return seen


@needs_photos
@pytest.mark.parametrize("hosts", some_of([1, 2, 8], 2, otherwise="long"))
def test_every_photo_comes_once_an_epoch_on_any_number_of_hosts(hosts):
    loaded = load()
    first, second = epoch(loaded, hosts), epoch(loaded, hosts, 1)
    assert len({image for image, _ in first}) == 48
    assert sorted(label for _, label in first) == sorted(stored_labels())
    # Without a random crop an epoch is a set of images, the same on any number of hosts and in any epoch.
    assert sorted(first) == sorted(second) == sorted(epoch(loaded, 1))
    assert [label for _, label in first] != [label for _, label in second]


@pytest.mark.long
@needs_photos
def test_crops_are_drawn_by_seed_and_epoch():
    loaded = load(augmentation="resized_crop_flip")
    first, second, other_seed = epoch(loaded, 1), epoch(loaded, 1, 1), epoch(loaded, 1, 0, 1)
    assert first == epoch(load(augmentation="resized_crop_flip"), 1)
    for other in (second, other_seed):
        assert not {image for image, _ in first} & {image for image, _ in other}
        assert sorted(label for _, label in first) == sorted(label for _, label in other)


def jpeg(mode: str) -> tf.Tensor:
    shades = np.linspace(0, 255, 96).astype(np.uint8)
    picture = np.stack([np.tile(shades, (80, 1)), np.tile(shades // 2, (80, 1)), np.full((80, 96), 90)], -1)
    stream = io.BytesIO()
    Image.fromarray(picture.astype(np.uint8)).convert(mode).save(stream, "JPEG", quality=95)
    return tf.constant(stream.getvalue())


@pytest.mark.parametrize("crop", augment.STREAMED)
def test_cmyk_photos_look_like_rgb_ones(crop):
    augmentation, seed = augment.Augmentation(crop), tf.constant([3, 1], tf.int64)
    assert tf.io.extract_jpeg_shape(jpeg("CMYK"))[2] == 4
    made = [augment.decoded(jpeg(mode), augmentation, 32, seed).numpy().astype(int) for mode in ("RGB", "CMYK")]
    assert np.ptp(made[0]) > 20
    assert np.abs(made[0] - made[1]).max() <= 8  # two lossy conversions


@pytest.mark.parametrize("crop", augment.STREAMED)
def test_grey_photos_have_three_equal_channels(crop):
    made = augment.decoded(jpeg("L"), augment.Augmentation(crop), 32, tf.constant([3, 1], tf.int64)).numpy()
    assert made.shape == (32, 32, 3)
    assert (made == made[..., :1]).all()
    assert np.ptp(made) > 20
