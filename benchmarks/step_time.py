"""Step time of each method beside plain tf_keras `fit` of the same network, data, batch and optimizer.

    python benchmarks/step_time.py [--network=cifar_resnet8] [--batch=128] [--steps=10] [--rounds=9] [--check]

All contestants take turns in one process, so that what else the machine does hits them alike; ratios are medians over
the rounds with the quartiles beside them. Prints a Markdown table and writes step_time.json. `--check` fails, and names
each figure of GOALS that is missed.

An update trains on `batch` clean images, and where there are adversarial ones on as many of those. `phased` does here
by turns, in two micro-batches, what two devices do at the same time. The peer is ART, the Adversarial Robustness
Toolbox, where it is installed: its AdversarialTrainer with FGSM makes half of twice the images adversarial and trains
on all of them, through one BN.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf
import tf_keras
from official.modeling.optimization import lars as tfm_lars

from conadv_tf import methods, terminal
from conadv_tf.methods.attack import Attack
from conadv_tf.models import resnet
from conadv_tf.training import trainer
from conadv_tf.training.lars import make_lars
from conadv_tf.training.losses import SmoothedCrossEntropy

PLAIN, VANILLA, PEER = "plain tf_keras fit", "vanilla", "ART AdversarialTrainer, FGSM"
PAIRED, MOVING = "conadv, paired", "conadv, shadow, attack on moving statistics"
MOVING_BFLOAT16 = f"{MOVING}, in bfloat16"
PREDICTED = "conadv, paired, predicted label"
# The schedules at their cheapest: the training gradient's own label, which leaks (docs/method.md).
LABELS = {"paired": "smoothed", "phased": "smoothed"}
# Highest ratios to vanilla.
GOALS = {PAIRED: 2.05, PREDICTED: 2.4, MOVING_BFLOAT16: 2.4}

# Milliseconds a step of so many steps, median.
Contestant = Callable[[int], float]


class PlainLoss(tf_keras.losses.Loss):
    """The same loss for plain Keras, which wants the mean."""

    def call(self, labels, logits):
        return SmoothedCrossEntropy(0.1).call(tf.reshape(tf.cast(labels, tf.int32), [-1]), logits)


def network_shape(name: str) -> tuple[int, int, int]:
    return (8, 8, 1) if name.startswith("digits") else (32, 32, 3)


def network(name: str, branches: tuple[str, ...] = ("main",)) -> resnet.ResNet:
    return resnet.ResNet(name, 10, network_shape(name), branches)


def plain(name: str) -> tf_keras.Model:
    model = network(name)
    # ".gamma" etc. are excluded by name, the way tf-models' users write it.
    exclude = ["gamma", "beta", "bias"]
    optimizer = tfm_lars.LARS(0.1, 0.9, 5e-4, exclude_from_weight_decay=exclude)
    model.compile(optimizer, PlainLoss(), metrics=["accuracy"])
    return model


def ours(name: str, method: methods.Method) -> tf_keras.Model:
    model = trainer.ConAdvModel(network(name, method.branches), method, microbatches=method.updates_per_batch)
    model.compile(make_lars(0.1), SmoothedCrossEntropy(0.1))
    return model


def keras_models(name: str) -> dict[str, Callable[[], tf_keras.Model]]:
    def maker(method: Callable[..., methods.Method], *arguments, **settings):
        return lambda: ours(name, method(*arguments, **settings))

    makers = {PLAIN: lambda: plain(name), VANILLA: maker(methods.vanilla), "disadv": maker(methods.disadv)}
    for schedule in methods.schedules_of("conadv"):
        attack = Attack(label=LABELS.get(schedule, "auto"))
        makers[f"conadv, {schedule}"] = maker(methods.conadv, attack, schedule=schedule)
    makers[PREDICTED] = maker(methods.conadv, Attack(label="predicted"), schedule="paired")
    makers |= {"noise": maker(methods.noise), "sam": maker(methods.sam), "sam_stale": maker(methods.sam, stale=True)}
    makers[MOVING] = maker(methods.conadv, Attack(batch_norm="moving"))
    makers[MOVING_BFLOAT16] = maker(methods.conadv, Attack(batch_norm="moving", compute_dtype="bfloat16"))
    return makers


def fitting(model: tf_keras.Model, data: tf.data.Dataset) -> Contestant:
    def steps(count: int) -> float:
        timer = StepTimer()
        model.fit(data, steps_per_epoch=count, verbose=0, callbacks=[timer])
        return statistics.median(timer.milliseconds)

    return steps


def quiet():
    """Without progress bars and remarks on what else could be installed."""
    return contextlib.redirect_stderr(io.StringIO())


def peer(name: str, rows: int) -> Contestant:
    """ART's trainer on twice the images, half of which it makes adversarial; its own FGSM and its own loop."""
    with quiet():
        from art import attacks, defences, estimators

    model, loss = network(name), PlainLoss()
    optimizer = plain(name).optimizer

    # ART recommends a compiled step, and its own is Keras 3's.
    @tf.function
    def train_step(model, images, labels):
        with tf.GradientTape() as tape:
            value = loss(tf.argmax(labels, 1), model(images, training=True))
        gradients = tape.gradient(value, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    classifier = estimators.classification.TensorFlowV2Classifier(
        model,
        nb_classes=10,
        input_shape=network_shape(name),
        loss_object=tf_keras.losses.CategoricalCrossentropy(from_logits=True),
        train_step=train_step,
        clip_values=(0, 255),
    )
    attack = attacks.evasion.FastGradientMethod(classifier, eps=3.0, batch_size=rows)
    trainer = defences.trainer.AdversarialTrainer(classifier, attack, ratio=0.5)
    images, labels = examples(name, 2 * rows)
    images, labels = images.astype(np.float32), np.eye(10, dtype=np.float32)[labels]

    def steps(count: int) -> float:
        start = time.perf_counter()
        with quiet():
            trainer.fit(images, labels, 2 * rows, nb_epochs=count)
        return 1000 * (time.perf_counter() - start) / count

    return steps


def contestants(name: str, rows: int, only: list[str]) -> dict[str, Contestant]:
    data = batches(name, rows)
    makers = {key: make for key, make in keras_models(name).items() if not only or key in (PLAIN, VANILLA, *only)}
    found = {key: fitting(make(), data) for key, make in makers.items()}
    if importlib.util.find_spec("art") is None:
        print("ART is not installed and left out: pip install adversarial-robustness-toolbox", file=sys.stderr)
    elif not only or PEER in only:
        found[PEER] = peer(name, rows)
    return found


def examples(name: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *network_shape(name)), dtype=np.uint8)
    return images, rng.integers(0, 10, count).astype(np.int32)


