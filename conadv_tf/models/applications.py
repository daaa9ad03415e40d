"""The image classifiers of tf_keras.applications, as networks that a recipe names."""

import contextlib
import random
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import tf_keras

from conadv_tf.errors import ConfigError, one_line
from conadv_tf.models.keras_split import SplitNetwork, split


def names() -> tuple[str, ...]:
    """The names of the networks, such as "EfficientNetB0"."""
    return tuple(name for name in dir(tf_keras.applications) if name[0].isupper())


def application(
    name: str, num_classes: int, image_shape: Sequence[int], branches: Sequence[str], seed: int, dtype: str
) -> SplitNetwork:
    """A network of tf_keras.applications with random weights, for images in [0, 255], and split batch norm.

    Args:
      name: one of `names`.
      num_classes: width of the logits.
      image_shape: (H, W, C).
      branches: names of the branches of batch norm.
      seed: of the initial weights.
      dtype: policy of the layers, "float32" or "mixed_bfloat16".

    Raises:
      ConfigError: for images that the network cannot take.
    """
    make = getattr(tf_keras.applications, name)
    with _seeded(seed), _policy(dtype):
        try:
            model = make(weights=None, input_shape=image_shape, classes=num_classes, classifier_activation=None)
        except ValueError as error:
            height, width, channels = image_shape
            raise ConfigError(
                f"model.name={name!r} does not take images of {height} × {width} × {channels} ({one_line(error)}): "
                "choose larger images, or another network"
            ) from error
    network = split(model, branches, sys.modules[make.__module__].preprocess_input)
    network.architecture = name
    return network


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Keras draws initial weights by Python's, NumPy's and TensorFlow's own state: the first two are put back."""
    states = random.getstate(), np.random.get_state()
    tf_keras.utils.set_random_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextlib.contextmanager
def _policy(dtype: str) -> Iterator[None]:
    before = tf_keras.mixed_precision.global_policy()
    tf_keras.mixed_precision.set_global_policy(dtype)
    try:
        yield
    finally:
        tf_keras.mixed_precision.set_global_policy(before)
