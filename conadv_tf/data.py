"""The data sets of recipes: which images and labels they have (SPEC section 8); pipeline.py hands them out."""

import os
from collections.abc import Sequence

import gin
import numpy as np
from absl import logging

from conadv_tf import augment, records
from conadv_tf.errors import ConfigError
from conadv_tf.pipeline import SPLITS, ImageData, MemoryData, StreamData

_IMAGENET = 1_281_167, 50_000  # train and test images
_SYNTHETIC_IMAGES = 256  # different ones; example i shows image i modulo this
_DEFAULT_IMAGE_SIZE = 224


def _digits(
    name: str, num_classes: int | None, image_size: int | None, num_train: int | None, augmentation: str
) -> MemoryData:
    """scikit-learn's 1,797 grey 8x8 digits, 1,437 train and 360 test, stratified, always the same ones."""
    from sklearn import datasets, model_selection  # seconds to import; other sources do without

    if num_classes not in (None, 10) or image_size not in (None, 8) or num_train not in (None, 1437):
        raise ConfigError(
            f"data.num_classes={num_classes}, data.image_size={image_size}, data.num_train={num_train}: digits have "
            "10 classes, 8 pixels and 1437 training images: drop the settings"
        )
    digits = datasets.load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    numbers = np.arange(len(labels))
    train, test = model_selection.train_test_split(numbers, test_size=360, stratify=labels, random_state=0)
    splits = {"train": (images[train], labels[train]), "test": (images[test], labels[test])}
    return MemoryData(name, 10, splits, augmentation, records.BadRecords(0))


def _synthetic(
    name: str, num_classes: int | None, image_size: int | None, num_train: int | None, augmentation: str
) -> MemoryData:
    """Noise in the shape of ImageNet unless told otherwise, always the same, for benchmarks and --preflight."""
    size, classes = image_size or _DEFAULT_IMAGE_SIZE, num_classes or 1000
    random = np.random.default_rng(0)
    pool = (
        random.integers(0, 256, (_SYNTHETIC_IMAGES, size, size, 3), np.uint8),
        random.integers(0, classes, _SYNTHETIC_IMAGES, np.int32),
    )
    splits = {"train": pool, "test": pool}
    sizes = (num_train or _IMAGENET[0], _IMAGENET[1])
    return MemoryData(name, classes, splits, augmentation, records.BadRecords(0), sizes)


def _memory(
    name: str,
    files: dict[str, list[records.RecordFile]],
    schema: records.Schema,
    image_size: int | None,
    augmentation: str,
    bad_records: records.BadRecords,
) -> MemoryData:
    shape = (image_size, image_size, 3) if image_size else None
    splits = {}
    for split in SPLITS:
        splits[split] = records.read_into_memory(files[split], schema, bad_records, shape)
        shape = splits[split][0].shape[1:]
    if bad_records.count:
        logging.warning("%s", bad_records.report())
    num_classes = schema.num_classes or 1 + max(int(labels.max()) for _, labels in splits.values())
    return MemoryData(name, num_classes, splits, augmentation, bad_records)


_BUILT_IN = {"digits": _digits, "synthetic": _synthetic}


def _check_source(source: str, data_dir: str | None) -> None:
    if source not in (*_BUILT_IN, "tfrecords"):
        raise ConfigError(f"data.source={source!r} is not known: choose digits, tfrecords or synthetic")
    if (source in _BUILT_IN) != (data_dir is None):
        raise ConfigError(
            f"data_dir={data_dir!r} does not fit data.source={source!r}: tfrecords need "
            "--data_dir, digits and synthetic read no files"
        )


@gin.configurable("data", denylist=["data_dir"])
def load(
    source: str = "digits",
    name: str | None = None,
    data_dir: str | None = None,
    label_offset: int = 0,
    num_classes: int | None = None,
    image_size: int | None = None,
    num_train: int | None = None,
    train_files: str = "train-*",
    test_files: str | Sequence[str] = ("validation-*", "test-*"),
    augmentation: str = "none",
    in_memory: bool = True,
    shuffle_buffer: int = 16_384,
    max_bad_records: int = 10,
) -> ImageData:
    """Loads a data set.

    Args:
      source: "digits" (scikit-learn's, no files), "tfrecords" (ImageNet schema, plain or GZIP), or
        "synthetic" (noise in ImageNet's numbers, for benchmarks).
      name: what to call it in results; None takes the source, or the last part of data_dir.
      data_dir: directory of the TFRecord files, local or gs://; a flag, not a gin parameter.
      label_offset: the stored label of class 0 (1 for ImageNet as the Cloud TPU script writes it).
      num_classes: labels are 0..num_classes-1; None: the largest label plus 1 (in memory), 1000 (synthetic).
      image_size: height and width, pixels. In memory every image must have it (None: the first image's);
        streamed images are cropped and resized to it (None: 224).
      num_train: training images of synthetic data (None: ImageNet's 1,281,167); of files, what the recipe expects:
        another number is warned about, since a shard may be missing.
      train_files: pattern, or patterns tried in turn, below data_dir.
      test_files: likewise.
      augmentation: of training images: "none"; "flip"; "crop_flip" (pad 4, crop, flip; in memory);
        "resized_crop_flip" (area 0.08..1, aspect 3/4..4/3, flip; streamed).
      in_memory: decode all images at load; False reads the files as training goes.
      shuffle_buffer: records in the shuffle buffer of each host, streamed files only.
      max_bad_records: damaged records to skip before the run ends.

    Raises:
      ConfigError: a setting that is unknown, missing, or does not fit the source.
      DataError: files missing or damaged beyond the limit, or a label out of range.
    """
    _check_source(source, data_dir)
    streamed = source == "tfrecords" and not in_memory
    augment.check(augmentation, streamed)
    if data_dir is None:
        return _BUILT_IN[source](name or source, num_classes, image_size, num_train, augmentation)
    if streamed and (not num_classes or shuffle_buffer < 1):
        raise ConfigError(
            f"data.num_classes={num_classes}, data.shuffle_buffer={shuffle_buffer}: data."
            "in_memory=False needs the number of classes and a buffer of at least 1"
        )
    schema, name = records.Schema(label_offset, num_classes), name or os.path.basename(data_dir.rstrip("/"))
    bad_records = records.BadRecords(max_bad_records)
    patterns = {"train": (train_files, "data.train_files"), "test": (test_files, "data.test_files")}
    files = {
        split: records.index_files(records.match_files(data_dir, *patterns[split]), bad_records) for split in SPLITS
    }
    if streamed:
        size = image_size or _DEFAULT_IMAGE_SIZE
        loaded: ImageData = StreamData(name, files, schema, size, augmentation, shuffle_buffer, bad_records)
    else:
        loaded = _memory(name, files, schema, image_size, augmentation, bad_records)
    if num_train not in (None, loaded.num_train):
        logging.warning("%s: %d training images, not data.num_train=%d", data_dir, loaded.num_train, num_train)
    return loaded
