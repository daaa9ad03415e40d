"""The part that adversarial examples have in an update."""

import dataclasses

import gin

from conadv_tf.errors import ConfigError, keep_whole_number


@gin.configurable("adversarial", denylist=["augmented"])
@dataclasses.dataclass(frozen=True)
class Mixture:
    """Clean, augmented and adversarial images of an update, and the weights of their losses.

    Attributes:
      weight: w of the adversarial loss, in [0, 1]. The clean loss has 1 − w; a clean and an augmented loss share it.
      fraction: share of each micro-batch made adversarial (its first rows), in (0, 1].
      start_epoch: first epoch with adversarial examples; before it an update is, and costs, that of `vanilla`.
      shuffle: whether the micro-batches of a replica exchange x̂ before they train on them: a batch's statistics are
        then not those that its x̂ were made with, through which a label can leak (docs/method.md). For the schedules
        that carry x̂ from one update to the next, at no cost.
      augmented: whether the data bring an augmented image beside each clean one, see `Batch`.

    Raises:
      ConfigError: for a value out of range.
    """

    weight: float = 0.5
    fraction: float = 1.0
    start_epoch: int = 0
    shuffle: bool = False
    augmented: bool = False

    def __post_init__(self):
        if not 0 <= self.weight <= 1:
            raise ConfigError(f"adversarial.weight={self.weight} is outside [0, 1]: the paper's is 0.5")
        if not 0 < self.fraction <= 1:
            raise ConfigError(
                f"adversarial.fraction={self.fraction} is outside (0, 1]: 1 makes every image adversarial"
            )
        keep_whole_number(self, "adversarial", "start_epoch", 0)

    def attacked_rows(self, rows: int | None) -> int | None:
        """The number of a micro-batch's rows made adversarial; None means all, where `rows` is None too.

        Raises:
          ConfigError: if a fraction is asked of a row count that is not fixed, or leaves no row.
        """
        if self.fraction == 1:
            return rows
        if rows is None:
            raise ConfigError(
                f"adversarial.fraction={self.fraction} needs batches of a fixed size: batch with drop_remainder=True"
            )
        count = round(self.fraction * rows)
        if count < 1:
            raise ConfigError(
                f"adversarial.fraction={self.fraction} of {rows} images per micro-batch leaves none: raise one of the "
                "two"
            )
        return count
