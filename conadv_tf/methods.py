"""The training methods on one page (SPEC section 1; paper Eq. 2-5 and Algorithm 1).

    vanilla   g = ∇_θ mean L(θ_t; x, y; main BN)
    disadv    x̂ from θ_t,      g = (1 − w) ∇_θ mean L(θ_t; x, y; main BN) + w ∇_θ mean L(θ_t; x̂, y; adversarial BN)
    conadv    x̂ from θ_{t−τ},  the same g

Where the data bring an AutoAugment image beside each clean one ("concat3"), both adversarial methods train on it too,
through BN statistics of its own; it shares the clean one's weight 1 − w equally.

A method is a pure function from (weights, stale weights, batch) to the gradients of one replica's
micro-batch. Everything around it, i.e. averaging over micro-batches and replicas, BN's moving averages, the
optimizer and the shadow copies, is the trainer's and the same for all. A further method is one function here
and one line in METHODS.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import gin
import tensorflow as tf

from conadv_tf.attack import Attack
from conadv_tf.errors import ConfigError
from conadv_tf.resnet import ResNet
from conadv_tf.split_batchnorm import ADVERSARIAL, AUGMENTED, MAIN

SCHEDULES = ("shadow",)


class Batch(NamedTuple):
    """One replica's micro-batch.

    images float32 [rows, H, W, C] in [0, 255], labels int32 [rows], seed int32 [2]; augmented: like images, or None.
    """

    images: tf.Tensor
    labels: tf.Tensor
    seed: tf.Tensor
    augmented: tf.Tensor | None = None


# (network at θ_t, network at θ_{t−τ}, loss, batch) → gradients in the order of the trainable variables, metrics
# by name. `loss` maps (labels, logits) to float32 [rows].
Gradients = Callable[[ResNet, ResNet, Callable, Batch], tuple[list[tf.Tensor], dict[str, tf.Tensor]]]


@dataclasses.dataclass(frozen=True)
class Method:
    """A training method.

    Attributes:
      name, schedule: for reports; `schedule` is None where there is no choice of one.
      gradients: see Gradients.
      branches: the BN branches it trains.
      metric_names: the keys of the metrics it returns; each is a mean over the micro-batch.
      tau: delay of the weights the attack sees; the trainer keeps that many shadow copies.
      start_epoch: before it the run trains as `vanilla`.
      attack: how it makes adversarial examples, None if it makes none.
      forward_units: cost of an update in forward passes over the batch (vanilla: 3; SPEC section 2).
    """

    name: str
    gradients: Gradients
    branches: tuple[str, ...] = (MAIN,)
    metric_names: tuple[str, ...] = ("loss", "clean_loss", "clean_top1")
    schedule: str | None = None
    tau: int = 0
    start_epoch: int = 0
    attack: Attack | None = None
    forward_units: float = 3.0


@gin.configurable("adversarial")
@dataclasses.dataclass(frozen=True)
class AdversarialHalf:
    """What the adversarial examples count for.

    Attributes:
      weight: w of the adversarial loss; the clean one, or the clean and the augmented one, have 1 − w; in [0, 1].
      fraction: of each micro-batch made adversarial (its first rows), in (0, 1].
      start_epoch: first epoch with an adversarial half; before it the step is, and costs, the vanilla step.
    """

    weight: float = 0.5
    fraction: float = 1.0
    start_epoch: int = 0

    def __post_init__(self):
        if not 0 <= self.weight <= 1:
            raise ConfigError(f"adversarial.weight={self.weight} is outside [0, 1]: the paper's is 0.5")
        if not 0 < self.fraction <= 1:
            raise ConfigError(
                f"adversarial.fraction={self.fraction} is outside (0, 1]: 1 makes every image adversarial"
            )
        if not isinstance(self.start_epoch, int) or self.start_epoch < 0:
            raise ConfigError(f"adversarial.start_epoch={self.start_epoch!r} must be a whole number of at least 0")


def training_pass(network: ResNet, branch: str, loss, images, labels):
    """Gradients of the mean loss of one pass through `branch`, the mean loss and top-1 in [0, 1]."""
    with tf.GradientTape() as tape:
        logits = network(images, branch=branch, mode="batch", update_statistics=True)
        value = tf.reduce_mean(loss(labels, logits))
    gradients = tape.gradient(value, network.trainable_variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    correct = tf.equal(tf.argmax(logits, 1, output_type=labels.dtype), labels)
    return gradients, value, tf.reduce_mean(tf.cast(correct, tf.float32))


def attack_images(attack: Attack, network: ResNet, loss, batch: Batch) -> tf.Tensor:
    """x̂ of the batch at the weights of `network`, which keeps no trace of it."""
    branch = ADVERSARIAL if attack.batch_norm == "aux" else MAIN
    mode = "moving" if attack.batch_norm == "moving" else "batch"

    def logits(images: tf.Tensor) -> tf.Tensor:
        return network(images, branch=branch, mode=mode, update_statistics=False, synchronize=False)

    return attack.adversarial_examples(logits, network.num_classes, loss, batch.images, batch.labels, batch.seed)


def vanilla_gradients(network: ResNet, stale: ResNet, loss, batch: Batch):
    """Plain training on the clean batch."""
    gradients, value, top1 = training_pass(network, MAIN, loss, batch.images, batch.labels)
    return gradients, {"loss": value, "clean_loss": value, "clean_top1": top1}


def adversarial_gradients(attack: Attack, half: AdversarialHalf, augmented: bool = False) -> Gradients:
    """Training on the clean batch and on its adversarial examples from the stale weights (Eq. 4)."""
    clean_share = (1 - half.weight) / 2 if augmented else 1 - half.weight

    def gradients(network: ResNet, stale: ResNet, loss, batch: Batch):
        rows = attacked_rows(half.fraction, batch.images.shape[0])
        attacked = Batch(batch.images[:rows], batch.labels[:rows], batch.seed)
        adversarial_images = attack_images(attack, stale, loss, attacked)
        passes = [("clean", MAIN, clean_share, batch.images, batch.labels)]
        if augmented:
            passes.append(("augmented", AUGMENTED, clean_share, batch.augmented, batch.labels))
        passes.append(("adversarial", ADVERSARIAL, half.weight, adversarial_images, attacked.labels))
        mixed: list[tf.Tensor] = []
        metrics: dict[str, tf.Tensor] = {"loss": tf.constant(0.0)}
        for name, branch, share, images, labels in passes:
            # One tape per pass: the activations of one can be freed before the next begins.
            part, value, top1 = training_pass(network, branch, loss, images, labels)
            mixed = [m + share * p for m, p in zip(mixed, part, strict=True)] if mixed else [share * p for p in part]
            metrics |= {"loss": metrics["loss"] + share * value, f"{name}_loss": value, f"{name}_top1": top1}
        return mixed, metrics

    return gradients


def attacked_rows(fraction: float, rows: int | None) -> int | None:
    """How many of a micro-batch's rows are made adversarial; None (all) where the row count is unknown."""
    if fraction == 1:
        return None
    if rows is None:
        raise ConfigError(
            f"adversarial.fraction={fraction} needs batches of a fixed size: batch with drop_remainder=True"
        )
    count = round(fraction * rows)
    if count < 1:
        raise ConfigError(
            f"adversarial.fraction={fraction} of {rows} images per micro-batch leaves none: raise one of the two"
        )
    return count


