"""One update inside a replica (docs/method.md).

    contribute   a micro-batch → its share of the update: gradients, batch statistics, metrics; its carry moves on
    apply        the shares, summed over micro-batches → one all-reduce over the replicas, then
                 shadow ring θ_{t−τ} ← θ_{t−τ+1} ← … ← θ_t; moving statistics; optimizer: θ_{t+1}
    begin        a micro-batch → the carry that a run begins or goes on with

trainer.py calls these on every replica. Nothing here talks to the host, and every shape is static.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import tensorflow as tf
import tf_keras

from conadv_tf.errors import ConfigError
from conadv_tf.methods.interface import Batch, Carry, Loss
from conadv_tf.methods.method import Method
from conadv_tf.models import randomness, xla
from conadv_tf.models.network import Network
from conadv_tf.models.split_batchnorm import deferred_statistics, moving_average
from conadv_tf.training import collectives, metrics, optimizers
from conadv_tf.training.replica_state import CarryVariables


@dataclasses.dataclass(frozen=True)
class ReplicaUpdate:
    """One update by a method, of everything that training changes.

    Attributes:
      method: the method.
      whole: the method of the whole run, which the data are made for and `means` has room for: `method`, or what
        follows it where that is `vanilla`, before `Mixture.start_epoch`. Metrics that `method` lacks stay at 0.
      network: the network at θ_t.
      shadows: its copies at θ_{t−τ}, …, θ_{t−1}, the oldest first; none without a delay.
      optimizer: a tf_keras optimizer.
      loss: the training loss.
      carry: the variables that hold what the method carries between updates.
      means: the means of the epoch.
      microbatches: batches accumulated into one update, on each replica.
      seed: seed of the attack's random starts.
      all_reduce_dtype: dtype of gradients on their way between replicas.
      jit: whether XLA compiles the work on a micro-batch on its own, as off a TPU with `jit_compile`.
      compiled: whether XLA compiles it at all.
    """

    method: Method
    whole: Method
    network: Network
    shadows: Sequence[Network]
    optimizer: tf_keras.optimizers.Optimizer
    loss: Loss
    carry: CarryVariables
    means: metrics.TrainingMeans
    microbatches: int
    seed: int
    all_reduce_dtype: tf.DType
    jit: bool
    compiled: bool

    @property
    def stale(self) -> Network:
        """The network at θ_{t−τ}."""
        return self.shadows[0] if self.shadows else self.network

    @property
    def contribution_shapes(self) -> list:
        """The shapes of what `contribute` returns, all float32."""
        variables = self.network.trainable_variables + self.network.moving_statistics(self.method.branches)
        return [variable.shape for variable in variables] + [(len(self.method.metric_names),)]

    def contribute(self, data, microbatch: tf.Tensor) -> list[tf.Tensor]:
        """One micro-batch's share of the update; what it carries moves on.

        Args:
          data: (images, labels); None for those that the carry keeps.
          microbatch: int32 scalar, its index.

        Returns:
          Gradients, BN statistics and metrics, over the number of micro-batches and replicas: their sum over all is the
          mean of each.
        """
        update = self.optimizer.iterations
        carry = self.carry.read(microbatch, update)
        data = data or (carry["images"], carry["labels"])
        share, carry = self._by_xla(self._share)(data, microbatch, carry)
        self.carry.write(microbatch, update, carry)
        return share

    def begin(self, data, microbatch: tf.Tensor) -> None:
        """Makes the first carry from a micro-batch."""
        begin = self.method.begin
        if begin is None:
            return

        def carry(data, microbatch: tf.Tensor) -> Carry:
            batch = self._batch(data, microbatch, self.method.batches_ahead - 1)
            with randomness.of_microbatch(batch.seed):
                return begin(self.stale, self.loss, batch)

        self.carry.write(microbatch, self.optimizer.iterations - 1, self._by_xla(carry)(data, microbatch))

    def keep(self, data, microbatch: tf.Tensor) -> None:
        """Keeps a batch that lasts for several updates in the carry."""
        images, labels = data
        batch = {"images": images, "labels": tf.reshape(labels, [-1])}
        self.carry.write(microbatch, self.optimizer.iterations, batch)

    def apply(self, shares: list[tf.Tensor]) -> None:
        """Averages the shares over replicas and updates everything that changes.

        An update with a value that is not finite, and every one after it in its epoch, changes nothing but `means`.
        """
        replica = tf.distribute.get_replica_context()
        variables = self.network.trainable_variables
        gradients, statistics, values = self._averages(shares)
        ratios = metrics.trust_ratios(self.optimizer, variables, gradients)
        finite = self.means.record(self._logs(values, gradients, statistics, ratios), ratios)
        replica.merge_call(self._push_weights, args=(finite,))
        replica.merge_call(self._assign_statistics, args=(finite, statistics))
        optimizers.apply_if(self.optimizer, finite, gradients, variables)

    def _by_xla(self, function: Callable) -> Callable:
        """A function like the one given, compiled by XLA where training is."""
        if self.jit:
            function = tf.function(function, jit_compile=True, autograph=False)

        def call(*arguments):
            with xla.compiling(xla.is_compiling() or self.compiled):
                return function(*arguments)

        return call

    def _share(self, data, microbatch: tf.Tensor, carry: Carry) -> tuple[list[tf.Tensor], Carry]:
        batch = self._batch(data, microbatch, self.method.batches_ahead)
        with deferred_statistics() as statistics, randomness.of_microbatch(batch.seed):
            update = self.method.gradients(self.network, self.stale, self.loss, batch, carry)
        by_variable = {variable.ref(): value for variable, value in statistics}
        moving = [by_variable[variable.ref()] for variable in self.network.moving_statistics(self.method.branches)]
        values = [tf.stack([update.metrics[name] for name in self.method.metric_names])]
        share = 1.0 / (self.microbatches * tf.distribute.get_replica_context().num_replicas_in_sync)
        gradients = self._penalized(update.gradients)
        return [share * tf.cast(value, tf.float32) for value in gradients + moving + values], update.carry

    def _penalized(self, gradients: list[tf.Tensor]) -> list[tf.Tensor]:
        """The gradients with those of the network's own regularizers, as Keras adds them to the loss."""
        variables = self.network.trainable_variables
        with tf.GradientTape() as tape:
            penalty = self.network.penalty()
        if penalty is None:
            return gradients
        own = tape.gradient(penalty, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return [gradient + more for gradient, more in zip(gradients, own, strict=True)]

    def _batch(self, data, microbatch: tf.Tensor, ahead: int) -> Batch:
        """A replica's micro-batch of the update that is `ahead` of the present one."""
        images, labels = self._checked(data)
        replica = tf.distribute.get_replica_context()
        clean, augmented = (images[:, 0], images[:, 1]) if images.shape.rank == 5 else (images, None)
        # Does not depend on how the global batch is split into replicas and micro-batches.
        place = microbatch * replica.num_replicas_in_sync + tf.cast(replica.replica_id_in_sync_group, tf.int32)
        update = tf.cast(self.optimizer.iterations, tf.int32)
        seed = xla.fold_in(xla.fold_in([self.seed, 0], update + ahead), place)
        return Batch(clean, labels, seed, augmented, tf.equal((update + place) % 2, 0))

    def _checked(self, data) -> tuple[tf.Tensor, tf.Tensor]:
        """Images float32 and labels int32 [rows]. Raises ConfigError for data that the method cannot train on."""
        images, labels, weights = tf_keras.utils.unpack_x_y_sample_weight(data)
        if weights is not None:
            raise ConfigError(
                "sample_weight or class_weight in training: every image counts the same here: leave the weights out, "
                "and repeat the images that are to count more"
            )
        images, labels = tf.cast(images, tf.float32), tf.reshape(tf.cast(labels, tf.int32), [-1])
        replicas = tf.distribute.get_replica_context().num_replicas_in_sync
        if images.shape[0] is None and replicas > 1:
            # Keras would deal a last, smaller batch out unevenly, and a replica without rows has no mean.
            raise ConfigError(
                f"{replicas} replicas need batches of one fixed size that divides over them: data.batch(rows, "
                f"drop_remainder=True), with rows a multiple of {replicas}"
            )
        two = images.shape.rank == 5
        if two != ("augmented" in self.whole.images):
            raise ConfigError(
                f"the training images are {images.shape}: method {self.whole.name!r} was made for "
                f"{'one image' if two else 'a clean and an augmented image'} an example (`Mixture.augmented`)"
            )
        return images, labels

    def _averages(self, shares: list[tf.Tensor]) -> tuple[list[tf.Tensor], list[tf.Tensor], tf.Tensor]:
        """Gradients, BN statistics and metrics, float32, averaged over the replicas in one all-reduce a dtype."""
        count = len(self.network.trainable_variables)
        sent = [tf.cast(gradient, self.all_reduce_dtype) for gradient in shares[:count]]
        *averages, values = collectives.sum_over_replicas(sent + shares[count:])
        return [tf.cast(value, tf.float32) for value in averages[:count]], averages[count:], values

    def _logs(self, values: tf.Tensor, gradients, statistics, ratios) -> tf.Tensor:
        """The values that `means` records, float32: metrics, 0 for those the method lacks, and metrics.MONITORS."""
        absent = tf.zeros(len(self.whole.metric_names) - len(self.method.metric_names))
        drift = metrics.drift(self.network, self.stale)
        monitors = metrics.monitors(self.optimizer, gradients, statistics, ratios, drift)
        return tf.concat([values, absent, tf.stack(monitors)], 0)

    def _push_weights(self, strategy: tf.distribute.Strategy, finite) -> None:
        """Moves the ring of shadow copies one update on: the newest becomes θ_t. No communication."""
        ring = [network.leaf_variables() for network in (*self.shadows, self.network)]
        for older, newer in itertools.pairwise(ring):
            for shadow, weights in zip(older, newer, strict=True):
                strategy.extended.update(shadow, _assign_if, args=(finite, weights), group=False)

    def _assign_statistics(self, strategy: tf.distribute.Strategy, finite, statistics: list) -> None:
        branches = self.method.branches
        moving, momenta = self.network.moving_statistics(branches), self.network.moving_momenta(branches)
        for variable, value, momentum in zip(moving, statistics, momenta, strict=True):
            learn = functools.partial(_learn_if, momentum=momentum)
            strategy.extended.update(variable, learn, args=(finite, value), group=False)


def _assign_if(variable: tf.Variable, condition: tf.Tensor, value) -> tf.Tensor:
    return variable.assign(tf.where(condition, value, variable))


def _learn_if(moving: tf.Variable, condition: tf.Tensor, statistic, momentum: float) -> tf.Tensor:
    return _assign_if(moving, condition, moving_average(moving, statistic, momentum))
