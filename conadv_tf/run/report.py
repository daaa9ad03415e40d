"""Reports of a run: its arithmetic before it trains, its result afterwards, the versions that both depend on.

Before:  `facts` are the entries of result.json that are known then, `arithmetic` the lines printed at the start.
After:   `evaluation_result`, `speed_result` and `theory_result` are result.json's measurements, `result_text` the lines
         printed at the end.
Both:    `versions` of the packages that the weights depend on.
"""

import statistics

import numpy as np
import tensorflow as tf
import tf_keras

from conadv_tf import __version__, methods
from conadv_tf.models.network import Network
from conadv_tf.run import leak
from conadv_tf.run.build import Run
from conadv_tf.training import sizes
from conadv_tf.training.learning_rate import peak_of


def facts(run: Run) -> dict:
    """The entries of result.json that are known before a run is trained."""
    plan, method = run.plan, run.model.method
    return {
        "recipe": run.recipe,
        "method": method.name,
        "schedule": method.schedule,
        "tau": method.tau,
        "epsilon": method.attack.epsilon_pixels if method.attack else None,
        "dataset": run.data.name,
        "model": run.model.network.architecture,
        "seed": run.settings.seed,
        "global_batch_size": plan.global_batch_size,
        "num_replicas": plan.num_replicas,
        "microbatches": plan.microbatches,
        "epochs": plan.epochs,
        "steps": plan.total_steps,
    }


def hyperparameters(run: Run) -> dict[str, str | float]:
    """What tells a run from others in TensorBoard's table, by tensorboard_pages.HYPERPARAMETERS; the peak is the rate.

    What the method lacks is left out.
    """
    method, (_, peak) = run.model.method, peak_of(run.model.optimizer.learning_rate)
    attack = method.attack
    aims = attack if method.record.perturbed is None else None  # x̂ of another kind has neither goal nor label
    found: dict[str, str | float | None] = {
        "method": method.name,
        "schedule": method.schedule,
        "epsilon": float(attack.epsilon_pixels) if attack else None,
        "goal": aims.goal if aims else None,
        "label": aims.label if aims else None,
        "rate": float(f"{peak:.6g}"),
        "batch": float(run.plan.global_batch_size),
        "seed": float(run.settings.seed),
    }
    return {name: value for name, value in found.items() if value is not None}


def arithmetic(run: Run, of_replicas: bool = True, devices: str | None = None) -> str:
    """The arithmetic of the run, one fact a line, for the person who starts it.

    Args:
      run: the run.
      of_replicas: False leaves out what depends on the number of replicas.
      devices: what it runs on, see `strategy.devices_text`; None where it is only looked at.
    """
    plan, method, network = run.plan, run.model.method, run.model.network
    warmup, peak = peak_of(run.model.optimizer.learning_rate)
    lasting = f", which last for {plan.updates_per_batch} updates" if plan.updates_per_batch > 1 else ""
    lines = [
        ("recipe", run.recipe),
        ("data", f"{run.data.name}: {run.data.num_train:,} training, {run.data.num_test:,} test images"),
        ("network", f"{network.architecture}, {_parameters_text(network)}"),
        ("method", _method_text(method)),
        *([("devices", devices)] if devices else []),
        ("global batch", f"{plan.global_batch_size:,} clean images"),
        ("replicas", f"{plan.num_replicas:,} × {plan.microbatches * plan.rows:,} images{lasting}"),
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
        lines.append(("cache", cached))
    note = plan.remainder_note()
    lines += [("remainder", note)] if note else []
    left_out = () if of_replicas else ("replicas", "micro-batches", "batch statistics", "carried memory")
    return "\n".join(f"  {name:<18}{text}" for name, text in lines if name not in left_out)


def _parameters_text(network: Network) -> str:
    total = sizes.count_numbers(variable for variable in network.leaf_variables() if variable.trainable)
    trained = sizes.count_numbers(network.trainable_variables)
    return f"{total:,} parameters" + ("" if trained == total else f", {trained:,} of them trained")


def _method_text(method: methods.Method) -> str:
    if method.attack is None:
        return method.name
    schedule = f", schedule {method.schedule}, tau {method.tau}" if method.schedule else ""
    return f"{method.name}{schedule}, epsilon {method.attack.epsilon_pixels:g} {method.attack.units}"


def _carried_text(run: Run) -> str:
    """The size of what one update leaves to the next on each replica, beside weights and optimizer."""
    model, plan = run.model, run.plan
    weights = sizes.FLOAT_BYTES * sum(sizes.count_numbers(shadow.leaf_variables()) for shadow in model.shadows)
    images = plan.microbatches * sizes.carried_bytes(model.method, plan.rows, run.data.train_shape)
    and_images = f" and {_megabytes(images)} of images" if images else ""
    return f"{_megabytes(weights)} of old weights{and_images} on each replica"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.3g} MB"


