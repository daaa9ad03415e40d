"""Variables of which every replica has its own: sums over micro-batches, and what a schedule carries.

Neither is a Keras or checkpoint object: sums begin anew at each update, a carry is rebuilt when a run goes on.
"""

from collections.abc import Sequence

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


def index_dtype(shape: tf.TensorShape) -> tf.DType:
    """The dtype of indices into a variable. On a GPU TensorFlow counts its elements by the dtype of the index."""
    return tf.int64 if shape.num_elements() > tf.int32.max else tf.int32


class CarryVariables:
    """A carry (schedules.py) for each of `microbatches`; `read` and `write` run in a replica.

    What is mixed moves between the micro-batches M of a replica: row r of micro-batch m gets what micro-batch m + s r
    (mod M) of the update before wrote, or m − s r, by turns. An update writes where it has read, so that no second copy
    is needed: rows of one slot m where it is even, and of the slots m + s r where it is odd.

    On a GPU TensorFlow has no kernels for variables of int32, so that these are held as int64.

    Args:
      specs: by name; whole numbers keep floats that are whole numbers, such as pixels, exactly.
      microbatches: how many there are; their index is an int32 scalar.
      mixed: names whose rows are mixed.
      stride: s.

    Attributes:
      specs: as given.
    """

    def __init__(self, specs: dict[str, tf.TensorSpec], microbatches: int, mixed: Sequence[str] = (), stride: int = 1):
        self.specs = specs
        self._microbatches, self._mixed, self._stride = microbatches, frozenset(mixed), stride
        self._dtypes = {name: spec.dtype for name, spec in sorted(specs.items())}
        self.variables = {
            name: _variable((microbatches, *specs[name].shape), tf.int64 if dtype == tf.int32 else dtype)
            for name, dtype in self._dtypes.items()
        }

    def read(self, microbatch: tf.Tensor, update: tf.Tensor) -> dict[str, tf.Tensor]:
        """The carry into an update, int32 or int64 scalar."""

        def value(name: str, variable: tf.Variable) -> tf.Tensor:
            if name in self._mixed:
                places = self._places(variable, microbatch, update)
                return tf.raw_ops.ResourceGatherNd(resource=variable.handle, indices=places, dtype=variable.dtype)
            place = _index(microbatch, variable)
            return tf.raw_ops.ResourceGather(resource=variable.handle, indices=place, dtype=variable.dtype)

        return {name: tf.cast(value(name, held), self._dtypes[name]) for name, held in self.variables.items()}

    def write(self, microbatch: tf.Tensor, update: tf.Tensor, carry: dict[str, tf.Tensor]) -> None:
        """Keeps what an update leaves to the next one."""
        for name, value in carry.items():
            variable = self.variables[name]
            if variable.dtype.is_integer and value.dtype.is_floating:
                value = tf.round(value)
            value = tf.cast(value, variable.dtype)
            if name in self._mixed:
                places = self._places(variable, microbatch, update)
                tf.raw_ops.ResourceScatterNdUpdate(ref=variable.handle, indices=places, updates=value)
            else:
                place = _index(microbatch, variable)
                tf.raw_ops.ResourceScatterUpdate(resource=variable.handle, indices=place, updates=value)

    def _places(self, variable: tf.Variable, microbatch: tf.Tensor, update: tf.Tensor) -> tf.Tensor:
        """Slot and row of each row of a micro-batch, [rows, 2] of `index_dtype`."""
        rows = tf.range(variable.shape[1])
        shift = self._stride * tf.cast(update % 2, tf.int32) * rows
        places = tf.stack([tf.math.floormod(microbatch + shift, self._microbatches), rows], 1)
        return _index(places, variable)


def _index(places: tf.Tensor, variable: tf.Variable) -> tf.Tensor:
    return tf.cast(places, index_dtype(variable.shape))
