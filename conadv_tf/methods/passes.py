"""What schedules are made of: training passes, their mixture, and the pass that makes x̂."""

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from conadv_tf.methods.attack import Attack, LogitsFunction, differentiated
from conadv_tf.methods.interface import Batch, Loss
from conadv_tf.methods.mixture import Mixture
from conadv_tf.models import xla
from conadv_tf.models.moved import read
from conadv_tf.models.network import Network
from conadv_tf.models.split_batchnorm import ADVERSARIAL, AUGMENTED, MAIN, Turn

# A scalar of logits [rows, classes].
Objective = Callable[[tf.Tensor], tf.Tensor]


class Part(NamedTuple):
    """A pass of an update.

    `share` is its weight in the loss; `learns` whether BN's moving averages follow it; `ascended` what ∇_x is asked of,
    None for the loss itself.
    """

    name: str
    branch: str
    share: float | tf.Tensor
    images: tf.Tensor
    labels: tf.Tensor
    learns: bool | tf.Tensor = True
    ascended: Objective | None = None


def training_pass(
    network: Network,
    branch: str | Turn,
    loss: Loss,
    images: tf.Tensor,
    labels: tf.Tensor,
    learns: bool | tf.Tensor = True,
    ascended: Objective | None = None,
):
    """Gradients of the mean loss of one pass through `branch`, ∇_x, the mean loss and top-1 in [0, 1].

    ∇_x is that of the loss, out of the same backward pass, or of what is `ascended`, by a second one to the images; it
    is None where no gradient reaches them.
    Within `moved` the pass and its gradients are at the weights that are given there.
    """
    variables = [read(variable) for variable in network.trainable_variables]
    with tf.GradientTape(persistent=ascended is not None) as tape:
        tape.watch([images, *variables])
        logits = network(images, branch=branch, mode="batch", update_statistics=learns)
        value = tf.reduce_mean(loss(labels, logits))
        objective = value if ascended is None else ascended(logits)
    if ascended is None:
        *found, by_image = differentiated(tape, value, [*variables, images])
    else:
        found, by_image = differentiated(tape, value, variables), differentiated(tape, objective, images)
    correct = tf.equal(tf.argmax(logits, 1, output_type=labels.dtype), labels)
    own = [tf.zeros_like(v) if gradient is None else gradient for v, gradient in zip(variables, found, strict=True)]
    return own, by_image, value, tf.reduce_mean(tf.cast(correct, tf.float32))


def train_on(network: Network, loss: Loss, parts: list[Part]):
    """The mixed gradient of the passes, their metrics, and ∇_x of the first pass."""
    mixed: list[tf.Tensor] = []
    metrics: dict[str, tf.Tensor] = {"loss": tf.constant(0.0)}
    by_image = None
    for part in parts:
        # One tape per pass, and one pass after the other: the activations of one are freed before the next begins.
        mixed, [images] = xla.barrier(mixed, [part.images])
        own, own_by_image, value, top1 = training_pass(
            network, part.branch, loss, images, part.labels, part.learns, part.ascended
        )
        by_image = own_by_image if by_image is None else by_image
        own = [part.share * gradient for gradient in own]
        mixed = [m + g for m, g in zip(mixed, own, strict=True)] if mixed else own
        metrics |= {
            "loss": metrics["loss"] + part.share * value,
            f"{part.name}_loss": value,
            f"{part.name}_top1": top1,
        }
    return mixed, metrics, by_image


def attacked(mixture: Mixture, batch: Batch) -> Batch:
    """The rows of the batch that are made adversarial."""
    rows = mixture.attacked_rows(batch.images.shape[0])
    return Batch(batch.images[:rows], batch.labels[:rows], batch.seed)


def parts_of(mixture: Mixture, batch: Batch, adversarial: tf.Tensor) -> list[Part]:
    """The passes of an update, the adversarial one last; an augmented image shares the clean one's weight equally."""
    share = (1 - mixture.weight) / 2 if mixture.augmented else 1 - mixture.weight
    parts = [Part("clean", MAIN, share, batch.images, batch.labels)]
    if mixture.augmented:
        parts.append(Part("augmented", AUGMENTED, share, batch.augmented, batch.labels))
    labels = attacked(mixture, batch).labels
    return [*parts, Part("adversarial", ADVERSARIAL, mixture.weight, adversarial, labels)]


def attacked_logits(attack: Attack, network: Network) -> LogitsFunction:
    """`network` as the attack looks through it, which leaves no trace in it."""
    branch = ADVERSARIAL if attack.batch_norm == "aux" else MAIN
    mode = "moving" if attack.batch_norm == "moving" else "batch"
    silent = {"update_statistics": False, "synchronize": False}

    def logits(images: tf.Tensor) -> tf.Tensor:
        return network(images, branch=branch, mode=mode, activation_dtype=attack.compute_dtype, **silent)

    return logits


def attack_images(attack: Attack, network: Network, loss: Loss, batch: Batch) -> tf.Tensor:
    """x̂ of the batch at the weights of `network`."""
    logits = attacked_logits(attack, network)
    return attack.adversarial_examples(logits, network.num_classes, loss, batch.images, batch.labels, batch.seed)


def ascended_by(attack: Attack, num_classes: int, loss: Loss, batch: Batch) -> Objective | None:
    """What the attack ascends, of the logits of the batch; None where that is the training loss."""
    if attack.is_training_gradient:
        return None
    aim = attack.aim(batch.labels, num_classes, batch.seed)
    return lambda logits: attack.objective(loss, logits, aim)[0]
