"""The Keras model that trains a network by a method: compile, fit, evaluate, logs.

The loop reads like tf_keras' own: `fit` calls the function of `make_train_function`, which makes `steps_per_execution`
updates without returning to Python. What one update does inside a replica is in update.py, its mathematics in
methods/schedules.py.
"""

import functools
import math
from collections.abc import Callable

import tensorflow as tf
import tf_keras

from conadv_tf import methods
from conadv_tf.errors import ConfigError
from conadv_tf.methods import passes
from conadv_tf.models.network import Network
from conadv_tf.models.split_batchnorm import MAIN
from conadv_tf.training import collectives, metrics, refusals
from conadv_tf.training.checked_model import CheckedModel
from conadv_tf.training.given import Checks
from conadv_tf.training.losses import SmoothedCrossEntropy
from conadv_tf.training.plan import check_mixing, check_turns, mixing_stride
from conadv_tf.training.replica_state import Accumulators, CarryVariables
from conadv_tf.training.savable_model import SavableModel
from conadv_tf.training.shadows import shadow_copy
from conadv_tf.training.update import ReplicaUpdate


class ConAdvModel(CheckedModel, SavableModel):
    """Trains `network` by `method` under `compile` and `fit`, on any strategy.

    Build it, like the optimizer, inside `strategy.scope()`. Data are batches (images, labels): images
    [rows, H, W, C] in [0, 255] of any numeric dtype, or [rows, 2, H, W, C] with an augmented image beside each clean
    one (for methods whose `Mixture` is augmented); labels int [rows]. With `microbatches` > 1 every update
    takes that many batches from the iterator, and `steps_per_epoch` counts updates. given.py looks at all of it.

    Logs of training: the method's metrics and metrics.MONITORS, means over the epoch's updates so far (drift is
    ‖θ_t − θ_{t−τ}‖ / ‖θ_t‖), and `input_wait_seconds`, which the last call spent waiting for data. Logs of
    evaluation: loss, top1, top5; a third element of the data weighs the images.

    An update with a loss, gradient or batch statistic that is not finite shows in the logs and, like all after it in
    the same epoch, is not applied: weights, moving averages, shadow copies, slots and the count of updates stay
    (run/divergence.py).

    Args:
      network: a Network, such as a ResNet, with the method's branches.
      method: see methods/method.py.
      microbatches: batches accumulated into one update, on each replica (docs/method.md, virtual pod).
      seed: seed of the attack's random starts.
      all_reduce_dtype: dtype of gradients on their way between replicas, "float32" or "bfloat16"; BN statistics and
        metrics stay float32.

    Attributes:
      shadows: the network at θ_{t−τ}, …, θ_{t−1}, the oldest first, in non-trainable variables.
      carry: the variables that hold what the method carries between updates; none before training begins.

    Raises:
      ConfigError: if the network lacks a branch or has a precision that training has not, or microbatches < 1.
    """

    def __init__(
        self,
        network: Network,
        method: methods.Method,
        microbatches: int = 1,
        seed: int = 0,
        all_reduce_dtype: str = "float32",
        **kwargs,
    ):
        refusals.check_kinds(network, method)
        refusals.check_network(network, method, microbatches)
        refusals.check_precision(network)
        # Not the global policy, which would round pixels on their way to the network; that has a policy of its own.
        super().__init__(**{"dtype": "float32", **kwargs})
        self.network = network.create_variables()
        refusals.check_created("the network", self.network.leaf_variables(), self.made_in, own=True)
        self.network.settle()
        refusals.check_parts(self.network)
        self._trained = network.trained()
        self.method = method
        self.microbatches = int(microbatches)
        self.seed = seed
        self.all_reduce_dtype = tf.as_dtype(all_reduce_dtype)
        self.shadows = [shadow_copy(network, number) for number in range(method.tau)]
        self.carry = CarryVariables({}, microbatches)
        self.train_function: Callable | None = None
        self.test_function: Callable | None = None
        self._active = method
        self._resumed_at: int | None = None
        self._test_means = {name: metrics.EvaluationMean(name) for name in ("loss", "top1", "top5")}
        ratios = metrics.num_ratios(network.trainable_variables)
        self._train_means = metrics.TrainingMeans(len(self.log_names), ratios)
        self.built = True  # for Keras, which would wait for a call: all variables are there
        if isinstance(self.distribute_strategy, tf.distribute.MirroredStrategy):
            collectives.keep_apart()  # a notebook may go on with other devices

    # Keras' interface

    def call(self, images: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Logits of the main branch; float32 [rows, classes]."""
        filled = collectives.with_a_row(images, self.distribute_strategy)
        logits = self.network(filled, training=training, branch=MAIN)
        return logits if filled is images else logits[: tf.shape(images)[0]]

    def compile(self, optimizer="rmsprop", loss=None, **kwargs) -> None:
        """Compiles as Keras does. The loss, SmoothedCrossEntropy() unless given, sees (labels, logits). No metrics."""
        unusable = {name: kwargs.get(name) for name in ("metrics", "weighted_metrics")}
        refusals.check_compiled(optimizer, loss, unusable, self.made_in)
        super().compile(optimizer=optimizer, loss=loss or SmoothedCrossEntropy(), **kwargs)

    def get_config(self) -> dict:
        network = tf_keras.saving.serialize_keras_object(self.network)
        settings = {name: getattr(self, name) for name in ("microbatches", "seed", "name")}
        method = self.method.get_config()
        return {"network": network, "method": method, "all_reduce_dtype": self.all_reduce_dtype.name, **settings}

    @classmethod
    def from_config(cls, config: dict, custom_objects: dict | None = None) -> "ConAdvModel":
        network = tf_keras.saving.deserialize_keras_object(config["network"], custom_objects)
        return cls(**{**config, "network": network, "method": methods.Method.from_config(config["method"])})

    def data_checks(self, labelled: bool = True) -> Checks:
        classes = self.network.num_classes if labelled else None
        return Checks(
            self.network.image_shape, classes, isinstance(self.distribute_strategy, tf.distribute.TPUStrategy)
        )

    def fit(self, x=None, y=None, batch_size=None, epochs=1, verbose="auto", callbacks=None, *args, **kwargs):
        """Trains as Keras does; the epoch decides whether adversarial examples have begun (`Mixture.start_epoch`)."""
        if kwargs.get("steps_per_epoch") is None:
            remedy = "pass steps_per_epoch, the updates of an epoch, and data.repeat()"
            refusals.check_one_batch("fit(steps_per_epoch=None)", self.method, self.microbatches, remedy)
        refusals.check_still_trained(self.network, self._trained)
        refusals.check_rate(getattr(self, "optimizer", None), callbacks)
        given = tf.nest.flatten(callbacks or [])
        start = tf_keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: self._begin_epoch(epoch))
        callbacks = [start, *given, *self._bars(given)]
        return super().fit(x, y, batch_size, epochs, verbose, callbacks, *args, **kwargs)

    def train_on_batch(self, *args, **kwargs):
        remedy = "use fit(data.repeat(), steps_per_epoch=N)"
        refusals.check_one_batch("train_on_batch", self.method, self.microbatches, remedy)
        # The program of an earlier call trains what was trained then.
        refusals.check_still_trained(self.network, self._trained)
        return super().train_on_batch(*args, **kwargs)

    def _bars(self, callbacks: list) -> list[tf_keras.callbacks.Callback]:
        """Keras' progress bar, unless it is given: logs are means already, of which Keras' own would show the mean."""
        if any(isinstance(callback, tf_keras.callbacks.ProgbarLogger) for callback in callbacks):
            return []
        return [tf_keras.callbacks.ProgbarLogger("steps", [*self.log_names, "input_wait_seconds"])]

    @property
    def metrics(self) -> list[tf_keras.metrics.Metric]:
        return [self._train_means, *self._test_means.values()]

    def make_train_function(self, force: bool = False):
        """One call makes `steps_per_execution` updates without returning to Python."""
        if self.train_function is None or force:
            programs: dict[str, Callable] = {}

            def train(iterator):
                name = self._active.name
                if name not in programs or not self._has_carry(self._active, iterator):
                    programs[name] = self._program(self._active, iterator)
                return programs[name](iterator)

            self.train_function = train
        return self.train_function

    def make_test_function(self, force: bool = False):
        """One call evaluates `steps_per_execution` batches of every replica."""
        if self.test_function is None or force:

            def evaluate(iterator) -> dict[str, tf.Tensor]:
                def one_batch() -> tf.Tensor:
                    self.distribute_strategy.run(self.test_step, args=(next(iterator),))
                    return tf.constant(0.0, tf.float64)

                self._repeat(one_batch)
                return {name: mean.result() for name, mean in self._test_means.items()}

            self.test_function = evaluate if self.run_eagerly else tf.function(evaluate, autograph=False)
        return self.test_function

    def train_step(self, data, microbatch: tf.Tensor | int = 0) -> None:
        """One update from one batch per replica; run on every replica. `microbatch` counts an update's batches.

        Returns no logs, unlike Keras' own: they are read once, after the step, across replicas. A replica that read
        them would start a collective of its own (several workers even summed them twice).
        """
        update = self.update_by(self._active)
        update.apply(update.contribute(data, tf.convert_to_tensor(microbatch)))

    def test_step(self, data) -> None:
        """Adds one batch to the evaluation; rows of weight 0 count nothing. Logs as in `train_step`."""
        images, labels, weights = tf_keras.utils.unpack_x_y_sample_weight(data)
        labels = tf.reshape(tf.cast(labels, tf.int32), [-1])
        if weights is not None:  # padding may have any label, which must not make its loss NaN: 0 · NaN is NaN
            labels = tf.where(tf.cast(tf.reshape(weights, [-1]), tf.bool), labels, 0)
        logits = self.call(images)
        self._test_means["loss"].update_state(self.example_losses(labels, logits), weights)
        self._test_means["top1"].update_state(metrics.top(1, labels, logits), weights)
        self._test_means["top5"].update_state(metrics.top(5, labels, logits), weights)

    # The program of a training call

    def _begin_epoch(self, epoch: int) -> None:
        self._active = self.method if epoch >= self.method.start_epoch else methods.vanilla()

    def _program(self, method: methods.Method, iterator) -> Callable:
        """The program of `steps_per_execution` updates by a method; makes the variables and the carry that it needs."""
        refusals.check_still_trained(self.network, self._trained)
        places = method.updates_per_batch, self.distribute_strategy.num_replicas_in_sync, self.microbatches
        check_turns(*places)
        if method.mixed:
            check_mixing(*places)
        self.create_optimizer_variables()
        if not self._has_carry(method, iterator):
            self._begin_carry(method, iterator)
        update = self.update_by(method)
        with self.distribute_strategy.scope():
            sums = Accumulators(update.contribution_shapes if self.microbatches > 1 else [])

        def accumulate(data, microbatch: tf.Tensor) -> None:
            sums.add(update.contribute(data, microbatch))

        def one_update(iterator) -> tf.Tensor:
            self._train_counter.assign_add(1)
            if self.microbatches == 1:
                return self._on_batches(update, self.train_step, iterator)
            self.distribute_strategy.run(sums.clear)
            waited = self._on_batches(update, accumulate, iterator)
            self.distribute_strategy.run(lambda: update.apply(sums.sums()))
            return waited

        def execute(iterator) -> dict[str, tf.Tensor]:
            waited = self._repeat(lambda: one_update(iterator))
            return {**self.train_logs(), "input_wait_seconds": waited}

        return execute if self.run_eagerly else tf.function(execute, autograph=False)

    def _has_carry(self, method: methods.Method, iterator) -> bool:
        """Tells whether there is what the method carries, if anything, and of batches like these."""
        return not method.carries or self.carry.specs == self.method.carried(_images(iterator))

    def _begin_carry(self, method: methods.Method, iterator) -> None:
        """Makes the variables of the carry, and the carry that a run begins or goes on with."""
        self.create_carry(_images(iterator))
        if method.batches_ahead or self._resumed_at or self.updates_made() % method.updates_per_batch:
            program = functools.partial(self._each_microbatch, self.update_by(method).begin)
            (program if self.run_eagerly else tf.function(program, autograph=False))(iterator)

    def _repeat(self, once: Callable[[], tf.Tensor]) -> tf.Tensor:
        """Calls `once` `steps_per_execution` times; returns the sum of the seconds, float64, that it returns."""
        return collectives.summed(tf.cast(self._steps_per_execution, tf.int64), lambda _: once())

    def _each_microbatch(self, replica_function: Callable, iterator) -> tf.Tensor:
        """Runs a function on every replica with (data, index) of each micro-batch; returns the seconds waited for data.

        Without an iterator the data are None.
        """

        def once(index: tf.Tensor) -> tf.Tensor:
            data, waited = collectives.timed_next(iterator) if iterator else (None, tf.constant(0.0, tf.float64))
            self.distribute_strategy.run(replica_function, args=(data, index))
            return waited

        return (
            once(tf.constant(0)) if self.microbatches == 1 else collectives.summed(tf.constant(self.microbatches), once)
        )

    def _on_batches(self, update: ReplicaUpdate, replica_function: Callable, iterator) -> tf.Tensor:
        """Does what `_each_microbatch` does; where a batch lasts for several updates, on the one in the carry."""
        updates_per_batch = update.method.updates_per_batch
        if updates_per_batch == 1:
            return self._each_microbatch(replica_function, iterator)
        due = tf.equal(self.optimizer.iterations % updates_per_batch, 0)
        nothing = tf.constant(0.0, tf.float64)
        waited = tf.cond(due, lambda: self._each_microbatch(update.keep, iterator), lambda: nothing)
        self._each_microbatch(replica_function, None)
        return waited

    # What update.py, checkpoints and reports ask of the model

    def update_by(self, method: methods.Method) -> ReplicaUpdate:
        """One update by a method, which this model was made for or `vanilla`; after `compile`."""
        on_tpu = isinstance(self.distribute_strategy, tf.distribute.TPUStrategy)
        return ReplicaUpdate(
            method=method,
            whole=self.method,
            network=self.network,
            shadows=self.shadows,
            optimizer=self.optimizer,
            loss=self.example_losses,
            carry=self.carry,
            means=self._train_means,
            microbatches=self.microbatches,
            seed=self.seed,
            all_reduce_dtype=self.all_reduce_dtype,
            jit=bool(self._jit_compile) and not on_tpu,
            compiled=bool(self._jit_compile) or on_tpu,
        )

    def create_carry(self, images: tf.TensorSpec) -> None:
        """Variables for what the method carries between updates; `images`: of one replica's micro-batch, as fed."""
        with self.distribute_strategy.scope():
            stride = mixing_stride(self.method.updates_per_batch, self.distribute_strategy.num_replicas_in_sync)
            self.carry = CarryVariables(self.method.carried(images), self.microbatches, self.method.mixed, stride)

    def create_optimizer_variables(self) -> None:
        """Creates the slots before the first step: a traced step must not, and a checkpoint restores into them."""
        with self.distribute_strategy.scope():
            if isinstance(self.optimizer, tf_keras.optimizers.legacy.Optimizer):
                self.optimizer._create_all_weights(self.network.trainable_variables)
            else:
                self.optimizer.build(self.network.trainable_variables)

    def resume_at(self, update: int) -> None:
        """Says that training goes on at this update (counted from `Method.start_epoch`) of a run.

        The data must then begin as `Method.batches_before` says; without this call training begins with the next batch,
        and a carry starts empty as at the start of a run.
        """
        self._resumed_at = update

    def restart(self) -> None:
        """Forgets programs and carry: training goes on from other weights, or by another learning rate."""
        self.train_function = None
        self.carry = CarryVariables({}, self.microbatches)
        self._resumed_at = None

    def updates_made(self) -> int:
        """Updates since the first initialisation, checkpoints included."""
        return int(self.optimizer.iterations.numpy())

    @property
    def log_names(self) -> tuple[str, ...]:
        """The names of what an update logs, in the order in which the training metric holds them."""
        return self.method.metric_names + metrics.MONITORS

    def train_logs(self) -> dict[str, tf.Tensor]:
        """The means of the epoch so far by name, float32 scalars."""
        means = tf.unstack(self._train_means.result(), len(self.log_names))
        return dict(zip(self.log_names, means, strict=True))

    def example_losses(self, labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
        """The training loss of each row, float32 [rows], for labels int32 [rows] and logits float32 [rows, classes].

        NaN for a label out of range, of which the losses themselves make 0, an error or NaN, by device and compiler.
        """
        function = self.loss.call if isinstance(self.loss, tf_keras.losses.Loss) else self.loss
        known = (labels >= 0) & (labels < logits.shape[-1])
        return tf.where(known, function(tf.where(known, labels, 0), logits), math.nan)

    def adversarial_examples(self, images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        """x̂ of `images` and `labels` from the weights that the next update attacks; float32, of the images' shape.

        Those of `noise` are the images with noise.

        Raises:
          ConfigError: for a method without an attack.
          DataError: for images or labels that `fit` would refuse.
        """
        if not tf.is_symbolic_tensor(images):
            self.data_checks().arrays(images, labels)
        batch = methods.Batch(tf.cast(images, tf.float32), tf.cast(labels, tf.int32), tf.constant([self.seed, 1]))
        return self._perturbed(batch)

    @functools.cached_property
    def _perturbed(self) -> Callable:
        """x̂ of a Batch, compiled once."""
        attack = self.method.attack
        if attack is None:
            raise ConfigError(f"method {self.method.name!r} makes no adversarial examples: use disadv or conadv")
        perturbed = self.method.record.perturbed or passes.attack_images
        return self.inspection(lambda _, stale, loss, batch: perturbed(attack, stale, loss, batch))

    def inspection(self, function: Callable) -> Callable:
        """A program: `function`(network at θ_t, network at θ_{t−τ}, loss, *arguments), which must assign nothing.

        Every replica has the same arguments (tensors, or structures of them); the result is the first one's.
        """
        strategy = self.distribute_strategy
        stale = self.shadows[0] if self.shadows else self.network
        inspect = functools.partial(function, self.network, stale, self.example_losses)

        def program(*arguments):
            results = strategy.run(inspect, args=arguments)
            return tf.nest.map_structure(lambda value: strategy.experimental_local_results(value)[0], results)

        return tf.function(program, autograph=False)


def _images(iterator) -> tf.TensorSpec:
    """The spec of the images that an iterator has for one replica."""
    return tf.nest.flatten(iterator.element_spec, expand_composites=True)[0]
