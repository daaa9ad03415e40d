"""TFDS data sets against TFDS's own reading of them: its generated ones, and small real ones that it builds here."""

import ast
import io
import itertools
import shutil

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from conadv_tf import data
from conadv_tf.errors import ConfigError, DataError

_SIZES = ((40, 30), (16, 16), (24, 48))


def _file(number: int, size: tuple[int, int], textured: bool, kind: str = "JPEG") -> bytes:
    """An encoded picture: noise, or one grey level that belongs to the number alone."""
    random = np.random.default_rng(number)
    shape = (size[1], size[0], 3)
    pixels = random.integers(0, 256, shape) if textured else np.full(shape, 10 * number + 5)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, kind, quality=95)
    return file.getvalue()


class TinyPhotos(tfds.core.GeneratorBasedBuilder):
    """18 training and 5 validation pictures in 3 classes, from a folder with a subfolder for each class."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = tuple(
        tfds.core.BuilderConfig(name=name) for name in ("square", "sizes", "damaged", "png", "arrays", "unlabelled")
    )

    def _info(self):
        encoding = "png" if self.builder_config.name == "png" else None
        features = {"image": tfds.features.Image(shape=(None, None, 3), encoding_format=encoding)}
        if self.builder_config.name != "unlabelled":
            features["label"] = tfds.features.ClassLabel(names=["ant", "bee", "cat"])
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 18), "validation": self._generate_examples(18, 5)}

    def _generate_examples(self, first, count):
        for number in range(first, first + count):
            config = self.builder_config.name
            size = _SIZES[number % 3] if config == "sizes" else (16, 16)
            content = _file(number, size, config != "sizes", "PNG" if config == "png" else "JPEG")
            if config == "damaged" and number in (3, 20):
                content = content[:-200] if number == 3 else _file(number, size, True, "PNG")
            label = {} if config == "unlabelled" else {"label": number % 3}
            yield number, {"image": io.BytesIO(content), **label}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> str:
    tfds.disable_progress_bar()
    folder = str(tmp_path_factory.mktemp("tfds"))
    for config in TinyPhotos.BUILDER_CONFIGS:
        kind = "array_record" if config.name == "arrays" else "tfrecord"
        builder = TinyPhotos(config=config.name, data_dir=folder, file_format=kind)
        settings = tfds.download.DownloadConfig(num_shards=2, try_download_gcs=False)
        builder.download_and_prepare(download_config=settings)
    return folder


def load(config: str, folder: str, **arguments) -> data.ImageData:
    return data.load("tfds", dataset=f"tiny_photos/{config}", data_dir=folder, **arguments)


def stream(config: str, folder: str, **arguments) -> data.ImageData:
    return load(config, folder, **{"in_memory": False, "image_size": 8, "shuffle_buffer": 4, **arguments})


def by_tfds(config: str, folder: str, split: str) -> list[tuple[np.ndarray, int]]:
    builder = tfds.builder(f"tiny_photos/{config}", data_dir=folder)
    return [(row["image"], int(row["label"])) for row in builder.as_dataset(split=split).as_numpy_iterator()]


def in_any_order(examples) -> list[tuple[bytes, int]]:
    return sorted((np.asarray(image).tobytes(), int(label)) for image, label in examples)


def one_line(error) -> str:
    """The message, which must be one line."""
    [line] = str(error.value).splitlines()
    return line


def test_memory_holds_what_tfds_reads(prepared):
    loaded = load("square", prepared)
    assert (loaded.name, loaded.num_classes, loaded.image_shape) == ("tiny_photos", 3, (16, 16, 3))
    assert (loaded.num_train, loaded.num_test, loaded.bad_records.count) == (18, 5, 0)
    assert loaded.class_names == ("ant", "bee", "cat")
    for split, tfds_split in (("train", "train"), ("test", "validation")):
        found = in_any_order(zip(*loaded.examples(split, 99), strict=True))
        assert found == in_any_order(by_tfds("square", prepared, tfds_split))
        assert len(set(found)) == loaded.sizes[split]


def test_streamed_files_hold_what_tfds_reads(prepared):
    loaded = stream("sizes", prepared)
    assert (loaded.num_classes, loaded.image_shape, loaded.num_train, loaded.num_test) == (3, (8, 8, 3), 18, 5)
    assert loaded.class_names == ("ant", "bee", "cat")
    for split, tfds_split in (("train", "train"), ("test", "validation")):
        # Every picture has one grey level of its own, which no crop or change of size alters.
        expected = [
            (np.full((8, 8, 3), image[0, 0, 0]), label) for image, label in by_tfds("sizes", prepared, tfds_split)
        ]
        found = in_any_order(zip(*loaded.examples(split, 99), strict=True))
        assert found == in_any_order(expected)
        assert len(set(found)) == loaded.sizes[split]


@pytest.mark.parametrize("config", [pytest.param("square", marks=pytest.mark.long), "png"])
def test_streamed_and_in_memory_have_one_order(prepared, config):
    streamed, in_memory = stream(config, prepared, image_size=16), load(config, prepared)
    for split in ("train", "test"):
        one, other = streamed.examples(split, 99), in_memory.examples(split, 99)
        np.testing.assert_array_equal(one[1], other[1])
        # A cropped picture is still most like itself.
        likeness = np.corrcoef(*(images.reshape(len(images), -1) for images in (one[0], other[0])))
        count = len(one[1])
        np.testing.assert_array_equal(likeness[:count, count:].argmax(axis=1), np.arange(count))


def test_training_batches_of_streamed_files_have_every_image_once(prepared):
    loaded = stream("sizes", prepared, augmentation="resized_crop_flip")
    batches = list(itertools.islice(loaded.train_batches(6, 1).as_numpy_iterator(), 6))
    levels = np.concatenate([images[:, 0, 0, 0] for images, _ in batches]).reshape(2, 18)
    np.testing.assert_array_equal(np.sort(levels, axis=1), np.tile(10 * np.arange(18) + 5, (2, 1)))


def test_parts_of_splits_in_memory(prepared):
    loaded = load("square", prepared, train_split="train[:50%]", test_split="train[50%:]")
    assert (loaded.num_train, loaded.num_test) == (9, 9)
    both = [pair for split in ("train", "test") for pair in zip(*loaded.examples(split, 99), strict=True)]
    assert in_any_order(both) == in_any_order(by_tfds("square", prepared, "train"))


def test_the_fingerprint_is_that_of_the_files_and_follows_a_copy(prepared, tmp_path):
    copied = shutil.copytree(prepared, tmp_path / "copied")
    part = {"train_split": "train[:50%]"}
    for own, other in (
        (load("square", prepared), load("square", str(copied))),
        (stream("sizes", prepared), stream("sizes", str(copied))),
        (load("square", prepared, **part), load("square", str(copied), **part)),
    ):
        assert own.fingerprint.difference(other.fingerprint) is None
        assert str(copied) in other.fingerprint.place
        assert [name for name in own.fingerprint.parts if ".tfrecord" in name]
    assert load("square", prepared).fingerprint.difference(load("square", prepared, **part).fingerprint)


@pytest.mark.parametrize("loader", [load, stream])
def test_damaged_images_are_counted_and_skipped(prepared, loader):
    # One training JPEG is cut off; one test image is a PNG, which both take.
    loaded = loader("damaged", prepared)
    assert len(loaded.examples("train", 99)[1]) == 17
    assert len(loaded.examples("test", 99)[1]) == 5
    assert loaded.bad_records.count == 1
    with pytest.raises((DataError, tf.errors.OpError), match=r"data\.max_bad_records=0"):
        loader("damaged", prepared, max_bad_records=0).examples("train", 99)


def test_images_of_several_sizes_do_not_fit_in_memory(prepared):
    with pytest.raises(DataError, match=r"tiny_photos.*image of .* pixels .*tfds.in_memory=False") as error:
        load("sizes", prepared, max_bad_records=2)
    one_line(error)


@pytest.mark.parametrize(("name", "shape"), [("cifar10", (32, 32, 3)), ("mnist:3.0.1", (28, 28, 1))])
def test_generated_data_of_known_sets(name, shape):
    with tfds.testing.mock_data(num_examples=7):
        loaded = data.load("tfds", dataset=name, num_classes=10, augmentation="crop_flip")
        expected = list(tfds.load(name, split="train").as_numpy_iterator())
    assert (loaded.image_shape, loaded.num_classes, loaded.num_train, loaded.num_test) == (shape, 10, 7, 7)
    assert loaded.name == name.split(":")[0]
    images, labels = loaded.examples("train", 7)
    np.testing.assert_array_equal(labels, [row["label"] for row in expected])
    np.testing.assert_array_equal(images, [row["image"] for row in expected])
    batch_images, batch_labels = next(loaded.train_batches(5, 1).as_numpy_iterator())
    assert (batch_images.shape, batch_labels.dtype) == ((5, *shape), np.int32)


def test_a_set_that_is_not_prepared_says_how(tmp_path):
    with pytest.raises(DataError, match=r"mnist.*is not prepared.*: python -c ") as error:
        data.load("tfds", dataset="mnist:3.0.1", data_dir=str(tmp_path))
    program = one_line(error).split("python -c ")[1].strip('"')
    assert "download_and_prepare" in program
    assert "'mnist:3.0.1'" in program
    assert str(tmp_path) in program
    ast.parse(program)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": None}, "tfds.dataset=None"),
        ({"dataset": "tiny_fotos"}, "tfds.dataset='tiny_fotos'.*tiny_photos"),
        ({"dataset": "tiny_photos/cubic"}, "tfds.dataset='tiny_photos/cubic'.*cubic"),
        ({"dataset": "tiny_photos/square:9.9.9"}, "9.9.9"),
        ({"dataset": "tiny photos"}, "tfds.dataset='tiny photos'"),
        ({"dataset": "huggingface:mnist"}, "tfds.dataset='huggingface:mnist'.*network"),
        ({"dataset": "tiny_photos/unlabelled"}, "label"),
        ({"dataset": "glue"}, "image"),
        ({"num_classes": 4}, "tfds.num_classes=4.*3"),
        ({"label_offset": 1}, "label_offset=1 is no setting of data.source='tfds': choose from dataset, name"),
        ({"train_files": "photos-*"}, r"train_files='photos-\*' is no setting of data.source='tfds'"),
        ({"test_split": "holdout"}, "tfds.test_split='holdout'.*train, validation"),
        ({"train_split": "train[:"}, r"tfds.train_split='train\[:'"),
        ({"train_split": "train[:50%]", "in_memory": False}, r"tfds.train_split='train\[:50%\]'.*in_memory"),
        ({"source": "tfrecords"}, "dataset='tiny_photos/square' is no setting of data.source='tfrecords'"),
    ],
)
def test_impossible_settings(prepared, arguments, message):
    settings = {"source": "tfds", "dataset": "tiny_photos/square", "data_dir": prepared, **arguments}
    with pytest.raises(ConfigError, match=message) as error:
        data.load(**settings)
    one_line(error)


@pytest.mark.parametrize("loader", [load, stream])
def test_other_file_formats_are_refused(prepared, loader):
    with pytest.raises(ConfigError, match=r"tiny_photos.*array_record.*tfrecord") as error:
        loader("arrays", prepared)
    one_line(error)
