"""The schedules on one page: what one update computes, and what it carries to the next (docs/method.md).

    vanilla             g = ∇_θ mean L(θ_t; x, y; main BN)
    shadow, disadv      x̂_t from θ_{t−τ} (disadv: θ_t), then g = (1 − w) ∇ mean L(θ_t; B_t; main BN)
                                                                   + w ∇ mean L(θ_t; B̂_t; adversarial BN)
    lookahead           the same g from {B_t, x̂_t} carried here; at the same θ_t x̂_{t+1} is made for B_{t+1}
    paired              g from clean B_t and the x̂ of B_{t−1}; the clean pass also yields ∇_x, and with it x̂_t: the
                        training gradient's own, or that of another label by a second backward pass to the images
    phased              paired, spread: one pass an update on each replica, clean and adversarial by turns

Each is a pure function from (network at θ_t, network at θ_{t−τ}, loss, batch, carry) to (gradients, metrics, carry')
of one replica's micro-batch; a carry is a dict of tensors. Averages over micro-batches and replicas, BN's moving
averages, the optimizer, the stale weights and the variables that hold the carry are the trainer's. The records at the
end of the page say the rest: costs, carries, delays, and the settings that a schedule excludes.
"""

import tensorflow as tf

from conadv_tf.methods.attack import Attack, connected, differentiated
from conadv_tf.methods.interface import (
    Batch,
    Begin,
    Carry,
    Gradients,
    Loss,
    Passes,
    Requirement,
    Schedule,
    Update,
    carrying,
    register,
)
from conadv_tf.methods.mixture import Mixture
from conadv_tf.methods.passes import Part, ascended_by, attack_images, attacked, parts_of, train_on, training_pass
from conadv_tf.models import xla
from conadv_tf.models.network import Network
from conadv_tf.models.split_batchnorm import MAIN, Turn


def vanilla() -> Gradients:
    """Plain training on the clean batch."""

    def gradients(network: Network, stale: Network, loss: Loss, batch: Batch, carry: Carry) -> Update:
        gradients, metrics, _ = train_on(network, loss, [Part("clean", MAIN, 1.0, batch.images, batch.labels)])
        return Update(gradients, metrics, {})

    return gradients


def shadow(attack: Attack, mixture: Mixture) -> Gradients:
    """Training on the clean batch and on its adversarial examples from the stale weights (Eq. 4)."""

    def gradients(network: Network, stale: Network, loss: Loss, batch: Batch, carry: Carry) -> Update:
        adversarial = attack_images(attack, stale, loss, attacked(mixture, batch))
        [adversarial], [images] = xla.barrier([adversarial], [batch.images])
        gradients, metrics, _ = train_on(network, loss, parts_of(mixture, batch._replace(images=images), adversarial))
        return Update(gradients, metrics, {})

    return gradients


def lookahead(attack: Attack, mixture: Mixture) -> Gradients:
    """Training on the batch carried here with its x̂; x̂ of the batch handed in, the next update's, at the same θ_t."""

    def gradients(network: Network, stale: Network, loss: Loss, batch: Batch, carry: Carry) -> Update:
        now = Batch(_pixels(carry["images"]), carry["labels"], batch.seed, _pixels(carry.get("augmented")))
        *others, adversarial = parts_of(mixture, now, _pixels(carry["adversarial"]))
        adversarial = adversarial._replace(labels=carry["adversarial_labels"])
        gradients, metrics, _ = train_on(network, loss, [*others, adversarial])
        gradients, [images] = xla.barrier(gradients, [batch.images])
        carry = begin_lookahead(attack, mixture)(network, loss, batch._replace(images=images))
        return Update(gradients, metrics, carry)

    return gradients


def begin_lookahead(attack: Attack, mixture: Mixture) -> Begin:
    """The carry into an update whose batch is `batch`, made at the weights before it."""

    def begin(stale: Network, loss: Loss, batch: Batch) -> Carry:
        first = attacked(mixture, batch)
        adversarial = {"adversarial": attack_images(attack, stale, loss, first), "adversarial_labels": first.labels}
        carry = {"images": batch.images, "labels": batch.labels, **adversarial}
        return carry | ({"augmented": batch.augmented} if mixture.augmented else {})

    return begin


def paired(attack: Attack, mixture: Mixture) -> Gradients:
    """Training on the clean batch and on the x̂ of the one before; x̂ of this one is a by-product of its clean pass.

    The first update has no x̂ yet: its adversarial term is 0, and the adversarial moving averages stay.
    """

    def gradients(network: Network, stale: Network, loss: Loss, batch: Batch, carry: Carry) -> Update:
        begun = carry["begun"]
        clean, *others, adversarial = parts_of(mixture, batch, _pixels(carry["adversarial"]))
        clean = clean._replace(ascended=ascended_by(attack, network.num_classes, loss, batch))
        weight = mixture.weight * tf.cast(begun, tf.float32)
        adversarial = adversarial._replace(share=weight, labels=carry["adversarial_labels"], learns=begun)
        gradients, metrics, by_image = train_on(network, loss, [clean, *others, adversarial])
        metrics |= {name: tf.where(begun, metrics[name], 0.0) for name in ("adversarial_loss", "adversarial_top1")}
        return Update(gradients, metrics, _crafted(attack, mixture, batch, by_image))

    return gradients


def begin_paired(attack: Attack, mixture: Mixture) -> Begin:
    """The carry into the update after the one that trained on `batch` at the weights of `stale`."""

    def begin(stale: Network, loss: Loss, batch: Batch) -> Carry:
        ascended = ascended_by(attack, stale.num_classes, loss, batch)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(batch.images)
            logits = stale(batch.images, mode="batch")
            value = ascended(logits) if ascended else tf.reduce_mean(loss(batch.labels, logits))
        return _crafted(attack, mixture, batch, differentiated(tape, value, batch.images))

    return begin


