"""Images and labels for training and exact evaluation; docs/data.md describes both.

Examples are (image uint8 [H, W, C] in 0..255, label int32 in 0..num_classes-1); normalisation belongs to the
network. The training stream is permutation(seed, epoch 0) ++ permutation(seed, epoch 1) ++ ..., position p
lies in epoch p // num_train, and update t of global batch B takes positions [tB, (t+1)B): each image exactly
once in each pass, and any update can be rebuilt from (seed, t) alone.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf
from absl import logging

from conadv_tf.data import augment, record_files
from conadv_tf.data.fingerprint import Fingerprint
from conadv_tf.errors import ConfigError

SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True)
class HostReading:
    """The share of a stream that one host reads, and its batches.

    A micro global batch is num_replicas * rows_per_replica consecutive positions; replica k takes the k-th
    rows_per_replica of them. Replicas belong to hosts in order, the same number to each.

    Attributes:
      rows_per_replica: images in one batch of one replica.
      num_replicas: the number of replicas of all hosts together.
      num_hosts: the number of hosts that read.
      host: the number of this host.

    Raises:
      ConfigError: a count below 1, an unknown host, or replicas that do not divide over the hosts.
    """

    rows_per_replica: int
    num_replicas: int
    num_hosts: int = 1
    host: int = 0

    def __post_init__(self):
        if min(self.rows_per_replica, self.num_replicas, self.num_hosts) < 1:
            raise ConfigError(f"{self} has a count below 1: give each replica and host something to do")
        if not 0 <= self.host < self.num_hosts:
            raise ConfigError(f"host={self.host} is outside 0..{self.num_hosts - 1}: hosts count from 0")
        if self.num_replicas % self.num_hosts:
            raise ConfigError(
                f"num_replicas={self.num_replicas} does not divide over num_hosts="
                f"{self.num_hosts}: give every host the same number of replicas"
            )

    @property
    def replicas_per_host(self) -> int:
        """The number of batches of a host in one micro global batch."""
        return self.num_replicas // self.num_hosts

    @property
    def rows_per_host(self) -> int:
        """The number of images of a host in one micro global batch."""
        return self.replicas_per_host * self.rows_per_replica

    def positions(self, batch: tf.Tensor) -> tf.Tensor:
        """The positions int64 [rows_per_replica] of this host's batch number `batch`, from position 0 on."""
        micro_batch, replica = batch // self.replicas_per_host, batch % self.replicas_per_host
        first = micro_batch * self.num_replicas + self.host * self.replicas_per_host + replica
        return first * self.rows_per_replica + tf.range(self.rows_per_replica, dtype=tf.int64)


def _finish(batches: tf.data.Dataset) -> tf.data.Dataset:
    options = tf.data.Options()
    options.deterministic = True
    # HostReading already says what each host reads.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return batches.prefetch(tf.data.AUTOTUNE).with_options(options)


