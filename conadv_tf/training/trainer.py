"""The Keras model that trains a network by a method: train step, virtual pod, shadow copies, metrics.

One update (SPEC sections 1 and 5), all of it inside one tf.function:

    for each micro-batch, on each replica:  method.gradients → gradients, BN statistics, metrics, summed; the carry
    one all-reduce of that sum over the replicas
    shadow ring: θ_{t−τ} ← θ_{t−τ+1} ← … ← θ_t;  moving statistics;  optimizer: θ_{t+1}
"""

import functools
import itertools
from collections.abc import Callable, Sequence

import tensorflow as tf
import tf_keras

from conadv_tf import methods
from conadv_tf.errors import ConfigError
from conadv_tf.methods import schedules
from conadv_tf.models import xla
from conadv_tf.models.resnet import ResNet
from conadv_tf.models.split_batchnorm import AUGMENTED, MAIN, deferred_statistics, moving_average
from conadv_tf.training import metrics as training_metrics
from conadv_tf.training.collectives import sum_over_replicas, timed_next
from conadv_tf.training.lars import LARS, is_adapted
from conadv_tf.training.losses import SmoothedCrossEntropy
from conadv_tf.training.plan import check_turns
from conadv_tf.training.replica_state import Accumulators, CarryVariables
from conadv_tf.training.shadows import leaf_variables, shadow_copy


