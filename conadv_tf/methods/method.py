"""The training methods (paper Eq. 2-5 and Algorithm 1) and how they are chosen; schedules.py has their mathematics.

    vanilla   g = ∇_θ mean L(θ_t; x, y; main BN)
    disadv    x̂ from θ_t,      g = (1 − w) ∇_θ mean L(θ_t; x, y; main BN) + w ∇_θ mean L(θ_t; x̂, y; adversarial BN)
    conadv    x̂ from θ_{t−τ},  the same g

Where the data bring an AutoAugment image beside each clean one ("concat3"), both adversarial methods train on it too,
through BN statistics of its own; it shares the clean one's weight 1 − w equally.
"""

import dataclasses
from typing import Any

import gin
import tensorflow as tf

from conadv_tf.errors import ConfigError, whole_number
from conadv_tf.methods import schedules  # noqa: F401  (the page registers its schedules)
from conadv_tf.methods.attack import Attack
from conadv_tf.methods.controls import Ascent
from conadv_tf.methods.interface import PASSES, SCHEDULES, Begin, Gradients, Passes, Schedule
from conadv_tf.methods.mixture import Mixture
from conadv_tf.models.split_batchnorm import ADVERSARIAL, AUGMENTED, MAIN

_BRANCHES = {"clean": MAIN, "augmented": AUGMENTED, "adversarial": ADVERSARIAL}


