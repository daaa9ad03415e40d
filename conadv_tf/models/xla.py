"""Tools for programs that XLA compiles, such as a barrier between computations that are independent."""

import contextlib
import contextvars
from collections.abc import Iterator

import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops

_compiling: contextvars.ContextVar[bool] = contextvars.ContextVar("compiling", default=False)
_for_tpu: contextvars.ContextVar[bool] = contextvars.ContextVar("for_tpu", default=False)


@contextlib.contextmanager
def compiling(compiled: bool) -> Iterator[None]:
    """Says whether XLA will compile what is traced inside: other programs know no barrier."""
    token = _compiling.set(compiled)
    try:
        yield
    finally:
        _compiling.reset(token)


@contextlib.contextmanager
def compiling_for_tpu() -> Iterator[None]:
    """Says that what is traced inside, on another device, will be compiled for a TPU."""
    token = _for_tpu.set(True)
    try:
        with compiling(True):
            yield
    finally:
        _for_tpu.reset(token)


def is_compiling() -> bool:
    """Tells whether what is traced now will be compiled by XLA."""
    return _compiling.get()


def barrier(earlier: list[tf.Tensor], values: list[tf.Tensor]) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """Both lists, behind an optimization barrier: `values` are not used before `earlier` are computed.

    XLA would otherwise be free to interleave two passes, and to keep the activations of both.
    """
    if not is_compiling():
        return earlier, values
    both = gen_xla_ops.xla_optimization_barrier([*earlier, *values])
    return both[: len(earlier)], both[len(earlier) :]


_NOT_NEGATIVE = 0x7FFFFFFF


def fold_in(seed: tf.Tensor | list[int], number: tf.Tensor | int) -> tf.Tensor:
    """The seed of a part of what `seed`, int32 [2], is for, int32 [2], the same in a program with XLA and without.

    Not negative: of a negative seed XLA makes other numbers than TensorFlow does.
    """
    return tf.random.fold_in(tf.convert_to_tensor(seed) & _NOT_NEGATIVE, number) & _NOT_NEGATIVE


def split_seed(seed: tf.Tensor | list[int], count: int) -> list[tf.Tensor]:
    """So many seeds, int32 [2] each, for the parts of what `seed`, int32 [2], is for; see `fold_in`."""
    return tf.unstack(tf.random.split(tf.convert_to_tensor(seed) & _NOT_NEGATIVE, count) & _NOT_NEGATIVE)


def random_uniform(shape, seed: tf.Tensor, low: float, high: float) -> tf.Tensor:
    """float32 [shape] in [low, high) from `seed` int32 [2], not negative: the numbers of tf.random.stateless_uniform.

    XLA makes other floats of the same bits than TensorFlow does. Here they are made of the low bits, as by TensorFlow:
    a program draws the same with XLA and without.
    """
    mantissa = tf.bitwise.bitwise_and(_random_bits(shape, seed), tf.constant(0x7FFFFF, tf.uint32))
    unit = tf.bitcast(tf.bitwise.bitwise_or(mantissa, tf.constant(0x3F800000, tf.uint32)), tf.float32) - 1.0
    return low + (high - low) * unit


def _random_bits(shape, seed: tf.Tensor) -> tf.Tensor:
    """uint32 [shape].

    TensorFlow chooses the algorithm by the device, the chip's own generator on a TPU, which has no name elsewhere. A
    program that is lowered elsewhere to be compiled for a TPU gets ThreeFry, additions and shifts of whole vectors:
    the Philox of other devices would cost a TPU gigabytes in changes of layout.
    """
    if not _for_tpu.get():
        return tf.random.stateless_uniform(shape, seed, None, None, tf.uint32)
    algorithm, state = tf.random.Algorithm.THREEFRY.value, tf.cast(seed, tf.uint64)
    return gen_xla_ops.xla_rng_bit_generator(algorithm, state, tf.convert_to_tensor(shape, tf.int32), tf.uint32)[1]
