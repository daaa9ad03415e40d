"""Split batch normalisation: one layer, one set of γ, β and moving statistics per named branch.

Clean images pass through the branch "main", adversarial ones through "adversarial" (AdvProp, Xie et al. 2020;
docs/method.md). Every call says which branch it uses, whether it normalises with the statistics of the batch
or with the moving ones, and whether the moving ones learn from it, so that an attack can look through a
branch without leaving a trace in it.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import tensorflow as tf
import tf_keras

from conadv_tf.errors import ConfigError
from conadv_tf.models import xla
from conadv_tf.models.moved import read

MAIN = "main"
ADVERSARIAL = "adversarial"
AUGMENTED = "augmented"
MODES = ("batch", "moving")


class Turn(NamedTuple):
    """The branch of a replica that takes turns: "main" where `clean`, else "adversarial".

    `clean` is a bool scalar, true on half of the replicas (and micro-batches) of an update. Only within
    `deferred_statistics`: over all of them, what it defers is the mean over those that took the branch.
    """

    clean: tf.Tensor


# A moving statistic and what a batch measured for it.
Statistic = tuple[tf.Variable, tf.Tensor]

_deferred: contextvars.ContextVar[list[Statistic] | None] = contextvars.ContextVar("deferred", default=None)


@contextlib.contextmanager
def deferred_statistics() -> Iterator[list[Statistic]]:
    """Collects the batch statistics of the calls inside it instead of assigning them.

    The trainer averages them over replicas and micro-batches in the same all-reduce as the gradients and
    assigns once per update; a layer on its own would need one all-reduce per layer, and could not know
    about micro-batches. Yields a list that receives (moving variable, batch value float32 [channels]).
    """
    statistics: list[Statistic] = []
    token = _deferred.set(statistics)
    try:
        yield statistics
    finally:
        _deferred.reset(token)


def moving_average(moving, statistic, momentum: float):
    """m ← momentum · m + (1 − momentum) · s; all float32 [channels]."""
    return moving * momentum + statistic * (1.0 - momentum)


class SplitBatchNormalization(tf_keras.layers.Layer):
    """Batch normalisation of [rows, height, width, channels] with any number of branches.

    γ, β and the statistics are float32 under every policy; the output has the dtype of the input. The
    moving variance is that of tf_keras' fused layer: Bessel-corrected, momentum on the old value; 0 for a single value.

    XLA takes a batch's variance as a difference of moments, which cancel far from zero. Under `xla.compiling` values
    are therefore shifted by the moving means, which changes nothing but rounding. Where a mean is d standard deviations
    from them, the relative error of the variance is at most 1e-5 (1 + d²), however far from zero both are.

    Args:
      branches: names of the branches, e.g. ("main", "adversarial", "augmented").
      momentum: weight of the old value in the moving averages, 0 ≤ momentum < 1.
      epsilon: added to the variance.
      gamma_initializer: "ones", or "zeros" for the last layer of a residual block.
      replicas_per_group: replicas that share batch statistics ("distributed BN"); 1 keeps them local.
      scale, center: whether γ and β are trained; else they stay 1 and 0.

    Attributes:
      corrected: whether the moving variance is Bessel-corrected, as that of tf_keras' fused layer.
      frozen: whether every call normalises with the moving statistics, which stay; `Network.settle` says so.
    """

    def __init__(
        self,
        branches: Sequence[str] = (MAIN,),
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        gamma_initializer: str = "ones",
        replicas_per_group: int = 1,
        scale: bool = True,
        center: bool = True,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.branches = tuple(branches)
        self.momentum = momentum
        self.epsilon = epsilon
        self.gamma_initializer = gamma_initializer
        self.replicas_per_group = replicas_per_group
        self.scale = scale
        self.center = center
        self.corrected = True
        self.frozen = False
        self.gammas: dict[str, tf.Variable] = {}
        self.betas: dict[str, tf.Variable] = {}
        self.moving_means: dict[str, tf.Variable] = {}
        self.moving_variances: dict[str, tf.Variable] = {}

    def build(self, input_shape) -> None:
        channels = (input_shape[-1],)
        for branch in self.branches:
            kept = {"dtype": tf.float32, "experimental_autocast": False}
            averaged = {**kept, "trainable": False, "aggregation": tf.VariableAggregation.MEAN}
            self.gammas[branch] = self.add_weight(
                f"{branch}/gamma", channels, initializer=self.gamma_initializer, trainable=self.scale, **kept
            )
            self.betas[branch] = self.add_weight(
                f"{branch}/beta", channels, initializer="zeros", trainable=self.center, **kept
            )
            self.moving_means[branch] = self.add_weight(
                f"{branch}/moving_mean", channels, initializer="zeros", **averaged
            )
            self.moving_variances[branch] = self.add_weight(
                f"{branch}/moving_variance", channels, initializer="ones", **averaged
            )
        super().build(input_shape)

    def call(
        self,
        inputs: tf.Tensor,
        branch: str | Turn = MAIN,
        mode: str = "batch",
        update_statistics: bool | tf.Tensor = False,
        synchronize: bool = True,
    ) -> tf.Tensor:
        """Normalises `inputs`.

        Args:
          inputs: float tensor [rows, height, width, channels].
          branch: which γ, β and moving statistics to use.
          mode: "batch" normalises with this batch's statistics, "moving" with the moving averages.
          update_statistics: whether the moving averages learn this batch's statistics ("batch" only); a bool tensor
            decides it when the program runs. A Turn's "main" always learns.
          synchronize: False keeps the statistics local whatever `replicas_per_group` says: the attack
            never talks to another replica.

        Raises:
          ConfigError: for a branch or mode there is not.
        """
        self._check(branch, mode)
        if mode == "moving":
            scale, shift = self.moving_affine(branch)
            return tf.cast(tf.cast(inputs, tf.float32) * scale + shift, inputs.dtype)
        gamma, beta = self.gamma_and_beta(branch)
        together = self._together(synchronize)
        if together > 1:
            outputs, mean, variance = self._group_batch(inputs, gamma, beta)
        else:
            outputs, mean, variance = self._local_batch(inputs, gamma, beta, self._shift(branch))
        if not self.corrected:
            count = _places(inputs) * together
            variance *= (count - 1.0) / count
        self.learn(mean, variance, branch, update_statistics)
        return outputs

    def gamma_and_beta(self, branch: str | Turn) -> tuple[tf.Variable | tf.Tensor, tf.Variable | tf.Tensor]:
        """γ and β of a branch, float32 [channels].

        Raises:
          ConfigError: for a branch there is not.
        """
        self._check(branch, "batch")
        return _chosen(self.gammas, branch), _chosen(self.betas, branch)

    def learn(self, mean: tf.Tensor, variance: tf.Tensor, branch: str | Turn, learns: bool | tf.Tensor) -> None:
        """Moves the moving averages of a branch towards a batch's statistics, float32 [channels], if it `learns`."""
        if learns is not False:
            self._learn(self.moving_means, mean, branch, learns)
            self._learn(self.moving_variances, variance, branch, learns)

    def measure(self, values: tf.Tensor, sign: tf.Tensor, call: dict) -> tuple[tf.Tensor, tf.Tensor]:
        """Mean and variance of a batch, float32 [channels], for a layer that normalises by itself; gradients flow back.

        Args:
          values: [rows, height, width, channels], `sign` times what the layer normalises.
          sign: 1 or −1, float32 [channels]. The moving averages learn the statistics of what is normalised.
          call: the arguments of a call in mode "batch".
        """
        together, shift = self._together(call["synchronize"]), self._shift(call["branch"])
        own_shift = None if shift is None else sign * shift
        mean, variance = _moments(tf.cast(values, tf.float32), together, own_shift)
        self.learn(sign * mean, variance * _bessel(values, together), call["branch"], call["update_statistics"])
        return mean, variance

    def moving_affine(self, branch: str | Turn) -> tuple[tf.Tensor, tf.Tensor]:
        """The affine map that mode "moving" applies to each channel: (scale, shift), float32 [channels].

        Raises:
          ConfigError: for a branch there is not.
        """
        self._check(branch, "moving")
        names = (self.gammas, self.betas, self.moving_means, self.moving_variances)
        gamma, beta, mean, variance = (_chosen(variables, branch) for variables in names)
        scale = gamma * tf.math.rsqrt(variance + self.epsilon)
        return scale, beta - mean * scale

    def is_local(self, call: dict) -> bool:
        """Tells whether a call with these arguments normalises with the statistics of its own batch alone."""
        return call["mode"] == "batch" and self._together(call["synchronize"]) == 1

    def _together(self, synchronize: bool) -> int:
        """The number of replicas that share statistics."""
        return self.replicas_per_group if synchronize else 1

    def _check(self, branch: str | Turn, mode: str) -> None:
        names = {MAIN, ADVERSARIAL} if isinstance(branch, Turn) else {branch}
        if not names.issubset(self.branches):
            raise ConfigError(f"branch={branch!r}: this layer has the branches {self.branches}; build it with that one")
        if mode not in MODES:
            raise ConfigError(f"mode={mode!r}: batch normalisation knows {MODES}; choose one of them")

    def _shift(self, branch: str | Turn) -> tf.Tensor | None:
        """What is subtracted ahead of the statistics, float32 [channels]; None outside XLA, which alone needs it."""
        # The mean of a part of the values would be nearer at first, and costs a TPU a pass over them.
        return tf.stop_gradient(_chosen(self.moving_means, branch)) if xla.is_compiling() else None

    def _local_batch(self, inputs, gamma, beta, shift):
        """Statistics over the batch of this replica."""
        values = inputs if shift is None else tf.cast(inputs, tf.float32) - shift
        outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=values, scale=gamma, offset=beta, mean=[], variance=[], epsilon=self.epsilon, is_training=True
        )
        return tf.cast(outputs, inputs.dtype), mean if shift is None else mean + shift, variance

    def _group_batch(self, inputs, gamma, beta):
        """Statistics over the group of replicas; same definitions as the fused local kernel."""
        values = tf.cast(inputs, tf.float32)
        mean, variance = _moments(values, self.replicas_per_group, None)
        outputs = (values - mean) * (tf.math.rsqrt(variance + self.epsilon) * gamma) + beta
        return tf.cast(outputs, inputs.dtype), mean, variance * _bessel(inputs, self.replicas_per_group)

    def _learn(self, moving: dict[str, tf.Variable], statistic: tf.Tensor, branch: str | Turn, learns) -> None:
        if isinstance(branch, Turn):
            # Half of the places have either turn: what they measure counts twice in the mean over all places.
            twice = 2.0 * statistic
            other = moving[ADVERSARIAL]
            self._record(moving[MAIN], tf.where(branch.clean, twice, 0.0))
            self._record(other, tf.where(branch.clean, 0.0, tf.where(learns, twice, 2.0 * other)))
        else:
            own = moving[branch]
            self._record(own, statistic if learns is True else tf.where(learns, statistic, own))

    def _record(self, moving: tf.Variable, statistic: tf.Tensor) -> None:
        statistics = _deferred.get()
        statistic = tf.stop_gradient(statistic)
        if statistics is None:
            moving.assign(moving_average(moving, statistic, self.momentum))
        else:
            statistics.append((moving, statistic))

    def get_config(self) -> dict:
        names = ("branches", "momentum", "epsilon", "gamma_initializer", "replicas_per_group", "scale", "center")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


