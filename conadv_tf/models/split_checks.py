"""Refusals of `split`: models that cannot be cloned, that would train otherwise than in Keras, or give no logits."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import tf_keras
from tf_keras.src.layers.normalization.batch_normalization import BatchNormalizationBase

from conadv_tf.errors import ConfigError
from conadv_tf.models.cloning import all_layers, is_graph
from conadv_tf.models.split_batchnorm import MAIN

_BATCH_NORMS = ("BatchNormalization", "SyncBatchNormalization")
_PROBABILITIES = ("softmax", "sigmoid")


def check_branches(branches: Sequence[str]) -> None:
    """Raises ConfigError unless these are names of branches."""
    if isinstance(branches, str) or MAIN not in branches or len(set(branches)) < len(branches):
        raise ConfigError(
            f"branches={branches!r}: name each branch once, {MAIN!r} among them, such as ('main', 'adversarial')"
        )


def check_model(model: Any) -> None:
    """Raises ConfigError for a model that cannot be split, or is no classifier of images by logits."""
    if not isinstance(model, tf_keras.Model):
        kind = f"{type(model).__module__}.{type(model).__name__}"
        raise ConfigError(f"split takes a model of tf_keras, not {kind}: build it with `import tf_keras`")
    if not is_graph(model):
        raise ConfigError(
            f"{_named(model)} is a subclassed model, whose layers and calls Keras does not know: build it with the "
            "functional API, or make it a subclass of conadv_tf.models.network.Network"
        )
    if not model.inputs:
        raise ConfigError(f"{_named(model)} has no input shape yet: begin it with tf_keras.Input((height, width, 3))")
    _check_ends(model)
    layers = list(all_layers(model))
    graphs = [model, *(layer for layer in layers if is_graph(layer))]
    called = {id(layer) for graph in graphs for layer in graph.layers}
    for layer in layers:
        _check_layer(model, layer, id(layer) in called)
    _check_logits(model)


def _check_ends(model: tf_keras.Model) -> None:
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise ConfigError(
            f"{_named(model)} has {len(model.inputs)} inputs and {len(model.outputs)} outputs: training here maps one "
            "batch of images to one of logits: make a tf_keras.Model(inputs, outputs) of these two"
        )
    images, logits = model.input_shape, model.output_shape
    if len(images) != 4 or None in images[1:]:
        raise ConfigError(
            f"{_named(model)} takes inputs of shape {images}: build it for images of one size, with "
            "input_shape=(height, width, channels)"
        )
    if len(logits) != 2 or logits[-1] is None:
        raise ConfigError(
            f"{_named(model)} gives outputs of shape {logits}: a classifier gives logits (rows, classes): pool the "
            "features and end with a Dense layer"
        )


def _check_layer(model: tf_keras.Model, layer: tf_keras.layers.Layer, called: bool) -> None:
    """Raises ConfigError for a layer that cannot be split; `called`: by a graph, not by another layer."""
    place = f"layer {layer.name!r} of {_named(model)}"
    if isinstance(layer, BatchNormalizationBase):
        _check_norm(layer, place, called)
    if getattr(layer, "activity_regularizer", None) is not None or type(layer).__name__ == "AddLoss":
        raise ConfigError(
            f"{place} adds a loss of its outputs, which training here does not know: build it without; regularizers of "
            "weights are kept"
        )


def _check_norm(layer: BatchNormalizationBase, place: str, called: bool) -> None:
    axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
    if type(layer).__name__ not in _BATCH_NORMS or not type(layer).__module__.startswith("tf_keras."):
        raise ConfigError(f"{place} is a batch norm of its own, {type(layer).__name__}: use BatchNormalization")
    if not called:
        raise ConfigError(
            f"{place} lies inside another layer, where it cannot be split: call it from the model (functional API)"
        )
    if axes not in ([-1], [len(layer.input_shape) - 1]) or getattr(layer, "renorm", False):
        raise ConfigError(f"{place} has axis={axes}, renorm={layer.renorm}: split BN knows the last axis, no renorm")
    for setting in ("gamma_regularizer", "beta_regularizer", "gamma_constraint", "beta_constraint"):
        if getattr(layer, setting) is not None:
            raise ConfigError(f"{place} has a {setting}, which split BN has not: build it without")


def _check_logits(model: tf_keras.Model) -> None:
    last = model.layers[-1] if isinstance(model, tf_keras.Sequential) else model.outputs[0]._keras_history.layer
    if is_graph(last):
        return _check_logits(last)
    activation = getattr(getattr(last, "activation", None), "__name__", type(last).__name__.lower())
    if activation in _PROBABILITIES or last.name.startswith("tf.nn.softmax"):
        raise ConfigError(
            f"layer {last.name!r} of {_named(model)} gives probabilities ({activation}), the loss expects logits: "
            "build it with classifier_activation=None, or activation=None in the last layer"
        )


def check_preprocessed(images: Any, image_shape: tuple[int, ...]) -> None:
    """Raises ConfigError unless `preprocess` gave a float image of the shape it was given."""
    if not tf.is_tensor(images):
        raise ConfigError(
            f"preprocess gives a {type(images).__name__}: write it with TensorFlow's operations, of which programs and "
            "their gradients are made"
        )
    if tuple(images.shape[1:]) != image_shape or not images.dtype.is_floating:
        raise ConfigError(
            f"preprocess gives {images.dtype.name} of shape {tuple(images.shape[1:])} for an image of {image_shape}: "
            "it must keep the shape and give floats"
        )


def check_draws(program: tf.Graph) -> None:
    """Raises ConfigError if a pass, traced into `program`, draws from global state."""
    for operation in program.get_operations():
        if operation.op_def.is_stateful and operation.type.startswith(("Random", "TruncatedNormal", "Multinomial")):
            raise ConfigError(
                f"{operation.name!r} draws from TensorFlow's global state, which no seed repeats: draw in a layer of "
                "tf_keras, such as Dropout(rate, noise_shape=(None, 1, 1, 1)) for stochastic depth"
            )


def precision(graph: tf_keras.Model) -> str:
    """The policy of a model: that of the layer that differs most from float32."""
    policies = {layer.dtype_policy.name for layer in all_layers(graph) if layer.weights}
    others = policies - {"float32", "mixed_bfloat16"}
    return min(others) if others else "mixed_bfloat16" if "mixed_bfloat16" in policies else "float32"


def _named(model: tf_keras.Model) -> str:
    return f"model {model.name!r}"