def batches(name: str, rows: int) -> tf.data.Dataset:
    data = tf.data.Dataset.from_tensor_slices(examples(name, 4 * rows))
    return data.batch(rows, drop_remainder=True).repeat().prefetch(2)


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


def measure(runners: dict[str, Contestant], steps: int, rounds: int) -> dict[str, list[float]]:
    """Median milliseconds a step of every contestant in every round; the first round, which compiles, is left out."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(rounds + 1):
        for name, run in runners.items():
            milliseconds = run(steps)
            times[name] += [milliseconds] if turn else []
    return times


def table(times: dict[str, list[float]], rows: int) -> dict[str, dict]:
    """By contestant: its median, and ratios to plain fit and to vanilla, medians over the rounds with quartiles."""
    found = {}
    for name, values in times.items():
        plain_ratios, ratios = (
            [value / base for value, base in zip(values, times[reference], strict=True)]
            for reference in (PLAIN, VANILLA)
        )
        milliseconds = statistics.median(values)
        found[name] = {
            "milliseconds": milliseconds,
            "images_per_second": 1000 * rows / milliseconds,
            "ratio_to_plain_fit": statistics.median(plain_ratios),
            "ratio_to_vanilla": statistics.quantiles(ratios, n=4),
        }
    return found


def text(rows: dict[str, dict]) -> str:
    lines = ["| | ms an update | images/s | × plain fit | × vanilla (quartiles) |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        low, middle, high = row["ratio_to_vanilla"]
        lines.append(
            f"| {name} | {row['milliseconds']:.1f} | {row['images_per_second']:,.0f} | "
            f"{row['ratio_to_plain_fit']:.3f} | {middle:.3f} ({low:.3f} to {high:.3f}) |"
        )
    return "\n".join(lines)


def missed(rows: dict[str, dict]) -> list[str]:
    """A line for every goal that was measured and not reached."""
    medians = {name: rows[name]["ratio_to_vanilla"][1] for name in GOALS if name in rows}
    return [
        f"{name} / vanilla is {ratio:.3f}, goal {GOALS[name]}" for name, ratio in medians.items() if ratio > GOALS[name]
    ]


def main() -> None:
    terminal.take_any_text()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="cifar_resnet8")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", action="append", default=[], help="a contestant beside plain fit and vanilla")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    runners = contestants(arguments.network, arguments.batch, arguments.only)
    times = measure(runners, arguments.steps, arguments.rounds)
    rows = table(times, arguments.batch)
    print(text(rows))
    with open("step_time.json", "w", encoding="utf-8") as file:
        json.dump({"arguments": vars(arguments), "rows": rows, "milliseconds": times}, file, indent=2)
    if arguments.check and missed(rows):
        sys.exit("\n".join(f"missed: {line}" for line in missed(rows)))


if __name__ == "__main__":
    main()