@dataclasses.dataclass(frozen=True)
class Method:
    """A schedule with its settings: all that training, preflight and reports ask of a method.

    Attributes:
      record: the schedule.
      tau: delay of the weights that the attack sees; the trainer keeps that many shadow copies.
      settings: its settings, of the kinds that the record names.
    """

    record: Schedule
    tau: int
    settings: tuple[Any, ...] = ()

    @property
    def attack(self) -> Attack | None:
        """How adversarial examples are made; None where there are none."""
        return next((settings for settings in self.settings if isinstance(settings, Attack)), None)

    @property
    def mixture(self) -> Mixture | None:
        """The part that adversarial examples have in an update; None where there are none."""
        return next((settings for settings in self.settings if isinstance(settings, Mixture)), None)

    @property
    def name(self) -> str:
        """The value of train.method."""
        return self.record.method or self.record.name

    @property
    def schedule(self) -> str | None:
        """The schedule's name, for reports; None where a method has no choice of one."""
        return self.record.name if self.record.method else None

    @property
    def kind(self) -> str:
        """The name of the record: what distinguishes the method from every other."""
        return self.record.name

    @property
    def gradients(self) -> Gradients:
        """The function that one replica runs for a micro-batch."""
        return self.record.gradients(*self.settings)

    @property
    def begin(self) -> Begin | None:
        """The function that makes the first carry; None where nothing has to be made."""
        return self.record.begin and self.record.begin(*self.settings)

    @property
    def images(self) -> tuple[str, ...]:
        """The kinds of images of an update: "clean", "augmented", "adversarial"."""
        if self.mixture is None:
            return ("clean",)
        return ("clean", "augmented", "adversarial") if self.mixture.augmented else ("clean", "adversarial")

    @property
    def branches(self) -> tuple[str, ...]:
        """The BN branches that the method trains."""
        return tuple(_BRANCHES[images] for images in self.images)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The keys of the metrics of an update, each a mean over the micro-batch."""
        return ("loss", *(f"{images}_{metric}" for images in self.images for metric in ("loss", "top1")))

    @property
    def start_epoch(self) -> int:
        """The first epoch of the method; before it a run trains as `vanilla`."""
        return self.mixture.start_epoch if self.mixture else 0

    @property
    def passes(self) -> Passes:
        """The passes of a micro-batch on one replica, by kind."""
        return self.record.passes(*self.settings)

    @property
    def forward_units(self) -> float:
        """The cost of an update in forward passes over the batch of a replica (vanilla: 3; docs/method.md)."""
        attack_units = self.attack.forward_units if self.attack else 0.0
        return sum(count * (PASSES[kind] or attack_units) for kind, count in self.passes.items())

    @property
    def batches_ahead(self) -> int:
        """See `Schedule`."""
        return self.record.batches_ahead

    @property
    def updates_per_batch(self) -> int:
        """See `Schedule`."""
        return self.record.updates_per_batch

    @property
    def attacks_stale_weights(self) -> bool:
        """Tells whether an attack is on older weights than those trained. `sam_stale` has such, and no attack."""
        return self.attack is not None and self.tau > 0

    @property
    def carries(self) -> bool:
        """Tells whether an update leaves anything to the next one."""
        return self.record.carries is not None

    @property
    def mixed(self) -> tuple[str, ...]:
        """The names of the carry whose rows the micro-batches of a replica exchange."""
        shuffles = self.mixture is not None and self.mixture.shuffle
        return ("adversarial", "adversarial_labels") if shuffles else ()

    def carried(self, images: tf.TensorSpec) -> dict[str, tf.TensorSpec]:
        """Specs of what an update leaves to the next one; empty where it leaves nothing.

        Args:
          images: the spec of a replica's micro-batch as the data hand it out, [rows, H, W, C] or [rows, 2, H, W, C].

        Raises:
          ConfigError: where the batches' size is not fixed.
        """
        if self.record.carries is None:
            return {}
        if images.shape[0] is None:
            raise ConfigError(
                f"{self.record.setting} carries images between updates and needs batches of one size: "
                "batch the data with drop_remainder=True"
            )
        return self.record.carries(*self.settings, images)

    def batches_before(self, update: int) -> int:
        """Batches of every replica that the data must be past for a run to go on at `update`.

        They are those consumed, less the one that `begin` takes again. `update` counts from `start_epoch`.
        """
        if not self.record.begin or update + self.batches_ahead < 1:
            return update
        return (update + self.batches_ahead - 1) // self.updates_per_batch

    def get_config(self) -> dict[str, Any]:
        """The method in plain values, for `from_config`."""
        settings = zip(self.record.settings, self.settings, strict=True)
        return {
            "kind": self.kind,
            "tau": self.tau,
            "settings": {name: dataclasses.asdict(values) for name, values in settings},
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Method":
        """The method that `get_config` described.

        Raises:
          ConfigError: if its schedule is not registered here.
        """
        if config["kind"] not in SCHEDULES:
            raise ConfigError(f"schedule {config['kind']!r} is not known here: register it before the model is loaded")
        record = SCHEDULES[config["kind"]]
        settings = tuple(kind(**config["settings"][name]) for name, kind in record.settings.items())
        return cls(record, config["tau"], settings)


def vanilla() -> Method:
    """Training without adversarial examples."""
    return _method(SCHEDULES["vanilla"], ())


def disadv(attack: Attack | None = None, mixture: Mixture | None = None) -> Method:
    """Distributed adversarial learning: x̂ from the current weights, two dependent gradients (paper 3.2).

    Args: see `conadv`.
    """
    return _method(SCHEDULES["disadv"], (attack or Attack(), mixture or Mixture()))


def noise(attack: Attack | None = None, mixture: Mixture | None = None) -> Method:
    """The control of an attack: ±ε of random sign in its place (controls.py).

    Args: see `conadv`.
    """
    return _method(SCHEDULES["noise"], (attack or Attack(), mixture or Mixture()))


def sam(ascent: Ascent | None = None, stale: bool = False) -> Method:
    """Sharpness-aware minimisation (controls.py).

    Args:
      ascent: how far the weights move; None takes gin's `sam`.
      stale: whether the direction is that at the weights one update old.
    """
    return _method(SCHEDULES["sam_stale" if stale else "sam"], (ascent or Ascent(),))


@gin.configurable(denylist=["attack", "mixture"])
def conadv(
    attack: Attack | None = None, mixture: Mixture | None = None, schedule: str = "shadow", tau: int = 1
) -> Method:
    """Concurrent adversarial learning: x̂ from weights `tau` updates old (paper 3.3).

    Args:
      attack: how x̂ is made; None takes gin's `attack`.
      mixture: the part that x̂ has in an update; None takes gin's `adversarial`.
      schedule: how an update is carried out, see schedules.py: "shadow", "lookahead", "paired" or "phased".
      tau: the delay of the attacked weights in updates, ≥ 0; 0 is disadv. The schedules other than "shadow" have 1.

    Raises:
      ConfigError: for an unknown schedule or delay, or settings that the schedule cannot have.
    """
    choices = schedules_of("conadv")
    if schedule not in choices:
        raise ConfigError(f"conadv.schedule={schedule!r} is not known: choose one of {choices}")
    record = SCHEDULES[schedule]
    tau = whole_number("conadv.tau", tau, 0, ": the paper's delay is 1 update")
    if record.delay not in (None, tau):
        raise ConfigError(
            f"conadv.tau={tau} with {record.setting}, whose delay is {record.delay}: set conadv.tau={record.delay} or "
            "use 'shadow'"
        )
    return _method(record, (attack or Attack(), mixture or Mixture()), tau)


def _method(
    record: Schedule, settings: tuple[Any, ...], tau: int | None = None, augmented: bool | None = None
) -> Method:
    """A schedule with its settings, checked and resolved; `augmented`: the data's, where the settings do not say it."""
    values = {
        f"{name}.{field}": value
        for name, part in zip(record.settings, settings, strict=True)
        for field, value in dataclasses.asdict(part).items()
    }
    augmented = values.get("adversarial.augmented", augmented)
    record.check({**values, "autoaugment.mode": "concat3" if augmented else "replace"})
    resolved = tuple(_resolved(record, part) if isinstance(part, Attack) else part for part in settings)
    return Method(record, (record.delay or 0) if tau is None else tau, resolved)


