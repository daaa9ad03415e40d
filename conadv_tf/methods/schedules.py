"""The schedules on one page: what one update computes, and what it carries to the next (SPEC section 2).

    vanilla             g = ∇_θ mean L(θ_t; x, y; main BN)
    shadow, disadv      x̂_t from θ_{t−τ} (disadv: θ_t), then g = (1 − w) ∇ mean L(θ_t; B_t; main BN)
                                                                   + w ∇ mean L(θ_t; B̂_t; adversarial BN)
    lookahead           the same g from {B_t, x̂_t} carried here; at the same θ_t x̂_{t+1} is made for B_{t+1}
    paired              g from clean B_t and the x̂ of B_{t−1}; the clean pass also yields ∇_x, and with it x̂_t
    phased              paired, spread: one pass an update on each replica, clean and adversarial by turns

Each is a pure function from (network at θ_t, network at θ_{t−τ}, loss, batch, carry) to (gradients, metrics, carry')
of one replica's micro-batch; a carry is a dict of tensors. Averages over micro-batches and replicas, BN's moving
averages, the optimizer, the stale weights and the variables that hold the carry are the trainer's.
"""

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from conadv_tf.errors import ConfigError
from conadv_tf.methods.attack import Attack, LogitsFunction
from conadv_tf.models import xla
from conadv_tf.models.resnet import ResNet
from conadv_tf.models.split_batchnorm import ADVERSARIAL, AUGMENTED, MAIN, Turn

Carry = dict[str, tf.Tensor]


class Batch(NamedTuple):
    """One replica's micro-batch.

    images float32 [rows, H, W, C] in [0, 255], labels int32 [rows], seed int32 [2]; augmented: like images, or None;
    clean_turn: bool scalar, for `phased` alone: whether the replica runs the clean pass of this update.
    """

    images: tf.Tensor
    labels: tf.Tensor
    seed: tf.Tensor
    augmented: tf.Tensor | None = None
    clean_turn: tf.Tensor | None = None


class Part(NamedTuple):
    """A pass of an update: `share` is its weight in the loss; `learns` whether BN's moving averages follow it."""

    name: str
    branch: str
    share: float | tf.Tensor
    images: tf.Tensor
    labels: tf.Tensor
    learns: bool | tf.Tensor = True


class Update(NamedTuple):
    """Gradients in the order of the trainable variables, metrics by name, and the next carry."""

    gradients: list[tf.Tensor]
    metrics: dict[str, tf.Tensor]
    carry: Carry


# `loss` maps (labels, logits) to float32 [rows].
Gradients = Callable[[ResNet, ResNet, Callable, Batch, Carry], Update]


class Half(NamedTuple):
    """Weight w of the adversarial loss, the fraction of the rows attacked, whether there are augmented images."""

    weight: float
    fraction: float
    augmented: bool


def training_pass(network: ResNet, branch: str | Turn, loss, images, labels, learns: bool | tf.Tensor = True):
    """Gradients of the mean loss of one pass through `branch`, ∇_x of it, the mean loss and top-1 in [0, 1]."""
    variables = network.trainable_variables
    with tf.GradientTape() as tape:
        tape.watch(images)
        logits = network(images, branch=branch, mode="batch", update_statistics=learns)
        value = tf.reduce_mean(loss(labels, logits))
    *gradients, by_image = tape.gradient(
        value, [*variables, images], unconnected_gradients=tf.UnconnectedGradients.ZERO
    )
    correct = tf.equal(tf.argmax(logits, 1, output_type=labels.dtype), labels)
    return gradients, by_image, value, tf.reduce_mean(tf.cast(correct, tf.float32))


def train_on(network: ResNet, loss, parts: list[Part]):
    """The mixed gradient of the passes, their metrics, and ∇_x of the first pass."""
    mixed: list[tf.Tensor] = []
    metrics: dict[str, tf.Tensor] = {"loss": tf.constant(0.0)}
    by_image = None
    for part in parts:
        # One tape per pass, and one pass after the other: the activations of one are freed before the next begins.
        mixed, [images] = xla.after(mixed, [part.images])
        own, own_by_image, value, top1 = training_pass(network, part.branch, loss, images, part.labels, part.learns)
        by_image = own_by_image if by_image is None else by_image
        own = [part.share * gradient for gradient in own]
        mixed = [m + g for m, g in zip(mixed, own, strict=True)] if mixed else own
        metrics |= {
            "loss": metrics["loss"] + part.share * value,
            f"{part.name}_loss": value,
            f"{part.name}_top1": top1,
        }
    return mixed, metrics, by_image


