"""The record that describes a schedule, what a schedule is given and gives, and the registry of all schedules.

A further method is one function, as in schedules.py, and one call of `register`; docs/architecture.md has an example.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from conadv_tf.errors import ConfigError
from conadv_tf.methods.attack import Attack
from conadv_tf.methods.mixture import Mixture
from conadv_tf.models.network import Network

Carry = dict[str, tf.Tensor]
# A loss maps (labels int32 [rows], logits float32 [rows, classes]) to float32 [rows].
Loss = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
# The number of passes by kind, a key of PASSES.
Passes = dict[str, float]
# The kinds of passes, and the forward passes that each costs; None: `Attack.forward_units`, by the attack's settings.
PASSES: dict[str, float | None] = {"train": 3.0, "attack": None, "train and attack": 3.0, "train, then attack": 4.0}


class Batch(NamedTuple):
    """One replica's micro-batch.

    images float32 [rows, H, W, C] in [0, 255], labels int32 [rows], seed int32 [2]; augmented: like images, or None;
    clean_turn: bool scalar, for schedules that take turns: whether the replica runs the clean pass of this update.
    """

    images: tf.Tensor
    labels: tf.Tensor
    seed: tf.Tensor
    augmented: tf.Tensor | None = None
    clean_turn: tf.Tensor | None = None


class Update(NamedTuple):
    """Gradients in the order of the trainable variables, metrics by name, and the next carry."""

    gradients: list[tf.Tensor]
    metrics: dict[str, tf.Tensor]
    carry: Carry


# (network at θ_t, network at θ_{t−τ}, loss, batch, carry) → Update
Gradients = Callable[[Network, Network, Loss, Batch, Carry], Update]
# (network at the stale weights, loss, batch) → carry
Begin = Callable[[Network, Loss, Batch], Carry]


class Requirement(NamedTuple):
    """Settings that a schedule cannot do without.

    allowed: the values that a setting may have, by its name in a recipe; the last one is what an error proposes.
    because: the reason, a relative clause. instead: another way out.
    """

    allowed: Mapping[str, tuple]
    because: str
    instead: str


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The record of a schedule: all that the package knows of how an update is carried out.

    Attributes:
      name: the schedule's name in recipes and reports.
      gradients: (*settings) → what one replica computes for a micro-batch.
      passes: (*settings) → passes of one micro-batch on one replica.
      method: "conadv" where `conadv.schedule` chooses it; None for a schedule that is a method of its own.
      settings: the kinds of its settings, by their name in a recipe: dataclasses that gin configures. With an Attack
        there are adversarial examples, and a branch of batch norm for them.
      label: what "auto" of attack.label is for an untargeted attack.
      delay: updates that the attacked weights are old; None where `conadv.tau` says it.
      carries: (*settings, spec of a micro-batch's images) → what one update leaves to the next; None: nothing.
      begin: (*settings) → what makes the first carry, where a run begins or goes on; see `batches_ahead`.
      batches_ahead: update t is handed batch t + batches_ahead. `begin` takes the batch before that one; a run's first
        update goes without where there is none.
      updates_per_batch: updates that one batch of every replica lasts for. With 2 the replicas take turns.
      moves: whether a pass is at other weights than the network's, which it must be able to take (`Network.can_move`).
      perturbed: (attack, network at the stale weights, loss, batch) → x̂, float32 like the batch's images, to look at;
        None: `passes.attack_images`, which a schedule with an attack makes.
      requires: settings that the schedule cannot do without.
    """

    name: str
    gradients: Callable[..., Gradients]
    passes: Callable[..., Passes]
    method: str | None = None
    settings: Mapping[str, type] = dataclasses.field(default_factory=lambda: {"attack": Attack, "adversarial": Mixture})
    label: str = "hard"
    delay: int | None = 0
    carries: Callable[..., dict[str, tf.TensorSpec]] | None = None
    begin: Callable[..., Begin] | None = None
    batches_ahead: int = 0
    updates_per_batch: int = 1
    moves: bool = False
    perturbed: Callable[[Attack, Network, Loss, Batch], tf.Tensor] | None = None
    requires: tuple[Requirement, ...] = ()

    @property
    def setting(self) -> str:
        """The binding of a recipe that chooses the schedule."""
        return f"{self.method}.schedule={self.name!r}" if self.method else f"train.method={self.name!r}"

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises ConfigError at the first setting, by its name in a recipe, that the schedule cannot have."""
        for requirement in self.requires:
            for name, allowed in requirement.allowed.items():
                if settings[name] not in allowed:
                    raise ConfigError(
                        f"{name}={settings[name]!r} with {self.setting}, {requirement.because}: set it to "
                        f"{allowed[-1]!r}, or use {requirement.instead}"
                    )

    def default(self, name: str, otherwise: Any) -> Any:
        """The value that the schedule gives to a setting left at None: the required one, if there is one."""
        allowed = [requirement.allowed[name] for requirement in self.requires if name in requirement.allowed]
        return allowed[0][-1] if allowed else otherwise


SCHEDULES: dict[str, Schedule] = {}


def register(schedule: Schedule) -> Schedule:
    """Makes a schedule known by its name; from then on recipes, preflight and tables have it. Returns it.

    Raises:
      ConfigError: if the name is taken by another one, or the schedule is of a method that offers no choice.
    """
    if schedule.method not in (None, "conadv"):
        raise ConfigError(
            f"schedule {schedule.name!r} has method={schedule.method!r}: use 'conadv', or None for a method of its own"
        )
    if SCHEDULES.setdefault(schedule.name, schedule) is not schedule:
        raise ConfigError(f"a schedule called {schedule.name!r} is registered already: choose another name")
    return schedule


def carrying(*names: str) -> Callable[[Attack, Mixture, tf.TensorSpec], dict[str, tf.TensorSpec]]:
    """The `carries` of a schedule that hands images and labels on.

    Args:
      names: "images", "labels", "augmented" (where there are augmented images) of a batch; "adversarial",
        "adversarial_labels" of its attacked rows; "begun", bool, whether the adversarial ones are real.

    Returns:
      (attack, mixture, images as the data hand them out, [rows, H, W, C] or [rows, 2, H, W, C]) → specs by name. Images
      keep the data's dtype; x̂ does too where it is whole pixels (uint8), and is float32 otherwise.
    """

    def carries(attack: Attack, mixture: Mixture, images: tf.TensorSpec) -> dict[str, tf.TensorSpec]:
        rows, first = images.shape[0], mixture.attacked_rows(images.shape[0])
        whole = images.dtype.is_integer and attack.keeps_whole_pixels()
        clean = tf.TensorSpec((rows, *images.shape[-3:]), images.dtype)
        specs = {
            "images": clean,
            "labels": tf.TensorSpec((rows,), tf.int32),
            "adversarial": tf.TensorSpec((first, *images.shape[-3:]), images.dtype if whole else tf.float32),
            "adversarial_labels": tf.TensorSpec((first,), tf.int32),
            "begun": tf.TensorSpec((), tf.bool),
            **({"augmented": clean} if mixture.augmented else {}),
        }
        return {name: specs[name] for name in names if name in specs}

    return carries
