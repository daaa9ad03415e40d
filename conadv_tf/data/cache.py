"""The memory in which a host keeps the data it reads, so that later epochs and evaluations need not fetch them again.

tf.data's own cache repeats a finished sequence; here every epoch reads the files in another order, and an iterator may
be dropped anywhere. So elements lie in a table, under a number each. The table is TensorFlow's and belongs to the
device that is in scope when it is made: on a pod, to the host that reads.
"""

import tensorflow as tf


class Cache:
    """Elements of one structure, in groups that are read from one end to the other.

    Args:
      specs: the specs of an element, which is a tuple; scalars of type string are kept as they are, other tensors
        serialized.
    """

    def __init__(self, specs: tuple[tf.TensorSpec, ...]):
        self._specs = specs
        self._elements = tf.lookup.experimental.MutableHashTable(tf.int64, tf.string, [b""] * len(specs))
        self._held = tf.lookup.experimental.MutableHashTable(tf.int64, tf.int64, 0)  # elements of each group

    def through(
        self, elements: tf.data.Dataset, group: tf.Tensor, keys: tf.data.Dataset, count: tf.Tensor
    ) -> tf.data.Dataset:
        """Hands the elements on and keeps them; reads them from memory once the group was read to its end.

        Args:
          elements: the elements of one group, tuples; always the same ones.
          group: the number of the group, int64 scalar.
          keys: a key for each element, int64 scalars that no other group has.
          count: the number of elements, int64 scalar.

        Returns:
          Dataset of the elements. Whether memory holds them is looked up when the dataset is made: where it is iterated
          more than once, call this within flat_map.
        """
        complete = self._held.lookup(group) == count

        def keep(index: tf.Tensor, key: tf.Tensor, element: tuple[tf.Tensor, ...]) -> tuple[tf.Tensor, ...]:
            with tf.control_dependencies([self._elements.insert(key[None], self._pack(element)[None])]):
                held = self._held.insert(group[None], index[None] + 1)
            with tf.control_dependencies([held]):
                return tuple(map(tf.identity, element))

        fresh = tf.data.Dataset.zip(keys, elements).take(tf.where(complete, tf.constant(0, tf.int64), -1)).enumerate()
        kept = keys.take(tf.where(complete, tf.constant(-1, tf.int64), 0))
        return kept.map(lambda key: self._unpack(self._elements.lookup(key))).concatenate(
            fresh.map(lambda index, element: keep(index, *element))
        )

    def size(self) -> int:
        """The number of elements held."""
        return int(self._elements.size())

    def _pack(self, element: tuple[tf.Tensor, ...]) -> tf.Tensor:
        return tf.stack([part if part.dtype == tf.string else tf.io.serialize_tensor(part) for part in element])

    def _unpack(self, packed: tf.Tensor) -> tuple[tf.Tensor, ...]:
        def part(index: int, spec: tf.TensorSpec) -> tf.Tensor:
            value = packed[index] if spec.dtype == tf.string else tf.io.parse_tensor(packed[index], spec.dtype)
            return tf.ensure_shape(value, spec.shape)

        return tuple(part(index, spec) for index, spec in enumerate(self._specs))
