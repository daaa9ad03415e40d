"""Images and labels for training and exact evaluation, SPEC sections 5 and 8.

Examples are (image uint8 [H, W, C] in 0..255, label int32 in 0..num_classes-1); normalisation belongs to the
network. The training stream is permutation(seed, epoch 0) ++ permutation(seed, epoch 1) ++ ..., position p
lies in epoch p // num_train, and update t of global batch B takes positions [tB, (t+1)B): each image exactly
once in each pass, and any update can be rebuilt from (seed, t) alone.
"""

import abc
import dataclasses
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from conadv_tf import augment, record_files, records
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
      num_train, num_test: examples in the splits. Streamed files: all whole records, including those that
        turn out bad when they are decoded.
      bad_records: `record_files.BadRecords`, count and per-file report; streaming adds to it while it reads.
      augmentation: what is done to training images.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        image_shape: tuple[int, int, int],
        sizes: tuple[int, int],
        bad_records: record_files.BadRecords,
        augmentation: augment.Augmentation,
    ):
        self.name, self.num_classes, self.image_shape = name, num_classes, image_shape
        self.augmentation = augmentation
        (self.num_train, self.num_test), self.bad_records = sizes, bad_records

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
        return _finish(self._evaluation(split, layout, steps))

    def evaluation_steps(self, split: str, rows_per_replica: int, num_replicas: int, num_hosts: int = 1) -> int:
        """Number of batches that `evaluation_batches` gives to each replica, equal for all."""
        if split not in SPLITS:
            raise ConfigError(f"split={split!r} is not known: choose one of {', '.join(SPLITS)}")
        layout = Layout(rows_per_replica, num_replicas, num_hosts)
        return -(-self._largest_share(split, num_hosts) // layout.rows_per_host)

    @property
    def train_shape(self) -> tuple[int, ...]:
        """Of a training example: (H, W, C), or (2, H, W, C) where AutoAugment's image comes beside the clean one."""
        return (2, *self.image_shape) if self.augmentation.concatenates else self.image_shape

    def size(self, split: str) -> int:
        """Number of examples of the split, "train" or "test"."""
        return self.num_train if split == "train" else self.num_test

    def examples(self, split: str, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The first n good examples of a split: (images uint8 [<=n, H, W, C], labels int32 [<=n])."""
        rows = self.evaluation_batches(split, 1, 1).unbatch().filter(lambda image, label, weight: weight > 0)
        images, labels, _ = next(iter(rows.batch(n)))
        return images.numpy(), labels.numpy()

    @abc.abstractmethod
    def _train(self, layout: Layout, start_position: int, seed: int) -> tf.data.Dataset:
        """See `train_batches`."""

    @abc.abstractmethod
    def _evaluation(self, split: str, layout: Layout, steps: int) -> tf.data.Dataset:
        """See `evaluation_batches`."""

    @abc.abstractmethod
    def _largest_share(self, split: str, num_hosts: int) -> int:
        """Examples of the split that the busiest host evaluates."""


class MemoryData(ImageData):
    """Splits held in one uint8 array each; see `ImageData`.

    Args beyond those of ImageData:
      splits: name -> (images uint8 [n, H, W, C], labels int32 [n]); example i shows image i mod n.
      augmentation: of training images.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        splits: dict[str, tuple[np.ndarray, np.ndarray]],
        augmentation: augment.Augmentation,
        bad_records: record_files.BadRecords,
        sizes: tuple[int, int] | None = None,
    ):
        own_sizes = len(splits["train"][1]), len(splits["test"][1])
        shape = splits["train"][0].shape[1:]
        if augmentation.policy != "none" and shape[-1] != 3:
            raise ConfigError(
                f"data.autoaugment={augmentation.policy!r} is for colour images, {name} has {shape}: drop it"
            )
        super().__init__(name, num_classes, shape, sizes or own_sizes, bad_records, augmentation)
        with tf.device("CPU:0"):  # else a GPU would hold them, and tf.data copy them back for each batch
            self._splits = {split: tuple(map(tf.constant, arrays)) for split, arrays in splits.items()}

    def _lookup(self, split: str, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        images, labels = self._splits[split]
        index %= images.shape[0]
        return tf.gather(images, index), tf.gather(labels, index)

    def _train(self, layout: Layout, start_position: int, seed: int) -> tf.data.Dataset:
        def batch(number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            position = start_position + layout.positions(number)
            epoch, index = position // self.num_train, position % self.num_train
            example = augment.permute(index, self.num_train, seed, augment.ORDER, epoch)
            images, labels = self._lookup("train", example)
            images = augment.batch(images, self.augmentation, index, seed, epoch)
            return tf.ensure_shape(images, [layout.rows_per_replica, *self.train_shape]), labels

        return tf.data.Dataset.range(tf.int64.max).map(batch, num_parallel_calls=tf.data.AUTOTUNE)

    def _evaluation(self, split: str, layout: Layout, steps: int) -> tf.data.Dataset:
        def batch(number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            position = layout.positions(number)
            real = position < self.size(split)
            images, labels = self._lookup(split, tf.where(real, position, 0))
            images *= tf.cast(real, tf.uint8)[:, None, None, None]
            return images, labels * tf.cast(real, tf.int32), tf.cast(real, tf.float32)

        numbers = tf.data.Dataset.range(steps * layout.replicas_per_host)
        return numbers.map(batch, num_parallel_calls=tf.data.AUTOTUNE)

    def _largest_share(self, split: str, num_hosts: int) -> int:
        return -(-self.size(split) // num_hosts)


class StreamData(ImageData):
    """Files read in sequence and decoded on the way; see `ImageData`.

    In each epoch a host visits its files in an order drawn from (seed, epoch), through a shuffle buffer
    seeded by them. Hosts own files h, h + H, ... or, where the files do not divide, records h, h + H, ...

    Args beyond those of ImageData:
      files, schema: indexed files by split, and how a record becomes an example.
      image_size: height and width of every image after cropping and resizing, pixels.
      augmentation: of training images; without a random crop they are the central one.
      shuffle_buffer: records in the shuffle buffer.
    """

    def __init__(
        self,
        name: str,
        files: dict[str, list[record_files.RecordFile]],
        schema: records.Schema,
        image_size: int,
        augmentation: augment.Augmentation,
        shuffle_buffer: int,
        bad_records: record_files.BadRecords,
    ):
        train, test = (sum(file.num_records for file in files[split]) for split in SPLITS)
        shape = image_size, image_size, 3
        super().__init__(name, schema.num_classes or 0, shape, (train, test), bad_records, augmentation)
        self._files, self._schema = files, schema
        self._shuffle_buffer = shuffle_buffer
        self._examiners = {split: records.Examiner(files[split], schema, bad_records) for split in SPLITS}

    def _share(self, split: str, num_hosts: int, host: int) -> int:
        """Records that one host owns."""
        if len(self._files[split]) % num_hosts == 0:
            return sum(file.num_records for file in self._files[split][host::num_hosts])
        return len(range(host, self.size(split), num_hosts))

    def _largest_share(self, split: str, num_hosts: int) -> int:
        return max(self._share(split, num_hosts, host) for host in range(num_hosts))

    def _records(
        self, split: str, layout: Layout, reorder: Callable[[tf.Tensor], tf.Tensor] = tf.identity
    ) -> tf.data.Dataset:
        """The host's records (payload, file, record), files in the order that `reorder` gives them."""
        files = self._files[split]
        if len(files) % layout.num_hosts == 0:
            owned = tf.range(layout.host, len(files), layout.num_hosts, dtype=tf.int64)
            return records.raw_records(files, reorder(owned))
        first = tf.constant(np.cumsum([0] + [file.num_records for file in files[:-1]]), tf.int64)
        everything = records.raw_records(files, reorder(tf.range(len(files), dtype=tf.int64)))
        return everything.filter(lambda payload, file, record: (first[file] + record) % layout.num_hosts == layout.host)

    def _shuffled(self, layout: Layout, seed: int, epoch: tf.Tensor) -> tf.data.Dataset:
        # Of this function graph alone: the order must not depend on the program's global seed.
        tf.random.set_seed(1)
        order_seed = tf.stack([augment.epoch_seed(seed, layout.host, epoch), -1])  # no image's
        in_file_order = self._records(
            "train", layout, lambda files: tf.random.experimental.stateless_shuffle(files, order_seed)
        )
        return in_file_order.shuffle(self._shuffle_buffer, order_seed[0], reshuffle_each_iteration=False)

    def _train(self, layout: Layout, start_position: int, seed: int) -> tf.data.Dataset:
        share = self._share("train", layout.num_hosts, layout.host)
        if start_position % layout.num_hosts or not share:
            raise ConfigError(
                f"start_position={start_position} and {self.num_train} records do not divide over num_hosts="
                f"{layout.num_hosts}: start at a multiple of the global batch, use fewer hosts than records"
            )
        first_epoch, skipped = divmod(start_position // layout.num_hosts, share)

        def epoch_records(epoch: tf.Tensor) -> tf.data.Dataset:
            numbered = self._shuffled(layout, seed, epoch).enumerate()
            key = augment.epoch_seed(seed, layout.host, epoch)
            return numbered.skip(tf.cast(epoch == first_epoch, tf.int64) * skipped).map(
                lambda index, raw: (tf.stack([key, index]), *raw)
            )

        stream = tf.data.Dataset.range(first_epoch, tf.int64.max).flat_map(epoch_records)
        # The place of a bad record is taken by the next good one of its file.
        replace = self._examiners["train"].next_good
        return records.decode_batches(
            stream,
            layout.rows_per_replica,
            lambda seed, payload, file, record: self._train_example(payload, seed),
            lambda seed, payload, *place: self._train_example(records.reread(replace, *place), seed),
        )

    def _train_example(self, payload: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        encoded, label = self._schema.parse(payload)
        return augment.jpeg(encoded, self.augmentation, self.image_shape[0], seed), label

    def _evaluation(self, split: str, layout: Layout, steps: int) -> tf.data.Dataset:
        blank = (tf.zeros(self.image_shape, tf.uint8), tf.constant(0), tf.constant(0.0))

        def example(payload: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            encoded, label = self._schema.parse(payload)
            return augment.central_crop(encoded, self.image_shape[0]), label, tf.constant(1.0)

        def second_look(payload: tf.Tensor, *place: tf.Tensor) -> tuple[tf.Tensor, ...]:
            payload = records.reread(self._examiners[split].payload_or_empty, *place)
            return tf.cond(payload == b"", lambda: blank, lambda: example(payload))

        def padding_or_second_look(payload: tf.Tensor, file: tf.Tensor, record: tf.Tensor) -> tuple[tf.Tensor, ...]:
            return tf.cond(file < 0, lambda: blank, lambda: second_look(payload, file, record))

        none = tf.constant(-1, tf.int64)
        padding = tf.data.Dataset.from_tensors((tf.constant(""), none, none)).repeat()
        padded = self._records(split, layout).concatenate(padding).take(steps * layout.rows_per_host)
        return records.decode_batches(
            padded, layout.rows_per_replica, lambda payload, *place: example(payload), padding_or_second_look
        )