def _places(inputs: tf.Tensor) -> tf.Tensor:
    """The number of values of a channel of [rows, height, width, channels], float32 scalar."""
    return tf.cast(tf.reduce_prod(tf.shape(inputs)[:3]), tf.float32)


def _bessel(inputs: tf.Tensor, together: int) -> tf.Tensor:
    """What makes the variance of a sample that of tf_keras' fused layer, float32 scalar."""
    count = _places(inputs) * together
    return count / tf.maximum(count - 1.0, 1.0)


def _moments(values: tf.Tensor, together: int, shift: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and variance of float32 values over so many replicas, float32 [channels].

    Shifted values are read once where they are a replica's own; a compiler fuses that with what computes them.
    """
    if together == 1 and shift is not None:
        shifted = values - shift
        mean = tf.reduce_mean(shifted, [0, 1, 2])
        variance = tf.reduce_mean(tf.square(shifted), [0, 1, 2]) - tf.square(mean)
        return mean + shift, tf.maximum(variance, 0.0)
    # Two exchanges: E[x²] − E[x]² in one would cancel where the mean is large, even below −epsilon.
    mean = group_mean(tf.reduce_mean(values, [0, 1, 2]), together)
    return mean, group_mean(tf.reduce_mean(tf.square(values - mean), [0, 1, 2]), together)


def _chosen(variables: dict[str, tf.Variable], branch: str | Turn) -> tf.Variable | tf.Tensor:
    if isinstance(branch, Turn):
        return tf.where(branch.clean, read(variables[MAIN]), read(variables[ADVERSARIAL]))
    return read(variables[branch])


def group_mean(value: tf.Tensor, replicas_per_group: int) -> tf.Tensor:
    """The mean of `value` (float32, any static shape) over groups of neighbouring replicas; differentiable.

    Replicas [0, g) form the first group, [g, 2g) the second, and so on; g must divide their number
    (`plan.py` checks). On a TPU this is one grouped all-reduce; elsewhere tf.distribute reduces over all
    replicas only, so every group fills its own row of a matrix and reads that row back.
    """
    context = tf.distribute.get_replica_context()
    if replicas_per_group == 1 or context is None or context.num_replicas_in_sync == 1:
        return value
    replicas = context.num_replicas_in_sync
    if isinstance(context.strategy, tf.distribute.TPUStrategy):
        groups = [list(range(i, i + replicas_per_group)) for i in range(0, replicas, replicas_per_group)]
        return tf.raw_ops.CrossReplicaSum(input=value, group_assignment=groups) / replicas_per_group
    own = tf.one_hot(context.replica_id_in_sync_group // replicas_per_group, replicas // replicas_per_group)
    rows = tf.tensordot(own, value, axes=0)
    return tf.tensordot(own, context.all_reduce(tf.distribute.ReduceOp.SUM, rows), axes=1) / replicas_per_group