def vanilla(augmented: bool = False) -> Method:
    """Training without adversarial examples.

    Raises:
      ConfigError: for data with an augmented image beside the clean one.
    """
    if augmented:
        raise ConfigError(
            "data.autoaugment_mode='concat3' is for adversarial methods: with train.method='vanilla' use 'replace'"
        )
    return Method("vanilla", vanilla_gradients)


def disadv(attack: Attack | None = None, half: AdversarialHalf | None = None, augmented: bool = False) -> Method:
    """Distributed adversarial learning: x̂ from the current weights, two dependent gradients (paper 3.2).

    Args: as of `conadv`.
    """
    return _adversarial("disadv", None, 0, attack, half, augmented)


@gin.configurable(denylist=["attack", "half", "augmented"])
def conadv(
    attack: Attack | None = None,
    half: AdversarialHalf | None = None,
    schedule: str = "shadow",
    tau: int = 1,
    augmented: bool = False,
) -> Method:
    """Concurrent adversarial learning: x̂ from weights `tau` updates old (paper 3.3).

    Args:
      attack: how x̂ is made; None takes gin's `attack`.
      half: what x̂ counts for; None takes gin's `adversarial`.
      schedule: "shadow" keeps θ_{t−τ} as non-trainable variables (SPEC section 2).
      tau: ≥ 0; 0 is disadv.
      augmented: whether the data bring an augmented image beside each clean one, see `Batch`.

    Raises:
      ConfigError: for a schedule or delay there is not.
    """
    if schedule not in SCHEDULES:
        raise ConfigError(f"conadv.schedule={schedule!r} is not known: choose one of {SCHEDULES}")
    if not isinstance(tau, int) or tau < 0:
        raise ConfigError(f"conadv.tau={tau!r} must be a whole number of updates, at least 0; the paper's is 1")
    return _adversarial("conadv", schedule, tau, attack, half, augmented)


def _adversarial(
    name: str,
    schedule: str | None,
    tau: int,
    attack: Attack | None,
    half: AdversarialHalf | None,
    augmented: bool,
) -> Method:
    attack, half = attack or Attack(), half or AdversarialHalf()
    branches = (MAIN, AUGMENTED, ADVERSARIAL) if augmented else (MAIN, ADVERSARIAL)
    passes = ("clean", "augmented", "adversarial") if augmented else ("clean", "adversarial")
    attack_units = attack.steps * (1.5 if attack.batch_norm == "moving" else 2.0)
    return Method(
        name,
        adversarial_gradients(attack, half, augmented),
        branches=branches,
        metric_names=("loss", *(f"{name}_{metric}" for name in passes for metric in ("loss", "top1"))),
        schedule=schedule,
        tau=tau,
        start_epoch=half.start_epoch,
        attack=attack,
        forward_units=3 * len(passes) - 3 + half.fraction * (3 + attack_units),
    )


METHODS = {"vanilla": vanilla, "disadv": disadv, "conadv": conadv}


def make_method(name: str, augmented: bool = False) -> Method:
    """The method called `name`, configured by gin, for data with or without an augmented image beside each clean one.

    Raises:
      ConfigError: if there is none.
    """
    if name not in METHODS:
        raise ConfigError(f"train.method={name!r} is not known: choose one of {', '.join(METHODS)}")
    return METHODS[name](augmented=augmented)
