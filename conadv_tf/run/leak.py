"""Label leaking: how far the adversarial half's training top-1 is above the clean half's (docs/method.md).

A network that reads the label out of the perturbation is right more often on attacked images than on clean ones.
Nothing here takes TensorFlow: tables are printed without it.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from conadv_tf.run import kept_config

if TYPE_CHECKING:
    from conadv_tf.methods.attack import Attack

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


def warning(points: float, epoch: int, attack: "Attack | None") -> str:
    """The line about a leak of so many points in an epoch, from 1: what it is, why, and what can be done."""
    remedies = "look at what tells the halves apart"
    if attack:
        choices = {
            "attack.label='predicted'": attack.label != "predicted",
            "attack.goal='random_target'": attack.goal != "random_target",
            f"an attack.epsilon_pixels below {attack.epsilon_pixels:g}": True,
            "attack.random_start_probability=1.0": (attack.random_start_probability or 0.0) < 1.0,
        }
        remedies = f"try {', '.join(choice for choice, is_left in choices.items() if is_left)}"
    return (
        f"label leaking: in epoch {epoch} the adversarial half's top-1 is {points:.1f} points above the clean half's: "
        f"the network reads the label from the perturbation, which then teaches it nothing: {remedies}"
    )


def leaks(result: Mapping) -> bool:
    """Tells whether a run leaks, by its result.json or what `leak_result` gives."""
    return "leak_largest" in result and result["leak_largest"] > LEAK_POINTS