def phased(attack: Attack, mixture: Mixture) -> Gradients:
    """`paired` over twice the replicas: each trains on its fresh batch, then on the x̂ it crafted, by turns.

    Half of the replicas, or of the places of a virtual pod, have the clean turn: a part counts twice in the mean over
    all of them.
    """

    def gradients(network: Network, stale: Network, loss: Loss, batch: Batch, carry: Carry) -> Update:
        clean, begun = batch.clean_turn, carry["begun"]
        images = tf.where(clean, batch.images, _pixels(carry["adversarial"]))
        labels = tf.where(clean, batch.labels, carry["adversarial_labels"])
        share = 2.0 * tf.where(clean, 1.0 - mixture.weight, mixture.weight * tf.cast(begun, tf.float32))
        ascended = ascended_by(attack, network.num_classes, loss, batch)
        gradients, by_image, value, top1 = training_pass(network, Turn(clean), loss, images, labels, begun, ascended)
        metrics = {"loss": share * value}
        for name, counts in (("clean", clean), ("adversarial", tf.logical_and(tf.logical_not(clean), begun))):
            count = 2.0 * tf.cast(counts, tf.float32)
            metrics |= {f"{name}_loss": count * value, f"{name}_top1": count * top1}
        crafted = _crafted(attack, mixture, batch, by_image)
        kept = {name: tf.where(clean, crafted[name], tf.cast(carry[name], crafted[name].dtype)) for name in crafted}
        return Update([share * gradient for gradient in gradients], metrics, kept)

    return gradients


def begin_phased(attack: Attack, mixture: Mixture) -> Begin:
    """The carry of `begin_paired` and the fresh batch, half of which the next update may still have to train on."""

    def begin(stale: Network, loss: Loss, batch: Batch) -> Carry:
        crafted = begin_paired(attack, mixture)(stale, loss, batch)
        return {"images": batch.images, "labels": batch.labels, **crafted}

    return begin


def _crafted(attack: Attack, mixture: Mixture, batch: Batch, by_image: tf.Tensor | None) -> Carry:
    """The carry of `paired`: x̂ from the gradient of the clean pass."""
    images, labels, *_ = attacked(mixture, batch)
    adversarial = attack.one_step(images, connected(by_image)[: images.shape[0]])
    return {"adversarial": adversarial, "adversarial_labels": labels, "begun": tf.constant(True)}


def _pixels(images: tf.Tensor | None) -> tf.Tensor | None:
    return None if images is None else tf.cast(images, tf.float32)


def _attack_apart(attack: Attack, mixture: Mixture) -> Passes:
    return {"train": 1 + mixture.augmented + mixture.fraction, "attack": mixture.fraction}


def _attack_within(attack: Attack, mixture: Mixture) -> Passes:
    return {_clean_pass(attack): 1, "train": mixture.augmented + mixture.fraction}


def _clean_pass(attack: Attack) -> str:
    return "train and attack" if attack.is_training_gradient else "train, then attack"


NO_AUGMENTED = Requirement(
    {"autoaugment.mode": ("replace",)}, "which has no pass for the augmented image", "an adversarial method"
)
_NO_SHUFFLE = Requirement(
    {"adversarial.shuffle": (False,)},
    "which trains on the x̂ of a micro-batch right after it is made",
    "schedule 'lookahead', which carries it",
)
_ONE_PASS = Requirement(
    {
        "attack.random_start_probability": (None, 0.0),
        "attack.steps": (1,),
        "attack.batch_norm": ("main",),
        "attack.compute_dtype": (None,),
    },
    "which makes x̂ from the clean pass at the clean images",
    "schedule 'shadow' or 'lookahead'",
)
_EQUAL_TURNS = Requirement(
    {"autoaugment.mode": ("replace",), "adversarial.fraction": (1.0,), "adversarial.start_epoch": (0,)},
    "where every replica does the same work at every update",
    "schedule 'paired'",
)

_NEXT = carrying("images", "labels", "augmented", "adversarial", "adversarial_labels")
_CRAFTED = carrying("adversarial", "adversarial_labels", "begun")
_BATCH_AND_CRAFTED = carrying("images", "labels", "adversarial", "adversarial_labels", "begun")

for _schedule in (
    Schedule("vanilla", vanilla, lambda: {"train": 1}, settings={}, requires=(NO_AUGMENTED,)),
    Schedule("disadv", shadow, _attack_apart, requires=(_NO_SHUFFLE,)),
    Schedule("shadow", shadow, _attack_apart, "conadv", delay=None, requires=(_NO_SHUFFLE,)),
    Schedule(
        "lookahead", lookahead, _attack_apart, "conadv", delay=1, carries=_NEXT, begin=begin_lookahead, batches_ahead=1
    ),
    Schedule(
        "paired",
        paired,
        _attack_within,
        "conadv",
        label="predicted",
        delay=1,
        carries=_CRAFTED,
        begin=begin_paired,
        requires=(_ONE_PASS,),
    ),
    Schedule(
        "phased",
        phased,
        lambda attack, mixture: {_clean_pass(attack): 1},
        "conadv",
        label="predicted",
        delay=1,
        carries=_BATCH_AND_CRAFTED,
        begin=begin_phased,
        updates_per_batch=2,
        requires=(_ONE_PASS, _EQUAL_TURNS),
    ),
):
    register(_schedule)
