"""The arithmetic of a run: global batch → replicas × micro-batches × rows, epochs → updates (docs/method.md)."""

import dataclasses

from conadv_tf.errors import ConfigError, whole_number

BATCH_NORM_IMAGES = 64  # what batch statistics are over in the paper's "normal setting"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The layout of a run: batches, micro-batches, updates.

    Attributes:
      global_batch_size: clean images per update, B.
      num_replicas: K.
      rows: images of one micro-batch on one replica; BN statistics are over these.
      microbatches: micro-batches each replica accumulates into one update.
      num_train: training images, N.
      epochs, steps_per_epoch, total_steps: an epoch is ⌊N / B⌋ updates.
      updates_per_batch: updates that one batch of every replica lasts for; K · microbatches · rows is so many B.
    """

    global_batch_size: int
    num_replicas: int
    rows: int
    microbatches: int
    num_train: int
    epochs: int
    updates_per_batch: int = 1

    @property
    def steps_per_epoch(self) -> int:
        return self.num_train // self.global_batch_size

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def passes(self) -> float:
        """The times that the run sees each training image; a little below `epochs` where B does not divide N."""
        return self.total_steps * self.global_batch_size / self.num_train

    def replicas_for_batch_norm(self) -> int:
        """Neighbouring replicas, a divisor of their number, that have BATCH_NORM_IMAGES together; at most all."""
        divisors = (d for d in range(1, self.num_replicas + 1) if self.num_replicas % d == 0)
        return next((d for d in divisors if d * self.rows >= BATCH_NORM_IMAGES), self.num_replicas)

    def remainder_note(self) -> str:
        """A sentence on the images that fill no whole batch; empty where there are none."""
        remainder = self.num_train % self.global_batch_size
        if not remainder:
            return ""
        return (
            f"{remainder:,} of {self.num_train:,} images fill no batch and open the next epoch; "
            f"the run makes {self.passes:.1f} full passes"
        )


def make_plan(
    global_batch_size: int,
    microbatch_size: int,
    num_replicas: int,
    num_train: int,
    epochs: int,
    updates_per_batch: int = 1,
) -> Plan:
    """The plan of a run.

    A replica's share of the batch is one micro-batch if it has at most `microbatch_size` images, otherwise
    as many of exactly that size as it takes.

    Raises:
      ConfigError: where the numbers do not divide, or there is less than one batch.
    """
    hint = "; a recipe such as batch/8k.gin sets it"
    global_batch_size = whole_number("train.global_batch_size", global_batch_size, 1, hint)
    microbatch_size = whole_number("train.microbatch_size", microbatch_size, 1, hint)
    epochs = whole_number("train.epochs", epochs, 1, hint)
    if global_batch_size > num_train:
        raise ConfigError(
            f"train.global_batch_size={global_batch_size} exceeds the {num_train} training images: use no more"
        )
    if global_batch_size * updates_per_batch % num_replicas:
        below = global_batch_size // num_replicas * num_replicas
        raise ConfigError(
            f"train.global_batch_size={global_batch_size} does not divide into {num_replicas} replicas: use "
            f"{below or num_replicas} or {below + num_replicas}, or another number of replicas (--strategy=one_device "
            "has one)"
        )
    share = global_batch_size * updates_per_batch // num_replicas
    rows = min(share, microbatch_size)
    if share % rows:
        raise ConfigError(
            f"train.microbatch_size={microbatch_size} does not divide the {share} images of a replica "
            f"(train.global_batch_size={global_batch_size} over {num_replicas}): use {_nearest_divisor(share, rows)}"
        )
    check_turns(updates_per_batch, num_replicas, share // rows)
    return Plan(global_batch_size, num_replicas, rows, share // rows, num_train, epochs, updates_per_batch)


def check_turns(updates_per_batch: int, num_replicas: int, microbatches: int) -> None:
    """Raises ConfigError unless the places of a batch, replicas × micro-batches, divide by `updates_per_batch`."""
    if num_replicas * microbatches % updates_per_batch:
        raise ConfigError(
            f"a schedule whose replicas take turns ('phased') halves the places of a batch, which are {num_replicas} "
            f"replicas × {microbatches} micro-batches: use an even number of either, or schedule 'paired'"
        )


def mixing_stride(updates_per_batch: int, num_replicas: int) -> int:
    """The distance of micro-batches that exchange x̂ (`adversarial.shuffle`): of those that take the same turn."""
    return 2 if updates_per_batch == 2 and num_replicas % 2 else 1


def check_mixing(updates_per_batch: int, num_replicas: int, microbatches: int) -> None:
    """Raises ConfigError unless every micro-batch of a replica has another one to exchange x̂ with."""
    least = 2 * mixing_stride(updates_per_batch, num_replicas)
    if microbatches < least:
        raise ConfigError(
            f"adversarial.shuffle=True mixes at least {least} micro-batches of a replica, which has {microbatches}: "
            "use a smaller train.microbatch_size, or set it to False"
        )


def check_batch_norm_groups(replicas_per_group: int, num_replicas: int, jit_compile: bool, on_tpu: bool) -> None:
    """Raises ConfigError unless replicas can be grouped for distributed batch normalisation."""
    if replicas_per_group < 1 or num_replicas % replicas_per_group:
        raise ConfigError(
            f"model.replicas_per_group={replicas_per_group} does not divide the {num_replicas} replicas: "
            "use a divisor of them, 1 for statistics of each replica alone"
        )
    if replicas_per_group > 1 and jit_compile and not on_tpu:
        raise ConfigError(
            f"model.replicas_per_group={replicas_per_group} cannot be compiled off a TPU: set train.jit_compile=False"
        )


def _nearest_divisor(number: int, target: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - target))
