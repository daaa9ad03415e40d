"""The sources of images and labels, one class each: its settings, which gin binds, and how they become a data set.

docs/data.md describes them, docs/recipes.md lists their settings.
"""

import abc
import dataclasses
import os
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import gin
import numpy as np
from absl import logging

from conadv_tf.data import class_names, record_files, records, service
from conadv_tf.data.augment import Augmentation
from conadv_tf.data.fingerprint import Files
from conadv_tf.data.memory import MemoryData, read_into_memory
from conadv_tf.data.pipeline import SPLITS, ImageData
from conadv_tf.data.streaming import Stream, StreamData
from conadv_tf.data.subset import Subset
from conadv_tf.errors import ConfigError

_IMAGENET = 1_281_167, 50_000  # train and test images
_SYNTHETIC_IMAGES = 256  # different ones; example i shows image i modulo this
_DEFAULT_IMAGE_SIZE = 224


@dataclasses.dataclass(frozen=True)
class Demand:
    """A request for a data set: all that a source needs beside its own settings.

    Attributes:
      data_dir: directory of the files, local or gs://; None for sources without files, and for TFDS' default.
      max_bad_records: damaged records to skip before the run ends.
      augmentation: the augmentation of training images.
      subset: the part of the data set to take.
      stream: settings of `Stream` that are given as arguments, over gin's.
    """

    data_dir: str | None
    max_bad_records: int
    augmentation: Augmentation
    subset: Subset
    stream: dict[str, Any] = dataclasses.field(default_factory=dict)


class Source(Protocol):
    """A source of images and labels.

    Attributes:
      title: its name, the value of data.source.
      reads_files: whether its images come from files.
      needs_data_dir: whether it cannot do without a data_dir.
      augmentation: the crop and flip of training images.
    """

    title: ClassVar[str]
    reads_files: ClassVar[bool]
    needs_data_dir: ClassVar[bool]

    def __init__(self, **settings: Any) -> None: ...

    @property
    def augmentation(self) -> str: ...

    @property
    def streams(self) -> bool:
        """Tells whether files are read as training goes, rather than once into memory."""
        ...

    def load(self, demand: Demand) -> ImageData:
        """Loads the data set."""
        ...


class _WithoutFiles:
    """Answers that all sources without files share."""

    reads_files: ClassVar[bool] = False
    needs_data_dir: ClassVar[bool] = False

    @property
    def streams(self) -> bool:
        """Tells whether files are read as training goes: there are none."""
        return False


@gin.configurable("digits")
@dataclasses.dataclass(frozen=True)
class Digits(_WithoutFiles):
    """scikit-learn's 1,797 grey 8x8 digits, 1,437 train and 360 test, stratified, always the same ones.

    Attributes:
      augmentation: the augmentation of training images: "none", "flip" or "crop_flip" (pad 4, crop, flip).
    """

    title: ClassVar[str] = "digits"

    augmentation: str = "none"

    def load(self, demand: Demand) -> MemoryData:
        """Loads the digits from scikit-learn's package."""
        from sklearn import datasets, model_selection  # seconds to import; other sources do without

        digits = datasets.load_digits()
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        labels = digits.target.astype(np.int32)
        numbers = np.arange(len(labels))
        train, test = model_selection.train_test_split(numbers, test_size=360, stratify=labels, random_state=0)
        splits = {"train": (images[train], labels[train]), "test": (images[test], labels[test])}
        taken = demand.subset.of(splits)
        loaded = MemoryData(self.title, 10, taken, demand.augmentation, record_files.BadRecords(0))
        loaded.name_classes(lambda: [str(digit) for digit in range(10)])
        return loaded


@gin.configurable("synthetic")
@dataclasses.dataclass(frozen=True)
class Synthetic(_WithoutFiles):
    """Noise, always the same, in the numbers of ImageNet where nothing else is set. For benchmarks and --preflight.

    Attributes:
      name: the name of the data set in results; None: "synthetic".
      num_classes: the number of classes; None: 1,000.
      image_size: height and width of the images, pixels; None: 224.
      num_train: the number of training images; None: ImageNet's 1,281,167. Only 256 of them differ.
      augmentation: the augmentation of training images: "none", "flip" or "crop_flip" (pad 4, crop, flip).
    """

    title: ClassVar[str] = "synthetic"

    name: str | None = None
    num_classes: int | None = None
    image_size: int | None = None
    num_train: int | None = None
    augmentation: str = "none"

    def load(self, demand: Demand) -> MemoryData:
        """Draws the noise."""
        size, classes = self.image_size or _DEFAULT_IMAGE_SIZE, self.num_classes or 1000
        random = np.random.default_rng(0)
        pool = (
            random.integers(0, 256, (_SYNTHETIC_IMAGES, size, size, 3), np.uint8),
            random.integers(0, classes, _SYNTHETIC_IMAGES, np.int32),
        )
        subset = demand.subset
        shown = subset.downscaled(pool[0]), pool[1]
        sizes = {
            "train": subset.num_train(self.num_train or _IMAGENET[0]),
            "validation": subset.validation_images,
            "test": _IMAGENET[1],
        }
        sizes = {split: size for split, size in sizes.items() if size}
        splits, none_bad = dict.fromkeys(sizes, shown), record_files.BadRecords(0)
        return MemoryData(self.name or self.title, classes, splits, demand.augmentation, none_bad, sizes)


