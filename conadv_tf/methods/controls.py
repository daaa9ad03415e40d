"""Methods to hold ConAdv against: a control without an attack, and the regulariser that one might take instead.

    noise       x̂ = x ± ε of random sign, then the update of `shadow`: what the second branch and its images do alone
    sam         e = ρ g / ‖g‖ with g = ∇_θ mean L(θ_t; x, y), then g' = ∇_θ mean L(θ_t + e; x, y)
    sam_stale   g at θ_{t−1}: as ConAdv's attack, it need not wait for the update before

sam is sharpness-aware minimisation (Foret et al. 2021, arXiv 2010.01412, Eq. 2 and 3), over the variables that are
trained and the rows of a micro-batch ("m-sharpness", their section 3.2). Both passes are of the main branch.
"""

import dataclasses

import gin
import tensorflow as tf

from conadv_tf.errors import ConfigError
from conadv_tf.methods.attack import Attack
from conadv_tf.methods.interface import (
    Batch,
    Carry,
    Gradients,
    Loss,
    Passes,
    Requirement,
    Schedule,
    Update,
    register,
)
from conadv_tf.methods.mixture import Mixture
from conadv_tf.methods.passes import attacked, parts_of, train_on, training_pass
from conadv_tf.methods.schedules import NO_AUGMENTED
from conadv_tf.models import xla
from conadv_tf.models.moved import moved
from conadv_tf.models.network import Network
from conadv_tf.models.split_batchnorm import MAIN


@gin.configurable("sam")
@dataclasses.dataclass(frozen=True)
class Ascent:
    """The step to the weights at which sharpness-aware minimisation takes its gradient.

    Attributes:
      rho: ρ ≥ 0, length of the step over all trained variables; 0 is plain training.

    Raises:
      ConfigError: for a value out of range.
    """

    rho: float = 0.05

    def __post_init__(self):
        if not self.rho >= 0:
            raise ConfigError(f"sam.rho={self.rho} must be at least 0: the paper's is 0.05")


def noise(attack: Attack, mixture: Mixture) -> Gradients:
    """Training on the clean batch and on its images with ±ε of random sign, through the adversarial branch."""

    def gradients(network: Network, stale: Network, loss: Loss, batch: Batch, carry: Carry) -> Update:
        noisy = noisy_images(attack, network, loss, attacked(mixture, batch))
        gradients, metrics, _ = train_on(network, loss, parts_of(mixture, batch, noisy))
        return Update(gradients, metrics, {})

    return gradients


def noisy_images(attack: Attack, network: Network, loss: Loss, batch: Batch) -> tf.Tensor:
    """The batch's images with noise, float32 of their shape; network and loss have no part in it."""
    return attack.one_step(batch.images, xla.random_uniform(tf.shape(batch.images), batch.seed, -1.0, 1.0))


def sam(ascent: Ascent) -> Gradients:
    """Training on the gradient at θ_t + ρ g / ‖g‖, with g at the stale weights.

    The logs are of the second pass. Moving averages follow the first, or, where that is at older weights, the second.
    """

    def gradients(network: Network, stale: Network, loss: Loss, batch: Batch, carry: Carry) -> Update:
        weights, older = network.trainable_variables, _same_variables(stale, network)
        now = stale is network
        with moved(weights, [tf.identity(variable) for variable in older]):
            direction, *_ = training_pass(network, MAIN, loss, batch.images, batch.labels, learns=now)
        length = tf.math.divide_no_nan(ascent.rho, tf.linalg.global_norm(direction))
        direction, [images] = xla.barrier(direction, [batch.images])
        with moved(weights, [weight + length * way for weight, way in zip(weights, direction, strict=True)]):
            own, _, value, top1 = training_pass(network, MAIN, loss, images, batch.labels, learns=not now)
        return Update(own, {"loss": value, "clean_loss": value, "clean_top1": top1}, {})

    return gradients


def _same_variables(copy: Network, network: Network) -> list[tf.Variable]:
    """The variables of a copy that are trained in the network, in the order of its `trainable_variables`."""
    if copy is network:
        return network.trainable_variables
    pairs = zip(network.leaf_variables(), copy.leaf_variables(), strict=True)
    by_variable = {own.ref(): other for own, other in pairs}
    return [by_variable[variable.ref()] for variable in network.trainable_variables]


def _noise_passes(attack: Attack, mixture: Mixture) -> Passes:
    return {"train": 1 + mixture.augmented + mixture.fraction}


_NO_ATTACK = Requirement(
    {
        "attack.random_start_probability": (None,),
        "attack.label": ("auto",),
        "attack.steps": (1,),
        "attack.step_size_pixels": (None,),
        "attack.goal": ("untargeted",),
        "attack.batch_norm": ("main",),
        "attack.compute_dtype": (None,),
        "adversarial.shuffle": (False,),
    },
    "which has no attack but for the size and the norm of its noise",
    "schedule 'shadow'",
)
register(Schedule("noise", noise, _noise_passes, perturbed=noisy_images, requires=(_NO_ATTACK,)))
_SAM = Schedule("sam", sam, lambda ascent: {"train": 2}, settings={"sam": Ascent}, moves=True, requires=(NO_AUGMENTED,))
register(_SAM)
register(dataclasses.replace(_SAM, name="sam_stale", delay=1))
