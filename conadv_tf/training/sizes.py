"""Sizes: the numbers in variables, the bytes that a method carries from one update to the next."""

import math
from collections.abc import Iterable

import tensorflow as tf

from conadv_tf.methods import Method

FLOAT_BYTES = 4  # of every variable of a network, whatever the precision of training


def count_numbers(variables: Iterable[tf.Variable]) -> int:
    """The number of numbers that the variables hold together."""
    return sum(math.prod(variable.shape) for variable in variables)


def carried_bytes(method: Method, rows: int, image_shape: tuple[int, ...]) -> int:
    """Bytes that one micro-batch of a method carries to the next update; 0 where a method carries nothing.

    Args:
      method: the method.
      rows: images of the micro-batch.
      image_shape: shape of one image as the data hand it out, uint8: (H, W, C), or (2, H, W, C) with an augmented one.
    """
    specs = method.carried(tf.TensorSpec((rows, *image_shape), tf.uint8)).values()
    return sum(math.prod(spec.shape) * spec.dtype.size for spec in specs)