def attacked_logits(attack: Attack, network: ResNet) -> LogitsFunction:
    """`network` as the attack looks through it, which leaves no trace in it."""
    branch = ADVERSARIAL if attack.batch_norm == "aux" else MAIN
    mode = "moving" if attack.batch_norm == "moving" else "batch"
    silent = {"update_statistics": False, "synchronize": False}

    def logits(images: tf.Tensor) -> tf.Tensor:
        return network(images, branch=branch, mode=mode, activation_dtype=attack.compute_dtype, **silent)

    return logits


def attack_images(attack: Attack, network: ResNet, loss, batch: Batch) -> tf.Tensor:
    """x̂ of the batch at the weights of `network`."""
    logits = attacked_logits(attack, network)
    return attack.adversarial_examples(logits, network.num_classes, loss, batch.images, batch.labels, batch.seed)


def vanilla(network: ResNet, stale: ResNet, loss, batch: Batch, carry: Carry) -> Update:
    """Plain training on the clean batch."""
    gradients, metrics, _ = train_on(network, loss, [Part("clean", MAIN, 1.0, batch.images, batch.labels)])
    return Update(gradients, metrics, {})


def shadow(attack: Attack, half: Half) -> Gradients:
    """Training on the clean batch and on its adversarial examples from the stale weights (Eq. 4)."""

    def gradients(network: ResNet, stale: ResNet, loss, batch: Batch, carry: Carry) -> Update:
        adversarial = attack_images(attack, stale, loss, _attacked(half, batch))
        [adversarial], [images] = xla.after([adversarial], [batch.images])
        gradients, metrics, _ = train_on(network, loss, _parts(half, batch._replace(images=images), adversarial))
        return Update(gradients, metrics, {})

    return gradients


def lookahead(attack: Attack, half: Half) -> Gradients:
    """Training on the batch carried here with its x̂; x̂ of the batch handed in, the next update's, at the same θ_t."""

    def gradients(network: ResNet, stale: ResNet, loss, batch: Batch, carry: Carry) -> Update:
        now = Batch(_pixels(carry["images"]), carry["labels"], batch.seed, _pixels(carry.get("augmented")))
        gradients, metrics, _ = train_on(network, loss, _parts(half, now, _pixels(carry["adversarial"])))
        gradients, [images] = xla.after(gradients, [batch.images])
        return Update(gradients, metrics, begin_lookahead(attack, half)(network, loss, batch._replace(images=images)))

    return gradients


def begin_lookahead(attack: Attack, half: Half):
    """The carry into an update whose batch is `batch`, made at the weights before it."""

    def begin(stale: ResNet, loss, batch: Batch) -> Carry:
        adversarial = attack_images(attack, stale, loss, _attacked(half, batch))
        carry = {"images": batch.images, "labels": batch.labels, "adversarial": adversarial}
        return carry | ({"augmented": batch.augmented} if half.augmented else {})

    return begin


def paired(attack: Attack, half: Half) -> Gradients:
    """Training on the clean batch and on the x̂ of the one before; x̂ of this one is a by-product of its clean pass.

    The first update has no x̂ yet: its adversarial term is 0, and the adversarial moving averages stay.
    """

    def gradients(network: ResNet, stale: ResNet, loss, batch: Batch, carry: Carry) -> Update:
        parts = _parts(half, batch, _pixels(carry["adversarial"]))
        parts[-1] = parts[-1]._replace(
            share=half.weight * carry["begun"], labels=carry["adversarial_labels"], learns=carry["begun"] > 0
        )
        gradients, metrics, by_image = train_on(network, loss, parts)
        metrics |= {name: carry["begun"] * metrics[name] for name in ("adversarial_loss", "adversarial_top1")}
        return Update(gradients, metrics, _crafted(attack, half, batch, by_image))

    return gradients


def begin_paired(attack: Attack, half: Half):
    """The carry into the update after the one that trained on `batch` at the weights of `stale`."""

    def begin(stale: ResNet, loss, batch: Batch) -> Carry:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(batch.images)
            value = tf.reduce_mean(loss(batch.labels, stale(batch.images, mode="batch")))
        return _crafted(attack, half, batch, tape.gradient(value, batch.images))

    return begin


