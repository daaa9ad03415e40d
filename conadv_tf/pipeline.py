"""Images and labels for training and exact evaluation, SPEC sections 5 and 8.

Examples are (image uint8 [H, W, C] in 0..255, label int32 in 0..num_classes-1); normalisation belongs to the
network. The training stream is permutation(seed, epoch 0) ++ permutation(seed, epoch 1) ++ ..., position p
lies in epoch p // num_train, and update t of global batch B takes positions [tB, (t+1)B): each image exactly
once in each pass, and any update can be rebuilt from (seed, t) alone.
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf
from absl import logging

from conadv_tf import augment, data_service, decode, record_files, records
from conadv_tf.cache import Cache
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
        sizes: dict[str, int] | None = None,
    ):
        own_sizes = {split: len(labels) for split, (_, labels) in splits.items()}
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

    def _evaluation(self, split: str, layout: Layout, steps: int, keeps: bool) -> tf.data.Dataset:
        def batch(number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            position = layout.positions(number)
            real = position < self.sizes[split]
            images, labels = self._lookup(split, tf.where(real, position, 0))
            images *= tf.cast(real, tf.uint8)[:, None, None, None]
            return images, labels * tf.cast(real, tf.int32), tf.cast(real, tf.float32)

        numbers = tf.data.Dataset.range(steps * layout.replicas_per_host)
        return numbers.map(batch, num_parallel_calls=tf.data.AUTOTUNE)

    def _largest_share(self, split: str, num_hosts: int) -> int:
        return -(-self.sizes[split] // num_hosts)


class StreamData(ImageData):
    """Files read in sequence and decoded on the way; see `ImageData`.

    In each epoch a host visits its files in an order drawn from (seed, epoch), through a shuffle buffer
    seeded by them. Hosts own files h, h + H, ... or, where the files do not divide, records h, h + H, ...

    Args beyond those of ImageData:
      files, schema: indexed files by split, and how a record becomes an example.
      image_size: height and width of every image after cropping and resizing, pixels.
      augmentation: of training images; without a random crop they are the central one.
      shuffle_buffer: records in the shuffle buffer.
      cached: whether a host keeps, once it has read them, the encoded records of its share of the training split and
        the decoded images of its share of the test split. What is handed out is the same.
      services: addresses of processes that decode the training split, see data_service.py; empty: the hosts do.
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
        cached: bool = False,
        services: Sequence[str] = (),
    ):
        sizes = {split: sum(file.num_records for file in files[split]) for split in SPLITS}
        shape = image_size, image_size, 3
        super().__init__(name, schema.num_classes or 0, shape, sizes, bad_records, augmentation)
        self._files, self._schema = files, schema
        self._shuffle_buffer, self._cached, self.services = shuffle_buffer, cached, services
        self._examiners = {split: records.Examiner(files[split], schema, bad_records) for split in SPLITS}
        self._caches: dict[tuple[object, ...], Cache] = {}
        if cached:
            shown = (name, *(size / 1e9 for size in self.cache_bytes))
            logging.info("%s: data.cache takes %.3g GB of encoded and %.3g GB of decoded images over all hosts", *shown)

    @property
    def cache_bytes(self) -> tuple[int, int]:
        encoded = sum(file.payload_bytes for file in self._files["train"])
        image = int(np.prod(self.image_shape)) + 8  # its label and weight
        return (encoded, self.num_test * image) if self._cached else (0, 0)

    def _cache(self, *key: object, specs: tuple[tf.TensorSpec, ...]) -> Cache:
        if key not in self._caches:
            self._caches[key] = Cache(specs)
        return self._caches[key]

    def _share(self, split: str, num_hosts: int, host: int) -> int:
        """Records that one host owns."""
        if len(self._files[split]) % num_hosts == 0:
            return sum(file.num_records for file in self._files[split][host::num_hosts])
        return len(range(host, self.sizes[split], num_hosts))

    def _largest_share(self, split: str, num_hosts: int) -> int:
        return max(self._share(split, num_hosts, host) for host in range(num_hosts))

    def _records(
        self, split: str, layout: Layout, kept: Cache | None, reorder: Callable[[tf.Tensor], tf.Tensor] = tf.identity
    ) -> tf.data.Dataset:
        """The host's records (payload, file, record), files in the order that `reorder` gives them."""
        files, hosts, host = self._files[split], layout.num_hosts, layout.host
        if len(files) % hosts == 0:
            return records.raw_records(files, reorder(tf.range(host, len(files), hosts, dtype=tf.int64)), kept=kept)
        return records.raw_records(files, reorder(tf.range(len(files), dtype=tf.int64)), hosts, host, kept)

    def _kept_records(self, layout: Layout) -> Cache | None:
        """Where the host keeps what it reads of the training split."""
        if not self._cached:
            return None
        return self._cache("train", layout.num_hosts, layout.host, specs=records.RECORD_SPECS)

    def _shuffled(self, layout: Layout, seed: int, epoch: tf.Tensor, kept: Cache | None) -> tf.data.Dataset:
        # Of this function graph alone: the order must not depend on the program's global seed.
        tf.random.set_seed(1)
        order_seed = tf.stack([augment.epoch_seed(seed, layout.host, epoch), -1])  # no image's
        in_file_order = self._records(
            "train", layout, kept, lambda files: tf.random.experimental.stateless_shuffle(files, order_seed)
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
        kept = self._kept_records(layout)

        def epoch_records(epoch: tf.Tensor) -> tf.data.Dataset:
            key = tf.data.Dataset.from_tensors(augment.epoch_seed(seed, layout.host, epoch)).repeat()
            index = tf.data.Dataset.range(tf.int64.max)
            seeded = tf.data.Dataset.zip(self._shuffled(layout, seed, epoch, kept), key, index)
            return seeded.skip(tf.cast(epoch == first_epoch, tf.int64) * skipped)

        stream = tf.data.Dataset.range(first_epoch, tf.int64.max).flat_map(epoch_records)

        def image(encoded: tf.Tensor, image_seed: tf.Tensor) -> tf.Tensor:
            return augment.jpeg(encoded, self.augmentation, self.image_shape[0], image_seed)

        decoder = decode.Decoder(self._files["train"], self._schema, image, self.train_shape, replaces=True)
        services = data_service.of_host(self.services, layout.num_hosts, layout.host)
        batches = data_service.spread(
            lambda parts, part: decoder.batches(stream, layout.rows_per_replica, parts, part), services
        )
        counted = decode.count_bad(batches, self._examiners["train"])
        return counted.map(lambda images, labels, weights: (images, labels))

    def _evaluation(self, split: str, layout: Layout, steps: int, keeps: bool) -> tf.data.Dataset:
        kept = self._kept_records(layout) if keeps and split == "train" else None
        none = tf.constant(decode.NO_PLACE, tf.int64)
        padding = tf.data.Dataset.from_tensors((tf.constant(""), none, none)).repeat()
        zero = tf.data.Dataset.from_tensors(tf.constant(0, tf.int64)).repeat()  # nothing is drawn

        def fresh() -> tf.data.Dataset:
            padded = self._records(split, layout, kept).concatenate(padding).take(steps * layout.rows_per_host)
            batches = decoder.batches(tf.data.Dataset.zip(padded, zero, zero), layout.rows_per_replica)
            return decode.count_bad(batches, self._examiners[split])

        decoder = decode.Decoder(
            self._files[split],
            self._schema,
            lambda encoded, _: augment.central_crop(encoded, self.image_shape[0]),
            self.image_shape,
            replaces=False,
        )
        batches = fresh()
        if not (self._cached and keeps and split == "test"):
            return batches
        cache = self._cache(split, layout, specs=batches.element_spec)
        count = tf.constant(steps * layout.replicas_per_host, tf.int64)
        once = tf.data.Dataset.from_tensors(tf.constant(0, tf.int64))
        return once.flat_map(lambda group: cache.through(batches, group, tf.data.Dataset.range(count), count))