def evaluation_result(splits: dict[str, dict[str, float]]) -> dict[str, float]:
    """Accuracies in percent over exactly every image of each split, and the gap of train and test in points."""
    top1 = {f"{split}_top1": _percent(means["top1"]) for split, means in splits.items()}
    gap = round(top1["train_top1"] - top1["test_top1"], 4)
    return {**top1, "test_top5": _percent(splits["test"]["top5"]), "generalization_gap": gap}


def speed_result(epochs: list[dict]) -> dict[str, float]:
    """Median clean training images/s of the epochs, and the seconds of training in all of them."""
    rates = [epoch["images_per_second"] for epoch in epochs if epoch["images_per_second"]]
    return {
        "images_per_second": round(statistics.median(rates), 2) if rates else 0.0,
        "wall_seconds": round(sum(epoch["seconds"] for epoch in epochs), 2),
    }


def theory_result(epochs: list[dict]) -> dict[str, float]:
    """The values of monitor.py by their names without "theory_": means over the epochs that have them.

    mean_squared_gradient_norm is an average over the run already: its last value is taken.
    """
    names = sorted({name for epoch in epochs for name in epoch if name.startswith("theory_")})
    measured = {name: [epoch[name] for epoch in epochs if name in epoch] for name in names}
    means = {name.removeprefix("theory_"): statistics.mean(values) for name, values in measured.items()}
    if "mean_squared_gradient_norm" in means:
        means["mean_squared_gradient_norm"] = measured["theory_mean_squared_gradient_norm"][-1]
    return {name: float(f"{value:.6g}") for name, value in means.items()}


def versions() -> dict[str, str]:
    """Versions of the packages that the weights depend on."""
    return {
        "conadv_tf": __version__,
        "tensorflow": tf.__version__,
        "tf_keras": tf_keras.__version__,
        "numpy": np.__version__,
    }


def result_text(result: dict) -> str:
    """The result for a person."""
    setting = result["method"]
    if result["schedule"]:
        setting += f" ({result['schedule']}, tau {result['tau']})"
    if result["epsilon"] is not None:
        setting += f", epsilon {result['epsilon']:g}"
    leaking = ""
    if leak.leaks(result):
        leaking = f"   adversarial top-1 up to {result['leak_largest']:.1f} points above clean (label leaking)"
    return (
        f"{result['recipe']}: {setting}; batch {result['global_batch_size']:,}, {result['epochs']} epochs, "
        f"{result['steps']:,} updates\n"
        f"  test top-1 {result['test_top1']:.2f} %   top-5 {result['test_top5']:.2f} %   "
        f"train top-1 {result['train_top1']:.2f} %   gap {result['generalization_gap']:.2f} points\n"
        f"  {result['images_per_second']:,.0f} images/s, {result['wall_seconds']:,.0f} s{leaking}"
    )


def _percent(share: float) -> float:
    return round(100.0 * float(share), 4)
