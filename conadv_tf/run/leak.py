"""Label leaking: how far the adversarial half's training top-1 is above the clean half's (docs/method.md).

A network that reads the label out of the perturbation is right more often on attacked images than on clean ones.
Nothing here takes TensorFlow: tables are printed without it.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from conadv_tf.run import kept_config

if TYPE_CHECKING:
    from conadv_tf.methods.method import Method

# A run leaks where an epoch after the warm-up has a leak of more points.
LEAK_POINTS = 2.0


def leak_of(epoch: Mapping[str, float]) -> float:
    """The share, in [−1, 1], by which the adversarial half's top-1 exceeds the clean half's in the logs of an epoch."""
    return float(epoch["adversarial_top1"]) - float(epoch["clean_top1"])


def leak_result(epochs: Sequence[dict], warmup_steps: int, start_epoch: int) -> dict[str, float]:
    """The largest and the last leak of a run, in points, for result.json.

    Args:
      epochs: the lines of metrics.jsonl, of this version or an earlier one.
      warmup_steps: updates of the learning rate's warm-up.
      start_epoch: the first epoch with adversarial images, from 0.

    Returns:
      leak_largest, leak_last: over the epochs that begin after the warm-up and with adversarial images; empty where
      there are none.
    """
    watched = [line for line in epochs if "adversarial_top1" in line and line["epoch"] > start_epoch]
    after = [line for line in watched if line["step"] - line["step"] // line["epoch"] >= warmup_steps]
    points = [round(100.0 * leak_of(line), 4) for line in after]
    return {"leak_largest": max(points), "leak_last": points[-1]} if points else {}


def kept_leak_result(epochs: Sequence[dict], config: str) -> dict[str, float]:
    """`leak_result` of a run that this version or an earlier one kept, by its metrics.jsonl and its config.gin."""
    if not epochs:
        return {}
    warmup, start = (
        float(kept_config.value(config, name) or 0)
        for name in ("learning_rate.warmup_epochs", "adversarial.start_epoch")
    )
    steps_per_epoch = epochs[-1]["step"] // epochs[-1]["epoch"]
    return leak_result(epochs, round(warmup * steps_per_epoch), int(start))


def warning(points: float, epoch: int, method: "Method") -> str:
    """The line about a leak of so many points in an epoch, from 1: what it is, why, and what can be done."""
    return (
        f"label leaking: in epoch {epoch} the adversarial half's top-1 is {points:.1f} points above the clean half's: "
        f"the network reads the label from the perturbation, which then teaches it nothing: try {_remedies(method)}"
    )


def _remedies(method: "Method") -> str:
    """The settings against leaking that the method has not and its schedule can have."""
    attack, requirements = method.attack, method.record.requires
    if attack is None:
        return "another method"
    wanted: dict[str, str | float] = {
        "label": "predicted",
        "goal": "random_target",
        "random_start_probability": 1.0,
    }
    left = {name: value for name, value in wanted.items() if getattr(attack, name) != value}
    excludes = {
        "label": " with attack.goal='untargeted'" if attack.goal != "untargeted" else "",
        "goal": " with attack.label='auto'" if attack.label == "predicted" else "",
    }
    possible = [
        f"attack.{name}={value!r}{excludes.get(name, '')}"
        for name, value in left.items()
        if all(value in requirement.allowed.get(f"attack.{name}", (value,)) for requirement in requirements)
    ]
    return ", or ".join([*possible, f"an attack.epsilon_pixels below {attack.epsilon_pixels:g}"])


def leaks(result: Mapping) -> bool:
    """Tells whether a run leaks, by its result.json or what `leak_result` gives."""
    return "leak_largest" in result and result["leak_largest"] > LEAK_POINTS
