"""Refusals: what Keras lets through and training here could not do, or would do as something else."""

from collections.abc import Iterable
from typing import Any

import tensorflow as tf
import tf_keras
from absl import logging

from conadv_tf.errors import ConfigError, whole_number
from conadv_tf.methods import Method
from conadv_tf.models.network import Network
from conadv_tf.training.learning_rate import has_schedule
from conadv_tf.training.optimizers import variables_of
from conadv_tf.training.other_keras import is_of_other_keras, other_keras
from conadv_tf.training.savable_model import check_saves

SMALL_EPSILON = 0.5  # pixel levels, below which an ε is probably a share of the range
PRECISIONS = ("float32", "mixed_bfloat16")
_SCOPE = ": make network, model and optimizer in one `with strategy.scope():`, and call the model there or in none"
_ONE_HOT = (
    *(tf_keras.losses.CategoricalCrossentropy, tf_keras.losses.CategoricalFocalCrossentropy),
    *(tf_keras.losses.BinaryCrossentropy, tf_keras.losses.BinaryFocalCrossentropy),
)


def check_kinds(network: Any, method: Any) -> None:
    """Raises ConfigError unless they are a Network and a Method."""
    if not isinstance(network, Network):
        raise ConfigError(
            f"network is a {type(network).__name__}: give a ResNet, or what split(model, method.branches) makes of a "
            "model of tf_keras"
        )
    if not isinstance(method, Method):
        raise ConfigError(f"method is a {type(method).__name__}: give what methods.conadv() or methods.vanilla() makes")


def check_network(network: Network, method: Method, microbatches: int) -> None:
    """Raises ConfigError unless the network can be trained by the method."""
    missing = [branch for branch in method.branches if branch not in network.branches]
    if missing:
        raise ConfigError(
            f"method {method.name!r} trains the BN branches {missing}, which the network lacks: "
            f"build it with branches={method.branches}"
        )
    if method.attack is not None and method.attack.compute_dtype not in network.activation_dtypes:
        raise ConfigError(
            f"attack.compute_dtype={method.attack.compute_dtype!r}: the layers of {network.architecture!r} compute in "
            "the dtype they were built with: leave it at None, or build the network under the policy 'mixed_bfloat16'"
        )
    whole_number("microbatches", microbatches, 1, ": 1 makes an update of one batch")
    if method.updates_per_batch > 1 and network.replicas_per_group > 1:
        raise ConfigError(
            f"{method.record.setting} gives neighbouring replicas different passes, which cannot share "
            f"batch statistics: use model.replicas_per_group=1, not {network.replicas_per_group}, or 'paired'"
        )
    if method.attack is not None:
        method.attack.check(network.num_classes, network.image_shape[-1])
        if method.attack.units == "pixels" and 0 < method.attack.epsilon_pixels < SMALL_EPSILON:
            logging.warning(
                "attack.epsilon_pixels=%g is less than half of one of 255 pixel levels: where 8/255 of the range is "
                "meant, it is 8",
                method.attack.epsilon_pixels,
            )
    if method.record.moves and not network.can_move:
        raise ConfigError(
            f"network {network.architecture!r} reads its weights itself, {method.name} needs one that can be moved: "
            "use a ResNet of this package, or another method"
        )


def check_one_batch(call: str, method: Method, microbatches: int, remedy: str) -> None:
    """Raises ConfigError unless an update is one batch, as a `call` that knows no number of updates takes it."""
    if method.batches_ahead or method.updates_per_batch > 1 or microbatches > 1:
        raise ConfigError(
            f"{call}: with {method.record.setting} and {microbatches} micro-batches an update is not one batch: "
            f"{remedy}"
        )


def check_precision(network: Network) -> None:
    """Raises ConfigError for a precision that training does not have, or a global policy that the network has not."""
    own, everywhere = network.dtype_policy.name, tf_keras.mixed_precision.global_policy().name
    if own not in PRECISIONS:
        raise ConfigError(
            f"the network's dtype={own!r} is none of {PRECISIONS}: float16 would need a scale of the loss; build it "
            "with dtype='mixed_bfloat16'"
        )
    if everywhere not in ("float32", own):
        raise ConfigError(
            f"the global policy {everywhere!r} does not reach the network, whose dtype is {own!r}: set the global "
            "policy to 'float32', and build the network with dtype='mixed_bfloat16' where that is meant"
        )


def check_compiled(optimizer: Any, loss: Any, unusable: dict[str, Any], strategy: tf.distribute.Strategy) -> None:
    """Raises ConfigError for arguments of `compile` that training cannot use.

    Args:
      optimizer, loss: those of `compile`.
      unusable: by name, arguments that must be empty.
      strategy: the model's.
    """
    for name, value in {**unusable, "loss": loss if isinstance(loss, str) else None}.items():
        if value:
            raise ConfigError(f"compile({name}={value!r}): pass a loss object, no metrics; logs have loss, top1")
    for name, value in (("optimizer", optimizer), ("loss", loss)):
        if is_of_other_keras(value):
            raise other_keras(f"compile({name}=…)", value)
    if loss is not None:
        check_loss(loss)
    if isinstance(optimizer, tf_keras.mixed_precision.LossScaleOptimizer):
        raise ConfigError(
            "compile(optimizer=LossScaleOptimizer): the loss has no scale here: pass the optimizer inside it"
        )
    if isinstance(optimizer, tf_keras.optimizers.Optimizer):
        check_created("the optimizer", variables_of(optimizer), strategy, own=False)


