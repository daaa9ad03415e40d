"""Records of other kinds: images are decoded by what their bytes are, other features are named with a remedy."""

import io
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from record_data import jpeg, load, stream, take, write
from test_bad_data import raises_data_error

from conadv_tf.data import augment, pictures, records
from conadv_tf.run import kept_config

ENCODED = jpeg(np.full((8, 8, 3), 90, np.uint8))
INT, FLOAT, BYTES = (
    lambda values: tf.train.Feature(int64_list=tf.train.Int64List(value=values)),
    lambda values: tf.train.Feature(float_list=tf.train.FloatList(value=values)),
    lambda values: tf.train.Feature(bytes_list=tf.train.BytesList(value=values)),
)


def example(features: dict[str, tf.train.Feature]) -> bytes:
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def folder_of(folder: Path, *examples: bytes) -> Path:
    for name in ("train-0", "validation-0"):
        write(folder / name, list(examples))
    return folder


NAMES = "image/encoded", "image/class/label"
LABELS = {
    "float": (FLOAT([3.0]), "is 1 float: 3.0, not 1 int64"),
    "bytes": (BYTES([b"dog"]), "is 1 bytes: b'dog', not 1 int64"),
    "one-hot": (INT([0, 0, 1]), "is 3 int64, not 1 int64"),
    "empty": (INT([]), "is 0 int64, not 1 int64"),
}


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("kind", LABELS)
def test_a_label_of_another_kind_is_said(kind, in_memory, tmp_path):
    label, said = LABELS[kind]
    folder_of(tmp_path, *[example({NAMES[0]: BYTES([ENCODED]), NAMES[1]: label})] * 12)
    line = raises_data_error(tmp_path, in_memory)
    assert line.startswith(f"{tmp_path}/train-0, record 0: feature {NAMES[1]} {said}: set tfrecords.image_feature")
    assert line.endswith("or write the records again with the image as 1 bytes and the label as 1 int64")


@pytest.mark.parametrize("in_memory", [True, False])
def test_features_of_other_names_are_said_and_can_be_named(in_memory, tmp_path):
    named = {"image": BYTES([ENCODED]), "label": INT([2]), "height": INT([8])}
    folder_of(tmp_path, *[example(named)] * 12)
    line = raises_data_error(tmp_path, in_memory)
    assert "image/encoded is missing; there are height (1 int64: 8), image (1 bytes), label (1 int64: 2): set" in line
    names = {"image_feature": "image", "label_feature": "label"}
    loaded = (load if in_memory else stream)(tmp_path, **names)
    images, labels = take(loaded.train_batches(4, 1), 3)
    np.testing.assert_allclose(images, 90, atol=2)
    np.testing.assert_array_equal(labels, np.full(12, 2))


def test_a_few_records_without_an_image_are_bad_ones(tmp_path):
    good = example({NAMES[0]: BYTES([ENCODED]), NAMES[1]: INT([2])})
    folder_of(tmp_path, *[example({NAMES[1]: INT([2])})] * 9, good, good)
    loaded = load(tmp_path, max_bad_records=18)  # 9 in each split
    assert (loaded.num_train, loaded.bad_records.count) == (2, 18)


def test_a_run_of_the_version_before_had_the_usual_names(tmp_path):
    old = "data.source = 'tfrecords'\ntfrecords.label_offset = 1\n"
    names = "tfrecords.image_feature = 'image/encoded'\ntfrecords.label_feature = 'image/class/label'\n"
    assert kept_config.difference(old, old + names) is None
    name, before, now = kept_config.difference(old, old + names.replace("image/encoded", "image"))
    assert (name, before, now) == ("tfrecords.image_feature", "'image/encoded'", "'image'")
    assert kept_config.difference("data.source = 'digits'\n", "data.source = 'digits'\n") is None


