"""The training methods (SPEC section 1; paper Eq. 2-5 and Algorithm 1) and how they are chosen; schedules.py has their
mathematics on one page.

    vanilla   g = ∇_θ mean L(θ_t; x, y; main BN)
    disadv    x̂ from θ_t,      g = (1 − w) ∇_θ mean L(θ_t; x, y; main BN) + w ∇_θ mean L(θ_t; x̂, y; adversarial BN)
    conadv    x̂ from θ_{t−τ},  the same g

Where the data bring an AutoAugment image beside each clean one ("concat3"), both adversarial methods train on it too,
through BN statistics of its own; it shares the clean one's weight 1 − w equally.

A further method or schedule is one function in schedules.py and one entry here.
"""

import dataclasses
import functools
from collections.abc import Callable

import gin
import tensorflow as tf

from conadv_tf.errors import ConfigError
from conadv_tf.methods import schedules
from conadv_tf.methods.attack import Attack
from conadv_tf.models.split_batchnorm import ADVERSARIAL, AUGMENTED, MAIN

SCHEDULES = ("shadow", "lookahead", "paired", "phased")


@dataclasses.dataclass(frozen=True)
class Method:
    """A training method.

    Attributes:
      name, schedule: for reports; `schedule` is None where there is no choice of one.
      gradients: what one replica computes for a micro-batch, see schedules.py.
      branches: the BN branches it trains.
      metric_names: the keys of the metrics it returns; each is a mean over the micro-batch.
      tau: delay of the weights the attack sees; the trainer keeps that many shadow copies.
      start_epoch: before it the run trains as `vanilla`.
      attack: how it makes adversarial examples, None if it makes none.
      forward_units: cost of an update in forward passes over the batch (vanilla: 3; SPEC section 2).
      carried: what it carries between updates, from the spec of a micro-batch's images; None: nothing.
      begin: (stale network, loss, batch) → the carry, where a run begins or goes on; see `batches_ahead`.
      batches_ahead: update t is handed batch t + batches_ahead. `begin` takes the batch before that one; a run's
        first update goes without where there is none.
      updates_per_batch: updates that one batch of every replica lasts for.
    """

    name: str
    gradients: schedules.Gradients
    branches: tuple[str, ...] = (MAIN,)
    metric_names: tuple[str, ...] = ("loss", "clean_loss", "clean_top1")
    schedule: str | None = None
    tau: int = 0
    start_epoch: int = 0
    attack: Attack | None = None
    forward_units: float = 3.0
    carried: Callable[[tf.TensorSpec], dict[str, tf.TensorSpec]] | None = None
    begin: Callable[..., schedules.Carry] | None = None
    batches_ahead: int = 0
    updates_per_batch: int = 1

    def batches_before(self, update: int) -> int:
        """Batches of every replica that the data must be past for a run to go on at `update`.

        Those consumed, less the one that `begin` takes again. `update` counts from the start of the adversarial half.
        """
        if not self.begin or update + self.batches_ahead < 1:
            return update
        return (update + self.batches_ahead - 1) // self.updates_per_batch


@gin.configurable("adversarial")
@dataclasses.dataclass(frozen=True)
class AdversarialHalf:
    """What the adversarial examples count for.

    Attributes:
      weight: w of the adversarial loss; the clean one, or the clean and the augmented one, have 1 − w; in [0, 1].
      fraction: the part of each micro-batch made adversarial (its first images), in (0, 1].
      start_epoch: first epoch with an adversarial half; before it the step is, and costs, the vanilla step.
    """

    weight: float = 0.5
    fraction: float = 1.0
    start_epoch: int = 0

    def __post_init__(self):
        if not 0 <= self.weight <= 1:
            raise ConfigError(f"adversarial.weight={self.weight} is outside [0, 1]: the paper's is 0.5")
        if not 0 < self.fraction <= 1:
            raise ConfigError(
                f"adversarial.fraction={self.fraction} is outside (0, 1]: 1 makes every image adversarial"
            )
        if not isinstance(self.start_epoch, int) or self.start_epoch < 0:
            raise ConfigError(f"adversarial.start_epoch={self.start_epoch!r} must be a whole number of at least 0")


def vanilla(augmented: bool = False) -> Method:
    """Training without adversarial examples.

    Raises:
      ConfigError: for data with an augmented image beside the clean one.
    """
    if augmented:
        raise ConfigError(
            "autoaugment.mode='concat3' is for adversarial methods: with train.method='vanilla' use 'replace'"
        )
    return Method("vanilla", schedules.vanilla)


def disadv(attack: Attack | None = None, half: AdversarialHalf | None = None, augmented: bool = False) -> Method:
    """Distributed adversarial learning: x̂ from the current weights, two dependent gradients (paper 3.2).

    Args: as of `conadv`.
    """
    return _adversarial("disadv", None, 0, attack, half, augmented)


