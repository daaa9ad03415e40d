"""The optimizers that recipes choose from, and an update of any optimizer that a condition can hold back.

LARS and SGD are lars.py's. AdamW and LAMB are tf-models', for networks such as ConvNeXt; RMSprop is tf_keras', for
EfficientNets. None of them decays (LAMB: nor adapts to) biases and the γ and β of normalisation.
"""

from collections.abc import Sequence
from typing import Any

import gin
import tensorflow as tf
import tf_keras
from official.modeling.optimization import lamb as tfm_lamb
from official.modeling.optimization import legacy_adamw as tfm_adamw

from conadv_tf.errors import ConfigError
from conadv_tf.training.lars import LARS, is_adapted, make_lars, make_sgd
from conadv_tf.training.learning_rate import RebuiltWithSchedule

# Patterns of the names of what is neither decayed nor adapted.
NOT_DECAYED = ("gamma", "beta", "bias")


class AdamW(RebuiltWithSchedule, tfm_adamw.AdamWeightDecay):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101).

        w ← w − lr β w, kernels only;  m, v ← Adam's moments of g;  w ← w − lr √(1 − β₂ᵗ) / (1 − β₁ᵗ) · m / (√v + ε)

    Args:
      learning_rate: a number or a schedule of the update count.
      beta_1, beta_2: Adam's.
      epsilon: ε, which its paper calls ε̂ (before section 2.1).
      weight_decay_rate: β.
    """

    def __init__(
        self,
        learning_rate=0.001,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-8,
        weight_decay_rate=0.05,
        name="AdamW",
        **kwargs,
    ):
        settings = {"exclude_from_weight_decay": NOT_DECAYED, "gradient_clip_norm": 0.0, **kwargs}
        super().__init__(
            learning_rate, beta_1, beta_2, epsilon, weight_decay_rate=weight_decay_rate, name=name, **settings
        )


class LAMB(RebuiltWithSchedule, tfm_lamb.LAMB):
    """Adam's direction with decay, scaled to the norm of each kernel (You et al. 2020, arXiv 1904.00962, Algorithm 2).

        r = m̂ / (√v̂ + ε) + β w;  w ← w − lr ‖w‖ / ‖r‖ · r, kernels;  w ← w − lr m̂ / (√v̂ + ε), the rest

    Args: see `AdamW`; epsilon is that of the formula.
    """

    def __init__(
        self, learning_rate=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-6, weight_decay_rate=0.05, name="LAMB", **kwargs
    ):
        settings = {"exclude_from_weight_decay": NOT_DECAYED, **kwargs}
        super().__init__(learning_rate, beta_1, beta_2, epsilon, weight_decay_rate, name=name, **settings)


class RMSprop(RebuiltWithSchedule, tf_keras.optimizers.legacy.RMSprop):
    """RMSProp with momentum and L2 decay, as EfficientNets are trained (Tan and Le 2019, arXiv 1905.11946, 5.2).

        g ← g + β w, kernels only;  r ← ρ r + (1 − ρ) g²;  v ← m v + lr g / √(r + ε);  w ← w − v

    Args:
      learning_rate: a number or a schedule of the update count.
      rho: ρ.
      momentum: m.
      epsilon: ε.
      weight_decay_rate: β.
    """

    def __init__(
        self,
        learning_rate=0.001,
        rho=0.9,
        momentum=0.9,
        epsilon=1e-3,
        weight_decay_rate=1e-5,
        name="RMSprop",
        **kwargs,
    ):
        super().__init__(learning_rate, rho, momentum, epsilon, name=name, **kwargs)
        self.weight_decay_rate = weight_decay_rate

    def _resource_apply_dense(self, grad, var, apply_state=None):
        # The signature is tf_keras' legacy optimizer's.
        decayed = grad + self.weight_decay_rate * tf.convert_to_tensor(var) if is_adapted(var) else grad
        return super()._resource_apply_dense(decayed, var, apply_state)

    def get_config(self) -> dict:
        config = super().get_config()
        del config["centered"]
        return {**config, "weight_decay_rate": self.weight_decay_rate}


@gin.configurable("adamw", denylist=["learning_rate"])
def make_adamw(
    learning_rate, beta_1: float = 0.9, beta_2: float = 0.999, epsilon: float = 1e-8, weight_decay: float = 0.05
) -> AdamW:
    """AdamW; the defaults are those of ConvNeXt's training (Liu et al. 2022, arXiv 2201.03545, Table 5).

    Args:
      learning_rate: the rate, or the schedule of the rate.
      beta_1: the decay of the first moment, in [0, 1).
      beta_2: the decay of the second moment, in [0, 1).
      epsilon: what is added to the root of the second moment, > 0.
      weight_decay: the decay of the kernels, ≥ 0, times the rate.
    """
    _check("adamw", epsilon, weight_decay, beta_1=beta_1, beta_2=beta_2)
    return AdamW(learning_rate, beta_1, beta_2, epsilon, weight_decay)


@gin.configurable("lamb", denylist=["learning_rate"])
def make_lamb(
    learning_rate, beta_1: float = 0.9, beta_2: float = 0.999, epsilon: float = 1e-6, weight_decay: float = 0.01
) -> LAMB:
    """LAMB; the defaults are the paper's (You et al. 2020).

    Args:
      learning_rate: the rate, or the schedule of the rate.
      beta_1: the decay of the first moment, in [0, 1).
      beta_2: the decay of the second moment, in [0, 1).
      epsilon: what is added to the root of the second moment, > 0.
      weight_decay: β ≥ 0 of the kernels.
    """
    _check("lamb", epsilon, weight_decay, beta_1=beta_1, beta_2=beta_2)
    return LAMB(learning_rate, beta_1, beta_2, epsilon, weight_decay)


@gin.configurable("rmsprop", denylist=["learning_rate"])
def make_rmsprop(
    learning_rate, rho: float = 0.9, momentum: float = 0.9, epsilon: float = 1e-3, weight_decay: float = 1e-5
) -> RMSprop:
    """RMSProp with momentum; the defaults are those of EfficientNet's training (arXiv 1905.11946; ε of its code).

    Args:
      learning_rate: the rate, or the schedule of the rate.
      rho: the decay of the mean of squared gradients, in [0, 1).
      momentum: the momentum, in [0, 1).
      epsilon: what is added to that mean, > 0.
      weight_decay: the L2 decay of the kernels, ≥ 0.
    """
    _check("rmsprop", epsilon, weight_decay, rho=rho, momentum=momentum)
    return RMSprop(learning_rate, rho, momentum, epsilon, weight_decay)


def _check(optimizer: str, epsilon: float, weight_decay: float, **shares: float) -> None:
    for name, value in shares.items():
        if not 0 <= value < 1:
            raise ConfigError(f"{optimizer}.{name}={value} is outside [0, 1)")
    if not epsilon > 0 or weight_decay < 0:
        raise ConfigError(
            f"{optimizer}.epsilon={epsilon} must be above 0 and {optimizer}.weight_decay={weight_decay} not negative"
        )


OPTIMIZERS = {"lars": make_lars, "sgd": make_sgd, "adamw": make_adamw, "lamb": make_lamb, "rmsprop": make_rmsprop}


def variables_of(optimizer: tf_keras.optimizers.Optimizer) -> list[tf.Variable]:
    """The variables that an optimizer has made so far."""
    own: Any = optimizer.variables  # a method of Keras' legacy optimizers
    return list(own() if callable(own) else own)


def apply_if(
    optimizer: tf_keras.optimizers.Optimizer,
    condition: tf.Tensor,
    gradients: Sequence[tf.Tensor],
    variables: Sequence[tf.Variable],
) -> None:
    """Applies gradients that are summed over replicas; where `condition`, a bool scalar, is false, nothing changes.

    Runs in a replica, under a condition that all replicas share. The optimizer's variables exist.
    """
    pairs = zip(gradients, variables, strict=True)
    if isinstance(optimizer, LARS):
        optimizer.apply_if(condition, pairs)  # within the update of each variable, so that XLA fuses it
        return
    held = [*variables, *variables_of(optimizer)]
    before = [tf.identity(variable) for variable in held]
    optimizer.apply_gradients(pairs, experimental_aggregate_gradients=False)

    def restore(strategy: tf.distribute.Strategy, condition, before) -> None:
        for variable, value in zip(held, before, strict=True):
            strategy.extended.update(variable, _restore_unless, args=(condition, value), group=False)

    tf.distribute.get_replica_context().merge_call(restore, args=(condition, before))


def _restore_unless(variable: tf.Variable, condition: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
    return variable.assign(tf.where(condition, variable, value))