class ConAdvModel(tf_keras.Model):
    """Trains `network` by `method` under `compile` and `fit`, on any strategy.

    Build it, like the optimizer, inside `strategy.scope()`. Data are batches (images, labels): images
    [rows, H, W, C] in [0, 255] of any numeric dtype, or [rows, 2, H, W, C] with an augmented image beside each clean
    one (for methods made with `augmented`); labels int [rows]. With `microbatches` > 1 every update
    takes that many batches from the iterator, and `steps_per_epoch` counts updates.

    Logs of training: the method's metrics and MONITORS, means over the epoch's updates so far (drift is
    ‖θ_t − θ_{t−τ}‖ / ‖θ_t‖), and `input_wait_seconds`, which the last call spent waiting for data. Logs of
    evaluation: loss, top1, top5; a third element of the data weighs the images.

    An update with a loss, gradient or batch statistic that is not finite shows in the logs and, like all after it in
    the same epoch, is not applied: weights, moving averages, shadow copies, slots and the count of updates stay
    (divergence.py). Of optimizers other than those of lars.py slots and count go on, with gradients of 0.

    Args:
      network: a ResNet with the method's branches.
      method: see methods.py.
      microbatches: batches accumulated into one update, on each replica (SPEC section 5).
      seed: of the attack's random starts.
      all_reduce_dtype: of gradients on their way between replicas, "float32" or "bfloat16"; BN statistics and metrics
        stay float32.

    Raises:
      ConfigError: if the network lacks a branch, or microbatches < 1.
    """

    def __init__(
        self,
        network: ResNet,
        method: methods.Method,
        microbatches: int = 1,
        seed: int = 0,
        all_reduce_dtype: str = "float32",
        **kwargs,
    ):
        super().__init__(**kwargs)
        missing = [branch for branch in method.branches if branch not in network.branches]
        if missing:
            raise ConfigError(
                f"method {method.name!r} trains the BN branches {missing}, which the network lacks: "
                f"build it with branches={method.branches}"
            )
        if microbatches < 1:
            raise ConfigError(f"microbatches={microbatches} must be at least 1")
        if method.updates_per_batch > 1 and network.replicas_per_group > 1:
            raise ConfigError(
                f"conadv.schedule={method.schedule!r} gives neighbouring replicas different passes, which cannot share "
                f"batch statistics: use model.replicas_per_group=1, not {network.replicas_per_group}, or 'paired'"
            )
        self.network = network.create_variables()
        self.method = method
        self.microbatches = microbatches
        self.seed = seed
        self.all_reduce_dtype = tf.as_dtype(all_reduce_dtype)
        self.shadows = [shadow_copy(network) for _ in range(method.tau)]
        self.train_function: Callable | None = None
        self.test_function: Callable | None = None
        self._active = method
        self._carry = CarryVariables({}, microbatches)
        self._resumed_at: int | None = None
        self._test_means = {name: tf_keras.metrics.Mean(name) for name in ("loss", "top1", "top5")}
        adapted = sum(is_adapted(variable) for variable in network.trainable_variables)
        self._train_mean = training_metrics.TrainingMeans(len(self._log_names(method)), adapted)

    # Keras' interface

    def call(self, images: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Logits of the main branch; float32 [rows, classes]."""
        return self.network(images, training=training, branch=MAIN)

    def compile(self, optimizer="rmsprop", loss=None, **kwargs) -> None:
        """As in Keras; the loss is SmoothedCrossEntropy() unless given, and sees (labels, logits). No metrics."""
        unusable = {name: kwargs.get(name) for name in ("metrics", "weighted_metrics")}
        for name, value in {**unusable, "loss": loss if isinstance(loss, str) else None}.items():
            if value:
                raise ConfigError(f"compile({name}={value!r}): pass a loss object, no metrics; logs have loss, top1")
        super().compile(optimizer=optimizer, loss=loss or SmoothedCrossEntropy(), **kwargs)

    def fit(self, *args, callbacks: Sequence[tf_keras.callbacks.Callback] | None = None, **kwargs):
        """As in Keras; the epoch decides whether the adversarial half has begun (`Method.start_epoch`)."""
        ahead = self.method.batches_ahead or self.method.updates_per_batch > 1 or self.microbatches > 1
        if ahead and kwargs.get("steps_per_epoch") is None:
            raise ConfigError(
                "fit(steps_per_epoch=None): with 'lookahead', 'phased' and micro-batches an update is not one batch: "
                "pass steps_per_epoch, the updates of an epoch, and data.repeat()"
            )
        start = tf_keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: self._begin_epoch(epoch))
        return super().fit(*args, callbacks=[start, *(callbacks or [])], **kwargs)

    @property
    def metrics(self) -> list[tf_keras.metrics.Metric]:
        return [self._train_mean, *self._test_means.values()]

    def make_train_function(self, force: bool = False):
        """One call makes `steps_per_execution` updates without returning to Python."""
        if self.train_function is None or force:
            executions: dict[str, Callable] = {}

            def train(iterator):
                name = self._active.name
                if name not in executions:
                    executions[name] = self._compiled_execution(self._active, iterator)
                return executions[name](iterator)

            self.train_function = train
        return self.train_function

    def make_test_function(self, force: bool = False):
        """One call evaluates `steps_per_execution` batches of every replica."""
        if self.test_function is None or force:
            evaluation = self._evaluate_batches
            self.test_function = evaluation if self.run_eagerly else tf.function(evaluation, autograph=False)
        return self.test_function

    def train_step(self, data) -> None:
        """One update from one batch per replica; runs on every replica.

        Returns no logs, unlike Keras' own: they are read once, after the step, across replicas. A replica that read
        them would start a collective of its own (several workers even summed them twice).
        """
        self._apply(self._active, self._computed(self._active, data, tf.constant(0)))

    def test_step(self, data) -> None:
        """Adds one batch to the evaluation; rows of weight 0 count nothing. Logs as in `train_step`."""
        images, labels, weights = tf_keras.utils.unpack_x_y_sample_weight(data)
        labels = tf.reshape(tf.cast(labels, tf.int32), [-1])
        logits = self.network(images, training=False)
        top5 = tf.math.in_top_k(labels, logits, k=min(5, self.network.num_classes))
        correct = tf.equal(tf.argmax(logits, 1, output_type=tf.int32), labels)
        self._test_means["loss"].update_state(self._example_losses(labels, logits), weights)
        self._test_means["top1"].update_state(tf.cast(correct, tf.float32), weights)
        self._test_means["top5"].update_state(tf.cast(top5, tf.float32), weights)

    def _evaluate_batches(self, iterator) -> dict[str, tf.Tensor]:
        def body(step):
            self.distribute_strategy.run(self.test_step, args=(next(iterator),))
            return step + 1

        steps = tf.cast(self._steps_per_execution, tf.int64)
        tf.while_loop(lambda step: step < steps, body, (tf.constant(0, tf.int64),), parallel_iterations=1)
        return {name: mean.result() for name, mean in self._test_means.items()}

    # One update

    def _begin_epoch(self, epoch: int) -> None:
        self._active = self.method if epoch >= self.method.start_epoch else methods.vanilla()

    def _compiled_execution(self, method: methods.Method, iterator) -> Callable:
        """The program of a training call, and the variables it needs; begins the carry of the method."""
        check_turns(method.updates_per_batch, self.distribute_strategy.num_replicas_in_sync, self.microbatches)
        self.create_optimizer_variables()
        images, *_ = tf.nest.flatten(iterator.element_spec, expand_composites=True)
        with self.distribute_strategy.scope():
            accumulators = Accumulators(self._contribution_shapes(method)) if self.microbatches > 1 else None
        if method.carried and not self._carry.variables:
            self._begin_carry(method, images, iterator)
        execution = functools.partial(self._execute, method, accumulators)
        return execution if self.run_eagerly else tf.function(execution, autograph=False)

    def create_carry(self, images: tf.TensorSpec) -> None:
        """Variables for what the method carries between updates; `images`: of one replica's micro-batch, as fed."""
        if self.method.carried:
            with self.distribute_strategy.scope():
                self._carry = CarryVariables(self.method.carried(images), self.microbatches)

    def resume_at(self, update: int) -> None:
        """Says that training goes on at this update (counted from the start of the adversarial half) of a run.

        The data must then begin as `Method.batches_before` says; without this call it begins with the next batch, and
        a carry starts empty as at the start of a run.
        """
        self._resumed_at = update

    def restart(self) -> None:
        """Forgets programs and carry: training goes on from other weights, or by another learning rate."""
        self.train_function = None
        self._carry = CarryVariables({}, self.microbatches)
        self._resumed_at = None

    def _begin_carry(self, method: methods.Method, images: tf.TensorSpec, iterator) -> None:
        self.create_carry(images)
        if method.batches_ahead or self._resumed_at:
            program = functools.partial(self._each_microbatch, functools.partial(self._begin_microbatch, method))
            (program if self.run_eagerly else tf.function(program, autograph=False))(iterator)

    def _begin_microbatch(self, method: methods.Method, data, index: tf.Tensor) -> None:
        """Carries on what the method begins with from a micro-batch; runs in a replica."""
        make = method.begin
        if make is None:
            return

        def carry(data, index: tf.Tensor) -> schedules.Carry:
            return make(self._stale(), self._example_losses, self._batch(data, index, method.batches_ahead - 1))

        self._carry.write(index, self._compiled(carry)(data, index))

    def _each_microbatch(self, replica_function: Callable, iterator) -> tf.Tensor:
        """Runs it on every replica with (data, index) of each micro-batch; returns the seconds of waiting for data.

        Without an iterator the data are None.
        """

        def once(index):
            data, waited = timed_next(iterator) if iterator else (None, tf.constant(0.0, tf.float64))
            self.distribute_strategy.run(replica_function, args=(data, index))
            return waited

        def body(index, waited):
            return index + 1, waited + once(index)

        if self.microbatches == 1:
            return once(tf.constant(0))
        zero = (tf.constant(0), tf.constant(0.0, tf.float64))
        return tf.while_loop(lambda index, _: index < self.microbatches, body, zero, parallel_iterations=1)[1]

    def _execute(self, method: methods.Method, accumulators: Accumulators | None, iterator):
        def body(step, waited):
            return step + 1, waited + self._update(method, accumulators, iterator)

        steps = tf.cast(self._steps_per_execution, tf.int64)
        zero = (tf.constant(0, tf.int64), tf.constant(0.0, tf.float64))
        _, waited = tf.while_loop(lambda step, _: step < steps, body, zero, parallel_iterations=1)
        return {**self._train_logs(), "input_wait_seconds": waited}

    def _update(self, method: methods.Method, accumulators: Accumulators | None, iterator) -> tf.Tensor:
        """One update; returns the seconds spent waiting for its data."""
        strategy = self.distribute_strategy
        self._train_counter.assign_add(1)
        if accumulators is None:
            return self._on_batches(method, lambda data, index: self.train_step(data), iterator)

        def accumulate(data, index):
            accumulators.add(self._computed(method, data, index))

        strategy.run(accumulators.clear)
        waited = self._on_batches(method, accumulate, iterator)
        strategy.run(lambda: self._apply(method, accumulators.sums()))
        return waited

    def _on_batches(self, method: methods.Method, replica_function: Callable, iterator) -> tf.Tensor:
        """`_each_microbatch`; of a method whose batches last several updates, on the ones its carry keeps."""
        if method.updates_per_batch == 1:
            return self._each_microbatch(replica_function, iterator)

        def keep(data, index):
            images, labels = data
            self._carry.write(index, {"images": images, "labels": tf.reshape(labels, [-1])})

        due = tf.equal(self.optimizer.iterations % method.updates_per_batch, 0)
        nothing = tf.constant(0.0, tf.float64)
        waited = tf.cond(due, lambda: self._each_microbatch(keep, iterator), lambda: nothing)
        self._each_microbatch(replica_function, None)
        return waited

    def _computed(self, method: methods.Method, data, microbatch: tf.Tensor) -> list[tf.Tensor]:
        """`_contributions` of data, or of those in the carry, which moves on."""
        carry = self._carry.read(microbatch)
        data = data or (carry["images"], carry["labels"])
        contributions, carry = self._contributions(method, data, microbatch, carry)
        self._carry.write(microbatch, carry)
        return contributions

    def _contributions(self, method: methods.Method, data, microbatch: tf.Tensor, carry: schedules.Carry):
        """One micro-batch's share of the update and its carry.

        The share is gradients, BN statistics and metrics, over the number of micro-batches and replicas: summed over
        them it is the mean of each. Runs in a replica.
        """
        return self._compiled(functools.partial(self._shares, method))(data, microbatch, carry)

    def _compiled(self, function: Callable) -> Callable:
        """The same, compiled by XLA where the model is; runs in a replica."""
        on_tpu = isinstance(self.distribute_strategy, tf.distribute.TPUStrategy)
        if self._jit_compile and not on_tpu:
            function = tf.function(function, jit_compile=True, autograph=False)

        def call(*arguments):
            with xla.compiling(xla.is_compiling() or self._jit_compile or on_tpu):
                return function(*arguments)

        return call

    def _shares(self, method: methods.Method, data, microbatch: tf.Tensor, carry: schedules.Carry):
        batch = self._batch(data, microbatch, method.batches_ahead)
        with deferred_statistics() as statistics:
            update = method.gradients(self.network, self._stale(), self._example_losses, batch, carry)
        by_variable = {variable.ref(): value for variable, value in statistics}
        moving = [by_variable[variable.ref()] for variable in self.network.moving_statistics(method.branches)]
        values = [tf.stack([update.metrics[name] for name in method.metric_names])]
        share = 1.0 / (self.microbatches * tf.distribute.get_replica_context().num_replicas_in_sync)
        return [share * tf.cast(value, tf.float32) for value in update.gradients + moving + values], update.carry

    def _batch(self, data, microbatch: tf.Tensor, ahead: int) -> schedules.Batch:
        """A replica's micro-batch of the update that is `ahead` of the present one."""
        images, labels, weights = tf_keras.utils.unpack_x_y_sample_weight(data)
        if weights is not None:
            raise ConfigError("sample_weight in training: every image counts the same here: leave the weights out")
        images, labels = tf.cast(images, tf.float32), tf.reshape(tf.cast(labels, tf.int32), [-1])
        replica = tf.distribute.get_replica_context()
        if images.shape[0] is None and replica.num_replicas_in_sync > 1:
            # Keras would deal a last, smaller batch out unevenly, and a replica without rows has no mean.
            raise ConfigError("replicas need batches of one fixed size: batch the data with drop_remainder=True")
        two = images.shape.rank == 5
        if two != (AUGMENTED in self.method.branches):
            raise ConfigError(
                f"the training images are {images.shape}: method {self.method.name!r} was made for "
                f"{'one image' if two else 'a clean and an augmented image'} an example (`augmented` in methods.py)"
            )
        clean, augmented = (images[:, 0], images[:, 1]) if two else (images, None)
        # Does not depend on how the global batch is split into replicas and micro-batches.
        place = microbatch * replica.num_replicas_in_sync + tf.cast(replica.replica_id_in_sync_group, tf.int32)
        update = tf.cast(self.optimizer.iterations, tf.int32)
        seed = tf.random.fold_in(tf.random.fold_in([self.seed, 0], update + ahead), place)
        return schedules.Batch(clean, labels, seed, augmented, tf.equal((update + place) % 2, 0))

    def _apply(self, method: methods.Method, contributions: list[tf.Tensor]) -> None:
        """Averages over replicas and updates everything that changes; runs in a replica."""
        replica = tf.distribute.get_replica_context()
        variables = self.network.trainable_variables
        count = len(variables)
        sent = [tf.cast(gradient, self.all_reduce_dtype) for gradient in contributions[:count]]
        *averages, values = sum_over_replicas(sent + contributions[count:])
        gradients, statistics = [tf.cast(value, tf.float32) for value in averages[:count]], averages[count:]
        ratios = training_metrics.trust_ratios(self.optimizer, variables, gradients)
        finite = self._train_mean.record(self._log_values(method, values, gradients, statistics, ratios), ratios)
        replica.merge_call(self._push_weights, args=(finite,))
        replica.merge_call(functools.partial(self._assign_statistics, method), args=(finite, statistics))
        if isinstance(self.optimizer, LARS):
            self.optimizer.apply_if(finite, zip(gradients, variables, strict=True))
        else:
            gradients = [tf.where(finite, gradient, 0.0) for gradient in gradients]
            pairs = zip(gradients, variables, strict=True)
            self.optimizer.apply_gradients(pairs, experimental_aggregate_gradients=False)

    def _push_weights(self, strategy: tf.distribute.Strategy, finite) -> None:
        """Moves the ring of shadow copies one update on: the newest becomes θ_t. No communication."""
        ring = [leaf_variables(network) for network in (*self.shadows, self.network)]
        for older, newer in itertools.pairwise(ring):
            for shadow, weights in zip(older, newer, strict=True):
                strategy.extended.update(shadow, _assign_if, args=(finite, weights), group=False)

    def _assign_statistics(self, method, strategy: tf.distribute.Strategy, finite, statistics: list) -> None:
        average = functools.partial(moving_average, momentum=self.network.batch_norm_momentum)
        for moving, value in zip(self.network.moving_statistics(method.branches), statistics, strict=True):
            assign = lambda v, ok, s: _assign_if(v, ok, average(v, s))  # noqa: E731
            strategy.extended.update(moving, assign, args=(finite, value), group=False)

    # Helpers

    def _stale(self) -> ResNet:
        """The network at θ_{t−τ}."""
        return self.shadows[0] if self.shadows else self.network

    def _example_losses(self, labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
        function = self.loss.call if isinstance(self.loss, tf_keras.losses.Loss) else self.loss
        return function(labels, logits)

    def _contribution_shapes(self, method: methods.Method) -> list:
        variables = self.network.trainable_variables + self.network.moving_statistics(method.branches)
        return [variable.shape for variable in variables] + [(len(method.metric_names),)]

    def _log_names(self, method: methods.Method) -> tuple[str, ...]:
        return method.metric_names + training_metrics.MONITORS

    def _log_values(self, method: methods.Method, values: tf.Tensor, gradients, statistics, ratios) -> tf.Tensor:
        """float32, in the order of `_log_names(self.method)`; 0 for a half that has not begun."""
        absent = len(self.method.metric_names) - len(method.metric_names)
        drift = training_metrics.drift(self.network, self._stale())
        monitors = training_metrics.monitors(self.optimizer, gradients, statistics, ratios, drift)
        return tf.concat([values, tf.zeros(absent), tf.stack(monitors)], 0)

    def _train_logs(self) -> dict[str, tf.Tensor]:
        names = self._log_names(self.method)
        return dict(zip(names, tf.unstack(self._train_mean.result(), len(names)), strict=True))

    def updates_made(self) -> int:
        """Updates since the first initialisation, checkpoints included."""
        return int(self.optimizer.iterations.numpy())

    def create_optimizer_variables(self) -> None:
        """Creates the slots before the first step: a traced step must not, and a checkpoint restores into them."""
        with self.distribute_strategy.scope():
            if isinstance(self.optimizer, tf_keras.optimizers.legacy.Optimizer):
                self.optimizer._create_all_weights(self.network.trainable_variables)
            else:
                self.optimizer.build(self.network.trainable_variables)

    def adversarial_examples(self, images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        """x̂ of `images` and `labels` from the weights that the next update attacks; float32, of the images' shape.

        Raises:
          ConfigError: for a method without an attack.
        """
        batch = schedules.Batch(tf.cast(images, tf.float32), tf.cast(labels, tf.int32), tf.constant([self.seed, 1]))
        return self._attacked(batch)

    @functools.cached_property
    def _attacked(self) -> Callable:
        """x̂ of a Batch, compiled once."""
        attack = self.method.attack
        if attack is None:
            raise ConfigError(f"method {self.method.name!r} makes no adversarial examples: use disadv or conadv")
        return self.inspection(lambda _, stale, loss, batch: schedules.attack_images(attack, stale, loss, batch))

    def inspection(self, function: Callable) -> Callable:
        """A program: `function`(network at θ_t, network at θ_{t−τ}, loss, *arguments), which must assign nothing.

        Every replica has the same arguments (tensors, or structures of them); the result is the first one's.
        """
        strategy = self.distribute_strategy
        inspect = functools.partial(function, self.network, self._stale(), self._example_losses)

        def program(*arguments):
            results = strategy.run(inspect, args=arguments)
            return tf.nest.map_structure(lambda value: strategy.experimental_local_results(value)[0], results)

        return tf.function(program, autograph=False)


def _assign_if(variable: tf.Variable, condition: tf.Tensor, value) -> tf.Tensor:
    return variable.assign(tf.where(condition, value, variable))