class _Found(Protocol):
    """Data in files, found and not yet read: _FoundRecords or tfds.TfdsData. Splits are "train" and "test"."""

    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> str: ...

    @property
    def channels(self) -> int: ...

    @property
    def schema(self) -> records.Schema: ...

    def paths(self, split: str) -> list[str]: ...

    def split_files(self, split: str) -> list[str]: ...

    def class_names(self, num_classes: int) -> Sequence[str] | None: ...

    def read_into_memory(
        self, split: str, bad_records: record_files.BadRecords, image_shape: tuple[int, int, int] | None
    ) -> tuple[np.ndarray, np.ndarray]: ...


class _Files(abc.ABC):
    """Reading that all sources of files share: images read into memory, or streamed as training goes."""

    title: ClassVar[str]
    reads_files: ClassVar[bool] = True

    name: str | None
    num_classes: int | None
    image_size: int | None
    num_train: int | None
    in_memory: bool

    @property
    def streams(self) -> bool:
        """Tells whether files are read as training goes, rather than once into memory."""
        return not self.in_memory

    @abc.abstractmethod
    def find(self, data_dir: str | None) -> _Found:
        """Looks the files up."""

    def load(self, demand: Demand) -> ImageData:
        """Reads the files into memory, or prepares to stream them.

        Raises:
          ConfigError: settings that do not fit together.
          DataError: files that are missing or damaged beyond the limit, or a service that does not answer.
        """
        loaded = self._streamed(demand) if self.streams else self._in_memory(demand)
        if self.num_train and loaded.num_train != demand.subset.num_train(self.num_train):
            logging.warning(
                "%s: %d training images, not %s.num_train=%d",
                demand.data_dir or loaded.name,
                loaded.num_train,
                self.title,
                self.num_train,
            )
        return loaded

    def _streamed(self, demand: Demand) -> StreamData:
        if not demand.subset.is_whole:
            raise ConfigError(
                f"{demand.subset} takes a part of images in memory: set {self.title}.in_memory=True, or drop it"
            )
        stream = Stream(**demand.stream)
        services = service.check(stream.service) if stream.service else []
        bad_records = record_files.BadRecords(demand.max_bad_records)
        found = self.find(demand.data_dir)
        files = {split: record_files.index_files(found.split_files(split), bad_records) for split in SPLITS}
        loaded = StreamData(
            self.name or found.name,
            found.folder,
            files,
            found.schema,
            self.image_size or _DEFAULT_IMAGE_SIZE,
            demand.augmentation,
            stream.shuffle_buffer,
            bad_records,
            stream.cache == "memory",
            services,
        )
        loaded.name_classes(lambda: found.class_names(loaded.num_classes))
        return loaded

    def _in_memory(self, demand: Demand) -> MemoryData:
        for name, value in demand.stream.items():
            raise ConfigError(f"{name}={value!r} is for streamed files: drop it, or set in_memory=False")
        bad_records = record_files.BadRecords(demand.max_bad_records)
        found = self.find(demand.data_dir)
        shape = (self.image_size, self.image_size, found.channels) if self.image_size else None
        splits = {}
        for split in SPLITS:
            splits[split] = found.read_into_memory(split, bad_records, shape)
            shape = splits[split][0].shape[1:]
        if bad_records.count:
            logging.warning("%s", bad_records.report())
        num_classes = found.schema.num_classes or 1 + max(int(labels.max()) for _, labels in splits.values())
        taken = demand.subset.of(splits)
        files = Files(found.folder, {split: dict.fromkeys(found.paths(split), "") for split in SPLITS})
        loaded = MemoryData(self.name or found.name, num_classes, taken, demand.augmentation, bad_records, files=files)
        loaded.name_classes(lambda: found.class_names(num_classes))
        return loaded


