"""Clones of Keras graphs of layers, with split batch norm in the place of batch norm, and walks through them."""

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf
import tf_keras
from tf_keras.src.layers.normalization.batch_normalization import BatchNormalizationBase

from conadv_tf.errors import ConfigError, one_line
from conadv_tf.models.graph_batchnorm import GraphBatchNormalization
from conadv_tf.models.split_batchnorm import MAIN

MIXED = "mixed_bfloat16"


def clone(
    model: tf_keras.Model, branches: Sequence[str], replicas_per_group: int, dtype: str | None = None
) -> tf_keras.Model:
    """A model of the same layers and weights, whose batch norm has `branches`.

    Args:
      model: functional or Sequential, with batch norm of Keras or of an earlier clone.
      branches: the branches; those that the model lacks are as "main".
      replicas_per_group: replicas that share the statistics of synchronized batch norm.
      dtype: a policy in the place of "mixed_bfloat16"; None: every layer keeps its own.

    Raises:
      ConfigError: for a layer that Keras cannot make again.
    """
    made: dict[int, tuple[tf_keras.layers.Layer, tf_keras.layers.Layer]] = {}

    def cloned(layer: tf_keras.layers.Layer) -> tf_keras.layers.Layer:
        if id(layer) not in made:
            made[id(layer)] = layer, again(layer)
        return made[id(layer)][1]

    def again(layer: tf_keras.layers.Layer) -> tf_keras.layers.Layer:
        if is_graph(layer):
            return tf_keras.models.clone_model(layer, clone_function=cloned)
        try:
            config = _with_dtype(layer.get_config(), dtype)
            if isinstance(layer, (BatchNormalizationBase, GraphBatchNormalization)):
                return _split(layer, config, branches, replicas_per_group)
            if is_stochastic_depth(layer):
                return _dropped_paths(layer, config)
            return type(layer).from_config(config)
        except (NotImplementedError, TypeError, ValueError) as error:
            raise ConfigError(
                f"layer {layer.name!r} ({type(layer).__name__}) cannot be made again ({one_line(error)}): give it a "
                "get_config from which its from_config makes it"
            ) from error

    copy = cloned(model)
    for old, new in made.values():
        _assign(old, new)
    return copy


def is_graph(layer: Any) -> bool:
    """Tells whether a layer is a model whose layers and calls Keras knows: functional or Sequential."""
    return isinstance(layer, tf_keras.Sequential) or getattr(layer, "_is_graph_network", False)


def is_synchronized(model: tf_keras.Model) -> bool:
    """Tells whether replicas share the batch statistics of any batch norm of Keras in a model."""
    return any(getattr(layer, "synchronized", False) for layer in all_layers(model))


def is_stochastic_depth(layer: tf_keras.layers.Layer) -> bool:
    """Tells whether a layer is the stochastic depth of tf_keras' ConvNeXt, which draws from global state."""
    return type(layer).__name__ == "StochasticDepth" and hasattr(layer, "drop_path_rate")


def normalize_layers_in_two_passes(model: tf_keras.Model) -> None:
    """Makes LayerNormalization take its variance around the mean: the kernel that Keras chooses does not under XLA."""
    for layer in all_layers(model):
        if isinstance(layer, tf_keras.layers.LayerNormalization):
            layer._fused = False


def all_layers(model: tf_keras.Model) -> Iterator[tf_keras.layers.Layer]:
    """Every layer of a graph once, those within models and layers behind what they are in."""
    seen: set[int] = set()

    def walk(layers) -> Iterator[tf_keras.layers.Layer]:
        for layer in layers:
            if id(layer) not in seen:
                seen.add(id(layer))
                yield layer
                yield from walk(layer.layers if is_graph(layer) else _inner(layer))

    return walk(model.layers)


def weighted_layers(model: tf_keras.Model) -> list[tf_keras.layers.Layer]:
    """The layers of a graph that have weights, models left out, and those that lie inside of another layer."""
    layers = [layer for layer in all_layers(model) if not is_graph(layer)]
    within = {id(inner) for layer in layers for inner in _inner(layer)}
    return [layer for layer in layers if layer.weights and id(layer) not in within]


def modules_of_layers(model: tf_keras.Model) -> dict[str, str]:
    """The modules of the layers of a graph by their classes, of those that Keras does not find by itself."""
    classes = {type(layer) for layer in all_layers(model)}
    return {kind.__name__: kind.__module__ for kind in classes if not hasattr(tf_keras.layers, kind.__name__)}


