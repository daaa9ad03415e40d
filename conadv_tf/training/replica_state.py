"""Variables of which every replica has its own: sums over micro-batches, and what a schedule carries.

Neither is a Keras or checkpoint object: sums begin anew at each update, a carry is rebuilt when a run goes on.
"""

import tensorflow as tf


def _variable(shape, dtype=tf.float32) -> tf.Variable:
    return tf.Variable(
        tf.zeros(shape, dtype),
        trainable=False,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.SUM,
    )


class Accumulators:
    """Sums of contributions over micro-batches."""

    def __init__(self, shapes: list):
        self._sums = [_variable(shape) for shape in shapes]

    def clear(self) -> None:
        for total in self._sums:
            total.assign(tf.zeros_like(total))

    def add(self, contributions: list[tf.Tensor]) -> None:
        for total, value in zip(self._sums, contributions, strict=True):
            total.assign_add(value)

    def sums(self) -> list[tf.Tensor]:
        return [tf.identity(total) for total in self._sums]


class CarryVariables:
    """A carry (schedules.py) for each of `microbatches`; `read` and `write` run in a replica.

    Args:
      specs: by name; whole numbers keep floats that are whole numbers, such as pixels, exactly.
      microbatches: how many there are; their index is an int32 scalar.
    """

    def __init__(self, specs: dict[str, tf.TensorSpec], microbatches: int):
        self.variables = {
            name: _variable((microbatches, *spec.shape), spec.dtype) for name, spec in sorted(specs.items())
        }

    def read(self, microbatch: tf.Tensor) -> dict[str, tf.Tensor]:
        return {
            name: tf.raw_ops.ResourceGather(resource=variable.handle, indices=microbatch, dtype=variable.dtype)
            for name, variable in self.variables.items()
        }

    def write(self, microbatch: tf.Tensor, carry: dict[str, tf.Tensor]) -> None:
        for name, value in carry.items():
            variable = self.variables[name]
            if variable.dtype.is_integer and value.dtype.is_floating:
                value = tf.round(value)
            value = tf.cast(value, variable.dtype)
            tf.raw_ops.ResourceScatterUpdate(resource=variable.handle, indices=microbatch, updates=value)
