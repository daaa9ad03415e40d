"""What is of Keras 3, `keras`, where all here is of `tf_keras`: alike by name, and not by what it does."""

from typing import Any

from conadv_tf.errors import ConfigError


def is_of_other_keras(value: Any) -> bool:
    """Tells whether a value is an object of a class of `keras`, or of a subclass."""
    return any(base.__module__.split(".")[0] == "keras" for base in type(value).__mro__)


def other_keras(place: str, value: Any) -> ConfigError:
    """The error for a value that is not of tf_keras, at a place such as "callbacks"."""
    kind = type(value)
    return ConfigError(
        f"{place}: {kind.__module__}.{kind.__name__} is not of tf_keras, as this model is: use tf_keras' own"
    )
