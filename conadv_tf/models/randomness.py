"""Random numbers of layers, such as dropout: from a micro-batch's seed, another one for every pass and every draw.

The update says which micro-batch its passes are of (`of_microbatch`), a network when a pass begins (`one_pass`). A pass
of no micro-batch, such as a call by hand, has the seed 0: nothing depends on global state.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

import tensorflow as tf
from tf_keras.src import backend

from conadv_tf.models import xla

_SALT = 7_403  # apart from what an attack draws from the same seed


@dataclasses.dataclass
class _Microbatch:
    """The seed of a micro-batch, int32 [2], and the passes that began so far: those of attacks count by themselves.

    What goes on from a checkpoint makes its attack again, alone: the attack then has the numbers it had.
    """

    seed: tf.Tensor | list[int]
    passes: dict[bool, int] = dataclasses.field(default_factory=lambda: {False: 0, True: 0})


@dataclasses.dataclass
class _Pass:
    """The seed of a pass, int32 [2], and the draws made so far."""

    seed: tf.Tensor
    draws: int = 0


_microbatch: contextvars.ContextVar[_Microbatch | None] = contextvars.ContextVar("microbatch", default=None)
_pass: contextvars.ContextVar[_Pass | None] = contextvars.ContextVar("pass", default=None)


@contextlib.contextmanager
def of_microbatch(seed: tf.Tensor) -> Iterator[None]:
    """Says that the passes inside are of the micro-batch with this seed, int32 [2]."""
    token = _microbatch.set(_Microbatch(seed & 0x7FFFFFFF))
    try:
        yield
    finally:
        _microbatch.reset(token)


@contextlib.contextmanager
def one_pass(attacks: bool) -> Iterator[None]:
    """Begins a pass over a network; `attacks`: whether it is one of an attack."""
    microbatch = _microbatch.get() or _Microbatch([0, 0])
    number = microbatch.passes[attacks]
    microbatch.passes[attacks] += 1
    token = _pass.set(_Pass(xla.fold_in(xla.fold_in(microbatch.seed, _SALT + attacks), number)))
    try:
        yield
    finally:
        _pass.reset(token)


def next_seed() -> tf.Tensor:
    """The seed of the next draw of this pass, int32 [2]."""
    current = _pass.get() or _Pass(tf.constant([0, 0]))
    current.draws += 1
    return xla.fold_in(current.seed, current.draws)


class PassGenerator(backend.RandomGenerator):
    """What a Keras layer draws from, with the seeds of the pass: in a program the same with XLA and without."""

    def __init__(self):
        super().__init__(rng_type=self.RNG_LEGACY_STATEFUL)

    def make_seed_for_stateless_op(self) -> tf.Tensor:
        return next_seed()

    def random_uniform(self, shape, minval=0.0, maxval=None, dtype=None, nonce=None) -> tf.Tensor:
        high = 1.0 if maxval is None else maxval
        return tf.cast(xla.random_uniform(shape, next_seed(), minval, high), dtype or tf.float32)

    def random_normal(self, shape, mean=0.0, stddev=1.0, dtype=None, nonce=None) -> tf.Tensor:
        return tf.random.stateless_normal(shape, next_seed(), mean, stddev, dtype or tf.float32)

    def truncated_normal(self, shape, mean=0.0, stddev=1.0, dtype=None, nonce=None) -> tf.Tensor:
        return tf.random.stateless_truncated_normal(shape, next_seed(), mean, stddev, dtype or tf.float32)

    def dropout(self, inputs: tf.Tensor, rate: float, noise_shape=None) -> tf.Tensor:
        """`inputs` / (1 − rate), and 0 where a draw falls below the rate; float [any shape]."""
        shape = tf.shape(inputs) if noise_shape is None else noise_shape
        kept = xla.random_uniform(shape, next_seed(), 0.0, 1.0) >= rate
        return tf.where(kept, inputs / tf.cast(1.0 - rate, inputs.dtype), tf.zeros((), inputs.dtype))


def draw_by_pass(layers: list) -> None:
    """Makes the layers that draw, of those given, draw by the pass."""
    for layer in layers:
        if hasattr(layer, "_random_generator"):
            # Not Keras' setattr, which would make a checkpoint look for it.
            object.__setattr__(layer, "_random_generator", PassGenerator())