def known_layers(modules: dict[str, str]) -> dict[str, Any]:
    """The classes that `modules_of_layers` told of; raises as `found` does."""
    return {name: found(module, name) for name, module in modules.items()}


def place_of(function: Any) -> dict[str, str]:
    """Where `found` finds a function.

    Raises:
      ConfigError: for a function that no module has, such as a lambda.
    """
    place = {"module": function.__module__, "name": getattr(function, "__qualname__", repr(function))}
    if not place["name"].isidentifier():
        raise ConfigError(
            f"preprocess={place['name']} cannot be saved: define it in a module, outside of other functions"
        )
    return place


def found(module: str, name: str) -> Any:
    """What a module of Python has by a name.

    Raises:
      ConfigError: where there is none.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the saved network needs {name!r} of {module!r}, which is not here ({one_line(error)}): bring it back"
        ) from error


def placed_variables(model: tf_keras.Model) -> Iterator[tuple[str, tf.Variable]]:
    """Every variable of a graph with its place, such as "conv1/kernel", in an order that freezing does not change."""
    seen: set[int] = set()
    for layer in all_layers(model):
        # A leaf's weights have one order; those of a layer of layers come leaf by leaf, behind its own.
        if is_graph(layer):
            continue
        inner = {id(weight) for other in _inner(layer) for weight in other.weights}
        for variable in layer.weights:
            if id(variable) not in inner | seen:
                seen.add(id(variable))
                below = variable.name.split(":")[0].rpartition(f"{layer.name}/")[2]
                yield f"{layer.name}/{below}", variable


def _inner(layer: tf_keras.layers.Layer) -> list[tf_keras.layers.Layer]:
    return [module for module in layer.submodules if isinstance(module, tf_keras.layers.Layer)]


def _with_dtype(config: Any, dtype: str | None) -> Any:
    """The config of a layer and the layers inside it, in another precision than a mixed one."""
    if dtype is None:
        return config
    if isinstance(config, dict):
        return {name: _with_dtype(value, dtype) for name, value in config.items()}
    return dtype if isinstance(config, str) and config == MIXED else config


def _split(layer, config: dict, branches: Sequence[str], replicas_per_group: int) -> GraphBatchNormalization:
    kept = {name: config[name] for name in ("name", "trainable", "dtype", "momentum", "epsilon", "scale", "center")}
    if isinstance(layer, GraphBatchNormalization):
        kept |= {name: config[name] for name in ("corrected", "synchronized", "learns", "frozen")}
    else:
        kept |= {"corrected": bool(layer.fused), "synchronized": layer.synchronized}
    groups = replicas_per_group if layer.synchronized else 1
    return GraphBatchNormalization(branches=branches, replicas_per_group=groups, **kept)


def _dropped_paths(layer, config: dict) -> tf_keras.layers.Dropout:
    """Dropout of whole examples, which is what stochastic depth is, in a layer whose draws can be seeded."""
    ranks = len(layer.input_shape)
    return tf_keras.layers.Dropout(
        layer.drop_path_rate, (None, *[1] * (ranks - 1)), name=config["name"], dtype=config["dtype"]
    )


def _assign(old: tf_keras.layers.Layer, new: tf_keras.layers.Layer) -> None:
    """Gives a clone the weights of its original; models have been given theirs layer by layer."""
    if is_graph(old):
        return
    if not isinstance(new, GraphBatchNormalization):
        for variable, value in zip(_weights(new), _weights(old), strict=True):
            variable.assign(value.numpy())
        if hasattr(new, "finalize_state"):  # Normalization computes with constants that it makes of its variables
            new.finalize_state()
        return
    for branch in new.branches:
        values = (new.gammas, new.betas, new.moving_means, new.moving_variances)
        for variables, value in zip(values, _of_branch(old, branch), strict=True):
            if value is not None:
                variables[branch].assign(value.numpy())


def _weights(layer: tf_keras.layers.Layer) -> list[tf.Variable]:
    """The variables of a layer, each once: Keras counts twice what a variable creator makes non-trainable."""
    return list({id(variable): variable for variable in layer.weights}.values())


def _of_branch(layer, branch: str) -> list:
    """γ, β, moving mean and variance of a branch; None for one that there is not."""
    if not isinstance(layer, GraphBatchNormalization):
        return [layer.gamma, layer.beta, layer.moving_mean, layer.moving_variance]
    known = branch if branch in layer.branches else MAIN
    return [part[known] for part in (layer.gammas, layer.betas, layer.moving_means, layer.moving_variances)]
