"""Data streamed from files, decoded on the way."""

import dataclasses
from collections.abc import Callable, Sequence

import gin
import numpy as np
import tensorflow as tf
from absl import logging

from conadv_tf.data import augment, decode, record_files, records
from conadv_tf.data import service as data_service
from conadv_tf.data.cache import Cache
from conadv_tf.data.examiner import Examiner, check_schema, count_bad
from conadv_tf.data.fingerprint import Files, Fingerprint
from conadv_tf.data.pipeline import SPLITS, HostReading, ImageData
from conadv_tf.errors import ConfigError, keep_whole_number

CACHES = ("none", "memory")
_FILES_AT_ONCE = 64  # each takes a megabyte for reading


@gin.configurable("stream")
@dataclasses.dataclass(frozen=True)
class Stream:
    """Settings of streaming, without effect on images in memory.

    Attributes:
      shuffle_buffer: the number of records in the shuffle buffer of each host.
      cache: "none", or "memory": each host keeps what it reads in its memory. Of the training split it keeps the
        encoded records of its share (of ImageNet 140 GB over all hosts), of the test split the decoded images of its
        share (7.5 GB over all hosts at 224 pixels). The batches are the same; nothing is fetched, and for evaluation
        nothing decoded, a second time.
      service: addresses of processes that decode and augment the training stream in the hosts' place,
        "grpc://HOST:PORT", commas between several; None: the hosts do. See docs/data.md.
    """

    shuffle_buffer: int = 16_384
    cache: str = "none"
    service: str | None = None

    def __post_init__(self):
        keep_whole_number(self, "stream", "shuffle_buffer", 1, ", which does not shuffle: raise it")
        if self.cache not in CACHES:
            raise ConfigError(f"stream.cache={self.cache!r} is not known: choose one of {', '.join(CACHES)}")
        if self.cache != "none" and self.service:
            raise ConfigError(
                f"stream.cache={self.cache!r} with stream.service={self.service!r}: the service reads in the hosts' "
                "place, which thus have nothing to keep: drop one of them"
            )


