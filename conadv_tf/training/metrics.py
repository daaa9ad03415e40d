"""Values that watch an update beside its losses, and the means of an epoch, which tell whether all of it was finite."""

import math
from collections.abc import Sequence

import tensorflow as tf
import tf_keras

from conadv_tf.models.network import Network
from conadv_tf.training.lars import is_adapted
from conadv_tf.training.learning_rate import next_rate

MONITORS = (
    "learning_rate",
    "gradient_norm",
    "squared_gradient_norm",
    "trust_ratio_min",
    "trust_ratio_median",
    "trust_ratio_max",
    "drift",
    "batch_statistics_max",
)


class _Unsaved(tf_keras.metrics.Metric):
    """A metric that Keras' files leave out: it begins anew, and Keras cannot load one of several replicas."""

    def save_own_variables(self, store) -> None:
        pass

    def load_own_variables(self, store) -> None:
        pass


class EvaluationMean(_Unsaved, tf_keras.metrics.Mean):
    """The mean of a value over an evaluation."""


class TrainingMeans(_Unsaved, tf_keras.metrics.MeanTensor):
    """Means over the updates of an epoch, and the trust ratios of the last update that was finite.

    Args:
      num_logs: values of an update.
      num_ratios: variables with a trust ratio.
    """

    def __init__(self, num_logs: int, num_ratios: int):
        super().__init__("training", shape=(num_logs,))
        self.ratios = self.add_weight("trust_ratios", shape=(num_ratios,), initializer="zeros")

    def add_weight(self, *args, **kwargs) -> tf.Variable:
        # Not Keras' sum over replicas: what is kept of an epoch must count the same on another number of them.
        return super().add_weight(*args, aggregation=tf.VariableAggregation.MEAN, **kwargs)

    def record(self, values: tf.Tensor, ratios: tf.Tensor) -> tf.Tensor:
        """Adds an update; bool scalar: whether it and all before it in this epoch are finite. Runs in a replica."""
        # What is not finite stays in the sum: no later update of the same call is applied either, nor added, so that
        # the means tell what was not finite first.
        before = tf.reduce_all(tf.math.is_finite(self.total))
        finite = before & tf.reduce_all(tf.math.is_finite(values))
        self.ratios.assign(tf.where(finite, ratios, self.ratios))
        self.update_state(tf.where(before, values, 0.0))
        return finite

    def reset_state(self) -> None:
        for variable in (self.total, self.count):
            variable.assign(tf.zeros_like(variable))


def top(count: int, labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """The chance that each label is among the `count` largest logits, equal ones being put in a random order.

    It is 1 or 0 but for ties: equal logits of 1,000 classes give 0.005 for the five largest.

    Args:
      count: at least 1.
      labels: int32 [rows].
      logits: float32 [rows, classes].

    Returns:
      float32 [rows], in [0, 1]; 0 for a row that is not finite and for a label that is none.
    """
    hot = tf.one_hot(labels, logits.shape[1])
    own = tf.reduce_sum(hot * logits, 1, keepdims=True)
    larger = tf.reduce_sum(tf.cast(logits > own, tf.float32), 1)
    equal = tf.reduce_sum(tf.cast(tf.equal(logits, own), tf.float32), 1)
    chance = tf.clip_by_value(tf.math.divide_no_nan(count - larger, equal), 0.0, 1.0)
    return tf.where(tf.reduce_all(tf.math.is_finite(logits), 1), chance * tf.reduce_sum(hot, 1), 0.0)


def monitors(
    optimizer, gradients: list[tf.Tensor], statistics: list[tf.Tensor], ratios: tf.Tensor, drift: tf.Tensor
) -> list[tf.Tensor]:
    """The values of MONITORS, float32 scalars, for gradients and BN statistics averaged over replicas.

    batch_statistics_max is the largest magnitude of a batch's mean or variance: where activations grow without bound
    the variance overflows first, which loss and gradient need not show.
    """
    norm = tf.linalg.global_norm(gradients)
    ordered, count = tf.sort(ratios), ratios.shape[0]
    median = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2.0
    magnitudes = tf.abs(tf.concat([*statistics, [0.0]], 0))  # of a network without batch norm there are none
    # The maximum alone would not do: compiled by XLA for a CPU it passes over NaN.
    largest = tf.where(tf.reduce_all(tf.math.is_finite(magnitudes)), tf.reduce_max(magnitudes), math.inf)
    return [tf.cast(next_rate(optimizer), tf.float32), norm, norm**2, ordered[0], median, ordered[-1], drift, largest]


def num_ratios(variables: Sequence[tf.Variable]) -> int:
    """The number of trust ratios of variables: one for each that is adapted, at least one."""
    return max(1, sum(map(is_adapted, variables)))


def trust_ratios(optimizer, variables: list[tf.Variable], gradients: list[tf.Tensor]) -> tf.Tensor:
    """LARS trust ratios of the adapted variables, float32 [num_ratios]; 1 for other optimizers, and where none is."""
    pairs = [pair for pair in zip(variables, gradients, strict=True) if is_adapted(pair[0])]
    if not pairs or not hasattr(optimizer, "trust_ratio"):
        return tf.ones(num_ratios(variables))
    return tf.stack([optimizer.trust_ratio(variable, gradient) for variable, gradient in pairs])


def drift(network: Network, stale: Network) -> tf.Tensor:
    """‖θ_t − θ_{t−τ}‖ / ‖θ_t‖, float32 scalar; 0 where both are one (Lemma 1 of the paper)."""
    if stale is network:
        return tf.constant(0.0)
    weights = [tf.convert_to_tensor(variable) for variable in network.trainable_variables]
    return distance(network, stale) / tf.linalg.global_norm(weights)


def distance(network: Network, stale: Network) -> tf.Tensor:
    """‖θ_t − θ_{t−τ}‖ over all variables that the network trains, float32 scalar."""
    trained = network.trained()
    pairs = zip(network.leaf_variables(), stale.leaf_variables(), strict=True)
    return tf.linalg.global_norm(
        [tf.convert_to_tensor(now) - tf.convert_to_tensor(then) for now, then in pairs if now.ref() in trained]
    )
