"""TFDS data sets of images and labels, as TFDS has prepared them; nothing is downloaded.

Any of them can be decoded into memory through TFDS. The record files of those stored in TFRecords are
streamed like other TFRecords: a record is a tf.train.Example that has the features "image" and "label".
"""

import difflib
import re

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from conadv_tf.data import record_files, records
from conadv_tf.errors import ConfigError, DataError

_IMAGE, _LABEL = "image", "label"
_TEST_SPLITS = "validation", "test"
_NAMESPACE = re.compile(r"[^/:]*:(?!\d|\*)")  # before a name, not between a name and its version


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split("\n")[0].split()).rstrip(".:, ")


def _builder(dataset: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    if _NAMESPACE.match(dataset):
        raise ConfigError(
            f"tfds.dataset={dataset!r} is looked up in a namespace on the network: prepare it with TFDS in "
            "--data_dir, and give its name without the namespace"
        )
    try:
        return tfds.builder(dataset, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        close = difflib.get_close_matches(dataset, tfds.list_builders(with_community_datasets=False), 1)
        hint = f"did you mean {close[0]!r}?" if close else "see tensorflow_datasets.list_builders()"
        raise ConfigError(f"tfds.dataset={dataset!r} is no data set of TFDS, nor of data_dir: {hint}") from error
    except (AssertionError, ValueError) as error:  # what TFDS raises at names, configs and versions it lacks
        raise ConfigError(
            f"tfds.dataset={dataset!r}: {_first_line(error)}: give it as name, name/config or name/config:version"
        ) from error


class TfdsData:
    """A prepared TFDS data set, looked up and checked.

    Args:
      dataset: "name", "name/config" or "name/config:version".
      data_dir: the TFDS data directory, local or gs://; None takes TFDS' default.
      train_split: the training split by TFDS' name; may be a part, "train[:90%]".
      test_split: the test split by TFDS' name or a part; None takes the first there is of "validation" and "test".
      num_classes: the number of classes that the recipe expects; None takes what TFDS says.

    Attributes:
      name: the name of the data set, without config and version.
      schema: how its records become examples.
      channels: the number of channels of its images, 1 or 3.
      folder: the folder of its files, local or gs://.

    Raises:
      ConfigError: an unknown name or split, no supervised image classification, another number of classes.
      DataError: the data set is not prepared.
    """

    def __init__(
        self,
        dataset: str,
        data_dir: str | None,
        train_split: str,
        test_split: str | None,
        num_classes: int | None,
    ):
        self._builder = _builder(dataset, data_dir)
        self._requested, self.name = dataset, self._builder.name
        self.folder = str(self._builder.data_dir)
        self.schema = records.Schema(0, self._num_classes(num_classes), _IMAGE, _LABEL, "tfds")
        self.channels: int = self._builder.info.features[_IMAGE].shape[-1]
        self._splits = {"train": train_split, "test": test_split or self._default_test_split()}
        self._datasets = {split: self._dataset(split) for split in self._splits}

    def _num_classes(self, expected: int | None) -> int:
        features = dict(self._builder.info.features.items())
        image, label = (features.get(name) for name in (_IMAGE, _LABEL))
        if not isinstance(image, tfds.features.Image) or not isinstance(label, tfds.features.ClassLabel):
            raise ConfigError(
                f"tfds.dataset={self._requested!r} has features {', '.join(features)}, not an image and its class "
                f"as {_IMAGE} and {_LABEL}: choose an image-classification data set"
            )
        if image.np_dtype != np.uint8 or image.shape[-1] not in (1, 3):
            raise ConfigError(
                f"tfds.dataset={self._requested!r} has images of type {np.dtype(image.np_dtype).name}, shape "
                f"{image.shape}: choose one with 1 or 3 channels of uint8"
            )
        if (expected or label.num_classes) != label.num_classes:
            raise ConfigError(
                f"tfds.num_classes={expected}, but {self.name} has {label.num_classes} classes: drop the setting"
            )
        return label.num_classes

    def _default_test_split(self) -> str:
        splits = list(self._builder.info.splits)
        found = [name for name in _TEST_SPLITS if name in splits]
        if splits and not found:
            raise ConfigError(
                f"tfds.test_split=None, but {self.name} has splits {', '.join(splits)} only: set tfds.train_split and "
                f"tfds.test_split, such as '{splits[0]}[:90%]' and '{splits[0]}[90%:]'"
            )
        # TFDS knows no splits of what is not prepared; reading it says so.
        return found[0] if found else _TEST_SPLITS[-1]

    def _dataset(self, split: str) -> tf.data.Dataset:
        """Examples of the split, images still encoded, shard after shard as in a stream."""
        whole_shards_in_order = tfds.ReadConfig(interleave_cycle_length=1)
        try:
            return self._builder.as_dataset(
                split=self._splits[split],
                decoders={_IMAGE: tfds.decode.SkipDecoding()},
                read_config=whole_shards_in_order,
            )
        except AssertionError as error:
            root = self._builder.data_dir_root
            raise DataError(
                f"{self._builder.data_dir}: data set {self._requested!r} is not prepared: correct --data_dir, or "
                f'prepare it: python -c "import tensorflow_datasets as tfds; '
                f'tfds.builder({self._requested!r}, data_dir={str(root)!r}).download_and_prepare()"'
            ) from error
        except NotImplementedError as error:
            raise ConfigError(self._file_format_message()) from error
        except (ValueError, KeyError) as error:
            raise ConfigError(
                f"tfds.{split}_split={self._splits[split]!r} is no split of {self.name}: choose from "
                f"{', '.join(self._builder.info.splits)}, or a part such as 'train[:90%]'"
            ) from error

    def _file_format_message(self) -> str:
        return (
            f"tfds.dataset={self._requested!r} is stored as {self._builder.info.file_format.value}, and only "
            "TFRecords are read: prepare it with file_format='tfrecord' in another --data_dir"
        )

    def class_names(self, num_classes: int) -> list[str]:
        """The names of the classes by label, which are numbers where the data set names none."""
        return self._builder.info.features[_LABEL].names

    def paths(self, split: str) -> list[str]:
        """Lists the files that "train" or "test" is read from, whole or in part; none of what TFDS makes up."""
        splits = self._builder.info.splits
        return [str(path) for path in splits[self._splits[split]].filepaths] if splits else []

    def split_files(self, split: str) -> list[str]:
        """Lists the TFRecord files of "train" or "test", for streaming.

        Raises:
          ConfigError: the files cannot be streamed: not TFRecords, or a part of a split.
        """
        name, splits = self._splits[split], self._builder.info.splits
        if name not in list(splits):
            raise ConfigError(
                f"tfds.{split}_split={name!r} is a part of a split, and files are streamed whole: choose from "
                f"{', '.join(splits)}, or set tfds.in_memory=True"
            )
        if self._builder.info.file_format != tfds.core.FileFormat.TFRECORD:
            raise ConfigError(self._file_format_message())
        return self.paths(split)

    def read_into_memory(
        self, split: str, bad_records: record_files.BadRecords, image_shape: tuple[int, ...] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Decodes every image of "train" or "test" through TFDS, in order.

        Args:
          split: "train" or "test".
          bad_records: the count of images that do not decode, or have another shape; they are left out.
          image_shape: (H, W, C) that every image must have; None takes the first good image's.

        Returns:
          (images uint8 [n, H, W, C], labels int32 [n]) of the n good examples.

        Raises:
          DataError: label out of range, more bad images than allowed, or no good one.
        """
        place = f"{self.name} {self._splits[split]}"
        decoded, count = self._decoded(split)
        images, good = None, np.zeros(count, bool)
        labels, faults = np.zeros(count, np.int32), dict.fromkeys(range(count), "corrupt image")
        for number, image, label in decoded.as_numpy_iterator():
            image_shape = image_shape or image.shape
            if image.shape != image_shape:
                faults[number] = self.schema.wrong_shape(image.shape, image_shape)
                continue
            images = np.zeros((count, *image_shape), np.uint8) if images is None else images
            images[number], labels[number] = image, self.schema.check_label(int(label), place, int(number))
            good[number] = True
        for number in np.flatnonzero(~good):
            bad_records.add(place, int(number), faults[int(number)])
        if images is None:
            raise DataError(f"{place} holds no good image of {count}: prepare the data set again")
        return images[good], labels[good]

    def _decoded(self, split: str) -> tuple[tf.data.Dataset, int]:
        """Decodes examples to (number int64, image uint8 [H, W, C], label int64), and counts all, broken ones too."""
        decode = self._builder.info.features[_IMAGE].decode_example
        examples = self._datasets[split]
        decoded = examples.enumerate().map(
            lambda number, example: (number, decode(example[_IMAGE]), example[_LABEL]),
            num_parallel_calls=tf.data.AUTOTUNE,
        )
        return decoded.ignore_errors().prefetch(tf.data.AUTOTUNE), int(examples.cardinality())