def check_loss(loss: Any) -> None:
    """Raises ConfigError for a loss that is none of (labels, logits), where Keras' own say what they are of."""
    kind = getattr(loss, "__name__", type(loss).__name__)
    if not callable(loss):
        raise ConfigError(f"compile(loss=…): a {kind} is no loss: pass one object or function of (labels, logits)")
    remedy = "pass tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True), or none for the smoothed one"
    if isinstance(loss, _ONE_HOT):
        raise ConfigError(f"compile(loss=…): {kind} takes one-hot labels, and labels here are numbers: {remedy}")
    of_probabilities = isinstance(loss, tf_keras.losses.Loss) and loss.get_config().get("from_logits") is False
    if of_probabilities or loss is tf_keras.losses.sparse_categorical_crossentropy:
        raise ConfigError(f"compile(loss=…): {kind} takes probabilities, and the network gives logits: {remedy}")


def check_callbacks(callbacks: Any) -> None:
    """Raises ConfigError for callbacks that are not of tf_keras, or would save what cannot be read back."""
    for callback in tf.nest.flatten(callbacks or []):
        if not isinstance(callback, (tf_keras.callbacks.Callback, tf_keras.callbacks.CallbackList)):
            raise other_keras("callbacks", callback)
        if isinstance(callback, tf_keras.callbacks.ModelCheckpoint) and not callback.save_weights_only:
            check_saves(callback.filepath)


def check_rate(optimizer: Any, callbacks: Any) -> None:
    """Raises ConfigError for callbacks that set the learning rate, where a schedule does so after them."""
    if optimizer is None or not has_schedule(optimizer):  # Keras itself says that a model is not compiled
        return
    for given in tf.nest.flatten(callbacks or []):
        for callback in getattr(given, "callbacks", [given]):
            if isinstance(callback, (tf_keras.callbacks.ReduceLROnPlateau, tf_keras.callbacks.LearningRateScheduler)):
                raise ConfigError(
                    f"callbacks: {type(callback).__name__} sets the learning rate, and the optimizer has a schedule, "
                    "which sets it at every update: pass a number as its learning_rate, or leave the callback out"
                )


def check_created(part: str, variables: Iterable[tf.Variable], strategy: tf.distribute.Strategy, own: bool) -> None:
    """Raises ConfigError unless a part of a model can be trained by its strategy.

    Args:
      part: "the network", "the optimizer".
      variables: those of the part.
      strategy: the one in whose scope the model was made.
      own: whether one device needs variables of its own scope too, as Keras asks of a network; others need them always.
    """
    one_device = _is_none(strategy) or (isinstance(strategy, tf.distribute.OneDeviceStrategy) and not own)
    for variable in variables:
        plain = not isinstance(variable, tf.distribute.DistributedValues)
        if not (strategy.extended.variable_created_in_scope(variable) or (one_device and plain)):
            raise ConfigError(
                f"{part} was made in another scope than the model, which was made {_place(strategy)}{_SCOPE}"
            )


def check_called(strategy: tf.distribute.Strategy) -> None:
    """Raises ConfigError where a model made in the scope of `strategy` is called in the scope of another one."""
    present = tf.distribute.get_strategy()
    if tf.distribute.has_strategy() and present is not strategy:
        raise ConfigError(f"the model was made {_place(strategy)}, and is called {_place(present)}{_SCOPE}")


def _is_none(strategy: tf.distribute.Strategy) -> bool:
    """Tells whether this is what TensorFlow has in the place of a strategy."""
    return type(strategy).__name__ == "_DefaultDistributionStrategy"


def _place(strategy: tf.distribute.Strategy) -> str:
    return "in no scope" if _is_none(strategy) else f"in that of a {type(strategy).__name__}"


def check_parts(network: Network) -> None:
    """Raises ConfigError for a network of which nothing is trained, or a part in part only."""
    trained = network.trained()
    for part in network.parts():
        could = [variable for variable in part.weights if variable.trainable]
        if {variable.ref() in trained for variable in could} == {True, False}:
            raise ConfigError(
                f"layer {part.name!r} is frozen (trainable=False) in a part of it: freeze all of it, or nothing"
            )
    if not network.trainable:
        raise ConfigError(
            "the network is frozen (network.trainable=False), and with it all layers: leave it at True, and freeze "
            "those of network.parts() that are to stay"
        )
    if not trained:
        raise ConfigError("all layers are frozen (trainable=False): leave at least the last one trainable")


def check_still_trained(network: Network, trained: frozenset) -> None:
    """Raises ConfigError unless a network trains what it did when its model was made; `trained`: `Network.trained`."""
    changed = len(network.trained() ^ trained)
    if changed:
        raise ConfigError(
            f"{changed} variables of the network were frozen or released (trainable) after the model was made: do so "
            "before, or make a new ConAdvModel of model.network"
        )
