"""What a run will be, in words: for the person who starts it."""

import numpy as np
import tensorflow as tf

from conadv_tf import methods
from conadv_tf.plan import Plan
from conadv_tf.run import Run
from conadv_tf.schedule import peak_of
from conadv_tf.shadows import leaf_variables


def arithmetic(run: Run) -> str:
    """The arithmetic of the run, one fact a line, for the person who starts it."""
    plan, method, network = run.plan, run.model.method, run.model.network
    warmup, peak = peak_of(run.model.optimizer.learning_rate)
    facts = [
        ("recipe", run.recipe),
        ("data", f"{run.data.name}: {run.data.num_train:,} training, {run.data.num_test:,} test images"),
        ("network", f"{network.architecture}, {_count(network.trainable_variables):,} parameters"),
        ("method", _method_text(method)),
        ("global batch", f"{plan.global_batch_size:,} clean images"),
        ("replicas", f"{plan.num_replicas:,} × {plan.microbatches * plan.rows:,} images{_turns_text(plan)}"),
        ("micro-batches", f"{plan.microbatches:,} × {plan.rows} images on each replica, accumulated into an update"),
        ("batch statistics", f"over {plan.rows * network.replicas_per_group} images"),
        ("updates", f"{plan.total_steps:,} = {plan.epochs} epochs × {plan.steps_per_epoch}"),
        ("warm-up", f"{warmup:,} updates to a peak learning rate of {peak:.4g}"),
        ("cost", f"{method.forward_units:g} forward passes over the images of a replica an update (vanilla: 3)"),
        ("carried memory", _carried_text(run)),
    ]
    encoded, decoded = run.data.cache_bytes
    if encoded:
        cached = f"{encoded / 1e9:.3g} GB of records and {decoded / 1e9:.3g} GB of test images, over all hosts"
        facts.append(("cache", cached))
    note = plan.remainder_note()
    facts += [("remainder", note)] if note else []
    return "\n".join(f"  {name:<18}{text}" for name, text in facts)


def _method_text(method: methods.Method) -> str:
    if method.attack is None:
        return method.name
    schedule = f", schedule {method.schedule}, tau {method.tau}" if method.schedule else ""
    return f"{method.name}{schedule}, epsilon {method.attack.epsilon_pixels:g} {method.attack.units}"


def _turns_text(plan: Plan) -> str:
    return f", which last for {plan.updates_per_batch} updates" if plan.updates_per_batch > 1 else ""


def _carried_text(run: Run) -> str:
    """What one update leaves to the next on each replica, beside weights and optimizer."""
    model, plan = run.model, run.plan
    text = f"{sum(4e-6 * _count(leaf_variables(shadow)) for shadow in model.shadows):.3g} MB of old weights"
    if model.method.carried:
        specs = model.method.carried(tf.TensorSpec((plan.rows, *run.data.train_shape), tf.uint8)).values()
        carried = plan.microbatches * sum(spec.dtype.size * int(np.prod(spec.shape)) for spec in specs)
        text += f" and {1e-6 * carried:.3g} MB of images"
    return f"{text} on each replica"


def _count(variables: list[tf.Variable]) -> int:
    return sum(int(np.prod(variable.shape)) for variable in variables)
