"""The image classifiers of tf_keras.applications, as networks that a recipe names."""

import contextlib
import random
import sys
import zipfile
from collections.abc import Iterator, Sequence

import h5py
import numpy as np
import tensorflow as tf
import tf_keras
from tf_keras.src.saving.legacy import hdf5_format

from conadv_tf.errors import ConfigError, one_line
from conadv_tf.models import cloning
from conadv_tf.models.keras_split import SplitNetwork, split
from conadv_tf.models.resnet import IMAGENET_STDDEV


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
    _compute_logits_in_float32(model)
    network = split(model, branches, sys.modules[make.__module__].preprocess_input)
    network.architecture = name
    return network


def _compute_logits_in_float32(model: tf_keras.Model) -> None:
    """Sets the policy of the last layer with weights and of what follows it, as Keras asks of a mixed policy's end."""
    last = max(place for place, layer in enumerate(model.layers) if layer.weights)
    for layer in model.layers[last:]:
        layer._set_dtype_policy("float32")


def load_weights(network: SplitNetwork, path: str, held: int | None) -> None:
    """Gives a network of `application` the weights in a file of the Keras model of its name.

    Args:
      network: with one branch, and `held` classes where that is not None.
      path: local, ….h5, ….weights.h5 or ….keras.
      held: `held_classes` of the file.

    Raises:
      ValueError, OSError, KeyError: by Keras, for weights of another model; the first that differs is named.
    """
    top = {} if held is None else {"classes": held, "classifier_activation": None}
    model = getattr(tf_keras.applications, network.architecture)(
        weights=None, input_shape=network.image_shape, include_top=held is not None, **top
    )
    model.load_weights(path)
    for theirs, ours in zip(cloning.weighted_layers(model), network.parts(), strict=held is not None):
        ours.set_weights(theirs.get_weights())
        if isinstance(ours, tf_keras.layers.Normalization):
            _rectify(ours)


def _rectify(layer: tf_keras.layers.Normalization) -> None:
    # Keras' EfficientNets for ImageNet keep a standard deviation where the layer takes a variance, and divide once more
    # by its root in a layer that a model without its weights has not.
    if np.allclose(layer.adapt_variance, IMAGENET_STDDEV):
        layer.adapt_variance.assign(tf.square(layer.adapt_variance))
    layer.finalize_state()


def held_classes(network: SplitNetwork, path: str) -> int | None:
    """The classes of a weights file of the Keras model that a network is of; None where it ends before ("notop")."""
    parts = network.parts()
    if not path.endswith((".keras", ".weights.h5")):
        with h5py.File(path) as file:
            groups = file.get("model_weights", file)
            layers = [groups[layer] for layer in listed(groups, "layer_names")]
            layers = [layer for layer in layers if listed(layer, "weight_names")]
            if len(layers) < len(parts):
                return None
            return int(layers[-1][listed(layers[-1], "weight_names")[-1]].shape[-1])
    alike = [layer for layer in network.graph.layers if type(layer) is type(parts[-1])]
    kind = type(parts[-1]).__name__.lower()
    bias = f"layers/{kind}_{len(alike) - 1}/vars/1" if len(alike) > 1 else f"layers/{kind}/vars/1"
    with _weights_file(path) as file:
        return int(file[bias].shape[-1]) if bias in file else None


@contextlib.contextmanager
def _weights_file(path: str) -> Iterator[h5py.File]:
    """The weights in a ….weights.h5 or ….keras, by the paths that Keras gives them."""
    if path.endswith(".keras"):
        with zipfile.ZipFile(path) as archive, archive.open("model.weights.h5") as part, h5py.File(part) as file:
            yield file
    else:
        with h5py.File(path) as file:
            yield file


def listed(group: h5py.Group, name: str) -> list[str]:
    """The names in an attribute of an .h5 of Keras, "layer_names" or "weight_names"; none where it is not there.

    Some versions of Keras write them as bytes, all of them part a long list into several attributes.
    """
    return hdf5_format.load_attributes_from_hdf5_group(group, name)


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
