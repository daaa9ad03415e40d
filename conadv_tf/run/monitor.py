"""The theory monitor: what Lemma 1 and Theorem 1 of the paper speak of, measured while a run trains.

Lemma 1 bounds how far stale adversarial examples are from fresh ones by L_xθ/μ · ‖θ_t − θ_{t−τ}‖, with the Lipschitz
constant L_xθ of Assumption 1; Theorem 1 bounds the mean of ‖∇L(θ_t)‖² over the updates. Nothing here changes
a variable.
"""

import dataclasses
from collections.abc import Callable, Sequence

import gin
import numpy as np
import tensorflow as tf
import tf_keras

from conadv_tf.errors import keep_whole_number
from conadv_tf.methods import passes
from conadv_tf.methods.attack import Attack
from conadv_tf.models.network import Network
from conadv_tf.models.split_batchnorm import ADVERSARIAL
from conadv_tf.run.folder import recorded
from conadv_tf.training.metrics import distance

# The seed of the wrong labels that a targeted attack aims at: the same labels whenever the monitor looks.
TARGET_SEED = (0, 0)


@gin.configurable("monitor")
@dataclasses.dataclass(frozen=True)
class MonitorSettings:
    """Settings of the measurements: how often, and on how many images.

    Attributes:
      every_epochs: epochs between two measurements; the last epoch always has one. 0: about ten measurements a run.
      images: the number of clean training images measured, always the same ones, in one batch on every replica; fewer
        where there are fewer.
    """

    every_epochs: int = 0
    images: int = 64

    def __post_init__(self):
        keep_whole_number(self, "monitor", "every_epochs", 0, ": 0 makes about ten a run")
        keep_whole_number(self, "monitor", "images", 1)


class TheoryMonitor(tf_keras.callbacks.Callback):
    """Adds the values of `staleness_of` and theory_mean_squared_gradient_norm to the logs of the epochs due.

    theory_mean_squared_gradient_norm is the mean of ‖g_t‖² over all updates of the run so far, with the gradient g_t of
    update t's batch as the optimizer gets it: Theorem 1's left side plus the variance of g_t. It is left out where
    the value of an earlier epoch is not known. The rest is for methods that attack old weights.

    Args:
      settings: how often, and on how many images.
      epochs: epochs of the whole run.
      examples: (images [n, H, W, C] in [0, 255], labels int [n]) to measure staleness on; None: it is not measured.
      earlier: a dict an epoch before the first one of this fit, as metrics.jsonl holds them.
    """

    def __init__(
        self,
        settings: MonitorSettings,
        epochs: int,
        examples: tuple[np.ndarray, np.ndarray] | None,
        earlier: Sequence[dict] = (),
    ):
        super().__init__()
        self._every = settings.every_epochs or max(1, epochs // 10)
        self._epochs, self._examples = epochs, examples
        self._squares: list = [line.get("squared_gradient_norm") for line in earlier]
        self._measure: Callable | None = None

    def on_epoch_end(self, epoch: int, logs=None) -> None:
        # Rounded as in metrics.jsonl, so that a run that goes on from its records has the same average.
        self._squares.append(recorded(logs["squared_gradient_norm"]))
        if (epoch + 1) % self._every != 0 and epoch + 1 != self._epochs:
            return
        if len(self._squares) == epoch + 1 and None not in self._squares:
            logs["theory_mean_squared_gradient_norm"] = float(np.mean(self._squares))
        if self._examples is not None and self.model.method.attacks_stale_weights:
            self._measure = self._measure or self.model.inspection(staleness_of(self.model.method.attack))
            logs.update({name: float(value) for name, value in self._measure(*self._examples).items()})


def staleness_of(attack: Attack) -> Callable[..., dict[str, tf.Tensor]]:
    """Makes the measurement of an attack's staleness.

    It is a function of (network at θ_t, network at θ_{t−τ}, loss, images, labels). The images are [n, H, W, C] in
    [0, 255] of any numeric dtype, the labels int [n], and `loss` maps (labels, logits) to
    float32 [n]. The input gradient of an image is that of what the attack ascends, at the image itself. x̂ is one step
    of the attack's size along it, without random start: fresh from θ_t, stale from θ_{t−τ}. It returns float32 scalars:

      theory_drift: ‖θ_t − θ_{t−τ}‖ over all trained variables.
      theory_lipschitz_x_theta: mean over the images of ‖∇_x L(θ_t) − ∇_x L(θ_{t−τ})‖, by theory_drift: a lower bound
        of the L_xθ of Assumption 1. Loss per pixel level (0..255) and unit of weight; 0 without drift.
      theory_equal_signs: share of pixels and channels, in [0, 1], where both gradients have the same sign; 0 has
        one of its own, so that two zeros are equal.
      theory_fresh_loss, theory_stale_loss: mean training loss at θ_t of fresh and stale x̂, through the adversarial
        branch with the statistics of this batch.
      theory_perturbation_distance: mean over the images of ‖x̂_fresh − x̂_stale‖, in pixel levels.
    """

    def staleness(network: Network, stale: Network, loss, images, labels) -> dict[str, tf.Tensor]:
        images, labels = tf.cast(images, tf.float32), tf.cast(labels, tf.int32)
        gradients = [_input_gradient(attack, weights, loss, images, labels) for weights in (network, stale)]
        fresh, old = (attack.one_step(images, gradient) for gradient in gradients)
        drift = distance(network, stale)
        equal = tf.equal(tf.sign(gradients[0]), tf.sign(gradients[1]))
        return {
            "theory_drift": drift,
            "theory_lipschitz_x_theta": tf.math.divide_no_nan(_mean_length(gradients[0] - gradients[1]), drift),
            "theory_equal_signs": tf.reduce_mean(tf.cast(equal, tf.float32)),
            "theory_fresh_loss": _adversarial_loss(network, loss, fresh, labels),
            "theory_stale_loss": _adversarial_loss(network, loss, old, labels),
            "theory_perturbation_distance": _mean_length(fresh - old),
        }

    return staleness


def _input_gradient(attack: Attack, network: Network, loss, images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """∇_x of what the attack ascends for each image, through the batch norm that the attack looks through."""
    aim = attack.aim(labels, network.num_classes, tf.constant(TARGET_SEED))
    return attack.gradient(passes.attacked_logits(attack, network), loss, images, aim)[0]


def _adversarial_loss(network: Network, loss, images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    # Not synchronised: every replica has the same images, whose statistics are the group's.
    logits = network(images, branch=ADVERSARIAL, mode="batch", update_statistics=False, synchronize=False)
    return tf.reduce_mean(loss(labels, logits))


def _mean_length(values: tf.Tensor) -> tf.Tensor:
    """Mean over the images of the Euclidean norm of [n, H, W, C]."""
    return tf.reduce_mean(tf.sqrt(tf.reduce_sum(tf.square(values), axis=[1, 2, 3])))
