"""LARS with the trust ratio of the paper, and momentum SGD as its special case without adaptation."""

import gin
import tensorflow as tf
from official.modeling.optimization import lars as tfm_lars

from conadv_tf.errors import ConfigError
from conadv_tf.training.learning_rate import RebuiltWithSchedule

# λ = η‖w‖ / (‖g‖ + β‖w‖ + ε_L): keeps the ratio finite where the gradient and the decay vanish.
EPSILON = 1e-9


class LARS(RebuiltWithSchedule, tfm_lars.LARS):
    """Layer-wise adaptive rate scaling (You et al. 2017), as in the paper and MLPerf (docs/method.md).

        λ = η‖w‖ / (‖g‖ + β‖w‖ + ε_L), 1 if either norm is 0
        v ← m v + lr · λ · (g + β w);  w ← w − v

    tf-models' LARS has λ = η‖w‖ / ‖g + βw‖ and picks its exceptions by names; here the exceptions are what
    they are: variables of rank 1, i.e. BN's γ and β and the biases, get neither decay nor adaptation.

    Args:
      learning_rate: a number or a schedule of the update count.
      momentum: m, 0 ≤ m < 1.
      weight_decay: β ≥ 0.
      trust_coefficient: η > 0, or None for λ = 1 everywhere (momentum SGD with L2 decay).
    """

    def __init__(
        self,
        learning_rate=0.01,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        trust_coefficient: float | None = 0.001,
        name: str = "LARS",
        **kwargs,
    ):
        super().__init__(
            learning_rate,
            momentum=momentum,
            weight_decay_rate=weight_decay,
            eeta=trust_coefficient,
            name=name,
            **kwargs,
        )
        self._applies: tf.Tensor | None = None

    def apply_if(self, condition: tf.Tensor, grads_and_vars) -> None:
        """Applies gradients that are summed over replicas; where `condition`, a bool scalar, is false, nothing changes.

        Runs in a replica, under a condition that all replicas share.
        """
        self._applies = condition
        self.apply_gradients(grads_and_vars, experimental_aggregate_gradients=False)
        self._applies = None
        self.iterations.assign_sub(1 - tf.cast(condition, self.iterations.dtype))

    def _resource_apply_dense(self, grad, param, apply_state=None):
        # The signature is tf_keras' legacy optimizer's; it runs once per variable and replica.
        coefficients = (apply_state or {}).get((param.device, param.dtype.base_dtype))
        coefficients = coefficients or self._fallback_apply_state(param.device, param.dtype.base_dtype)
        velocity = self.get_slot(param, "momentum")
        weights = tf.convert_to_tensor(param)
        ratio = self.trust_ratio(weights, grad)
        decayed = grad + self.weight_decay_rate * weights if is_adapted(weights) else grad
        next_velocity = self.momentum * velocity + coefficients["lr_t"] * ratio * decayed
        next_weights = weights - next_velocity
        if self._applies is not None:
            # Not tf.cond: within the update of a variable it would keep XLA from fusing it.
            next_velocity = tf.where(self._applies, next_velocity, velocity)
            next_weights = tf.where(self._applies, next_weights, weights)
        return tf.group(velocity.assign(next_velocity), param.assign(next_weights))

    def trust_ratio(self, weights: tf.Tensor, gradient: tf.Tensor) -> tf.Tensor:
        """λ of one variable, float32 scalar; 1 for variables that are not adapted."""
        if self.eeta is None or not is_adapted(weights):
            return tf.constant(1.0)
        weight_norm, gradient_norm = tf.norm(weights), tf.norm(gradient)
        ratio = self.eeta * weight_norm / (gradient_norm + self.weight_decay_rate * weight_norm + EPSILON)
        return tf.where((weight_norm > 0) & (gradient_norm > 0), ratio, 1.0)

    def get_config(self) -> dict:
        config = super().get_config()
        for name in ("weight_decay_rate", "eeta", "nesterov", "classic_momentum"):
            del config[name]
        return {**config, "weight_decay": self.weight_decay_rate, "trust_coefficient": self.eeta}


def is_adapted(variable) -> bool:
    """Tells whether LARS decays and adapts a variable: kernels (rank ≥ 2), not γ, β or biases (rank 1)."""
    return len(variable.shape) > 1


@gin.configurable("lars", denylist=["learning_rate"])
def make_lars(
    learning_rate, momentum: float = 0.9, weight_decay: float = 5e-4, trust_coefficient: float = 0.001
) -> LARS:
    """LARS; the defaults are Table 6 of the paper.

    Args:
      learning_rate: the rate, or the schedule of the rate.
      momentum: m in [0, 1).
      weight_decay: β ≥ 0 of the kernels.
      trust_coefficient: η > 0.
    """
    if not trust_coefficient > 0:
        raise ConfigError(f"lars.trust_coefficient={trust_coefficient} must be above 0 (the paper's is 0.001)")
    _check("lars", momentum, weight_decay)
    return LARS(learning_rate, momentum, weight_decay, trust_coefficient)


@gin.configurable("sgd", denylist=["learning_rate"])
def make_sgd(learning_rate, momentum: float = 0.9, weight_decay: float = 5e-4) -> LARS:
    """SGD with momentum and L2 decay of the kernels: v ← m v + lr (g + β w); w ← w − v.

    Args:
      learning_rate: the rate, or the schedule of the rate.
      momentum: m in [0, 1).
      weight_decay: β ≥ 0 of the kernels.
    """
    _check("sgd", momentum, weight_decay)
    return LARS(learning_rate, momentum, weight_decay, trust_coefficient=None, name="SGD")


def _check(optimizer: str, momentum: float, weight_decay: float) -> None:
    if not 0 <= momentum < 1:
        raise ConfigError(f"{optimizer}.momentum={momentum} is outside [0, 1): the paper's is 0.9")
    if weight_decay < 0:
        raise ConfigError(f"{optimizer}.weight_decay={weight_decay} must not be negative: the paper's is 5e-4")
