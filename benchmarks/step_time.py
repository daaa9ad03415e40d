"""Step time of each method beside plain tf_keras `fit` of the same network, data, batch and optimizer.

    python benchmarks/step_time.py [--network=cifar_resnet8] [--batch=128] [--steps=10] [--rounds=9]

All contestants take turns in one process, so that what else the machine does hits them alike; ratios are medians over
the rounds with the quartiles beside them. Prints a Markdown table and writes step_time.json.
"""

import argparse
import json
import statistics
import time

import numpy as np
import tensorflow as tf
import tf_keras
from official.modeling.optimization import lars as tfm_lars

from conadv_tf import methods, resnet, trainer
from conadv_tf.attack import Attack
from conadv_tf.lars import make_lars
from conadv_tf.losses import SmoothedCrossEntropy


class PlainLoss(tf_keras.losses.Loss):
    """The same loss for plain Keras, which wants the mean."""

    def call(self, labels, logits):
        return SmoothedCrossEntropy(0.1).call(tf.reshape(tf.cast(labels, tf.int32), [-1]), logits)


def network(name: str, branches: tuple[str, ...] = ("main",)) -> resnet.ResNet:
    shape = (8, 8, 1) if name.startswith("digits") else (32, 32, 3)
    return resnet.ResNet(name, 10, shape, branches)


def plain(name: str) -> tf_keras.Model:
    model = network(name)
    # ".gamma" etc. are excluded by name, the way tf-models' users write it.
    exclude = ["gamma", "beta", "bias"]
    optimizer = tfm_lars.LARS(0.1, 0.9, 5e-4, exclude_from_weight_decay=exclude)
    model.compile(optimizer, PlainLoss(), metrics=["accuracy"])
    return model


def ours(name: str, method: methods.Method) -> tf_keras.Model:
    model = trainer.ConAdvModel(network(name, method.branches), method)
    model.compile(make_lars(0.1), SmoothedCrossEntropy(0.1))
    return model


def contestants(name: str) -> dict[str, tf_keras.Model]:
    moving = Attack(batch_norm="moving")
    return {
        "plain tf_keras fit": plain(name),
        "vanilla": ours(name, methods.vanilla()),
        "disadv": ours(name, methods.disadv()),
        "conadv, shadow": ours(name, methods.conadv()),
        "conadv, shadow, attack on moving statistics": ours(name, methods.conadv(moving)),
    }


def batches(name: str, rows: int) -> tf.data.Dataset:
    rng = np.random.default_rng(0)
    shape = (8, 8, 1) if name.startswith("digits") else (32, 32, 3)
    images = rng.integers(0, 256, (4 * rows, *shape), dtype=np.uint8)
    labels = rng.integers(0, 10, 4 * rows).astype(np.int32)
    return tf.data.Dataset.from_tensor_slices((images, labels)).batch(rows, drop_remainder=True).repeat().prefetch(2)


class StepTimer(tf_keras.callbacks.Callback):
    """Milliseconds of each step of a fit; on a CPU a step has ended when Keras says so."""

    _supports_tf_logs = True

    def __init__(self):
        super().__init__()
        self.milliseconds: list[float] = []

    def on_train_batch_begin(self, batch, logs=None):
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.milliseconds.append(1000 * (time.perf_counter() - self._start))


def measure(
    models: dict[str, tf_keras.Model], data: tf.data.Dataset, steps: int, rounds: int
) -> dict[str, list[float]]:
    """Median milliseconds a step of every contestant in every round; the first round, which compiles, is left out."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            timer = StepTimer()
            model.fit(data, steps_per_epoch=steps, verbose=0, callbacks=[timer])
            if turn:
                times[name].append(statistics.median(timer.milliseconds))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="cifar_resnet8")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    times = measure(
        contestants(arguments.network),
        batches(arguments.network, arguments.batch),
        arguments.steps,
        arguments.rounds,
    )
    print("| | ms a step | images/s | × plain fit | × vanilla (quartiles) |\n|---|---|---|---|---|")
    rows = {}
    for name, values in times.items():
        ratios = [value / base for value, base in zip(values, times["vanilla"], strict=True)]
        plain_ratios = [value / base for value, base in zip(values, times["plain tf_keras fit"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        milliseconds = statistics.median(values)
        rows[name] = {
            "milliseconds": milliseconds,
            "images_per_second": 1000 * arguments.batch / milliseconds,
            "ratio_to_plain_fit": statistics.median(plain_ratios),
            "ratio_to_vanilla": [low, middle, high],
        }
        print(
            f"| {name} | {milliseconds:.1f} | {1000 * arguments.batch / milliseconds:,.0f} | "
            f"{rows[name]['ratio_to_plain_fit']:.3f} | {middle:.3f} ({low:.3f} to {high:.3f}) |"
        )
    with open("step_time.json", "w") as file:
        json.dump({"arguments": vars(arguments), "rows": rows, "milliseconds": times}, file, indent=2)


if __name__ == "__main__":
    main()