@dataclasses.dataclass(frozen=True)
class _FoundRecords:
    name: str
    folder: str
    schema: records.Schema
    files: dict[str, list[str]]
    channels: int = 3

    def paths(self, split: str) -> list[str]:
        return self.files[split]

    def split_files(self, split: str) -> list[str]:
        return self.files[split]

    def class_names(self, num_classes: int) -> Sequence[str] | None:
        return class_names.beside(self.folder) or class_names.within(self.files["test"], self.schema, num_classes)

    def read_into_memory(
        self, split: str, bad_records: record_files.BadRecords, image_shape: tuple[int, int, int] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        files = record_files.index_files(self.files[split], bad_records)
        return read_into_memory(files, self.schema, bad_records, image_shape)


@gin.configurable("tfrecords")
@dataclasses.dataclass(frozen=True)
class TFRecords(_Files):
    """TFRecord files in the ImageNet schema, plain or GZIP, in --data_dir.

    Attributes:
      name: the name of the data set in results; None: the last part of --data_dir.
      num_classes: the number of classes: labels are 0..num_classes-1. None: the largest label plus 1, for images in
        memory; streamed files need the number.
      image_size: height and width of the images, pixels. In memory every image must have that size (None: the first
        image's); streamed images are cropped and resized to it (None: 224).
      num_train: the number of training images that the recipe expects; another one is warned about, since a shard may
        be missing. None: any number.
      image_feature: the name of the feature that has the encoded image, 1 bytes.
      label_feature: the name of the feature that has the label, 1 int64.
      label_offset: the stored label of class 0: 1 for ImageNet as the Cloud TPU script writes it.
      train_files: the pattern of the training files below --data_dir, or several patterns, tried in turn.
      test_files: the pattern of the test files below --data_dir, or several patterns, tried in turn.
      in_memory: whether all images are decoded into memory at load; False streams the files as training goes, see
        `stream`.
      augmentation: the augmentation of training images: "none"; "flip"; in memory "crop_flip" (pad 4, crop, flip);
        streamed "resized_crop_flip" (area 0.08..1, aspect 3/4..4/3, flip).
    """

    title: ClassVar[str] = "tfrecords"
    needs_data_dir: ClassVar[bool] = True

    name: str | None = None
    num_classes: int | None = None
    image_size: int | None = None
    num_train: int | None = None
    image_feature: str = "image/encoded"
    label_feature: str = "image/class/label"
    label_offset: int = 0
    train_files: str | Sequence[str] = "train-*"
    test_files: str | Sequence[str] = ("validation-*", "test-*")
    in_memory: bool = True
    augmentation: str = "none"

    def find(self, data_dir: str | None) -> _Found:
        """Lists the files of both splits."""
        if self.streams and not self.num_classes:
            raise ConfigError(
                f"tfrecords.num_classes={self.num_classes} with tfrecords.in_memory=False, which needs the number of "
                "classes: set it"
            )
        folder = str(data_dir)
        files = {
            "train": record_files.match_files(folder, self.train_files, "tfrecords.train_files"),
            "test": record_files.match_files(folder, self.test_files, "tfrecords.test_files"),
        }
        schema = records.Schema(self.label_offset, self.num_classes, self.image_feature, self.label_feature)
        return _FoundRecords(os.path.basename(folder.rstrip("/")), folder, schema, files)


@gin.configurable("tfds")
@dataclasses.dataclass(frozen=True)
class Tfds(_Files):
    """An image-classification data set that TensorFlow Datasets has prepared in --data_dir; nothing is downloaded.

    Attributes:
      dataset: the data set as TFDS calls it, "name", "name/config" or "name/config:version"; None is refused. To
        be streamed it must be stored in TFRecords.
      name: the name of the data set in results; None: TFDS' name, without config and version.
      train_split: the training split, by TFDS' name; in memory it may be a part, "train[:90%]".
      test_split: the test split, by TFDS' name or a part; None: the first there is of "validation" and "test".
      num_classes: the number of classes that the recipe expects; None: what TFDS says.
      image_size: height and width of the images, pixels. In memory every image must have that size (None: the first
        image's); streamed images are cropped and resized to it (None: 224).
      num_train: the number of training images that the recipe expects; another one is warned about. None: any number.
      in_memory: whether all images are decoded into memory at load; False streams the files as training goes, see
        `stream`.
      augmentation: the augmentation of training images: "none"; "flip"; in memory "crop_flip" (pad 4, crop, flip);
        streamed "resized_crop_flip" (area 0.08..1, aspect 3/4..4/3, flip).
    """

    title: ClassVar[str] = "tfds"
    needs_data_dir: ClassVar[bool] = False

    dataset: str | None = None
    name: str | None = None
    train_split: str = "train"
    test_split: str | None = None
    num_classes: int | None = None
    image_size: int | None = None
    num_train: int | None = None
    in_memory: bool = True
    augmentation: str = "none"

    def find(self, data_dir: str | None) -> _Found:
        """Looks the data set up in TFDS' folder."""
        if not self.dataset:
            raise ConfigError("tfds.dataset=None does not say which data set of TFDS: name one, such as 'imagenet2012'")
        from conadv_tf.data import tfds  # seconds to import; other sources do without

        return tfds.TfdsData(self.dataset, data_dir, self.train_split, self.test_split, self.num_classes)


SOURCES: dict[str, type[Source]] = {source.title: source for source in (Digits, TFRecords, Tfds, Synthetic)}
