"""Runs that diverge: an update that is not finite is not applied, is named, and may be tried again at a lower peak.

The trainer sees to it, on the device, that nothing is overwritten. This module is the host's part: it notices the
update, says what was not finite, and decides how the run goes on.
"""

import dataclasses
import math
import time

import gin
import numpy as np
import tf_keras

from conadv_tf.errors import ConfigError, RunError, keep_whole_number
from conadv_tf.training.lars import is_adapted
from conadv_tf.training.learning_rate import next_rate
from conadv_tf.training.trainer import ConAdvModel

# Seconds between two looks, each of which waits for the device.
CHECK_SECONDS = 0.5


@gin.configurable("divergence")
@dataclasses.dataclass(frozen=True)
class DivergenceSettings:
    """Settings of a run's answer to an update that is not finite.

    Attributes:
      retries: the times that a run may go back to the last checkpoint and on with a lower peak; 0: the run ends.
      peak_factor: factor of the peak learning rate each time, in (0, 1).
    """

    retries: int = 0
    peak_factor: float = 0.5

    def __post_init__(self):
        keep_whole_number(self, "divergence", "retries", 0, ", which ends a run that diverges")
        if not 0 < self.peak_factor < 1:
            raise ConfigError(f"divergence.peak_factor={self.peak_factor} is outside (0, 1): half the peak is 0.5")


class Diverged(RunError):  # noqa: N818 (a run has diverged)
    """An update whose loss, gradient or batch statistics are not finite.

    Args:
      facts: what result.json says of it: update (from 1), not_finite, learning_rate, largest_trust_ratio and the layer
        that has it (None before the first update, and where all are one).
      epoch: the epoch of the update, from 0.
      retries: how often the run has gone back already.
    """

    def __init__(self, facts: dict, epoch: int, retries: int = 0):
        self.facts, self._epoch = facts, epoch
        self.text = (
            f"{facts['not_finite']} not finite at update {facts['update']:,} (epoch {epoch + 1}), learning rate "
            f"{facts['learning_rate']:.3g}"
        )
        if facts["largest_trust_ratio_of"]:
            ratio = f"{facts['largest_trust_ratio']:.3g} of {facts['largest_trust_ratio_of']}"
            self.text += f", largest trust ratio of the update before {ratio}"
        used_up = f", and divergence.retries={retries} is used up" if retries else ""
        super().__init__(
            f"{self.text}{used_up}: lower learning_rate.peak_learning_rate or lengthen learning_rate.warmup_epochs, in "
            f"a new --model_dir, or go on from the last checkpoint with divergence.retries={retries + 1}"
        )

    def after(self, retries: int) -> "Diverged":
        """An error like this one, for a run that has gone back `retries` times."""
        return Diverged(self.facts, self._epoch, retries)


class StopIfDiverged(tf_keras.callbacks.Callback):
    """Ends a run with an update that is not finite before its epoch is evaluated, recorded or saved.

    Args:
      within_epochs: whether to look within an epoch too, each CHECK_SECONDS. Not where several workers train: each has
        a clock of its own, and the others would wait for one that has ended. Nothing is lost, as the rest of such an
        epoch is not applied.

    Raises:
      Diverged: from within fit; weights are those before that update, and the last checkpoint stays the last one.
    """

    _supports_tf_logs = True

    def __init__(self, within_epochs: bool = True):
        super().__init__()
        self._within_epochs = within_epochs
        self._checked = time.perf_counter()

    def on_epoch_begin(self, epoch: int, logs=None) -> None:
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs=None) -> None:
        if self._within_epochs and time.perf_counter() - self._checked > CHECK_SECONDS:
            self._checked = time.perf_counter()
            check(self.model, logs, self._epoch)

    def on_epoch_end(self, epoch: int, logs=None) -> None:
        check(self.model, logs, epoch)


def check(model: ConAdvModel, logs: dict, epoch: int) -> None:
    """Looks for an update that was not finite.

    Args:
      model: the model that trains.
      logs: means over the epoch so far.
      epoch: the epoch, from 0.

    Raises:
      Diverged: if an update of the epoch was not finite.
    """
    # The logs are means over the epoch: a value that was not finite once still shows.
    bad = [name for name, value in logs.items() if not math.isfinite(float(value))]
    if not bad:
        return
    layer, ratio = _largest_trust_ratio(model)
    facts = {
        "update": model.updates_made() + 1,
        "not_finite": _what(bad),
        "learning_rate": float(f"{float(next_rate(model.optimizer)):.6g}"),
        "largest_trust_ratio": ratio,
        "largest_trust_ratio_of": layer,
    }
    raise Diverged(facts, epoch)


def _what(bad: list[str]) -> str:
    """Subject and verb for the names of the logs that are not finite."""
    losses = [f"the {name.replace('_', ' ')}" for name in bad if name.endswith("_loss")]
    if losses:
        return f"{' and '.join(losses)} {'are' if len(losses) > 1 else 'is'}"
    if any(name.endswith("gradient_norm") for name in bad):
        return "the gradient is"
    return "a batch variance is" if "batch_statistics_max" in bad else "the norm of the weights is"


def _largest_trust_ratio(model: ConAdvModel) -> tuple[str | None, float | None]:
    """The kernel with the largest trust ratio of the last update applied, and that ratio; None where all are one."""
    paths = {variable.ref(): path for path, variable in model.network.named_variables().items()}
    names = [paths[variable.ref()] for variable in model.network.trainable_variables if is_adapted(variable)]
    ratios = model.metrics[0].ratios.numpy()
    if np.ptp(ratios) == 0:
        return None, None
    return names[int(np.argmax(ratios))], float(f"{np.max(ratios):.6g}")
