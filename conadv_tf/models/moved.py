"""A network at other weights than its variables hold, such as θ + e of sharpness-aware minimisation.

The layers of resnet.py and split_batchnorm.py read what they train through `read`. Within `moved` they read tensors in
the place of variables: nothing is assigned, so that a replica has weights of its own for as long as a pass lasts.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence

import tensorflow as tf

from conadv_tf.errors import ConfigError

_values: contextvars.ContextVar[dict | None] = contextvars.ContextVar("values", default=None)


@contextlib.contextmanager
def moved(variables: Sequence[tf.Variable], values: Sequence[tf.Tensor]) -> Iterator[None]:
    """Within it `read` gives these values, of the shapes and dtypes of the variables, in their places.

    Raises:
      ConfigError: if none of them was read: the network's layers do not use `read`.
    """
    by_variable = {variable.ref(): value for variable, value in zip(variables, values, strict=True)}
    was_read: dict = {"any": False, "values": by_variable}
    token = _values.set(was_read)
    try:
        yield
    finally:
        _values.reset(token)
    if not was_read["any"]:
        raise ConfigError("the network reads its variables itself and cannot be moved: train it by another method")


def read(variable: tf.Variable) -> tf.Variable | tf.Tensor:
    """The variable, or its value within `moved`."""
    now = _values.get()
    if now is None or variable.ref() not in now["values"]:
        return variable
    now["any"] = True
    return now["values"][variable.ref()]
