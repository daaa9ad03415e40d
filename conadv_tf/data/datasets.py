"""Data sets by name: `load` takes the source that gin or the caller chooses, and hands over its images and labels."""

import dataclasses
import os
from typing import Any

import gin

from conadv_tf import paths
from conadv_tf.data import augment
from conadv_tf.data.pipeline import ImageData
from conadv_tf.data.sources import SOURCES, Demand
from conadv_tf.data.streaming import Stream
from conadv_tf.data.subset import Subset
from conadv_tf.errors import ConfigError

# The settings of AutoAugment, by the names that `load` takes.
_AUTOAUGMENT = {"autoaugment": "policy", "autoaugment_mode": "mode"}


@gin.configurable("data")
@dataclasses.dataclass(frozen=True)
class Choice:
    """The choice of a source.

    Attributes:
      source: "digits" (scikit-learn's, no files), "tfrecords" (files in the ImageNet schema), "tfds" (a data set that
        TensorFlow Datasets has prepared) or "synthetic" (noise in ImageNet's numbers, for benchmarks). The settings of
        a source bear its name.
      max_bad_records: the number of damaged records to skip before the run ends; 0 ends it at the first.
    """

    source: str = "digits"
    max_bad_records: int = 10


def check_source(source: str, data_dir: str | None) -> None:
    """Raises ConfigError for an unknown source, and for a data_dir that the source lacks or does not read."""
    if source not in SOURCES:
        *others, last = SOURCES
        raise ConfigError(f"data.source={source!r} is not known: choose {', '.join(others)} or {last}")
    chosen = SOURCES[source]
    if chosen.needs_data_dir if data_dir is None else not chosen.reads_files:
        needing = " and ".join(name for name, other in SOURCES.items() if other.needs_data_dir)
        built_in = " and ".join(name for name, other in SOURCES.items() if not other.reads_files)
        raise ConfigError(
            f"data_dir={data_dir!r} does not fit data.source={source!r}: {needing} need --data_dir, {built_in} read no "
            "files"
        )


def load(source: str | None = None, data_dir: str | None = None, **settings: Any) -> ImageData:
    """Loads a data set.

    Args:
      source: "digits", "tfrecords", "tfds" or "synthetic"; None takes gin's data.source, "digits" where gin has none.
      data_dir: directory of the TFRecord files, or TFDS' data directory (None: TFDS' default), local or gs://; `~` is
        the home folder. It is a flag of the command line, never a setting of gin.
      **settings: settings of the source, by the names of its attributes in sources.py; `max_bad_records`; `autoaugment`
        (a policy: "none", "imagenet" or "cifar10") and `autoaugment_mode` ("replace" or "concat3"); for sources of
        files `shuffle_buffer`, `cache` and `service`, see `Stream`. What is not given gin says, or the default.

    Returns:
      The data set, read into memory or ready to be streamed.

    Raises:
      ConfigError: a setting that is unknown, missing, or does not fit the source.
      DataError: files missing or damaged beyond the limit, a label out of range, or a service that does not answer.
    """
    named: dict[str, Any] = {} if source is None else {"source": source}
    if "max_bad_records" in settings:
        named["max_bad_records"] = settings.pop("max_bad_records")
    choice = Choice(**named)
    data_dir = None if data_dir is None else paths.given(os.fspath(data_dir))
    check_source(choice.source, data_dir)
    own, autoaugment, stream = _divided(choice.source, settings)
    chosen = SOURCES[choice.source](**own)
    augmentation = augment.augmentation(chosen.augmentation, **autoaugment)
    augmentation.check(choice.source, chosen.streams)
    return chosen.load(Demand(data_dir, choice.max_bad_records, augmentation, Subset(), stream))


def _divided(source: str, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The settings of the source, of AutoAugment and of the stream; ConfigError for one of none of these."""
    own = _fields(SOURCES[source])
    stream = _fields(Stream) if SOURCES[source].reads_files else []
    known = [*own, *_AUTOAUGMENT, *stream, "max_bad_records"]
    for name, value in settings.items():
        if name not in known:
            raise ConfigError(
                f"{name}={value!r} is no setting of data.source={source!r}: choose from {', '.join(known)}"
            )
    return (
        {name: value for name, value in settings.items() if name in own},
        {_AUTOAUGMENT[name]: value for name, value in settings.items() if name in _AUTOAUGMENT},
        {name: value for name, value in settings.items() if name in stream},
    )


def _fields(of: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(of)]