class ImageData(abc.ABC):
    """A training and a test split.

    Attributes:
      name: the name of the data set in results.
      num_classes: the number of classes; labels are 0..num_classes-1.
      image_shape: (H, W, C) of every image that is handed out.
      sizes: the number of examples in each split: "train", "test" and perhaps "validation". Streamed files: all whole
        records, including those that turn out bad when they are decoded.
      bad_records: `record_files.BadRecords`, count and per-file report; streaming adds to it while it reads.
      augmentation: the augmentation of training images.
      services: addresses "HOST:PORT" of processes that make the training batches; see service.py.
      view: the way in which an image file is seen by evaluation.
    """

    services: Sequence[str] = ()
    view: augment.View = augment.WHOLE_VIEW

    def __init__(
        self,
        name: str,
        num_classes: int,
        image_shape: tuple[int, int, int],
        sizes: dict[str, int],
        bad_records: record_files.BadRecords,
        augmentation: augment.Augmentation,
    ):
        self.name, self.num_classes, self.image_shape = name, num_classes, image_shape
        self.augmentation = augmentation
        self.sizes, self.bad_records = sizes, bad_records
        self._find_names: Callable[[], Sequence[str] | None] = lambda: None

    def name_classes(self, find: Callable[[], Sequence[str] | None]) -> None:
        """Takes a function that finds the names of the classes by label; it is called when they are first wanted."""
        self._find_names = find

    @functools.cached_property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes by label, each on one line; None where the data name none."""
        names = self._find_names()
        if names is not None and len(names) != self.num_classes:
            logging.warning("%s: %d names for %d classes are not used", self.name, len(names), self.num_classes)
            return None
        return None if names is None else tuple(" ".join(name.split()) for name in names)

    @property
    def num_train(self) -> int:
        """The number of training examples."""
        return self.sizes["train"]

    @property
    def num_test(self) -> int:
        """The number of test examples."""
        return self.sizes["test"]

    def train_batches(
        self,
        rows_per_replica: int,
        num_replicas: int,
        start_position: int = 0,
        seed: int = 0,
        num_hosts: int = 1,
        host: int = 0,
    ) -> tf.data.Dataset:
        """The endless training stream of one host, from any position on.

        Args:
          rows_per_replica: images in a batch, the micro-batch size of one replica.
          num_replicas: the number of replicas of all hosts together.
          start_position: images of the global stream before the first batch, e.g. update * global batch.
          seed: the seed of order and augmentation.
          num_hosts: the number of hosts that read.
          host: the number of this host.

        Returns:
          Dataset of (images uint8 [rows_per_replica, *train_shape], labels int32 [rows_per_replica]), one element
          for each replica of this host in turn. In memory, hosts take slices of one stream; streamed files
          are divided over the hosts, each of which permutes its own share.

        Raises:
          ConfigError: see `HostReading`; a start that is negative or does not divide over the hosts.
          DataError: within a tf.errors exception while iterating (`errors.data_error` finds it).
        """
        reading = HostReading(rows_per_replica, num_replicas, num_hosts, host)
        if start_position < 0:
            raise ConfigError(f"start_position={start_position} is negative: it counts images seen so far")
        return _finish(self._train(reading, start_position, seed))

    def evaluation_batches(
        self, split: str, rows_per_replica: int, num_replicas: int, num_hosts: int = 1, host: int = 0
    ) -> tf.data.Dataset:
        """Every example of a split exactly once over all hosts and replicas, in order, not augmented.

        Returns:
          Finite dataset of (images uint8 [rows_per_replica, H, W, C], labels int32 [rows_per_replica],
          weights float32 [rows_per_replica]), one element for each replica of this host in turn,
          `evaluation_steps` for each replica. Weights are 1; 0 for padding (black, label 0) and bad records.

        Raises:
          ConfigError: see `HostReading`; unknown split.
          DataError: see `train_batches`.
        """
        reading = HostReading(rows_per_replica, num_replicas, num_hosts, host)
        steps = self.evaluation_steps(split, rows_per_replica, num_replicas, num_hosts)
        return _finish(self._evaluation(split, reading, steps, keeps=True))

    def evaluation_steps(self, split: str, rows_per_replica: int, num_replicas: int, num_hosts: int = 1) -> int:
        """The number of batches that `evaluation_batches` gives to each replica, equal for all."""
        if split not in self.sizes:
            raise ConfigError(f"split={split!r} is not known: choose one of {', '.join(self.sizes)}")
        reading = HostReading(rows_per_replica, num_replicas, num_hosts)
        return -(-self._largest_share(split, num_hosts) // reading.rows_per_host)

    @property
    def train_shape(self) -> tuple[int, ...]:
        """The shape of a training example: (H, W, C), or (2, H, W, C) with AutoAugment's image beside the clean one."""
        return (2, *self.image_shape) if self.augmentation.concatenates else self.image_shape

    @property
    def cache_bytes(self) -> tuple[int, int]:
        """Bytes that stream.cache takes over all hosts, for encoded training records and for decoded test images."""
        return 0, 0

    def examples(self, split: str, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The first n good examples of a split: (images uint8 [<=n, H, W, C], labels int32 [<=n])."""
        single = self._evaluation(split, HostReading(1, 1), self.evaluation_steps(split, 1, 1), keeps=False)
        good = _finish(single).unbatch().filter(lambda image, label, weight: weight > 0)
        images, labels, _ = next(iter(good.batch(n)))
        return images.numpy(), labels.numpy()

    @functools.cached_property
    def fingerprint(self) -> Fingerprint:
        """What tells these data from others, wherever they lie; the first call reads a block of each file.

        Raises:
          DataError: if a file cannot be read.
        """
        return self._fingerprint()

    @abc.abstractmethod
    def _train(self, reading: HostReading, start_position: int, seed: int) -> tf.data.Dataset:
        """See `train_batches`."""

    @abc.abstractmethod
    def _evaluation(self, split: str, reading: HostReading, steps: int, keeps: bool) -> tf.data.Dataset:
        """See `evaluation_batches`; `keeps`: what is read is kept for the next time, where stream.cache asks for it."""

    @abc.abstractmethod
    def _fingerprint(self) -> Fingerprint:
        """See `fingerprint`."""

    @abc.abstractmethod
    def _largest_share(self, split: str, num_hosts: int) -> int:
        """The number of examples of the split that the busiest host evaluates."""