class StreamData(ImageData):
    """Files read in sequence and decoded on the way; see `ImageData`.

    In each epoch a host visits its files in an order drawn from (seed, epoch), 64 of them in turn, a record each, since
    a file may hold neighbours of one class. The records pass a shuffle buffer, seeded likewise. Hosts own files h,
    h + H, ... or, where the files do not divide, records h, h + H, ...

    Args beyond those of ImageData:
      folder: the folder of the files, local or gs://.
      files, schema: indexed files by split, and how a record becomes an example.
      image_size: height and width of every image after cropping and resizing, pixels.
      augmentation: the augmentation of training images; without a random crop, the central one is taken.
      shuffle_buffer: the number of records in the shuffle buffer.
      cached: whether a host keeps, once it has read them, the encoded records of its share of the training split and
        the decoded images of its share of the test split. What is handed out is the same.
      services: addresses of processes that decode the training split, see service.py; empty: the hosts do.
    """

    view = augment.STREAMED_VIEW

    def __init__(
        self,
        name: str,
        folder: str,
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
        self._folder, self._files, self._schema = folder, files, schema
        self._shuffle_buffer, self._cached, self.services = shuffle_buffer, cached, services
        for split in SPLITS:
            check_schema(files[split], schema, bad_records)
        self._examiners = {split: Examiner(files[split], schema, bad_records) for split in SPLITS}
        self._caches: dict[tuple[object, ...], Cache] = {}
        if cached:
            shown = (name, *(size / 1e9 for size in self.cache_bytes))
            logging.info(
                "%s: stream.cache takes %.3g GB of encoded and %.3g GB of decoded images over all hosts", *shown
            )

    def _fingerprint(self) -> Fingerprint:
        outlines = {split: {file.path: file.outline for file in files} for split, files in self._files.items()}
        return Files(self._folder, outlines).fingerprint()

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
        self,
        split: str,
        reading: HostReading,
        kept: Cache | None,
        reorder: Callable[[tf.Tensor], tf.Tensor] = tf.identity,
        at_once: int = 1,
    ) -> tf.data.Dataset:
        """The host's records (payload, file, record), `at_once` files in turn, in the order that `reorder` gives."""
        files, hosts, host = self._files[split], reading.num_hosts, reading.host
        if len(files) % hosts == 0:
            own = reorder(tf.range(host, len(files), hosts, dtype=tf.int64))
            return records.raw_records(files, own, kept=kept, at_once=at_once)
        return records.raw_records(files, reorder(tf.range(len(files), dtype=tf.int64)), hosts, host, kept, at_once)

    def _kept_records(self, reading: HostReading) -> Cache | None:
        """The cache in which the host keeps what it reads of the training split; None where nothing is kept."""
        if not self._cached:
            return None
        return self._cache("train", reading.num_hosts, reading.host, specs=records.RECORD_SPECS)

    def _shuffled(self, reading: HostReading, seed: int, epoch: tf.Tensor, kept: Cache | None) -> tf.data.Dataset:
        # Seeds this function graph alone: the order must not depend on the program's global seed.
        tf.random.set_seed(1)
        order_seed = tf.stack([augment.epoch_seed(seed, reading.host, epoch), -1])  # no image has this seed

        def shuffled(files: tf.Tensor) -> tf.Tensor:
            return tf.random.experimental.stateless_shuffle(files, order_seed)

        interleaved = self._records("train", reading, kept, shuffled, _FILES_AT_ONCE)
        return interleaved.shuffle(self._shuffle_buffer, order_seed[0], reshuffle_each_iteration=False)

    def _train(self, reading: HostReading, start_position: int, seed: int) -> tf.data.Dataset:
        share = self._share("train", reading.num_hosts, reading.host)
        if start_position % reading.num_hosts or not share:
            raise ConfigError(
                f"start_position={start_position} and {self.num_train} records do not divide over num_hosts="
                f"{reading.num_hosts}: start at a multiple of the global batch, use fewer hosts than records"
            )
        first_epoch, skipped = divmod(start_position // reading.num_hosts, share)
        kept = self._kept_records(reading)

        def epoch_records(epoch: tf.Tensor) -> tf.data.Dataset:
            key = tf.data.Dataset.from_tensors(augment.epoch_seed(seed, reading.host, epoch)).repeat()
            index = tf.data.Dataset.range(tf.int64.max)
            seeded = tf.data.Dataset.zip(self._shuffled(reading, seed, epoch, kept), key, index)
            return seeded.skip(tf.cast(epoch == first_epoch, tf.int64) * skipped)

        stream = tf.data.Dataset.range(first_epoch, tf.int64.max).flat_map(epoch_records)

        def image(encoded: tf.Tensor, image_seed: tf.Tensor) -> tf.Tensor:
            return augment.decoded(encoded, self.augmentation, self.image_shape[0], image_seed)

        decoder = decode.Decoder(self._files["train"], self._schema, image, self.train_shape, replaces=True)
        services = data_service.of_host(self.services, reading.num_hosts, reading.host)
        batches = data_service.spread(
            lambda parts, part: decoder.batches(stream, reading.rows_per_replica, parts, part), services
        )
        counted = count_bad(batches, self._examiners["train"])
        return counted.map(lambda images, labels, weights: (images, labels))

    def _evaluation(self, split: str, reading: HostReading, steps: int, keeps: bool) -> tf.data.Dataset:
        kept = self._kept_records(reading) if keeps and split == "train" else None
        none = tf.constant(decode.NO_PLACE, tf.int64)
        padding = tf.data.Dataset.from_tensors((tf.constant(""), none, none)).repeat()
        zero = tf.data.Dataset.from_tensors(tf.constant(0, tf.int64)).repeat()  # nothing is drawn

        def fresh() -> tf.data.Dataset:
            padded = self._records(split, reading, kept).concatenate(padding).take(steps * reading.rows_per_host)
            batches = decoder.batches(tf.data.Dataset.zip(padded, zero, zero), reading.rows_per_replica)
            return count_bad(batches, self._examiners[split])

        decoder = decode.Decoder(
            self._files[split],
            self._schema,
            lambda encoded, _: augment.seen(encoded, self.view, self.image_shape),
            self.image_shape,
            replaces=False,
        )
        batches = fresh()
        if not (self._cached and keeps and split == "test"):
            return batches
        cache = self._cache(split, reading, specs=batches.element_spec)
        count = tf.constant(steps * reading.replicas_per_host, tf.int64)
        once = tf.data.Dataset.from_tensors(tf.constant(0, tf.int64))
        return once.flat_map(lambda group: cache.through(batches, group, tf.data.Dataset.range(count), count))
