"""Learning rate: linear warm-up from 0 to the peak, then polynomial decay (docs/method.md)."""

import gin
import tensorflow as tf
import tf_keras
from official.modeling.optimization import lr_schedule

from conadv_tf.errors import ConfigError
from conadv_tf.training.other_keras import is_of_other_keras, other_keras


class WarmupPolyDecay(tf_keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up from 0 to the peak, then polynomial decay; a function of the number of updates made.

    Args:
      warmup_steps: updates of the warm-up; 0: none.
      peak_learning_rate: the rate after them.
      decay_steps: updates in which the decay reaches `end_learning_rate`.
      end_learning_rate: the rate at the end.
      power: the power of the decay polynomial.
    """

    def __init__(
        self, warmup_steps: int, peak_learning_rate: float, decay_steps: int, end_learning_rate: float, power: float
    ):
        super().__init__()
        self.warmup_steps, self.end_learning_rate = warmup_steps, end_learning_rate
        self._config = {"peak_learning_rate": peak_learning_rate, "decay_steps": decay_steps, "power": power}
        # This pair equals MLPerf's curve at every step; a PolynomialDecay without offset has a wrong peak.
        decay = lr_schedule.PolynomialDecayWithOffset(
            offset=warmup_steps,
            initial_learning_rate=peak_learning_rate,
            decay_steps=decay_steps,
            end_learning_rate=end_learning_rate,
            power=power,
        )
        self._rate = lr_schedule.LinearWarmup(decay, warmup_steps, 0.0) if warmup_steps else decay

    def __call__(self, step) -> tf.Tensor:
        return self._rate(step)

    def get_config(self) -> dict:
        # Those of the two inside leave out the offset, and what kind the other one is.
        return {"warmup_steps": self.warmup_steps, "end_learning_rate": self.end_learning_rate, **self._config}


@gin.configurable("learning_rate", denylist=["steps_per_epoch", "total_steps"])
def warmup_poly_decay(
    steps_per_epoch: int,
    total_steps: int,
    peak_learning_rate: float = 10.0,
    warmup_epochs: float = 5,
    end_learning_rate: float = 1e-4,
    power: float = 2.0,
) -> WarmupPolyDecay:
    """The schedule of a run, a function of the number of updates made.

    Args:
      steps_per_epoch: updates in an epoch.
      total_steps: updates in the run; the decay would reach `end_learning_rate` two steps after the last.
      peak_learning_rate: the rate at the end of the warm-up, > 0.
      warmup_epochs: the epochs of linear warm-up from 0, ≥ 0 and shorter than the run; may be fractional.
      end_learning_rate: the rate that the decay ends at, ≥ 0 and at most the peak.
      power: the power of the decay polynomial, > 0.

    Raises:
      ConfigError: if one of these is out of range.
    """
    warmup_steps = round(warmup_epochs * steps_per_epoch)
    if not peak_learning_rate > 0:
        raise ConfigError(
            f"learning_rate.peak_learning_rate={peak_learning_rate} must be above 0: Table 6 has 35 to 43"
        )
    if warmup_epochs < 0 or warmup_steps >= total_steps:
        raise ConfigError(
            f"learning_rate.warmup_epochs={warmup_epochs} is outside the run of {total_steps / steps_per_epoch:g} "
            "epochs: shorten the warm-up or lengthen train.epochs"
        )
    if not 0 <= end_learning_rate <= peak_learning_rate or not power > 0:
        raise ConfigError(
            f"learning_rate.end_learning_rate={end_learning_rate} must lie in [0, {peak_learning_rate}] and "
            f"learning_rate.power={power} above 0"
        )
    return WarmupPolyDecay(
        warmup_steps,
        float(peak_learning_rate),
        total_steps - warmup_steps + 1,
        float(end_learning_rate),
        float(power),
    )


def peak_of(schedule: WarmupPolyDecay) -> tuple[int, float]:
    """(updates of the warm-up, peak learning rate) of a schedule."""
    return schedule.warmup_steps, float(schedule(schedule.warmup_steps))


def has_schedule(optimizer) -> bool:
    """Tells whether the learning rate of an optimizer is a function of the updates made, not a number."""
    # Of a schedule Keras' newer optimizers show the present rate alone; the configuration has the schedule.
    return callable(optimizer.learning_rate) or isinstance(optimizer.get_config().get("learning_rate"), dict)


def next_rate(optimizer):
    """The learning rate of an optimizer's next update, a number or a scalar, whether it has a schedule or not."""
    rate = optimizer.learning_rate
    return rate(optimizer.iterations) if callable(rate) else rate


class RebuiltWithSchedule:
    """An optimizer whose learning rate is a number or a schedule of tf_keras; made anew it has the schedule again.

    Raises:
      ConfigError: for a schedule of Keras 3.
    """

    def __init__(self, learning_rate, *args, **kwargs):
        if is_of_other_keras(learning_rate):
            raise other_keras("learning_rate", learning_rate)
        super().__init__(learning_rate, *args, **kwargs)

    @classmethod
    def from_config(cls, config: dict, custom_objects: dict | None = None):
        rate = config["learning_rate"]
        # Keras' legacy optimizers do this themselves, and do not find a schedule by its module.
        if isinstance(rate, dict):
            rate = tf_keras.saving.deserialize_keras_object(rate, custom_objects)
        return cls(**{**config, "learning_rate": rate})
