"""Images and labels for training and exact evaluation, SPEC sections 5 and 8.

Examples are (image uint8 [H, W, C] in 0..255, label int32 in 0..num_classes-1); normalisation belongs to the
network. The training stream is permutation(seed, epoch 0) ++ permutation(seed, epoch 1) ++ ..., position p
lies in epoch p // num_train, and update t of global batch B takes positions [tB, (t+1)B): each image exactly
once in each pass, and any update can be rebuilt from (seed, t) alone.
"""

import abc
import dataclasses
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from conadv_tf.data import augment, record_files
from conadv_tf.errors import ConfigError

SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which rows of a stream one host reads, and in which batches.

    A micro global batch is num_replicas * rows_per_replica consecutive positions; replica k takes the k-th
    rows_per_replica of them. Replicas belong to hosts in order, the same number to each.

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
        """Batches of a host in one micro global batch."""
        return self.num_replicas // self.num_hosts

    @property
    def rows_per_host(self) -> int:
        """Images of a host in one micro global batch."""
        return self.replicas_per_host * self.rows_per_replica

    def positions(self, batch: tf.Tensor) -> tf.Tensor:
        """Positions int64 [rows_per_replica] of this host's batch number `batch`, from position 0 on."""
        micro_batch, replica = batch // self.replicas_per_host, batch % self.replicas_per_host
        first = micro_batch * self.num_replicas + self.host * self.replicas_per_host + replica
        return first * self.rows_per_replica + tf.range(self.rows_per_replica, dtype=tf.int64)


def _finish(batches: tf.data.Dataset) -> tf.data.Dataset:
    options = tf.data.Options()
    options.deterministic = True
    # The layout already says what each host reads.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return batches.prefetch(tf.data.AUTOTUNE).with_options(options)


class ImageData(abc.ABC):
    """A training and a test split.

    Attributes:
      name: what to call the data set in results.
      num_classes: labels are 0..num_classes-1.
      image_shape: (H, W, C) of every image that is handed out.
      sizes: examples in the splits: "train", "test" and perhaps "validation". Streamed files: all whole records,
        including those that turn out bad when they are decoded.
      bad_records: `record_files.BadRecords`, count and per-file report; streaming adds to it while it reads.
      augmentation: what is done to training images.
      services: addresses "HOST:PORT" of processes that make the training batches; see data_service.py.
    """

    services: Sequence[str] = ()

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

    @property
    def num_train(self) -> int:
        """Training examples."""
        return self.sizes["train"]

    @property
    def num_test(self) -> int:
        """Test examples."""
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
          num_replicas: replicas of all hosts together.
          start_position: images of the global stream before the first batch, e.g. update * global batch.
          seed: seed of order and augmentation.
          num_hosts: hosts that read.
          host: this host.

        Returns:
          Dataset of (images uint8 [rows_per_replica, *train_shape], labels int32 [rows_per_replica]), one element
          for each replica of this host in turn. In memory, hosts take slices of one stream; streamed files
          are divided over the hosts, each of which permutes its own share.

        Raises:
          ConfigError: see `Layout`; a start that is negative or does not divide over the hosts.
          DataError: within a tf.errors exception while iterating (`records.data_error` finds it).
        """
        layout = Layout(rows_per_replica, num_replicas, num_hosts, host)
        if start_position < 0:
            raise ConfigError(f"start_position={start_position} is negative: it counts images seen so far")
        return _finish(self._train(layout, start_position, seed))

    def evaluation_batches(
        self, split: str, rows_per_replica: int, num_replicas: int, num_hosts: int = 1, host: int = 0
    ) -> tf.data.Dataset:
        """Every example of a split exactly once over all hosts and replicas, in order, not augmented.

        Returns:
          Finite dataset of (images uint8 [rows_per_replica, H, W, C], labels int32 [rows_per_replica],
          weights float32 [rows_per_replica]), one element for each replica of this host in turn,
          `evaluation_steps` for each replica. Weights are 1; 0 for padding (black, label 0) and bad records.

        Raises:
          ConfigError: see `Layout`; unknown split.
          DataError: as in `train_batches`.
        """
        layout = Layout(rows_per_replica, num_replicas, num_hosts, host)
        steps = self.evaluation_steps(split, rows_per_replica, num_replicas, num_hosts)
        return _finish(self._evaluation(split, layout, steps, keeps=True))

    def evaluation_steps(self, split: str, rows_per_replica: int, num_replicas: int, num_hosts: int = 1) -> int:
        """Number of batches that `evaluation_batches` gives to each replica, equal for all."""
        if split not in self.sizes:
            raise ConfigError(f"split={split!r} is not known: choose one of {', '.join(self.sizes)}")
        layout = Layout(rows_per_replica, num_replicas, num_hosts)
        return -(-self._largest_share(split, num_hosts) // layout.rows_per_host)

    @property
    def train_shape(self) -> tuple[int, ...]:
        """Of a training example: (H, W, C), or (2, H, W, C) where AutoAugment's image comes beside the clean one."""
        return (2, *self.image_shape) if self.augmentation.concatenates else self.image_shape

    @property
    def cache_bytes(self) -> tuple[int, int]:
        """Memory that data.cache takes, over all hosts: of encoded training records, of decoded test images."""
        return 0, 0

    def examples(self, split: str, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The first n good examples of a split: (images uint8 [<=n, H, W, C], labels int32 [<=n])."""
        single = self._evaluation(split, Layout(1, 1), self.evaluation_steps(split, 1, 1), keeps=False)
        rows = _finish(single).unbatch().filter(lambda image, label, weight: weight > 0)
        images, labels, _ = next(iter(rows.batch(n)))
        return images.numpy(), labels.numpy()

    @abc.abstractmethod
    def _train(self, layout: Layout, start_position: int, seed: int) -> tf.data.Dataset:
        """See `train_batches`."""

    @abc.abstractmethod
    def _evaluation(self, split: str, layout: Layout, steps: int, keeps: bool) -> tf.data.Dataset:
        """See `evaluation_batches`; `keeps`: where data.cache asks for it, what is read is kept for the next time."""

    @abc.abstractmethod
    def _largest_share(self, split: str, num_hosts: int) -> int:
        """Examples of the split that the busiest host evaluates."""
