"""Collectives between replicas, the batch of a replica that was dealt none, the clock of the input and its loop."""

from collections.abc import Callable

import tensorflow as tf

# More than the collectives of one strategy.
_KEYS_OF_A_STRATEGY = 100_000


def keep_apart() -> None:
    """Gives the MirroredStrategy that is made next keys of its own for its collectives.

    All of a process have the same ones else, and TensorFlow keeps the devices of a key for the life of the process: a
    second strategy on other devices ended with "Shape mismatch in the collective instance".
    """
    tf.distribute.MirroredStrategy._collective_key_base += _KEYS_OF_A_STRATEGY


def sum_over_replicas(values: list[tf.Tensor]) -> list[tf.Tensor]:
    """The sum of each value over the replicas, in one all-reduce a dtype; runs in a replica; not differentiable.

    `ReplicaContext.all_reduce` would do the same behind an IdentityN of all values, for the sake of their gradients.
    TensorFlow's graph optimizer first drops orderings as implied by that op and then takes the op apart: an update of
    γ from the clean pass was no longer ordered behind the attack's reading of the same γ.
    """

    def reduce(strategy: tf.distribute.Strategy, *values):
        return strategy.extended.batch_reduce_to(tf.distribute.ReduceOp.SUM, [(value, value) for value in values])

    sums: dict[int, tf.Tensor] = {}
    for dtype in dict.fromkeys(value.dtype for value in values):
        alike = {index: value for index, value in enumerate(values) if value.dtype == dtype}
        reduced = tf.distribute.get_replica_context().merge_call(reduce, args=tuple(alike.values()))
        sums |= dict(zip(alike, reduced, strict=True))
    return [sums[index] for index in range(len(values))]


def with_a_row(images: tf.Tensor, strategy: tf.distribute.Strategy) -> tf.Tensor:
    """The images, and a black one where a replica was dealt none of a last batch: on CPUs convolutions need one.

    A TPU, whose shapes are static, and a batch of a known size are left as they are.
    """
    if (
        images.shape[0] is not None
        or strategy.num_replicas_in_sync == 1
        or isinstance(strategy, tf.distribute.TPUStrategy)
    ):
        return images
    missing = tf.cast(tf.equal(tf.shape(images)[0], 0), tf.int32)
    return tf.concat([images, tf.zeros([missing, *images.shape[1:]], images.dtype)], 0)


def timed_next(iterator):
    """The next element and the seconds (float64) it took to arrive; host operations only.

    Where TensorFlow is made deterministic (`enable_op_determinism`, TF_DETERMINISTIC_OPS) it has no clock, and the
    seconds are 0.

    The element passes through identities that wait for the clock: otherwise the clock would be read behind the first
    heavy operations on the element.
    """
    if not _has_clock():
        return next(iterator), tf.constant(0.0, tf.float64)
    start = tf.timestamp()
    with tf.control_dependencies([start]):
        data = next(iterator)
    with tf.control_dependencies(tf.nest.flatten(data, expand_composites=True)):
        waited = tf.timestamp() - start

    def after_the_clock(tensor):
        with tf.control_dependencies([waited]), tf.device(tensor.device):
            return tf.identity(tensor)

    return tf.nest.map_structure(after_the_clock, data, expand_composites=True), waited


def summed(count: tf.Tensor, once: Callable[[tf.Tensor], tf.Tensor]) -> tf.Tensor:
    """The sum of `once(index)`, float64 scalars, over the indices below `count`, in a loop of the program."""

    def body(index: tf.Tensor, total: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return index + 1, total + once(index)

    zero = tf.zeros_like(count), tf.constant(0.0, tf.float64)
    return tf.while_loop(lambda index, _: index < count, body, zero, parallel_iterations=1)[1]


def _has_clock() -> bool:
    """Tells whether TensorFlow reads the time; where it is deterministic it refuses."""
    with tf.init_scope(), tf.device("CPU:0"):
        try:
            tf.timestamp()
        except tf.errors.FailedPreconditionError:
            return False
    return True