def phased(attack: Attack, half: Half) -> Gradients:
    """`paired` over twice the replicas: each trains on its fresh batch, then on the x̂ it crafted, by turns.

    Half of the replicas, or of the places of a virtual pod, have the clean turn: a part counts twice in the mean over
    all of them.
    """

    def gradients(network: ResNet, stale: ResNet, loss, batch: Batch, carry: Carry) -> Update:
        clean, begun = batch.clean_turn, carry["begun"]
        images = tf.where(clean, batch.images, _pixels(carry["adversarial"]))
        labels = tf.where(clean, batch.labels, carry["adversarial_labels"])
        share = 2.0 * tf.where(clean, 1.0 - half.weight, half.weight * begun)
        gradients, by_image, value, top1 = training_pass(network, Turn(clean), loss, images, labels, begun > 0)
        counts = {"clean": 2.0 * tf.cast(clean, tf.float32), "adversarial": 2.0 * tf.where(clean, 0.0, begun)}
        metrics = {"loss": share * value}
        for name, count in counts.items():
            metrics |= {f"{name}_loss": count * value, f"{name}_top1": count * top1}
        crafted = _crafted(attack, half, batch, by_image)
        kept = {name: tf.where(clean, crafted[name], tf.cast(carry[name], crafted[name].dtype)) for name in crafted}
        return Update([share * gradient for gradient in gradients], metrics, kept)

    return gradients


def begin_phased(attack: Attack, half: Half):
    """As `begin_paired`, with the fresh batch, half of which the next update may still have to train on."""

    def begin(stale: ResNet, loss, batch: Batch) -> Carry:
        crafted = begin_paired(attack, half)(stale, loss, batch)
        return {"images": batch.images, "labels": batch.labels, **crafted}

    return begin


def carried(schedule: str, attack: Attack, half: Half, images: tf.TensorSpec) -> dict[str, tf.TensorSpec]:
    """What `schedule` carries for a micro-batch [rows, H, W, C] (or [rows, 2, H, W, C]) as the data hand it out.

    Images have the data's dtype; x̂ too where it is whole pixels of it (uint8), float32 otherwise.

    Raises:
      ConfigError: where the batches' size is not fixed.
    """
    rows = images.shape[0]
    if rows is None:
        raise ConfigError(
            f"conadv.schedule={schedule!r} carries images between updates and needs batches of one size: "
            "batch the data with drop_remainder=True"
        )
    first = rows if half.fraction == 1 else attacked_rows(half.fraction, rows)
    clean = tf.TensorSpec((rows, *images.shape[-3:]), images.dtype)
    dtype = images.dtype if images.dtype.is_integer and attack.keeps_whole_pixels() else tf.float32
    specs = {"adversarial": tf.TensorSpec((first, *images.shape[-3:]), dtype)}
    if schedule in ("lookahead", "phased"):
        specs |= {"images": clean, "labels": tf.TensorSpec((rows,), tf.int32)}
    if schedule in ("paired", "phased"):
        specs |= {"adversarial_labels": tf.TensorSpec((first,), tf.int32), "begun": tf.TensorSpec((), tf.float32)}
    return specs | ({"augmented": clean} if schedule == "lookahead" and half.augmented else {})


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


def _attacked(half: Half, batch: Batch) -> Batch:
    """The rows of the batch that are made adversarial."""
    rows = attacked_rows(half.fraction, batch.images.shape[0])
    return Batch(batch.images[:rows], batch.labels[:rows], batch.seed)


def _parts(half: Half, batch: Batch, adversarial: tf.Tensor) -> list[Part]:
    """The passes of an update; an augmented image shares the clean one's weight equally."""
    share = (1 - half.weight) / 2 if half.augmented else 1 - half.weight
    parts = [Part("clean", MAIN, share, batch.images, batch.labels)]
    if half.augmented:
        parts.append(Part("augmented", AUGMENTED, share, batch.augmented, batch.labels))
    labels = batch.labels[: attacked_rows(half.fraction, batch.images.shape[0])]
    return [*parts, Part("adversarial", ADVERSARIAL, half.weight, adversarial, labels)]


def _crafted(attack: Attack, half: Half, batch: Batch, by_image: tf.Tensor) -> Carry:
    """The carry of `paired`: x̂ from the training gradient of the clean pass."""
    rows = attacked_rows(half.fraction, batch.images.shape[0])
    adversarial = attack.one_step(batch.images[:rows], by_image[:rows])
    return {"adversarial": adversarial, "adversarial_labels": batch.labels[:rows], "begun": tf.constant(1.0)}


def _pixels(images: tf.Tensor | None) -> tf.Tensor | None:
    return None if images is None else tf.cast(images, tf.float32)