def _resolved(record: Schedule, attack: Attack) -> Attack:
    """The attack with a value for what a recipe leaves to the schedule."""
    start = attack.random_start_probability
    automatic = record.label if attack.goal == "untargeted" else "hard"
    return dataclasses.replace(
        attack,
        label=automatic if attack.label == "auto" else attack.label,
        random_start_probability=record.default("attack.random_start_probability", 1.0) if start is None else start,
    )


def _configured(record: Schedule, augmented: bool, tau: int | None = None) -> Method:
    """A schedule with its settings as gin has them."""
    settings = (kind(augmented=augmented) if kind is Mixture else kind() for kind in record.settings.values())
    return _method(record, tuple(settings), tau, augmented)


def method_names() -> tuple[str, ...]:
    """The values that train.method may have."""
    return tuple(dict.fromkeys(record.method or name for name, record in SCHEDULES.items()))


def schedules_of(method: str) -> tuple[str, ...]:
    """The names of the schedules that a method offers as a choice."""
    return tuple(name for name, record in SCHEDULES.items() if record.method == method)


def make_method(name: str, augmented: bool = False) -> Method:
    """The method called `name`, configured by gin, for data with or without an augmented image beside each clean one.

    Raises:
      ConfigError: if there is none, or its settings exclude each other.
    """
    if name not in method_names():
        raise ConfigError(f"train.method={name!r} is not known: choose one of {', '.join(method_names())}")
    if name not in SCHEDULES:
        return conadv(mixture=Mixture(augmented=augmented))
    return _configured(SCHEDULES[name], augmented)


def alternatives(own: Method) -> tuple[list[Method], list[str]]:
    """A method and every other under the same settings of attack and mixture, as gin has them.

    Returns:
      (the methods, `own` first; a line for each that the settings exclude).
    """
    augmented = "augmented" in own.images
    found, excluded = [own], []
    for name, record in SCHEDULES.items():
        if name == own.kind:
            continue
        try:
            # The paper's delay, where a schedule has any.
            tau = 1 if record.delay is None else record.delay
            found.append(_configured(record, augmented and bool(record.settings), tau))
        except ConfigError as error:
            excluded.append(f"no row for {name}: {str(error).splitlines()[0]}")
    return found, excluded
