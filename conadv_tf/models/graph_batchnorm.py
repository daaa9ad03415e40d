"""Split batch norm in a graph of Keras layers, which calls its layers with `inputs` and `training` alone."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import tensorflow as tf
import tf_keras

from conadv_tf.models.split_batchnorm import MAIN, SplitBatchNormalization, Turn


class NormCall(NamedTuple):
    """What a pass asks of every batch norm; see SplitBatchNormalization.call."""

    branch: str | Turn = MAIN
    update_statistics: bool | tf.Tensor = False
    synchronize: bool = True


_asked: contextvars.ContextVar[NormCall] = contextvars.ContextVar("asked", default=NormCall())  # noqa: B039 (immutable)


@contextlib.contextmanager
def asking(call: NormCall) -> Iterator[None]:
    """Says what the calls of graphs inside ask of batch norm."""
    token = _asked.set(call)
    try:
        yield
    finally:
        _asked.reset(token)


@tf_keras.saving.register_keras_serializable("conadv_tf")
class GraphBatchNormalization(SplitBatchNormalization):
    """SplitBatchNormalization in the place of a BatchNormalization of tf_keras.

    `training` chooses the mode, "batch" or "moving": what a graph pins with `base(x, training=False)` stays so. The
    branch and the rest are those of `asking`. Inputs are [rows, …, channels].

    Args:
      corrected: see SplitBatchNormalization; that of a layer of tf_keras which is not fused is not.
      synchronized: whether replicas share batch statistics, as many as `replicas_per_group`.
      learns: False for a layer that the graph calls so that it normalises with moving statistics in training too.
      frozen: see SplitBatchNormalization.
    """

    def __init__(
        self, corrected: bool = True, synchronized: bool = False, learns: bool = True, frozen: bool = False, **kwargs
    ):
        super().__init__(**kwargs)
        self.corrected = corrected
        self.frozen = frozen
        self.synchronized = synchronized
        self.learns = learns
        self.supports_masking = True

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:  # type: ignore[override]
        values = inputs if inputs.shape.rank == 4 else tf.reshape(inputs, [-1, 1, 1, inputs.shape[-1]])
        mode = "batch" if training and not self.frozen else "moving"
        outputs = super().call(values, mode=mode, **_asked.get()._asdict())
        return outputs if inputs.shape.rank == 4 else tf.reshape(outputs, tf.shape(inputs))

    def get_config(self) -> dict:
        names = ("corrected", "synchronized", "learns", "frozen")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}
