"""A network at other weights than its variables hold, such as θ + e of sharpness-aware minimisation.

The layers of resnet.py and split_batchnorm.py read what they train through `read`. Within `moved` they read tensors in
the place of variables: nothing is assigned, so that a replica has weights of its own for as long as a pass lasts.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import tensorflow as tf

_NONE: Mapping[Any, tf.Tensor] = MappingProxyType({})
_values: contextvars.ContextVar[Mapping[Any, tf.Tensor]] = contextvars.ContextVar("values", default=_NONE)


@contextlib.contextmanager
def moved(variables: Sequence[tf.Variable], values: Sequence[tf.Tensor]) -> Iterator[None]:
    """Within it `read` gives these values, of the shapes and dtypes of the variables, in their places."""
    token = _values.set({variable.ref(): value for variable, value in zip(variables, values, strict=True)})
    try:
        yield
    finally:
        _values.reset(token)


def read(variable: tf.Variable) -> tf.Variable | tf.Tensor:
    """The variable, or its value within `moved`."""
    return _values.get().get(variable.ref(), variable)
