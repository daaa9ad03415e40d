"""The data sets of recipes: which images and labels they have (SPEC section 8); pipeline.py hands them out."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Protocol

import gin
import numpy as np
from absl import logging

from conadv_tf.data import augment, record_files, records
from conadv_tf.data import service as data_service
from conadv_tf.data.memory import MemoryData, read_into_memory
from conadv_tf.data.pipeline import SPLITS, ImageData
from conadv_tf.data.streaming import StreamData
from conadv_tf.data.subset import Subset
from conadv_tf.errors import ConfigError

_IMAGENET = 1_281_167, 50_000  # train and test images
_SYNTHETIC_IMAGES = 256  # different ones; example i shows image i modulo this
_DEFAULT_IMAGE_SIZE = 224
CACHES = ("none", "memory")
# What only one source reads, and its value where nothing sets it.
_TFRECORD_SETTINGS: dict[str, Any] = {
    "label_offset": 0,
    "train_files": "train-*",
    "test_files": ("validation-*", "test-*"),
}
_TFDS_SETTINGS: dict[str, Any] = {"tfds_name": None, "train_split": "train", "test_split": None}


def _digits(
    name: str,
    num_classes: int | None,
    image_size: int | None,
    num_train: int | None,
    augmentation: augment.Augmentation,
    subset: Subset,
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
    return MemoryData(name, 10, subset.of(splits), augmentation, record_files.BadRecords(0))


def _synthetic(
    name: str,
    num_classes: int | None,
    image_size: int | None,
    num_train: int | None,
    augmentation: augment.Augmentation,
    subset: Subset,
) -> MemoryData:
    """Noise in the shape of ImageNet unless told otherwise, always the same, for benchmarks and --preflight."""
    size, classes = image_size or _DEFAULT_IMAGE_SIZE, num_classes or 1000
    random = np.random.default_rng(0)
    pool = (
        random.integers(0, 256, (_SYNTHETIC_IMAGES, size, size, 3), np.uint8),
        random.integers(0, classes, _SYNTHETIC_IMAGES, np.int32),
    )
    shown = subset.downscaled(pool[0]), pool[1]
    sizes = {
        "train": subset.num_train(num_train or _IMAGENET[0]),
        "validation": subset.validation_images,
        "test": _IMAGENET[1],
    }
    sizes = {split: size for split, size in sizes.items() if size}
    return MemoryData(name, classes, dict.fromkeys(sizes, shown), augmentation, record_files.BadRecords(0), sizes)


class _Stored(Protocol):
    """Data in files, found and not yet read: _TFRecords or tfds_source.TfdsData. Splits are "train" and "test"."""

    @property
    def name(self) -> str: ...

    @property
    def channels(self) -> int: ...

    @property
    def schema(self) -> records.Schema: ...

    def split_files(self, split: str) -> list[str]: ...

    def read_into_memory(
        self, split: str, bad_records: record_files.BadRecords, image_shape: tuple[int, int, int] | None
    ) -> tuple[np.ndarray, np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class _TFRecords:
    name: str
    schema: records.Schema
    paths: dict[str, list[str]]
    channels: int = 3

    def split_files(self, split: str) -> list[str]:
        return self.paths[split]

    def read_into_memory(
        self, split: str, bad_records: record_files.BadRecords, image_shape: tuple[int, int, int] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        files = record_files.index_files(self.paths[split], bad_records)
        return read_into_memory(files, self.schema, bad_records, image_shape)


def _memory(
    name: str,
    stored: _Stored,
    image_size: int | None,
    augmentation: augment.Augmentation,
    bad_records: record_files.BadRecords,
    subset: Subset,
) -> MemoryData:
    shape = (image_size, image_size, stored.channels) if image_size else None
    splits = {}
    for split in SPLITS:
        splits[split] = stored.read_into_memory(split, bad_records, shape)
        shape = splits[split][0].shape[1:]
    if bad_records.count:
        logging.warning("%s", bad_records.report())
    num_classes = stored.schema.num_classes or 1 + max(int(labels.max()) for _, labels in splits.values())
    return MemoryData(name, num_classes, subset.of(splits), augmentation, bad_records)


_BUILT_IN = {"digits": _digits, "synthetic": _synthetic}


def check_source(source: str, data_dir: str | None) -> None:
    """Raises ConfigError for a source there is none of, and where `data_dir` is missing or too much."""
    if source not in (*_BUILT_IN, "tfrecords", "tfds"):
        raise ConfigError(f"data.source={source!r} is not known: choose digits, tfrecords, tfds or synthetic")
    if source != "tfds" and (source in _BUILT_IN) != (data_dir is None):
        raise ConfigError(
            f"data_dir={data_dir!r} does not fit data.source={source!r}: tfrecords need "
            "--data_dir, digits and synthetic read no files"
        )


def _find(
    source: str,
    data_dir: str | None,
    num_classes: int | None,
    tfds_settings: dict[str, Any],
    record_settings: dict[str, Any],
) -> _Stored:
    if source == "tfds":
        from conadv_tf.data import tfds as tfds_source  # seconds to import; other sources do without

        return tfds_source.TfdsData(data_dir=data_dir, num_classes=num_classes, **tfds_settings)
    paths = {
        split: record_files.match_files(str(data_dir), record_settings[f"{split}_files"], f"data.{split}_files")
        for split in SPLITS
    }
    schema = records.Schema(record_settings["label_offset"], num_classes)
    return _TFRecords(os.path.basename(str(data_dir).rstrip("/")), schema, paths)


def _check_settings(source: str, settings: dict[str, Any]) -> None:
    """Raises ConfigError at what this source does not read; synthetic data stand in for any, settings and all."""
    unused = {"tfrecords": _TFDS_SETTINGS, "tfds": _TFRECORD_SETTINGS, "digits": _TFDS_SETTINGS}.get(source, {})
    for name, default in unused.items():
        if settings[name] != default:
            other = "tfds" if name in _TFDS_SETTINGS else "tfrecords"
            raise ConfigError(
                f"data.{name}={settings[name]!r} has no effect on data.source={source!r}: drop it, or set "
                f"data.source={other!r}"
            )
    if source == "tfds" and not settings["tfds_name"]:
        raise ConfigError("data.tfds_name=None does not say which data set of TFDS: name one, such as 'imagenet2012'")


def _check_reading(source: str, streamed: bool, cache: str, service: str | None) -> list[str]:
    """The addresses of `service`; ConfigError where cache or service do not fit. Synthetic data stand in for any."""
    if cache not in CACHES:
        raise ConfigError(f"data.cache={cache!r} is not known: choose one of {', '.join(CACHES)}")
    if source == "synthetic":
        return []
    if not streamed and (cache != "none" or service):
        raise ConfigError(
            f"data.cache={cache!r}, data.service={service!r} have no effect on images in memory: drop them, or stream "
            "files with data.in_memory=False"
        )
    if cache != "none" and service:
        raise ConfigError(
            f"data.cache={cache!r} with data.service={service!r}: the service reads in the hosts' place, which thus "
            "have nothing to keep: drop one of them"
        )
    return data_service.check(service) if service else []


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
    tfds_name: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    augmentation: str = "none",
    autoaugment: str = "none",
    autoaugment_mode: str = "replace",
    in_memory: bool = True,
    shuffle_buffer: int = 16_384,
    max_bad_records: int = 10,
    cache: str = "none",
    service: str | None = None,
) -> ImageData:
    """Loads a data set.

    Args:
      source: "digits" (scikit-learn's, no files), "tfrecords" (ImageNet schema, plain or GZIP), "tfds" (an image
        classification data set that TFDS has prepared), or "synthetic" (noise in ImageNet's numbers, for benchmarks).
      name: what to call it in results; None takes the source, the last part of data_dir, or TFDS's name.
      data_dir: directory of the TFRecord files, or TFDS's data directory (None: its default), local or gs://; a flag,
        not a gin parameter.
      label_offset: the stored label of class 0 (1 for ImageNet as the Cloud TPU script writes it).
      num_classes: labels are 0..num_classes-1; None: the largest label plus 1 (TFRecords in memory), what TFDS says,
        1000 (synthetic).
      image_size: height and width, pixels. In memory every image must have it (None: the first image's);
        streamed images are cropped and resized to it (None: 224).
      num_train: training images of synthetic data (None: ImageNet's 1,281,167); of files, what the recipe expects:
        another number is warned about, since a shard may be missing.
      train_files: pattern, or patterns tried in turn, below data_dir.
      test_files: likewise.
      tfds_name: "name", "name/config" or "name/config:version"; to be streamed it must hold JPEGs in TFRecords.
      train_split: of TFDS; in memory it may be a part, "train[:90%]".
      test_split: likewise; None: the first there is of "validation" and "test".
      augmentation: of training images: "none"; "flip"; "crop_flip" (pad 4, crop, flip; in memory);
        "resized_crop_flip" (area 0.08..1, aspect 3/4..4/3, flip; streamed).
      autoaugment: policy of AutoAugment, after crop and flip: "none", "imagenet" or "cifar10".
      autoaugment_mode: "replace" puts its image in the clean one's place, "concat3" hands out both (adversarial methods
        train on clean, augmented and adversarial images through three BN branches, as the TF1 release does).
      in_memory: decode all images at load; False reads the files as training goes.
      shuffle_buffer: records in the shuffle buffer of each host, streamed files only.
      max_bad_records: damaged records to skip before the run ends.
      cache: "none", or "memory": a host that streams files keeps what it reads in its memory, of the training split the
        encoded records of its share (of ImageNet 140 GB over all hosts), of the test split the decoded images of its
        share (7.5 GB over all hosts at 224 pixels). The batches are the same; nothing is fetched or, for evaluation,
        decoded a second time.
      service: addresses of processes that decode and augment the training stream in the hosts' place, "grpc://HOST:PORT",
        several separated by commas; None: the hosts do. See data_service.py.

    Raises:
      ConfigError: a setting that is unknown, missing, or does not fit the source.
      DataError: files missing or damaged beyond the limit, a label out of range, or a service that does not answer.
    """
    check_source(source, data_dir)
    tfds_settings = {"tfds_name": tfds_name, "train_split": train_split, "test_split": test_split}
    record_settings = {"label_offset": label_offset, "train_files": train_files, "test_files": test_files}
    _check_settings(source, tfds_settings | record_settings)
    streamed = source not in _BUILT_IN and not in_memory
    transform = augment.Augmentation(augmentation, autoaugment, autoaugment_mode)
    transform.check(streamed)
    services = _check_reading(source, streamed, cache, service)
    subset = Subset()
    if streamed and not subset.is_whole:
        raise ConfigError(f"{subset} takes a part of images in memory: set data.in_memory=True, or drop it")
    if source in _BUILT_IN:
        return _BUILT_IN[source](name or source, num_classes, image_size, num_train, transform, subset)
    if streamed and ((source == "tfrecords" and not num_classes) or shuffle_buffer < 1):
        raise ConfigError(
            f"data.num_classes={num_classes}, data.shuffle_buffer={shuffle_buffer}: data."
            "in_memory=False needs the number of classes and a buffer of at least 1"
        )
    bad_records = record_files.BadRecords(max_bad_records)
    stored = _find(source, data_dir, num_classes, tfds_settings, record_settings)
    name = name or stored.name
    if streamed:
        files = {split: record_files.index_files(stored.split_files(split), bad_records) for split in SPLITS}
        size = image_size or _DEFAULT_IMAGE_SIZE
        how = (shuffle_buffer, bad_records, cache == "memory", services)
        loaded: ImageData = StreamData(name, files, stored.schema, size, transform, *how)
    else:
        loaded = _memory(name, stored, image_size, transform, bad_records, subset)
    if num_train and loaded.num_train != subset.num_train(num_train):
        logging.warning("%s: %d training images, not data.num_train=%d", data_dir or name, loaded.num_train, num_train)
    return loaded