@gin.configurable(denylist=["attack", "half", "augmented"])
def conadv(
    attack: Attack | None = None,
    half: AdversarialHalf | None = None,
    schedule: str = "shadow",
    tau: int = 1,
    augmented: bool = False,
) -> Method:
    """Concurrent adversarial learning: x̂ from weights `tau` updates old (paper 3.3).

    Args:
      attack: how x̂ is made; None takes gin's `attack`.
      half: what x̂ counts for; None takes gin's `adversarial`.
      schedule: how an update is carried out, see schedules.py: "shadow", "lookahead", "paired" or "phased".
      tau: the delay of the attacked weights in updates, ≥ 0; 0 is disadv. The schedules other than "shadow" have 1.
      augmented: whether the data bring an augmented image beside each clean one, see `schedules.Batch`.

    Raises:
      ConfigError: for a schedule or delay there is not, or settings that the schedule cannot have.
    """
    if schedule not in SCHEDULES:
        raise ConfigError(f"conadv.schedule={schedule!r} is not known: choose one of {SCHEDULES}")
    if not isinstance(tau, int) or tau < 0:
        raise ConfigError(f"conadv.tau={tau!r} must be a whole number of updates, at least 0; the paper's is 1")
    if schedule != "shadow" and tau != 1:
        raise ConfigError(
            f"conadv.tau={tau} with conadv.schedule={schedule!r}, whose delay is 1: set conadv.tau=1 or use 'shadow'"
        )
    return _adversarial("conadv", schedule, tau, attack, half, augmented)


def _adversarial(
    name: str,
    schedule: str | None,
    tau: int,
    attack: Attack | None,
    half: AdversarialHalf | None,
    augmented: bool,
) -> Method:
    attack, half = attack or Attack(), half or AdversarialHalf()
    if schedule in ("paired", "phased"):
        _check_shared_pass(schedule, attack)
    if schedule == "phased":
        _check_phased(half, augmented)
    label, start = ("smoothed", 0.0) if schedule in ("paired", "phased") else ("hard", 1.0)
    given = attack.random_start_probability
    attack = dataclasses.replace(
        attack, label=attack.label or label, random_start_probability=start if given is None else given
    )
    shares = schedules.Half(half.weight, half.fraction, augmented)
    names = ("clean", "augmented", "adversarial") if augmented else ("clean", "adversarial")
    execution: dict = {"gradients": schedules.shadow(attack, shares)}
    if schedule and schedule != "shadow":
        execution = {
            "gradients": getattr(schedules, schedule)(attack, shares),
            "begin": getattr(schedules, f"begin_{schedule}")(attack, shares),
            "carried": functools.partial(schedules.carried, schedule, attack, shares),
            "batches_ahead": 1 if schedule == "lookahead" else 0,
            "updates_per_batch": 2 if schedule == "phased" else 1,
        }
    return Method(
        name,
        branches=(MAIN, AUGMENTED, ADVERSARIAL) if augmented else (MAIN, ADVERSARIAL),
        metric_names=("loss", *(f"{name}_{metric}" for name in names for metric in ("loss", "top1"))),
        schedule=schedule,
        tau=tau,
        start_epoch=half.start_epoch,
        attack=attack,
        forward_units=_forward_units(schedule, attack, half, len(names)),
        **execution,
    )


def _forward_units(schedule: str | None, attack: Attack, half: AdversarialHalf, passes: int) -> float:
    """Cost of an update, SPEC section 2; on each replica for "phased"."""
    if schedule == "phased":
        return 3.0
    attack_units = 0.0 if schedule == "paired" else attack.steps * (1.5 if attack.batch_norm == "moving" else 2.0)
    return 3 * passes - 3 + half.fraction * (3 + attack_units)


def _check_shared_pass(schedule: str, attack: Attack) -> None:
    """The clean pass is the attack's: one step from the clean image, along the gradient of the training loss."""
    wanted = {
        "random_start_probability": (None, 0.0),
        "label": (None, "smoothed"),
        "steps": (1,),
        "goal": ("untargeted",),
        "batch_norm": ("main",),
        "compute_dtype": (None,),
    }
    for setting, values in wanted.items():
        if getattr(attack, setting) not in values:
            raise ConfigError(
                f"attack.{setting}={getattr(attack, setting)!r} with conadv.schedule={schedule!r}, whose attack is a "
                f"by-product of the clean pass: set it to {values[-1]!r}, or use schedule 'shadow' or 'lookahead'"
            )


def _check_phased(half: AdversarialHalf, augmented: bool) -> None:
    """Every replica runs the same pass at every update."""
    if augmented:
        raise ConfigError(
            "autoaugment.mode='concat3' with conadv.schedule='phased', which has no third turn: "
            "use autoaugment.mode='replace', or schedule 'paired'"
        )
    for setting, value in (("fraction", 1.0), ("start_epoch", 0)):
        if getattr(half, setting) != value:
            raise ConfigError(
                f"adversarial.{setting}={getattr(half, setting)} with conadv.schedule='phased', where every replica "
                f"does the same work at every update: set it to {value:g}, or use schedule 'paired'"
            )


METHODS = {"vanilla": vanilla, "disadv": disadv, "conadv": conadv}


def make_method(name: str, augmented: bool = False) -> Method:
    """The method called `name`, configured by gin, for data with or without an augmented image beside each clean one.

    Raises:
      ConfigError: if there is none.
    """
    if name not in METHODS:
        raise ConfigError(f"train.method={name!r} is not known: choose one of {', '.join(METHODS)}")
    return METHODS[name](augmented=augmented)