def picture(kind: str, size: tuple[int, int] = (24, 16), **options) -> tuple[bytes, np.ndarray]:
    """An image of noise in some format, and its pixels as they are decoded."""
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue(), np.asarray(Image.open(io.BytesIO(file.getvalue())).convert("RGB"))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP"])
def test_other_formats_are_cropped_as_a_jpeg_of_their_size_is(kind):
    """Against the crop of all pixels; the same draw takes the same window of a JPEG."""
    encoded, pixels = picture(kind, **({"lossless": True} if kind == "WEBP" else {}))
    made = augment.central_crop(tf.constant(encoded), 14).numpy()
    np.testing.assert_array_equal(made, pixels[5:19, 1:15])
    seed = tf.constant([5, 1], tf.int64)
    flipped = augment.Augmentation("resized_crop_flip")
    grey = np.tile(np.arange(0, 240, 10, dtype=np.uint8)[:, None, None], (1, 16, 3))
    file = io.BytesIO()
    Image.fromarray(grey).save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    other = augment.decoded(tf.constant(file.getvalue()), flipped, 8, seed).numpy().astype(int)
    of_jpeg = augment.decoded(tf.constant(jpeg(grey)), flipped, 8, seed).numpy().astype(int)
    assert np.abs(other - of_jpeg).max() <= 4


def test_each_png_is_decoded_once_and_quietly(tmp_path, monkeypatch, capfd):
    """Seen on the version before: each batch was tried as JPEGs first, with libjpeg's complaint."""
    decoded, original = [], pictures.decode_image

    def counted(encoded):
        with tf.control_dependencies([tf.numpy_function(lambda: decoded.append(1), [], [])]):
            return original(encoded)

    monkeypatch.setattr(augment, "decode_image", counted)
    encoded, _ = picture("PNG")
    folder_of(tmp_path, *[example({NAMES[0]: BYTES([encoded]), NAMES[1]: INT([1])})] * 40)
    loaded = stream(tmp_path, augmentation="resized_crop_flip")
    take(loaded.train_batches(8, 1).take(5), 5)
    assert 40 <= len(decoded) <= 40 + 8 * 16  # batches made ahead
    assert loaded.bad_records.count == 0
    assert capfd.readouterr().err == ""


FAULTS = {
    "animated WebP": (
        picture("WEBP", save_all=True, append_images=[Image.new("RGB", (16, 24))])[0],
        "an animated WebP, w",
    ),
    "TIFF": (picture("TIFF")[0], "a TIFF, where JPEG, PNG, BMP, WebP or GIF is decoded"),
    "cut PNG": (picture("PNG")[0][:200], "corrupt PNG"),
    "cut WebP": (picture("WEBP")[0][:60], "corrupt WebP"),
    "cut JPEG": (picture("JPEG")[0][:200], "corrupt JPEG"),
    "nothing": (b"", "an empty image, where"),
    "text": (b"<html>not found</html>", "no image, where JPEG"),
}


@pytest.mark.parametrize("in_memory", [True, False])
def test_an_image_that_does_not_decode_is_called_what_it_is(in_memory, tmp_path):
    good, _ = picture("JPEG")
    examples = [example({NAMES[0]: BYTES([each]), NAMES[1]: INT([1])}) for each, _ in FAULTS.values()]
    write(tmp_path / "train-0", [example({NAMES[0]: BYTES([good]), NAMES[1]: INT([1])})] * 2 + examples)
    write(tmp_path / "validation-0", [example({NAMES[0]: BYTES([good]), NAMES[1]: INT([1])})])
    loaded = (load if in_memory else stream)(tmp_path)
    take(loaded.train_batches(3, 1), 3)
    said = loaded.bad_records.reasons
    assert len(said) == len(FAULTS)
    for number, (_, expected) in enumerate(FAULTS.values(), 2):
        assert said[f"{tmp_path}/train-0", number].startswith(expected)


def test_the_features_of_a_record_are_described():
    many = {f"feature{number:02d}": INT([number]) for number in range(14)}
    line = records.Schema(0, None).mismatch(many)
    assert line.endswith("feature10 (1 int64: 10), feature11 (1 int64: 11), ...")
    assert records.Schema(0, None).mismatch({}) == "feature image/encoded is missing; there are none"
